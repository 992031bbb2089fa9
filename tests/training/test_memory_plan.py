"""How much memory a way of training takes, and which ways come first."""

from dataclasses import replace

import pytest
from conftest import shapes_of_3b

from families import family_of
from families.page_costs import Shape, Tower
from training import memory_plan
from training.memory_plan import Hardware, Load, Way, candidates, estimate, step_seconds, work_of

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
    lion, sgd = (memory_plan.state(SHAPE, Way(moments=moments, eight_bit=True))["optimizer"] for moments in (1, 0))
    assert (lion / weights, sgd / weights) == pytest.approx((4 + 1 + 4 / 256, 4))
    for kind in ({}, {"eight_bit": True}):  # of the fp32 copy the lower halves alone
        both = [memory_plan.state(SHAPE, Way(processes=4, split=split, **kind)) for split in (False, True)]
        assert both[0].pop("optimizer") - both[1].pop("optimizer") == pytest.approx(2 * weights / 4)
        assert both[0] == both[1]
    cast = estimate(SHAPE, PAGE, Way(processes=1, fp8=True)).parts_gib["gathered"]
    assert cast == pytest.approx(memory_plan.weights_of(SHAPE)[0] / 2**30), "a byte for each weight that is kept in fp8"


@pytest.mark.parametrize(
    ("smaller", "part"),
    [
        ({"recomputed": 1.0}, "activations"),
        ({"recomputed_vision": 1.0}, "activations"),
        ({"offloaded": 0.5}, "activations"),
        ({"eight_bit": True}, "optimizer"),
        ({"split": True}, "optimizer"),
        ({"frozen_vision": True}, "activations"),
        ({"adapters": True}, "optimizer"),
        ({"offload": True}, "optimizer"),
        ({"fused": True}, "head"),
    ],
)
def test_every_saving_saves(smaller, part):
    way = Way(processes=2, recomputed=0.0, recomputed_vision=0.0, fused=False)
    assert estimate(SHAPE, PAGE, replace(way, **smaller)).parts_gib[part] < estimate(SHAPE, PAGE, way).parts_gib[part]


def test_more_pages_take_more_and_logits_never_more_than_their_rows():
    one, two = (estimate(SHAPE, PAGE.times(count), Way()) for count in (1, 2))
    assert two.parts_gib["activations"] == pytest.approx(2 * one.parts_gib["activations"])
    long, longer = (memory_plan.head(SHAPE, Load(9_000, 0, rows), Way()) for rows in (4_000, 8_000))
    assert longer - long == 4_000 * 4 * SHAPE.language.hidden, "only the states grow"


# -----------------------------------------------------------------------------
# Which layers keep their activations


@pytest.mark.parametrize(("recomputed", "offloaded"), [(0, 0), (5, 0), (12, 0), (0, 4), (3, 4), (7, 5), (0, 12)])
def test_layers_are_treated_in_the_numbers_planned_and_the_last_ones_kept(recomputed, offloaded):
    ways = memory_plan.layer_ways(12, recomputed, offloaded)
    assert [ways.count("recomputed"), ways.count("offloaded")] == [recomputed, offloaded]
    rest = [way for way in ways if way != "offloaded"]
    assert rest == sorted(rest, reverse=True), "those that are kept come last"
    assert ways[0] == "offloaded" or not offloaded
    with pytest.raises(ValueError, match="7 layers recomputed and 6 offloaded are more than 12"):
        memory_plan.layer_ways(12, 7, 6)


MEAN, LONGEST = Load(tokens=3_500, patches=5_000, supervised=2_200), Load(tokens=4_400, patches=5_120, supervised=3_100)


def chosen(gib: float, processes: int = 1, **options) -> memory_plan.MemoryPlan:
    """The first candidate that fits, for pages like those of the benchmarks; `options` are of Hardware or of Way, or
    fix a share."""
    fixed = {name: options.pop(name) for name in ("recomputed", "offloaded") if name in options}
    hardware = {name: options.pop(name) for name in ("link_gb_s", "pinned_gib") if name in options}
    way = Way(processes=processes, **options)
    ways = candidates(SHAPE, way, 8, MEAN, LONGEST.times, Hardware(gib, 989, **hardware), **fixed)
    return next(p for p in (estimate(SHAPE, LONGEST.times(way.micro_batch), way) for way in ways) if p.total_gib <= gib)


def seconds(way: Way, shape=SHAPE, link_gb_s: float = 0.0) -> float:
    return step_seconds(way, 8, work_of(shape, way, MEAN, 989), sum(memory_plan.weights_of(shape)), link_gb_s)


def test_more_memory_is_never_slower_and_with_enough_everything_is_kept():
    times = [seconds(chosen(gib, link_gb_s=25).way, link_gb_s=25) for gib in (66, 75, 90, 110, 140, 200)]
    assert times == sorted(times, reverse=True) and times[0] > times[-1]
    way = chosen(1_000, link_gb_s=25).way
    assert (way.recomputed, way.recomputed_vision, way.offloaded) == (0, 0, 0)


