"""What a report tells first, and of many pages: the first screen, before and after, groups, missed texts, curves."""

import re

import pytest
from small_reports import COMPARISON, failed, picture, result, sample, written

from scoring import metrics
from scoring.report_summary import curve_of, groups_of, ranges_of
from scoring.report_values import Before, Box, PageResult, row_of


def with_before(name: str, likeness: float, before: float, **changes) -> PageResult:
    return result(name, likeness, before=Before(picture(shade=200), f"<b>{name}", {"likeness": before}), **changes)


def heading(html: str, place: int) -> str:
    return re.sub(r"<[^>]*>", "", re.search(rf'<h2 id="pick-{place}">(.*?)</h2>', html, re.S)[1]).strip()


def test_pages_come_first_then_numbers_and_facts_come_last(tmp_path):
    pages = [with_before(f"page {place}", place / 10, 0.1) for place in range(6)]
    html = written(tmp_path, pages, comparison=COMPARISON, training={"losses": [(1, 2.0), (2, 1.0)]})
    places = [html.index(text) for text in (
        'id="pick-1"', 'id="pick-2"', 'id="pick-3"', 'class="tiles"', "<table", 'id="comparison"', 'id="training"',
        'id="distribution"', 'id="pages"', "<article", 'class="facts"',
    )]  # fmt: skip
    assert places == sorted(places) and html.index("<dt>model</dt>") > places[-1]
    expected = ["One from the middle page 2", "The worst page 0", "The best page 5"]
    assert [heading(html, place) for place in (1, 2, 3)] == expected
    first = html[places[0] : places[1]]
    assert re.findall(r"<b>(.*?)</b>", first) == ["Wanted", "Before training", "After training"]
    assert first.count("<img") == 3 and "likeness 0.10" in first and "likeness 0.20" in first
    assert "6 pages: mean likeness 0.250, 0.100 before training (1 is a copy)." in html[: places[0]]


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        ([result("a")], ["The best a"]),
        ([result("a", 0.9), result("b", 0.2)], ["The worst b", "The best a"]),
        ([failed("x"), result("a", 0.9), result("b", 0.2)], ["The worst b", "The best a"]),
        ([failed("x"), failed("y")], ["The worst x", "The best y"]),
        ([result("chose", 1.0, chooses=True), result("a", 0.4)], ["The best a"]),
        ([result("chose", 1.0, chooses=True)], ["The best chose"]),
    ],
)
def test_the_first_screen_shows_no_page_twice_and_none_that_failed_while_others_did_not(tmp_path, pages, expected):
    html = written(tmp_path, pages)
    assert [heading(html, place) for place in range(1, 1 + html.count('<h2 id="pick-'))] == expected


def test_before_stands_between_wanted_and_after_with_its_scores(tmp_path):
    lost = Before(None, "<p>", {"likeness": 0.9}, failure="out of time")
    html = written(tmp_path, [with_before("a", 0.8, 0.3), result("b", 0.9, before=lost), result("c", 1.0)])
    cards = html[html.index("<article") :].split("<article")[1:]
    assert [re.findall(r"<figcaption><b>(.*?)</b>", card) for card in cards] == [
        ["Wanted", "Before training", "After training", "Difference"],
        ["Wanted", "Before training", "After training", "Difference"],
        ["Wanted", "Written", "Difference"],
    ]
    assert "<dd>0.80</dd>" in cards[0] and "0.30 before" in cards[0] and "HTML written before training" in cards[0]
    assert "no render" in cards[1] and "0.00 before" in cards[1], "the worst, whatever it says"
    assert "before" not in cards[2].split("</article>")[0]


def test_the_control_is_told_and_explained(tmp_path):
    html = written(tmp_path, sample(), control={"likeness": (0.125, "against another page, 40 pages")})
    assert "<dt>likeness, shuffled</dt><dd>0.125</dd>" in html and "0.125 against another page (1 is a copy)." in html
    assert "<dt>shuffled</dt>" in html and "shuffled" not in written(tmp_path, sample())


