"""Which pages were there before: the same screenshot or html as any, or nearly the text of a held-out one.

    known = KnownPages()
    known.check(marks, is_held_out=False)           # BadPage for a duplicate; nothing is noted
    known.add(marks, is_held_out=False)

16 bytes a page, in sorted arrays; Python's own set would take 150. Of held-out pages, which are few, the text's
shingles are held, too.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy

from training.dataset import BadPage
from training.page_checks import Marks

RECENT = 65_536  # numbers that a Python set holds before they are sorted in among the others


class Numbers:
    """A set of unsigned 64-bit numbers that only grows, in 8 bytes each."""

    def __init__(self):
        self.sorted = numpy.empty(0, dtype=numpy.uint64)
        self.recent: set[int] = set()

    def __contains__(self, number: int) -> bool:
        if number in self.recent:
            return True
        wanted = numpy.uint64(number)
        place = int(numpy.searchsorted(self.sorted, wanted))
        return place < len(self.sorted) and self.sorted[place] == wanted

    def update(self, numbers: Iterable[int]) -> None:
        """Adds them all."""
        self.recent.update(numbers)
        if len(self.recent) > RECENT:
            new = numpy.fromiter(self.recent, dtype=numpy.uint64, count=len(self.recent))
            self.sorted, self.recent = numpy.union1d(self.sorted, new), set()


class KnownPages:
    """The pages that were kept so far, by their marks."""

    def __init__(self):
        self.digests = Numbers()
        self.sizes: list[int] = []  # shingles of each held-out page
        self.pages_with: dict[int, list[int]] = defaultdict(list)  # shingle -> held-out pages

    def check(self, marks: Marks, is_held_out: bool) -> None:
        """BadPage for a duplicate of any page, or a near-duplicate of a held-out one: shingles with a Jaccard
        similarity of `marks.alike` and more (Broder, 1997), found by an index from shingle to held-out pages."""
        if any(digest in self.digests for digest in marks.digests):
            raise BadPage("duplicate", "the screenshot or the html of an earlier page")
        if is_held_out:
            return
        shingles = array("Q", marks.shingles)
        shared = Counter(other for shingle in shingles for other in self.pages_with.get(shingle, ()))
        if any(both >= marks.alike * (len(shingles) + self.sizes[other] - both) for other, both in shared.items()):
            raise BadPage("like a held-out page", "nearly the same text")

    def add(self, marks: Marks, is_held_out: bool) -> None:
        """The page is kept."""
        self.digests.update(marks.digests)
        if is_held_out:
            shingles = array("Q", marks.shingles)
            for shingle in shingles:
                self.pages_with[shingle].append(len(self.sizes))
            self.sizes.append(len(shingles))
