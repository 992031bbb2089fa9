"""What fits: one decision for --plan and for training, and a restart only where nobody typed a batch size."""

import contextlib
import io
import json
import math
import os
import re
import sys
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import conftest
import datasets
import pytest
import torch
from conftest import GATHERED, PROGRAMS, ROOT, make_processor, output, small_run, start_torchrun, start_zero_3, weights

import holo1_dom_finetune as pipeline
from families import family_of
from kernels import attention
from training import memory_fit, zero3
from training.checkpoints import RESTARTED
from training.errors import SettingsError
from training.memory_plan import (
    FILLED_SHARE,
    MEMORY_SHARE,
    NCCL_GIB,
    Hardware,
    Load,
    MemoryPlan,
    Way,
    activation_rates,
    plannable_gib,
)
from training.prompt_and_mask import PageEncoder
from training.run_record import ADDED, write_record
from training.settings import PageSettings, resolve
from training.treatment import Treatment


@pytest.fixture(scope="module")
def shapes_of_3b():
    return conftest.shapes_of_3b()


@pytest.fixture(scope="module")
def base(shapes_of_3b, tmp_path_factory):
    """A folder with the configuration of 3B, which is all that --plan reads."""
    folder = tmp_path_factory.mktemp("shapes_of_3b")
    shapes_of_3b.save_pretrained(folder)
    return folder


ZERO_3 = ["--deepspeed", str(ROOT / "ds_z3.json")]


@cache
def plan_of(base, *flags: str) -> str:
    """What --plan prints; asked for once, since each answer takes half a second."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        pipeline.run(["--plan", "--base_model", str(base), *flags])
    return printed.getvalue()


def rows_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()[:1].isdigit() and "does not fit" not in line]


def test_the_layers_of_each_tower_are_treated_as_the_plan_has_it():
    """Told apart by where they stand. Of Qwen3.5's two kinds of attention those recomputed come as they stand, so that
    neither is spared."""
    from transformers import Qwen3_5ForConditionalGeneration

    config = conftest.make_qwen3_5_config(conftest.make_tokenizer())
    config.text_config.layer_types = [*["linear_attention"] * 3, "full_attention"] * 2
    config.text_config.num_hidden_layers = 8
    model = Qwen3_5ForConditionalGeneration(config)
    blocks, layers = model.model.visual.blocks, model.model.language_model.layers
    for share, share_of_vision in ((0.5, 1.0), (1.0, 0.0), (0.25, 0.5)):
        Treatment(model, Way(recomputed=share, recomputed_vision=share_of_vision))
        assert [layer.gradient_checkpointing for layer in layers] == [n < 8 * share for n in range(8)]
        assert sum(block.gradient_checkpointing for block in blocks) == int(len(blocks) * share_of_vision)


@pytest.mark.parametrize("learns", [True, False])
def test_a_tower_that_learns_nothing_has_no_backward_pass(learns):
    """With activation checkpointing transformers would give it one, which kept what adapters were not planned for."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration(conftest.make_config(conftest.make_tokenizer()))
    model.model.visual.requires_grad_(learns)
    if not learns:
        model = pipeline.add_adapters(model, PageSettings(lora=True), seed=0)
    model.activation_checkpointing_enable()
    Treatment(model, Way())
    patches = next(part for name, part in model.named_modules() if name.endswith("visual.patch_embed"))
    embedded = model.get_input_embeddings()(torch.tensor([1]))
    assert embedded.requires_grad and patches(torch.randn(4, patches.proj.weight[0].numel())).requires_grad == learns


@pytest.mark.slow
def test_the_plan_obeys_a_typed_batch_size(base):
    assert {row[2] for row in rows_of(plan_of(base, *ZERO_3))} != {"2"}
    typed = [rows_of(plan_of(base, *ZERO_3, *flags)) for flags in (["--micro_batch", "2"], ["--micro_batch=2"])]
    assert typed[0] == typed[1]
    assert {row[2] for row in typed[0]} == {"2"}
    older = rows_of(plan_of(base, *ZERO_3, "--per_device_train_batch_size", "2"))
    assert {row[2] for row in older} == {"2"}


def test_the_plan_obeys_a_typed_share_of_recomputed_layers(base):
    assert len({row[3] for row in rows_of(plan_of(base, *ZERO_3))}) > 1
    typed = rows_of(plan_of(base, *ZERO_3, "--checkpoint_share", "0.5"))
    assert {(row[3], row[4]) for row in typed} == {("50%", "50%")}


def test_the_plan_says_that_the_plain_path_is_not_planned(base):
    fast, plain = plan_of(base, *ZERO_3), plan_of(base, *ZERO_3, "--fast", "False")
    assert "the plain path (--fast False) is not planned: it takes 1 page at once" in plain
    assert "100% of the layers recomputed" in plain
    assert "activations  head" in fast and "activations  head" not in plain
    weights = {(row[0], row[7]) for row in rows_of(fast)}
    assert {(row[0], row[1]) for row in rows_of(plain)} == weights, "what no page changes is the same on both paths"


