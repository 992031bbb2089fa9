"""Shows what the model wrote: one HTML file with every page's screenshot, render, difference, scores and text.

    from scoring.report import Box, PageResult, write_report
    page = PageResult("login", {"valid": True}, None, None, "<p>Hi", "<p>Hello</p>", [], [], [], "out of time")
    write_report(Path("evaluation/report.html"), "Evaluation", [page], {"model": "demo"})

The file needs no network, no server and, to be read, no JavaScript. Names, HTML and texts are a model's output and
count as hostile: all are escaped, and a content security policy lets only the report's own script run.

Sections: What is shown, Text, Pictures, Boxes, Card, Summary, Distribution, Comparison, Report.
Needs pillow and numpy.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageChops

from scoring import metrics

# -----------------------------------------------------------------------------
# What is shown

FLAGS = ("valid", "truncated", "looping", "exact")


@dataclass(frozen=True)
class Box:
    """A text block, in shares (0..1) of its page's width and height."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class PageResult:
    """One page as it was and as the model wrote it. Pictures are (H, W, 3) uint8 or the path of a picture file."""

    name: str
    scores: dict[str, float | bool | None]  # metrics of the table, FLAGS, and others; None is not measured
    reference: np.ndarray | Path | None
    written: np.ndarray | Path | None  # None when it could not be rendered
    html: str
    reference_html: str
    matched: list[tuple[Box, Box]]  # (in the reference, in the written page)
    missing: list[Box]  # in the reference only
    invented: list[Box]  # in the written page only
    failure: str | None = None  # why there is no render; then every metric is the worst
    causes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """What is kept of a page once its card is on disk: its numbers, and where the card lies, in bytes."""

    number: int
    name: str
    values: dict[str, float]
    flags: dict[str, bool]
    failure: str | None
    causes: tuple[str, ...]
    start: int = 0
    size: int = 0

    def value(self, score: str) -> float | None:
        return worst(score) if self.failure is not None else self.values.get(score)


def is_flag(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not is_flag(value) and math.isfinite(value)


def worst(score: str) -> float:
    """What a failed page gets."""
    return metrics.entry(score).worst if score in metrics.names() else 0.0


def failures_as(scores: Iterable[str]) -> str:
    values = {worst(score) for score in scores}
    return f"failures as {values.pop():g}" if len(values) == 1 else "failures as the worst"


def in_range(value: float) -> float:
    """SSIM may lie below 0, and a sum of floats a hair above 1."""
    return min(1.0, max(0.0, float(value)))


def row_of(page: PageResult, number: int) -> Row:
    """The page's numbers; `number` counts from 1 in the order in which pages came."""
    numbers = {name: value for name, value in page.scores.items() if is_number(value)}
    values = {name: in_range(value) if name in metrics.names() else float(value) for name, value in numbers.items()}
    flags = {name: bool(value) for name, value in page.scores.items() if is_flag(value)}
    failure = None if page.failure is None else page.failure[: MAX_REASON + 1]
    return Row(number, page.name, values, flags, failure, page.causes)


# -----------------------------------------------------------------------------
# Text

MAX_HTML, MAX_REASON, MAX_LABEL, MAX_TITLE = 200_000, 2_000, 200, 300  # characters
# Control characters become their pictures, so that a reader sees what the model wrote and no parser stumbles.
UNPRINTABLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}
UNPRINTABLE |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF], 0xFFFD)


def safe(text: Any, limit: int = MAX_LABEL) -> str:
    """`text` for an element or a quoted attribute: cut, printable, escaped."""
    text = str(text)
    return escape((text if len(text) <= limit else text[: limit - 1] + "…").translate(UNPRINTABLE), quote=True)


def shown(name: str) -> str:
    return safe(name if name.strip() else "(no name)")


def words(name: str) -> str:
    """A score's label, marked where lower is better."""
    if name not in metrics.names():
        return safe(name.replace("_", " "))
    metric = metrics.entry(name)
    return safe(metric.label if metric.better == "higher" else f"{metric.label} ↓")


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def number(value: Any, digits: int = 3, sign: str = "") -> str:
    """A value for reading: numbers in plain digits, a real minus, an en dash where there is none."""
    if value is None or (isinstance(value, float | np.floating) and not math.isfinite(value)):
        return "–"
    if is_flag(value):
        return "yes" if value else "no"
    if not is_number(value):
        return safe(value)
    text = f"{value:{sign},}" if isinstance(value, int | np.integer) else f"{value:{sign},.{digits}f}"
    return text.replace("-", "−")


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"


