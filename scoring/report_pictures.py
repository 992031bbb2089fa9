"""The pictures of a report: shrunk, encoded, with the boxes of their texts, and where two differ.

    figures, tallest = figures_of(page, DETAILS[0])
    figures[0].picture.source                     # a data URI

Sections: Pictures, Boxes, Figures.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from scoring import metrics
from scoring.report_values import MAX_REASON, MAX_TITLE, Box, PageResult, Row, cut, in_range, is_number, page_name

# -----------------------------------------------------------------------------
# Pictures


@dataclass(frozen=True)
class Detail:
    """How large the pictures of a report are, at most: pixels, and bytes of each."""

    pages: int  # of a report that can be so detailed
    width: int
    height: int
    picture_bytes: int
    difference_bytes: int
    before_html: int  # characters of what was written before training


# Four pictures a page in base64. A few pages are worth looking at closely: (3 x 120 KB + 12 KB) x 4/3 x 40 pages is
# 20 MB at most; of many, (3 x 28 KB + 8 KB) x 4/3 x 500 pages is 61 MB. Real pages need less than half of it.
DETAILS = (Detail(60, 1280, 4000, 120_000, 12_000, 200_000), Detail(150, 800, 2500, 60_000, 12_000, 20_000))
MANY_PAGES = Detail(500, 560, 1600, 28_000, 8_000, 2_000)
DIFFERENCE_WIDTH = 320  # pixels
ENCODINGS = ((70, 1), (50, 1), (30, 1), (30, 2), (30, 4))  # (WebP quality, shrunk once more by)
AMPLIFIED = 3  # so that a faint shift of colour can be seen


@dataclass(frozen=True)
class Picture:
    """A page's picture, shrunk, and how much of the page it shows."""

    image: Image.Image
    page_width: int  # pixels, before shrinking
    page_height: int
    share: float  # of the page's height that is left


def detail_for(pages: int | None) -> Detail:
    """By how many pages a report has; None where nobody knows."""
    return next((detail for detail in DETAILS if pages is not None and pages <= detail.pages), MANY_PAGES)


def _flat(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def picture_of(source: np.ndarray | Path | None, detail: Detail = MANY_PAGES) -> Picture | str:
    """The shrunk picture, cut at the detail's height; or, in a few words, why there is none, whatever is wrong."""
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
        scale = min(1.0, detail.width / width)
        rows = min(height, math.ceil(detail.height / scale))
        if isinstance(source, np.ndarray):  # cut first: a page may be 16,384 pixels high
            source = Image.fromarray(np.ascontiguousarray(source[:rows])).convert("RGB")
        size = max(1, round(width * scale)), max(1, min(detail.height, round(rows * scale)))
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
# Figures

COLUMN = 400  # pixels, about the width in which a card shows a picture


@dataclass(frozen=True)
class Figure:
    """One of a card's pictures, with its boxes; or why it is absent."""

    name: str
    notes: Sequence[str] = ()
    picture: Shown | None = None
    rects: Sequence[Rect] = ()
    absent: str = ""
    likeness: float | None = None  # of what is shown, by the metric that chooses


def figure_of(
    name: str,
    source: Picture | str,
    boxes: Sequence[Drawn],
    text: str,
    limit: int = MANY_PAGES.picture_bytes,
    likeness: float | None = None,
) -> Figure:
    """A picture with its boxes and notes on its size in pixels; `source` in words says why there is none."""
    if isinstance(source, str):
        return Figure(name, absent=cut(source, MAX_REASON), likeness=likeness)
    rects = rects_of(boxes, source)
    notes = [f"{source.page_width:,} × {source.page_height:,}"]
    if source.share < 1:
        notes.append(f"the first {round(source.share * source.page_height):,} rows are shown")
    counts = Counter(drawn.kind for drawn in boxes)
    notes += [f"{counts[kind]:,} {kind}" for kind in KINDS if counts[kind]]
    notes += [f"{len(boxes) - len(rects):,} not drawn"] if len(rects) < len(boxes) else []
    return Figure(name, notes, shown(source.image, limit, text), rects, likeness=likeness)


WANTED, BEFORE, AFTER, WRITTEN, DIFFERENCE = "Wanted", "Before training", "After training", "Written", "Difference"


def figures_of(page: PageResult, row: Row, detail: Detail = MANY_PAGES) -> tuple[list[Figure], int]:
    """What was wanted, what was written before training, where that is known, and now, and where the last differs; and
    the height of the tallest for a column of COLUMN pixels."""
    name, limit = page_name(page.name), detail.picture_bytes
    reference, written = picture_of(page.reference, detail), picture_of(page.written, detail)
    if page.written is None:
        written = "no render"
    on_reference = [Drawn("matched", pair[0], index) for index, pair in enumerate(page.matched)]
    on_reference += [Drawn("missing", box) for box in page.missing]
    on_written = [Drawn("matched", pair[1], index) for index, pair in enumerate(page.matched)]
    on_written += [Drawn("invented", box) for box in page.invented]
    now = AFTER if page.before else WRITTEN
    figures = [
        figure_of(WANTED, reference, on_reference, f"Screenshot of the reference page {name}", limit),
        figure_of(
            now, written, on_written, f"Render of what the model wrote for {name}", limit, row.value(metrics.CHOOSING)
        ),
    ]
    pictures = [picture for picture in (reference, written) if isinstance(picture, Picture)]
    if page.before:
        earlier = "no render" if page.before.written is None else picture_of(page.before.written, detail)
        text = f"Render of what the model wrote for {name} before training"
        figures.insert(1, figure_of(BEFORE, earlier, (), text, limit, row.before.get(metrics.CHOOSING)))
    if len(pictures) == 2:
        text = f"Difference of the two for {name}: the darker, the more they differ"
        picture = shown(difference(reference.image, written.image), detail.difference_bytes, text)
        figures.append(Figure(DIFFERENCE, [f"dark where they differ, × {AMPLIFIED}"], picture))
    else:
        figures.append(Figure(DIFFERENCE, absent="nothing to compare"))
    tallest = max((COLUMN * picture.image.height // picture.image.width for picture in pictures), default=200)
    return figures, min(COLUMN * 4, tallest)
