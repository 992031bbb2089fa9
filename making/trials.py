"""Whether a candidate still looks like the page, held against what the page itself looks like each time.

    trials = Trials(renderer, (1280, 720), normalised, image, rows=2000)
    trials.same(candidate)                  # PageDropped where the page changes by more than can be judged

A page may flicker by itself. What it does unchanged is found out as soon as a candidate differs: pixels that do not
flicker must be equal, those that do may go as far beyond what was seen of them as that went.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from making.drops import PageDropped
from scoring.renders import Job

if TYPE_CHECKING:
    from scoring.renders import Render, Renderer

MAX_RENDERS = 16  # to find out which reductions stay: what is kept back costs tokens, a render time
FIRST_LOOK, LONG_LOOK = 4, 8  # renders of the unchanged page: where a candidate differs, and where much flickers
MAX_NOISE = 0.05  # share of the pixels that may flicker; with more, too little is left to compare
CHANCE = (
    0.0022  # share of the pixels: where no more differ it may be a flicker not seen yet, so both are rendered again
)


def rendered(renderer: Renderer, job: Job) -> Render:
    """PageDropped where that fails; a page whose candidates do not render is none to learn from, either."""
    render = renderer.render(job)
    if render.failure:
        raise PageDropped("render", render.failure)
    return render


@dataclass
class Trials:
    """Renders candidates for `page` and compares them; `left` renders may still be made of candidates."""

    renderer: Renderer
    window: tuple[int, int]  # width and height, CSS px
    page: str  # unchanged
    image: np.ndarray  # (H, W, 3) uint8, what it looked like
    rows: int  # px from the top that count
    left: int = MAX_RENDERS
    made: int = 0  # of either
    looks: int = 1  # at the unchanged page
    refused: set[str] = field(default_factory=set)  # candidates

    def __post_init__(self) -> None:
        self.low = self.high = self.image[: self.rows]  # (h, W, 3) uint8, over all looks
        self.shown = np.zeros(self.low.shape[:2], bool)  # pixels that a refused candidate changed more than once

    def shot(self, html: str) -> np.ndarray:
        """(h, W, 3) uint8: what counts of its picture."""
        self.made += 1
        return rendered(self.renderer, Job(html, *self.window)).image[: self.rows]

    def same(self, html: str) -> bool:
        """Whether it looks like the unchanged page, but for what flickers there, too."""
        if self.left <= 0 or html in self.refused:
            return False
        self.left -= 1
        shots = [self.shot(html)]
        if not self.differing(shots[0]).any():
            return True
        if self.looks == 1:
            self.look(FIRST_LOOK)
        while 0 < (wrong := min(map(self.differing, shots), key=np.mean)).mean() <= CHANCE and self.left > 0:
            if len(shots) == (3 if self.noise() else 2) or (wrong & self.shown).any():
                break
            self.left -= 1
            shots.append(self.shot(html))
            if self.noise() and self.looks < LONG_LOOK:
                self.look(self.looks + 1)
        if wrong.any():
            self.refused.add(html)
            self.shown = self.shown | wrong
        return not wrong.any()

    def differing(self, shot: np.ndarray) -> np.ndarray:
        """(h, W) bool: which pixels of a picture (h, W, 3) are none of the page's; all, where its size is not."""
        if shot.shape != self.low.shape:
            return np.ones(self.low.shape[:2], bool)
        if self.looks == 1 or not self.noise():
            return (shot != self.low).any(axis=-1)
        low, high = self.low.astype(np.int16), self.high.astype(np.int16)
        return ((shot < 2 * low - high) | (shot > 2 * high - low)).any(axis=-1)

    def noise(self) -> float:
        """The share, 0 to 1, of pixels that differed between the looks."""
        return float((self.low != self.high).any(axis=-1).mean())

    def look(self, looks: int) -> None:
        """Renders the unchanged page until it was seen that many times, more often where that decides; PageDropped."""
        while self.looks < looks:
            shot = self.shot(self.page)
            self.looks += 1
            if shot.shape != self.low.shape:
                raise PageDropped("changing", f"{shot.shape[:2]} px in one render and {self.low.shape[:2]} in another")
            self.low, self.high = np.minimum(self.low, shot), np.maximum(self.high, shot)
            if self.looks == looks < LONG_LOOK and self.noise() > MAX_NOISE / 10:
                looks = LONG_LOOK
        if (share := self.noise()) > MAX_NOISE:
            pixels = round(share * self.low.shape[0] * self.low.shape[1])
            raise PageDropped("changing", f"{pixels:,} pixels, {share:.2%}, change between {self.looks} renders of it")