@pytest.mark.parametrize(("family", "tokens"), [("qwen2_5_vl", "1,280"), ("qwen3_vl", "980")])
def test_the_plan_counts_the_image_tokens_of_the_models_own_family(family, tokens, base, tmp_path):
    """And it plans pages, as every family with a fast path is planned."""
    if family == "qwen3_vl":
        from transformers import Qwen3VLConfig

        base = tmp_path / "base"
        text = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024}
        Qwen3VLConfig(text_config=text, vision_config={"depth": 2, "deepstack_visual_indexes": [1]}).save_pretrained(
            base
        )
    text = plan_of(base, *ZERO_3)
    assert f"most {tokens} image tokens" in " ".join(text.split())
    assert "activations  head" in text


def test_the_plan_says_which_model_has_no_fast_path(base, monkeypatch):
    monkeypatch.setattr(memory_fit, "trains_fast", lambda config, settings: False)
    assert "the plain path (this model has no fast path) is not planned" in plan_of(base, *ZERO_3, "--seed", "7")


def test_the_plan_says_what_there_is_without_deepspeed_and_what_it_does_not_know(base):
    """There is no GPU here, but the plan is of one: training would have 4 bits there."""
    text = " ".join(plan_of(base, "--optim", "lion_8bit").split())
    assert "GiB on each GPU without DeepSpeed, the base in 4 bits:" in text
    assert "--optim lion_8bit is not planned" not in text


def test_an_optimizer_is_counted_as_what_it_keeps_and_one_nobody_knows_is_told(base, shapes_of_3b, monkeypatch):
    resolved = resolve(["--plan", *ZERO_3, "--optim", "lion_8bit"])
    scope = memory_fit.scope_of(resolved.settings, resolved.training, resolved.deepspeed, shapes_of_3b)
    assert (scope.way.moments, scope.way.eight_bit, scope.way.split) == (1, True, False)
    monkeypatch.setattr("training.training_arguments.installed", lambda package: True)
    assert "--optim grokadamw is not planned" in " ".join(plan_of(base, "--optim", "grokadamw").split())


# -----------------------------------------------------------------------------
# Training decides as the plan does


def on_gpus(
    monkeypatch,
    gib: float,
    processes: int,
    name: str = "NVIDIA H100",
    share: float = 1.0,
    kernel: str = attention.FLASH_4,
) -> None:
    """No GPU here, so what torch says of one is given; the decision is real."""
    cuda = {"get_device_properties": SimpleNamespace(total_memory=gib * 2**30), "get_device_name": name}
    for function, answer in (cuda | {"get_per_process_memory_fraction": share}).items():
        monkeypatch.setattr(torch.cuda, function, lambda device, answer=answer: answer)
    monkeypatch.setattr(memory_fit, "attention_kernel", lambda device, half: kernel)
    monkeypatch.setattr(memory_fit, "world_size", lambda: processes)
    monkeypatch.setattr(memory_fit, "link_rate", lambda device: memory_fit.LINK_GB_S)
    monkeypatch.setattr(memory_fit, "pinnable_gib", lambda: math.inf)


