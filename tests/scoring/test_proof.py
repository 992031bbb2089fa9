"""The scorer's proof: it passes, and whatever is broken in the scorer stops it."""

from functools import reduce

import numpy as np
import pytest

from scoring import blocks, matching, metrics, proof
from scoring.blocks import Page
from scoring.proof import ScorerError, prove


def test_the_scorer_proves_itself(recorded):
    found = prove(recorded)
    assert found["itself"]["overall"] == 1 and found["not rendered"]["overall"] == 0


def white_instead_of_failure(compare):
    def planted(reference, prediction, *more):
        blank = Page(np.full((480, 640, 3), 255, np.uint8))
        return compare(*(blank if page.failure else page for page in (reference, prediction)), *more)

    return planted


def without_unmatched(match):
    def planted(prediction, reference):
        _, _, pairs = match(prediction, reference)
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs], pairs

    return planted


ROOMS = {"blocks": blocks, "matching": matching, "metrics": metrics, "proof": proof}
PLANTED = {  # what is broken: (where, how, what the proof says)
    "colours are never compared": (
        "metrics.color_likeness",
        lambda _: lambda pairs: [1.0] * len(pairs),
        "color does not fall",
    ),
    "blocks that match nothing are forgotten": ("matching.match", without_unmatched, "block does not fall"),
    "texts are alike, whatever they say": (
        "matching.Similarity.cost",
        lambda _: lambda self, text, column: -1.0,
        "text does not fall",
    ),
    "positions are all the same": (
        "blocks.Block.center",
        lambda _: property(lambda self: (0.5, 0.5)),
        "position does not fall",
    ),
    "a failed render is a white page": ("proof.compare", white_instead_of_failure, "of a failed render is not 0"),
    "blocks are lost": (
        "blocks.blocks_of",
        lambda real: lambda *a: real(*a)[:5],
        "texts give another number of blocks",
    ),
    "pictures are never compared": (
        "metrics.ssim",
        lambda _: lambda one, two: 1.0,
        "ssim of a failed render|ssim does not fall",
    ),
    "the best is never reached": (
        "metrics.block_scores",
        lambda real: lambda matching: tuple(0.9 * score for score in real(matching)),
        "block of a page against itself is 0.9",
    ),
    "colours are the recoloured page's": (
        "blocks.blocks_of",
        lambda real: lambda image, first, second, texts: real(first, first, second, texts),
        "color does not fall",
    ),
}


def test_a_metric_that_is_not_best_for_a_page_against_itself_stops_it(recorded, monkeypatch):
    broken = metrics.Metric("broken", "Broken", lambda pair: 0.5, better="lower")
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, broken))
    with pytest.raises(ScorerError, match=r"broken of a page against itself is 0.5, not 0"):
        prove(recorded)


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_broken_in_the_scorer_stops_it(name, recorded, monkeypatch):
    where, plant, says = PLANTED[name]
    room, *path, attribute = where.split(".")
    owner = reduce(getattr, path, ROOMS[room])
    monkeypatch.setattr(owner, attribute, plant(owner.__dict__[attribute]))
    with pytest.raises(ScorerError, match=says):
        prove(recorded)
