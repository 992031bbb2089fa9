"""The one decision what fits: from the settings and the model's own family, for `--plan` and for training.

    decision = decide(scope_of(settings, training, deepspeed, config), load_of, page_flops, processes, limit_gib)
    memory_plan = choose_micro_batch(args, settings, config, pages, encoder)   # (all ranks) that, for the GPUs at hand
    fit = Fit(memory_plan, plain_loss, settings)                               # proves it before step one
    print_plan(resolved, config, parameters)                                   # that, for GPUs that one might rent

Sections: Decision, Training, Proof, Plan.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from families import Family, family_of, page_costs, trains_fast
from scoring.report_values import plural
from training import fp8_training, zero3
from training.checkpoints import RESTARTED, STAGING, checkpoints_in
from training.errors import PipelineError, is_out_of_memory
from training.heartbeat import heart
from training.memory_plan import (
    MEMORY_SHARE,
    RECOMPUTED_SHARES,
    Load,
    MemoryPlan,
    Way,
    candidates,
    estimate,
    remedy,
    state_table,
    table,
)
from training.processes import agreed_port, in_columns, least, leave_note, say, together, world_size
from training.progress import say_memory
from training.prompt_and_mask import PageEncoder
from training.settings import PageSettings, Resolved

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, Trainer, TrainingArguments

GIB = 2**30
FINISHED_S = 120.0  # in which a checkpoint that was saved is put into its place

# -----------------------------------------------------------------------------
# Decision


@dataclass(frozen=True)
class Scope:
    """What the settings fix, and what they leave to choose from."""

    shape: page_costs.Shape
    way: Way  # as the settings train; its pages at once and its recomputed share are what they are without a choice
    pages: int  # per step and GPU
    sizes: tuple[int, ...]  # pages at once that may be chosen
    shares: tuple[float, ...]  # of the layers, that may be recomputed
    whole: tuple[bool, ...]  # whether weights may be gathered once per step, or by layers
    bucket: int  # weights in one of DeepSpeed's buckets


@dataclass(frozen=True)
class Decision:
    """Every way that the settings allow, the fastest first, and the first of them that fits; None where none does."""

    candidates: list[MemoryPlan]
    chosen: MemoryPlan | None

    @property
    def smallest(self) -> MemoryPlan:
        """The candidate that takes the least memory (GiB), whether or not it fits."""
        return min(self.candidates, key=lambda plan: plan.total_gib)


def scope_of(
    settings: PageSettings, training: Mapping[str, Any], deepspeed: dict | None, config: PretrainedConfig
) -> Scope:
    """Reads `per_device_train_batch_size`, `gradient_accumulation_steps` and `activation_checkpointing` of `training`
    (TrainingArguments by name), and DeepSpeed's configuration, None without it."""
    zero = (deepspeed or {}).get("zero_optimization", {})
    adapters, micro_batch = settings.lora or settings.quantize == "4bit", training["per_device_train_batch_size"]
    pages, share = micro_batch * training["gradient_accumulation_steps"], settings.checkpoint_share
    way = Way(
        micro_batch=micro_batch,
        recomputed=float(training["activation_checkpointing"]) if share is None else share,
        sharded=zero.get("stage") == 3,
        offload=(zero.get("offload_optimizer") or {}).get("device", "none") != "none",
        adapters=adapters,
        four_bit=settings.quantize == "4bit",
        frozen_vision=settings.freeze_vision,
        fused=settings.fuse != "no",
    )
    # resolve() has put a number here wherever one was typed, for this or for --per_device_train_batch_size
    auto = settings.micro_batch == "auto"
    sizes = sizes_of(pages) if auto else [micro_batch]
    return Scope(
        shape=family_of(config).shape(config),
        way=way,
        pages=pages,
        sizes=tuple(sizes),
        shares=RECOMPUTED_SHARES if share is None else (share,),
        whole=zero3.may_be_whole(deepspeed, config),
        bucket=zero3.bucket_size(deepspeed),
    )