@pytest.mark.parametrize("processes", [1, 2, 8])
@pytest.mark.parametrize("gib", [40, 80])
@pytest.mark.parametrize("flags", [[], ["--micro_batch", "4"], ["--checkpoint_share", "0.5"], ["--freeze_vision"]])
def test_training_chooses_what_the_plan_prints(flags, gib, processes, shapes_of_3b, monkeypatch, capsys):
    """The pages of the training are at the limits that the plan is made for, so both must come to the same."""
    family, encoder = family_of(shapes_of_3b), PageEncoder(make_processor(), "Write the page.", family_of(shapes_of_3b))
    resolved = resolve(["--plan", *ZERO_3, *flags])
    settings, image = resolved.settings, family.most_image_tokens(shapes_of_3b, resolved.settings.max_pixels)
    html = settings.max_html_tokens
    # a question of as many tokens as the plan assumes
    missing = memory_fit.QUESTION_TOKENS - encoder.question_tokens
    encoder.question_tokens += missing
    pages = datasets.Dataset.from_dict({"html_tokens": [html] * 9, "image_tokens": [image] * 9})
    on_gpus(monkeypatch, gib, processes)
    config = SimpleNamespace(config=resolved.deepspeed)
    named = ("per_device_train_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "deepspeed")
    args = SimpleNamespace(**{name: resolved.training[name] for name in (*named, "optim", "bf16", "fp16")})
    args.device, args.hf_deepspeed_config = torch.device("cuda"), config
    scope = memory_fit.scope_of(settings, resolved.training, resolved.deepspeed, shapes_of_3b)
    page = memory_fit.longest_page(family, shapes_of_3b, image, html + 1)
    hardware = Hardware(plannable_gib(gib, processes), link_gb_s=memory_fit.LINK_GB_S)
    planned = memory_fit.decide(scope, page.times, page, processes, hardware)
    chosen = memory_fit.choose_micro_batch(args, settings, shapes_of_3b, pages, encoder)
    assert chosen == (planned.chosen or planned.smallest)
    assert ("trying all the same" in capsys.readouterr().out) == (planned.chosen is None)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 8


@pytest.mark.parametrize("elsewhere", [False, True], ids=["all ranks alike", "another rank has it"])
@pytest.mark.parametrize("kernel", [attention.FLASH_4, attention.FLASH, attention.VARLEN, attention.SEGMENTS])
def test_wider_heads_are_counted_where_flash_attn_4_will_ask_for_them(kernel, elsewhere, shapes_of_3b, monkeypatch):
    """On any rank, since all have one plan. 16 heads of 80 come to 96, in 4 of 32 layers of the tower."""
    on_gpus(monkeypatch, 80, 2, kernel=kernel)
    monkeypatch.setattr(memory_fit, "agree", lambda own: own or elsewhere)
    resolved = resolve(["--plan", *ZERO_3])
    scope = memory_fit.scope_of(resolved.settings, resolved.training, resolved.deepspeed, shapes_of_3b)
    args = SimpleNamespace(device=torch.device("cuda"), bf16=True)
    found, way = memory_fit.as_attended(scope, args), Way(recomputed_vision=0.0)
    more = activation_rates(scope.shape, way)[2] - activation_rates(found.shape, way)[2]
    counted = kernel == attention.FLASH_4 or elsewhere
    assert more == (0 if counted else pytest.approx(4 * 2 * (4 * 16 * 16 + 1_280)))


@pytest.mark.parametrize("file", ["ds_z3.json", "ds_z3_offload.json"])
def test_a_typed_share_is_offloaded_as_the_link_bears_it_or_refused(file, shapes_of_3b, monkeypatch):
    resolved = resolve(["--plan", "--offload_share", "0.5", "--deepspeed", str(ROOT / file)])
    scope = memory_fit.scope_of(resolved.settings, resolved.training, resolved.deepspeed, shapes_of_3b)
    on_gpus(monkeypatch, 80, 1)
    hardware = memory_fit.hardware_of(torch.device("cuda"), scope)
    assert hardware.link_gb_s == memory_fit.LINK_GB_S
    plan = MemoryPlan(scope.way, {}, pinned_gib=40.0)
    told = memory_fit.link_words(plan, plan, replace(hardware, pinned_gib=30.0))
    assert "40.0 GiB" in told and "no more than 30.0 should be" in told

    def fails(device: torch.device) -> float:
        raise RuntimeError("no memory can be pinned")

    monkeypatch.setattr(memory_fit, "link_rate", fails)
    with pytest.raises(SettingsError, match=r"--offload_share 0\.5: none of the CPU's memory can be pinned"):
        memory_fit.hardware_of(torch.device("cuda"), scope)


def test_candidates_are_ordered_and_the_first_that_fits_is_chosen(shapes_of_3b):
    resolved = resolve(["--plan", *ZERO_3])
    scope = memory_fit.scope_of(resolved.settings, resolved.training, resolved.deepspeed, shapes_of_3b)
    assert scope.sizes == (1, 2, 4, 8)
    load = Load(3_000, 5_000, 1_500)
    roomy = memory_fit.decide(scope, load.times, load, 2, Hardware(math.inf))
    assert roomy.chosen.way is roomy.candidates[0]
    tight = memory_fit.decide(scope, load.times, load, 2, Hardware(roomy.smallest.total_gib))
    assert tight.chosen.total_gib == roomy.smallest.total_gib
    assert memory_fit.decide(scope, load.times, load, 2, Hardware(1.0)).chosen is None


@pytest.mark.parametrize(("processes", "share", "less"), [(1, 1.0, 0), (2, 1.0, NCCL_GIB), (1, 0.3, 0), (2, 0.3, 0)])
def test_several_processes_leave_room_for_what_nccl_takes_outside_of_torch(processes, share, less, monkeypatch):
    """Of a limited GPU, the rest of which torch leaves free, nothing more is left."""
    on_gpus(monkeypatch, 80, processes, share=share)
    assert memory_fit.memory_limit(torch.device("cuda")) == pytest.approx(MEMORY_SHARE * share * 80 - less)


@pytest.mark.parametrize(
    ("share", "threshold", "whole"), [(1.0, "auto", True), (1.0, 100_000, False), (0.25, "auto", False)]
)
def test_weights_are_gathered_once_per_step_where_they_fit(share, threshold, whole, shapes_of_3b, monkeypatch):
    """Two H200s of which torch may use a share. No GPU here, so what torch says of one is given; the plan is real."""
    on_gpus(monkeypatch, 140, 2, "NVIDIA H200", share)
    zero = {"stage": 3, zero3.THRESHOLD: threshold}
    args = SimpleNamespace(
        device=torch.device("cuda"),
        deepspeed="ds_z3.json",
        hf_deepspeed_config=SimpleNamespace(config={"zero_optimization": zero}),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        activation_checkpointing=True,
        bf16=True,
        optim="adamw_torch_fused",
    )
    pages = datasets.Dataset.from_dict({"html_tokens": [2_000] * 20, "image_tokens": [1_200] * 20})
    encoder = PageEncoder(make_processor(), "Write the page.", family_of("qwen2_5_vl"))
    plan = memory_fit.choose_micro_batch(args, PageSettings(), shapes_of_3b, pages, encoder)
    assert plan.way.whole == whole
    assert zero[zero3.THRESHOLD] == (10**11 if whole else threshold)
    assert plan.total_gib <= MEMORY_SHARE * share * 140
    assert plan.parts_gib["gathered"] == pytest.approx(7.0 if whole else 1.86, rel=0.02)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 8


@pytest.mark.parametrize(("pinned", "words"), [(math.inf, "carries 50 GB/s"), (1.0, "no more than 1.0 GiB")])
def test_the_console_says_whether_the_link_or_the_cpus_memory_binds(pinned, words, shapes_of_3b):
    resolved = resolve(["--plan", *ZERO_3])
    scope = memory_fit.scope_of(resolved.settings, resolved.training, resolved.deepspeed, shapes_of_3b)
    load = Load(3_500, 5_000, 1_500)
    hardware = Hardware(75, link_gb_s=50, pinned_gib=pinned)
    plans = [memory_fit.decide(scope, load.times, load, 1, Hardware(75, None, 50, most)) for most in (pinned, math.inf)]
    assert words in memory_fit.link_words(plans[0].chosen, plans[1].chosen, hardware)


# -----------------------------------------------------------------------------
# Batches that differ

MEAN, LONGEST = Load(3_611, 4_972, 2_318), Load(5_423, 5_120, 4_093)  # pages like those of the benchmarks


def decided(shapes_of_3b, *argv: str, gib: float = 75.2, processes: int = 1, **hardware) -> memory_fit.Decision:
    resolved = resolve(["--plan", *ZERO_3, *argv])
    scope = memory_fit.scope_of(resolved.settings, resolved.training, resolved.deepspeed, shapes_of_3b)
    if hardware.pop("by_layers", False):
        scope = replace(scope, whole=(False,))
    told = {"tflops": 989, "link_gb_s": 45} | hardware
    return memory_fit.decide(scope, LONGEST.times, MEAN, processes, Hardware(gib, **told))


@pytest.mark.parametrize(
    ("processes", "gib"), [(1, 75.2), (1, 133), (2, 38), (2, 75.2), (2, 133), (8, 23), (8, 38), (8, 75.2)]
)
def test_pages_at_once_are_chosen_by_the_time_of_the_mean_batch(gib, processes, shapes_of_3b):
    """By brute force over all that may be done with a longest batch that fits."""
    decision = decided(shapes_of_3b, gib=gib, processes=processes)
    ways, best = decision.candidates, None
    for way in ways:  # the fastest first
        group = [other for other in ways if (other.micro_batch, other.whole) == (way.micro_batch, way.whole)]
        fitting = [plan for plan in map(decision.plan_of, group) if plan.total_gib <= gib]
        if not fitting:
            continue
        longest, shape = fitting[0], decision.chosen.rungs.shape
        bucket = decision.chosen.rungs.bucket
        mean = memory_fit.estimate(shape, MEAN.times(way.micro_batch), way, bucket)
        fits = mean.total_gib <= FILLED_SHARE * gib and mean.pinned_gib <= longest.pinned_gib
        if way == longest.way or (fits and not way.by_layers):
            best = (way, longest.way)
            break
    assert (decision.mean.way, decision.chosen.way) == best
    assert decision.chosen.total_gib <= gib and decision.mean.total_gib <= gib
    assert decision.mean.pinned_gib <= decision.chosen.pinned_gib


def test_batches_have_ways_of_their_own_where_a_rank_may_choose_by_itself(shapes_of_3b):
    own = decided(shapes_of_3b)
    rungs, chosen = own.chosen.rungs, own.chosen.way
    assert own.mean.way != chosen == rungs.ways[-1] and len(rungs.ways) > 20
    same = {replace(way, recomputed=0, recomputed_vision=0, offloaded=0) for way in rungs.ways}
    assert len(same) == 1, "they differ in shares alone"
    plans = [rungs.plan_for(MEAN.times(chosen.micro_batch * part)) for part in (0.2, 0.6, 1)]
    assert len({plan.way for plan in plans}) == 3
    assert rungs.plan_for(LONGEST.times(chosen.micro_batch)).way == chosen


@pytest.mark.parametrize("processes", [1, 2])
def test_layers_that_are_gathered_one_by_one_are_treated_alike_in_all_batches(processes, shapes_of_3b):
    """To recompute one asks all ranks for its weights: a rank that did so alone would wait for ever."""
    decision = decided(shapes_of_3b, processes=processes, by_layers=True)
    assert decision.chosen.rungs.ways == [decision.chosen.way] == [decision.mean.way]
    small = decision.chosen.rungs.plan_for(MEAN.times(0.1))
    assert small.way == decision.chosen.way and small.way.recomputed > 0


@pytest.mark.parametrize(
    ("argv", "free"),
    [
        (["--checkpoint_share", "0.5", "--offload_share", "0.25"], ()),
        (["--checkpoint_share", "0.5"], ("offloaded",)),
        (["--activation_checkpointing", "True"], ("offloaded",)),
        (["--offload_share", "0.25"], ("recomputed", "recomputed_vision")),
        (["--fill_memory", "False"], ()),
    ],
    ids=" ".join,
)
def test_what_was_typed_holds_for_every_batch(argv, free, shapes_of_3b):
    rungs = decided(shapes_of_3b, *argv, "--micro_batch", "2").chosen.rungs
    for name in ("recomputed", "recomputed_vision", "offloaded"):
        assert name in free or {getattr(way, name) for way in rungs.ways} == {getattr(rungs.ways[-1], name)}
    if not free:
        assert len(rungs.ways) == 1


def test_the_console_tells_of_the_longest_batch_and_of_the_mean_one(shapes_of_3b):
    decision = decided(shapes_of_3b)
    words = memory_fit.plan_words(decision.chosen, decision.mean, 75.2)
    longest, mean = (memory_fit.way_words(plan) for plan in (decision.chosen, decision.mean))
    assert words.startswith("micro-batch: 4 pages at once, weights stay gathered; the longest batch: recomputed 36%")
    assert f"{longest}, {decision.chosen.total_gib:.1f} GiB planned of 75.2 (weights 7.0, " in words
    assert words.endswith(f"); the mean one: {mean}, {decision.mean.total_gib:.1f} GiB") and longest != mean
    alike = decided(shapes_of_3b, by_layers=True)
    told = memory_fit.plan_words(alike.chosen, alike.mean, 75.2)
    assert "the longest batch" not in told and "the mean one" not in told and "GiB planned of 75.2 (" in told


def test_the_peak_stands_beside_the_highest_plan_of_any_rank(shapes_of_3b, monkeypatch, capsys):
    """Which need not be the longest batch's."""
    decision = decided(shapes_of_3b)
    mean, small = decision.mean, decision.chosen.rungs.plan_for(Load(3_000, 4_000, 2_000))
    assert mean.total_gib > small.total_gib
    monkeypatch.setattr(memory_fit, "gather", lambda own: [own, None, mean])
    trainer = SimpleNamespace(state=SimpleNamespace(log_history=[{"peak_gib": 70.0}, {"peak_gib": 73.0}, {"loss": 1}]))
    memory_fit.compare_with_plan(trainer, SimpleNamespace(highest=small))
    planned = mean.total_gib
    wanted = f"peak: 73.0 GiB measured, {planned:.1f} planned for the fullest batch, {planned / 73 - 1:+.1%}; it had "
    assert wanted + memory_fit.way_words(mean) in capsys.readouterr().out


class Proof:
    """What a proof asks of a trainer, before the first step."""

    def __init__(self, config, deepspeed: str | None):
        self.model = self.model_wrapped = torch.nn.Linear(1, 1)
        self.model.config = config
        self.args = SimpleNamespace(deepspeed=deepspeed, per_device_train_batch_size=4, gradient_accumulation_steps=2)
        self.optimizer = SimpleNamespace(state={})
        state = SimpleNamespace(_set_sync_gradients=lambda flag: None)
        nothing = contextlib.nullcontext()
        self.accelerator = SimpleNamespace(
            gradient_state=state, backward=lambda loss: None, no_sync=lambda model: nothing
        )


def proved(
    monkeypatch, shapes_of_3b, more: list[float | None], deepspeed: str | None = "zero.json"
) -> tuple[float, list, MemoryPlan]:
    """By how much less batches may fill, the (load, way) of each pass, and the plan; `more` GiB were measured than
    planned for each, None being out of memory."""
    plan = decided(shapes_of_3b, "--micro_batch", "4").chosen
    fit, passes, peaks = memory_fit.Fit(plan, None, PageSettings()), [], iter(more)
    trainer, now = Proof(shapes_of_3b, deepspeed), [plan.way]
    counts = [{"html_tokens": 300 * n, "image_tokens": 1_243, "name": str(n)} for n in range(1, 14)]
    encoder = PageEncoder(make_processor(), "Write the page.", family_of(shapes_of_3b))

    def collate(pages: list[dict]) -> dict:
        sums = [sum(part) for part in zip(*memory_fit.page_loads(pages, encoder, plan.rungs.shape))]
        return {"load": Load(*sums)}

    def forward(self, trainer, batch):
        passes.append((batch["load"], now[-1]))
        more = next(peaks)
        if more is None:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        missing = memory_fit.moments_gib(plan) * (not trainer.args.deepspeed)
        peak = plan.rungs.plan_of(batch["load"], now[-1]).total_gib + more - missing
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak * 2**30)
        return torch.zeros(())

    collate.encoder = encoder
    monkeypatch.setattr(memory_fit.Fit, "forward", forward)
    monkeypatch.setattr(memory_fit, "load_of", lambda batch: batch["load"])
    pages = datasets.Dataset.from_list(counts)
    return fit.prove(trainer, collate, pages, SimpleNamespace(set=now.append)), passes, plan


