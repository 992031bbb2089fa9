"""The text blocks of a page: where each text stands and in which colour, found by rendering the page.

    with Renderer() as renderer:
        page = page_of(renderer.render(job_for(html)), html)
        page.blocks[0].text, page.blocks[0].center, page.image.shape

The page is rendered once as it is, and twice with a colour for each text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from scoring.renders import SHOT, Job, Render, step

TEXT_TAGS = "p h1 h2 h3 h4 h5 h6 div span a b li table td th button footer header figcaption".split()
LEVELS = tuple(range(10, 251, 16))  # of red, green and blue; 16 apart, so that each is known within 4
PALETTE, SHIFT = len(LEVELS) ** 3, 50  # colours; what the second render adds to each, modulo 256
NEAR_COLOUR, NEAR_SHIFT = 4, 8  # by Design2Code's definition
BAND = 1024  # rows of a picture that are compared at once, to need less memory
MAX_PASSES = 4  # pairs of renders: a page with more texts than colours is coloured in parts


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
    """A rendered page: picture (H, W, 3) uint8, text blocks, `tag(child, child)` of every element, the HTML it was
    rendered from; or why it could not be rendered."""

    image: np.ndarray | None
    blocks: tuple[Block, ...] = ()
    subtrees: frozenset[str] = frozenset()
    failure: str | None = None
    clipped: bool = False
    html: str = field(default="", repr=False)


def job_for(html: str, width: int = 1280, height: int = 720) -> Job:
    """What is to be rendered of a page, in a window of so many CSS pixels, so that `page_of` can read it."""
    tags = len(re.findall(rf"<(?:{'|'.join(TEXT_TAGS)})\b", html, re.IGNORECASE))
    passes = min(MAX_PASSES, max(1, -(-tags // PALETTE)))
    steps = [SHOT, step("subtrees")]
    for number in range(passes):
        for shift in (0, SHIFT):
            options = {"levels": LEVELS, "tags": ",".join(TEXT_TAGS), "shift": shift, "pass": number}
            steps += [step("recolour", **options), SHOT]
    return Job(html, width, height, tuple(steps))


def page_of(render: Render, html: str) -> Page:
    """What a render of `job_for(html)` shows; a page that failed says why."""
    if render.failure is not None:
        return Page(None, failure=render.failure, html=html)
    # One picture as it is; then for each pass: the texts, a picture, the number of elements, a shifted picture.
    image, subtrees, *passes = render.values
    found: list[Block] = []
    for texts, first, elements, second in zip(passes[::4], passes[1::4], passes[2::4], passes[3::4]):
        if elements > PALETTE * len(passes) // 4:
            return Page(None, failure=f"{elements:,} text elements, more than colours", html=html)
        found += blocks_of(image, first, second, texts)
    return Page(image, same_boxes_merged(found), frozenset(subtrees), clipped=render.clipped, html=html)


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
