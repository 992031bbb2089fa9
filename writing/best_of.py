"""Which of several answers looks most like the screenshot, by their renders: the one that `--best_of` keeps.

    with Renderer() as renderer:
        choice = choose(screenshot, [answer.html for answer in answers], renderer)
    answers[choice.index], choice.scores

The screenshot is all there is to compare with, and no reference HTML: what stands for its texts are shapes that differ
from what is around them, words for the most part, which are found alike in both pictures. Nothing is read, so that a
page in another font still finds its words, and one of other words is told by the letters' ink.

Sections: Choice, Likeness of two pictures, Shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scoring.many_pages import window_of
from scoring.metrics import color_likeness
from scoring.renders import Job, Renderer
from scoring.validity import validity

if TYPE_CHECKING:
    from PIL.Image import Image

# -----------------------------------------------------------------------------
# Choice

FAILED = -2.0  # the score of a page that could not be rendered


@dataclass(frozen=True)
class Choice:
    """The index of the page with the highest score, the first of several; and every page's score: from 0 to 1, a copy's
    is 1; from -2 to -1 where the page is cut off or shows nothing, -2 where it is empty or could not be rendered."""

    index: int
    scores: tuple[float, ...]


def choose(screenshot: Image, htmls: Sequence[str], renderer: Renderer) -> Choice:
    """The page among `htmls` whose render is most like `screenshot` (RGB); equal pages are rendered once.

    Raises ValueError for no page at all. A page that cannot be rendered, is cut off or empty raises nothing: it loses.
    """
    if not htmls:
        raise ValueError("no page to choose from: give at least one")
    width, height = window_of(*screenshot.size)
    if screenshot.width != width:  # wider than any window: the picture of it, smaller
        screenshot = screenshot.resize((width, max(1, round(screenshot.height * width / screenshot.width))))
    wanted = Seen(np.asarray(screenshot.convert("RGB")))
    different = list(dict.fromkeys(htmls))
    renders = renderer.map([Job(html, width, height) for html in different])
    scores = {html: score(wanted, render.image, html) for html, render in zip(different, renders, strict=True)}
    every = tuple(scores[html] for html in htmls)
    return Choice(every.index(max(every)), every)


def score(wanted: Seen, written: np.ndarray | None, html: str) -> float:
    """As `Choice` tells it, of a render (H, W, 3) uint8 of `html`; None: there is none."""
    if written is None or not html.strip():
        return FAILED
    seen = Seen(written)
    # Rounded, since equal pictures must be equal whatever the order of a sum.
    found = round(likeness_of(wanted, seen), 6)
    lost = not validity(html).closed or (seen.is_blank and not wanted.is_blank)
    return found + FAILED if lost else found


# -----------------------------------------------------------------------------
# Likeness of two pictures

SCALES = (2, 4, 8)  # both sides divided by: small type, words, blocks; the larger, the less a small shift costs
SSIM_WINDOW = 7  # px


class Seen:
    """A picture (H, W, 3) uint8, and the shapes on it."""

    def __init__(self, image: np.ndarray):
        self.image, self.shapes = image, shapes_of(image)

    @property
    def is_blank(self) -> bool:
        """All of one colour."""
        return bool((self.image == self.image[0, 0]).all())


def likeness_of(wanted: Seen, written: Seen) -> float:
    """0 to 1: the mean of `shapes_alike` and `pictures_alike`. Each is blind for what the other sees: the first for
    grounds, pictures and the page's height, the second for which letters a small text has; so neither weighs more.
    Where neither picture has a shape, the second alone."""
    shapes, pictures = (
        shapes_alike(wanted.shapes, written.shapes, wanted.image.shape),
        pictures_alike(wanted.image, written.image),
    )
    return pictures if shapes is None else (shapes + pictures) / 2


def pictures_alike(one: np.ndarray, two: np.ndarray) -> float:
    """0 to 1: the mean of SSIM (Wang et al., 2004) in colour at `SCALES`, of the common part of both (H, W, 3) uint8,
    times that part's share of what both cover: a page that is too long or too short loses as much as it lacks."""
    import cv2
    from skimage.metrics import structural_similarity

    height, width = (min(sizes) for sizes in zip(one.shape[:2], two.shape[:2]))
    covered = one.shape[0] * one.shape[1] + two.shape[0] * two.shape[1] - height * width
    found = []
    for scale in SCALES:
        size = max(1, round(width / scale)), max(1, round(height / scale))
        small = [cv2.resize(image[:height, :width], size, interpolation=cv2.INTER_AREA) for image in (one, two)]
        if min(size) >= SSIM_WINDOW:
            alike = structural_similarity(*small, win_size=SSIM_WINDOW, channel_axis=2, data_range=255)
            found.append(max(0.0, float(alike)))
    return sum(found) / max(1, len(found)) * height * width / covered


