"""The report shows every number and every page, runs nothing a model wrote, and can be used without a mouse."""

import base64
import gc
import hashlib
import os
import re
import threading
import time
import tracemalloc
import weakref
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import jinja2
import numpy as np
import pytest
from conftest import need_browser
from PIL import Image
from small_reports import COMPARISON, failed, picture, result, sample, written

from scoring import report as page_report
from scoring import report_pictures, report_summary
from scoring.report import write_report
from scoring.report_summary import bin_of, mean_of, scores_of, share_of
from scoring.report_values import Before, Box, PageResult, row_of

HOSTILE = [
    "</script><script>window.hacked=1</script>",
    '"><img src=x onerror="window.hacked=2">',
    "' onfocus='window.hacked=3' autofocus tabindex='0",
    "--></style></title></pre></code></svg><script>alert(4)</script>",
    "<a href=\"javascript:alert('5')\">x</a><iframe srcdoc='<script>parent.hacked=6</script>'></iframe>",
    "<svg onload=alert(7)><style>body{display:none}</style><meta http-equiv=refresh content='0;url=//a.example'>",
]


class Parts(HTMLParser):
    """Every tag with its attributes, and the text of the file."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def names_in(html: str) -> list[str]:
    return re.findall(r"<h3[^>]*><a[^>]*><bdi>(.*?)</bdi>", html)


# -----------------------------------------------------------------------------
# Text


def hostile_pages() -> list[PageResult]:
    pages = []
    for text in HOSTILE:
        box = Box(0.1, 0.1, 0.5, 0.2, text)
        everywhere = {
            "html": text,
            "reference_html": text,
            "causes": (text,),
            "missing": [box],
            "matched": [(box, box)],
        }
        pages.append(result(text, 0.5, scores={"likeness": 0.5, text: 0.5, "text": text}, **everywhere))
        pages.append(failed(text, failure=text, reference=Path(f"{text[:20]}\n.png"), **everywhere | {"matched": []}))
    return pages


def hostile_report(tmp_path: Path) -> str:
    metrics = {text: {"before": text, "after": 1, "difference": 0.1, "low": 0, "high": 0.2} for text in HOSTILE}
    comparison = {"metrics": metrics, "decoding": [{text: text} for text in HOSTILE], "n": 2}
    facts = {text: text for text in HOSTILE}
    write_report(tmp_path / "report.html", HOSTILE[3], hostile_pages(), facts, comparison)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_hostile_text_stays_text(tmp_path):
    parts = Parts(hostile_report(tmp_path))
    counts = {tag: sum(name == tag for name, _ in parts.tags) for tag in ("script", "style", "iframe", "a", "meta")}
    pages = 2 * len(HOSTILE)
    # One skip link, six to parts of the report, three pages of the first screen, one link a page, one more a failure.
    links = 1 + 6 + 3 + pages + pages // 2
    assert counts == {"script": 1, "style": 1, "iframe": 0, "a": links, "meta": 4}
    assert [attrs for _, attrs in parts.tags if any(name.startswith("on") or name == "srcdoc" for name in attrs)] == []
    links = {attrs.get("src") or attrs.get("href") for _, attrs in parts.tags if {"src", "href"} & set(attrs)}
    assert {link[:11] for link in links if not link.startswith("#")} == {"data:,", "data:image/"}
    assert all(text in "".join(parts.text) for text in HOSTILE)


def test_the_policy_comes_first_and_names_the_one_script(tmp_path):
    html = written(tmp_path, sample())
    assert re.search(r"<head>\s*<meta http-equiv=\"Content-Security-Policy\"", html)
    script = re.search(r"<script>(.*?)</script>", html, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(attrs["content"] for _, attrs in Parts(html).tags if attrs.get("http-equiv"))
    assert policy.split("; ") == [
        "default-src 'none'", "img-src data:", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'",
        "base-uri 'none'", "form-action 'none'",
    ]  # fmt: skip
    assert html.index("charset") < 1024  # where browsers look for it
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)


def test_control_characters_and_lone_surrogates_do_not_break_the_file(tmp_path):
    html = written(tmp_path, [result("a\x00b\ud800c\x1b", html="x\x00y\udfff\x0c\x85z")])
    assert names_in(html) == ["a␀b�c␛"] and "x␀y�␌�z" in html
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", html)


def test_long_texts_are_cut_and_that_is_said(tmp_path):
    html = written(tmp_path, [result("n" * 5000, html="h" * 300_000, causes=("c" * 5000,))])
    assert "300,000 characters, the first 200,000 are shown" in html
    assert (len(names_in(html)[0]), len(re.search("h{500,}", html).group()), "c" * 201 in html) == (200, 199_999, False)


def test_a_page_without_a_name_has_a_link(tmp_path):
    assert names_in(written(tmp_path, [result("  ")])) == ["(no name)"]


# -----------------------------------------------------------------------------
# Pictures and boxes


def pictures_in(html: str) -> list[Image.Image]:
    """Those of the cards, without the first screen's."""
    found = re.findall(r'src="data:image/webp;base64,([^"]+)', html[html.index("<article") :])
    return [Image.open(BytesIO(base64.b64decode(data))) for data in found]


