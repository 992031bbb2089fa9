"""Many pages: in order, whatever fails, and after an interruption from where it was."""

from scoring import metrics
from scoring.many_pages import Pair, Progress, run_pairs, score_pairs

WHITE = "<!DOCTYPE html>\n<html><head><title>t</title></head><body>{}</body></html>\n"


def test_pages_are_scored_in_order_and_a_failure_does_not_stop_the_others(renderer):
    wide = WHITE.format("<p>Hello</p>")
    pairs = [Pair("same", wide, wide), Pair("none", wide, None), Pair("other", wide, WHITE.format("<p>Bye</p>"))]
    found = [(pair.name, score) for pair, score, *_ in score_pairs(pairs, renderer)]
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
