"""Shows what the model wrote: one HTML file with every page's screenshot, render, difference, scores and text.

    from scoring.report import Box, PageResult, write_report
    page = PageResult("login", {"valid": True}, None, None, "<p>Hi", "<p>Hello</p>", [], [], [], "out of time")
    write_report(Path("evaluation/report.html"), "Evaluation", [page], {"model": "demo"})

The file needs no network, no server and, to be read, no JavaScript. Names, HTML and texts are a model's output and
count as hostile: all are escaped, and a content security policy lets only the report's own script run. The HTML is in
report.html and report_card.html, the look in report.css, the behaviour in report.js; here is what they show.

Sections: What is shown, Text, Pictures, Boxes, Card, Summary, Distribution, Comparison, Report.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image, ImageChops

from scoring import metrics

# -----------------------------------------------------------------------------
# What is shown

FLAGS = ("valid", "truncated", "looping", "exact")
CHOSE = "chose the weights"


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
    chooses: bool = False  # it chose the weights that wrote it: shown, and left out of every mean
    reference_failed: bool = False  # which says nothing of what was written: shown, and left out of every mean


@dataclass(frozen=True)
class Row:
    """What is kept of a page once its card is on disk: its numbers, and where the card lies, in bytes."""

    number: int
    name: str
    values: dict[str, float]
    flags: dict[str, bool]
    failure: str | None
    causes: tuple[str, ...]
    chooses: bool = False
    left_out: bool = False
    start: int = 0
    size: int = 0

    def value(self, score: str) -> float | None:
        """The worst for a page that failed; None where it was not measured."""
        return worst(score) if self.failure is not None else self.values.get(score)


def is_flag(value: Any) -> bool:
    """Yes or no, Python's or numpy's."""
    return isinstance(value, bool | np.bool_)


def is_number(value: Any) -> bool:
    """A finite number that is no flag."""
    return isinstance(value, int | float | np.number) and not is_flag(value) and math.isfinite(value)


def worst(score: str) -> float:
    """What a failed page gets."""
    return metrics.entry(score).worst if score in metrics.names() else 0.0


def in_range(value: float) -> float:
    """SSIM may lie below 0, and a sum of floats a hair above 1."""
    return min(1.0, max(0.0, float(value)))


def row_of(page: PageResult, number: int) -> Row:
    """The page's numbers; `number` counts from 1 in the order in which pages came."""
    numbers = {name: value for name, value in page.scores.items() if is_number(value)}
    values = {name: in_range(value) if name in metrics.names() else float(value) for name, value in numbers.items()}
    flags = {name: bool(value) for name, value in page.scores.items() if is_flag(value)}
    failure = None if page.failure is None else page.failure[: MAX_REASON + 1]
    return Row(number, page.name, values, flags, failure, page.causes, page.chooses, page.reference_failed)


# -----------------------------------------------------------------------------
# Text

MAX_HTML, MAX_REASON, MAX_LABEL, MAX_TITLE = 200_000, 2_000, 200, 300  # characters
# Control characters become their pictures, so that a reader sees what the model wrote and no parser stumbles.
UNPRINTABLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}
UNPRINTABLE |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF], 0xFFFD)


def printable(value: Any) -> Any:
    """What the templates show, which they escape: markup of theirs as it is, anything else as text that can be read."""
    if callable(value) and not isinstance(value, jinja2.Undefined):  # a dict's `items`, say, for an entry of that name
        raise TypeError(f"a template shows {value!r}")
    return value if isinstance(value, Markup) else str(value).translate(UNPRINTABLE)