def test_a_tall_page_is_shrunk_and_cut_and_its_boxes_follow(tmp_path):
    boxes = {"matched": [], "invented": [], "missing": [Box(0.5, 0.25, 0.25, 0.1, "in"), Box(0, 0.9, 1, 0.1, "below")]}
    page = result("tall", reference=picture(6000, 1120), written=picture(300, 1120), **boxes)
    html = written(tmp_path, iter([page]))
    assert [image.size for image in pictures_in(html)] == [(560, 1600), (560, 150), (320, 914)]
    assert "the first 3,200 rows are shown · 2 missing · 1 not drawn" in html
    # 0.25 of 6,000 rows is 1,500, at half the size 750; one pixel of air around.
    assert 'class="missing" x="279.0" y="749.0" width="142.0" height="302.0"' in html


def test_few_pages_are_shown_as_wide_as_they_are_and_many_smaller(tmp_path):
    page = result("page", reference=picture(900, 1280), written=picture(900, 1280))
    for count, width in ((1, 1280), (60, 1280), (61, 800), (150, 800), (151, 560), (None, 560)):
        write_report(tmp_path / "report.html", "Title", iter([page]), {}, count=count)
        html = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert [image.width for image in pictures_in(html)] == [width, width, 320], count


def test_boxes_outside_the_page_and_without_a_size_are_not_drawn(tmp_path):
    boxes = [
        Box(-1, -1, 3, 3, "all of it"),
        Box(2, 2, 1, 1, "x"),
        Box(float("nan"), 0, 1, 1, "x"),
        Box(0, 0, 0, 0, "x"),
    ]
    html = written(tmp_path, [result("page", missing=boxes, matched=[])])
    assert re.findall(r'class="missing" (x=.*?)><title>(.*?)</title>', html) == [
        ('x="1.0" y="1.0" width="118.0" height="88.0"', "missing: all of it")
    ]
    assert "4 missing · 3 not drawn" in html


def test_many_boxes_stay_bounded(tmp_path):
    boxes = [Box(0.1, 0.1, 0.1, 0.1, "x")] * 3000
    html = written(tmp_path, [result("page", missing=boxes, matched=[])])
    assert (
        html.count('class="missing" x=') == report_pictures.MAX_BOXES + 1 and "3,000 missing · 2,500 not drawn" in html
    )


def test_small_boxes_lie_above_large_ones(tmp_path):
    boxes = [Box(0.2, 0.2, 0.1, 0.1, "small"), Box(0, 0, 1, 1, "large")]
    html = written(tmp_path, [result("page", missing=boxes, matched=[])])
    assert re.findall("<title>missing: (.*?)</title>", html) == ["large", "small"]


def test_the_difference_is_white_where_pages_are_equal():
    page = Image.fromarray(picture())
    other = Image.fromarray(picture(100))
    assert report_pictures.difference(page, page).getextrema() == (255, 255)
    assert report_pictures.difference(page, other).size == (120, 100)
    assert report_pictures.difference(page, Image.new("RGB", page.size, (255, 245, 255))).getpixel((100, 80)) == 225


