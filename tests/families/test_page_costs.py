"""What pages cost, and how they are dealt out."""

import random

import pytest
from conftest import shapes_of_3b

from families import family_of, page_costs


def test_pages_are_dealt_out_by_cost():
    rng, dealt, blind = random.Random(0), 0.0, 0.0
    for bins in (2, 3, 8) * 20:
        costs = [rng.lognormvariate(0, 0.8) for _ in range(24)]
        groups = page_costs.deal(costs, bins)
        assert sorted(place for group in groups for place in group) == list(range(24))
        assert {len(group) for group in groups} == {24 // bins}
        sums = [sum(costs[place] for place in group) for group in groups]
        assert sums == sorted(sums, reverse=True)
        dealt += max(sums)  # all ranks wait for the dearest group
        blind += max(sum(costs[start::bins]) for start in range(bins))
    assert dealt < 0.85 * blind
    assert [len(group) for group in page_costs.deal([1.0] * 7, 3)] == [3, 2, 2]


def test_cost_of_a_page_is_the_published_formula():
    """Holo1-3B: 2.775e9 weights in the language layers, 3.11e8 in the head, 0.63e9 in the vision tower."""
    shape = family_of("qwen2_5_vl").shape(shapes_of_3b())
    language, head, tower, merger = page_costs.parameters(shape)
    assert (language, head) == (pytest.approx(2.775e9, rel=2e-3), pytest.approx(3.11e8, rel=2e-3))
    assert tower == pytest.approx(0.63e9, rel=0.02) and merger == pytest.approx(3.67e7, rel=0.01)
    tokens, supervised, patches = 2_800, 1_500, 5_000
    products = 6 * (2.775e9 * tokens + 3.11e8 * supervised) + 6 * 0.63e9 * patches
    attention = 12 * 36 * 2048 * tokens**2 / 2 + 12 * 1280 * patches * (4 * patches + 28 * 64)
    assert page_costs.page_flops(shape, tokens, supervised, patches) == pytest.approx(products + attention, rel=0.02)


def test_the_cost_of_pages_is_that_of_their_counted_tokens():
    shape = family_of("qwen2_5_vl").shape(shapes_of_3b())
    counted = [{"html_tokens": 100, "image_tokens": 50}, {"html_tokens": 7, "image_tokens": 9}]
    assert page_costs.flops_of_pages(shape, counted, question=20) == [
        page_costs.page_flops(shape, 171, 101, 200),
        page_costs.page_flops(shape, 37, 8, 36),
    ]


def test_the_peak_of_a_device_is_found_by_its_own_name():
    assert page_costs.peak_tflops("NVIDIA H100 PCIe") == 756
    assert page_costs.peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert page_costs.peak_tflops("NVIDIA A10G") is None
    assert page_costs.page_seconds(8e13, None) == pytest.approx(8e13 / 0.5 / 989e12)
