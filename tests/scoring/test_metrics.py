"""What is measured of two pages."""

import json
import re

import numpy as np
import pytest

import page_scores
from scoring import metrics
from scoring.blocks import Block, Page
from scoring.metrics import Compared, Metric, color_likeness, likeness, overall
from scoring.proof import ScorerError, prove, score

SOME = [Block(text, 0.1, 0.2 * n, 0.3, 0.1, (0.0, 0.0, 0.0)) for n, text in enumerate(("home", "price", "news"))]


def test_colours_differ_by_ciede2000():
    pairs = [((0, 0, 0), (0, 0, 0)), ((255, 255, 255), (0, 0, 0)), ((50, 100, 150), (50, 100, 160))]
    same, opposite, near = color_likeness(pairs)
    assert same == 1 and opposite == pytest.approx(0, abs=1e-6) and 0.95 < near < 1


def test_without_a_match_all_four_are_0(renderer):
    for one, two in (([], []), ([], SOME), (SOME, [])):
        white = np.full((64, 64, 3), 255, np.uint8)
        pair = Compared(*(Page(white, tuple(texts), texts=tuple(texts)) for texts in (two, one)))
        assert pair.of_blocks == (0, 0, 0, 0) and overall(pair) == 0
        assert likeness(pair) == (0 if one or two else 1), "without any text pictures are all there is to compare"
    outside = "<!DOCTYPE html><html><body>No element of texts</body></html>"
    nothing = score(outside, "", renderer)
    assert nothing["overall"] == nothing["likeness"] == 0 and nothing.causes == ("blank",)


# -----------------------------------------------------------------------------
# The table


PAGE = "<!DOCTYPE html>\n<html><body>{}</body></html>\n"


def excess(pair: Compared) -> float:
    """The share of the written page's texts that the reference does not have."""
    return len(pair.matching.invented) / max(1, len(pair.prediction.blocks))


@pytest.fixture
def a_metric_more(monkeypatch) -> None:
    more = Metric("excess_text", "Excess", excess, better="lower")
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, more))


def folders(tmp_path, predictions: dict[str, str]) -> list[str]:
    for folder in ("references", "predictions"):
        (tmp_path / folder).mkdir()
    for name, body in predictions.items():
        (tmp_path / "references" / f"{name}.html").write_text(PAGE.format("<p>Hello there</p>"))
        (tmp_path / "predictions" / f"{name}.html").write_text(PAGE.format(body))
    (tmp_path / "references" / "unwritten.html").write_text(PAGE.format("<p>Hello there</p>"))
    return [str(tmp_path / "references"), str(tmp_path / "predictions")]


@pytest.mark.slow
def test_a_metric_added_to_the_table_is_in_json_console_and_report(a_metric_more, renderer, tmp_path, capsys):
    both = folders(tmp_path, {"same": "<p>Hello there</p>", "more": "<p>Hello there</p><p>XYZ</p>"})
    out = [str(tmp_path / name) for name in ("scores.json", "report.html")]
    assert page_scores.main([*both, "--json", out[0], "--report", out[1]]) == 0
    found = json.loads((tmp_path / "scores.json").read_text())
    rows = {row["page"]: row for row in found["pages"]}
    assert {name: row["excess_text"] for name, row in rows.items()} == {"same": 0, "more": 0.5, "unwritten": 1}
    assert found["summary"]["excess_text"] == 0.5 and found["summary"]["excess_text_without_failures"] == 0.25
    line = " ".join(capsys.readouterr().err.split())
    assert "3 pages, 100.0 % valid" not in line and "1 failure, counted as the worst: block " in line
    assert ", Excess 0.500; without them: " in line and ", Excess 0.250; failed: unwritten" in line
    report = (tmp_path / "report.html").read_text()
    assert re.search(r'<th scope="row">Excess ↓</th><td>0.500', report), "its mean"
    assert '<option value="excess_text" data-worst="1">Excess ↓</option>' in report, "sorting by it"
    assert "Pages with Excess ↓ 0.0 to 0.1: 1, 0.5 to 0.6: 1, 0.9 to 1.0: 1" in report, "its distribution"
    assert report.count("<dt>Excess ↓</dt>") == 3, "each page's own"


@pytest.mark.slow
def test_another_metric_may_choose(a_metric_more, renderer, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "CHOOSING", "excess_text")
    assert metrics.is_better(0.2, than=0.3) and not metrics.is_better(0.3, than=0.2)
    assert [metric.name for metric in metrics.choosing_first()][:2] == ["excess_text", "block"]
    both = folders(tmp_path, {"same": "<p>Hello there</p>", "more": "<p>Hello there</p><p>XYZ</p>", "none": ""})
    assert page_scores.main([*both, "--report", str(tmp_path / "report.html")]) == 0
    report = (tmp_path / "report.html").read_text()
    assert re.findall("<bdi>(.*?)</bdi></a></h3>", report) == ["unwritten", "more", "none", "same"]
    assert re.findall(r'<dt>(.*?)</dt><dd>(.*?)</dd><dd class="small">(.*?)</dd>', report)[1] == (
        "Excess ↓", "0.375", "failures as 1")  # fmt: skip


def test_a_metric_that_cannot_be_measured_is_left_out(renderer, monkeypatch):
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, Metric("never", "Never", lambda pair: None)))
    found = score(PAGE.format("<p>A</p>"), PAGE.format("<p>A</p>"), renderer)
    assert "never" not in found.as_json() and found["likeness"] == 1


def test_the_table_is_what_the_command_line_prints(renderer):
    """Keys and their order are an interface."""
    found = score(PAGE.format("<p>A</p>"), PAGE.format("<p>A</p>"), renderer).as_json()
    table = "block text position color overall likeness tree_bleu ssim".split()
    counts = ["blocks_reference", "blocks_prediction", "texts_reference", "texts_prediction", "words_in_blocks"]
    assert [*found] == [*table, "valid", *counts, "failure", "reference_failed", "causes"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("ssim", "named ssim: the name is taken"), ("valid", "named valid"), ("failures", "named failures")],
)
def test_a_name_that_would_hide_other_scores_is_refused_before_any_page(name, words, monkeypatch, renderer):
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, Metric(name, "Mine", lambda pair: 1.0)))
    with pytest.raises(ScorerError, match=words):
        prove(renderer)


def test_a_metric_that_chooses_and_is_not_there_is_refused(monkeypatch, renderer):
    monkeypatch.setattr(metrics, "CHOOSING", "likenes")
    with pytest.raises(ScorerError, match="CHOOSING is 'likenes', which is not in the table; it has block, text"):
        prove(renderer)


def test_what_is_no_number_is_an_error_that_names_the_metric():
    pair = Compared(Page(None), Page(None))
    with pytest.raises(ValueError, match="the metric mine gives nan"):
        metrics.measure(Metric("mine", "Mine", lambda pair: float("nan")), pair)
    assert type(metrics.measure(Metric("mine", "Mine", lambda pair: np.float32(0.5)), pair)) is float
