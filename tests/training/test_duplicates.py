"""Which pages were there before, in a few bytes each."""

import random

import pytest
from small_pages import page_html, picture

from training import duplicates
from training.dataset import BadPage
from training.duplicates import KnownPages, Numbers
from training.page_checks import marks_of


def test_numbers_are_found_again_before_and_after_they_are_sorted(monkeypatch):
    monkeypatch.setattr(duplicates, "RECENT", 10)
    rng, numbers = random.Random(0), Numbers()
    known = {rng.randrange(2**64) for _ in range(95)} | {0, 2**64 - 1}
    for number in known:
        assert number not in numbers
        numbers.update([number])
    assert all(number in numbers for number in known) and len(numbers.sorted) + len(numbers.recent) == len(known)
    assert not any(number in numbers for number in (1, 2**64 - 2, *(rng.randrange(2**64) for _ in range(99))))


@pytest.mark.parametrize(
    ("screenshot", "html", "reason"),
    [
        (picture(1), page_html(2), "duplicate"),
        (picture(2), page_html(1), "duplicate"),
        (picture(2), page_html(1).replace("><", ">\n <"), "duplicate"),
        (picture(2), page_html(1).replace("</p>", " more</p>"), "like a held-out page"),
        (picture(2), page_html(2), None),
    ],
)
def test_same_or_nearly_the_same(screenshot, html, reason):
    known = KnownPages()
    known.add(marks_of({"screenshot": picture(1), "html": page_html(1)}), is_held_out=True)
    if reason is None:
        return known.check(marks_of({"screenshot": screenshot, "html": html}), is_held_out=False)
    with pytest.raises(BadPage) as error:
        known.check(marks_of({"screenshot": screenshot, "html": html}), is_held_out=False)
    assert error.value.reason == reason
