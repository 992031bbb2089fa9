"""What a training leaves in its output folder, and what another one makes of it."""

from training.checkpoints import keep_earlier_results, newest_checkpoint


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
