"""Many pages: in order, whatever fails, and after an interruption from where it was."""

import pytest

from scoring import metrics
from scoring.blocks import Block
from scoring.many_pages import Pair, Progress, run_pairs, score_pairs, shuffled_likeness, sources_of
from scoring.metrics import PageScore

WHITE = "<!DOCTYPE html>\n<html><head><title>t</title></head><body>{}</body></html>\n"


def test_pages_are_scored_in_order_and_a_failure_does_not_stop_the_others(renderer):
    wide = WHITE.format("<p>Hello</p>")
    pairs = [Pair("same", wide, wide), Pair("none", wide, None), Pair("other", wide, WHITE.format("<p>Bye</p>"))]
    found = [(pair.name, score) for pair, (score, *_) in score_pairs(pairs, renderer)]
    assert [name for name, _ in found] == ["same", "none", "other"]
    assert found[0][1]["overall"] == 1
    assert found[1][1].failure == "the written page: there is none" and found[1][1]["overall"] == 0
    assert found[2][1]["overall"] == 0 and found[2][1].missing and found[2][1].invented


def test_what_was_scored_by_other_metrics_is_scored_again(renderer, tmp_path, monkeypatch):
    pair = Pair("one", WHITE.format("<p>One</p>"), WHITE.format("<p>One</p>"))
    run_pairs([pair], renderer, Progress(tmp_path, pictures=False))
    assert pair.key in Progress(tmp_path, pictures=False).rows
    monkeypatch.setattr(metrics, "METRICS", metrics.METRICS[:-1])
    assert pair.key not in Progress(tmp_path, pictures=False).rows


def test_an_interrupted_run_goes_on_where_it_was(renderer, tmp_path):
    pairs = [Pair(str(n), WHITE.format(f"<p>{n}</p>"), WHITE.format(f"<p>{n}</p>")) for n in range(4)]
    first = run_pairs(pairs[:2], renderer, Progress(tmp_path / "p", pictures=True))
    with (tmp_path / "p" / "scores.jsonl").open("a") as file:
        file.write('{"key": "torn')

    class Counted:
        jobs = 0

        def map(self, jobs):
            for job in jobs:
                Counted.jobs += 1
                yield renderer.render(job)

    again = Progress(tmp_path / "p", pictures=True)
    found = run_pairs(pairs, Counted(), again)
    assert Counted.jobs == 4, "two pages of two renders each"
    assert found[:2] == first and [row["page"] for row in found] == ["0", "1", "2", "3"]
    assert again.picture(pairs[0].key, "written").is_file()
    again.forget()
    assert not (tmp_path / "p").exists()


def kept(folder, texts: list[tuple[str, str]]) -> tuple[list[Pair], Progress]:
    """Pages of one text each, (wanted, written), as if they had been scored."""
    progress, pairs = Progress(folder, pictures=False), []
    for number, (wanted, written) in enumerate(texts):
        one, two = (Block(text, 0.1, 0.1, 0.5, 0.1, (0, 0, 0)) for text in (wanted, written))
        lists = {"matched": [(one, two)]} if wanted == written else {"missing": [one], "invented": [two]}
        pairs.append(Pair(f"page {number}", wanted, written))
        progress.keep(pairs[-1].key, PageScore({metrics.CHOOSING: 1.0}, texts_reference=1, **lists), [None, None])
    return pairs, progress


def test_the_control_tells_a_model_that_looks_from_one_that_does_not(tmp_path):
    words = ["Imprint", "Basket", "Download", "Weather"]
    looks = shuffled_likeness(*kept(tmp_path / "a", [(word, word) for word in words]), {})
    assert looks["likeness"] == (0.0, "against another page, 4 pages")
    blind = shuffled_likeness(*kept(tmp_path / "b", [(word, "Basket") for word in words]), {})
    assert blind["likeness"][0] == pytest.approx(0.25), "one page in four, as without shuffling"
    pairs, progress = kept(tmp_path / "b", [(word, "Basket") for word in words])
    score = progress.rows[pairs[0].key] | {"failure": "out of time"}
    progress.rows[pairs[0].key] = score  # its answer would have been the next page's text
    assert shuffled_likeness(pairs, progress, {})["likeness"][0] == 0, "the only lucky one has failed"
    pairs, progress = kept(tmp_path / "c", [(word, word) for word in words])
    assert shuffled_likeness(pairs, progress, {pair.name: {"chooses": True} for pair in pairs[1:]}) == {}


def test_the_source_of_a_page_is_in_its_name_where_there_are_several():
    def sources(*names: str) -> list[str]:
        return sources_of([Pair(name, "", "") for name in names])

    assert sources("web/1", "web/2", "own/a/1", "own/a/2") == ["web", "web", "own/a", "own/a"]
    assert sources("page 1", "page 2") == ["", ""] == sources("web/1", "web/2")
    assert sources("a/1", "b/1", "c/1", "d/1") == [""] * 4, "each page its own folder"
