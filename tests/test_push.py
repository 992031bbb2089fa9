"""The real main against a Hub: pushed whole, refused early, or left on disk; then used from there."""

import json
import shutil
import subprocess
import sys

import pytest
import warm
from card_examples import block, numbers_without_a_source, run_commands
from conftest import MAIN, small_run
from fake_hub import READER, WRITER, FakeHub
from huggingface_hub import ModelCard

TRAIN = {"max_steps": 1, "push_to_hub": True, "private_repo": True, "hub_repo": "my_model"}


def start(script: str, flags: list[str], cwd, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """With this environment and nothing else of this process's."""
    options = {"cwd": cwd, "timeout": 300}
    return warm.run(script, flags, environment=environment, **options) or subprocess.run(
        [sys.executable, script, *flags], env=environment, capture_output=True, text=True, **options
    )


def train(hub: FakeHub, base, pages, cwd, token: str | None = WRITER) -> subprocess.CompletedProcess:
    return start(MAIN, small_run(base, pages, **TRAIN), cwd, hub.environment(cwd / "home", token=token))


@pytest.mark.slow
def test_a_trained_model_is_pushed_in_one_commit_and_used_from_there(tiny_base, pages_folder, tmp_path):
    # Both local, and both say where they come from.
    base, pages = (shutil.copytree(place, tmp_path / name) for place, name in ((tiny_base, "b"), (pages_folder, "p")))
    (base / "dom_recipe.json").write_text('{"base_model": "Hcompany/Holo1-3B"}')
    made = {"source": "HuggingFaceM4/WebSight", "source_is_on_hub": True, "browser": {}}
    (pages / "summary.json").write_text(json.dumps(made))
    with FakeHub() as hub:
        done = train(hub, base, pages, tmp_path)
        assert done.returncode == 0, done.stderr
        assert hub.repos["user/my_model"].private and len(hub.commits("user/my_model")) == 1
        files = set(hub.commits("user/my_model")[0]["files"])
        final = tmp_path / "holo1_dom_finetune_final"
        assert files - {".gitattributes"} == {
            str(path.relative_to(final)) for path in final.rglob("*") if path.is_file()
        }
        assert hub.count("POST", "validate-yaml"), "the client has asked the Hub what it thinks of the card"
        # Used where the final folder is not at hand, by the card alone, so that everything must come from the Hub.
        pushed = hub.commits("user/my_model")[0]["files"]
        card, results = pushed["README.md"].decode(), json.loads(pushed["evaluation/results.json"])
        assert "\n# my_model\n" in card and "@misc{my_model,\n" in card and not numbers_without_a_source(card, results)
        head = ModelCard(card).data
        assert (head.base_model, head.datasets) == ("Hcompany/Holo1-3B", ["HuggingFaceM4/WebSight"])
        assert head.license_name == "qwen-research" and "The data: cc-by-4.0, asks for credit." in card
        (elsewhere := tmp_path / "elsewhere").mkdir()
        environment = hub.environment(tmp_path / "other_home")
        used = run_commands(block(card, "bash"), elsewhere, environment)
        assert used.returncode == 0, used.stderr
        assert '"max_html_tokens": 120' in used.stderr
        page = (elsewhere / "page.html").read_text(encoding="utf-8")
        (again := tmp_path / "again").mkdir()
        (again / "example.py").write_text(block(card, "python"), encoding="utf-8")
        done_again = start("example.py", [], again, environment)
        assert done_again.returncode == 0, done_again.stderr
        assert (again / "page.html").read_text(encoding="utf-8") == page.removesuffix("\n")
        assert WRITER not in done.stdout + done.stderr + used.stderr
        written = [path for path in tmp_path.rglob("*") if path.is_file() and "home" not in str(path)]
        assert not [path for path in written if WRITER.encode() in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize("token", [None, READER], ids=["no token", "read-only token"])
def test_without_the_right_to_write_nothing_is_trained(token, tiny_base, pages_folder, tmp_path):
    with FakeHub() as hub:
        done = train(hub, tiny_base, pages_folder, tmp_path, token=token)
    assert done.returncode == 2, done.stdout
    assert "hf auth login" in done.stderr and "Traceback" not in done.stderr
    assert "step 1/" not in done.stdout and not (tmp_path / "holo1_dom_finetune_final").exists()


@pytest.mark.slow
def test_a_refused_upload_leaves_the_model_on_disk_and_says_how_to_repeat_it(tiny_base, pages_folder, tmp_path):
    with FakeHub() as hub:
        hub.fail_next("/commit/", 403, times=99)
        done = train(hub, tiny_base, pages_folder, tmp_path)
        assert done.returncode == 86, done.stderr
    assert (tmp_path / "holo1_dom_finetune_final" / "model.safetensors").is_file()
    assert "hf upload user/my_model holo1_dom_finetune_final ." in done.stderr and "Traceback" not in done.stderr
