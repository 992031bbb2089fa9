"""The one decision what fits: from the settings and the model's own family, for `--plan` and for training.

    decision = decide(scope_of(settings, training, deepspeed, config), load_of, page, processes, hardware)
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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from families import Family, family_of, page_costs, trains_fast
from kernels.attention import FLASH_4, attention_kernel
from scoring.report_values import plural
from training import eight_bit, fp8_training, split_masters, zero3
from training.activation_offload import link_rate, pinnable_gib
from training.checkpoints import RESTARTED, STAGING, checkpoints_in
from training.errors import PipelineError, SettingsError, is_out_of_memory
from training.heartbeat import heart
from training.memory_plan import (
    FILLED_SHARE,
    MEMORY_SHARE,
    Hardware,
    Load,
    MemoryPlan,
    Rungs,
    Way,
    candidates,
    estimate,
    moments_gib,
    plannable_gib,
    remedy,
    state_table,
    table,
    way_words,
)
from training.processes import (
    agree,
    agreed_port,
    gather,
    in_columns,
    least,
    leave_note,
    say,
    say_from_here,
    together,
    world_size,
)
from training.progress import cache_words, gpu_memory_words, say_memory, segment_words
from training.prompt_and_mask import PageEncoder
from training.run_record import ADDED
from training.settings import PageSettings, Resolved
from training.training_arguments import moments_of
from training.treatment import Batches, Treatment, load_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, Trainer, TrainingArguments

GIB = 2**30
# In the environment of a training that has restarted itself with the same pages: their number was not typed by a user.
SAME_PAGES = "HOLO1_SAME_PAGES"
# In the environment of a training that starts again because batches filled too much: the share that they fill now.
FILLED = "HOLO1_FILLED_SHARE"
# That is 4.8 GiB of an H100 below FILLED_SHARE, where 3.7 lay in gaps when torch ran out. Its speed was not measured:
# of 3B, 0.94 filled was 2 % faster than none (benchmarks/README.md), and more where the longest batch keeps little.
LESS_FILLED = 0.9
FINISHED_S = 120.0  # in which a checkpoint that was saved is put into its place
WINDOWS = 256  # batches that are planned to find the fullest one, at some 0.1 ms each

# -----------------------------------------------------------------------------
# Decision


@dataclass(frozen=True)
class Scope:
    """What the settings fix, and what they leave to choose from."""

    shape: page_costs.Shape
    way: Way  # as the settings train; its pages at once and its shares are what they are without a choice
    pages: int  # per step and GPU
    sizes: tuple[int, ...]  # pages at once that may be chosen
    recomputed: float | None  # of the layers of both towers, where it was typed
    offloaded: float | None  # of the language model's layers, where it was typed
    whole: tuple[bool, ...]  # whether weights may be gathered once per step, or by layers
    bucket: int  # weights in one of DeepSpeed's buckets
    fills: bool = True  # whether a batch may keep more layers than the longest one, as its own size allows
    filled: float = FILLED_SHARE  # of the limit, by such batches


@dataclass(frozen=True)
class Decision:
    """Every way that the settings allow, the fastest first; what is `chosen` of them for the longest batch, with the
    rungs of the others, and what becomes of the `mean` one: both None where none fits the longest."""

    candidates: list[Way]
    chosen: MemoryPlan | None
    mean: MemoryPlan | None
    plan_of: Callable[[Way], MemoryPlan]

    @property
    def smallest(self) -> MemoryPlan:
        """The candidate that takes the least memory (GiB), whether or not it fits."""
        return min(map(self.plan_of, self.candidates), key=lambda plan: plan.total_gib)


def scope_of(
    settings: PageSettings, training: Mapping[str, Any], deepspeed: dict | None, config: PretrainedConfig
) -> Scope:
    """Reads `per_device_train_batch_size`, `gradient_accumulation_steps` and `activation_checkpointing` of `training`
    (TrainingArguments by name), and DeepSpeed's configuration, None without it."""
    zero = (deepspeed or {}).get("zero_optimization", {})
    adapters, micro_batch = settings.lora or settings.quantize == "4bit", training["per_device_train_batch_size"]
    pages, share = micro_batch * training["gradient_accumulation_steps"], settings.checkpoint_share
    recomputed = float(training["activation_checkpointing"]) if share is None else share
    moments = moments_of(training.get("optim"), training.get("optim_args"), deepspeed is not None)
    way = Way(
        micro_batch=micro_batch,
        recomputed=recomputed,
        recomputed_vision=recomputed,
        sharded=zero.get("stage") == 3,
        offload=(zero.get("offload_optimizer") or {}).get("device", "none") != "none",
        adapters=adapters,
        four_bit=settings.quantize == "4bit",
        frozen_vision=settings.freeze_vision,
        fused=settings.fuse != "no",
        moments=2 if moments is None else moments,
        eight_bit=eight_bit.is_asked(training.get("optim")),
        split=split_masters.are_planned(settings, training, deepspeed),
        fp8=settings.fp8,
    )
    # resolve() has put a number here wherever one was typed, for this or for --per_device_train_batch_size
    auto = settings.micro_batch == "auto"
    sizes = sizes_of(pages) if auto else [micro_batch]
    return Scope(
        shape=family_of(config).shape(config),
        way=way,
        pages=pages,
        sizes=tuple(sizes),
        recomputed=share,
        offloaded=settings.offload_share,
        whole=zero3.may_be_whole(deepspeed, config),
        bucket=zero3.bucket_size(deepspeed),
        fills=settings.fill_memory,
        filled=filled_share(),
    )


