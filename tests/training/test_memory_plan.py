"""How much memory a way of training takes, and which ways come first."""

from dataclasses import replace

import pytest
from conftest import shapes_of_3b

from families import family_of
from training import memory_plan
from training.memory_plan import Load, Way, candidates, estimate

SHAPE = family_of("qwen2_5_vl").shape(shapes_of_3b())
PAGE = Load(tokens=3_000, patches=5_000, supervised=1_500)


def test_parts_add_up_to_the_state_of_mixed_precision_adam():
    """16 bytes a weight without a GPU to share with: 2 of weight, 2 of gradient, 12 of optimizer (fp32 copy, two
    moments); shared out evenly under ZeRO-3 (Rajbhandari et al. 2020)."""
    weights = sum(memory_plan.weights_of(SHAPE))
    alone = estimate(SHAPE, PAGE, Way(processes=1))
    state = sum(alone.parts_gib[name] for name in ("weights", "gradients", "optimizer"))
    assert state == pytest.approx(16 * weights / 2**30)
    four = estimate(SHAPE, PAGE, Way(processes=4))
    assert four.parts_gib["optimizer"] == pytest.approx(alone.parts_gib["optimizer"] / 4)
    assert alone.total_gib == pytest.approx(sum(alone.parts_gib.values()))
    assert alone.parts_gib["gathered"] == 0 < four.parts_gib["gathered"]


@pytest.mark.parametrize(
    ("smaller", "part"),
    [
        ({"recomputed": 1.0}, "activations"),
        ({"frozen_vision": True}, "activations"),
        ({"adapters": True}, "optimizer"),
        ({"offload": True}, "optimizer"),
        ({"fused": True}, "head"),
    ],
)
def test_every_saving_saves(smaller, part):
    way = Way(processes=2, recomputed=0.0, fused=False)
    assert estimate(SHAPE, PAGE, replace(way, **smaller)).parts_gib[part] < estimate(SHAPE, PAGE, way).parts_gib[part]


def test_more_pages_take_more_and_logits_never_more_than_their_rows():
    one, two = (estimate(SHAPE, PAGE.times(count), Way()) for count in (1, 2))
    assert two.parts_gib["activations"] == pytest.approx(2 * one.parts_gib["activations"])
    long, longer = (memory_plan.head(SHAPE, Load(9_000, 0, rows), Way()) for rows in (4_000, 8_000))
    assert longer - long == 4_000 * 4 * SHAPE.language.hidden, "only the states grow"


def test_candidates_are_all_that_may_be_chosen_the_fastest_first():
    ways = candidates(Way(processes=2), pages=8, seconds=0.2, weights=4e9)
    assert len(ways) == len(set(ways)) == 4 * len(memory_plan.RECOMPUTED_SHARES) * 2
    assert {way.micro_batch for way in ways} == {1, 2, 4, 8}
    assert ways[0].recomputed == 0 and ways[-1].recomputed == 1 and ways[-1].micro_batch == 1
    few = candidates(Way(), 8, 0.2, 4e9, sizes=(2,), shares=(0.5,), whole=(False,))
    assert few == [Way(micro_batch=2, recomputed=0.5)]


def test_the_table_names_remedies_that_are_not_taken_yet():
    lines = memory_plan.table([(1, 24, None)], Way(adapters=True, offload=True)).splitlines()
    assert lines[1].startswith("   1      24  does not fit 24 GiB")
    assert "--freeze_vision" in lines[1] and "--lora" not in lines[1] and "offload" not in lines[1]