def cut(text: Any, limit: int = MAX_LABEL) -> str:
    """At most `limit` characters; what is cut ends in an ellipsis. Escaping is the templates'."""
    text = str(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def page_name(name: str) -> str:
    """Something to click on in any case."""
    return cut(name if name.strip() else "(no name)")


def label(name: str) -> str:
    """A score's label, marked where lower is better."""
    if name not in metrics.names():
        return cut(name.replace("_", " "))
    metric = metrics.entry(name)
    return metric.label if metric.better == "higher" else f"{metric.label} ↓"


def plural(count: int, noun: str) -> str:
    """ "1 page", "1,200 pages"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def number(value: Any, digits: int = 3, sign: str = "") -> str:
    """A value for reading: numbers in plain digits, a real minus, an en dash where there is none."""
    if value is None or (isinstance(value, float | np.floating) and not math.isfinite(value)):
        return "–"
    if is_flag(value):
        return "yes" if value else "no"
    if not is_number(value):
        return cut(value)
    text = f"{value:{sign},}" if isinstance(value, int | np.integer) else f"{value:{sign},.{digits}f}"
    return text.replace("-", "−")


def p_value(value: Any) -> str:
    """Below what 10,000 draws can tell, no digits."""
    return "< 0.001" if is_number(value) and value < 0.001 else number(value)


def percent(part: int, whole: int) -> str:
    """A whole percentage, a dash of nothing."""
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
    """A page's picture, shrunk, and how much of the page it shows."""

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


@dataclass(frozen=True)
class Shown:
    """A picture as the template shows it: its data URI, pixels, and what to say to who does not see it."""

    source: str
    width: int
    height: int
    text: str


def shown(image: Image.Image, limit: int, text: str) -> Shown:
    """The picture as WebP of `limit` bytes where that can be reached; `text` is for who does not see it."""
    return Shown(data_uri(image, limit), image.width, image.height, text)


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


@dataclass(frozen=True)
class Rect:
    """A box in the pixels of its picture."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    text: str
    pair: int | None


def rect_of(drawn: Drawn, picture: Picture) -> Rect | None:
    """None where the box lies outside what is left of the page."""
    box, width, height = drawn.box, picture.image.width, picture.image.height
    if not all(map(is_number, (box.x, box.y, box.width, box.height))):
        return None
    left, right = (in_range(share) * width for share in (box.x, box.x + box.width))
    top, bottom = (min(height, in_range(share) * height / picture.share) for share in (box.y, box.y + box.height))
    if right <= left or bottom <= top:
        return None
    x, y = max(1.0, left - 1), max(1.0, top - 1)  # a pixel around, so that the line leaves small letters readable
    w, h = min(width - 1.0, right + 1) - x, min(height - 1.0, bottom + 1) - y
    return Rect(drawn.kind, x, y, max(1.0, w), max(1.0, h), cut(box.text, MAX_TITLE), drawn.pair)


def rects_of(boxes: Sequence[Drawn], picture: Picture) -> list[Rect]:
    """The largest MAX_BOXES that are in the picture. Small boxes come last, above large ones."""
    by_size = sorted(boxes, key=lambda drawn: -(drawn.box.width * drawn.box.height))
    return [rect for rect in (rect_of(drawn, picture) for drawn in by_size[-MAX_BOXES:]) if rect]


# -----------------------------------------------------------------------------
# Card


@dataclass(frozen=True)
class Figure:
    """One of a card's three pictures, with its boxes; or why it is absent."""

    name: str
    notes: Sequence[str] = ()
    picture: Shown | None = None
    rects: Sequence[Rect] = ()
    absent: str = ""


def figure_of(name: str, source: Picture | str, boxes: Sequence[Drawn], text: str) -> Figure:
    """A picture with its boxes and notes on its size in pixels; `source` in words says why there is none."""
    if isinstance(source, str):
        return Figure(name, absent=cut(source, MAX_REASON))
    rects = rects_of(boxes, source)
    notes = [f"{source.page_width:,} × {source.page_height:,}"]
    if source.share < 1:
        notes.append(f"the first {round(source.share * source.page_height):,} rows are shown")
    counts = Counter(drawn.kind for drawn in boxes)
    notes += [f"{counts[kind]:,} {kind}" for kind in KINDS if counts[kind]]
    notes += [f"{len(boxes) - len(rects):,} not drawn"] if len(rects) < len(boxes) else []
    return Figure(name, notes, shown(source.image, PICTURE_BYTES, text), rects)


def figures_of(page: PageResult) -> tuple[list[Figure], int]:
    """Reference, written page and their difference, and the height of the tallest in pixels."""
    name = page_name(page.name)
    reference, written = picture_of(page.reference), picture_of(page.written)
    if page.written is None:
        written = "no render"
    on_reference = [Drawn("matched", pair[0], index) for index, pair in enumerate(page.matched)]
    on_reference += [Drawn("missing", box) for box in page.missing]
    on_written = [Drawn("matched", pair[1], index) for index, pair in enumerate(page.matched)]
    on_written += [Drawn("invented", box) for box in page.invented]
    figures = [
        figure_of("Reference", reference, on_reference, f"Screenshot of the reference page {name}"),
        figure_of("Written", written, on_written, f"Render of what the model wrote for {name}"),
    ]
    pictures = [picture for picture in (reference, written) if isinstance(picture, Picture)]
    if len(pictures) == 2:
        text = f"Difference of the two for {name}: the darker, the more they differ"
        picture = shown(difference(reference.image, written.image), DIFFERENCE_BYTES, text)
        figures.append(Figure("Difference", [f"dark where they differ, × {AMPLIFIED}"], picture))
    else:
        figures.append(Figure("Difference", absent="nothing to compare"))
    return figures, max((picture.image.height for picture in pictures), default=200)


@dataclass(frozen=True)
class ScoreShown:
    """A score on a card."""

    name: str
    text: str
    share: float | None  # of the bar; None without one


def scores_shown(page: PageResult) -> tuple[list[ScoreShown], list[tuple[str, Any]]]:
    """Each score as a number with a bar, and (name, value) of what is no score. A failed page has the worst of each."""
    failed, table = page.failure is not None, [metric.name for metric in metrics.choosing_first()]
    known = [name for name in table if name in page.scores or (failed and name == metrics.CHOOSING)]
    scores, others = [], []
    for name in known + [name for name in page.scores if name not in (*table, *FLAGS)]:
        value = worst(name) if failed and name in table else page.scores.get(name)
        share = isinstance(value, float | np.floating) and 0 <= value <= 1  # not a count, even of 1
        if is_number(value) and (name in table or share):
            scores.append(ScoreShown(name, number(value, 2), in_range(value)))
        elif name in table:
            scores.append(ScoreShown(name, number(value), None))
        else:
            others.append((name, value))
    return scores, others


def labels_of(page: PageResult) -> list[tuple[str, str]]:
    """(kind, text) of causes, and of the flags that say something: each once, though both may share a name; and whether
    the page chose the weights."""
    flags = {name: bool(value) for name, value in page.scores.items() if is_flag(value)}
    good = [name for name in ("valid", "exact") if flags.get(name)]
    bad = ["failed"] if page.failure is not None else []
    bad += ["not valid"] if flags.get("valid") is False else []
    causes = dict.fromkeys(str(cause) for cause in page.causes)
    said = {*causes} | ({"truncated"} if "cut off" in causes else set())
    bad += [name for name in ("truncated", "looping") if flags.get(name) and name not in said]
    groups = (("cause", causes), ("bad", bad), ("good", good), ("chooses", [CHOSE] * page.chooses))
    return [(kind, cut(text)) for kind, texts in groups for text in texts]


@dataclass(frozen=True)
class Source:
    """A page's HTML, cut, and what is said of its size."""

    html: str
    size: str


def source_of(html: str) -> Source:
    """The first MAX_HTML characters, and how many there are."""
    size = plural(len(html), "character") if html else "empty"
    more = f", the first {MAX_HTML:,} are shown" if len(html) > MAX_HTML else ""
    return Source(cut(html, MAX_HTML), size + more)


@dataclass(frozen=True)
class Card:
    """What report_card.html shows of a page."""

    number: int
    name: str
    values: str  # each score, as JSON: what sorting and filters need
    failure: str | None
    chooses: bool
    tall: int  # of the tallest picture, pixels
    labels: list[tuple[str, str]]
    scores: list[ScoreShown]
    others: list[tuple[str, Any]]
    figures: list[Figure]
    has_boxes: bool
    html: Source
    reference_html: Source


def card(page: PageResult, row: Row) -> str:
    """One page as an <article>."""
    figures, tall = figures_of(page)
    scores, others = scores_shown(page)
    values = {score: row.value(score) for score in (metrics.names() if row.failure is not None else row.values)}
    view = Card(
        number=row.number,
        name=page_name(page.name),
        values=json.dumps(values),
        failure=None if row.failure is None else cut(row.failure, MAX_REASON),
        chooses=row.chooses,
        tall=tall,
        labels=labels_of(page),
        scores=scores,
        others=others,
        figures=figures,
        has_boxes=bool(page.matched or page.missing or page.invented),
        html=source_of(page.html),
        reference_html=source_of(page.reference_html),
    )
    return templates().get_template("report_card.html").module.card(view)


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


@dataclass(frozen=True)
class Tile:
    """A large number at the top."""

    name: str
    value: str
    note: str


def tiles_of(rows: Sequence[Row]) -> list[Tile]:
    """Pages, the mean of the metric that chooses, failures, and each flag's share, where any page has the flag."""
    failures = sum(row.failure is not None for row in rows)
    tiles = [Tile("pages", f"{len(rows):,}", ""), Tile("failures", f"{failures:,}", percent(failures, len(rows)))]
    choosing = mean_of(rows, metrics.CHOOSING).with_failures
    if choosing is not None:
        note = f"failures as {worst(metrics.CHOOSING):g}"
        tiles.insert(1, Tile(label(metrics.CHOOSING), number(choosing), note))
    for flag in FLAGS:
        have, known = share_of(rows, flag)
        if known and any(flag in row.flags for row in rows):
            tiles.append(Tile(flag, percent(have, known), f"{have:,} of {known:,}"))
    return tiles


def counted(rows: Sequence[Row]) -> list[Row]:
    """The pages that numbers are taken over: the best of several weights is too good by chance on those that chose, and
    a reference that cannot be rendered says nothing of what was written."""
    return [row for row in rows if not row.chooses and not row.left_out]


def chose_words(rows: Sequence[Row]) -> str:
    """A sentence on the pages that chose the weights; "" where none did."""
    choosing = len(rows) - len(counted(rows))
    if not choosing:
        return ""
    verb = "it is shown below, and left" if choosing == 1 else "they are shown below, and left"
    return f"{choosing:,} of {plural(len(rows), 'page')} {CHOSE}: {verb} out of tiles, means and distributions."


def summary(rows: Sequence[Row], scores: Sequence[str]) -> dict[str, Any]:
    """Counts, means of `scores` with and without failures, causes, and the failures by name, as report.html calls them.

    Causes and failures lead to pages, so that they are those of all pages; numbers leave out those that chose.
    """
    compared = counted(rows)
    causes = Counter(cause for row in rows for cause in set(map(str, row.causes)))
    return {
        "chose": chose_words(rows),
        "tiles": tiles_of(compared),
        "means": {name: mean_of(compared, name) for name in scores},
        "failures_as": f"failures as {metrics.worst_words(scores)}",
        "causes": [(cut(cause), count) for cause, count in causes.most_common(40)],
        "failed": [row for row in rows if row.failure is not None],
        "failed_and_chose": sum(row.failure is not None and row.chooses for row in rows),
        "worst": f"{worst(metrics.CHOOSING):g}",
    }


# -----------------------------------------------------------------------------
# Distribution

BINS = 10


def bin_of(value: float) -> int:
    """0..9 for 0..1; the last bin takes 1.0 too. The script has the same line."""
    return min(BINS - 1, int(value * BINS))


def edges(index: int) -> str:
    """The bounds of a bin: "0.3 to 0.4"."""
    return f"{index / BINS:.1f} to {(index + 1) / BINS:.1f}"


@dataclass(frozen=True)
class Bin:
    """A bar of a histogram, in percent of its picture."""

    x: float
    height: float
    count: int
    text: str


@dataclass(frozen=True)
class Histogram:
    """The distribution of a score; `text` says it to who does not see it."""

    name: str
    text: str
    mean: float | None  # failures as the worst
    bins: Sequence[Bin]
    failed: Bin | None


def histogram(rows: Sequence[Row], score: str) -> Histogram:
    """How many pages lie in each tenth of a score; failures stand apart at the foot of the worst bar."""
    counts = Counter(bin_of(value) for value in (row.value(score) for row in rows) if value is not None)
    most = max(counts.values())

    def bar(index: int, count: int) -> Bin:
        text = f"{label(score)} {edges(index)}: {plural(count, 'page')}"
        return Bin(10 * index + 0.6, 100 * count / most, count, text)

    failed = sum(row.failure is not None for row in rows)
    whole = ", ".join(f"{edges(index)}: {counts[index]}" for index in range(BINS) if counts[index])
    return Histogram(
        name=score,
        text=f"{label(score)} {whole}",
        mean=mean_of(rows, score).with_failures,
        bins=[bar(index, counts[index]) for index in range(BINS)],
        failed=bar(bin_of(worst(score)), failed) if failed else None,
    )


# -----------------------------------------------------------------------------
# Comparison


@dataclass(frozen=True)
class Interval:
    """A difference as a dot with its interval; x and y in pixels."""

    label: str
    y: int
    low: str
    middle: str
    high: str


@dataclass(frozen=True)
class Intervals:
    """The picture of all differences, in pixels; `zero` is where no difference lies."""

    width: int
    height: int
    zero: int
    ticks: Sequence[tuple[str, str]]  # (x, value)
    lines: Sequence[Interval]


def intervals(found: Mapping[str, Mapping[str, Any]]) -> Intervals | None:
    """Each difference with its interval, all on one scale around 0; None where nothing can be drawn."""
    known = [
        (name, [float(entry[key]) for key in ("low", "difference", "high")])
        for name, entry in found.items()
        if all(is_number(entry.get(key)) for key in ("low", "difference", "high"))
    ]
    if not known:
        return None
    reach = max(abs(value) for _, values in known for value in values) or 1.0
    left, middle, half, tall = 96, 226, 120, 26

    def x(value: float) -> str:
        return f"{middle + half * value / reach:.1f}"

    lines = [
        Interval(cut(label(name), 15), 14 + tall * index, *map(x, values)) for index, (name, values) in enumerate(known)
    ]
    ticks = [(x(value), number(value, 2, "+")) for value in (-reach, reach)] + [(str(middle), "0")]
    return Intervals(left + 2 * half + 44, tall * len(known) + 6, middle, ticks, lines)


def comparison_view(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """`comparison` has "metrics" {name: {before, after, difference, low, high, p}}, "decoding" [{...}], "n", and
    "apart", False where the pages that are compared chose the weights, too."""
    found, decoding = comparison.get("metrics") or {}, comparison.get("decoding") or []
    keys = ("before", "after", "difference", "low", "high", "p")
    columns = list(dict.fromkeys(name for entry in decoding for name in entry))

    def cell(name: str, value: Any) -> str:  # a setting as it was set, a score as scores are written
        return f"{value:g}" if is_number(value) and name not in ("before", "after", "difference") else number(value)

    pages = f"{plural(comparison['n'], 'page')}, each written by both models." if is_number(comparison.get("n")) else ""
    return {
        "pages": pages,
        "apart": comparison.get("apart", True),
        "metrics": [(name, {key: entry.get(key) for key in keys}) for name, entry in found.items()],
        "intervals": intervals(found),
        "columns": columns,
        "decoding": [[cell(name, entry.get(name)) for name in columns] for entry in decoding],
    }


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


@cache
def templates() -> jinja2.Environment:
    """The report's HTML: every value is made printable and escaped, whatever a template forgets."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cut": cut, "label": label, "page_name": page_name}
    environment.filters |= {"number": number, "p_value": p_value, "plural": plural}
    return environment


def worst_first(rows: Sequence[Row]) -> list[Row]:
    """By the first score there is, which is the metric that chooses: failures, then the worst, then pages without it.
    Not by `overall`: a wholly different page may reach 0.6 there by a few lucky matches."""
    score = next(iter(scores_of(rows)), metrics.CHOOSING)

    def key(row: Row) -> tuple:
        value = row.value(score)
        distance = 0.0 if value is None else abs(value - worst(score))
        return value is None, distance, row.failure is None, row.name, row.number

    return sorted(rows, key=key)


def pieces_of(
    title: str,
    facts: Mapping[str, Any],
    rows: Sequence[Row],
    comparison: Mapping[str, Any] | None,
    card_of: Callable[[Row], Markup],
) -> Iterator[str]:
    """The report's HTML, piece by piece: with hundreds of pages it is too large to be held at once."""
    scores, compared = scores_of(rows), counted(rows)
    measured = [score for score in scores if any(row.value(score) is not None for row in compared)]
    return (
        templates()
        .get_template("report.html")
        .generate(
            policy=policy(),
            style=Markup(part("report.css")),
            script=Markup(part("report.js")),
            title=cut(title),
            facts=[(cut(name), cut(value, MAX_REASON)) for name, value in facts.items()],
            rows=rows,
            comparison=comparison_view(comparison) if comparison else None,
            histograms=[histogram(compared, score) for score in measured],
            scores=[{"name": name, "worst": f"{worst(name):g}"} for name in scores],
            kinds=KINDS,
            card_of=card_of,
            **summary(rows, measured),
        )
    )


def write_report(
    path: Path,
    title: str,
    pages: Iterable[PageResult],
    facts: Mapping[str, Any],
    comparison: Mapping[str, Any] | None = None,
) -> None:
    """Writes the report to `path`, whole or not at all. Pages are taken one by one and none is kept.

    `facts` is a small table at the top; `comparison` is what `comparison_view` takes. A page that failed has the worst
    scores; one that chose the weights is shown, and is in no tile, mean or distribution. A picture that cannot be read
    is said on its card. What `pages` raises goes through, and the old file stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    rows: list[Row] = []
    with tempfile.TemporaryFile(dir=path.parent) as cards:  # the worst comes first, and is known last
        for page in pages:
            row, start = row_of(page, len(rows) + 1), cards.tell()
            cards.write(card(page, row).encode("utf-8", "replace"))
            rows.append(replace(row, start=start, size=cards.tell() - start))
            del page, row  # before the next one is made: a page's pictures are many megabytes

        def card_of(row: Row) -> Markup:
            cards.seek(row.start)
            return Markup(cards.read(row.size).decode("utf-8"))  # escaped when it was made

        try:
            with unfinished.open("wb") as file:
                for piece in pieces_of(title, facts, worst_first(rows), comparison, card_of):
                    file.write(piece.encode("utf-8", "replace"))
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
