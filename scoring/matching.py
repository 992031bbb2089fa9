"""Which block of a written page stands for which of the reference: Design2Code's matching (Si et al., NAACL 2025).

    matching_of(reference.blocks, prediction.blocks).missing                 # texts that only the reference has

Blocks that read better together are merged first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cydifflib import SequenceMatcher

from scoring.blocks import Block

ALIKE, MERGE_GAIN, CONTEXT = 0.5, 0.05, 0.1  # least similarity of a pair; least gain of a merge; weight of neighbours


class Similarity:
    """difflib's ratio of two texts, each pair computed once, with its rule for popular characters. Costs: negative."""

    def __init__(self, swapped: bool = False):
        self.matchers: dict[str, SequenceMatcher] = {}
        self.swapped = swapped
        self.known: dict[str, dict[str, float]] = {}
        self.turned = None if swapped else Similarity(swapped=True)  # the ratio depends on which text comes first

    def matcher(self, second: str) -> SequenceMatcher:
        """The one for this second text."""
        if second not in self.matchers:
            self.matchers[second] = SequenceMatcher(None, "", second)  # keeps what it finds out about `second`
        return self.matchers[second]

    def cost(self, text: str, column: str) -> float:
        """The ratio, negative."""
        known = self.known.setdefault(text, {})
        if column not in known:
            one, two = (column, text) if self.swapped else (text, column)
            matcher = self.matcher(two)
            matcher.set_seq1(one)
            known[column] = -1.0 if one == two else -matcher.ratio()
        return known[column]

    def costs(self, first: Sequence[Block], second: Sequence[Block]) -> np.ndarray:
        """(first, second) float64"""
        columns = [block.text for block in second]
        rows = [[self.cost(block.text, column) for column in columns] for block in first]
        return np.array(rows, dtype=float).reshape(len(first), len(second))


class Bound:
    """The most that a merge of two neighbouring rows can gain, without solving the assignment again.

    For rows at least as many as columns, also after the merge. Any prices of the columns give a lower bound of the new
    total by weak duality of linear programs; the best prices are those of the assignment at hand. A merge that is
    bounded below `MERGE_GAIN` is not worth solving, and its texts need not even be compared: no ratio is above what
    the characters that two texts share would allow (difflib's `quick_ratio`).
    """

    def __init__(
        self, costs: np.ndarray, rows: np.ndarray, columns: np.ndarray, second: Sequence[Block], similarity: Similarity
    ):
        """`costs` (R, C) with R >= C, and its assignment: `rows` and `columns` (C,)."""
        # Prices as shortest paths from the rows that are left over, along the assigned ones (Bellman-Ford).
        price = np.delete(costs, rows, axis=0).min(axis=0)
        owner = costs[rows[np.argsort(columns)]]
        steps = owner - np.diag(owner)[:, None]
        for _ in range(len(price)):
            lower = np.minimum(price, (price[:, None] + steps).min(axis=0))
            if (lower == price).all():
                break
            price = lower
        self.price, self.worth = price, np.minimum(0.0, (costs - price).min(axis=1))
        self.slack = costs[rows, columns].sum() - price.sum() - self.worth.sum()  # 0, but for rounding
        self.similarity, self.columns = similarity, [block.text for block in second]
        self.indices = {character: n for n, character in enumerate(sorted({*"".join(self.columns)}))}
        self.lengths = np.array([len(column) for column in self.columns])
        self.counts = np.array([self.count(column) for column in self.columns])

    def count(self, text: str) -> np.ndarray:
        """How often each character of the columns' texts is in this one."""
        return np.bincount([self.indices[c] for c in text if c in self.indices], minlength=len(self.indices))

    def rules_out(self, index: int, text: str) -> bool:
        """Whether merging the rows `index` and the next into one of `text` cannot gain enough."""
        least = self.slack + self.worth[index] + self.worth[index + 1] - MERGE_GAIN + 1e-9  # of the new row's worth
        if least > 0:
            return False
        shared = np.minimum(self.counts, self.count(text)).sum(axis=1)
        lowest = -2 * shared / (len(text) + self.lengths)
        doubtful = np.flatnonzero(lowest - self.price < least)
        return all(self.similarity.cost(text, self.columns[n]) - self.price[n] >= least for n in doubtful.tolist())


