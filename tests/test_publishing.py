"""The Publishing section against a Hub on the loopback device, driven by the real huggingface_hub in a subprocess."""

import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FINE_GRAINED, LOSE_ANSWER, READER, RESET, WRITER, FakeHub

from training import publishing

# Waiting is recorded instead of done; what the function returns or raises becomes the last line of stdout.
CLIENT = """
import json, sys, time
from pathlib import Path
waits = []
time.sleep = waits.append
from training import publishing
name, arguments = json.loads(sys.argv[1])
arguments = [Path(a[5:]) if str(a).startswith("path:") else a for a in arguments]
answer = {"error": None, "value": None}
try:
    answer["value"] = getattr(publishing, name)(*arguments)
except (publishing.SettingsError, publishing.UploadError) as error:
    answer |= {"error": type(error).__name__, "message": str(error)}
print(json.dumps(answer | {"waits": waits}))
"""
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
FINAL = {
    "model.safetensors": WEIGHTS,
    "config.json": b'{"model_type": "qwen2_5_vl"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "dom_recipe.json": b'{"prompt": "Write the HTML."}',
    "README.md": b"---\nlicense: apache-2.0\n---\n# Card\n",
    "evaluation/results.json": b"{}",
}
SECRET = {
    "training_args.bin": b"pickle",
    "optimizer.pt": b"pickle",
    "state.pkl": b"pickle",
    ".env": b"TOKEN=1",
    "token": b"1",
    "global_step1/model.safetensors": b"shard",
    "evaluation/page-0001/written.html": b"<html>",
    "runs/events.out.tfevents.1": b"log",
}
FACTS: dict[str, Any] = {
    "base_model": "Hcompany/Holo1-3B",
    "base_revision": "abc123",
    "base_licence": None,
    "dataset": "HuggingFaceM4/WebSight",
    "dataset_config": "v0.1",
    "dataset_revision": None,
    "dataset_licence": "cc-by-4.0",
    "pages_trained": 961,
    "pages_held_out": 20,
    "drops": "1,000 asked, 37 too long, 2 unreadable, 961 kept",
    "settings": {"learning_rate": 1e-5, "num_train_epochs": 1},
    "recipe": {"prompt": "Write the HTML.", "max_pixels": 1003520},
    "versions": {"torch": "2.11", "transformers": "5.23"},
    "hardware": "1 x H200",
    "results": {"n": 20, "valid": 0.95, "exact": 0.6, "truncated": 0.05, "looping": 0.0, "tokens_per_second": 41.5},
    "results_before": None,
    "train_loss": 0.25,
    "steps": 120,
    "seconds": 900.0,
    "commit": None,
    "repo_id": "user/holo1_ui2dom",
    "lora": False,
    "quantization": "none",
}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        yield server


@pytest.fixture
def final(tmp_path: Path) -> Path:
    folder = tmp_path / "final folder"  # with a space, as people have them
    for name, content in (FINAL | SECRET).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "merges.txt").symlink_to(folder / "token")
    return folder


def run(hub: FakeHub, home: Path, command: list[str], token: str | None = WRITER, **extra: str) -> str:
    """Everything the command wrote. None of it, nor any file in its home, may hold the token."""
    environment = hub.environment(home / "hub_home", token) | {"PYTHONPATH": ":".join(filter(None, sys.path))} | extra
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=home)
    for text in (done.stdout, done.stderr, *(p.read_text(errors="replace") for p in home.rglob("*") if p.is_file())):
        assert token is None or token not in text
    assert done.returncode == 0, done.stderr
    return done.stdout


def call(
    hub: FakeHub, home: Path, name: str, *arguments: Any, token: str | None = WRITER, **extra: str
) -> dict[str, Any]:
    sent = json.dumps([name, [f"path:{a}" if isinstance(a, Path) else a for a in arguments]])
    return json.loads(run(hub, home, [sys.executable, "-c", CLIENT, sent], token, **extra).splitlines()[-1])


def repeat_command(message: str) -> str:
    return message.split("To upload it: ")[1]


def model_is_on_disk(folder: Path) -> bool:
    return all((folder / name).read_bytes() == content for name, content in FINAL.items())