def test_pictures_come_from_files_and_a_bad_one_is_said(tmp_path):
    Image.new("RGBA", (50, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    pages = [result("a", reference=tmp_path / "clear.png", written=tmp_path / "bad.png")]
    pages += [result("b", reference=np.zeros((0, 5, 3), np.uint8), written=np.zeros((3, 3, 9), np.uint8))]
    html = written(tmp_path, [*pages, result("c", reference=None, written=None)])
    assert [image.convert("RGB").getpixel((9, 9)) for image in pictures_in(html)] == [(255, 255, 255)]
    html = html[html.index("<article") :]
    assert (
        html.count("could not be read") == 2
        and html.count("picture is empty") == 1
        and html.count("nothing to compare") == 3
    )
    assert html.count(">no picture<") == 1 and html.count(">no render<") == 1


def test_even_noise_stays_small_enough_for_five_hundred_pages(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4000, 1280, 3), np.uint8)
    page = result("noise", reference=noise, written=noise[::-1], before=Before(noise[:, ::-1], "<p>", {}))
    many = report_pictures.MANY_PAGES
    limits = [*[many.picture_bytes] * 3, many.difference_bytes]
    html = written(tmp_path, iter([page]))
    sizes = [len(base64.b64decode(data)) for data in re.findall('base64,([^"]+)"', html[html.index("<article") :])]
    assert all(size <= limit for size, limit in zip(sizes, limits)) and len(sizes) == 4
    assert sum(limits) * 4 / 3 * 500 < 62_000_000
    for detail in report_pictures.DETAILS:
        assert (3 * detail.picture_bytes + detail.difference_bytes) * 4 / 3 * detail.pages < 40_000_000


# -----------------------------------------------------------------------------
# Summary


def test_failures_count_as_zero_and_the_mean_without_them_stands_beside():
    rows = [row_of(page, 1) for page in sample()]
    likeness, block = mean_of(rows, "likeness"), mean_of(rows, "block")
    assert (likeness.with_failures, likeness.without, likeness.measured) == (
        pytest.approx(2.57 / 6), pytest.approx(2.57 / 5), 5)  # fmt: skip
    assert (block.with_failures, block.without, block.measured) == (pytest.approx(1.5 / 7), 0.25, 6)
    assert mean_of([row_of(failed("x"), 1)], "likeness") == report_summary.Mean(0.0, None, 0)
    assert mean_of([], "likeness") == report_summary.Mean(None, None, 0)
    assert share_of(rows, "valid") == (7, 7)
    assert share_of([*rows, row_of(failed("x", scores={}), 1), row_of(result("y", scores={}), 1)], "valid") == (7, 8)


def test_what_nobody_measured_is_not_in_the_summary(tmp_path):
    html = written(tmp_path, [result("a", scores={"likeness": 0.5, "valid": True}), failed("b", scores={})])
    assert re.findall(r"<dt>(\w+)</dt><dd>[^<]*</dd><dd class=\"small\">([^<]*)", html)[3:] == [("valid", "1 of 2")]


def test_the_summary_shows_them_and_names_the_failures(tmp_path):
    html = written(tmp_path, sample())
    assert re.findall(r"<dt>(\w+)</dt><dd>([^<]*)</dd><dd class=\"small\">([^<]*)", html) == [
        ("pages", "7", ""), ("likeness", "0.428", "failures as 0"), ("failures", "1", "14.3 %"),
        ("valid", "100.0 %", "7 of 7"), ("truncated", "0.0 %", "0 of 7"), ("looping", "0.0 %", "0 of 7"),
        ("exact", "0.0 %", "0 of 7"),
    ]  # fmt: skip
    line = re.search(r'<th scope="row">likeness</th><td>(.*?)<span.*?</td><td>(.*?)</td><td>(.*?)</td>', html)
    assert line.groups() == ("0.428", "0.514", "5")
    assert '<a href="#page-6"><bdi>broken</bdi></a> <span>out of time after 15 s</span>' in html


def test_pages_stand_worst_first_and_unmeasured_last(tmp_path):
    expected = ["broken", "page 3", "page 1", "page 4", "page 0", "page 2", "unmeasured"]
    assert names_in(written(tmp_path, sample())) == expected
    assert names_in(written(tmp_path, reversed(sample()))) == expected


def test_the_metric_that_chooses_comes_first_and_orders_the_pages(tmp_path):
    """A wholly different page reaches 0.6 in `overall` by a few lucky matches; `likeness` knows it is the worst."""
    scores = {"different": (0.62, 0.02), "good": (0.9, 0.8), "plain": (0.55, 0.5)}
    pages = [result(name, scores={"overall": one, "likeness": two}) for name, (one, two) in scores.items()]
    html = written(tmp_path, pages)
    assert names_in(html) == ["different", "plain", "good"]
    assert re.findall(r'<th scope="row">(.*?)</th>', html) == ["likeness", "overall"]
    assert re.findall(r'<option value="(.*?)"', html) == ["likeness", "overall"]
    assert re.findall(r"<dt>(\w+)</dt><dd>([^<]*)</dd><dd class=\"small\">", html)[1] == ("likeness", "0.440")
    assert re.findall(r"<b>(likeness|overall)</b>", html) == ["likeness", "overall"], "the histograms"
    assert re.findall(r"<dt>(\w+)</dt><dd>0", html[html.index("<article") :])[:2] == ["likeness", "overall"]


def test_a_failed_page_shows_zeros_whatever_it_says(tmp_path):
    html = written(tmp_path, [failed("broken", scores={"likeness": 0.9, "ssim": 0.8, "seconds": 15.0})])
    card = html[html.index("<article") : html.index("</article>")]
    assert re.findall(r"<dt>(\w+)</dt><dd>([^<]*)", card) == [("likeness", "0.00"), ("SSIM", "0.00")]
    assert "seconds 15.00" in card and "0.9" not in card


def test_other_values_are_shown_and_only_scores_are_averaged(tmp_path):
    extra = {"likeness": 0.5, "neatness": 0.75, "tokens": 1, "seconds": 2.5, "sane": True, "note": "a<b", "text": None}
    pages = [
        result("a", scores=extra),
        result("b", scores={"likeness": float("nan"), "neatness": np.float32(0.25), "tokens": 0}),
    ]
    assert scores_of([row_of(page, 1) for page in pages]) == ["likeness", "neatness"]
    html = written(tmp_path, pages)
    assert "tokens 1 · seconds 2.50 · sane yes · note a&lt;b" in html
    assert "<dt>text</dt><dd>–</dd>" in html and '<th scope="row">neatness</th><td>0.500' in html


def test_values_a_hair_outside_are_scores_all_the_same():
    row = row_of(result("a", scores={"likeness": 1.0000000002, "ssim": -0.1, "valid": np.True_}), 1)
    assert (row.values, row.flags) == ({"likeness": 1.0, "ssim": 0.0}, {"valid": True})


def test_no_page_is_said_plainly(tmp_path):
    html = written(tmp_path, iter([]))
    assert "No page was evaluated." in html and "<article" not in html and "hist" not in Parts(html).text


def pages_that_chose() -> list[PageResult]:
    """Two pages compare, of likeness 0.2 and 0.4; the others chose the weights, and one of those failed."""
    chose = [result("chose well", 0.95, chooses=True), failed("chose and failed", chooses=True)]
    return [result("compares", 0.2), *chose, result("compares, too", 0.4, causes=("misplaced",))]


def test_pages_that_chose_the_weights_are_shown_and_left_out_of_every_number(tmp_path):
    html = written(tmp_path, pages_that_chose())
    assert names_in(html) == ["chose and failed", "compares", "compares, too", "chose well"]
    top, cards = html[: html.index('id="pages"')], html[html.index('id="cards"') :].split("<article")[1:]
    assert re.findall(r"<dt>(\w+)</dt><dd>([^<]*)</dd><dd class=\"small\">([^<]*)", top)[:4] == [
        ("pages", "2", ""), ("likeness", "0.300", "failures as 0"), ("failures", "0", "0.0 %"),
        ("valid", "100.0 %", "2 of 2"),
    ]  # fmt: skip
    line = re.search(r'<th scope="row">likeness</th><td>(.*?)<span.*?</td><td>(.*?)</td><td>(.*?)</td>', top)
    assert line.groups() == ("0.300", "0.300", "2")
    assert 'aria-label="Pages with likeness 0.2 to 0.3: 1, 0.4 to 0.5: 1"' in top and 'class="key failed"' not in top
    assert "2 of 4 pages chose the weights: they are shown below, and left out of tiles, means" in top
    assert "1 failure, each counted as 0, but for 1 that chose the weights" in top
    assert ['<li class="chooses">chose the weights</li>' in card for card in cards] == [True, False, False, True]


def test_a_report_without_pages_that_chose_says_nothing_of_them(tmp_path):
    assert "chose the weights" not in written(tmp_path, sample(), comparison=COMPARISON)


def test_a_score_that_only_pages_that_chose_have_is_in_no_mean(tmp_path):
    page = result("b", chooses=True, scores={"likeness": 0.9, "clip": 0.7})
    html = written(tmp_path, [result("a", scores={"likeness": 0.5}), page])
    assert (
        re.findall(r'<th scope="row">(.*?)</th>', html) == ["likeness"] == re.findall(r"<b>(likeness|CLIP)</b>", html)
    )
    assert "<dt>CLIP</dt><dd>0.70</dd>" in html


# -----------------------------------------------------------------------------
# Distribution and comparison


def test_bins_take_their_lower_edge_and_the_last_one_takes_one():
    assert [bin_of(value) for value in (0, 0.0999, 0.1, 0.3, 0.5, 0.7, 0.999, 1)] == [0, 0, 1, 3, 5, 7, 9, 9]


def test_a_histogram_counts_every_page_and_sets_failures_apart(tmp_path):
    html = written(tmp_path, sample())
    assert 'aria-label="Pages with likeness 0.0 to 0.1: 2, 0.3 to 0.4: 2, 0.8 to 0.9: 1, 0.9 to 1.0: 1"' in html
    assert 'aria-label="Pages with block 0.0 to 0.1: 1, 0.2 to 0.3: 6"' in html
    assert html.count('class="failed" x="0.6" y="50.0" width="8.8" height="50.0"') == 1


def test_the_comparison_shows_differences_with_their_intervals(tmp_path):
    html = written(tmp_path, sample(), comparison=COMPARISON)
    part = html[html.index('id="comparison"') : html.index('id="distribution"')]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in re.findall("<tr>(.*?)</tr>", part)]
    assert [[re.sub("<[^>]*>", "", cell) for cell in row] for row in rows] == [
        ["score", "before", "after", "difference", "p"],
        ["overall", "0.310", "0.820", "+0.510 0.44 to 0.58", "&lt; 0.001"],
        ["TreeBLEU", "0.300", "0.270", "−0.030 −0.09 to 0.03", "0.310"],
        ["SSIM", "–", "0.500", "– – to –", "–"],
        ["repetition penalty", "before", "after"],
        ["1", "0.200", "0.790"],
        ["1.05", "–", "0.820"],
    ]
    assert part.count("<circle") == 2 and "40 pages" in part
    assert "promises too much" not in part
    html = written(tmp_path, sample(), comparison=COMPARISON | {"apart": False})
    assert "both models. The same pages chose the weights, so that this promises too much.</p>" in html
    assert written(tmp_path, sample(), comparison={}).count('id="comparison"') == 0
    assert "<circle" not in written(tmp_path, sample(), comparison={"metrics": {"ssim": {}}})


