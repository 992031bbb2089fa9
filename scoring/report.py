"""Shows what the model wrote: one HTML file with every page's screenshot, render, difference, scores and text.

    from scoring.report import Box, PageResult, write_report
    page = PageResult("login", {"valid": True}, None, None, "<p>Hi", "<p>Hello</p>", [], [], [], "out of time")
    write_report(Path("evaluation/report.html"), "Evaluation", [page], {"model": "demo"})

The file needs no network, no server and, to be read, no JavaScript. Names, HTML and texts are a model's output and
count as hostile: all are escaped, and a content security policy lets only the report's own script run.

Sections: What is shown, Text, Pictures, Boxes, Card, Summary, Distribution, Comparison, Look, Behaviour, Report.
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
from html import escape
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageChops

# -----------------------------------------------------------------------------
# What is shown

SCORES = ("overall", "block", "text", "position", "color", "ssim", "tree_bleu")
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
    scores: dict[str, float | bool | None]  # SCORES in 0..1, FLAGS, and others; None is not measured
    reference: np.ndarray | Path | None
    written: np.ndarray | Path | None  # None when it could not be rendered
    html: str
    reference_html: str
    matched: list[tuple[Box, Box]]  # (in the reference, in the written page)
    missing: list[Box]  # in the reference only
    invented: list[Box]  # in the written page only
    failure: str | None = None  # why there is no render; then every one of SCORES is 0
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
        return 0.0 if self.failure is not None else self.values.get(score)


def is_flag(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not is_flag(value) and math.isfinite(value)


def in_range(value: float) -> float:
    """SSIM may lie below 0, and a sum of floats a hair above 1."""
    return min(1.0, max(0.0, float(value)))


def row_of(page: PageResult, number: int) -> Row:
    """The page's numbers; `number` counts from 1 in the order in which pages came."""
    numbers = {name: value for name, value in page.scores.items() if is_number(value)}
    values = {name: in_range(value) if name in SCORES else float(value) for name, value in numbers.items()}
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
    return safe(name.replace("_", " "))


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
    """Each score as a number with a bar; what is no score in a line below. A failed page has 0 in all of SCORES."""
    failed = page.failure is not None
    known = [name for name in SCORES if name in page.scores or (failed and name == "overall")]
    cells, others = [], []
    for name in known + [name for name in page.scores if name not in (*SCORES, *FLAGS)]:
        value = 0.0 if failed and name in SCORES else page.scores.get(name)
        share = isinstance(value, float | np.floating) and 0 <= value <= 1  # not a count, even of 1
        if is_number(value) and (name in SCORES or share):
            cells.append(f"<div><dt>{words(name)}</dt><dd>{number(value, 2)}</dd>{_bar(in_range(value))}</div>")
        elif name in SCORES:
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
    scores = {score: row.value(score) for score in (SCORES if row.failure is not None else row.values)}
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
    """The mean with each failure as 0, and the mean of the rendered pages alone."""
    values = [row.values[score] for row in rows if row.failure is None and score in row.values]
    failures = sum(row.failure is not None for row in rows)
    total = math.fsum(values)
    everything = total / (len(values) + failures) if len(values) + failures else None
    return Mean(everything, total / len(values) if values else None, len(values))


def share_of(rows: Sequence[Row], flag: str) -> tuple[int, int]:
    """(pages that have the flag, pages for which it is known); a failed page without the flag counts as known."""
    known = [row.flags.get(flag, False) for row in rows if flag in row.flags or row.failure is not None]
    return sum(known), len(known)


