"""Several answers to each screenshot, of which the best one is kept."""

import contextlib
from threading import Event

import pytest
from conftest import need_browser

import use_model_from_hub as use
from writing import best_of, choosing
from writing.choosing import BestOf, Chosen


class Given:
    """A writer of pages that are there already, by place and sample, out of order."""

    def __init__(self, pages: dict[tuple[int, int], use.Written | str]):
        self.pages, self.asked = pages, []

    def write(self, requests, shown=None):
        self.asked = list(requests)
        for request in reversed(self.asked):
            yield request, self.pages[request.place, request.sample]


@pytest.mark.slow
def test_the_answer_that_looks_most_like_the_screenshot_is_kept():
    from PIL import Image

    need_browser()
    shot = Image.new("RGB", (200, 100), "red")
    page = "<!DOCTYPE html>\n<html><body style='margin:0;height:100px;background:{}'></body></html>"
    pages = {
        (0, 0): use.Written(page.format("blue"), "", 5, False),
        (0, 1): use.Written(page.format("red"), "raw", 7, False, closing_tokens=2),
        (1, 0): "failed",
        (1, 1): use.Written(page.format("blue"), "", 5, True),
        (2, 0): "failed",
        (2, 1): "failed",
    }
    writer = Given(pages)
    found = {
        request.place: answer
        for request, answer in BestOf(writer, 2).write(use.Request(place, lambda: shot) for place in range(3))
    }
    assert [(request.place, request.sample) for request in writer.asked] == sorted(pages)
    best = found[0]
    assert isinstance(best, Chosen) and best.html == page.format("red") and best.sample == 1
    assert (best.raw, best.tokens, best.closing_tokens) == ("raw", 7, 2) and best.scores[1] > best.scores[0]
    assert found[1].sample == 1 and found[1].scores[0] is None and found[2] == "failed"


class Played(contextlib.nullcontext):
    """In place of browsers: `choose` is played, too."""

    def __enter__(self):
        return self

    def close(self) -> None:
        pass


@pytest.fixture
def chosen_slowly(monkeypatch):
    """Pages that are chosen from only once the event of their place is set."""
    free = [Event() for _ in range(6)]

    def choose(screenshot, htmls, renderer):
        assert free[screenshot].wait(20), "nobody wrote on while this page was rendered"
        return best_of.Choice(len(htmls) - 1, tuple(range(len(htmls))))

    monkeypatch.setattr(best_of, "choose", choose)
    monkeypatch.setattr(choosing, "Renderer", Played)
    return free


def wanted(count: int) -> list[use.Request]:
    return [use.Request(place, lambda place=place: place) for place in range(count)]


def test_the_next_pages_are_written_while_one_is_rendered_and_the_order_stays(chosen_slowly):
    """A GPU waited for the browser after each page."""
    last = []

    class Writing:
        def write(self, requests, shown=None):
            for request in requests:
                last.append(request.place)
                if request.place == 3:  # the pages before are still being rendered
                    for event in reversed(chosen_slowly):
                        event.set()
                yield request, use.Written(f"{request.place} {request.sample}", "", 1, False)

    found = list(BestOf(Writing(), 2).write(wanted(6)))
    assert [(request.place, page.html, page.scores) for request, page in found] == [
        (place, f"{place} 1", (0, 1)) for place in range(6)
    ]


def test_a_page_is_kept_when_it_is_chosen_and_not_only_when_the_next_answers_come(chosen_slowly):
    """Of eight samples at once by generate() the last pages waited for minutes, and were lost to who was killed then.
    Here the next answer comes only once the page is kept."""
    is_kept, kept = Event(), []

    def keeps(request, answer):
        kept.append((request.place, request.sample, answer.html))
        is_kept.set()

    class Writing:
        def write(self, requests, shown=None):
            for request in requests:
                assert request.place == 0 or is_kept.wait(20), "nobody kept the first page"
                yield request, use.Written(f"{request.place} {request.sample}", "", 1, False)

    for event in chosen_slowly:
        event.set()
    told = [(request.place, page.html) for request, page in BestOf(Writing(), 2, keeps).write(wanted(3))]
    assert kept == [(place, 0, f"{place} 1") for place in range(3)] and told == [
        (place, html) for place, _, html in kept
    ]


def test_what_keeping_raises_is_raised_where_pages_are_taken(chosen_slowly):
    def full(request, answer):
        raise OSError(28, "No space left on device")

    class Writing:
        def write(self, requests, shown=None):
            yield from ((request, use.Written("", "", 1, False)) for request in requests)

    for event in chosen_slowly:
        event.set()
    with pytest.raises(OSError, match="No space left"):
        list(BestOf(Writing(), 1, full).write(wanted(2)))


def test_a_choice_that_is_made_while_browsers_are_closed_is_not_kept(chosen_slowly, monkeypatch):
    """Every render fails then, and any answer would look as good as the others."""
    kept = []

    class Closing(Played):
        def close(self):
            for event in chosen_slowly:
                event.set()

    monkeypatch.setattr(choosing, "Renderer", lambda browsers: Closing())

    class Writing:
        def write(self, requests, shown=None):
            for request in requests:
                if request.place == 2:  # page 1 is being looked at
                    chosen_slowly[0].set()
                yield request, use.Written("", "", 1, False)

    pages = BestOf(Writing(), 1, lambda request, answer: kept.append(request.place)).write(wanted(6))
    assert next(pages)[0].place == 0
    pages.close()
    assert kept == [0]


def test_what_is_far_behind_is_waited_for_and_what_has_gone_is_named(chosen_slowly, monkeypatch):
    monkeypatch.setattr(choosing, "MOST_BEHIND", 2)
    for event in chosen_slowly:
        event.set()
    most, came, requests = [0], [], wanted(6)

    def gone():
        raise use.UseError("no such file")

    class Writing:
        def write(self, wanted, shown=None):
            for request in wanted:
                most[0] = max(most[0], request.place - len(came))
                yield request, use.Written("", "", 1, False)

    requests[4] = use.Request(4, gone)
    for request, page in BestOf(Writing(), 1).write(requests):
        came.append((request.place, isinstance(page, Chosen)))
    assert came == [(place, place != 4) for place in range(6)] and most[0] <= 3