# -----------------------------------------------------------------------------
# Report


def test_pages_are_taken_as_they_are_needed_and_none_is_kept(tmp_path, monkeypatch):
    """Three at a time, whose cards are made beside each other and stand in their pages' order."""
    alive, most, numbers, real = [], 0, [], page_report.card
    together = threading.Barrier(3)

    def card(page, row, *rest):
        together.wait(20)
        numbers.append(row.number)
        return real(page, row, *rest)

    monkeypatch.setattr(page_report, "card", card)
    monkeypatch.setattr(page_report, "most_at_once", lambda: 3)

    def pages():
        nonlocal most
        for place in range(30):
            gc.collect()
            most = max(most, sum(page() is not None for page in alive))
            page = result(f"page {place}")
            alive.append(weakref.ref(page.reference))
            yield page
            del page

    gc.freeze()  # or each collection goes through all that other tests have loaded, a third of a second
    try:
        write_report(tmp_path / "report.html", "Title", pages(), {})
    finally:
        gc.unfreeze()
    assert most < 3 and len(alive) == 30 and sorted(numbers) == [*range(1, 31)]
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    places = re.findall(r'id="name-(\d+)"><a [^>]*><bdi>page (\d+)', html)
    assert len(places) == 30 and all(int(number) == int(place) + 1 for number, place in places)


