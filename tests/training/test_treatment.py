"""Each batch is treated by its own size, and learns the same to the bit whatever becomes of its layers."""

import random
from dataclasses import replace

import conftest
import pytest
import torch
from test_activation_offload import CPU, FAST, check_equal, layers_of, learned, tiny_of, trained

import holo1_dom_finetune as pipeline
from families import family_of
from training import activation_offload, treatment
from training.memory_plan import Hardware, Load, MemoryPlan, Rungs, Way, candidates, estimate, held
from training.settings import PageSettings
from training.treatment import Batches, Treatment, load_of


def shares(recomputed: float, recomputed_vision: float, offloaded: float) -> Way:
    return Way(recomputed=recomputed, recomputed_vision=recomputed_vision, offloaded=offloaded)


# Of six layers and two blocks, the fastest first; the first keeps all, and the last is the longest batch's.
WAYS = [
    shares(0, 0, 0),
    shares(0, 0, 1 / 6),
    shares(0, 0, 2 / 6),
    shares(0, 0.5, 2 / 6),
    shares(2 / 6, 1, 2 / 6),
    shares(4 / 6, 1, 2 / 6),
]


def plan_of(tiny: conftest.Tiny, batches: list[dict], adapters: bool = False) -> MemoryPlan:
    """The longest of these batches just fits by the last way; those that are shorter get others."""
    shape = family_of(tiny.name).shape(tiny.config)
    ways = [replace(way, adapters=adapters) for way in WAYS]
    plan = estimate(shape, max(map(load_of, batches), key=lambda load: load.tokens), ways[-1])
    return replace(plan, rungs=Rungs(shape, ways, plan.total_gib))


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("name", FAST)
def test_batches_treated_by_their_size_learn_the_same_to_the_bit(name, adapters, monkeypatch):
    """From the shortest to the longest and back, so that layers change between all three ways, in both directions."""
    monkeypatch.setattr(activation_offload, "CHUNK_BYTES", 5_120)
    tiny = tiny_of(name)
    model = trained(tiny, adapters)
    packed = [tiny.collate(tiny.pages(count, seed=count), packed=True) for count in (1, 2, 3, 4, 5)]
    Treatment(model, WAYS[0])
    wanted = [learned(model, model(**batch).loss) for batch in packed]
    plan, seen = plan_of(tiny, packed, adapters), []
    batches = Batches(Treatment(model, plan.way), plan)
    for number in (0, 4, 1, 3, 2, 4, 0, 0):
        planned = batches.treat(packed[number])
        assert planned <= batches.rungs.limit_gib * (1 + 1e-9)
        check_equal(learned(model, model(**packed[number]).loss), wanted[number])
        seen.append(batches.way)
    assert len(set(seen)) >= 3 and seen[0] != seen[1] == plan.way == seen[5] != seen[6], seen
    assert not batches.treatment.offload.memory.living
    assert batches.highest.total_gib == max(batches.rungs.plan_for(load_of(batch)).total_gib for batch in packed)
    assert batches.fills, "the shortest, which was the last"


def test_layers_are_treated_as_the_way_has_it_each_time():
    model = trained(tiny_of("qwen3_vl"))
    own = Treatment(model, shares(0.5, 1, 0.5))
    layers, blocks = layers_of(model), own.vision
    for way in (shares(0.5, 1, 0.5), shares(0, 0, 0), shares(1, 0.5, 0), shares(0, 1, 1 / 6), shares(0, 0, 0)):
        own.set(way)
        again, away = round(6 * way.recomputed), round(6 * way.offloaded)
        assert sum(layer.gradient_checkpointing for layer in layers) == again
        assert sum(own.offload.chosen) == away
        assert not any(layer.gradient_checkpointing and gone for layer, gone in zip(layers, own.offload.chosen))
        assert sum(block.gradient_checkpointing for block in blocks) == int(len(blocks) * way.recomputed_vision)
    keeps = Treatment(trained(tiny_of("qwen3_vl")), shares(0.5, 0, 0), recomputes=False)
    assert not any(layer.gradient_checkpointing for layer in keeps.text), "as the Trainer was told"
    with pytest.raises(ValueError, match="17% of the layers are to wait in the CPU's memory, and nothing moves them"):
        keeps.set(shares(0, 0, 1 / 6))


def planned_right(batches: Batches, tiny: conftest.Tiny, pages: list[dict]) -> None:
    """What a batch is treated by fits it, counted from its pages and not from what is made of them."""
    batch = tiny.collate(pages, packed=True)
    planned = batches.treat(batch)
    rows = [tiny.collate([page]) for page in pages]
    own = Load(
        tokens=sum(row["input_ids"].numel() for row in rows),
        patches=sum(int(row["image_grid_thw"].prod()) for row in rows),
        supervised=sum(int(row["labels"].ne(-100).sum()) for row in rows),
    )
    assert planned == batches.rungs.plan_of(own, batches.way).total_gib <= batches.rungs.limit_gib * (1 + 1e-9)


