"""Many scores: means and shares with failures as 0, and the comparison of two runs."""

import random

import pytest

import page_scores
from scoring.metrics import names
from scoring.statistics import means, paired_comparison, shares, summarise


def test_a_clear_difference_is_significant_and_none_is_not():
    rng = random.Random(0)
    before = [rng.random() * 0.5 for _ in range(40)]
    better = paired_comparison(before, [value + 0.2 + rng.random() * 0.1 for value in before])
    assert better["low"] < better["difference"] < better["high"] and better["low"] > 0.2 and better["p"] < 0.001
    same = paired_comparison(before, before)
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
    noise = paired_comparison(before, [value + rng.uniform(-0.2, 0.2) for value in before])
    assert noise["low"] < 0 < noise["high"] and noise["p"] > 0.05
    with pytest.raises(ValueError, match="1 scores before and 2 after"):
        paired_comparison([1], [1, 2])


def test_failures_count_as_zero_and_are_named():
    good = {"page": "a", "failure": None, "valid": True, "causes": (), **dict.fromkeys(names(), 0.8)}
    bad = {
        "page": "b",
        "failure": "took over 15 s",
        "valid": False,
        "causes": ("not rendered",),
        **dict.fromkeys(names(), 0.0),
    }
    found = means([good, bad])
    assert (found["n"], found["failures"], found["failed"]) == (2, 1, ["b"])
    assert (found["block"], found["block_without_failures"]) == (0.4, 0.8)
    found_shares = shares([good, bad])
    assert found_shares == {"valid": 0.5, "not rendered": 0.5}
    assert "50.0 % valid, 1 failure, counted as 0: block 0.400" in page_scores.summary_line(found | found_shares)


def test_summarise_gives_shares():
    pages = [{"valid": True, "truncated": False, "looping": False, "exact": True, "tokens": 3}] * 3
    pages += [{"valid": False, "truncated": True, "looping": True, "exact": False, "tokens": 9}]
    assert summarise(pages) == {"n": 4, "valid": 0.75, "truncated": 0.25, "looping": 0.25, "exact": 0.75}
    assert summarise([]) == {"n": 0, "valid": None, "truncated": None, "looping": None, "exact": None}