# ------------------------------------------------------------------------------- before training


def test_a_bare_name_becomes_the_users_own_and_exists_at_once(hub: FakeHub, tmp_path: Path) -> None:
    answer = call(hub, tmp_path, "check_hub_access", "holo1_ui2dom", True)
    assert answer["value"] == "user/holo1_ui2dom"
    assert hub.repos["user/holo1_ui2dom"].private
    assert call(hub, tmp_path, "check_hub_access", "team/holo1_ui2dom", False)["value"] == "team/holo1_ui2dom"
    assert not hub.repos["team/holo1_ui2dom"].private


@pytest.mark.parametrize(
    ("token", "repo_id", "said"),
    [
        (None, "name", "Token is required"),
        ("hf_unknownunknownunknown", "name", "Invalid user token"),
        (READER, "name", "may only read"),
        (FINE_GRAINED, "name", "don't have the rights"),
        (FINE_GRAINED, "user/existing", "write access"),
        (WRITER, "foreign/name", "don't have the rights"),
        (WRITER, "foreign/existing", "write access"),
        (WRITER, "readers/name", "don't have the rights"),
        (WRITER, "no spaces please", "no spaces please"),
        (WRITER, "a/b/c", "a/b/c"),
        (WRITER, "", "''"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_training(
    hub: FakeHub, tmp_path: Path, token: str | None, repo_id: str, said: str
) -> None:
    hub.add_repo("foreign/existing")
    hub.add_repo("user/existing")
    answer = call(hub, tmp_path, "check_hub_access", repo_id, False, token=token)
    assert answer["error"] == "SettingsError"
    assert said in answer["message"] and repo_id in answer["message"] and "HF_TOKEN" in answer["message"]
    assert set(hub.repos) == {"foreign/existing", "user/existing"}


def test_no_token_is_refused_without_a_request(hub: FakeHub, tmp_path: Path) -> None:
    assert call(hub, tmp_path, "check_hub_access", "name", False, token=None)["error"] == "SettingsError"
    assert [path for _, path in hub.requests if path != "/api/agent-harnesses"] == []


def test_a_public_repository_is_never_used_for_a_private_model(hub: FakeHub, tmp_path: Path, final: Path) -> None:
    repo = hub.add_repo("user/name")
    answer = call(hub, tmp_path, "check_hub_access", "user/name", True)
    assert answer["error"] == "SettingsError" and "hf repos settings user/name --private" in answer["message"]
    answer = call(hub, tmp_path, "push_final_folder", final, "user/name", True)
    assert answer["error"] == "UploadError" and answer["waits"] == []
    assert repeat_command(answer["message"]).startswith("hf repos settings user/name --private && hf upload ")
    assert not repo.blobs and not hub.commits("user/name")
    bin_folder = f"{Path(sys.executable).parent}"
    path = {"PATH": f"{bin_folder}:/usr/bin:/bin"}
    run(hub, tmp_path, ["sh", "-c", repeat_command(answer["message"])], **path)
    assert repo.private and set(repo.files) == {".gitattributes", *FINAL}


@pytest.mark.parametrize("fault", ["refused", "no DNS", "500", "offline"])
def test_a_hub_that_cannot_be_asked_is_said_before_training(hub: FakeHub, tmp_path: Path, fault: str) -> None:
    extra = {}
    if fault == "refused":
        extra["HF_ENDPOINT"] = f"http://127.0.0.1:{closed_port()}"
    elif fault == "no DNS":
        extra = no_dns(tmp_path)
    elif fault == "offline":
        extra["HF_HUB_OFFLINE"] = "1"
    else:
        hub.fail_next("/api/", 500, times=99)
    answer = call(hub, tmp_path, "check_hub_access", "name", False, **extra)
    assert answer["error"] == "SettingsError" and "network" in answer["message"]


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def no_dns(folder: Path) -> dict[str, str]:
    """A process in which no name can be looked up, without asking a name server."""
    code = "import socket\ndef fail(*_, **__): raise socket.gaierror(-2, 'Name or service not known')\n"
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(f"{code}socket.getaddrinfo = fail\n")
    path = ":".join([str(folder / "site"), *filter(None, sys.path)])
    return {"PYTHONPATH": path, "HF_ENDPOINT": "http://hub.invalid"}


# ------------------------------------------------------------------------------- the upload


@pytest.mark.parametrize("private", [True, False])
def test_the_model_arrives_whole_in_one_commit(hub: FakeHub, tmp_path: Path, final: Path, private: bool) -> None:
    answer = call(hub, tmp_path, "push_final_folder", final, "user/name", private)
    assert answer == {"error": None, "value": f"{hub.url}/user/name", "waits": []}
    assert hub.repos["user/name"].private is private
    (commit,) = hub.commits("user/name")
    assert {k: v for k, v in commit["files"].items() if k != ".gitattributes"} == FINAL
    code = "from huggingface_hub import snapshot_download as get; print(get('user/name', local_dir='copy'))"
    run(hub, tmp_path, [sys.executable, "-c", code])
    copy = tmp_path / "copy"
    arrived = {str(path.relative_to(copy)): path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert {name: content for name, content in arrived.items() if not name.startswith((".cache", ".git"))} == FINAL


def test_pushing_again_sends_only_what_changed_and_drops_old_shards(hub: FakeHub, tmp_path: Path, final: Path) -> None:
    old = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}", "notes.txt": b"mine"}
    hub.add_repo("user/name", old)
    for _ in range(2):
        assert call(hub, tmp_path, "push_final_folder", final, "user/name", False)["error"] is None
    assert len(hub.commits("user/name")) == 1 and hub.count("PUT", "/lfs/") == 1
    assert set(hub.repos["user/name"].files) == {".gitattributes", "notes.txt", *FINAL}
    (final / "config.json").write_bytes(b'{"changed": true}')
    assert call(hub, tmp_path, "push_final_folder", final, "user/name", False)["error"] is None
    assert len(hub.commits("user/name")) == 2 and hub.count("PUT", "/lfs/") == 1


def test_a_folder_without_weights_changes_nothing(hub: FakeHub, tmp_path: Path, final: Path) -> None:
    hub.add_repo("user/name", {"model.safetensors": b"good"})
    (final / "model.safetensors").unlink()
    assert call(hub, tmp_path, "push_final_folder", final, "user/name", False)["error"] == "UploadError"
    assert not hub.commits("user/name")


def inject(hub: FakeHub, fault: str, **options: Any) -> None:
    status, where = fault.split(" on ")
    hub.fail_next(where, int(status) if status.isdigit() else status, **options)


LASTING = (
    "401 on /commit/, 403 on /commit/, 413 on /commit/, 403 on /preupload/, 403 on /lfs/, 413 on /lfs/, 401 on /create"
)
PASSING = (
    "429 on /commit/, 500 on /commit/, reset on /commit/, 429 on /lfs/, 500 on /lfs/, reset on /lfs/, 503 on /create"
)


@pytest.mark.parametrize("fault", LASTING.split(", "))
def test_a_lasting_refusal_is_not_retried(hub: FakeHub, tmp_path: Path, final: Path, fault: str) -> None:
    inject(hub, fault, times=99, message="no {token}")
    answer = call(hub, tmp_path, "push_final_folder", final, "user/name", True)
    assert answer["error"] == "UploadError" and answer["waits"] == []
    assert fault[:3] in answer["message"] and str(final) in answer["message"]
    assert model_is_on_disk(final) and not hub.commits("user/name")


@pytest.mark.parametrize("fault", PASSING.split(", "))
def test_a_passing_failure_is_retried(hub: FakeHub, tmp_path: Path, final: Path, fault: str) -> None:
    inject(hub, fault, times=2)
    answer = call(hub, tmp_path, "push_final_folder", final, "user/name", True)
    assert answer["error"] is None and len(answer["waits"]) == 2
    assert len(hub.commits("user/name")) == 1


@pytest.mark.parametrize("where", ["/commit/", "/repos/create"])
def test_an_answer_that_gets_lost_does_not_make_a_second_commit(
    hub: FakeHub, tmp_path: Path, final: Path, where: str
) -> None:
    hub.fail_next(where, LOSE_ANSWER)
    answer = call(hub, tmp_path, "push_final_folder", final, "user/name", True)
    assert answer["error"] is None and answer["waits"] == [1]
    assert len(hub.commits("user/name")) == 1 and hub.count("PUT", "/lfs/") == 1


@pytest.mark.parametrize("status", [429, 500, RESET])
def test_retries_end_and_the_command_in_the_message_uploads_the_model(
    hub: FakeHub, tmp_path: Path, final: Path, status: int | str
) -> None:
    hub.fail_next("/commit/", status, times=5)
    answer = call(hub, tmp_path, "push_final_folder", final, "user/name", True)
    assert answer["error"] == "UploadError" and answer["waits"] == [1, 4, 15, 60]
    assert hub.count("POST", "/commit/") == 5 and model_is_on_disk(final)
    command = repeat_command(answer["message"])
    program, *arguments = shlex.split(command)
    assert program == "hf" and "--private" in arguments and WRITER not in command
    run(hub, tmp_path, [str(Path(sys.executable).parent / "hf"), *arguments])
    assert {k: v for k, v in hub.repos["user/name"].files.items() if k != ".gitattributes"} == FINAL
    assert hub.count("PUT", "/lfs/") == 1  # the weights were there already


@pytest.mark.parametrize("fault", ["refused", "no DNS"])
def test_no_network_after_training_leaves_the_model_and_the_command(
    hub: FakeHub, tmp_path: Path, final: Path, fault: str
) -> None:
    extra = no_dns(tmp_path) if fault == "no DNS" else {"HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}"}
    answer = call(hub, tmp_path, "push_final_folder", final, "user/name", True, **extra)
    assert answer["error"] == "UploadError" and answer["waits"] == [1, 4, 15, 60]
    assert "hf upload user/name" in answer["message"] and model_is_on_disk(final)


# ------------------------------------------------------------------------------- the licence


@pytest.mark.parametrize(
    ("base", "given", "expected"),
    [
        ("Hcompany/Holo1-3B", None, ("other", "qwen-research")),
        ("Hcompany/Holo1-3B", "apache-2.0", ("other", "qwen-research")),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "mit", ("other", "qwen-research")),
        ("Hcompany/Holo1-7B", None, ("apache-2.0", None)),
        ("Qwen/Qwen2.5-VL-7B-Instruct", None, ("apache-2.0", None)),
        ("someone/model", "MIT", ("mit", None)),
        ("someone/model", "My Own Terms\n---\nlicense: mit", ("other", "my-own-terms-license-mit")),
    ],
)
def test_the_licence_is_the_bases_own(base: str, given: str | None, expected: tuple[str, str | None]) -> None:
    assert publishing.derived_licence(base, given)[:2] == expected


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: cc-by-nc-4.0", ("cc-by-nc-4.0", None, None)),
        (
            "license: other\nlicense_name: my-terms\nlicense_link: https://x.test",
            ("other", "my-terms", "https://x.test"),
        ),
        ("license: mit\nbase_model: Hcompany/Holo1-3B", publishing.QWEN_RESEARCH),
        ("tags: [a]", ("other", "unknown-see-the-base-model", None)),
        ("license: [unclosed", ("other", "unknown-see-the-base-model", None)),
        (None, ("other", "unknown-see-the-base-model", None)),
    ],
)
def test_a_local_bases_licence_is_read_from_its_card(
    tmp_path: Path, front: str | None, expected: tuple[str | None, ...]
) -> None:
    if front is not None:
        (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# Base\n")
    assert publishing.derived_licence(str(tmp_path)) == expected


def test_a_hub_base_that_cannot_be_asked_has_an_unknown_licence(hub: FakeHub, tmp_path: Path) -> None:
    expected = ["other", "unknown-see-the-base-model", "https://huggingface.co/someone/model"]
    assert call(hub, tmp_path, "derived_licence", "someone/model")["value"] == expected
    assert hub.count("GET", "/api/models/someone/model") == 1


# ------------------------------------------------------------------------------- the card


def front_matter(text: str) -> dict[str, Any]:
    """As the Hub's own client reads it."""
    from huggingface_hub import ModelCard

    return ModelCard(text).data.to_dict()


def test_the_card_says_what_the_facts_say(tmp_path: Path) -> None:
    text = publishing.write_model_card(tmp_path, FACTS)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text
    assert front_matter(text) == {
        "base_model": "Hcompany/Holo1-3B",
        "base_model_relation": "finetune",
        "datasets": ["HuggingFaceM4/WebSight"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "qwen-research",
        "license_link": publishing.QWEN_RESEARCH[2],
        "pipeline_tag": "image-text-to-text",
        "tags": ["screenshot-to-html"],
    }
    for row in ("| valid | not measured | 0.95 |", "| train_loss | 0.25 |", "| commit | unknown |", "| steps | 120 |"):
        assert row in text
    for fact in ("961 kept", "learning_rate | 1e-05", "1003520", "1 x H200", "cc-by-4.0, asks for credit"):
        assert fact in text
    assert "Improved using Qwen" in text  # section 4.b of the Qwen research licence
    assert "--model user/holo1_ui2dom --image" in text and 'from_pretrained("user/holo1_ui2dom")' in text


def test_the_cards_python_compiles_and_nothing_is_invented(tmp_path: Path) -> None:
    facts = {"base_model": str(tmp_path), "dataset": str(tmp_path), "drops": f"2 of {tmp_path}/a.png unreadable"}
    text = publishing.write_model_card(tmp_path, facts)
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")
    assert set(front_matter(text)) == {"library_name", "license", "license_name", "pipeline_tag", "tags"}
    assert "| valid | not measured | not measured |" in text
    assert str(tmp_path.parent) not in text  # a folder's name is enough


def test_hostile_facts_stay_inside_their_cells(tmp_path: Path) -> None:
    evil = "x'\"\n---\nlicense: mit\n```\n| a | <script>alert(1)</script> \\ `code`"
    facts = {k: {evil: evil} if isinstance(v, dict) else evil for k, v in FACTS.items()}
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(f"---\n{json.dumps({'license_name': evil, 'license_link': evil})}\n---\n")
    facts |= {"base_model": str(base), "results_before": {"valid": evil}}
    text = publishing.write_model_card(tmp_path, facts)
    assert sorted(front_matter(text)) == sorted(
        ["library_name", "license", "license_link", "license_name", "pipeline_tag", "tags"]
    )
    assert front_matter(text)["license"] == "other" and "<script" not in text
    body = text.split("\n---\n", 1)[1]
    assert body.count("\n```") == 6 and "\n---" not in body
    cells = [line for line in body.splitlines() if line.startswith("|")]
    assert all(line.count("|") in (3, 4) and line.endswith("|") for line in cells)


def test_no_token_reaches_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "an-odd-token-of-a-mirror")
    leaks = {"settings": {"hub_token": WRITER, "note": "an-odd-token-of-a-mirror", "max_html_tokens": 4096}}
    text = publishing.write_model_card(tmp_path, FACTS | leaks | {"hardware": f"box {WRITER}", "commit": WRITER})
    assert WRITER not in text and "an-odd-token" not in text and "4096" in text


def test_transformers_loads_what_was_pushed(hub: FakeHub, tmp_path: Path, tiny_base: Path) -> None:
    assert call(hub, tmp_path, "push_final_folder", tiny_base, "user/tiny", True)["error"] is None
    code = """if True:
        import sys
        from transformers import AutoModelForImageTextToText, AutoProcessor
        folder, name = (AutoModelForImageTextToText.from_pretrained(place) for place in (sys.argv[1], "user/tiny"))
        there = name.state_dict()
        assert there.keys() == folder.state_dict().keys()
        assert all(there[key].equal(value) for key, value in folder.state_dict().items())
        assert AutoProcessor.from_pretrained("user/tiny").chat_template
    """
    run(hub, tmp_path, [sys.executable, "-c", code, str(tiny_base)])


def test_a_parent_in_a_list_binds_as_one_alone_does(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nbase_model:\n- Qwen/Qwen2.5-VL-3B-Instruct\n---\n")
    assert publishing.derived_licence(str(tmp_path))[1] == "qwen-research"
