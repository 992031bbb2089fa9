"""The one decision what fits: from the settings and the model's own family, for `--plan` and for training.

    plan = choose_micro_batch(args, settings, config, pages, encoder)      # (all ranks) sets it in args and JSON
    fit = Fit(plan, plain_loss, settings.checkpoint_share)                  # proves it before step one
    print_plan(base, resolved)                                              # --plan

Sections: Plan, Choice, Proof.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from pathlib import Path

import torch

from training import memory_plan, page_costs, zero3
from training.base_model import base_tensors, load_config
from training.errors import PipelineError, is_out_of_memory
from training.families import family_of, trains_fast
from training.processes import agreed_port, least, say, together, world_size
from training.progress import say_memory
from training.prompt_and_mask import PageEncoder
from training.settings import PageSettings, Resolved

# -----------------------------------------------------------------------------
# Plan


def print_plan(base: Path, resolved: Resolved) -> None:
    """What each part of the memory would take, and what `--micro_batch auto` would choose, without a GPU."""
    settings, config = resolved.settings, load_config(base, resolved.settings)
    sizes = [math.prod(tensor.shape) for tensor in base_tensors(base, settings).values()]
    pages = resolved.training["per_device_train_batch_size"] * resolved.training["gradient_accumulation_steps"]
    tokens = (family_of(config).most_image_tokens(config, settings.max_pixels), settings.max_html_tokens + 1)
    say(f"{settings.base_model}: {sum(sizes) / 1e9:.2f} B parameters; {pages} pages per step and GPU, each of at most ")
    say(
        f"{tokens[0]:,} image tokens and {tokens[1]:,} of HTML; GiB on each GPU under {resolved.training['deepspeed']}:"
    )

    def longest(count: int) -> memory_plan.Load:
        return memory_plan.Load(
            count * (sum(tokens) + 40), count * tokens[0] * family_of(config).shape(config).per_token, count * tokens[1]
        )

    way = training_way(resolved.training, settings, resolved.deepspeed, fused=True)
    bucket, whole = zero3.bucket_size(resolved.deepspeed), zero3.may_be_whole(resolved.deepspeed, config)
    say(memory_plan.table(family_of(config).shape(config), longest, way, pages, bucket, whole, (24, 40, 80, 140)))
    copy = 2 * sum(sizes) / 2**30
    say(f"before and after training a copy that writes pages takes {copy:.1f} GiB more, when activations take none")


def training_way(training: dict, settings: PageSettings, deepspeed: dict | None, fused: bool) -> memory_plan.Way:
    """How these settings train, as the memory plan sees it."""
    zero = (deepspeed or {}).get("zero_optimization", {})
    return memory_plan.Way(
        processes=world_size(),
        micro_batch=training["per_device_train_batch_size"],
        sharded=zero.get("stage") == 3,
        offload=(zero.get("offload_optimizer") or {}).get("device", "none") != "none",
        adapters=settings.lora or settings.quantize == "4bit",
        four_bit=settings.quantize == "4bit",
        frozen_vision=settings.freeze_vision,
        fused=fused,
    )


# -----------------------------------------------------------------------------
# Choice


def choose_micro_batch(args, settings: PageSettings, config, pages, encoder: PageEncoder) -> memory_plan.Plan | None:
    """(all ranks) As many pages at once, and as few layers worked out twice, as the plan says will fit; None on a CPU.

    Sets them in `args` and in DeepSpeed's configuration; pages per step stay the same. `Fit` proves the choice.
    """
    if args.device.type != "cuda" or not trains_fast(config, settings):
        return None
    deepspeed = args.hf_deepspeed_config.config if args.deepspeed else None
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    way = training_way({"per_device_train_batch_size": args.per_device_train_batch_size}, settings, deepspeed, True)
    bucket, loads = (
        zero3.bucket_size(deepspeed),
        longest_loads(pages, encoder, per_step, encoder.family.shape(config).per_token),
    )
    shares = memory_plan.SHARES if settings.checkpoint_share is None else [settings.checkpoint_share]
    costs = costs_of(config, pages, encoder)
    tflops = page_costs.peak_tflops(torch.cuda.get_device_name(args.device)) or 0.0
    limit, tflops = least([memory_limit(args.device), tflops])  # ranks that chose differently would wait for ever
    seconds = page_costs.page_seconds(sum(costs) / len(costs), tflops or None)
    weights, whole = sum(page_costs.weights_of(encoder.family.shape(config))), zero3.may_be_whole(deepspeed, config)
    ways = memory_plan.candidates(way, per_step, seconds, weights, shares, whole)
    if settings.micro_batch != "auto":
        ways = [way for way in ways if way.micro_batch == args.per_device_train_batch_size]

    def plan_of(way: memory_plan.Way) -> memory_plan.Plan:
        return memory_plan.estimate(encoder.family.shape(config), loads[way.micro_batch - 1], way, bucket)

    plan = memory_plan.choose(ways, plan_of, limit)
    if plan is None:  # the plan may err: tried, with a warning, rather than refused
        plan = min(map(plan_of, ways), key=lambda plan: plan.total)
        say(f"the plan says {plan.total:.1f} GiB, which {memory_plan.remedy(way, limit)}; trying all the same")
    args.per_device_train_batch_size = plan.way.micro_batch
    args.gradient_accumulation_steps = per_step // plan.way.micro_batch
    args.activation_checkpointing = plan.way.checkpointed > 0
    if deepspeed is not None:
        deepspeed["train_micro_batch_size_per_gpu"] = plan.way.micro_batch
        deepspeed["gradient_accumulation_steps"] = args.gradient_accumulation_steps
        zero3.tune_zero(deepspeed.get("zero_optimization", {}), plan.way)
    parts = ", ".join(f"{name} {size:.1f}" for name, size in plan.parts.items())
    say(
        f"micro-batch: {plan.way.micro_batch} pages at once, {plan.way.checkpointed:.0%} of the layers worked out twice"
        f"{whole_words(plan.way)}; {plan.total:.1f} GiB planned of {limit:.1f} ({parts})"
    )
    return plan


def whole_words(way: memory_plan.Way) -> str:
    if not way.whole:
        return ""
    return ", weights stay gathered" if way.processes == 1 else ", weights gathered once per step"


def memory_limit(device) -> float:
    """GiB of a GPU that may be planned for, of the share that torch may use of it (PYTORCH_CUDA_ALLOC_CONF)."""
    total = torch.cuda.get_device_properties(device).total_memory
    return memory_plan.MEMORY_SHARE * torch.cuda.get_per_process_memory_fraction(device) * total / 2**30


def longest_loads(pages, encoder: PageEncoder, most: int, merge: int) -> list[memory_plan.Load]:
    """The longest possible batch of 1, 2, ... `most` pages: no order of the pages makes a longer one."""
    question = encoder.question_tokens
    sizes = sorted(
        (
            (question + page["image_tokens"] + page["html_tokens"] + 1, page["image_tokens"], page["html_tokens"] + 1)
            for page in pages.select_columns(["html_tokens", "image_tokens"])
        ),
        reverse=True,
    )
    loads, sums = [], (0, 0, 0)
    for number in range(most):
        sums = tuple(map(sum, zip(sums, sizes[number % len(sizes)])))
        loads.append(memory_plan.Load(sums[0], sums[1] * merge, sums[2]))
    return loads


def compare_with_plan(trainer, plan: memory_plan.Plan) -> None:
    """(main process only) Say how far the measured peak was from the plan for the heaviest batch of this rank."""
    peak = max((entry["peak_gib"] for entry in trainer.state.log_history if "peak_gib" in entry), default=0.0)
    if peak and any(trainer.heaviest):
        load = memory_plan.Load(*trainer.heaviest)
        bucket = zero3.bucket_size(trainer.args.hf_deepspeed_config.config if trainer.args.deepspeed else None)
        config = trainer.model.config
        planned = memory_plan.estimate(family_of(config).shape(config), load, plan.way, bucket).total
        say(f"peak: {peak:.1f} GiB measured, {planned:.1f} planned for the heaviest batch, {planned / peak - 1:+.1%}")


def costs_of(config, pages, encoder: PageEncoder) -> list[float]:
    """Floating-point operations of each page, from its counted tokens alone."""
    counted = pages.select_columns(["html_tokens", "image_tokens"])
    return page_costs.flops_of_pages(encoder.family.shape(config), counted, encoder.question_tokens)


# -----------------------------------------------------------------------------
# Proof


class Fit:
    """Proves before step one that the longest possible batch fits, and that the fast path gives the plain loss."""

    def __init__(self, plan: memory_plan.Plan | None, plain_loss: float | None, share: float | None):
        self.plan, self.plain_loss = plan, plain_loss
        self.share = plan.way.checkpointed if plan else 1.0 if share is None else share

    def __call__(self, trainer, collate, pages, held_out) -> None:
        """(all ranks) Raises OutOfMemoryError, or starts anew with half as many pages where auto chose them."""
        import torch
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

        if trainer.args.activation_checkpointing:
            checkpoint_some_layers(trainer.model, self.share)
        if collate.packed and is_deepspeed_zero3_enabled():
            zero3.lean_steps(trainer.model_wrapped)
        if self.plain_loss is not None:
            with torch.no_grad():
                loss = self.forward(trainer, collate(list(held_out.select(range(min(2, len(held_out)))))))
            say(f"fast path: loss {loss.item():.4f} on the two held-out pages, {self.plain_loss:.4f} the plain way")
            if not abs(loss.item() - self.plain_loss) <= 0.02 * self.plain_loss:
                raise PipelineError(
                    f"the fast path's loss is {loss.item()}, the plain one's {self.plain_loss}: use --fast False"
                )
        if self.plan:
            self.prove(trainer, collate, pages)

    def forward(self, trainer, batch: dict):
        batch.pop("flops", None)
        with trainer.compute_loss_context_manager():
            return trainer.model_wrapped(**trainer._prepare_inputs(batch)).loss

    def prove(self, trainer, collate, pages) -> None:
        costs = costs_of(trainer.model.config, pages, collate.encoder)
        longest = sorted(range(len(pages)), key=lambda place: -costs[place])
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
        peak = torch.cuda.max_memory_allocated() / 2**30
        try:
            failed = together(failure is not None)
        except RuntimeError as error:  # others wait for us inside a collective, where nobody can call them back
            raise failure or error from error
        if failed:
            self.start_anew(trainer.args, failure)
        say_memory(f"the longest possible batch of {self.plan.way.micro_batch} pages fits, {peak:.1f} GiB,", start)

    def start_anew(self, args, failure: Exception | None) -> None:
        """(all ranks) In the same processes, with half as many pages at once: DeepSpeed cannot go on after this."""
        size = self.plan.way.micro_batch
        if size == 1 or "--micro_batch" in sys.argv:
            raise failure or torch.OutOfMemoryError("out of memory on another GPU")
        say(f"the plan was too bold: starting anew with --micro_batch {size // 2}")
        sys.stdout.flush()
        if world_size() > 1:  # at a place of our own: torchrun's still holds the keys of this attempt
            os.environ["MASTER_PORT"] = str(agreed_port())
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        again = [*sys.orig_argv[1:], "--micro_batch", str(size // 2), "--checkpoint_share", "1"]
        os.execv(sys.executable, [sys.executable, *again])


def checkpoint_some_layers(model, share: float) -> None:
    """Of each tower's layers, `share` have their activations worked out twice, spread evenly."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    towers: dict[type, list] = {}
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            towers.setdefault(type(module), []).append(module)
    for layers in towers.values():
        for place, layer in enumerate(layers):
            layer.gradient_checkpointing = math.floor((place + 1) * share) > math.floor(place * share)