def assigned(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of the pairs of least total cost, as many as the shorter side has (Crouse 2016)."""
    from scipy.optimize import linear_sum_assignment  # half a second, which --help need not wait for

    return linear_sum_assignment(costs)


def merged(one: Block, two: Block) -> Block:
    """One block of both texts, in the box around both, with their mean colour rounded down."""
    x, y = min(one.x, two.x), min(one.y, two.y)
    width = max(one.x + one.width, two.x + two.width) - x
    height = max(one.y + one.height, two.y + two.height) - y
    color = tuple((a + b) // 2 for a, b in zip(one.color, two.color))
    return Block(f"{one.text} {two.text}", x, y, width, height, color)


def gain(before: Sequence[float], after: Sequence[float]) -> float:
    """By how much the mean of the costs that changed has fallen; 0 unless the best of them has fallen, too."""
    common = Counter(before) & Counter(after)
    old, new = (list((Counter(costs) - common).elements()) for costs in (before, after))
    mean = [sum(costs) / len(costs) if costs else 0.0 for costs in (old, new)]
    if mean[0] > mean[1] and not (old and new and min(old) > min(new)):
        return 0.0
    return mean[0] - mean[1]


def merge_neighbours(first: list[Block], second: Sequence[Block], similarity: Similarity, turned: bool) -> list[Block]:
    """`first` with those neighbours merged that match `second` better together, the best first."""
    similarity = similarity.turned if turned else similarity

    def solved(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return assigned(costs.T)[::-1] if turned else assigned(costs)

    if len(first) < 2:
        return first
    costs, gains = similarity.costs(first, second), []
    current = costs[solved(costs)].tolist()
    # Most merges gain nothing, and telling so by a bound is many times cheaper than an assignment for each.
    bound = Bound(costs, *solved(costs), second, similarity) if len(first) > len(second) else None
    for index in range(len(first) - 1):
        both = merged(first[index], first[index + 1])
        if bound and bound.rules_out(index, both.text):
            continue
        after = np.concatenate([costs[:index], similarity.costs([both], second), costs[index + 2 :]])
        better = gain(current, after[solved(after)].tolist())
        if better > MERGE_GAIN:
            gains.append((index, better))
    taken: set[int] = set()
    for index, _ in sorted(gains, key=lambda item: item[1], reverse=True):
        if not {index, index + 1} & taken:
            first = [*first[:index], merged(first[index], first[index + 1]), *first[index + 1 :]]
            taken |= {index, index + 1}
            first[index + 1] = None  # so that indices stay what they were
    return [block for block in first if block is not None]


def with_context(costs: np.ndarray) -> np.ndarray:
    """(R, C): costs below -ALIKE, lowered by CONTEXT times the sum of the two lowest neighbours."""
    adjusted = costs.copy()
    for row, column in zip(*np.nonzero(costs < -ALIKE)):
        near = costs[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2].ravel()
        near = np.sort(np.delete(near, np.flatnonzero(near == costs[row, column])[0]))
        adjusted[row, column] += CONTEXT * near[:2].sum()
    return adjusted


def match(prediction: Sequence[Block], reference: Sequence[Block]) -> tuple[list[Block], list[Block], list[tuple]]:
    """(blocks of the prediction, of the reference, both merged; pairs (prediction, reference, similarity))."""
    similarity, predicted, wanted = Similarity(), list(prediction), list(reference)
    while True:
        before = len(predicted), len(wanted)
        predicted = merge_neighbours(predicted, wanted, similarity, turned=False)
        wanted = merge_neighbours(wanted, predicted, similarity, turned=True)
        if (len(predicted), len(wanted)) == before:
            break
    costs = similarity.costs(predicted, wanted)
    pairs = [(predicted[i], wanted[j], -costs[i, j]) for i, j in zip(*assigned(with_context(costs)))]
    return predicted, wanted, [pair for pair in pairs if pair[2] >= ALIKE]


@dataclass(frozen=True)
class Matching:
    """Blocks as they were matched, neighbours merged: each matched pair with its similarity (0 to 1), and the rest."""

    matched: tuple[tuple[Block, Block], ...]  # (reference, prediction)
    similarities: tuple[float, ...]
    missing: tuple[Block, ...]  # of the reference only
    invented: tuple[Block, ...]  # of the prediction only


def matching_by_place(reference: Sequence[Block], prediction: Sequence[Block]) -> Matching:
    """Equal texts first, each with one near it, so that the order in which a page names them does not count; what is
    left as in `matching_of`."""
    places: dict[str, tuple[list[Block], list[Block]]] = {}
    for side, blocks in enumerate((reference, prediction)):
        for block in blocks:
            places.setdefault(block.text, ([], []))[side].append(block)
    pairs: list[tuple[Block, Block]] = []
    for wanted, written in places.values():
        if wanted and written:
            one, two = (np.array([block.center for block in blocks]) for blocks in (wanted, written))
            rows, columns = assigned(np.abs(one[:, None] - two).max(axis=-1))
            pairs += [(wanted[row], written[column]) for row, column in zip(rows, columns)]
    taken = {id(block) for pair in pairs for block in pair}
    rest = matching_of(*([block for block in blocks if id(block) not in taken] for blocks in (reference, prediction)))
    return Matching(
        (*pairs, *rest.matched), (*(1.0 for _ in pairs), *rest.similarities), tuple(rest.missing), tuple(rest.invented)
    )


def matching_of(reference: Sequence[Block], prediction: Sequence[Block]) -> Matching:
    """`match`, or nothing matched where a page has no blocks at all."""
    predicted, wanted, pairs = match(prediction, reference) if prediction and reference else (prediction, reference, [])
    taken = {id(block) for pair in pairs for block in pair[:2]}
    missing, invented = (tuple(block for block in blocks if id(block) not in taken) for blocks in (wanted, predicted))
    matched = tuple((two, one) for one, two, _ in pairs)
    return Matching(matched, tuple(similarity for *_, similarity in pairs), missing, invented)