def filled_share() -> float:
    """Of the memory that is planned for, what batches fill that are not the longest."""
    return float(os.environ.get(FILLED, FILLED_SHARE))


def sizes_of(pages: int) -> list[int]:
    """How many of a step's `pages` may go through at once, the fewest first: so many that none is left over."""
    return [size for size in range(1, pages + 1) if pages % size == 0]


def decide(scope: Scope, load_of: Callable[[int], Load], page: Load, processes: int, hardware: Hardware) -> Decision:
    """What is done on `processes` GPUs, each with `hardware`, where `load_of` is the longest batch of so many pages and
    `page` their mean. For each number of pages at once the longest batch has to fit, by any shares; of those that are
    left the one is taken whose mean batch, by the shares that it gets, takes the least time."""
    way = replace(scope.way, processes=processes)
    options = {"sizes": scope.sizes, "whole": scope.whole, "recomputed": scope.recomputed, "offloaded": scope.offloaded}
    ways = candidates(scope.shape, way, scope.pages, page, load_of, hardware, **options)

    def plan_of(way: Way) -> MemoryPlan:
        return estimate(scope.shape, load_of(way.micro_batch), way, scope.bucket)

    groups: dict[tuple[int, bool], list[Way]] = {}
    for each in ways:
        groups.setdefault((each.micro_batch, each.whole), []).append(each)
    place, found = {each: number for number, each in enumerate(ways)}, []
    for (size, _), group in groups.items():
        longest = next((plan for plan in map(plan_of, group) if plan.total_gib <= hardware.gpu_gib), None)
        if longest is not None:
            rungs = rungs_of(scope, longest, group, hardware.gpu_gib)
            found.append((rungs.plan_for(page.times(size)), replace(longest, rungs=rungs)))
    mean, chosen = min(found, key=lambda plans: place[plans[0].way], default=(None, None))
    return Decision(ways, chosen, mean, plan_of)


def rungs_of(scope: Scope, longest: MemoryPlan, group: list[Way], limit_gib: float) -> Rungs:
    """What batches may do beside the `longest`, of the ways in `group` that differ from its own in shares: what is
    faster, fits the `filled` share of the limit, and pins no more of the CPU's memory than the longest one has taken
    before step one."""
    ways = group[: group.index(longest.way) + 1] if may_fill(scope, longest.way) else [longest.way]
    return Rungs(scope.shape, ways, scope.filled * limit_gib, longest.pinned_gib, scope.bucket)


