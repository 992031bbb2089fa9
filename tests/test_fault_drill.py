"""benchmarks/fault_drill.py: it finds what differs, and a few real kills end as it says."""

import json
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

sys.path.insert(0, str(ROOT / "benchmarks"))
import fault_drill


def leave_run(folder, steps: list[tuple[int, list[str]]], weight: float = 1.0):
    (folder / "trained").mkdir(parents=True)
    lines = [json.dumps({"step": step, "pages": pages}) + "\n" for step, pages in steps]
    (folder / "trained" / "rank-0.jsonl").write_text("".join(lines))
    (folder / fault_drill.FINAL).mkdir()
    save_file({"weight": torch.tensor([weight])}, folder / fault_drill.FINAL / "model.safetensors")
    return folder


def test_other_pages_lost_steps_and_other_weights_are_found(tmp_path):
    reference = leave_run(tmp_path / "whole", [(1, ["a"]), (2, ["b"])])
    again = leave_run(tmp_path / "again", [(1, ["a"]), (1, ["a"]), (2, ["b"])])
    assert fault_drill.difference(again, reference) == ""
    other = leave_run(tmp_path / "other", [(1, ["a"]), (1, ["c"]), (2, ["b"])])
    assert "trained on [['a'], ['c']], not on ['a']" in fault_drill.difference(other, reference)
    lost = leave_run(tmp_path / "lost", [(1, ["a"])])
    assert "steps that only one of both has" in fault_drill.difference(lost, reference)
    heavy = leave_run(tmp_path / "heavy", [(1, ["a"]), (2, ["b"])], weight=1.01)
    assert "weights apart by up to 1.00e-02" in fault_drill.difference(heavy, reference)


def test_a_figure_that_misses_is_shown_and_not_rounded_away(capsys):
    row = fault_drill.Row("a rank dies", "within 15 s")
    row.count(True, 3.0)
    row.count(False, 16.0, "still there")
    assert row.cells() == ["a rank dies", "1 of 2", "16.0 s", "within 15 s"] and row.misses == ["still there"]
    table = fault_drill.table({"death": row, "none": fault_drill.Row("never tried", "x")}, 60.0)
    assert "| a rank dies | 1 of 2 | 16.0 s | within 15 s |" in table and "never tried" not in table
    assert "MISSED: still there" in capsys.readouterr().out


@pytest.mark.slow
def test_two_kills_are_resumed_to_the_same_pages_and_weights(tmp_path):
    out = tmp_path / "drill"
    assert fault_drill.main(["--kills", "2", "--trials", "0", "--wrapper_trials", "0", "--out", str(out)]) == 0
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert (rows["kill"]["trials"], rows["kill"]["good"]) == (2, 2)
    assert "| SIGKILL at a random instant, resumed | 2 of 2 |" in out.with_suffix(".md").read_text()
