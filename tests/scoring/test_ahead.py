"""Pairs are scored by a process of their own meanwhile, as they would be afterwards."""

import io
import json
import signal
from dataclasses import asdict

import pytest
from conftest import need_browser

from scoring import ahead
from scoring.many_pages import Pair, Progress, run_pairs, scores_of
from scoring.renders import Renderer

PAGE = "<!DOCTYPE html><html><body><h1>{0}</h1><p style='color:{1}'>{0} and more</p></body></html>"
PAIRS = [
    Pair("one", PAGE.format("river", "red"), PAGE.format("river", "blue"), 320, 240),
    Pair("two", PAGE.format("stone", "red"), PAGE.format("stone", "red"), 320, 240),
    Pair("two again", PAGE.format("stone", "red"), PAGE.format("stone", "red"), 320, 240),
]


@pytest.mark.slow
def test_what_is_scored_ahead_is_what_would_be_scored_afterwards(tmp_path):
    need_browser()
    marks, meanwhile = [], ahead.Ahead(tmp_path / "ahead")
    for pair in PAIRS:
        meanwhile.add(pair)
    facts = meanwhile.finish(lambda: marks.append(1))
    progress = Progress(tmp_path / "ahead", pictures=True)
    assert len(progress.rows) == 2 and marks and facts["browser"]
    assert progress.picture(PAIRS[0].key, "written").is_file()
    with Renderer() as renderer:
        assert scores_of(PAIRS, progress) == run_pairs(PAIRS, renderer, Progress(None, pictures=False))


def test_a_process_that_has_died_comes_to_nothing(tmp_path):
    meanwhile = ahead.Ahead(tmp_path)
    meanwhile.process.send_signal(signal.SIGKILL)
    meanwhile.add(PAIRS[0])
    assert meanwhile.finish(lambda: None) is None


@pytest.mark.parametrize("last, exits", [("", [1]), (ahead.END, [])])
def test_the_process_ends_with_the_one_that_began_it(last, exits, monkeypatch):
    """Its stdin ends then without the line that says that all pairs have come."""
    found = []
    monkeypatch.setattr(ahead.os, "_exit", found.append)
    monkeypatch.setattr(ahead.sys, "stdin", io.StringIO(json.dumps(asdict(PAIRS[0])) + "\n" + last))
    assert [*ahead.asked()] == PAIRS[:1] and found == exits
