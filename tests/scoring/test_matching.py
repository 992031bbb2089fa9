"""The matching of blocks, held against its definition."""

import difflib
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from scoring.blocks import Block
from scoring.matching import Bound, match, merged, with_context


def words(rng: random.Random) -> str:
    return " ".join(rng.choice("home about news price cart login help more".split()) for _ in range(rng.randint(1, 4)))


def blocks(rng: random.Random, count: int) -> list[Block]:
    return [
        Block(words(rng), *(rng.random() / 2 for _ in range(4)), tuple(rng.randrange(256) for _ in range(3)))
        for _ in range(count)
    ]


def matched_by_definition(first: list[Block], second: list[Block]):
    """Everything computed anew at every step, as the definition reads."""

    def ratio(one, two):
        return difflib.SequenceMatcher(None, one.text, two.text).ratio()

    def costs(first, second):
        return np.array([[-ratio(one, two) for two in second] for one in first])

    def current(first, second):
        table = costs(first, second)
        return table[linear_sum_assignment(table)].tolist()

    def better(old, new):
        one, two = Counter(old), Counter(new)
        for value in set(old) & set(new):
            common = min(one[value], two[value])
            one[value] -= common
            two[value] -= common
        one, two = list(one.elements()), list(two.elements())
        means = [sum(values) / len(values) if values else 0 for values in (one, two)]
        return means[0] - means[1] if means[0] <= means[1] or min(one) > min(two) else 0.0

    def merge_pass(blocks, evaluate):
        start, found = evaluate(blocks), []
        for n in range(len(blocks) - 1):
            changed = [*blocks[:n], merged(blocks[n], blocks[n + 1]), *blocks[n + 2 :]]
            gain = better(start, evaluate(changed))
            if gain > 0.05:
                found.append([n, gain])
        found.sort(key=lambda item: item[1], reverse=True)
        gone = set()
        while found:
            n = found.pop(0)[0]
            blocks = [*blocks[:n], merged(blocks[n], blocks[n + 1]), *blocks[n + 1 :]]
            gone.add(n + 1)
            found = [item for item in found if not {item[0], item[0] + 1} & {n, n + 1}]
        return [block for n, block in enumerate(blocks) if n not in gone]

    while True:
        sizes = len(first), len(second)
        first = merge_pass(first, lambda blocks, second=second: current(blocks, second))
        second = merge_pass(second, lambda blocks, first=first: current(first, blocks))
        if (len(first), len(second)) == sizes:
            return first, second


def test_the_merge_search_gives_what_the_definition_gives(monkeypatch):
    ruled_out, real = [], Bound.rules_out
    monkeypatch.setattr(Bound, "rules_out", lambda *a: ruled_out.append(real(*a)) or ruled_out[-1])
    for seed in range(200):
        rng = random.Random(seed)
        one = blocks(rng, rng.randint(1, 9))
        two = [replace(block) for block in one if rng.random() < 0.8] + blocks(rng, rng.randint(0, 3))
        if len(two) > 1 and rng.random() < 0.7:  # what one page has in two blocks the other has in one
            place = rng.randrange(len(two) - 1)
            two[place : place + 2] = [merged(two[place], two[place + 1])]
        if not two:
            continue
        one, two = (one, two) if seed % 2 else (two, one)
        first, second, pairs = match(one, two)
        assert (first, second) == matched_by_definition(one, two), seed
        assert all(similarity >= 0.5 for *_, similarity in pairs)
    assert 100 < sum(ruled_out) < len(ruled_out), "merges that cannot gain are told without solving"


def test_neighbours_that_match_make_a_pair_dearer():
    costs = np.array([[-0.9, -0.1, 0.0], [0.0, -0.6, -0.2], [0.0, -0.4, -0.5]])
    wanted = costs.copy()
    wanted[0, 0] += 0.1 * (-0.6 - 0.1)
    wanted[1, 1] += 0.1 * (-0.9 - 0.5)
    assert with_context(costs) == pytest.approx(wanted), "-0.5 itself gets no bonus"