# -----------------------------------------------------------------------------
# Shapes

GROUND_PX = 8.0  # sigma of the blur that stands for what is behind: wider than a stroke, narrower than most blocks
INK_FULL = 64.0  # of 255: a difference from which on ink is as strong as it gets, so that grey text counts like black
INK_LEAST = 0.12  # of the full: weaker differences are the ground's own
GAP_PX = 7  # letters nearer than this are one shape: words in running text, single letters or syllables in titles
SMALLEST_PX, LARGEST_PX = (3, 4), (600, 120)  # (width, height): specks below, pictures and frames above
MOST_SHAPES = 1000  # the largest ones; matching takes about a second for as many
LOOK_PX = (24, 8)  # (width, height) that each shape's ink is brought to, so that shapes of other fonts can be compared
LOOK_BLUR_PX = 0.8  # two fonts' strokes lie that far from each other there
UNLIKE = 0.4  # correlation of two looks: other words of like length reach it, too, and count 0


@dataclass(frozen=True)
class Shapes:
    """The S shapes on a picture: `boxes` (S, 4) of x, y, width, height in px; `looks` (S, L) their ink, zero mean and
    unit length, so that a product is a correlation; `colors` (S, 3) their mean RGB where the ink is strongest."""

    boxes: np.ndarray
    looks: np.ndarray
    colors: np.ndarray

    @property
    def areas(self) -> np.ndarray:
        """(S,) px of the boxes."""
        return self.boxes[:, 2] * self.boxes[:, 3].astype(float)


def shapes_of(image: np.ndarray) -> Shapes:
    """Connected places of `image` (H, W, 3) uint8 that stand out from what is around them, letter gaps closed."""
    import cv2

    ground = cv2.GaussianBlur(image, (0, 0), GROUND_PX)
    ink = np.minimum(cv2.absdiff(image, ground).max(axis=-1), INK_FULL).astype(np.float32) / INK_FULL
    marks = cv2.morphologyEx((ink >= INK_LEAST).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((1, GAP_PX), np.uint8))
    stats = cv2.connectedComponentsWithStats(marks, connectivity=8)[2][1:]
    sizes = stats[:, 2:4]
    stats = stats[(sizes >= SMALLEST_PX).all(axis=1) & (sizes <= LARGEST_PX).all(axis=1)]
    stats = stats[np.argsort(-stats[:, 4], kind="stable")[:MOST_SHAPES]]
    looks, colors = [], []
    for x, y, width, height in stats[:, :4].tolist():
        part = ink[y : y + height, x : x + width]
        look = cv2.GaussianBlur(cv2.resize(part, LOOK_PX, interpolation=cv2.INTER_AREA), (0, 0), LOOK_BLUR_PX)
        look = look.ravel() - look.mean()
        looks.append(look / max(1e-6, float(np.linalg.norm(look))))
        colors.append(image[y : y + height, x : x + width][part >= 0.8 * part.max()].mean(axis=0))
    return Shapes(
        stats[:, :4], np.array(looks).reshape(len(stats), LOOK_PX[0] * LOOK_PX[1]), np.array(colors).reshape(-1, 3)
    )


def shapes_alike(wanted: Shapes, written: Shapes, size: tuple[int, ...]) -> float | None:
    """0 to 1 as `scoring.metrics.likeness` has it, of shapes in place of texts: the matched share, by area, of all
    shapes, each counted by how alike it looks and how large it is, times how alike it stands and is coloured. `size` is
    (H, W) of the wanted picture. None where neither has a shape."""
    from scipy.optimize import linear_sum_assignment

    if not len(wanted.boxes) and not len(written.boxes):
        return None
    if not len(wanted.boxes) or not len(written.boxes):
        return 0.0
    alike = np.clip((wanted.looks @ written.looks.T - UNLIKE) / (1 - UNLIKE), 0, 1)
    one, two = wanted.boxes[:, None], written.boxes[None]
    alike *= (np.minimum(one[..., 2:], two[..., 2:]) / np.maximum(one[..., 2:], two[..., 2:])).prod(axis=-1)
    offsets = np.abs(one[..., :2] + one[..., 2:] / 2 - two[..., :2] - two[..., 2:] / 2) / (size[1], size[0])
    near = np.maximum(0.0, 1 - offsets.max(axis=-1))
    # Squared: of the same word at several places the near one is meant.
    rows, columns = linear_sum_assignment(-alike * near**2)
    colors = np.array(color_likeness(list(zip(wanted.colors[rows], written.colors[columns]))))
    areas = wanted.areas[rows] + written.areas[columns]
    matched = areas * alike[rows, columns] * (near[rows, columns] + colors) / 2
    return float(matched.sum() / (wanted.areas.sum() + written.areas.sum()))
