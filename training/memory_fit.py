"""The one decision what fits: from the settings and the model's own family, for `--plan` and for training.

    decision = decide(scope_of(settings, training, deepspeed, config), load_of, page, processes, hardware)
    memory_plan = choose_micro_batch(args, settings, config, pages, encoder)   # (all ranks) that, for the GPUs at hand
    fit = Fit(memory_plan, plain_loss, settings)                               # proves it before step one
    print_plan(resolved, config, parameters)                                   # that, for GPUs that one might rent

Sections: Decision, Training, Proof, Layers, Plan.
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
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from families import Family, family_of, page_costs, trains_fast
from scoring.report_values import plural
from training import eight_bit, fp8_training, split_masters, zero3
from training.activation_offload import Offload, link_rate, pinnable_gib
from training.checkpoints import RESTARTED, STAGING, checkpoints_in
from training.errors import PipelineError, SettingsError, is_out_of_memory
from training.heartbeat import heart
from training.memory_plan import (
    MEMORY_SHARE,
    Hardware,
    Load,
    MemoryPlan,
    Way,
    candidates,
    estimate,
    layer_ways,
    remedy,
    state_table,
    table,
    way_words,
)
from training.processes import (
    agreed_port,
    in_columns,
    least,
    leave_note,
    say,
    together,
    world_size,
)
from training.progress import say_memory
from training.prompt_and_mask import PageEncoder
from training.settings import PageSettings, Resolved

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, Trainer, TrainingArguments

GIB = 2**30
CPU = torch.device("cpu")
# In the environment of a training that has restarted itself with the same pages: their number was not typed by a user.
SAME_PAGES = "HOLO1_SAME_PAGES"
FINISHED_S = 120.0  # in which a checkpoint that was saved is put into its place

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


@dataclass(frozen=True)
class Decision:
    """Every way that the settings allow, the fastest first, and the first of them that fits; None where none does."""

    candidates: list[Way]
    chosen: MemoryPlan | None
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
    )


def sizes_of(pages: int) -> list[int]:
    """How many of a step's `pages` may go through at once, the fewest first: so many that none is left over."""
    return [size for size in range(1, pages + 1) if pages % size == 0]


def decide(scope: Scope, load_of: Callable[[int], Load], page: Load, processes: int, hardware: Hardware) -> Decision:
    """What is done on `processes` GPUs, each with `hardware`, where `load_of` is the longest batch of so many pages and
    `page` their mean."""
    way = replace(scope.way, processes=processes)
    options = {"sizes": scope.sizes, "whole": scope.whole, "recomputed": scope.recomputed, "offloaded": scope.offloaded}
    ways = candidates(scope.shape, way, scope.pages, page, load_of, hardware, **options)

    def plan_of(way: Way) -> MemoryPlan:
        return estimate(scope.shape, load_of(way.micro_batch), way, scope.bucket)

    fitting = (plan for plan in map(plan_of, ways) if plan.total_gib <= hardware.gpu_gib)
    return Decision(ways, next(fitting, None), plan_of)


# -----------------------------------------------------------------------------
# Training