def scores_of(rows: Sequence[Row]) -> list[str]:
    """SCORES that a page has, in their order; then other numbers that look like scores: in 0..1, not all whole."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.values.items():
            found.setdefault(name, []).append(value)
        if row.failure is not None:
            found.setdefault("overall", [])
    others = [name for name in found if name not in SCORES and all(0 <= value <= 1 for value in found[name])]
    return [name for name in SCORES if name in found] + [name for name in others if any(v % 1 for v in found[name])]


def _tiles(rows: Sequence[Row]) -> str:
    failures = sum(row.failure is not None for row in rows)
    tiles = [("pages", f"{len(rows):,}", ""), ("failures", f"{failures:,}", percent(failures, len(rows)))]
    overall = mean_of(rows, "overall")
    if overall.with_failures is not None:
        tiles.insert(1, ("overall", number(overall.with_failures), "failures as 0"))
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
    head = "".join(f'<th scope="col">{name}</th>' for name in ("score", "failures as 0", "without them", "rendered"))
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
    summary = f"{plural(len(failed), 'failure')}, each counted as 0"
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
    """How many pages lie in each tenth of a score; failures stand apart at the foot of the first bar."""
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
    foot = f'<rect class="failed" x="0.6" y="{100 - tall:.1f}" width="8.8" height="{tall:.1f}"/>' if failed else ""
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
    label = "Difference with its interval for each score; right of 0 is better after training"
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
# Look

# Okabe and Ito's colours: told apart by colour-blind readers, and each at least 3:1 against white and against black.
STYLE = """
:root{color-scheme:light dark;--page:#f4f6f9;--card:#fff;--text:#1a2230;--muted:#566173;--line:#dce1e9;--edge:#78849a;
--accent:#0062a3;--on-accent:#fff;--soft:#e6f0f8;--track:#e5e9f0;--fill:#0072b2;--bad:#a33c00;--bad-soft:#fdeee4;
--good:#00664b;--good-soft:#e2f4ee;--matched:#0072b2;--missing:#d55e00;--invented:#cc79a7}
@media(prefers-color-scheme:dark){:root{--page:#10141a;--card:#181e27;--text:#e6eaf1;--muted:#a3aec0;--line:#2b3442;
--edge:#77849a;--accent:#7cc0f2;--on-accent:#0b1a27;--soft:#1b3245;--track:#2a3341;--fill:#56b4e9;--bad:#ffae7d;
--bad-soft:#3b2417;--good:#6fd6b4;--good-soft:#12332a}}
*{box-sizing:border-box}[hidden]{display:none!important}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}html:not(.js) .needs-js{display:none!important}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans","Liberation Sans",sans-serif;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
main,.top{max-width:100rem;margin:0 auto;padding:0 2rem}.top{padding-top:2.5rem}
h1,h2,h3{line-height:1.25;margin:0;text-wrap:balance}h1{font-size:1.85rem;letter-spacing:-.015em}
h2{font-size:1.3rem;margin-bottom:1rem}h3{font-size:1.05rem}
section{margin:3rem 0}.hint{margin:0 0 .9rem}a{color:var(--accent);text-underline-offset:.15em}p{margin:.5rem 0}
.hint,.small,small,figcaption span,summary span,.failures span{color:var(--muted)}small{font-size:.85em}
:focus-visible{outline:3px solid var(--accent);outline-offset:2px;border-radius:4px}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:1rem;padding:.5rem 1rem;background:var(--card);z-index:9}
.facts{display:flex;flex-wrap:wrap;gap:.6rem 2.2rem;margin:1.1rem 0 0}.facts dt{font-size:.8rem;color:var(--muted)}
dd{margin:0}.facts dd{font-size:.95rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:1rem;margin:0 0 1.75rem}
.tiles div,.hist,.card,.tools{background:var(--card);border:1px solid var(--line);border-radius:12px}
.tiles div{padding:.9rem 1.1rem}.tiles dt{font-size:.85rem;color:var(--muted)}
.tiles dd{font-size:1.6rem;font-weight:600;line-height:1.3}.tiles .small{font-size:.8rem;font-weight:400}
.columns{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:2.5rem;align-items:start}
.columns h3{margin:0 0 .6rem}.columns ul+h3{margin-top:1.5rem}
table{border-collapse:collapse;width:100%;font-size:.95rem}
caption{text-align:left;color:var(--muted);padding-bottom:.4rem}
th,td{padding:.45rem .75rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th{overflow-wrap:normal}th:first-child,td:first-child{text-align:left;padding-left:0}
th{font-weight:500}td{white-space:nowrap}td:last-child,th:last-child{padding-right:0}
tbody th{overflow-wrap:anywhere}thead th{color:var(--muted);font-size:.85rem;vertical-align:bottom}
.wide{overflow-x:auto}.columns~.wide{margin-top:2rem;max-width:36rem}
.bar{display:block;height:5px;border-radius:3px;background:var(--track);overflow:hidden;margin-top:.25rem}
.bar i{display:block;height:100%;background:var(--fill);border-radius:3px}.means .bar{width:9rem;margin-left:auto}
.failures{padding-left:1.1rem;margin:.5rem 0}summary{cursor:pointer;padding:.3rem 0}
button,select,input[type=search]{font:inherit;font-size:.92rem;color:inherit;background:var(--card);min-height:2.35rem;
border:1px solid var(--edge);border-radius:8px;padding:.3rem .75rem}button{cursor:pointer}
select{max-width:13rem}::placeholder{color:var(--muted);opacity:1}
button:hover:not(:disabled){background:var(--soft)}
button[aria-pressed=true]{background:var(--accent);color:var(--on-accent);border-color:var(--accent)}
.chips,.labels{display:flex;flex-wrap:wrap;gap:.5rem;list-style:none;margin:0;padding:0}
.chips button{border-radius:99px}
html:not(.js) .chips button{pointer-events:none}
.hists{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem}
.hist{margin:0;padding:.9rem 1.1rem .7rem}
figcaption{font-size:.9rem;margin-bottom:.45rem}.shots figcaption{margin:0}
.shots figcaption span{display:block}
.hist figcaption{display:flex;justify-content:space-between;gap:.8rem}
.plot{position:relative;height:5.5rem;margin-top:1.6rem;border-bottom:1px solid var(--edge)}
.plot svg{position:absolute;width:100%;height:100%;fill:var(--fill)}.plot .failed{fill:var(--missing)}
.counts span{position:absolute;width:10%;text-align:center;font-size:.72rem;color:var(--muted)}
.bins{position:absolute;inset:-1.2rem 0 0;display:grid;grid-template-columns:repeat(10,1fr)}
.bins button{min-height:0;padding:0;border:0;border-radius:4px;background:none}.bins button:disabled{cursor:default}
.bins button:hover:not(:disabled){background:color-mix(in srgb,var(--fill) 16%,transparent)}
.bins button[aria-pressed=true]{background:color-mix(in srgb,var(--fill) 22%,transparent);
box-shadow:inset 0 0 0 2px var(--accent)}
.axis{display:flex;justify-content:space-between;font-size:.75rem;color:var(--muted)}
.key{display:inline-block;width:.75rem;height:.75rem;border-radius:2px;background:var(--missing);margin-left:.6rem}
.intervals{width:100%;max-width:27rem;margin-top:2rem;font-size:12px;stroke-width:2}.intervals text{fill:var(--text)}
.intervals .tick{fill:var(--muted);text-anchor:middle;font-size:11px}.intervals circle{fill:var(--fill)}
.intervals path{stroke:var(--fill);fill:none}.intervals .zero{stroke:var(--edge);stroke-width:1;stroke-dasharray:3 3}
.tools{position:sticky;top:.5rem;z-index:3;display:flex;flex-wrap:wrap;align-items:center;gap:.6rem 1.1rem;
padding:.7rem 1rem;margin-bottom:1.25rem;box-shadow:0 4px 16px rgb(0 0 0/.07)}
.tools>div{display:flex;flex-wrap:wrap;gap:.4rem;align-items:center}
.tools label{display:flex;align-items:center;gap:.45rem}
.tools p{margin:0 0 0 auto;font-size:.92rem}.tools .find{flex:1 1 14rem}.find input{flex:1;min-width:0;width:100%}
.legend{gap:.3rem 1rem!important;font-size:.92rem}.legend input{width:1.05rem;height:1.05rem;margin:0;
accent-color:var(--accent)}.legend svg{width:1.6rem;height:1rem;flex:none}
.legend rect,.boxes rect{stroke-width:2;vector-effect:non-scaling-stroke;fill-opacity:.1}
.boxes rect{stroke-width:1.5}.matched{stroke:var(--matched);fill:var(--matched)}
.missing{stroke:var(--missing);fill:var(--missing);stroke-dasharray:5 2.5}
.invented{stroke:var(--invented);fill:var(--invented);stroke-dasharray:1.5 2}
body:has(#show-matched:not(:checked)) .boxes .matched,body:has(#show-missing:not(:checked)) .boxes .missing,
body:has(#show-invented:not(:checked)) .boxes .invented{display:none}
body:has(#compact:checked) .shot{max-height:15rem}body:has(#compact:checked) .card{--tall:300!important}
.card{padding:1.4rem 1.5rem;margin-bottom:1.5rem;scroll-margin-top:9rem;content-visibility:auto;
contain-intrinsic-height:auto calc(var(--tall)*.8px + 17rem)}
.card:focus{outline:3px solid var(--accent);outline-offset:2px}
.card header{display:flex;flex-wrap:wrap;align-items:center;gap:.5rem 1rem;margin-bottom:.9rem}
.card h3 a{color:inherit;text-decoration:none}.card h3 a:hover{text-decoration:underline}
.labels li{font-size:.8rem;padding:.1rem .65rem;border-radius:99px;border:1px solid var(--line);color:var(--muted)}
.labels .cause,.labels .bad{background:var(--bad-soft);color:var(--bad);border-color:transparent}
.labels .good{background:var(--good-soft);color:var(--good);border-color:transparent}
.failure{background:var(--bad-soft);color:var(--bad);padding:.6rem .9rem;border-radius:8px;white-space:pre-wrap}
.scores{display:grid;grid-template-columns:repeat(auto-fill,minmax(7.5rem,1fr));gap:.8rem 1.4rem;margin:0 0 1.25rem}
.scores div{display:grid;grid-template-columns:1fr auto;font-size:.9rem;align-content:start}
.scores dt{color:var(--muted)}
.scores dd{font-weight:600}.scores .bar{grid-column:1/-1}
.others{margin:-.4rem 0 1.1rem;font-size:.9rem;color:var(--muted)}
.shots{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:1.25rem;align-items:start;margin-bottom:.9rem}
figure{margin:0;min-width:0}.shots figure{display:grid;grid-row:span 2;grid-template-rows:subgrid;gap:.45rem}
.shot{position:relative;overflow:hidden;border-radius:6px;box-shadow:0 0 0 1px var(--line);background:#fff}
.shot img{display:block;width:100%;height:auto}.boxes{position:absolute;inset:0;width:100%;height:100%}
body:has(#compact:checked) .boxes{height:auto}
.boxes rect:hover,.boxes rect:focus,.boxes .lit{stroke-width:3.5;fill-opacity:.3;outline:none}
.none{margin:0;padding:2.5rem 1.2rem;border:1px dashed var(--edge);border-radius:6px;text-align:center;
color:var(--muted)}.readout{min-height:1.55em;margin:0 0 .3rem;font-size:.9rem;color:var(--muted)}
pre{margin:.4rem 0 .8rem;padding:1rem;max-height:28rem;overflow:auto;background:var(--page);border-radius:8px;
border:1px solid var(--line);font:.82rem/1.5 ui-monospace,SFMono-Regular,Consolas,"Liberation Mono",monospace;
white-space:pre-wrap;tab-size:2}code{font:inherit}kbd{font:.85em ui-monospace,monospace;padding:.05em .4em;
border:1px solid var(--edge);border-radius:4px}
@media(max-width:60rem){.columns{grid-template-columns:minmax(0,1fr);gap:1.75rem}.tools{position:static}
.card{scroll-margin-top:.75rem}}
@media(max-width:44rem){main,.top{padding:0 1rem}.top{padding-top:1.5rem}.shots{grid-template-columns:minmax(0,1fr)}
.card{padding:1.1rem 1rem;contain-intrinsic-height:auto calc(var(--tall)*2.2px + 24rem)}h1{font-size:1.5rem}
.tiles{grid-template-columns:repeat(auto-fit,minmax(6.4rem,1fr));gap:.6rem}.tiles div{padding:.7rem .8rem}
.tiles dd{font-size:1.3rem}.hists{grid-template-columns:minmax(0,1fr)}th,td{padding:.45rem .4rem}.means .bar{width:5rem}
.columns small{display:block}table{font-size:.88rem}thead th{font-size:.8rem}.tools .find{flex-basis:100%}}
@media print{.tools{display:none}.card{content-visibility:visible;break-inside:avoid}}
"""

# -----------------------------------------------------------------------------
# Behaviour

# Reads data- attributes and textContent only, and writes text by textContent: model output never becomes markup.
SCRIPT = """
"use strict";
document.documentElement.classList.add("js");
const list = document.getElementById("cards");
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const cards = all(".card").map((node, place) => ({
  node, place, failed: "failed" in node.dataset, scores: new Map(Object.entries(JSON.parse(node.dataset.scores))),
  name: node.querySelector("h3").textContent, causes: all(".cause", node).map((item) => item.textContent),
  text: all("h3, .labels li, .failure", node).map((part) => part.textContent).join(" ").toLowerCase(),
}));
const byId = (id) => document.getElementById(id);
const names = new Intl.Collator("en", {numeric: true});
const state = {order: "worst", bin: null, cause: null};

const valueOf = (card, score) => card.failed ? 0 : card.scores.get(score) ?? null;
const binOf = (value) => Math.min(9, Math.floor(value * 10));

function compare(a, b) {
  if (state.order === "name") return names.compare(a.name, b.name) || a.place - b.place;
  const x = valueOf(a, byId("score").value), y = valueOf(b, byId("score").value);
  if (x === null || y === null) return (x === null) - (y === null) || a.place - b.place;
  return (state.order === "worst" ? x - y : y - x) || a.place - b.place;
}

function passes(card) {
  const wanted = byId("find").value.trim().toLowerCase();
  if (wanted && !card.text.includes(wanted)) return false;
  if (state.cause !== null && !card.causes.includes(state.cause)) return false;
  if (state.bin === null) return true;
  const value = valueOf(card, state.bin.score);
  return value !== null && binOf(value) === state.bin.bin;
}

function sort() {
  for (const button of all("[data-order]")) button.setAttribute("aria-pressed", button.dataset.order === state.order);
  cards.sort(compare);
  list.append(...cards.map((card) => card.node));
}

function filter() {
  let count = 0;
  for (const card of cards) {
    card.node.hidden = !passes(card);
    count += !card.node.hidden;
  }
  for (const button of all("[data-bin]")) {
    const {score, bin} = button.dataset;
    button.setAttribute("aria-pressed", score === state.bin?.score && +bin === state.bin.bin);
  }
  for (const button of all("[data-cause]")) button.setAttribute("aria-pressed", button.dataset.cause === state.cause);
  const parts = [`${count} of ${cards.length} pages`];
  if (state.bin) parts.push(`${state.bin.score} ${state.bin.bin / 10} to ${(state.bin.bin + 1) / 10}`);
  if (state.cause !== null) parts.push(state.cause);
  byId("status").textContent = parts.join(" · ");
  byId("reset").hidden = count === cards.length;
}

function showAll() {
  state.bin = state.cause = null;
  byId("find").value = "";
  filter();
}

function choose(event) {
  const button = event.target.closest("button"), link = event.target.closest(".failures a");
  if (link) showAll();
  if (!button) return;
  if (button.id === "reset") { showAll(); byId("find").focus(); }
  if (button.dataset.order) { state.order = button.dataset.order; sort(); }
  if (button.dataset.bin) {
    const pressed = button.getAttribute("aria-pressed") === "true";
    state.bin = pressed ? null : {score: button.dataset.score, bin: +button.dataset.bin};
    filter();
  }
  if (button.dataset.cause !== undefined) {
    state.cause = state.cause === button.dataset.cause ? null : button.dataset.cause;
    filter();
  }
}

function step(event) {
  const forward = event.key === "j", visible = cards.filter((card) => !card.node.hidden).map((card) => card.node);
  const place = (node) => node.getBoundingClientRect(), last = visible.length - 1;
  const margin = visible.length ? parseFloat(getComputedStyle(visible[0]).scrollMarginTop) : 0;
  const at = visible.findIndex((node) => node.contains(document.activeElement));
  const seen = at >= 0 && place(visible[at]).bottom > 0 && place(visible[at]).top < innerHeight;
  const below = visible.findIndex((node) => place(node).top > margin + 8);
  const above = visible.findLastIndex((node) => place(node).top < margin - 8);
  const next = seen ? at + (forward ? 1 : -1) : forward ? (below < 0 ? last : below) : above;
  const node = visible[Math.max(0, Math.min(last, next))];
  node?.focus({preventScroll: true});
  node?.scrollIntoView({block: "start"});
}

function walk(event, items, current) {
  const to = {ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: items.length - 1}[event.key];
  if (to === undefined || !items.length) return null;
  event.preventDefault();
  return items[(to + items.length) % items.length];
}

// One stop of the Tab key for each histogram and each picture; arrow keys go on from there.
function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const bins = event.target.closest(".bins"), boxes = event.target.closest(".boxes");
  if (bins) {
    const items = all("button:enabled", bins), next = walk(event, items, items.indexOf(event.target));
    if (next) { for (const item of items) item.tabIndex = item === next ? 0 : -1; next.focus(); }
  } else if (boxes) {
    const items = all("rect", boxes).filter((item) => getComputedStyle(item).display !== "none");
    const spot = (item) => [item.y.baseVal.value, item.x.baseVal.value];
    items.sort((a, b) => spot(a)[0] - spot(b)[0] || spot(a)[1] - spot(b)[1]);
    const next = walk(event, items, items.indexOf(event.target));
    if (next) { next.setAttribute("tabindex", "-1"); next.focus({preventScroll: false}); }
  }
  const typing = event.target.matches("input:not([type=checkbox]), select");
  if (!typing && (event.key === "j" || event.key === "k")) step(event);
}

// A page that scrolls under a resting mouse fires pointerover too, and must not take the light from the keyboard.
const mouse = {x: -1, y: -1};
function rests(event) { return event.screenX === mouse.x && event.screenY === mouse.y; }

function light(event) {
  if (event.type === "pointerover" && rests(event)) return;
  const box = event.target.closest(".boxes rect"), card = event.target.closest(".card");
  for (const lit of all(".lit")) lit.classList.remove("lit");
  if (!box || !card) return;
  const pair = box.dataset.pair;
  const twins = pair === undefined ? [box] : all("rect", card).filter((item) => item.dataset.pair === pair);
  for (const twin of twins) twin.classList.add("lit");
  const [first, second] = twins.map((twin) => twin.textContent);
  const same = second === undefined || first === second;
  card.querySelector(".readout").textContent = same ? first : `${first}  →  ${second.replace(/^matched: /, "")}`;
}

if (list) {
  for (const group of all(".bins")) {
    all("button:enabled", group).forEach((item, place) => { item.tabIndex = place ? -1 : 0; });
  }
  for (const svg of all(".boxes")) svg.setAttribute("tabindex", "0");
  document.addEventListener("click", choose);
  document.addEventListener("keydown", press);
  for (const kind of ["pointerover", "focusin"]) list.addEventListener(kind, light);
  document.addEventListener("pointermove", (event) => {
    const resting = rests(event);  // a box that came under the mouse by scrolling gets the light once the mouse moves
    mouse.x = event.screenX;
    mouse.y = event.screenY;
    if (!resting && event.target.closest?.(".boxes rect:not(.lit)")) light(event);
  });
  byId("score").addEventListener("change", () => { if (state.order === "name") state.order = "worst"; sort(); });
  byId("find").addEventListener("input", filter);
  filter();
}
"""

# -----------------------------------------------------------------------------
# Report


def policy() -> str:
    """The content security policy: pictures from data URIs, the report's style, and the one script by its hash."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode("utf-8")).digest()).decode("ascii")
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
        f"<title>{safe(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#pages">To the pages</a>\n'
        f'<header class="top"><h1>{safe(title)}</h1>{table}</header>\n<main>\n'
    )


def _tools(scores: Sequence[str]) -> str:
    """Sorting, the text filter, and the legend, whose checkboxes work without a script."""
    orders = "".join(
        f'<button type="button" data-order="{order}" aria-pressed="{str(order == "worst").lower()}">{text}</button>'
        for order, text in (("worst", "Worst first"), ("best", "Best first"), ("name", "By name"))
    )
    options = "".join(f'<option value="{safe(name)}">{words(name)}</option>' for name in scores)
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
    """By the first score there is, usually overall: failures, then the lowest, then pages without it."""
    score = next(iter(scores_of(rows)), "overall")

    def key(row: Row) -> tuple:
        value = row.value(score)
        return value is None, value or 0.0, row.failure is None, row.name, row.number

    return sorted(rows, key=key)


def _write(file: BinaryIO, text: str) -> None:
    file.write(text.encode("utf-8", "replace"))


def write_report(
    path: Path, title: str, pages: Iterable[PageResult], facts: dict[str, str], comparison: dict | None = None
) -> None:
    """Writes the report to `path`, whole or not at all. Pages are taken one by one and none is kept.

    `facts` is a small table at the top; `comparison` is what `comparison_section` takes. Scores of a page that failed
    count as 0. A picture that cannot be read is said on its card. What `pages` raises goes through, and the old file
    stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    rows: list[Row] = []
    with tempfile.TemporaryFile(dir=path.parent) as cards:  # the worst comes first, and is known last
        for page in pages:
            row, start = row_of(page, len(rows) + 1), cards.tell()
            _write(cards, card(page, row))
            rows.append(replace(row, start=start, size=cards.tell() - start))
            del page, row  # before the next one is made: a page's pictures are many megabytes
        rows = worst_first(rows)
        try:
            with part.open("wb") as file:
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
                _write(file, f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