def test_a_report_larger_than_memory_allows_is_written_piece_by_piece(tmp_path):
    pages = (
        result(f"page {place}", html=f"{place}" * 150_000, reference=None, written=None) for place in range(10, 110)
    )
    written(tmp_path, [result("warm")])
    tracemalloc.start()
    write_report(tmp_path / "large.html", "Title", pages, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "large.html").stat().st_size > 20_000_000 > 4 * peak


def test_nothing_but_markup_of_the_templates_passes_unescaped():
    show = page_report.templates().from_string
    assert show("{{ text }}").render(text="<b>&\x00'") == "&lt;b&gt;&amp;␀&#39;"
    assert show("{{ text | cut(3) }}").render(text="<<<<<") == "&lt;&lt;…"
    with pytest.raises(TypeError, match="a template shows"):
        show("{{ page.values }}").render(page={"values": 1})
    with pytest.raises(jinja2.UndefinedError):
        show("{{ page.absent }}").render(page={})


def test_what_the_pages_raise_goes_through_and_the_old_file_stays(tmp_path):
    (tmp_path / "report.html").write_text("old")

    def pages():
        yield result("a")
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        write_report(tmp_path / "report.html", "Title", pages(), {})
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"report.html": "old"}


def test_the_folder_is_made_and_holds_the_report_alone(tmp_path):
    write_report(tmp_path / "a" / "b" / "report.html", "Title", sample(), {})
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["report.html"]