def test_as_much_waits_in_the_cpus_memory_as_its_link_and_its_size_allow():
    """And none of it makes a layer wait, unless a share that was typed does."""
    slow, fast = chosen(75, link_gb_s=25), chosen(75, link_gb_s=50)
    assert 0 < slow.way.offloaded < fast.way.offloaded
    for plan, link in ((slow, 25), (fast, 50)):
        assert seconds(plan.way, link_gb_s=link) == seconds(plan.way, link_gb_s=1e9)
    small = chosen(75, link_gb_s=50, pinned_gib=fast.pinned_gib / 2)
    assert small.pinned_gib <= fast.pinned_gib / 2
    assert chosen(75).way.offloaded == chosen(75, link_gb_s=50, offload=True, processes=2).way.offloaded == 0
    typed = chosen(75, link_gb_s=25, offloaded=0.5)
    assert typed.way.offloaded == 0.5
    assert seconds(typed.way, link_gb_s=25) > seconds(typed.way, link_gb_s=100)


def test_the_tower_that_saves_more_for_its_time_is_recomputed_first():
    assert chosen(90).way.recomputed_vision == 1 > chosen(90).way.recomputed
    assert chosen(90, frozen_vision=True).way.recomputed_vision == 0, "which would save nothing"
    typed = chosen(75, recomputed=0.75)
    assert (typed.way.recomputed, typed.way.recomputed_vision) == (0.75, 0.75)


def test_times_stand_to_each_other_as_those_measured():
    """Within a tenth: 3B on an H200, 4 x 2 pages, all recomputed with their last products, and none; Qwen3-VL-4B's
    shapes on an H100, all recomputed, 2 x 4 pages and 4 x 2 (benchmarks/README.md)."""
    kept = Way(micro_batch=4, recomputed=0, recomputed_vision=0, whole=True)
    assert seconds(replace(kept, recomputed=1, recomputed_vision=1)) / seconds(kept) == pytest.approx(2.4 / 1.8, 0.1)
    text = Tower(36, 2560, 4096, 1024, 9728, normed_heads=True)
    vision = Tower(24, 1024, 1024, 1024, 4096, gated=False)
    shape = Shape(text, 151_936, True, vision, patch=1536, per_token=4, merger=4096 * 6656, mergers=4)
    two, four = (seconds(Way(micro_batch=size, whole=True), shape) for size in (2, 4))
    assert two / four == pytest.approx(2.63 / 2.31, 0.1)


def test_candidates_are_all_that_may_be_chosen_the_fastest_first():
    hardware = Hardware(75, 989)
    ways = candidates(SHAPE, Way(processes=2), 8, MEAN, LONGEST.times, hardware)
    assert len(ways) == len(set(ways)) == 4 * (1 + 32 + 36) * 2
    assert {way.micro_batch for way in ways} == {1, 2, 4, 8}
    assert ways[0].recomputed == ways[0].recomputed_vision == 0
    few = candidates(SHAPE, Way(), 8, MEAN, LONGEST.times, hardware, sizes=(2,), recomputed=0.5, whole=(False,))
    assert few == [Way(micro_batch=2, recomputed=0.5, recomputed_vision=0.5)]


def test_the_table_names_remedies_that_are_not_taken_yet():
    lines = memory_plan.table([(1, 24, None)], Way(adapters=True, offload=True)).splitlines()
    assert lines[2].startswith("   1      24  does not fit 24 GiB")
    assert "more GPUs" in lines[2] and "--" not in lines[2].split("more GPUs")[1]
    assert memory_plan.remedy(Way(), 24).endswith(
        "--freeze_vision, --lora, --optim adamw_8bit, --deepspeed ds_z3_offload.json"
    )
    refused_beside = memory_plan.remedy(Way(fp8=True, eight_bit=True), 24)
    assert refused_beside.endswith("no --fp8, --deepspeed ds_z3_offload.json instead of moments in 8 bits")
    assert "adamw_8bit" not in memory_plan.remedy(Way(moments=1, eight_bit=True), 24), "it would take more"


def test_without_zero_embeddings_keep_their_moments_in_fp32():
    """transformers 5.23 has bitsandbytes leave them so."""
    language, vision, embedding = memory_plan.weights_of(SHAPE)
    optimizer = memory_plan.state(SHAPE, Way(sharded=False, eight_bit=True))["optimizer"]
    wide = embedding / (1 if SHAPE.tied else 2)
    assert optimizer == pytest.approx(2.03125 * (language + vision + embedding - wide) + 8 * wide)


def test_an_optimizer_without_moments_has_none_to_make():
    plan = memory_plan.estimate(SHAPE, PAGE, Way(sharded=False, moments=0))
    assert plan.parts_gib["optimizer"] == memory_plan.moments_gib(plan) == 0


def test_a_run_that_goes_on_has_room_for_its_whole_masters():
    """DeepSpeed reads them beside the moments before they are split, when there are no activations."""
    small, split = Load(10, 10, 5), Way(processes=4, split=True, eight_bit=True)
    whole = sum(memory_plan.state(SHAPE, replace(split, split=False)).values()) / memory_plan.GIB
    assert memory_plan.estimate(SHAPE, small, split).total_gib == pytest.approx(whole)
    alike = memory_plan.estimate(SHAPE, Load(80_000, 80_000, 40_000), split).parts_gib["activations"]
    without = memory_plan.estimate(SHAPE, Load(80_000, 80_000, 40_000), replace(split, split=False))
    assert alike == without.parts_gib["activations"]  # which are more than that
    plan = memory_plan.estimate(SHAPE, small, split)
    assert 0 < memory_plan.moments_gib(plan) < plan.parts_gib["optimizer"]