# -----------------------------------------------------------------------------
# Pictures

WIDTH, HEIGHT, DIFFERENCE_WIDTH = 480, 1200, 320  # pixels at most
# Three pictures a page in base64: (2 x 38 KB + 12 KB) x 4/3 x 500 pages is 59 MB at most; real pages need half of it.
PICTURE_BYTES, DIFFERENCE_BYTES = 38_000, 12_000
ENCODINGS = ((70, 1), (50, 1), (30, 1), (30, 2), (30, 4))  # (WebP quality, shrunk once more by)
AMPLIFIED = 3  # so that a faint shift of colour can be seen


@dataclass(frozen=True)
class Picture:
    image: Image.Image
    page_width: int  # pixels, before shrinking
    page_height: int
    share: float  # of the page's height that is left


def _flat(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def picture_of(source: np.ndarray | Path | None) -> Picture | str:
    """The shrunk picture, cut at HEIGHT; or, in a few words, why there is none. Never raises for a bad picture."""
    if source is None:
        return "no picture"
    try:
        if isinstance(source, np.ndarray):
            height, width = source.shape[:2]
        else:
            with Image.open(source) as image:
                width, height = image.size
                source = _flat(image)
        if not width or not height:
            return "the picture is empty"
        scale = min(1.0, WIDTH / width)
        rows = min(height, math.ceil(HEIGHT / scale))
        if isinstance(source, np.ndarray):  # cut first: a page may be 16,384 pixels high
            source = Image.fromarray(np.ascontiguousarray(source[:rows])).convert("RGB")
        size = max(1, round(width * scale)), max(1, min(HEIGHT, round(rows * scale)))
        small = source.resize(size, Image.Resampling.LANCZOS, box=(0, 0, width, rows), reducing_gap=2.0)
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        return f"the picture could not be read ({type(error).__name__}: {error})"
    return Picture(small, width, height, rows / height)


def difference(a: Image.Image, b: Image.Image) -> Image.Image:
    """White where both are equal, darker the more they differ; the smaller one is padded with white."""
    size = max(a.width, b.width), max(a.height, b.height)
    sheets = [Image.new("RGB", size, "white") for _ in range(2)]
    sheets[0].paste(a)
    sheets[1].paste(b)
    red, green, blue = ImageChops.difference(*sheets).split()
    most = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    dark = most.point([255 - min(255, AMPLIFIED * value) for value in range(256)])
    width = min(DIFFERENCE_WIDTH, size[0])
    return dark.resize((width, max(1, round(size[1] * width / size[0]))), Image.Resampling.BILINEAR)


def data_uri(image: Image.Image, limit: int) -> str:
    """As WebP in base64, by the first of ENCODINGS that stays under `limit` bytes, else by the last."""
    for quality, factor in ENCODINGS:
        buffer = io.BytesIO()
        image.reduce(factor).save(buffer, "WEBP", quality=quality, method=2)
        if buffer.tell() <= limit:
            break
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def img(image: Image.Image, limit: int, alt: str) -> str:
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img src="{data_uri(image, limit)}" {size} alt="{alt}" loading="lazy" decoding="async">'


# -----------------------------------------------------------------------------
# Boxes

MAX_BOXES = 500  # drawn on one picture; the rest is counted
KINDS = {"matched": "in both", "missing": "only in the reference", "invented": "only in the written page"}


@dataclass(frozen=True)
class Drawn:
    """A box with its kind, and the pair it belongs to where it is matched."""

    kind: str
    box: Box
    pair: int | None = None


def _rect(drawn: Drawn, picture: Picture) -> str | None:
    """The SVG of one box in the picture's pixels; None where the box lies outside what is left of the page."""
    box, width, height = drawn.box, picture.image.width, picture.image.height
    if not all(map(is_number, (box.x, box.y, box.width, box.height))):
        return None
    left, right = (in_range(share) * width for share in (box.x, box.x + box.width))
    top, bottom = (min(height, in_range(share) * height / picture.share) for share in (box.y, box.y + box.height))
    if right <= left or bottom <= top:
        return None
    x, y = max(1.0, left - 1), max(1.0, top - 1)  # a pixel around, so that the line leaves small letters readable
    w, h = min(width - 1.0, right + 1) - x, min(height - 1.0, bottom + 1) - y
    place = f'x="{x:.1f}" y="{y:.1f}" width="{max(1.0, w):.1f}" height="{max(1.0, h):.1f}"'
    pair = "" if drawn.pair is None else f' data-pair="{drawn.pair}"'
    return f'<rect class="{drawn.kind}" {place}{pair}><title>{drawn.kind}: {safe(box.text, MAX_TITLE)}</title></rect>'


def overlay(boxes: Sequence[Drawn], picture: Picture, side: str) -> tuple[str, int]:
    """The SVG that lies over a picture, and how many boxes are not in it. Small boxes come last, above large ones."""
    by_size = sorted(boxes, key=lambda drawn: -(drawn.box.width * drawn.box.height))
    rects = [rect for rect in (_rect(drawn, picture) for drawn in by_size[-MAX_BOXES:]) if rect]
    if not rects:
        return "", len(boxes)
    size = f"0 0 {picture.image.width} {picture.image.height}"
    label = f"Boxes on the {side} page: {len(rects):,}. Arrow keys go from one to another"
    svg = f'<svg class="boxes" viewBox="{size}" preserveAspectRatio="none" role="group" aria-label="{label}">'
    return svg + "".join(rects) + "</svg>", len(boxes) - len(rects)


# -----------------------------------------------------------------------------
# Card


def _figure(name: str, source: Picture | str, boxes: Sequence[Drawn], alt: str) -> str:
    if isinstance(source, str):
        return f'<figure><figcaption><b>{name}</b></figcaption><p class="none">{safe(source, MAX_REASON)}</p></figure>'
    svg, absent = overlay(boxes, source, name.lower())
    notes = [f"{source.page_width:,} × {source.page_height:,}"]
    if source.share < 1:
        notes.append(f"the first {round(source.share * source.page_height):,} rows are shown")
    counts = Counter(drawn.kind for drawn in boxes)
    notes += [f"{counts[kind]:,} {kind}" for kind in KINDS if counts[kind]]
    notes += [f"{absent:,} not drawn"] if absent else []
    caption = f"<figcaption><b>{name}</b> <span>{' · '.join(notes)}</span></figcaption>"
    return f'<figure>{caption}<div class="shot">{img(source.image, PICTURE_BYTES, alt)}{svg}</div></figure>'


def _figures(page: PageResult) -> tuple[str, int]:
    """The three pictures beside each other, and the height of the tallest in pixels."""
    name = shown(page.name)
    reference, written = picture_of(page.reference), picture_of(page.written)
    if page.written is None:
        written = "no render"
    on_reference = [Drawn("matched", pair[0], place) for place, pair in enumerate(page.matched)]
    on_written = [Drawn("matched", pair[1], place) for place, pair in enumerate(page.matched)]
    parts = [
        _figure("Reference", reference, on_reference + [Drawn("missing", box) for box in page.missing],
                f"Screenshot of the reference page {name}"),
        _figure("Written", written, on_written + [Drawn("invented", box) for box in page.invented],
                f"Render of what the model wrote for {name}"),
    ]  # fmt: skip
    pictures = [picture for picture in (reference, written) if isinstance(picture, Picture)]
    if len(pictures) == 2:
        alt = f"Difference of the two for {name}: the darker, the more they differ"
        shot = img(difference(reference.image, written.image), DIFFERENCE_BYTES, alt)
        note = f"<span>dark where they differ, × {AMPLIFIED}</span>"
        parts.append(
            f"<figure><figcaption><b>Difference</b> {note}</figcaption>"
            f'<div class="shot difference">{shot}</div></figure>'
        )
    else:
        parts.append(_figure("Difference", "nothing to compare", [], ""))
    return f'<div class="shots">{"".join(parts)}</div>', max((p.image.height for p in pictures), default=200)


def _bar(value: float) -> str:
    return f'<span class="bar" aria-hidden="true"><i style="width:{100 * value:.1f}%"></i></span>'


def _scores(page: PageResult) -> str:
    """Each score as a number with a bar; what is no score in a line below. A failed page has the worst of each."""
    failed, table = page.failure is not None, [metric.name for metric in metrics.choosing_first()]
    known = [name for name in table if name in page.scores or (failed and name == metrics.CHOOSING)]
    cells, others = [], []
    for name in known + [name for name in page.scores if name not in (*table, *FLAGS)]:
        value = worst(name) if failed and name in table else page.scores.get(name)
        share = isinstance(value, float | np.floating) and 0 <= value <= 1  # not a count, even of 1
        if is_number(value) and (name in table or share):
            cells.append(f"<div><dt>{words(name)}</dt><dd>{number(value, 2)}</dd>{_bar(in_range(value))}</div>")
        elif name in table:
            cells.append(f"<div><dt>{words(name)}</dt><dd>{number(value)}</dd></div>")
        else:
            others.append(f"{words(name)} {number(value, 2)}")
    line = f'<p class="others">{" · ".join(others)}</p>' if others else ""
    return (f'<dl class="scores">{"".join(cells)}</dl>' if cells else "") + line


def _labels(page: PageResult) -> str:
    """Causes, and the flags that say something: each once, though a cause and a flag may share a name."""
    flags = {name: bool(value) for name, value in page.scores.items() if is_flag(value)}
    good = [name for name in ("valid", "exact") if flags.get(name)]
    bad = ["failed"] if page.failure is not None else []
    bad += ["not valid"] if flags.get("valid") is False else []
    causes = dict.fromkeys(str(cause) for cause in page.causes)
    said = {*causes} | ({"truncated"} if "cut off" in causes else set())
    bad += [name for name in ("truncated", "looping") if flags.get(name) and name not in said]
    items = [f'<li class="cause">{safe(cause)}</li>' for cause in causes]
    items += [
        f'<li class="{kind}">{safe(name)}</li>' for kind, names in (("bad", bad), ("good", good)) for name in names
    ]
    return f'<ul class="labels">{"".join(items)}</ul>' if items else ""


def _source(summary: str, html: str, name: str) -> str:
    size = plural(len(html), "character") if html else "empty"
    cut = f", the first {MAX_HTML:,} are shown" if len(html) > MAX_HTML else ""
    code = f'<pre tabindex="0" role="region" aria-label="{summary}, {name}"><code>{safe(html, MAX_HTML)}</code></pre>'
    return f"<details><summary>{summary} <span>{size}{cut}</span></summary>{code}</details>"


def card(page: PageResult, row: Row) -> str:
    """One page as an <article>; what sorting and filters need stands in its data- attributes."""
    name = shown(page.name)
    figures, tall = _figures(page)
    scores = {score: row.value(score) for score in (metrics.names() if row.failure is not None else row.values)}
    failed = " data-failed" if row.failure is not None else ""
    reason = f'<p class="failure"><b>Not rendered:</b> {safe(row.failure, MAX_REASON)}</p>' if failed else ""
    readout = '<p class="readout needs-js" aria-live="polite">Point at a box to read its text.</p>'
    readout = readout if page.matched or page.missing or page.invented else ""
    head = f'<h3 id="name-{row.number}"><a href="#page-{row.number}"><bdi>{name}</bdi></a></h3>{_labels(page)}'
    return (
        f'<article class="card" id="page-{row.number}" tabindex="-1" aria-labelledby="name-{row.number}"'
        f' data-scores="{safe(json.dumps(scores), MAX_HTML)}"{failed} style="--tall:{tall}">'
        f"<header>{head}</header>{reason}{_scores(page)}{figures}"
        + readout
        + _source("HTML the model wrote", page.html, name)
        + _source("HTML of the reference", page.reference_html, name)
        + "</article>\n"
    )


# -----------------------------------------------------------------------------
# Summary


@dataclass(frozen=True)
class Mean:
    """`measured` pages have this score without having failed; None where there is nothing to take a mean of."""

    with_failures: float | None
    without: float | None
    measured: int


def mean_of(rows: Sequence[Row], score: str) -> Mean:
    """The mean with each failure as the worst, and the mean of the rendered pages alone."""
    values = [row.values[score] for row in rows if row.failure is None and score in row.values]
    failures = sum(row.failure is not None for row in rows)
    total = math.fsum(values)
    everything = (total + failures * worst(score)) / (len(values) + failures) if len(values) + failures else None
    return Mean(everything, total / len(values) if values else None, len(values))


def share_of(rows: Sequence[Row], flag: str) -> tuple[int, int]:
    """(pages that have the flag, pages for which it is known); a failed page without the flag counts as known."""
    known = [row.flags.get(flag, False) for row in rows if flag in row.flags or row.failure is not None]
    return sum(known), len(known)


def scores_of(rows: Sequence[Row]) -> list[str]:
    """Metrics that a page has, the one that chooses first, then in the table's order; then other numbers that look like
    scores: in 0..1, not all whole."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.values.items():
            found.setdefault(name, []).append(value)
        if row.failure is not None:
            found.setdefault(metrics.CHOOSING, [])
    table = [metric.name for metric in metrics.choosing_first()]
    others = [name for name in found if name not in table and all(0 <= value <= 1 for value in found[name])]
    return [name for name in table if name in found] + [name for name in others if any(v % 1 for v in found[name])]


def _tiles(rows: Sequence[Row]) -> str:
    failures = sum(row.failure is not None for row in rows)
    tiles = [("pages", f"{len(rows):,}", ""), ("failures", f"{failures:,}", percent(failures, len(rows)))]
    choosing = mean_of(rows, metrics.CHOOSING)
    if choosing.with_failures is not None:
        tiles.insert(1, (words(metrics.CHOOSING), number(choosing.with_failures), failures_as([metrics.CHOOSING])))
    for flag in FLAGS:
        have, known = share_of(rows, flag)
        if known and any(flag in row.flags for row in rows):
            tiles.append((flag, percent(have, known), f"{have:,} of {known:,}"))
    cells = (f'<div><dt>{name}</dt><dd>{value}</dd><dd class="small">{note}</dd></div>' for name, value, note in tiles)
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _means(rows: Sequence[Row]) -> str:
    lines = []
    for name in scores_of(rows):
        mean = mean_of(rows, name)
        bar = _bar(mean.with_failures) if mean.with_failures is not None else ""
        lines.append(
            f'<tr><th scope="row">{words(name)}</th><td>{number(mean.with_failures)}{bar}</td>'
            f"<td>{number(mean.without)}</td><td>{mean.measured:,}</td></tr>"
        )
    if not lines:
        return "<p>No score was measured.</p>"
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("score", failures_as(scores_of(rows)), "without them", "rendered")
    )
    return (
        f'<table class="means"><caption>Mean scores</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _failures(rows: Sequence[Row]) -> str:
    failed = [row for row in rows if row.failure is not None]
    if not failed:
        return "<p>Every page was rendered.</p>"
    items = "".join(
        f'<li><a href="#page-{row.number}"><bdi>{shown(row.name)}</bdi></a> <span>{safe(row.failure)}</span></li>'
        for row in failed
    )
    summary = f"{plural(len(failed), 'failure')}, each counted as {worst(metrics.CHOOSING):g}"
    state = " open" if len(failed) <= 8 else ""
    return f'<details{state}><summary>{summary}</summary><ul class="failures">{items}</ul></details>'


def _causes(rows: Sequence[Row]) -> str:
    counts = Counter(cause for row in rows for cause in set(map(str, row.causes)))
    if not counts:
        return ""
    buttons = "".join(
        f'<li><button type="button" data-cause="{safe(cause)}" aria-pressed="false">{safe(cause)} <b>{count:,}</b>'
        "</button></li>"
        for cause, count in counts.most_common(40)
    )
    return f'<h3>Causes</h3><ul class="chips">{buttons}</ul>'


def summary(rows: Sequence[Row]) -> str:
    """Counts, means with and without failures, shares, causes, and the failures by name."""
    if not rows:
        return '<section aria-labelledby="summary"><h2 id="summary">Summary</h2><p>No page was evaluated.</p></section>'
    right = f"<div>{_causes(rows)}<h3>Failures</h3>{_failures(rows)}</div>"
    return (
        f'<section aria-labelledby="summary"><h2 id="summary">Summary</h2>{_tiles(rows)}'
        f'<div class="columns">{_means(rows)}{right}</div></section>'
    )


# -----------------------------------------------------------------------------
# Distribution

BINS = 10


def bin_of(value: float) -> int:
    """0..9 for 0..1; the last bin takes 1.0 too. The script has the same line."""
    return min(BINS - 1, int(value * BINS))


def _edges(place: int) -> str:
    return f"{place / BINS:.1f} to {(place + 1) / BINS:.1f}"


def histogram(rows: Sequence[Row], score: str) -> str:
    """How many pages lie in each tenth of a score; failures stand apart at the foot of the worst bar."""
    counts = Counter(bin_of(value) for value in (row.value(score) for row in rows) if value is not None)
    failed, most = sum(row.failure is not None for row in rows), max(counts.values())
    bars, labels, buttons = [], [], []
    for place in range(BINS):
        count = counts[place]
        tall = 100 * count / most if count else 0
        text = f"{words(score)} {_edges(place)}: {plural(count, 'page')}"
        bars.append(f'<rect x="{10 * place + 0.6:.1f}" y="{100 - tall:.1f}" width="8.8" height="{tall:.1f}"/>')
        labels.append(f'<span style="left:{10 * place}%;bottom:{tall:.1f}%">{count or ""}</span>')
        buttons.append(
            f'<button type="button" data-score="{safe(score)}" data-bin="{place}" aria-pressed="false"'
            f' aria-label="{text}" title="{text}"{"" if count else " disabled"}></button>'
        )
    tall = 100 * failed / most
    left = f"{10 * bin_of(worst(score)) + 0.6:.1f}"
    foot = f'<rect class="failed" x="{left}" y="{100 - tall:.1f}" width="8.8" height="{tall:.1f}"/>' if failed else ""
    whole = ", ".join(f"{_edges(place)}: {counts[place]}" for place in range(BINS) if counts[place])
    mean = f"mean {number(mean_of(rows, score).with_failures)}"
    label = f"Pages with {words(score)} {whole}"
    svg = f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{label}">'
    return (
        f'<figure class="hist"><figcaption><b>{words(score)}</b> <span>{mean}</span></figcaption><div class="plot">'
        f'{svg}{"".join(bars)}{foot}</svg><div class="counts" aria-hidden="true">{"".join(labels)}</div>'
        f'<div class="bins needs-js" role="group" aria-label="Filter by {words(score)}">{"".join(buttons)}</div></div>'
        '<div class="axis" aria-hidden="true"><span>0</span><span>0.5</span><span>1</span></div></figure>'
    )


def distribution(rows: Sequence[Row]) -> str:
    scores = scores_of(rows)
    if not scores:
        return ""
    key = '<span class="key failed"></span> failed' if any(row.failure is not None for row in rows) else ""
    return (
        '<section aria-labelledby="distribution"><h2 id="distribution">Distribution</h2><p class="hint">Pages in each'
        f' tenth of a score. <span class="needs-js">Choose a bar to see only its pages.</span> {key}</p>'
        f'<div class="hists">{"".join(histogram(rows, score) for score in scores)}</div></section>'
    )


# -----------------------------------------------------------------------------
# Comparison


def _p(value: Any) -> str:
    return "&lt; 0.001" if is_number(value) and value < 0.001 else number(value)


def intervals(metrics: dict[str, dict]) -> str:
    """Each difference as a dot with its interval, all on one scale around 0; "" where nothing can be drawn."""
    known = [
        (name, [float(entry[key]) for key in ("low", "difference", "high")])
        for name, entry in metrics.items()
        if all(is_number(entry.get(key)) for key in ("low", "difference", "high"))
    ]
    if not known:
        return ""
    reach = max(abs(value) for _, values in known for value in values) or 1.0
    left, middle, half, tall = 96, 226, 120, 26

    def x(value: float) -> str:
        return f"{middle + half * value / reach:.1f}"

    lines = []
    for place, (name, (low, value, high)) in enumerate(known):
        y = 14 + tall * place
        lines.append(
            f'<text x="0" y="{y + 4}">{safe(name.replace("_", " "), 15)}</text><path d="M{x(low)} {y}H{x(high)}"/>'
            f'<path d="M{x(low)} {y - 4}v8M{x(high)} {y - 4}v8"/><circle cx="{x(value)}" cy="{y}" r="4.5"/>'
        )
    bottom = tall * len(known) + 6
    axis = f'<path class="zero" d="M{middle} 2V{bottom}"/>' + "".join(
        f'<text class="tick" x="{x(value)}" y="{bottom + 14}">{number(value, 2, "+")}</text>'
        for value in (-reach, reach)
    )
    axis += f'<text class="tick" x="{middle}" y="{bottom + 14}">0</text>'
    size = f'viewBox="0 0 {left + 2 * half + 44} {bottom + 20}"'
    label = "Difference with its interval for each score; right of 0 is higher after training"
    return f'<svg class="intervals" {size} role="img" aria-label="{label}">{axis}{"".join(lines)}</svg>'


def wide(table: str, label: str) -> str:
    """A table that scrolls by itself where the window is too narrow for it."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="{label}">{table}</div>'


def _decoding(entries: Sequence[dict]) -> str:
    columns = list(dict.fromkeys(name for entry in entries for name in entry))

    def cell(name: str, value: Any) -> str:  # a setting as it was set, a score as scores are written
        return f"{value:g}" if is_number(value) and name not in ("before", "after", "difference") else number(value)

    head = "".join(f'<th scope="col">{words(name)}</th>' for name in columns)
    lines = "".join(
        f"<tr>{''.join(f'<td>{cell(name, entry.get(name))}</td>' for name in columns)}</tr>" for entry in entries
    )
    table = f"<table><caption>By decoding</caption><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return wide(table, "Scores by decoding")


def comparison_section(comparison: dict) -> str:
    """`comparison` has "metrics" {name: {before, after, difference, low, high, p}}, "decoding" [{...}], "n"."""
    metrics, decoding = comparison.get("metrics") or {}, comparison.get("decoding") or []
    lines = "".join(
        f'<tr><th scope="row">{words(name)}</th>'
        f"<td>{number(entry.get('before'))}</td><td>{number(entry.get('after'))}</td>"
        f"<td><b>{number(entry.get('difference'), 3, '+')}</b> <small>{number(entry.get('low'), 2)} to"
        f" {number(entry.get('high'), 2)}</small></td><td>{_p(entry.get('p'))}</td></tr>"
        for name, entry in metrics.items()
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("score", "before", "after", "difference", "p"))
    table = f"<table><caption>The same pages before and after training</caption><thead><tr>{head}</tr></thead>"
    pages = f"{plural(comparison['n'], 'page')}, each written by both models." if is_number(comparison.get("n")) else ""
    both = wide(f"{table}<tbody>{lines}</tbody></table>", "Scores before and after") + intervals(metrics)
    return (
        '<section aria-labelledby="comparison"><h2 id="comparison">Before and after training</h2>'
        f'<p class="hint">{pages}</p>'
        f'<div class="columns">{both}</div>'
        f"{_decoding(decoding) if decoding else ''}</section>"
    )


# -----------------------------------------------------------------------------
# Report


@cache
def part(name: str) -> str:
    """A file of this folder: the report's look or its behaviour."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def policy() -> str:
    """The content security policy: pictures from data URIs, the report's style, and the one script by its hash."""
    digest = base64.b64encode(hashlib.sha256(part("report.js").encode("utf-8")).digest()).decode("ascii")
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}';"
        " base-uri 'none'; form-action 'none'"
    )


