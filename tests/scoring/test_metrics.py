"""What is measured of two pages."""

import pytest

from scoring.blocks import Block, Page
from scoring.metrics import Compared, color_likeness, likeness, overall
from scoring.proof import score

SOME = [Block(text, 0.1, 0.2 * n, 0.3, 0.1, (0.0, 0.0, 0.0)) for n, text in enumerate(("home", "price", "news"))]


def test_colours_differ_by_ciede2000():
    pairs = [((0, 0, 0), (0, 0, 0)), ((255, 255, 255), (0, 0, 0)), ((50, 100, 150), (50, 100, 160))]
    same, opposite, near = color_likeness(pairs)
    assert same == 1 and opposite == pytest.approx(0, abs=1e-6) and 0.95 < near < 1


def test_without_a_match_all_four_are_0(renderer):
    for one, two in (([], []), ([], SOME), (SOME, [])):
        pair = Compared(Page(None, tuple(two)), Page(None, tuple(one)))
        assert pair.of_blocks == (0, 0, 0, 0) and overall(pair) == likeness(pair) == 0
    nothing = score("<!DOCTYPE html><html><body>No element of texts</body></html>", "", renderer)
    assert nothing["overall"] == nothing["likeness"] == 0 and nothing.causes == ("no text to compare",)
