"""What pages cost, how they are dealt out, and what is chosen for GPUs that nobody has here."""

import random
from types import SimpleNamespace

import pytest
import torch
from conftest import make_processor

from training import memory_fit, memory_plan, page_costs, zero3
from training.families import family_of
from training.prompt_and_mask import PageEncoder
from training.settings import PageSettings


@pytest.fixture(scope="module")
def processor():
    return make_processor()


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


def shapes_of_3b():
    from transformers import Qwen2_5_VLConfig

    text = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
    text |= {"num_key_value_heads": 2, "vocab_size": 151_936}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
    vision |= {"fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)


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


@pytest.mark.parametrize(
    ("share", "threshold", "whole"), [(1.0, "auto", True), (1.0, 100_000, False), (0.3, "auto", False)]
)
def test_weights_are_gathered_once_per_step_where_they_fit(share, threshold, whole, processor, monkeypatch):
    """Two H200s of which torch may use a share. No GPU here, so what torch says of one is given; the plan is real."""
    import datasets

    cuda = {"get_device_properties": SimpleNamespace(total_memory=140 * 2**30), "get_device_name": "NVIDIA H200"}
    for name, answer in (cuda | {"get_per_process_memory_fraction": share}).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    monkeypatch.setattr(memory_fit, "world_size", lambda: 2)
    zero = {"stage": 3, zero3.THRESHOLD: threshold}
    args = SimpleNamespace(
        device=torch.device("cuda"),
        deepspeed="ds_z3.json",
        activation_checkpointing=True,
        hf_deepspeed_config=SimpleNamespace(config={"zero_optimization": zero}),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
    )
    pages = datasets.Dataset.from_dict({"html_tokens": [2_000] * 20, "image_tokens": [1_200] * 20})
    encoder = PageEncoder(processor, "Write the page.", family_of("qwen2_5_vl"))
    plan = memory_fit.choose_micro_batch(args, PageSettings(), shapes_of_3b(), pages, encoder)
    assert plan.way.whole == whole
    assert zero[zero3.THRESHOLD] == (10**11 if whole else threshold)
    assert plan.total_gib <= memory_plan.MEMORY_SHARE * share * 140
    assert plan.parts_gib["gathered"] == pytest.approx(7.0 if whole else 1.86, rel=0.02)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 8