def sizes_of(pages: int) -> list[int]:
    """How many of a step's `pages` may go through at once, the fewest first: so many that none is left over."""
    return [size for size in range(1, pages + 1) if pages % size == 0]


def decide(
    scope: Scope,
    load_of: Callable[[int], Load],
    page_flops: float,
    processes: int,
    limit_gib: float,
    tflops: float | None = None,
) -> Decision:
    """What is done on `processes` GPUs that hold `limit_gib` and reach `tflops` (None: not known), where `load_of` is
    the longest batch of so many pages and a page needs `page_flops` on average."""
    ways = candidates(
        replace(scope.way, processes=processes),
        scope.pages,
        page_costs.page_seconds(page_flops, tflops),
        sum(page_costs.weights_of(scope.shape)),
        sizes=scope.sizes,
        shares=scope.shares,
        whole=scope.whole,
    )
    plans = [estimate(scope.shape, load_of(way.micro_batch), way, scope.bucket) for way in ways]
    return Decision(plans, next((plan for plan in plans if plan.total_gib <= limit_gib), None))


# -----------------------------------------------------------------------------
# Training


def choose_micro_batch(
    args: TrainingArguments, settings: PageSettings, config: PretrainedConfig, pages: Dataset, encoder: PageEncoder
) -> MemoryPlan | None:
    """(all ranks) As many pages at once, and as few layers recomputed, as will fit by `decide`; None on a CPU and on
    the plain path, which trains as it was told.

    Sets them in `args` and in DeepSpeed's configuration; pages per step stay the same. `Fit` proves the choice.
    """
    if args.device.type != "cuda" or not trains_fast(config, settings):
        return None
    deepspeed = args.hf_deepspeed_config.config if args.deepspeed else None
    scope = scope_of(settings, vars(args), deepspeed, config)
    loads, costs = longest_loads(pages, encoder, scope), costs_of(config, pages, encoder)
    tflops = page_costs.peak_tflops(torch.cuda.get_device_name(args.device)) or 0.0
    limit, tflops = least([memory_limit(args.device), tflops])  # ranks that chose differently would wait for ever
    mean = sum(costs) / len(costs)
    decision = decide(scope, lambda size: loads[size - 1], mean, world_size(), limit, tflops or None)
    plan = decision.chosen
    if plan is None:  # the plan may err: tried, with a warning, rather than refused
        plan = decision.smallest
        say(f"the plan says {plan.total_gib:.1f} GiB, which {remedy(plan.way, limit)}; trying all the same")
    way = plan.way
    args.per_device_train_batch_size = way.micro_batch
    args.gradient_accumulation_steps = scope.pages // way.micro_batch
    args.activation_checkpointing = way.recomputed > 0
    if deepspeed is not None:
        deepspeed["train_micro_batch_size_per_gpu"] = way.micro_batch
        deepspeed["gradient_accumulation_steps"] = args.gradient_accumulation_steps
        zero3.tune_zero(deepspeed.get("zero_optimization", {}), way)
    parts = ", ".join(f"{name} {size:.1f}" for name, size in plan.parts_gib.items())
    told = (
        f"micro-batch: {plural(way.micro_batch, 'page')} at once, {way.recomputed:.0%} of the layers recomputed"
        f"{whole_words(way)}; {plan.total_gib:.1f} GiB planned of {limit:.1f} ({parts})"
    )
    say(in_columns(told))
    return plan


def whole_words(way: Way) -> str:
    """How gathered weights are told on the console; "" where layers are gathered one by one."""
    if not way.whole:
        return ""
    return ", weights stay gathered" if way.processes == 1 else ", weights gathered once per step"


def memory_limit(device: torch.device) -> float:
    """GiB of a GPU that may be planned for, of the share that torch may use of it (PYTORCH_CUDA_ALLOC_CONF)."""
    total = torch.cuda.get_device_properties(device).total_memory
    return MEMORY_SHARE * torch.cuda.get_per_process_memory_fraction(device) * total / GIB


