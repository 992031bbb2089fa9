"""What a run needs from elsewhere is looked up before it starts, and what nobody could see is said."""

from pathlib import Path

import pytest
from conftest import MAIN, run_script
from fake_hub import FakeHub
from small_pages import good_pages

from training.at_hand import look
from training.settings import PageSettings


def pairs(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number, (_, picture, html) in enumerate(good_pages(count)):
        (folder / f"{number}.png").write_bytes(picture)
        (folder / f"{number}.html").write_text(html)
    return folder


def test_folders_are_looked_into(tmp_path):
    folder = pairs(tmp_path / "pages", 3)
    (folder / "alone.html").write_text("<p>no picture</p>")
    (tmp_path / "empty").mkdir()
    found = look(PageSettings(base_model=str(tmp_path), dataset=[str(folder), str(tmp_path / "empty")]))
    assert found.well == [f"--base_model {tmp_path} (a folder)", f"--dataset {folder} (3 pages with pictures)"]
    assert found.unseen == [] and found.base_is_there
    (problem,) = found.problems
    assert problem.startswith(f"--dataset {tmp_path / 'empty'}: no file is in there; give a folder of pictures")


@pytest.mark.slow
def test_what_the_hub_does_not_have_is_a_problem_of_the_settings(tmp_path):
    with FakeHub() as hub:
        hub.add_repo("user/there", {"data.jsonl": b"{}"})
        flags = ["--check_settings", "--base_model", "user/gone", "--dataset", "user/there"]
        done = run_script(MAIN, *flags, cwd=tmp_path, env=hub.environment(tmp_path) | {"HF_HUB_OFFLINE": "0"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("--base_model user/gone: neither a folder here nor on the Hub; correct the name, or ")
    assert done.stderr.count("\n") == 1