def may_fill(scope: Scope, way: Way) -> bool:
    """Whether each batch of each rank may have shares of its own. Not where ZeRO-3 gathers layer by layer: to recompute
    one asks all ranks for its weights again, and DeepSpeed fetches ahead by what the batch before has asked for."""
    return scope.fills and not way.by_layers


# -----------------------------------------------------------------------------
# Training


def choose_micro_batch(
    args: TrainingArguments, settings: PageSettings, config: PretrainedConfig, pages: Dataset, encoder: PageEncoder
) -> MemoryPlan | None:
    """(all ranks) Which pages go through at once, and which layers keep their activations in the longest batch and in
    others, by `decide`; None on a CPU and on the plain path, which trains as it was told.

    Sets them in `args` and in DeepSpeed's configuration; pages per step stay the same. `Fit` proves the choice.
    """
    fast = trains_fast(config, settings)
    if settings.offload_share and not fast:
        raise SettingsError(f"--offload_share {settings.offload_share}: this model has no fast path; leave it out")
    if args.device.type != "cuda" or not fast:
        return None
    deepspeed = args.hf_deepspeed_config.config if args.deepspeed else None
    scope = as_attended(scope_of(settings, vars(args), deepspeed, config), args)
    if words := moments_words(vars(args), deepspeed):
        say(words)
    loads, mean = longest_loads(pages, encoder, scope), mean_load(pages, encoder, scope)
    hardware = hardware_of(args.device, scope)

    def longest(size: int) -> Load:
        return loads[size - 1]

    decision = decide(scope, longest, mean, world_size(), hardware)
    plan, limit = decision.chosen, hardware.gpu_gib
    if plan is None:  # the plan may err: tried, with a warning, rather than refused
        plan = decision.smallest
        say(f"the plan says {plan.total_gib:.1f} GiB, which {remedy(plan.way, limit)}; trying all the same")
        plan = replace(plan, rungs=rungs_of(scope, plan, [plan.way], limit))
    way = plan.way
    args.per_device_train_batch_size = way.micro_batch
    args.gradient_accumulation_steps = scope.pages // way.micro_batch
    args.activation_checkpointing = max(way.recomputed, way.recomputed_vision) > 0
    if deepspeed is not None:
        deepspeed["train_micro_batch_size_per_gpu"] = way.micro_batch
        deepspeed["gradient_accumulation_steps"] = args.gradient_accumulation_steps
        zero3.tune_zero(deepspeed.get("zero_optimization", {}), way)
    say(in_columns(plan_words(plan, decision.mean, limit)))
    roomy = decide(scope, longest, mean, world_size(), replace(hardware, pinned_gib=math.inf)).chosen
    if words := link_words(plan, roomy, hardware):
        say(in_columns(words))
    return plan


def as_attended(scope: Scope, args: TrainingArguments) -> Scope:
    """(all ranks) Without what is kept of wider heads, where no rank has flash-attn 4, which alone asks for them. Where
    it is there but will not prove right, and on the GPUs of --plan, which nobody has asked, they stay counted: that is
    2 % of what 3B's tower keeps, 24 % of Qwen3-VL-8B's, and counted for nothing it costs time alone."""
    if agree(attention_kernel(args.device.type, args.bf16 or args.fp16) == FLASH_4):  # imported, which may take a while
        return scope
    return replace(scope, shape=replace(scope.shape, vision=replace(scope.shape.vision, padded=0)))


def plan_words(plan: MemoryPlan, mean: MemoryPlan | None, limit_gib: float) -> str:
    """What was decided for the longest batch, and for the `mean` one where batches differ."""
    parts = ", ".join(f"{name} {size:.1f}" for name, size in plan.parts_gib.items())
    told = f"micro-batch: {plural(plan.way.micro_batch, 'page')} at once{whole_words(plan.way)}; "
    differ = mean is not None and len(plan.rungs.ways) > 1
    told += f"{'the longest batch: ' if differ else ''}{way_words(plan)}, "
    told += f"{plan.total_gib:.1f} GiB planned of {limit_gib:.1f} ({parts})"
    return told + (f"; the mean one: {way_words(mean)}, {mean.total_gib:.1f} GiB" if differ else "")


