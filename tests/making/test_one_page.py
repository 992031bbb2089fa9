"""One page: trials against a canvas, then pages in a real browser."""

import numpy as np
import pytest
from conftest import need_browser, need_shared
from small_site import write_site

from making.drops import PageDropped
from making.local_files import LocalFiles, inline_files
from making.one_page import make_page, shortest
from making.page_settings import Settings
from making.reductions import draft_of
from making.sources import Source, read_html
from making.trials import MAX_RENDERS, Trials
from scoring import renders

PAGE = "<!DOCTYPE html>\n<html><head><title>t</title></head><body><p>words</p></body></html>"
COUNT = len


class Canvas:
    """A renderer without a browser: every job is answered by `answer(job)`."""

    def __init__(self, answer) -> None:
        self.answer, self.jobs, self.facts = answer, [], {}

    def render(self, job):
        self.jobs.append(job)
        return renders.Render(self.answer(job), None, False, 0.0)


def white(height: int = 10):
    return np.full((height, 10, 3), 255, np.uint8)


def test_a_reduction_that_shows_is_kept_back_and_the_others_are_not():
    sheets = [["a{b:c}\nd{e:f}\ng{h:i}", ""]]
    html = "<html><head><style>/*sheet 0*/</style></head></html>"
    made = draft_of({"doctype": "<!DOCTYPE html>", "quirks": False, "html": html, "sheets": sheets})
    made.spaced = made.plain
    made.matched = {"a": 0, "d": 0, "g": 0}

    def answer(job):
        image = white()
        image[0, 0] = 0 if "e:f" in job.html else 255  # rule d shows, though it seemed to match nothing
        image[5:, :] = image[0, 0]
        return (image,)

    page = "<style>d{e:f}</style>"
    trials = Trials(Canvas(answer), (1280, 720), page, answer(renders.Job(page))[0], rows=10)
    html, kept_back = shortest(made, trials, lambda gone: [0, 0, 0])
    assert "d{e:f}" in html and "a{" not in html and "g{" not in html
    assert kept_back == 1 and trials.made <= MAX_RENDERS


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return write_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def renderer():
    need_browser()
    with renders.Renderer(2, 60.0) as renderer:
        yield renderer


def made(site, page: str, renderer, **changes):
    settings = Settings(**changes)
    files = LocalFiles(site.resolve())
    html = read_html(Source(page, site / page, site.resolve()))
    html = inline_files(html, site.resolve(), files, settings.scripts == "run")
    return make_page(page, html, settings, renderer, COUNT)


def rerendered(record, renderer):
    return renderer.render(renders.Job(record["text"], record["viewport"])).image[: record["height"]]


def test_a_target_is_what_its_screenshot_shows_and_nothing_else(site, renderer):
    record, image = made(site, "index.html", renderer)
    html = record["text"]
    assert np.array_equal(rerendered(record, renderer), image)
    gone = ["<script", "noscript>", "onload", "comment", "secret", "never seen", "token", "data-k", "aria-", "unnamed"]
    gone += [".nothing", ":hover", "print", "@font-face", "@keyframes", "--unused", "font-size:20px", "far.example"]
    assert [words for words in gone if words in html] == []
    for kept in ("<!DOCTYPE html>", 'lang="en"', "letter-spacing:2px", "var(--used)", "no scripts here", 'href="#"'):
        assert kept in html, kept
    assert html.rstrip().endswith("</html>") and record["kept_back"] == 0
    assert html.count("<img") == 2 and 'width="90" height="40"' in html and 'width="30" height="20"' in html
    grey = (image == 0xCC).all(axis=-1)
    boxes = 30 * 20 + 90 * 40 + 24 * 20  # the last one is cut by its element
    assert boxes <= grey.sum() < boxes + 20  # the edges of letters may be grey, too


def test_scripts_run_once_and_are_removed(site, renderer):
    record, image = made(site, "index.html", renderer, scripts="run")
    assert "written by a script" in record["text"] and "Heading and more" in record["text"]
    assert "no scripts here" not in record["text"] and "<script" not in record["text"]
    assert np.array_equal(rerendered(record, renderer), image)


def test_a_long_page_is_cut_between_its_elements(site, renderer):
    record, image = made(site, "long.html", renderer, max_height=800)
    assert image.shape[0] <= 800 and record["cut"] > 100
    assert "Paragraph 10 " in record["text"] and "Paragraph 199 " not in record["text"]
    assert "The end" not in record["text"] and not record["text"].startswith("<!DOCTYPE")
    assert np.array_equal(rerendered(record, renderer), image)
    record, image = made(site, "pre.html", renderer, max_height=800)
    assert "line 10\n" in record["text"] and "line 399" not in record["text"]
    assert np.array_equal(rerendered(record, renderer), image)


def test_a_page_over_its_limit_is_cut_until_it_fits(site, renderer):
    record, _ = made(site, "long.html", renderer, max_html_characters=600)
    assert 200 < len(record["text"]) <= 600 and record["text"].rstrip().endswith("</html>")
    with pytest.raises(PageDropped) as dropped:
        made(site, "index.html", renderer, max_html_characters=60)
    assert dropped.value.reason == "too long"


def test_widths_decide_which_rules_stay(site, renderer):
    record, image = made(site, "index.html", renderer, widths=(390,))
    assert image.shape[1] == 390 and "font-size:20px" in record["text"] and "font-size:40px" not in record["text"]


@pytest.mark.parametrize(("page", "reason"), [("blank.html", "blank"), ("bare.html", "without text")])
def test_pages_without_anything_to_see_are_dropped(site, renderer, page, reason):
    with pytest.raises(PageDropped) as dropped:
        made(site, page, renderer)
    assert dropped.value.reason == reason


def test_what_would_change_a_pixel_stays(tmp_path, renderer):
    (tmp_path / "a.html").write_text(
        "<!DOCTYPE html><style>p + p{color:red}i{color:green}</style><body><i data-a=1>x</i>"
        '<div><p style="display:none">hidden</p><p>red for its hidden neighbour</p></div>'
    )
    record, image = made(tmp_path, "a.html", renderer)
    assert "p+p{" in record["text"] or "p + p{" in record["text"]
    assert record["kept_back"] > 0 and "data-a" not in record["text"]
    assert np.array_equal(rerendered(record, renderer), image)


def test_the_renderers_own_grey_is_in_no_target(tmp_path, renderer):
    picture = "<img src=https://example.org/y.png width=90 height=40>"
    (tmp_path / "a.html").write_text(f"<!DOCTYPE html><body><p>Hello</p>{picture}{picture}</body>")
    record, image = made(tmp_path, "a.html", renderer)
    assert record["text"].count('src="data:,"') == 2 and "svg" not in record["text"]
    assert np.array_equal(rerendered(record, renderer), image) and (image == 204).all(axis=2).sum() >= 2 * 90 * 40


@pytest.mark.slow
def test_real_pages_come_out_shorter_and_render_to_the_same_pixels(renderer):
    pages = sorted(need_shared("pages").glob("*/page.html"))[::9]
    assert len(pages) >= 8
    before = after = 0
    for page in pages:
        record, image = made(page.parent, "page.html", renderer)
        assert any(np.array_equal(rerendered(record, renderer), image) for _ in range(2)), page  # it may flicker
        before, after = before + record["characters"][1], after + record["characters"][2]
    assert after < 0.8 * before