def test_the_commands_of_the_docstring_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(
        "\n".join(line.strip() for line in page_report.__doc__.splitlines() if line.startswith("    ")), {"Path": Path}
    )
    assert "out of time" in (tmp_path / "evaluation" / "report.html").read_text(encoding="utf-8")


def test_five_hundred_small_pages_take_seconds_and_little_room(tmp_path):
    start = time.monotonic()
    html = written(tmp_path, (result(f"page {place}", place / 500) for place in range(500)))
    assert time.monotonic() - start < 20 and len(html) < 6_000_000 and html.count("<article") == 500


# -----------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser():
    found = need_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium as root does not start with its sandbox; what it opens here was written by this very process.
        args = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found, args=args)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, "Title", sample(), {"model": "tiny", "decoding": "greedy"}, COMPARISON)
    return path


@pytest.fixture
def show(browser):
    """Opens a file; when the test is over, nothing may have been logged, asked or fetched but the file itself."""
    opened, heard = [], []

    def show(path: Path, width: int = 1280, **context):
        page = browser.new_context(viewport={"width": width, "height": 800}, **context).new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: heard.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (heard.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: request.url[:5] == "data:" or heard.append(f"request: {request.url}"))
        page.goto(path.as_uri())
        opened.append((page, f"request: {path.as_uri()}"))
        return page

    yield show
    for page, _ in opened:
        page.context.close()
    assert heard == [own for _, own in opened]


def names(page) -> list[str]:
    return page.locator(".card:visible h3").all_text_contents()  # inner texts are empty where nothing is drawn yet


def focused(page, what: str = "id") -> str:
    return page.evaluate(f"document.activeElement.{what}")


def script(name: str) -> str:
    return Path(__file__).with_name(f"{name}.js").read_text(encoding="utf-8")


WORST = ["broken", "page 3", "page 1", "page 4", "page 0", "page 2", "unmeasured"]


@pytest.mark.parametrize("width", [1280, 768, 390, 320])
def test_the_report_fits_every_width(show, report, width):
    page = show(report, width)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert page.evaluate("[document.documentElement.scrollWidth, document.documentElement.lang]") == [width, "en"]
    tops = (
        page.locator(".card")
        .nth(1)
        .locator("figure")
        .evaluate_all("all => all.map((f) => f.getBoundingClientRect().y)")
    )
    assert len(set(tops)) == (1 if width > 704 else 2)


def test_buttons_sort_by_order_name_and_any_score(show, report):
    page = show(report)
    assert names(page) == WORST
    page.get_by_role("button", name="Best first").click()
    assert names(page) == ["page 2", "page 0", "page 4", "page 1", "page 3", "broken", "unmeasured"]
    page.get_by_role("button", name="By name").click()
    assert names(page) == ["broken", *(f"page {place}" for place in range(5)), "unmeasured"]
    page.locator("#score").select_option("block")
    assert names(page)[0] == "broken" and page.locator("[data-order=worst]").get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="Best first").click()
    assert names(page)[-1] == "broken"


def test_a_bar_filters_and_gives_back(show, report):
    page = show(report)
    bar = page.get_by_role("button", name="likeness 0.3 to 0.4: 2 pages")
    bar.click()
    assert names(page) == ["page 1", "page 4"] and bar.get_attribute("aria-pressed") == "true"
    assert page.locator("#status").inner_text() == "2 of 7 pages · likeness 0.3 to 0.4"
    bar.click()
    assert names(page) == WORST
    page.get_by_role("button", name="likeness 0.0 to 0.1: 2 pages").click()
    assert names(page) == ["broken", "page 3"]  # the failure counts as 0
    page.get_by_role("button", name="Show all").click()
    assert names(page) == WORST and focused(page) == "find"


def test_a_bar_shows_the_pages_that_it_counts(show, tmp_path):
    """A page that chose the weights is in no bar, though its own score would lie there."""
    write_report(tmp_path / "report.html", "Title", [result("a", 0.35), result("b", 0.35, chooses=True)], {})
    page = show(tmp_path / "report.html")
    page.get_by_role("button", name="likeness 0.3 to 0.4: 1 page").click()
    assert names(page) == ["a"] and page.locator("#status").inner_text() == "1 of 2 pages · likeness 0.3 to 0.4"