def hardware_of(device: torch.device, scope: Scope) -> Hardware:
    """(all ranks) What all of them have; ranks that chose differently would wait for ever."""
    tflops = page_costs.peak_tflops(torch.cuda.get_device_name(device)) or 0.0
    link = link_of(device, scope)
    limit, tflops, link, pinned = least([memory_limit(device), tflops, link, pinnable_gib()])
    if scope.offloaded and not link:  # refused by all ranks, and before the model is loaded
        raise SettingsError(f"--offload_share {scope.offloaded}: none of the CPU's memory can be pinned; leave it out")
    return Hardware(limit, tflops or None, link, pinned)


def link_of(device: torch.device, scope: Scope) -> float:
    """(all ranks) GB/s of the link to the CPU while all ranks use it; 0 where it is not to carry activations."""
    if scope.offloaded == 0 or (scope.way.offload and not scope.offloaded):
        return 0.0
    together(False)  # waits for the others: ranks of a machine may share the link
    try:
        return link_rate(device)
    except RuntimeError as error:  # a container may allow little memory to be pinned, or none
        say(f"offload: none of the CPU's memory could be pinned ({error}), so no activations wait there")
        return 0.0


def link_words(plan: MemoryPlan, roomy: MemoryPlan | None, hardware: Hardware) -> str:
    """What the link to the CPU carries, and whether the CPU's memory is what keeps more from waiting there, as it would
    by `roomy`, the plan for any amount of it; empty where nothing would. A typed share is taken as it is, and told."""
    if plan.pinned_gib > hardware.pinned_gib:
        return (
            f"offload: each process pins up to {plan.pinned_gib:.1f} GiB of the CPU's memory, where no more than "
            f"{hardware.pinned_gib:.1f} should be; if it runs out, give a smaller --offload_share"
        )
    if roomy is not None and roomy.pinned_gib > hardware.pinned_gib and plan.way != roomy.way:
        return (
            f"offload: no more than {hardware.pinned_gib:.1f} GiB of the CPU's memory may be pinned for each process; "
            f"with {roomy.pinned_gib:.1f} the plan would be: {plural(roomy.way.micro_batch, 'page')} at once, "
            f"{way_words(roomy)}"
        )
    return f"offload: the link to the CPU carries {hardware.link_gb_s:.0f} GB/s each way" if plan.way.offloaded else ""


def whole_words(way: Way) -> str:
    """How gathered weights are told on the console; "" where layers are gathered one by one."""
    if not way.whole:
        return ""
    return ", weights stay gathered" if way.processes == 1 else ", weights gathered once per step"


def memory_limit(device: torch.device) -> float:
    """GiB of a GPU that may be planned for, of the share that torch may use of it (PYTORCH_CUDA_ALLOC_CONF)."""
    size = torch.cuda.get_device_properties(device).total_memory / GIB
    share = torch.cuda.get_per_process_memory_fraction(device)
    return min(MEMORY_SHARE * share * size, plannable_gib(size, world_size()))


def page_loads(counted: Iterable[Mapping[str, int]], encoder: PageEncoder, shape: page_costs.Shape) -> list[tuple]:
    """Tokens, patches and supervised tokens of each page, from its counted `html_tokens` and `image_tokens`."""
    loads = []
    for page in counted:
        image, html = page["image_tokens"], page["html_tokens"] + 1
        loads.append((encoder.question_tokens + image + html, image * shape.per_token, html))
    return loads


def longest_loads(pages: Dataset, encoder: PageEncoder, scope: Scope) -> list[Load]:
    """The longest possible batch of 1, 2, ... all pages of a step: no order of the pages makes a longer one."""
    counted = pages.select_columns(["html_tokens", "image_tokens"])
    sizes = sorted(page_loads(counted, encoder, scope.shape), reverse=True)
    loads, sums = [], (0, 0, 0)
    for number in range(scope.pages):
        sums = tuple(map(sum, zip(sums, sizes[number % len(sizes)])))
        loads.append(Load(*sums))
    return loads