def _head(title: str, facts: dict[str, str]) -> str:
    entries = "".join(
        f"<div><dt>{safe(name)}</dt><dd>{safe(value, MAX_REASON)}</dd></div>" for name, value in facts.items()
    )
    table = f'<dl class="facts">{entries}</dl>' if entries else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta http-equiv="Content-Security-Policy" content="{policy()}">\n'
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<link rel="icon" href="data:,">\n'
        f"<title>{safe(title)}</title>\n<style>{part('report.css')}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#pages">To the pages</a>\n'
        f'<header class="top"><h1>{safe(title)}</h1>{table}</header>\n<main>\n'
    )


def _tools(scores: Sequence[str]) -> str:
    """Sorting, the text filter, and the legend, whose checkboxes work without a script."""
    orders = "".join(
        f'<button type="button" data-order="{order}" aria-pressed="{str(order == "worst").lower()}">{text}</button>'
        for order, text in (("worst", "Worst first"), ("best", "Best first"), ("name", "By name"))
    )
    options = "".join(
        f'<option value="{safe(name)}" data-worst="{worst(name):g}">{words(name)}</option>' for name in scores
    )
    legend = "".join(
        f'<label title="{meaning}"><input type="checkbox" id="show-{kind}" checked autocomplete="off">'
        f'<svg viewBox="0 0 26 16" aria-hidden="true"><rect class="{kind}" x="2" y="2" width="22" height="12"/></svg>'
        f"{kind}</label>"
        for kind, meaning in KINDS.items()
    )
    return (
        '<noscript><p class="hint">Worst first. Sorting and filters need JavaScript.</p></noscript>'
        f'<div class="tools"><div class="needs-js" role="group" aria-label="Order">{orders}'
        f'<label>Score <select id="score" autocomplete="off">{options}</select></label>'
        "</div>"
        '<label class="find needs-js">Filter <input type="search" id="find" placeholder="name, cause or failure"'
        ' autocomplete="off"></label><button type="button" id="reset" class="needs-js" hidden>Show all</button>'
        f'<div class="legend" role="group" aria-label="Boxes">{legend}'
        '<label><input type="checkbox" id="compact" autocomplete="off">compact</label></div>'
        '<p id="status" role="status" class="needs-js"></p></div>'
    )