def choose_micro_batch(
    args: TrainingArguments, settings: PageSettings, config: PretrainedConfig, pages: Dataset, encoder: PageEncoder
) -> MemoryPlan | None:
    """(all ranks) Which pages go through at once, and which layers keep their activations, by `decide`; None on a CPU
    and on the plain path, which trains as it was told.

    Sets them in `args` and in DeepSpeed's configuration; pages per step stay the same. `Fit` proves the choice.
    """
    fast = trains_fast(config, settings)
    if settings.offload_share and not fast:
        raise SettingsError(f"--offload_share {settings.offload_share}: this model has no fast path; leave it out")
    if args.device.type != "cuda" or not fast:
        return None
    deepspeed = args.hf_deepspeed_config.config if args.deepspeed else None
    scope = scope_of(settings, vars(args), deepspeed, config)
    loads, mean = longest_loads(pages, encoder, scope), mean_load(pages, encoder, scope)
    hardware = hardware_of(args.device, scope)

    def longest(size: int) -> Load:
        return loads[size - 1]

    decision = decide(scope, longest, mean, world_size(), hardware)
    plan, limit = decision.chosen, hardware.gpu_gib
    if plan is None:  # the plan may err: tried, with a warning, rather than refused
        plan = decision.smallest
        say(f"the plan says {plan.total_gib:.1f} GiB, which {remedy(plan.way, limit)}; trying all the same")
    way = plan.way
    args.per_device_train_batch_size = way.micro_batch
    args.gradient_accumulation_steps = scope.pages // way.micro_batch
    args.activation_checkpointing = max(way.recomputed, way.recomputed_vision) > 0
    if deepspeed is not None:
        deepspeed["train_micro_batch_size_per_gpu"] = way.micro_batch
        deepspeed["gradient_accumulation_steps"] = args.gradient_accumulation_steps
        zero3.tune_zero(deepspeed.get("zero_optimization", {}), way)
    parts = ", ".join(f"{name} {size:.1f}" for name, size in plan.parts_gib.items())
    told = (
        f"micro-batch: {plural(way.micro_batch, 'page')} at once, {way_words(plan)}{whole_words(way)}; "
        f"{plan.total_gib:.1f} GiB planned of {limit:.1f} ({parts})"
    )
    say(in_columns(told))
    roomy = decide(scope, longest, mean, world_size(), replace(hardware, pinned_gib=math.inf)).chosen
    if words := link_words(plan, roomy, hardware):
        say(in_columns(words))
    return plan


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


def mean_load(pages: Dataset, encoder: PageEncoder, scope: Scope) -> Load:
    """The mean page."""
    counted = pages.select_columns(["html_tokens", "image_tokens"])
    image, html = (sum(counted[name]) / len(counted) for name in ("image_tokens", "html_tokens"))
    return Load(encoder.question_tokens + image + html + 1, image * scope.shape.per_token, html + 1)


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
        away = settings.offload_share or 0.0
        share = 1.0 - away if settings.checkpoint_share is None else settings.checkpoint_share
        self.ours = os.environ.pop(SAME_PAGES, None) is not None  # read once: a later training is a new one
        self.way = plan.way if plan else Way(recomputed=share, recomputed_vision=share, offloaded=away)

    def __call__(self, trainer: Trainer, collate: Callable[[list], dict], pages: Dataset, held_out: Dataset) -> None:
        """(all ranks) Raises OutOfMemoryError where a batch does not fit whose size was typed, or which is a page
        alone; restarts with more layers recomputed, then with fewer pages, where auto chose them."""
        args = trainer.args
        offload = treat_layers(trainer.model, self.way, args.activation_checkpointing, args.device)
        if self.settings.offload_share and not offload:
            layers = plural(len(layers_of(trainer.model, vision=False)), "layer")
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
            self.prove(trainer, collate, pages)
        if offload:
            pinned = f", {offload.pinned_gib:.1f} GiB of it, pinned" if self.plan else ""  # else by the first step
            say(
                f"activations of {sum(offload.chosen)} of {len(offload.layers)} layers wait in the CPU's memory{pinned}"
            )

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
        """(all ranks) In the same processes: DeepSpeed cannot go on after this. First with all layers recomputed, where
        the plan that has erred let some be kept; then with at most half as many of a step's `pages` at once.

        Only what auto has chosen. Whoever typed a number, in whatever spelling and by whichever of the two flags, meant
        it and gets the error; so does a run that has restarted with fewer pages, whose number is typed here. A share
        that the user typed stays.
        """
        way, settings = self.plan.way, self.settings
        size, auto = way.micro_batch, settings.micro_batch == "auto" or self.ours
        kept = way.recomputed + way.offloaded < 1 or (way.vision_learns and way.recomputed_vision < 1)
        if kept and settings.checkpoint_share is None:
            os.environ |= {SAME_PAGES: "1"} if auto else {}
        elif auto and size > 1:
            size = max(fewer for fewer in sizes_of(pages) if fewer <= size // 2)
        else:
            raise failure or torch.OutOfMemoryError("out of memory on another GPU")
        again = ["--micro_batch", str(size)]
        # What is on its way to the CPU's memory and back takes memory, too, of a plan that has erred.
        for name, value in {"checkpoint_share": 1 - (settings.offload_share or 0), "offload_share": 0}.items():
            again += [f"--{name}", f"{value:g}"] if getattr(settings, name) is None else []
        say(f"the plan was too bold: restarting with {' '.join(again)}")
        sys.stdout.flush()
        if world_size() > 1:  # at a place of our own: torchrun's still holds the keys of this attempt
            os.environ["MASTER_PORT"] = str(agreed_port())
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        os.environ[RESTARTED] = "1"  # its own evaluation before training is no earlier run's
        heart.falls_silent()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *again])


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