def test_bars_are_chosen_by_keyboard(show, report):
    page = show(report)
    page.get_by_role("button", name="likeness 0.0 to 0.1: 2 pages").focus()
    for key in ("ArrowRight", "Enter"):  # empty bars are passed over
        page.keyboard.press(key)
    assert names(page) == ["page 1", "page 4"]
    page.keyboard.press("Tab")
    assert focused(page, "dataset.score") == "block"  # one stop for each histogram


def test_the_text_filter_and_causes_and_failure_links(show, report):
    page = show(report)
    page.get_by_label("Filter").last.fill("OUT OF time")
    assert names(page) == ["broken"]
    page.get_by_label("Filter").last.fill("nowhere")
    assert names(page) == [] and page.locator("#status").inner_text() == "0 of 7 pages"
    page.locator(".failures a").click()
    assert names(page) == WORST and page.url.endswith("#page-6")
    page.get_by_role("button", name="misplaced 1").click()
    assert names(page) == ["unmeasured"]


def test_boxes_lie_on_their_text_and_can_be_hidden(show, report):
    page = show(report)
    card = page.locator("#page-1")
    card.scroll_into_view_if_needed()
    shot, box = card.locator("img").first.bounding_box(), card.locator("rect.missing").bounding_box()
    place = [(box["x"] - shot["x"]) / shot["width"], (box["y"] - shot["y"]) / shot["height"]]
    assert place == pytest.approx([0.6, 0.1], abs=0.02)
    assert card.locator("rect").evaluate_all("all => all.map((r) => r.getAttribute('class'))") == [
        "matched", "matched", "missing", "matched", "matched", "invented"]  # fmt: skip
    for kind in report_pictures.KINDS:
        page.get_by_label(kind).uncheck()
        assert card.locator(f"rect.{kind}:visible").count() == 0
    page.get_by_label("missing").check()
    assert card.locator("rect:visible").count() == 1
    page.get_by_label("compact").check()
    heights = card.evaluate("c => [...c.querySelectorAll('.boxes, img:has(~ .boxes)')].map((e) => e.clientHeight)")
    assert len(set(heights)) == 1


def test_a_matched_box_lights_its_partner_for_mouse_and_keyboard(show, report):
    page = show(report)
    card = page.locator("#page-1")
    name = "r.closest('figure').innerText.split(/\\W/)[0]"
    lit = f"c => [...c.querySelectorAll('.lit')].map((r) => {name} + ' ' + r.textContent)"
    card.locator('rect[data-pair="1"]').last.hover()
    assert card.evaluate(lit) == ["Wanted matched: World", "Written matched: World"]
    card.locator(".boxes").first.focus()
    page.keyboard.press("ArrowRight")
    assert card.evaluate(lit) == ["Wanted matched: Hello", "Written matched: Hello!"]
    assert card.locator(".readout").inner_text() == "matched: Hello → Hello!"
    page.keyboard.press("ArrowRight")
    assert card.evaluate(lit) == ["Wanted missing: Menu"]


def test_details_open_by_enter_and_show_the_source(show, report):
    page = show(report)
    part = page.locator("#page-1 details").first
    part.locator("summary").focus()
    page.keyboard.press("Enter")
    assert part.locator("pre").inner_text() == "<p>page 0</p>" and part.locator("pre").is_visible()


@pytest.mark.parametrize("width", [1280, 390])
def test_a_picture_is_enlarged_by_mouse_and_by_keyboard(show, report, width):
    page = show(report, width)
    viewer = page.locator("#viewer")
    page.locator(".pick img").first.click(position={"x": 20, "y": 40})
    title = viewer.locator("h2")
    assert viewer.is_visible() and title.inner_text().startswith("Wanted · page")
    assert viewer.locator("img").get_attribute("src") == page.locator(".pick img").first.get_attribute("src")
    page.keyboard.press("ArrowRight")
    assert title.inner_text().startswith("Written · page")
    viewer.get_by_role("button", name="Actual pixels").click()
    assert viewer.locator("img").evaluate("(image) => image.clientWidth === image.naturalWidth")
    page.keyboard.press("Escape")
    assert viewer.is_hidden() and page.url.endswith("report.html")
    button = page.locator("#page-1 .enlarge").nth(1)
    button.focus()
    page.keyboard.press("Enter")
    assert title.inner_text() == "Written · page 0" and focused(page, "dataset.view") == "close"
    page.keyboard.press("j")  # walks no pages behind the picture
    page.keyboard.press("Enter")
    assert viewer.is_hidden() and focused(page, "ariaLabel") == "Enlarge: Written"