def mean_load(pages: Dataset, encoder: PageEncoder, scope: Scope) -> Load:
    """The mean page."""
    counted = pages.select_columns(["html_tokens", "image_tokens"])
    image, html = (sum(counted[name]) / len(counted) for name in ("image_tokens", "html_tokens"))
    return Load(encoder.question_tokens + image + html + 1, image * scope.shape.per_token, html + 1)


def costs_of(config: PretrainedConfig, pages: Dataset, encoder: PageEncoder) -> list[float]:
    """Floating-point operations of each page, from its counted tokens alone."""
    counted = pages.select_columns(["html_tokens", "image_tokens"])
    return page_costs.flops_of_pages(encoder.family.shape(config), counted, encoder.question_tokens)


def compare_with_plan(trainer: Trainer, batches: Batches | None) -> None:
    """(all ranks) Say how far the measured peak was from the highest plan of a batch, of whichever rank: it may be any
    batch's, since each fills the memory."""
    peak = max((entry["peak_gib"] for entry in trainer.state.log_history if "peak_gib" in entry), default=0.0)
    plans = [plan for plan in gather(batches and batches.highest) if plan is not None]
    if peak and plans:
        highest = max(plans, key=lambda plan: plan.total_gib)
        planned = highest.total_gib
        say(
            f"peak: {peak:.1f} GiB measured, {planned:.1f} planned for the fullest batch, {planned / peak - 1:+.1%}; "
            f"it had {way_words(highest)}"
        )
        say(in_columns(cache_words()))


# -----------------------------------------------------------------------------
# Proof