def test_moments_that_are_still_to_come_are_counted():
    """DeepSpeed's inner optimizer makes them in the first step, too, unless masters are split (0.19.8)."""
    for made in ({}, {"moments": 1}):
        inner = SimpleNamespace(state=made)
        sharded = SimpleNamespace(
            args=SimpleNamespace(deepspeed="zero.json"),
            optimizer=SimpleNamespace(state={"of": "the Trainer's wrapper"}),
            model_wrapped=SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner)),
        )
        alone = SimpleNamespace(
            args=SimpleNamespace(deepspeed=None), optimizer=inner, model_wrapped=torch.nn.Linear(1, 1)
        )
        assert memory_fit.has_moments(sharded) == memory_fit.has_moments(alone) == bool(made)


@pytest.mark.parametrize(("more", "excess"), [([1.5, 0.5], 1.5), ([0.5, 2.0], 2.0), ([-1.0, -3.0], 0.0)])
@pytest.mark.parametrize("deepspeed", ["zero.json", None])
def test_the_proof_is_of_the_longest_batch_and_of_the_fullest_one(
    more, excess, deepspeed, shapes_of_3b, monkeypatch, capsys
):
    """And what either takes more than planned no batch may fill; without DeepSpeed moments are still to come."""
    found, passes, plan = proved(monkeypatch, shapes_of_3b, more, deepspeed=deepspeed)
    assert found == pytest.approx(excess, abs=1e-6)
    (longest, way), (fuller, kept) = passes
    assert way == plan.way and longest.tokens > fuller.tokens
    ways = plan.rungs.ways
    assert plan.rungs.plan_for(fuller).way == kept and ways.index(kept) < ways.index(way)
    told = capsys.readouterr().out
    assert "the longest possible batch of 4 pages fits" in told and "and so does one that keeps most" in told
    assert ("more than planned, which is left free" in told) == (excess > 0)


