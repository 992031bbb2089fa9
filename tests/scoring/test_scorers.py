"""Processes that score pairs: as one process does, whoever dies, and nobody is left behind."""

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest

from scoring import scorers as scorers_room
from scoring.many_pages import Progress, run_pairs
from scoring.renders import marked
from scoring.scorers import DIED_TWICE, Halves, Order, Pair, Scorers, begin, follow, jobs_of, keep_pictures, score_pair

WHITE = "<!DOCTYPE html>\n<html><head><title>t</title></head><body>{}</body></html>\n"


def small_pairs(count: int) -> list[Pair]:
    """Copies, pages of other words, one that was not written, and the first once more under another name."""
    pages = [WHITE.format(f"<h1>Page {n}</h1><p>{'word ' * n}</p>") for n in range(count)]
    pairs = [Pair(f"page {n}", page, pages[n - n % 2], 640, 480) for n, page in enumerate(pages)]
    return [*pairs, Pair("not written", pages[0], None), Pair("page 0 again", pages[0], pages[0], 640, 480)]


def kill_holder(scorers: Scorers, pair: Pair) -> str:
    """Kills the process that was given the pair, once it has started; the mark of all that it had started."""
    while not (holders := [scorer for scorer in scorers.scorers if pair.key in scorer.tasks and scorer.started]):
        scorers.look()
    os.kill(holders[0].process.pid, signal.SIGKILL)
    while holders[0] in scorers.scorers:
        scorers.look()
    return holders[0].mark


@pytest.mark.slow
def test_several_processes_score_as_one_does_whoever_dies(renderer, tmp_path):
    pairs = small_pairs(2)
    alone = run_pairs(pairs, renderer, one := Progress(tmp_path / "one", pictures=True))
    unlucky, several = Pair("unlucky", WHITE.format("a"), WHITE.format("b")), Progress(tmp_path / "several", True)
    with Scorers(2) as scorers:
        for pair in pairs:
            scorers.expect(replace(pair, prediction=None))
        scorers.give(pairs[0], several.folder)
        scorers.give(unlucky)
        marks = [kill_holder(scorers, pair) for pair in (pairs[0], unlucky, unlucky)]
        together = run_pairs(pairs, renderer, several, None, scorers)
        marks += [scorer.mark for scorer in scorers.scorers]
    assert together == alone and [row["page"] for row in together] == [pair.name for pair in pairs]
    assert len({*marks}) == 5, "those who died were replaced"
    assert not [mark for mark in marks if marked(mark)]
    assert several.rows[unlucky.key]["failure"] == f"the written page: {DIED_TWICE}"
    assert {*Progress(tmp_path / "several", True).rows} == {*one.rows, unlucky.key}, "on disk"
    for pair in pairs:
        for name in ("reference", "written"):
            first, second = (progress.picture(pair.key, name) for progress in (one, several))
            assert first.read_bytes() == second.read_bytes() if first else pair.name == "not written" and not second


def test_a_reference_that_is_expected_is_rendered_before_its_pair_comes(renderer, tmp_path):
    """And once, unless another pair had it."""
    pair, references = small_pairs(2)[1], {}
    orders = [Order("reference", replace(pair, prediction=None), to_come=True), Order("a", pair, tmp_path)]
    orders.append(Order("b", replace(pair, name="again")))
    begun = [begin(orders[0], renderer, references)]
    begun[0][0].result()
    begun += [begin(order, renderer, references) for order in orders[1:]]
    assert list(map(len, begun)) == [1, 1, 1]
    # The second order alone finds both browsers idle, and both render it.
    assert [isinstance(renders[0], Halves) for renders in begun] == [False, True, False]
    with ThreadPoolExecutor(1) as writers:
        found = [follow(order, jobs, renderer, references, writers) for order, jobs in zip(orders, begun)]
    alone, *images = score_pair(pair, renderer.map(pair.jobs))
    assert found == [None, alone, alone] and 0 < alone["likeness"] < 1
    assert len(jobs_of(orders[-1], references)) == 2 and not references, "it is let go"
    keep_pictures(tmp_path, "wanted", images)
    for name in ("reference", "written"):
        assert (tmp_path / f"a-{name}.png").read_bytes() == (tmp_path / f"wanted-{name}.png").read_bytes()


def test_halves_that_took_longer_than_a_page_may_are_rendered_as_a_whole(renderer, monkeypatch):
    """Each has a clock of its own: whether a page fails must not depend on who was idle."""
    job, begun = small_pairs(1)[0].jobs[0], []
    monkeypatch.setattr(renderer, "begin", lambda asked, real=renderer.begin: begun.append(asked) or real(asked))
    assert Halves(renderer, job).result().failure is None and len(begun) == 2
    monkeypatch.setattr(type(renderer), "first_try_s", 0.01)  # no browser keeps to that; the second try has the rest
    begun.clear()
    assert Halves(renderer, job).result().failure is None and begun[2:] == [job]


def test_where_processes_cannot_start_this_one_scores(renderer, monkeypatch, capsys):
    pairs = small_pairs(1)[:1]
    list(renderer.map(pairs[0].jobs))  # so that its own processes are there
    children = {child.pid for child in psutil.Process().children()}
    # There alone: the renderer starts its own processes.
    monkeypatch.setattr(scorers_room, "sys", SimpleNamespace(**{**vars(sys), "executable": "/bin/false"}))
    with Scorers(2) as scorers:
        scorers.prove()
        assert not scorers.proved()
        found = run_pairs(pairs, renderer, Progress(None, pictures=False), None, scorers)
    assert [row["likeness"] for row in found] == [1]
    assert "processes that score pages cannot start (the last one ended with 1)" in capsys.readouterr().err
    monkeypatch.undo()
    assert {child.pid for child in psutil.Process().children()} <= children