class Fit:
    """Proves before step one that the longest possible batch fits, and that the fast path gives the plain loss.

    `plan` is what `choose_micro_batch` decided, `plain_loss` the reference path's loss of two held-out pages (None:
    not to be compared).
    """

    def __init__(self, plan: MemoryPlan | None, plain_loss: float | None, settings: PageSettings):
        self.plan, self.plain_loss, self.settings = plan, plain_loss, settings
        away = settings.offload_share or 0.0
        share = 1.0 - away if settings.checkpoint_share is None else settings.checkpoint_share
        self.ours = os.environ.pop(SAME_PAGES, None) is not None  # read once: a later training is a new one
        self.way = plan.way if plan else Way(recomputed=share, recomputed_vision=share, offloaded=away)
        self.batches: Batches | None = None  # from the proof on; None without a plan

    def __call__(self, trainer: Trainer, collate: Callable[[list], dict], pages: Dataset, held_out: Dataset) -> None:
        """(all ranks) Raises OutOfMemoryError where a batch does not fit whose size was typed, or which is a page
        alone; restarts with less where auto chose it (`restart`)."""
        args = trainer.args
        treatment = Treatment(trainer.model, self.way, args.activation_checkpointing, args.device)
        offload = treatment.offload
        if self.settings.offload_share and not offload:
            layers = plural(len(treatment.text), "layer")
            say(f"--offload_share {self.settings.offload_share}: less than one of {layers}, so no activations wait")
        if zero3.is_on():
            deepspeed = args.hf_deepspeed_config.config
            planned = split_masters.are_planned(self.settings, vars(args), deepspeed)
            split_masters.begin(trainer.model_wrapped, planned)
            if collate.packed:
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
            excess = self.prove(trainer, collate, pages, treatment)
            if self.plan.rungs:
                trainer.batches = self.batches = Batches(treatment, self.plan, excess)
        if offload:
            pinned = f", {offload.pinned_gib:.1f} GiB of it, pinned" if self.plan else ""  # else by the first step
            most = "up to " if self.batches and len(self.batches.rungs.ways) > 1 else ""
            layers = f"{most}{sum(offload.chosen)} of {len(offload.layers)} layers"
            say(f"activations of {layers} wait in the CPU's memory{pinned}")

    def forward(self, trainer: Trainer, batch: dict) -> torch.Tensor:
        """(all ranks) The loss of a batch, a scalar, through the model as it trains; `batch` loses what is no input."""
        for name in ("flops", "pages"):
            batch.pop(name, None)
        with trainer.compute_loss_context_manager():
            return trainer.model_wrapped(**trainer._prepare_inputs(batch)).loss

    def prove(self, trainer: Trainer, collate: Callable[[list], dict], pages: Dataset, treatment: Treatment) -> float:
        """(all ranks) The dearest pages forward and backward, as many as go through at once; then, where other batches
        keep more, the longest of those that keep most. Returns by how many GiB a peak of this rank was more than was
        planned, 0 where none was."""
        if words := segment_words():  # before the passes, of which one may find no room for that reason
            say(in_columns(words))
        costs = costs_of(trainer.model.config, pages, collate.encoder)
        order = sorted(range(len(pages)), key=lambda index: -costs[index])
        size, start = self.plan.way.micro_batch, time.monotonic()
        peak, excess = self.attempt(trainer, collate, pages, [order[n % len(order)] for n in range(size)], self.way)
        told = f"the longest possible batch of {plural(size, 'page')} fits, {peak:.1f} GiB"
        fuller = self.fullest(collate.encoder, pages, order)
        if fuller is not None:
            chosen, way = fuller
            treatment.set(way)
            peak, more = self.attempt(trainer, collate, pages, chosen, way)
            excess = max(excess, more)
            told += f", and so does one that keeps most, {peak:.1f}"
        told += f" (up to {excess:.1f} more than planned, which is left free)" if excess >= 0.05 else ""
        say_memory(f"{told},", start)
        if words := gpu_memory_words():
            say(f"GPU 0 after it: {words}")
        return excess

    def attempt(
        self, trainer: Trainer, collate: Callable[[list], dict], pages: Dataset, chosen: list[int], way: Way
    ) -> tuple[float, float]:
        """(all ranks) Those pages forward and backward at once, treated by `way`: this rank's peak, and by how much it
        was more than planned, in GiB. Restarts where it does not fit on any rank."""
        failure, load = None, None
        trainer.model.train()
        if torch.cuda.is_available():  # what was written and compared before had peaks of its own
            torch.cuda.reset_peak_memory_stats()
        alone = (
            contextlib.nullcontext() if trainer.args.deepspeed else trainer.accelerator.no_sync(trainer.model_wrapped)
        )
        try:
            # Times zero: gradients of zeros, which change nothing when DeepSpeed adds those of the first step.
            with alone:
                batch = collate([pages[index] for index in chosen])
                load = load_of(batch)
                loss = self.forward(trainer, batch) * 0.0
                trainer.accelerator.gradient_state._set_sync_gradients(False)
                trainer.accelerator.backward(loss)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = error
            which = "the longest batch" if way == self.way else "one that keeps most"
            say_from_here(f"memory ran out for {which}, {planned_words(self.plan, load, way)}: {gpu_memory_words()}")
        if not trainer.args.deepspeed:
            trainer.model.zero_grad(set_to_none=True)
        peak = torch.cuda.max_memory_allocated() / GIB
        try:
            failed = together(failure is not None)
        except RuntimeError as error:  # others wait for us inside a collective, where nobody can call them back
            raise failure or error from error
        if failed:
            at_once = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
            self.restart(at_once, failure, filled=way != self.way)
        if self.plan.rungs is None:
            return peak, 0.0
        planned = self.plan.rungs.plan_of(load, way)
        # Most optimizers make their moments in the first step.
        missing = 0.0 if has_moments(trainer) else moments_gib(planned)
        return peak, max(0.0, peak + missing - planned.total_gib)

    def fullest(self, encoder: PageEncoder, pages: Dataset, order: list[int]) -> tuple[list[int], Way] | None:
        """The longest batch of neighbours in `order`, the dearest pages first, that is treated by the fastest way that
        any of them gets, and that way; None where all are treated as the longest is."""
        if self.plan.rungs is None:
            return None
        rungs, size = self.plan.rungs, self.plan.way.micro_batch
        loads = page_loads(pages.select_columns(["html_tokens", "image_tokens"]), encoder, rungs.shape)
        best, found = len(rungs.ways) - 1, None
        for start in range(0, max(1, len(order) - size + 1), math.ceil(len(order) / WINDOWS)):
            window = [order[(start + number) % len(order)] for number in range(size)]
            load = Load(*(sum(part) for part in zip(*(loads[index] for index in window))))
            way = rungs.plan_for(load).way
            if rungs.ways.index(way) < best:
                best, found = rungs.ways.index(way), (window, way)
        return found

    def restart(self, pages: int, failure: Exception | None, filled: bool = False) -> None:
        """(all ranks) In the same processes: DeepSpeed cannot go on after this. Where a batch was `filled` with more
        than the longest one keeps, with less of the memory filled, then with all batches treated as that one; else with
        all layers recomputed, where the plan that has erred let some be kept; then with at most half as many of a
        step's `pages` at once.

        Only what auto has chosen. Whoever typed a number, in whatever spelling and by whichever of the two flags, meant
        it and gets the error; so does a run that has restarted with fewer pages, whose number is typed here. A share
        that the user typed stays.
        """
        way, settings = self.plan.way, self.settings
        size, auto = way.micro_batch, settings.micro_batch == "auto" or self.ours
        kept = way.recomputed + way.offloaded < 1 or (way.vision_learns and way.recomputed_vision < 1)
        if filled or (kept and settings.checkpoint_share is None):
            os.environ |= {SAME_PAGES: "1"} if auto else {}
        elif auto and size > 1:
            size = max(fewer for fewer in sizes_of(pages) if fewer <= size // 2)
        else:
            raise failure or torch.OutOfMemoryError("out of memory on another GPU")
        again, less = ["--micro_batch", str(size)], filled and filled_share() > LESS_FILLED
        if less:
            os.environ[FILLED] = str(LESS_FILLED)
        elif filled:
            again += ["--fill_memory", "False"]
        # What is on its way to the CPU's memory and back takes memory, too, of a plan that has erred.
        shares = {} if filled else {"checkpoint_share": 1 - (settings.offload_share or 0), "offload_share": 0}
        for name, value in shares.items():
            again += [f"--{name}", f"{value:g}"] if getattr(settings, name) is None else []
        filling = f", batches filling {LESS_FILLED:.0%} of the memory planned for" if less else ""
        say(f"the plan was too bold: restarting with {' '.join(again)}{filling}")
        sys.stdout.flush()
        if world_size() > 1:  # at a place of our own: torchrun's still holds the keys of this attempt
            os.environ["MASTER_PORT"] = str(agreed_port())
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        os.environ[ADDED] = str(int(os.environ.get(ADDED, "0")) + len(again))
        os.environ[RESTARTED] = "1"  # its own evaluation before training is no earlier run's
        heart.falls_silent()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *again])