def longest_loads(pages: Dataset, encoder: PageEncoder, scope: Scope) -> list[Load]:
    """The longest possible batch of 1, 2, ... all pages of a step: no order of the pages makes a longer one."""
    sizes = sorted(
        (
            (
                encoder.question_tokens + page["image_tokens"] + page["html_tokens"] + 1,
                page["image_tokens"],
                page["html_tokens"] + 1,
            )
            for page in pages.select_columns(["html_tokens", "image_tokens"])
        ),
        reverse=True,
    )
    loads, sums = [], (0, 0, 0)
    for number in range(scope.pages):
        sums = tuple(map(sum, zip(sums, sizes[number % len(sizes)])))
        loads.append(Load(sums[0], sums[1] * scope.shape.per_token, sums[2]))
    return loads


def costs_of(config: PretrainedConfig, pages: Dataset, encoder: PageEncoder) -> list[float]:
    """Floating-point operations of each page, from its counted tokens alone."""
    counted = pages.select_columns(["html_tokens", "image_tokens"])
    return page_costs.flops_of_pages(encoder.family.shape(config), counted, encoder.question_tokens)


def compare_with_plan(trainer: Trainer, plan: MemoryPlan) -> None:
    """(main process only) Say how far the measured peak was from the plan for the heaviest batch of this rank."""
    peak = max((entry["peak_gib"] for entry in trainer.state.log_history if "peak_gib" in entry), default=0.0)
    if peak and any(trainer.heaviest):
        load, config = Load(*trainer.heaviest), trainer.model.config
        bucket = zero3.bucket_size(trainer.args.hf_deepspeed_config.config if trainer.args.deepspeed else None)
        planned = estimate(family_of(config).shape(config), load, plan.way, bucket).total_gib
        say(f"peak: {peak:.1f} GiB measured, {planned:.1f} planned for the heaviest batch, {planned / peak - 1:+.1%}")


# -----------------------------------------------------------------------------
# Proof