@pytest.mark.parametrize(("more", "filled"), [([None], False), ([0.0, None], True)])
def test_a_proof_that_fails_restarts_by_what_has_failed_and_says_what_that_was(
    more, filled, shapes_of_3b, monkeypatch, capsys
):
    asked, words, grows = [], "1.0 GiB in tensors", "torch's memory does not grow in segments"
    monkeypatch.setattr(memory_fit, "gpu_memory_words", lambda: words)
    monkeypatch.setattr(memory_fit, "segment_words", lambda: grows)

    def restart(self, pages, failure, filled):
        asked.append((pages, filled))
        raise failure

    monkeypatch.setattr(memory_fit.Fit, "restart", restart)
    with pytest.raises(torch.OutOfMemoryError):
        proved(monkeypatch, shapes_of_3b, more)
    assert asked == [(8, filled)]
    which = "one that keeps most" if filled else "the longest batch"
    said = rf"^{grows}$[^$]*memory ran out for {which}, \d+\.\d GiB planned, recomputed \d+% of .*: {words}"
    assert re.search(said, "".join(capsys.readouterr()), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", [True, False], ids=["zero 3", "ddp"])
def test_two_ranks_whose_batches_are_treated_each_by_itself_learn_the_same_to_the_bit(
    deepspeed, exact_base, pages_folder, tmp_path
):
    """Under ZeRO-3, weights gathered once per step, and under DDP, beside a run that keeps everything."""
    rate = {"learning_rate": 1e-2, "max_steps": 4, "num_train_epochs": 4, "gradient_accumulation_steps": 2}
    flags, final, ways = small_run(exact_base, pages_folder, micro_batch=1, **rate), {}, {}
    for kept in ("1", "0"):
        place = tmp_path / kept
        place.mkdir()
        options = {"processes": 2, "script": str(PROGRAMS / "fills_memory.py"), "env": {"KEPT": kept}}
        start = partial(start_zero_3, config=GATHERED) if deepspeed else start_torchrun
        done = start(flags, place, **options)
        assert done.returncode == 0, output(done)
        final[kept] = weights(place / "holo1_dom_finetune_final")
        ways[kept] = [(place / f"ways-{rank}").read_text().splitlines() for rank in (0, 1)]
    assert all(torch.equal(final["0"][name], whole) for name, whole in final["1"].items())
    begun = weights(exact_base)
    assert any(not torch.equal(final["1"][name], before) for name, before in begun.items()), "nothing was learned"
    assert ways["1"] == [["8 0.0 0.0 0.0"]] * 2 and all(len(own) > 1 for own in ways["0"]), ways
    assert "and so does one that keeps most" in done.stdout and "; the mean one: recomputed" in done.stdout


# -----------------------------------------------------------------------------
# Restart


def fit_of(*argv: str, size: int = 4, **shares: float) -> memory_fit.Fit:
    """As resolve() leaves the settings; --plan keeps it from taking `auto` away where there is no GPU."""
    return memory_fit.Fit(MemoryPlan(Way(micro_batch=size, **shares), {}), None, resolve(["--plan", *argv]).settings)


@pytest.mark.parametrize(
    "argv", [["--micro_batch", "4"], ["--micro_batch=4"], ["--per_device_train_batch_size=4"], ["--demo"]], ids=" ".join
)
def test_a_typed_batch_size_that_does_not_fit_ends_the_run(argv, monkeypatch):
    monkeypatch.setattr("os.execv", lambda *command: pytest.fail(f"restarted: {command}"))
    full = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(torch.OutOfMemoryError) as raised:
        fit_of(*argv).restart(8, full)
    assert raised.value is full


@pytest.mark.parametrize("filled", [True, False], ids=["a batch that fills", "the longest"])
def test_what_a_restart_has_added_does_not_stay_with_a_run_that_its_user_resumes(filled, tmp_path, monkeypatch):
    """Two restarts, of which each adds to what the one before it was started with. What the user typed stays."""
    typed = ["--output_dir", str(tmp_path), "--learning_rate", "3e-4", "--micro_batch", "auto"]
    with monkeypatch.context() as inside:
        argv = restarted(inside, typed, size=4, pages=8, filled=filled, recomputed=0.5)
        argv = restarted(inside, argv, size=4, pages=8, filled=filled)
        began = resolve(["--plan", *argv])
        write_record(tmp_path, began.record)
        ours = {"fill_memory": False} if filled else {"checkpoint_share": 1.0, "micro_batch": "2"}
        assert ours.items() <= vars(began.settings).items()
        inside.setenv(ADDED, "3")  # a later start by the wrapper, which resumes with less
        resolved = resolve(["--plan", "--output_dir", str(tmp_path), "--micro_batch", "1", "--resume"])
        assert resolved.settings.micro_batch == "1" and not resolved.problems
        write_record(tmp_path, resolved.record)
    resumed = resolve(["--plan", "--output_dir", str(tmp_path), "--resume"])
    assert not resumed.problems and resumed.training["learning_rate"] == 3e-4
    named = ("fill_memory", "checkpoint_share", "offload_share", "micro_batch")
    assert [getattr(resumed.settings, name) for name in named] == [True, None, None, "auto"]


def restarted(monkeypatch, argv: list[str], size: int, pages: int, filled: bool = False, **shares: float) -> list[str]:
    """The command line that takes over; the test's process stays what it is."""
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", *argv])
    monkeypatch.setattr(os, "environ", {**os.environ})  # what it leaves there goes when the test ends
    started = []
    monkeypatch.setattr("os.execv", lambda program, command: started.append(command[1:]))
    fit_of(*argv, size=size, **shares).restart(pages, None, filled)
    ((script, *again),) = started
    assert script == "train.py" and again[: len(argv)] == argv and os.environ[RESTARTED] == "1"
    return again


def test_a_batch_that_auto_chose_is_halved_whatever_the_command_line_looks_like(monkeypatch):
    """`--micro_batch auto` is typed, too, and is no number."""
    again = restarted(monkeypatch, ["--micro_batch", "auto"], size=4, pages=8)
    assert again == ["--micro_batch", "auto", "--micro_batch", "2", "--checkpoint_share", "1", "--offload_share", "0"]
    with pytest.raises(torch.OutOfMemoryError, match="on another GPU"):
        memory_fit.Fit(MemoryPlan(Way(micro_batch=1), {}), None, PageSettings()).restart(8, None)


@pytest.mark.parametrize(
    ("typed", "size", "shares", "then"),
    [
        ([], 4, {"recomputed": 0.5}, "2"),
        ([], 1, {"recomputed_vision": 0.0}, None),
        (["--micro_batch", "4"], 4, {"recomputed": 0.5}, None),
    ],
)
def test_a_plan_that_kept_some_layers_is_first_tried_with_all_recomputed(typed, size, shares, then, monkeypatch):
    """The same pages; then, unless their number was typed by the user or is one, half as many."""
    again = restarted(monkeypatch, typed, size, 8, **shares)
    shares = ["--checkpoint_share", "1", "--offload_share", "0"]
    assert again == [*typed, "--micro_batch", str(size), *shares]
    if then is None:
        with pytest.raises(torch.OutOfMemoryError, match="on another GPU"):
            fit_of(*again, size=size).restart(8, None)
    else:
        assert restarted(monkeypatch, again, size, 8)[len(again) :] == ["--micro_batch", then]


@pytest.mark.parametrize("typed", [[], ["--micro_batch", "4"], ["--checkpoint_share", "0.5"]], ids=str)
def test_a_plan_that_was_too_bold_for_other_batches_fills_less_and_then_treats_them_as_the_longest(
    typed, shapes_of_3b, monkeypatch, capsys
):
    """Which fits as it is: neither its shares nor the pages at once change, until it fails, too."""
    once = restarted(monkeypatch, typed, size=4, pages=8, filled=True, recomputed=0.5)
    assert once == [*typed, "--micro_batch", "4"]
    assert "restarting with --micro_batch 4, batches filling 90% of the memory planned for" in capsys.readouterr().out
    assert decided(shapes_of_3b, *once, gib=200).chosen.rungs.limit_gib == pytest.approx(180)
    again = restarted(monkeypatch, once, size=4, pages=8, filled=True, recomputed=0.5)
    assert again == [*once, "--micro_batch", "4", "--fill_memory", "False"]
    resolved = resolve(["--plan", *again])
    assert resolved.settings.fill_memory is False and not resolved.problems
    if not typed:
        then = restarted(monkeypatch, again, size=4, pages=8, recomputed=0.5)[len(again) :]
        assert then == ["--micro_batch", "4", "--checkpoint_share", "1", "--offload_share", "0"]


def test_a_restart_is_importing_to_the_wrapper_and_not_silent(monkeypatch, tmp_path):
    monkeypatch.setenv("HOLO1_STATUS_DIR", str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "beat-0").write_text("{}")
    restarted(monkeypatch, [], size=4, pages=8)
    assert not (tmp_path / "beat-0").exists()


@pytest.mark.parametrize(("pages", "size", "smaller"), [(8, 8, 4), (9, 9, 3), (9, 3, 1), (6, 3, 1), (15, 15, 5)])
def test_a_restart_takes_a_size_that_its_settings_accept(pages, size, smaller, monkeypatch):
    argv = ["--gradient_accumulation_steps", str(pages)]
    resolved = resolve(restarted(monkeypatch, argv, size, pages))
    assert resolved.problems == []
    assert resolved.training["per_device_train_batch_size"] == smaller
    assert resolved.training["gradient_accumulation_steps"] == pages // smaller


@pytest.mark.parametrize(
    ("typed", "share"),
    [([], 1.0), (["--checkpoint_share", "0.5"], 0.5), (["--activation_checkpointing", "False"], 0.0)],
    ids=["nothing typed", "share", "none of them"],
)
def test_a_restart_recomputes_all_layers_unless_a_share_was_typed(typed, share, shapes_of_3b, monkeypatch):
    resolved = resolve(["--plan", *restarted(monkeypatch, typed, 8, 8)])
    assert resolved.settings.checkpoint_share == share
    scope = memory_fit.scope_of(resolved.settings, resolved.training, resolved.deepspeed, shapes_of_3b)
    assert (scope.sizes, scope.recomputed) == ((4,), share), (
        "nothing is left to choose, so a second failure ends the run"
    )


@pytest.mark.parametrize(
    ("at_once", "accumulated", "checkpoint", "fills", "wanted"),
    [
        (4, 2, "checkpoint-3", None, {"micro_batch": 2, "resume": True}),
        (6, 1, "checkpoint-best", None, {"micro_batch": 3, "resume": False}),
        (1, 8, "checkpoint-3", None, None),
        (4, 2, "checkpoint-3", True, {"micro_batch": 4, "resume": True, "filled_share": 0.9}),
        (4, 2, "checkpoint-3", False, {"micro_batch": 2, "resume": True, "fill_memory": False}),
        (1, 8, "checkpoint-3", True, {"micro_batch": 1, "resume": True, "filled_share": 0.9}),
        (1, 8, "checkpoint-3", False, None),
    ],
)
def test_full_memory_leaves_what_a_smaller_start_should_ask_for(
    at_once, accumulated, checkpoint, fills, wanted, tmp_path, monkeypatch
):
    """As many pages where a batch had more kept than the longest, which was proved to fit, and less of the memory
    filled, then nothing; else the next smaller number that divides the pages of a step, or nothing where a single page
    was too much. None fills the memory then."""
    (tmp_path / "output" / checkpoint).mkdir(parents=True)
    monkeypatch.setenv("HOLO1_STATUS_DIR", str(tmp_path))
    pages = {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": accumulated}
    batches = None if fills is None else SimpleNamespace(fills=fills)
    args, found = SimpleNamespace(**pages, output_dir=str(tmp_path / "output")), tmp_path / "smaller"
    memory_fit.note_smaller(args, SimpleNamespace(batches=batches))
    assert (json.loads(found.read_text()) if found.exists() else None) == wanted
    if fills:
        monkeypatch.setenv(memory_fit.FILLED, str(wanted.pop("filled_share")))
        memory_fit.note_smaller(args, SimpleNamespace(batches=batches))
        assert json.loads(found.read_text()) == wanted | {"fill_memory": False}