def planned_words(plan: MemoryPlan, load: Load | None, way: Way) -> str:
    """What was planned for a batch, in GiB; `load` is None where there was no batch yet."""
    if plan.rungs is None or load is None:
        return f"{plan.total_gib:.1f} GiB planned for the longest"
    planned = plan.rungs.plan_of(load, way)
    return f"{planned.total_gib:.1f} GiB planned, {way_words(planned)}"


def has_moments(trainer: Trainer) -> bool:
    """Whether the optimizer that takes the steps, DeepSpeed's own inner one under it, has its moments already."""
    outer = getattr(trainer.model_wrapped, "optimizer", None) if trainer.args.deepspeed else trainer.optimizer
    return bool(getattr(getattr(outer, "optimizer", outer), "state", True))


def note_smaller(args: TrainingArguments, fit: Fit) -> None:
    """(any rank) Memory ran out in training: tell the wrapper what a new start should ask for, and whether there is a
    checkpoint. Where batches filled the memory, they are to fill less, then none is to: that is all, since the longest
    was proved to fit. Else it is the next smaller micro-batch that divides the pages of a step, too. Nothing where no
    smaller one is."""
    size = args.per_device_train_batch_size
    smaller = [fewer for fewer in sizes_of(size * args.gradient_accumulation_steps) if fewer < size]
    filled = bool(fit.batches and fit.batches.fills)
    smaller += [size] if filled else []
    output_dir, start = Path(args.output_dir), time.monotonic()
    # The main process may still be flushing and hashing one that was saved just before. It waits for this rank in a
    # collective meanwhile, and would be ended as soon as this rank is.
    while smaller and (output_dir / STAGING).exists() and time.monotonic() - start < FINISHED_S:
        time.sleep(0.1)
    if smaller:
        wanted = {"micro_batch": smaller[-1], "resume": bool(checkpoints_in(output_dir))}
        less = {"filled_share": LESS_FILLED} if filled and filled_share() > LESS_FILLED else {"fill_memory": False}
        leave_note("smaller", json.dumps(wanted | (less if fit.batches else {})))