# -----------------------------------------------------------------------------
# Layers


def treat_layers(
    model: torch.nn.Module, way: Way, recomputes: bool = True, device: torch.device = CPU
) -> Offload | None:
    """Let each layer of both towers keep its activations, make them again, or have them wait in the CPU's memory, as
    `way` has it; without `recomputes`, which is what the Trainer was told, none makes them again. Returns what moves
    those that wait, if any do."""
    offload = None
    for vision in (False, True):
        layers = layers_of(model, vision)
        shares = (way.recomputed_vision, 0.0) if vision else (way.recomputed, way.offloaded)
        again, away = (math.floor(len(layers) * share + 1e-6) for share in shares)
        ways = layer_ways(len(layers), again * recomputes, away)
        for layer, treated in zip(layers, ways):
            layer.gradient_checkpointing = treated == "recomputed"
        if away:
            offload = Offload(layers, [treated == "offloaded" for treated in ways], device)
        if vision and not any(parameter.requires_grad for layer in layers for parameter in layer.parameters()):
            spare_frozen_tower(model)
    return offload


def spare_frozen_tower(model: torch.nn.Module) -> None:
    """Take from a tower that learns nothing the backward pass that transformers 5.23 gives it: with activation
    checkpointing the output of every embedding, of patches too, is made to need a gradient."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module, "_require_grads_hooks", None):
            module.disable_input_require_grads()  # adapters have a hook of their own (add_adapters)


def layers_of(model: torch.nn.Module, vision: bool) -> list[torch.nn.Module]:
    """The layers of the vision tower, or of the language model, the first first; also where adapters wrap `model`."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]
    return [layer for name, layer in layers if ("visual" in name.split(".")) == vision]


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
    if not (optim := eight_bit.name_of(training["optim"])).startswith("adamw"):
        say(f"--optim {optim} is not planned: its moments may take more or less than AdamW's, which stand there")
    copy = 2 * parameters / GIB
    say(f"before and after training a copy that writes pages takes {copy:.1f} GiB more, when activations take none")


def longest_page(family: Family, config: PretrainedConfig, image_tokens: int, html_tokens: int) -> Load:
    """The load of one page at both limits, its question included."""
    tokens = image_tokens + html_tokens + QUESTION_TOKENS
    return Load(tokens, image_tokens * family.shape(config).per_token, html_tokens)


def fast_table(scope: Scope, page: Load) -> str:
    """The lines of `--plan`: what is chosen for each number of GPUs and each size of theirs in GiB."""
    rows = []
    for processes in PROCESSES:
        for size in SIZES_GIB:
            decision = decide(scope, page.times, page, processes, Hardware(MEMORY_SHARE * size, link_gb_s=LINK_GB_S))
            rows.append((processes, size, decision.chosen))
    told = table(rows, scope.way)
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