def test_each_measure_that_is_shown_is_explained_likeness_first(tmp_path):
    html = written(tmp_path, [failed("x"), result("a", scores=dict.fromkeys(metrics.names(), 0.5) | {"valid": True})])
    terms = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html[html.index('class="meanings"') : html.index("Causes")])
    labels = [metric.label for metric in metrics.choosing_first()]
    assert [name for name, _ in terms] == [*labels, "valid", "truncated", "looping", "exact", "failure"]
    assert all(meaning for _, meaning in terms)


def test_the_comparison_begins_with_what_the_terminal_tells(tmp_path):
    entry = {"before": 0.1, "after": 0.5}
    html = written(tmp_path, sample(), comparison={"metrics": {"block": entry, "likeness": entry}, "n": 7})
    part = html[html.index('id="comparison"') : html.index('id="distribution"')]
    assert re.findall(r'<th scope="row">(.*?)</th>', part) == ["likeness", "block"]


def test_scores_are_told_by_length_width_content_and_source():
    pages = [
        result(
            f"page {place}", place / 10, width=(390, 1280)[place % 2], source=("one", "two")[place // 5],
            reference_html="<p>" * (place + 1) + "<table><INPUT>" * (place < 2),
        )
        for place in range(10)
    ]  # fmt: skip
    pages += [result("chose", 1.0, width=768, chooses=True), failed("broken", width=390, source="two")]
    groups = dict(groups_of([row_of(page, 1) for page in pages]))
    assert {name: [group.name for group in found] for name, found in groups.items()} == {
        "length of the HTML": ["9 to 12 characters", "13 to 20 characters", "21 to 30 characters"],
        "width of the screenshot": ["390 px", "1,280 px"],
        "what the page holds": ["a form", "a table", "none of these"],
        "source": ["two", "one"],
    }
    two = groups["source"][0]
    assert (two.pages, two.failures, two.before) == (6, 1, None) and two.now == pytest.approx(3.5 / 6)
    assert sum(group.pages for group in groups["length of the HTML"]) == 11
    assert groups_of([row_of(result("a", width=390), 1)] * 3) == [] == groups_of([])


@pytest.mark.parametrize("values", [[5], [5] * 9, [1, 2], [1, 1, 1, 9], [*range(100)], [0, 0, 7, 7, 8, 1000]])
def test_ranges_hold_every_value_once(values):
    ranges = ranges_of(values, "px")
    assert 1 <= len(ranges) <= 3
    assert [sum(low <= value <= high for _, low, high in ranges) for value in values] == [1] * len(values)


def test_the_most_missed_texts_are_counted_once_a_page(tmp_path):
    box, other = Box(0, 0, 1, 0.1, "Sign\n in"), Box(0, 0.2, 1, 0.1, "Home")
    pages = [result("a", missing=[box, box, other, Box(0, 0, 1, 1, "|")], matched=[])]
    pages += [result("b", missing=[box], matched=[(other, other)])]
    pages += [failed("c", missing=[other]), result("d", chooses=True, missing=[other])]
    html = written(tmp_path, pages)
    assert re.findall(r"<li><q>(.*?)</q> <span>(.*?)</span>", html) == [
        ("Sign in", "missed on 2 of 2 pages"), ("Home", "missed on 1 of 2 pages")]  # fmt: skip
    assert 'id="missed"' not in written(tmp_path, [result("a", missing=[])])


def test_the_loss_is_drawn_and_odd_histories_are_borne(tmp_path):
    losses = [(step, 3 - step / 1000) for step in range(1, 2001)]
    curve = curve_of(losses, "Loss")
    assert len(curve.points.split()) == len(curve.line.split()) <= 402 and curve.dots == []
    assert curve.text == "Loss: 2.999 at step 1, 1.000 at step 2,000; lowest 1.000, highest 2.999"
    assert curve_of([(1, 2.0)], "") is None and curve_of([(1, 2.0), (2, float("nan"))], "") is None
    assert "nan" not in curve_of([(3, 2.0), (3, 2.0)], "").line
    evaluations = [(0, 0.1), (50, 0.4)]
    html = written(tmp_path, sample(), training={"losses": losses, "evaluations": evaluations})
    part = html[html.index('id="training"') : html.index('id="missed"')]
    assert part.count("<svg") == 2 and "<title>step 50: 0.400</title>" in part
    assert 'id="training"' not in written(tmp_path, sample(), training={"losses": [], "evaluations": []})