# -----------------------------------------------------------------------------
# Plan

PROCESSES = (1, 2, 4, 8, 16, 32, 64)
SIZES_GIB = (24, 40, 80, 140)  # of GPUs that are rented out
LINK_GB_S = 25.0  # of a link to the CPU that nobody has measured: PCIe 4's, or half of PCIe 5's
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
    bits = ", the base in 4 bits" if scope.way.four_bit else ""
    under = f"under {training['deepspeed']}" if training["deepspeed"] else f"without DeepSpeed{bits}"
    say(f"most {image:,} image tokens and {html:,} of HTML; GiB on each GPU {under}:")
    if trains_fast(config, settings):
        say(fast_table(scope, longest_page(family, config, image, html + 1)))  # and its end
    else:
        say(plain_words(scope, settings))
        say(state_table(scope.shape, scope.way, PROCESSES, SIZES_GIB))
    if words := moments_words(training, resolved.deepspeed):
        say(words)
    copy = 2 * parameters / GIB
    say(f"before and after training a copy that writes pages takes {copy:.1f} GiB more, when activations take none")


def moments_words(training: Mapping[str, Any], deepspeed: dict | None) -> str:
    """That an optimizer is counted as if it were another; "" where it is not."""
    optim = eight_bit.name_of(training["optim"])
    if moments_of(optim, training.get("optim_args"), deepspeed is not None) is not None:
        return ""
    return f"--optim {optim} is not planned: its moments may take more or less than AdamW's, which are counted here"


def longest_page(family: Family, config: PretrainedConfig, image_tokens: int, html_tokens: int) -> Load:
    """The load of one page at both limits, its question included."""
    tokens = image_tokens + html_tokens + QUESTION_TOKENS
    return Load(tokens, image_tokens * family.shape(config).per_token, html_tokens)


def fast_table(scope: Scope, page: Load) -> str:
    """The lines of `--plan`: what is chosen for each number of GPUs and each size of theirs in GiB."""
    rows = []
    for processes in PROCESSES:
        for size in SIZES_GIB:
            hardware = Hardware(plannable_gib(size, processes), link_gb_s=LINK_GB_S)
            decision = decide(scope, page.times, page, processes, hardware)
            rows.append((processes, size, decision.chosen))
    told = table(rows, scope.way)
    if any(plan and len(plan.rungs.ways) > 1 for _, _, plan in rows):
        told += "\nshares: of the longest batch; shorter ones keep more, but where weights are gathered by layers"
    if any(plan and plan.way.offloaded for _, _, plan in rows):
        told += (
            f"\noffloaded: planned for a link to the CPU of {LINK_GB_S:.0f} GB/s each way, and for as much memory there"
        )
    return told


def plain_words(scope: Scope, settings: PageSettings) -> str:
    """Why `--plan` estimates no activations, and what the plain path does."""
    why = "this model has no fast path" if settings.fast else "--fast False"
    pages = plural(scope.way.micro_batch, "page")
    return (
        f"the plain path ({why}) is not planned: it takes {pages} at once, padded, with "
        f"{scope.way.recomputed:.0%} of the layers recomputed.\nWhat is there without any page, and what is left for "
        "activations and logits:"
    )