class Fit:
    """Proves before step one that the longest possible batch fits, and that the fast path gives the plain loss.

    `plan` is what `choose_micro_batch` decided, `plain_loss` the reference path's loss of two held-out pages (None:
    not to be compared).
    """

    def __init__(self, plan: MemoryPlan | None, plain_loss: float | None, settings: PageSettings):
        self.plan, self.plain_loss, self.settings = plan, plain_loss, settings
        share = settings.checkpoint_share
        self.share = plan.way.recomputed if plan else 1.0 if share is None else share

    def __call__(self, trainer: Trainer, collate: Callable[[list], dict], pages: Dataset, held_out: Dataset) -> None:
        """(all ranks) Raises OutOfMemoryError where a batch does not fit whose size was typed, or which is a page
        alone; restarts with half as many pages, or fewer, where auto chose them."""
        if trainer.args.activation_checkpointing:
            recompute_some_layers(trainer.model, self.share)
        if collate.packed and zero3.is_on():
            zero3.lean_steps(trainer.model_wrapped)
        if self.plain_loss is not None:
            with torch.no_grad():
                loss = self.forward(trainer, collate(list(held_out.select(range(min(2, len(held_out)))))))
            say(f"fast path: loss {loss.item():.4f} on the same pages, {self.plain_loss:.4f} the plain way")
            if not abs(loss.item() - self.plain_loss) <= 0.02 * self.plain_loss:
                raise PipelineError(
                    f"the fast path's loss is {loss.item()}, the plain one's {self.plain_loss}, of the same weights "
                    "and pages: one of them computes another model. --fast False trains the plain way; first see by "
                    "`--fast False --compare_base --max_steps 1` that the base writes there what it should"
                )
        if self.settings.fp8:  # before the proof below, which is then of fp8
            pages_once = min(2, trainer.args.per_device_train_batch_size, len(held_out))
            compared = list(held_out.select(range(pages_once)))
            # Where weights stay gathered from step to step, they are cast once.
            keep = world_size() == 1 or bool(self.plan and self.plan.way.whole)
            fp8_training.begin(trainer, lambda: self.forward(trainer, collate(compared)), keep)
        if self.plan:
            self.prove(trainer, collate, pages)

    def forward(self, trainer: Trainer, batch: dict) -> torch.Tensor:
        """(all ranks) The loss of a batch, a scalar, through the model as it trains; `batch` loses what is no input."""
        for name in ("flops", "pages"):
            batch.pop(name, None)
        with trainer.compute_loss_context_manager():
            return trainer.model_wrapped(**trainer._prepare_inputs(batch)).loss

    def prove(self, trainer: Trainer, collate: Callable[[list], dict], pages: Dataset) -> None:
        """(all ranks) The dearest pages forward and backward, as many as go through at once."""
        costs = costs_of(trainer.model.config, pages, collate.encoder)
        longest = sorted(range(len(pages)), key=lambda index: -costs[index])
        chosen = [pages[longest[number % len(pages)]] for number in range(self.plan.way.micro_batch)]
        start, failure = time.monotonic(), None
        trainer.model.train()
        alone = (
            contextlib.nullcontext() if trainer.args.deepspeed else trainer.accelerator.no_sync(trainer.model_wrapped)
        )
        try:
            # Times zero: gradients of zeros, which change nothing when DeepSpeed adds those of the first step.
            with alone:
                loss = self.forward(trainer, collate(chosen)) * 0.0
                trainer.accelerator.gradient_state._set_sync_gradients(False)
                trainer.accelerator.backward(loss)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = error
        if not trainer.args.deepspeed:
            trainer.model.zero_grad(set_to_none=True)
        peak = torch.cuda.max_memory_allocated() / GIB
        try:
            failed = together(failure is not None)
        except RuntimeError as error:  # others wait for us inside a collective, where nobody can call them back
            raise failure or error from error
        if failed:
            self.restart(trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps, failure)
        size = plural(self.plan.way.micro_batch, "page")
        say_memory(f"the longest possible batch of {size} fits, {peak:.1f} GiB,", start)

    def restart(self, pages: int, failure: Exception | None) -> None:
        """(all ranks) In the same processes, with at most half as many pages at once of the `pages` per step and GPU:
        DeepSpeed cannot go on after this.

        Only where auto has chosen them. Whoever typed a number, in whatever spelling and by whichever of the two flags,
        meant it and gets the error; so does the restarted run, whose number is typed here. All layers are recomputed
        then, since the plan that chose fewer has erred; a share that the user typed stays.
        """
        size = self.plan.way.micro_batch
        if size == 1 or self.settings.micro_batch != "auto":
            raise failure or torch.OutOfMemoryError("out of memory on another GPU")
        smaller = max(fewer for fewer in sizes_of(pages) if fewer <= size // 2)
        say(f"the plan was too bold: restarting with --micro_batch {smaller}")
        sys.stdout.flush()
        if world_size() > 1:  # at a place of our own: torchrun's still holds the keys of this attempt
            os.environ["MASTER_PORT"] = str(agreed_port())
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        again = [*sys.orig_argv[1:], "--micro_batch", str(smaller)]
        if self.settings.checkpoint_share is None:
            again += ["--checkpoint_share", "1"]
        os.environ[RESTARTED] = "1"  # its own evaluation before training is no earlier run's
        heart.falls_silent()
        os.execv(sys.executable, [sys.executable, *again])


def note_smaller(args: TrainingArguments) -> None:
    """(any rank) Memory ran out in training: tell the wrapper what a new start should ask for, the next smaller
    micro-batch that divides the pages of a step, and whether there is a checkpoint. Nothing where no smaller one is."""
    size = args.per_device_train_batch_size
    smaller = [fewer for fewer in sizes_of(size * args.gradient_accumulation_steps) if fewer < size]
    output_dir, start = Path(args.output_dir), time.monotonic()
    # The main process may still be flushing and hashing one that was saved just before. It waits for this rank in a
    # collective meanwhile, and would be ended as soon as this rank is.
    while smaller and (output_dir / STAGING).exists() and time.monotonic() - start < FINISHED_S:
        time.sleep(0.1)
    if smaller:
        leave_note("smaller", json.dumps({"micro_batch": smaller[-1], "resume": bool(checkpoints_in(output_dir))}))


def recompute_some_layers(model: torch.nn.Module, share: float) -> None:
    """Of each tower's layers, `share` have their activations recomputed in the backward pass, spread evenly, also over
    the kinds of attention that a tower has: every fourth of Qwen3.5's is of the one that keeps less."""
    towers: dict[type, list] = {}
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            towers.setdefault(type(module), []).append(module)
    for layers in towers.values():
        for number, layer in enumerate(sorted(layers, key=lambda layer: getattr(layer, "block_type", ""))):
            layer.gradient_checkpointing = math.floor((number + 1) * share) > math.floor(number * share)


# -----------------------------------------------------------------------------
# Plan

PROCESSES = (1, 2, 4, 8, 16, 32, 64)
SIZES_GIB = (24, 40, 80, 140)  # of GPUs that are rented out
QUESTION_TOKENS = 40  # of the default prompt in a chat template; no tokenizer is loaded for them


def print_plan(resolved: Resolved, config: PretrainedConfig, parameters: int) -> None:
    """What each part of the memory would take and what training would choose there, on 1 to 64 GPUs, without a GPU.

    The same `decide` as training's, for pages at the limits of the settings. The plain path (`--fast False`, or a
    family without a fast one) chooses nothing and was never measured: what its logits and activations take would be
    a guess. So only what is there without any page is told, which is no estimate, and what the path does.
    """
    settings, training, family = resolved.settings, resolved.training, family_of(config)
    scope = scope_of(settings, training, resolved.deepspeed, config)
    image, html = family.most_image_tokens(config, settings.max_pixels), settings.max_html_tokens
    size = f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
    say(f"{settings.base_model}: {size} parameters; {plural(scope.pages, 'page')} per step and GPU, each of at")
    say(f"most {image:,} image tokens and {html:,} of HTML; GiB on each GPU under {training['deepspeed']}:")
    if trains_fast(config, settings):
        say(fast_table(scope, longest_page(family, config, image, html + 1)))  # and its end
    else:
        say(plain_words(scope, settings))
        say(state_table(scope.shape, scope.way, PROCESSES, SIZES_GIB))
    copy = 2 * parameters / GIB
    say(f"before and after training a copy that writes pages takes {copy:.1f} GiB more, when activations take none")


def longest_page(family: Family, config: PretrainedConfig, image_tokens: int, html_tokens: int) -> Load:
    """The load of one page at both limits, its question included."""
    tokens = image_tokens + html_tokens + QUESTION_TOKENS
    return Load(tokens, image_tokens * family.shape(config).per_token, html_tokens)


def fast_table(scope: Scope, page: Load) -> str:
    """The lines of `--plan`: what is chosen for each number of GPUs and each size of theirs in GiB."""
    flops = page_costs.page_flops(scope.shape, page.tokens, page.supervised, page.patches)
    rows = []
    for processes in PROCESSES:
        for size in SIZES_GIB:
            decision = decide(scope, page.times, flops, processes, MEMORY_SHARE * size)
            rows.append((processes, size, decision.chosen))
    return table(rows, scope.way)


def plain_words(scope: Scope, settings: PageSettings) -> str:
    """Why `--plan` estimates no activations, and what the plain path does."""
    why = "this model has no fast path" if settings.fast else "--fast False"
    pages = plural(scope.way.micro_batch, "page")
    return (
        f"the plain path ({why}) is not planned: it takes {pages} at once, padded, with "
        f"{scope.way.recomputed:.0%} of the layers recomputed.\nWhat is there without any page, and what is left for "
        "activations and logits:"
    )