def worst_first(rows: Sequence[Row]) -> list[Row]:
    """By the first score there is, which is the metric that chooses: failures, then the worst, then pages without it.
    Not by `overall`: a wholly different page may reach 0.6 there by a few lucky matches."""
    score = next(iter(scores_of(rows)), metrics.CHOOSING)

    def key(row: Row) -> tuple:
        value = row.value(score)
        distance = 0.0 if value is None else abs(value - worst(score))
        return value is None, distance, row.failure is None, row.name, row.number

    return sorted(rows, key=key)


def _write(file: BinaryIO, text: str) -> None:
    file.write(text.encode("utf-8", "replace"))


def write_report(
    path: Path, title: str, pages: Iterable[PageResult], facts: dict[str, str], comparison: dict | None = None
) -> None:
    """Writes the report to `path`, whole or not at all. Pages are taken one by one and none is kept.

    `facts` is a small table at the top; `comparison` is what `comparison_section` takes. A page that failed has the
    worst scores. A picture that cannot be read is said on its card. What `pages` raises goes through, and the old file
    stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    rows: list[Row] = []
    with tempfile.TemporaryFile(dir=path.parent) as cards:  # the worst comes first, and is known last
        for page in pages:
            row, start = row_of(page, len(rows) + 1), cards.tell()
            _write(cards, card(page, row))
            rows.append(replace(row, start=start, size=cards.tell() - start))
            del page, row  # before the next one is made: a page's pictures are many megabytes
        rows = worst_first(rows)
        try:
            with unfinished.open("wb") as file:
                _write(file, _head(title, facts) + summary(rows))
                _write(file, comparison_section(comparison) if comparison else "")
                if rows:
                    _write(file, distribution(rows))
                    _write(file, '<section aria-labelledby="pages"><h2 id="pages">Pages</h2><p class="hint needs-js">')
                    _write(file, "<kbd>j</kbd> next page, <kbd>k</kbd> previous page</p>" + _tools(scores_of(rows)))
                    _write(file, '<div id="cards">\n')
                    for row in rows:
                        cards.seek(row.start)
                        file.write(cards.read(row.size))
                    _write(file, "</div></section>")
                _write(file, f"\n</main>\n<script>{part('report.js')}</script>\n</body>\n</html>\n")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