def test_j_and_k_walk_the_pages_but_not_while_typing(show, report):
    page = show(report)
    walked = []
    for key in "jjkjjjjjjjjk":
        page.keyboard.press(key)
        walked.append(page.locator(":focus h3").inner_text())
    assert walked == [*(WORST[place] for place in (0, 1, 0, 1, 2, 3, 4, 5, 6, 6, 6, 5))]
    page.locator("#find").focus()
    page.keyboard.type("jk")
    assert focused(page) == "find" and focused(page, "value") == "jk"


def test_tab_reaches_everything_with_a_visible_focus(show, report):
    page = show(report)
    page.keyboard.press("Tab")
    assert focused(page, "className") == "skip"
    seen = set()
    while focused(page, "tagName") != "BODY" and len(seen) < 200:
        seen.add(focused(page, "tagName").lower())
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        page.keyboard.press("Tab")
    assert {"a", "button", "summary", "select", "input", "svg"} <= seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_enough_contrast(show, report, scheme):
    page = show(report, color_scheme=scheme)
    page.get_by_role("button", name="likeness 0.3 to 0.4: 2 pages").click()
    page.get_by_role("button", name="Show all").click()
    weak = page.evaluate(script("weak_contrast"))
    assert weak == []


def test_headings_follow_each_other_and_pictures_have_a_text(show, report):
    page = show(report)
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((node) => +node.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:]))
    assert page.evaluate("[...document.images].filter((image) => !image.alt || image.loading !== 'lazy').length") == 0
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(ids) == len(set(ids))


def test_without_javascript_everything_is_there(show, report):
    page = show(report, java_script_enabled=False)
    assert names(page) == WORST
    assert page.locator("svg[role=img]:visible").count() == 3  # two histograms and the intervals
    assert page.locator("[data-order]:visible, #find:visible, .bins:visible, .readout:visible").count() == 0
    page.get_by_label("missing").uncheck()
    assert page.locator("rect.missing:visible").count() == 1  # in the legend
    page.locator("#page-1 summary").first.click()
    assert page.locator("#page-1 pre").first.is_visible()


def test_hostile_pages_run_nothing(show, tmp_path):
    hostile_report(tmp_path)
    page = show(tmp_path / "report.html")
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    page.get_by_role("button", name="Best first").click()
    page.locator("[data-cause]").first.click()
    page.get_by_role("button", name="Show all").click()
    for place in range(1, 2 * len(HOSTILE), 2):
        for _ in range(5):  # cards above, laid out when they come into view, may push a box away from the pointer
            page.mouse.move(1, 1)  # or under it, which is no movement of the pointer
            page.locator(f"#page-{place} rect.matched").last.hover()
            if (text := page.locator(f"#page-{place} .readout").inner_text()).startswith("matched: "):
                break
        assert text.startswith("matched: ")
    assert sorted(page.locator("h3 bdi").all_text_contents()) == sorted(2 * HOSTILE)
    assert page.evaluate("typeof window.hacked") == "undefined" and page.locator("iframe, object, embed").count() == 0
    assert page.evaluate("getComputedStyle(document.body).display") == "block"
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_a_box_that_scrolled_under_the_mouse_is_read_once_the_mouse_moves(show, report):
    page = show(report)
    box = page.locator("rect.matched:visible").nth(2).element_handle()
    box.scroll_into_view_if_needed()
    place = box.bounding_box()
    x, y = place["x"] + place["width"] / 2, 400
    page.evaluate("scrollBy(0, 300)")
    page.mouse.move(x, y)
    page.wait_for_function(script("scroll_under_mouse"), arg=[box, x, y])
    page.mouse.move(x + 1, y)
    page.wait_for_function("(box) => box.matches('.lit')", arg=box)
    card = page.locator(".card", has=page.locator("rect.lit")).first
    assert card.locator(".readout").inner_text().startswith("matched: ")


def test_an_empty_report_opens_cleanly(show, tmp_path):
    write_report(tmp_path / "report.html", "Nothing", [], {})
    assert show(tmp_path / "report.html").get_by_text("No page was evaluated.").is_visible()