@pytest.mark.parametrize("fault", [None, "half", "one page"])
def test_a_choice_for_less_than_the_batch_would_be_noticed(fault, monkeypatch):
    tiny = tiny_of("qwen2_5_vl")
    pages = tiny.pages(4, seed=1)
    plan = plan_of(tiny, [tiny.collate(pages, packed=True)])
    batches = Batches(Treatment(trained(tiny), plan.way), plan)
    if fault == "half":
        monkeypatch.setattr(treatment, "load_of", lambda inputs: load_of(inputs).times(0.5))
    elif fault:
        one = load_of(tiny.collate(pages[:1], packed=True))
        monkeypatch.setattr(treatment, "load_of", lambda inputs: one)
    for chosen in (pages, pages[:2]):
        if fault:
            with pytest.raises(AssertionError):
                planned_right(batches, tiny, chosen)
        else:
            planned_right(batches, tiny, chosen)


def test_the_size_of_a_batch_is_read_without_asking_the_gpu():
    """On a device that has no values to give, as a GPU that is busy has none yet."""
    sizes = {"input_ids": (1, 700), "pixel_values": (900, 8), "targets": (300,)}
    assert load_of({name: torch.empty(size, device="meta") for name, size in sizes.items()}) == Load(700, 900, 300)


def test_a_proof_that_measured_more_than_planned_leaves_that_much_free():
    shape = family_of("qwen2_5_vl").shape(conftest.shapes_of_3b())
    ways = [shares(n / 36, 1, 0) for n in range(25)]
    longest = Load(17_000, 20_480, 12_000)
    rungs = Rungs(shape, ways, estimate(shape, longest, ways[-1]).total_gib)
    plan = MemoryPlan(ways[-1], {}, rungs=rungs)
    own, load = Treatment(torch.nn.Linear(1, 1), Way()), Load(12_000, 16_000, 8_000)
    less, same, more = (Batches(own, plan, excess).rungs.plan_for(load) for excess in (2.0, 0.0, -2.0))
    assert less.way.recomputed > same.way.recomputed and less.total_gib <= rungs.limit_gib - 2
    assert more.way == same.way, "what was measured to be less gives nothing out"


@pytest.mark.parametrize("options", [{}, {"adapters": True}, {"frozen_vision": True}, {"fp8": True}, {"processes": 2}])
def test_each_size_gets_the_fastest_way_that_fits(options):
    """By brute force: all candidates in their order, each estimated whole."""
    shape, rng = family_of("qwen2_5_vl").shape(conftest.shapes_of_3b()), random.Random(0)
    page, longest = Load(3_600, 4_972, 2_300), Load(5_423, 5_120, 4_093)
    first = Way(processes=2, whole=True, **{"sharded": True} | {k: v for k, v in options.items() if k != "processes"})
    ways = candidates(shape, first, 8, page, longest.times, Hardware(75, 989, 45), sizes=(4,), whole=(True,))
    found = set()
    for _ in range(60):
        limit = rng.uniform(40, 90)
        rungs = Rungs(shape, ways, limit, pinned_gib := rng.choice([0.0, 4.0, 100.0]), bucket=10**8)
        for _ in range(10):
            part = rng.uniform(0.05, 1)
            load = Load(*(int(part * rng.uniform(0.8, 1) * size) for size in (21_692, 20_480, 16_372)))
            plans = [estimate(shape, load, way, 10**8) for way in ways]
            fitting = [p for p in plans if p.total_gib <= limit and p.pinned_gib <= pinned_gib]
            assert rungs.plan_for(load) == (fitting or plans[-1:])[0]
            found.add(rungs.plan_for(load).way)
    assert len(found) > 20
    assert held((1.0, 2.0, 5.0), Load(3, 4, 0)) == 20 and held((1.0, 2.0, 3.0), Load(3, 4, 0)) == 12


def test_frozen_towers_are_spared_once_and_stay_so():
    tiny = tiny_of("qwen2_5_vl")
    model = tiny.model()
    model.model.visual.requires_grad_(False)
    model = pipeline.add_adapters(model, PageSettings(lora=True), seed=0)
    model.activation_checkpointing_enable()
    own = Treatment(model, shares(1, 0, 0), device=CPU)
    own.set(shares(0, 0, 0))
    patches = next(part for name, part in model.named_modules() if name.endswith("visual.patch_embed"))
    assert not patches(torch.randn(4, patches.proj.weight[0].numel())).requires_grad
