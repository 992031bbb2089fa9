"""Several answers to each screenshot, of which the best one is kept."""

import pytest
from conftest import need_browser

import use_model_from_hub as use
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
