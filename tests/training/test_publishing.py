"""The push against a Hub on the loopback device, driven by the real huggingface_hub in a subprocess."""

import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAMS
from fake_hub import FINE_GRAINED, LOSE_ANSWER, READER, RESET, WRITER, FakeHub

pytestmark = pytest.mark.slow  # a process with the real huggingface_hub and a server for nearly every test

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
    return json.loads(
        run(hub, home, [sys.executable, str(PROGRAMS / "hub_client.py"), sent], token, **extra).splitlines()[-1]
    )


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
        extra = no_dns()
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


def no_dns() -> dict[str, str]:
    """A process in which no name can be looked up, without asking a name server."""
    path = ":".join([str(PROGRAMS / "no_dns"), *filter(None, sys.path)])
    return {"PYTHONPATH": path, "HF_ENDPOINT": "http://hub.invalid"}


# ------------------------------------------------------------------------------- the upload


@pytest.mark.parametrize("private", [True, False])
def test_the_model_arrives_whole_in_one_commit(hub: FakeHub, tmp_path: Path, final: Path, private: bool) -> None:
    answer = call(hub, tmp_path, "push_final_folder", final, "user/name", private)
    assert answer == {"error": None, "value": f"{hub.url}/user/name", "waits": []}
    assert hub.repos["user/name"].private is private
    (commit,) = hub.commits("user/name")
    assert {k: v for k, v in commit["files"].items() if k != ".gitattributes"} == FINAL
    run(hub, tmp_path, [sys.executable, str(PROGRAMS / "downloads.py"), "user/name", "copy"])
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
    extra = no_dns() if fault == "no DNS" else {"HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}"}
    answer = call(hub, tmp_path, "push_final_folder", final, "user/name", True, **extra)
    assert answer["error"] == "UploadError" and answer["waits"] == [1, 4, 15, 60]
    assert "hf upload user/name" in answer["message"] and model_is_on_disk(final)


def test_a_hub_base_that_cannot_be_asked_has_an_unknown_licence(hub: FakeHub, tmp_path: Path) -> None:
    expected = ["other", "unknown-see-the-base-model", "https://huggingface.co/someone/model"]
    assert call(hub, tmp_path, "derived_licence", "someone/model")["value"] == expected
    assert hub.count("GET", "/api/models/someone/model") == 1


@pytest.mark.slow
def test_transformers_loads_what_was_pushed(hub: FakeHub, tmp_path: Path, tiny_base: Path) -> None:
    assert call(hub, tmp_path, "push_final_folder", tiny_base, "user/tiny", True)["error"] is None
    run(hub, tmp_path, [sys.executable, str(PROGRAMS / "loads_what_was_pushed.py"), str(tiny_base)])
