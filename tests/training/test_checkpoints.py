"""What a training leaves in its output folder, and what another one makes of it."""

import os
import time

import pytest

from training.checkpoints import RESTARTED, keep_earlier_results, newest_checkpoint


def test_newest_checkpoint_is_the_newest_complete_one(tmp_path):
    for step, complete in ((9, True), (10, True), (11, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if complete:
            (folder / "trainer_state.json").write_text("{}")
    assert newest_checkpoint(tmp_path).name == "checkpoint-10"
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_what_an_earlier_run_left_moves_aside_and_a_resumed_one_keeps_its_own(tmp_path):
    for name in ("checkpoint-3", "evaluation/page-0001"):
        (tmp_path / name).mkdir(parents=True)
    keep_earlier_results(tmp_path, resumes=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "evaluation"}
    keep_earlier_results(tmp_path, resumes=False)
    (place,) = tmp_path.iterdir()
    assert place.name.startswith("earlier-") and (place / "evaluation" / "page-0001").is_dir()
    assert (place / "checkpoint-3").is_dir()
    keep_earlier_results(tmp_path, resumes=False)
    assert [*tmp_path.iterdir()] == [place], "nothing to move, no folder"


def leave_results(folder, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)


def test_a_restarted_training_keeps_what_it_has_written_and_the_next_one_does_not(tmp_path, monkeypatch):
    leave_results(tmp_path, "evaluation/page-0001")
    monkeypatch.setenv(RESTARTED, "1")
    keep_earlier_results(tmp_path, resumes=False)
    assert (tmp_path / "evaluation" / "page-0001").is_dir() and RESTARTED not in os.environ
    keep_earlier_results(tmp_path, resumes=False)
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["evaluation"], "the evaluation of an earlier run\n"),
        (["checkpoint-3"], "1 checkpoint of an earlier run; --resume would go on from them\n"),
        (
            ["checkpoint-3", "checkpoint-6", "evaluation"],
            "2 checkpoints and the evaluation of an earlier run; --resume would go on from them\n",
        ),
    ],
    ids=["evaluation", "checkpoint", "both"],
)
def test_only_what_was_there_is_said_to_have_moved(names, said, tmp_path, capsys):
    leave_results(tmp_path, *names)
    keep_earlier_results(tmp_path, resumes=False)
    (place,) = tmp_path.iterdir()
    assert capsys.readouterr().out == f"moved to {place}: {said}"


def test_two_trainings_that_begin_in_one_second_move_to_two_folders(tmp_path, monkeypatch):
    now = time.localtime()
    monkeypatch.setattr(time, "strftime", lambda form, strftime=time.strftime: strftime(form, now))
    for number in range(3):
        leave_results(tmp_path, f"evaluation/page-{number}")
        keep_earlier_results(tmp_path, resumes=False)
    first, *others = sorted(tmp_path.iterdir())
    assert [place.name.removeprefix(first.name) for place in others] == ["-2", "-3"]
    assert [next((place / "evaluation").iterdir()).name for place in (first, *others)] == ["page-0", "page-1", "page-2"]
