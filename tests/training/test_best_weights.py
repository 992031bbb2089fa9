"""The best weights: which evaluation leads, what a resumed run knows of it, and what becomes of them at the end."""

import errno
import resource

import pytest

from scoring import metrics
from scoring.metrics import Metric
from training.best_weights import BestWeights
from training.errors import DiskError


def result(score: float, name: str = metrics.CHOOSING) -> dict:
    return {"choosing": {"n": 2, name: score, "apart": True}}


def keep(folder) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "dom_recipe.json").write_text("{}")


def test_the_better_evaluation_leads_and_patience_runs_out(tmp_path):
    best = BestWeights(tmp_path, patience=2, resumed_at=None)
    ends, kept_at = [], []
    for step, score in ((1, 0.5), (2, 0.6), (3, 0.6), (4, 0.1)):
        ends.append(best.consider(step, result(score), [{"html": str(step)}], keep))
        kept_at.append(best.step)
    assert ends == [False, False, False, True] and kept_at == [1, 2, 2, 2]
    assert (best.step, best.score, best.evaluations_since) == (2, 0.6, 2)
    again = BestWeights(tmp_path, patience=2, resumed_at=4)
    assert (again.step, again.score, again.evaluations_since) == (2, 0.6, 2)
    assert again.rows == [{"html": "2"}] and again.result == result(0.6)
    assert BestWeights(tmp_path, patience=2, resumed_at=None).step is None


def test_an_evaluation_that_is_repeated_after_a_resume_counts_once(tmp_path):
    """Steps 1 to 4 are judged, the run is killed and goes on from step 2: steps 3 and 4 are judged again."""
    best = BestWeights(tmp_path, patience=3, resumed_at=None)
    for step, score in ((1, 0.5), (2, 0.4), (3, 0.3)):
        assert not best.consider(step, result(score), [], keep)
    again = BestWeights(tmp_path, patience=3, resumed_at=2)
    assert again.evaluations_since == 1
    assert not again.consider(3, result(0.3), [], keep) and again.consider(4, result(0.3), [], keep)


def test_better_weights_of_a_later_step_stay_when_a_run_goes_on_before_it(tmp_path):
    best = BestWeights(tmp_path, patience=1, resumed_at=None)
    for step, score in ((1, 0.2), (2, 0.3), (3, 0.9)):
        best.consider(step, result(score), [], keep)
    again = BestWeights(tmp_path, patience=1, resumed_at=2)
    assert (again.step, again.score, again.evaluations_since) == (3, 0.9, 0)
    assert not again.consider(3, result(0.9), [], keep), "as good as ever, and better than those before it"


def test_only_better_weights_that_are_there_replace_those_of_the_end(tmp_path):
    best, final = BestWeights(tmp_path, patience=0, resumed_at=None), tmp_path / "final"
    assert not best.beats(result(0.1)), "there are none"
    best.consider(1, result(0.5), [], keep)
    assert best.beats(result(0.4)) and not best.beats(result(0.5)) and not best.beats({"exact": 1.0})
    final.mkdir()
    best.become_final(final)
    assert [path.name for path in final.iterdir()] == ["dom_recipe.json"]
    best.forget()
    assert [path.name for path in tmp_path.iterdir()] == ["final"] and not best.beats(result(0.4))


def test_a_disk_that_is_full_at_the_end_leaves_the_final_folder_and_nothing_half_written(tmp_path, monkeypatch):
    """Files that may grow no further, on what counts as another disk, where weights cannot be had by a second name."""
    best, final = BestWeights(tmp_path, patience=0, resumed_at=None), tmp_path / "final"
    best.consider(1, result(0.5), [], keep)
    (best.folder / "weights").write_bytes(bytes(10_000))
    final.mkdir()
    (final / "weights").write_bytes(b"of the end")
    monkeypatch.setattr("os.link", lambda *names: (_ for _ in ()).throw(OSError(errno.EXDEV, "another disk")))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(DiskError, match=r"nothing half-written is left: .*final has the weights of the end"):
            best.become_final(final)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in tmp_path.iterdir()} == {"final", "best", "best.json"}
    assert (final / "weights").read_bytes() == b"of the end" and best.beats(result(0.4))
    best.become_final(final)
    assert (final / "weights").read_bytes() == bytes(10_000), "copied"


def test_the_best_weights_become_final_without_taking_space(tmp_path):
    best, final = BestWeights(tmp_path, patience=0, resumed_at=None), tmp_path / "final"
    best.consider(1, result(0.5), [], keep)
    final.mkdir()
    best.become_final(final)
    assert (final / "dom_recipe.json").samefile(best.folder / "dom_recipe.json")


def test_an_evaluation_without_a_browser_chooses_nothing(tmp_path):
    best = BestWeights(tmp_path, patience=1, resumed_at=None)
    assert not best.consider(1, {"exact": 0.5}, [], lambda folder: pytest.fail("saved")) and best.step is None


def test_a_metric_added_to_the_table_can_choose_and_lower_may_be_better(tmp_path, monkeypatch):
    more = Metric("excess_text", "excess text", lambda pair: 0.0, better="lower")
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, more))
    monkeypatch.setattr(metrics, "CHOOSING", "excess_text")
    best = BestWeights(tmp_path, patience=0, resumed_at=None)
    for step, score in ((1, 0.3), (2, 0.2), (3, 0.4)):
        best.consider(step, result(score, "excess_text"), [], keep)
    assert best.step == 2 and best.beats(result(0.3, "excess_text")) and not best.beats(result(0.1, "excess_text"))


@pytest.mark.parametrize("text", ['{"best": {"step": 3, "likeness": 0.5}, "stale": 1}', '{"step": 3, "sc', "[]"])
def test_notes_of_another_version_or_torn_ones_are_said_and_left(text, tmp_path, capsys):
    (tmp_path / "best.json").write_text(text)
    assert BestWeights(tmp_path, patience=1, resumed_at=4).step is None
    assert "best.json is not of this version or torn" in capsys.readouterr().out
