"""The texts of a page: where each stands and in which colour, found by rendering the page.

    with Renderer() as renderer:
        page = page_of(renderer.render(job_for(html)), html)
        page.texts[0].text, page.texts[0].center, page.image.shape

The page is rendered as it is; without its texts, which tells every text that is seen, in whatever element, from what is
not (`Page.texts`); and twice with a colour for each text of Design2Code's 19 tags (`Page.blocks`, by its definition).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from scoring.generated import generated_texts
from scoring.renders import SHOT, SNAPSHOT, Job, Render, step

TEXT_TAGS = "p h1 h2 h3 h4 h5 h6 div span a b li table td th button footer header figcaption".split()
LEVELS = tuple(range(10, 251, 16))  # of red, green and blue; 16 apart, so that each is known within 4
PALETTE, SHIFT = len(LEVELS) ** 3, 50  # colours; what the second render adds to each, modulo 256
NEAR_COLOUR, NEAR_SHIFT = 4, 8  # by Design2Code's definition
SEEN = 8  # of 255: from which difference on a text stands out from what is behind it
STRONG = 0.8  # of a text's strongest pixels: those of the letters' inside, whose colour is not mixed with the ground's
# A frame's start tag, and its attribute that shuts us out with the page's scripts, which the policy stops anyway.
FRAME = re.compile(r"""<iframe\b(?:[^>"']|"[^"]*"|'[^']*')*>""", re.IGNORECASE)
SANDBOX = re.compile(r"""("[^"]*"|'[^']*')|\ssandbox(?:\s*=\s*(?:"[^"]*"|'[^']*'|[^\s>]+))?(?=[\s/>])""", re.IGNORECASE)
BAND = 1024  # rows of a picture that are compared at once, to need less memory
MAX_PASSES = 4  # pairs of renders: a page with more texts than colours is coloured in parts
UNCOLOURED = 7  # steps of a job before its texts are coloured, which leave the page as it was


@dataclass(frozen=True)
class Block:
    """A text, its box in shares of the page's width and height, and its mean colour (red, green, blue; 0 to 255)."""

    text: str
    x: float
    y: float
    width: float
    height: float
    color: tuple[float, float, float]

    @property
    def area(self) -> float:
        """In shares of the page's."""
        return self.width * self.height

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) in shares of the page's width and height."""
        return self.x + self.width / 2, self.y + self.height / 2


@dataclass(frozen=True)
class Page:
    """A rendered page: picture (H, W, 3) uint8, text blocks by Design2Code's definition, `tag(child, child)` of every
    element, the HTML it was rendered from, all texts that are seen; or why it could not be rendered."""

    image: np.ndarray | None
    blocks: tuple[Block, ...] = ()
    subtrees: frozenset[str] = frozenset()
    failure: str | None = None
    clipped: bool = False
    html: str = field(default="", repr=False)
    texts: tuple[Block, ...] = ()


def job_for(html: str, width: int = 1280, height: int = 720) -> Job:
    """What is to be rendered of a page, in a window of so many CSS pixels, so that `page_of` can read it."""
    tags = len(re.findall(rf"<(?:{'|'.join(TEXT_TAGS)})\b", html, re.IGNORECASE))
    passes = min(MAX_PASSES, max(1, -(-tags // PALETTE)))
    steps = [SHOT, step("subtrees"), step("texts"), SNAPSHOT]
    steps += [step("bare", hide=True), SHOT, step("bare", hide=False)]
    for number in range(passes):
        for shift in (0, SHIFT):
            options = {"levels": LEVELS, "tags": ",".join(TEXT_TAGS), "shift": shift, "pass": number}
            steps += [step("recolour", **options), SHOT]
    # Closed shadow roots look the same open, and let us read what is in them; no script is there to tell.
    html = re.sub(r"(\sshadowrootmode\s*=\s*[\"']?)closed\b", r"\1open", html, flags=re.IGNORECASE)
    html = FRAME.sub(lambda tag: SANDBOX.sub(lambda found: found[1] or "", tag[0]), html)
    return Job(html, width, height, tuple(steps))


def halves_of(job: Job) -> tuple[Job, Job]:
    """The steps of `job_for` in two parts, which two browsers take at once; `joined` puts what they show together."""
    return replace(job, steps=job.steps[:UNCOLOURED]), replace(job, steps=job.steps[UNCOLOURED:])


def joined(one: Render, two: Render) -> Render:
    """What came of a job by what came of its halves, neither of which has failed."""
    return Render(one.values + two.values, None, one.clipped or two.clipped, max(one.seconds, two.seconds))


def page_of(render: Render, html: str) -> Page:
    """What a render of `job_for(html)` shows; a page that failed says why."""
    if render.failure is not None:
        return Page(None, failure=render.failure, html=html)
    # One picture as it is, one without texts; then for each pass: texts, a picture, their number, a shifted picture.
    image, subtrees, (every_text, origin), snapshot, _, bare, _, *passes = render.values
    found: list[Block] = []
    for texts, first, elements, second in zip(passes[::4], passes[1::4], passes[2::4], passes[3::4]):
        if elements > PALETTE * len(passes) // 4:
            return Page(None, failure=f"{elements:,} text elements, more than colours", html=html)
        found += blocks_of(image, first, second, texts)
    seen = texts_of(image, bare, [*every_text, *generated_texts(snapshot, origin)])
    return Page(image, same_boxes_merged(found), frozenset(subtrees), clipped=render.clipped, html=html, texts=seen)


def texts_of(
    image: np.ndarray, bare: np.ndarray, texts: Sequence[tuple[str, Sequence[Sequence[float]], bool]]
) -> tuple[Block, ...]:
    """Those of `texts` (text, its boxes in pixels, whether they are its own) that are seen: where `image` differs from
    the same page without texts, both (H, W, 3) uint8."""
    contrast = contrast_of(image, bare)
    every = contrast >= SEEN
    free = every.copy()  # of which no text is known that has boxes of its own
    for _, boxes, own in texts:
        for box in boxes if own else ():
            free[within(box, contrast.shape)] = False
    found = []
    for text, boxes, own in texts:
        mask = every if own else free
        if block := block_in(image, contrast, mask, [within(box, contrast.shape) for box in boxes], text):
            found.append(block)
    return tuple(found)


def contrast_of(image: np.ndarray, bare: np.ndarray) -> np.ndarray:
    """(H, W) uint8: the largest difference of red, green and blue; where both pictures reach."""
    height, width = (min(sizes) for sizes in zip(image.shape[:2], bare.shape[:2]))
    found = np.empty((height, width), np.uint8)
    for top in range(0, height, BAND):
        one, two = (part[top : min(top + BAND, height), :width] for part in (image, bare))
        red, green, blue = np.moveaxis(np.maximum(one, two) - np.minimum(one, two), -1, 0)
        # A reduction over so short an axis takes fifteen times as long.
        np.maximum(np.maximum(red, green), blue, out=found[top : top + BAND])
    return found


def within(box: Sequence[float], shape: tuple[int, int]) -> tuple[slice, slice]:
    """(rows, columns) of a box (x, y, width, height) inside a picture."""
    x, y, width, height = box
    rows = max(0, math.floor(y)), min(shape[0], math.ceil(y + height))
    columns = max(0, math.floor(x)), min(shape[1], math.ceil(x + width))
    return slice(rows[0], max(rows)), slice(columns[0], max(columns))


def block_in(
    image: np.ndarray, contrast: np.ndarray, mask: np.ndarray, places: Sequence[tuple[slice, slice]], text: str
) -> Block | None:
    """The text in the box around the pixels of `mask` (H, W) in these places, with the mean colour of the strongest."""
    found = []
    for rows, columns in places:
        y, x = np.nonzero(mask[rows, columns])
        found.append((y + rows.start, x + columns.start))
    y, x = (np.concatenate(parts) for parts in zip(*found))
    if not len(y):
        return None
    strength = contrast[y, x]
    strong = strength >= STRONG * strength.max()
    color = image[y[strong], x[strong]].mean(axis=0)
    height, width = image.shape[:2]
    box = x.min() / width, y.min() / height, (x.max() - x.min() + 1) / width, (y.max() - y.min() + 1) / height
    return Block(text, *map(float, box), tuple(map(float, color)))


def blocks_of(
    image: np.ndarray, first: np.ndarray, second: np.ndarray, texts: Sequence[tuple[str, int, int, int]]
) -> list[Block]:
    """Blocks of `texts` (text, red, green, blue) by two renders whose text differs by SHIFT, colours by `image`.

    All three are (H, W, 3) uint8, and may differ in height and width where recolouring has moved something.
    """
    height, width = (min(sizes) for sizes in zip(image.shape[:2], first.shape[:2], second.shape[:2]))
    rows, columns, keys = coloured_pixels(first[:height, :width], second[:height, :width])
    order = np.argsort(keys, kind="stable")
    known, starts = np.unique(keys[order], return_index=True)
    pixels = dict(zip(known.tolist(), np.split(order, starts[1:])))
    found = []
    for text, *color in texts:
        key = sum(LEVELS.index(part) * len(LEVELS) ** power for part, power in zip(color, (2, 1, 0)))
        if key not in pixels or not text.strip():
            continue
        y, x = rows[pixels[key]], columns[pixels[key]]
        mean = image[y, x].mean(axis=0).astype(int)
        box = x.min() / first.shape[1], y.min() / first.shape[0]
        box += (x.max() - x.min() + 1) / first.shape[1], (y.max() - y.min() + 1) / first.shape[0]
        found.append(Block(text.strip().lower(), *map(float, box), tuple(map(float, mean))))
    return found


def coloured_pixels(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, columns, colours as numbers below PALETTE) of the P pixels, (P,) each, that have a colour of the palette
    in the first render and the shifted one in the second; both (H, W, 3) uint8."""
    parts = []
    for top in range(0, len(first), BAND):
        one, two = first[top : top + BAND], second[top : top + BAND]
        shifted = one + np.uint8(SHIFT)  # bytes: modulo 256
        near = np.maximum(shifted, two) - np.minimum(shifted, two) <= NEAR_SHIFT
        rows, columns = np.nonzero(near[..., 0] & near[..., 1] & near[..., 2])
        parts.append((rows + top, columns, one[rows, columns].astype(np.int16)))
    rows, columns, colors = map(np.concatenate, zip(*parts))
    levels = np.rint((colors - LEVELS[0]) / 16).astype(np.int64).clip(0, len(LEVELS) - 1)
    known = (np.abs(colors - (LEVELS[0] + 16 * levels)) <= NEAR_COLOUR).all(axis=1)
    return rows[known], columns[known], levels[known] @ np.array([len(LEVELS) ** 2, len(LEVELS), 1])


def same_boxes_merged(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Texts that share a box, as those of one element do, are one block."""
    found: dict[tuple, Block] = {}
    for block in blocks:
        box = block.x, block.y, block.width, block.height
        if box in found:
            color = tuple((one + two) / 2 for one, two in zip(found[box].color, block.color))
            block = replace(found[box], text=f"{found[box].text} {block.text}", color=color)
        found[box] = block
    return tuple(found.values())
