"""Best of several answers: the page itself wins over every spoilt one, and what cannot be shown over nothing at all."""

import numpy as np
import pytest
from PIL import Image

from scoring.renders import Job, Render
from writing.best_of import FAILED, Choice, choose

WINDOW = 320, 200  # px
PAGE = """<!DOCTYPE html><html><head><style>body{margin:0;font:16px/24px sans-serif}h1{margin:8px;font-size:22px}
p{margin:8px}div{background:navy;color:white;padding:8px}footer{background:silver;padding:8px}</style></head><body>
<h1>Garden tools</h1><div>Open every day</div><p>A spade and a rake</p><p>Seeds of forty plants</p>
<footer>Write to us</footer></body></html>"""
SPOILT = {
    "dropped": PAGE.replace("<p>Seeds of forty plants</p>", ""),
    "cut off": PAGE[: PAGE.index("<p>Seeds")],
    "other text of like length": PAGE.replace("A spade and a rake", "E quick mad o zebu"),
    "one word": PAGE.replace("forty", "sixty"),
    "colour of a text": PAGE.replace("<p>A", "<p style='color:red'>A"),
    "colour of a ground": PAGE.replace("navy", "darkgreen"),
    "order": PAGE.replace("<p>Seeds of forty plants</p>", "").replace("<p>A", "<p>Seeds of forty plants</p><p>A"),
    "size": PAGE.replace("font-size:22px", "font-size:28px"),
    "font": PAGE.replace("sans-serif", "serif"),
    "place": PAGE.replace("<p>A", "<p style='margin-left:24px'>A"),
    "longer": PAGE.replace("</footer>", "</footer><p>And more</p>"),
    "no text": PAGE.replace("h1{", "*{color:transparent!important}h1{"),
    "blank": "<!DOCTYPE html><html><head></head><body></body></html>",
    "no page": "",
}


def shown(renderer, html: str, window: tuple[int, int] = WINDOW) -> Image.Image:
    (render,) = renderer.map([Job(html, *window)])
    return Image.fromarray(render.image)


class Counting:
    """The real renderer, and what it was asked; the jobs of `broken` pages fail."""

    def __init__(self, renderer, broken: str = ""):
        self.renderer, self.broken, self.asked = renderer, broken, []

    def map(self, jobs):
        self.asked += jobs
        for job, render in zip(jobs, self.renderer.map(jobs)):
            yield Render((), "the browser died", False, 0.0) if job.html == self.broken else render


@pytest.mark.parametrize("kind", SPOILT)
def test_the_page_itself_wins_over_a_spoilt_one(recorded, kind):
    choice = choose(shown(recorded, PAGE), [SPOILT[kind], PAGE], recorded)
    assert choice.index == 1 and choice.scores[1] == 1.0 and choice.scores[0] < 1.0


def test_the_more_is_spoilt_the_lower_the_score(recorded):
    less = SPOILT["other text of like length"]
    more = less.replace("Seeds of forty plants", "Wound in murky glazes").replace("Garden tools", "Winter shoes")
    scores = choose(shown(recorded, PAGE), [PAGE, less, more, SPOILT["no text"]], recorded).scores
    assert list(scores) == sorted(scores, reverse=True) and len(set(scores)) == 4


def test_pages_that_are_cut_off_blank_or_empty_lose_to_a_bad_one(recorded):
    """However alike the part is that is there."""
    bad = "<!DOCTYPE html><html><head></head><body><h1>Not this at all</h1></body></html>"
    cut = PAGE.removesuffix("</footer></body></html>")
    choice = choose(shown(recorded, PAGE), [cut, SPOILT["blank"], "", " \n", bad], recorded)
    assert choice.index == 4 and choice.scores[4] > 0
    assert max(choice.scores[:4]) == FAILED + 1 and choice.scores[2:4] == (FAILED, FAILED)
    assert choose(shown(recorded, PAGE), ["", SPOILT["cut off"], cut], recorded).index == 2, "of these the longer one"


def test_a_page_that_cannot_be_rendered_loses(recorded):
    counting = Counting(recorded, broken=PAGE)
    choice = choose(shown(recorded, PAGE), [PAGE, SPOILT["cut off"]], counting)
    assert choice.index == 1 and choice.scores[0] == FAILED < choice.scores[1]
    assert choose(shown(recorded, PAGE), [PAGE, PAGE], counting) == Choice(0, (FAILED, FAILED))


def test_equal_pages_are_rendered_once_and_the_first_of_equals_wins(recorded):
    counting = Counting(recorded)
    looks_the_same = PAGE.replace("<p>A", "<p class='first'>A")
    htmls = [SPOILT["font"], PAGE, looks_the_same, PAGE, SPOILT["font"]]
    choice = choose(shown(recorded, PAGE), htmls, counting)
    assert [job.html for job in counting.asked] == [SPOILT["font"], PAGE, looks_the_same]
    assert choice.index == 1 and choice.scores[1:4] == (1.0, 1.0, 1.0) and choice.scores[0] == choice.scores[4]
    assert choose(shown(recorded, PAGE), htmls, recorded) == choice


def test_the_window_is_the_screenshots_and_a_wider_one_is_made_smaller(recorded):
    counting, blank = Counting(recorded), SPOILT["blank"]
    for size in ((224, 112), (320, 900), (3840, 120)):
        assert choose(Image.new("RGB", size, "white"), [blank], counting).scores[0] > 0, "a blank page was wanted"
    assert [(job.width, job.height) for job in counting.asked] == [(224, 112), (320, 720), (2560, 120)]


def test_a_screenshot_of_another_browser_still_finds_its_page(recorded):
    """Other fonts, and noise as of a JPEG."""
    theirs = np.asarray(shown(recorded, SPOILT["font"])).astype(int)
    noisy = (theirs + np.random.default_rng(0).integers(-6, 7, theirs.shape)).clip(0, 255).astype(np.uint8)
    bad = ("other text of like length", "dropped", "colour of a ground", "order", "longer")
    choice = choose(Image.fromarray(noisy), [*(SPOILT[kind] for kind in bad), PAGE], recorded)
    assert choice.index == len(bad), choice.scores


def test_no_page_is_refused(recorded):
    with pytest.raises(ValueError, match="at least one"):
        choose(Image.new("RGB", WINDOW), [], recorded)
