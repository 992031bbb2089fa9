"""How much memory pages take on a GPU, from the architecture alone, and which ways of training come first.

    plan = estimate(shape, Load(tokens=21_000, patches=20_000, supervised=16_000), Way(processes=4))
    plan.parts_gib, plan.total_gib                  # on each GPU: weights, gradients, optimizer, activations, ...
    candidates(Way(), pages=8, seconds=0.2, weights=4e9)        # the fastest first; memory_fit takes one that fits

Imports no torch. Sections: What is planned, Estimate, Candidates, Table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from families.page_costs import LOSS_ROWS, Shape, Tower, weights_of

GIB = 2**30

# -----------------------------------------------------------------------------
# What is planned


@dataclass(frozen=True)
class Load:
    """What goes through a GPU at once: language tokens, vision patches, supervised tokens of all its pages together."""

    tokens: int
    patches: int
    supervised: int

    def times(self, count: int) -> Load:
        """The load of `count` such pages."""
        return Load(count * self.tokens, count * self.patches, count * self.supervised)


@dataclass(frozen=True)
class Way:
    """How it is trained. `recomputed` is the share of layers whose activations are recomputed; `whole` gathers the
    weights once per step, not for each layer of each micro-batch (one GPU: never, it has them all)."""

    processes: int = 1
    micro_batch: int = 1
    recomputed: float = 1.0
    whole: bool = False
    sharded: bool = True  # ZeRO-3; else each GPU holds everything, in fp32
    offload: bool = False
    adapters: bool = False  # LoRA: only these learn
    four_bit: bool = False
    frozen_vision: bool = False
    fused: bool = True


@dataclass(frozen=True)
class MemoryPlan:
    """What a way of training takes of each GPU at the worst moment of a step, by parts."""

    way: Way
    parts_gib: dict[str, float]

    @property
    def total_gib(self) -> float:
        """GiB of each GPU, all parts together."""
        return sum(self.parts_gib.values())


# -----------------------------------------------------------------------------
# Estimate

LIVE_WEIGHTS = 1_000_000_000  # gathered at once at most: DeepSpeed's stage3_max_live_parameters
BUCKETS = 3  # reduce_bucket_size in flight: two to overlap, one being copied
ADAPTER_SHARE = 0.01  # of the weights; rank 16 on 3B is 0.8 %
MEMORY_SHARE = 0.93  # of a GPU that is planned for: the rest is the driver's, NCCL's, and the allocator's gaps


def estimate(shape: Shape, load: Load, way: Way, bucket: int = 0) -> MemoryPlan:
    """GiB on each GPU at the worst moment of a step, `bucket` weights in each of DeepSpeed's buckets.

    Within a tenth of what was measured (benchmarks/README.md).
    """
    parts = state(shape, way)
    # One process sends no gradients, and is given no bucket for them (zero3.tune_zero).
    parts["buckets"] = 2 * BUCKETS * bucket * way.sharded * (way.processes > 1 or way.offload)
    parts["activations"] = activations(shape, load, way)
    parts["head"] = head(shape, load, way)
    return MemoryPlan(way, {name: size / GIB for name, size in parts.items()})


def state(shape: Shape, way: Way) -> dict[str, float]:
    """Bytes on each GPU that no page changes: weights, gradients, optimizer, and weights gathered at once."""
    language, vision, embedding = weights_of(shape)
    total, shared = language + vision + embedding, way.processes if way.sharded else 1
    learning = ADAPTER_SHARE * total if way.adapters else total - (vision if way.frozen_vision else 0)
    if not way.sharded:  # fp32 weights and their half-precision copies, which autocast keeps for the backward pass
        stored = (0.55 * language + 2 * (vision + embedding)) if way.four_bit else (2 if way.adapters else 6) * total
        return {"weights": stored, "gradients": 4 * learning, "optimizer": 8 * learning, "gathered": 0.0}
    live = total if way.whole else min(total, LIVE_WEIGHTS)
    parts = {"weights": 2 * total / shared, "gradients": 2 * learning / shared, "optimizer": 12 * learning / shared}
    parts["gathered"] = 2 * live * (shared > 1 or way.offload)  # one process: DeepSpeed gathers without a copy
    if way.offload:
        parts |= {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0}  # they leave as they come
    return parts


def layer_bytes(tower: Tower, adapters: bool, linear: bool = False) -> float:
    """Bytes per token that one layer, of `linear` attention or not, keeps for its backward pass: the residual stream
    before and after attention, what attention keeps, gate and up, or what goes into an MLP without a gate; with
    adapters what was normed and gated, too."""
    attention = tower.linear.kept if linear else tower.kept
    kept = 2 * (2 * tower.hidden + attention + (1 + tower.gated) * tower.intermediate)
    return kept + 2 * (2 * tower.hidden + tower.intermediate) * adapters


def activations(shape: Shape, load: Load, way: Way) -> float:
    """Bytes that all layers keep, of those that are recomputed only their inputs and one layer at a time."""
    text, vision = shape.language, shape.vision

    def kept(tower: Tower, count: int) -> tuple[float, float]:
        """What waits, and the one layer that is made again."""
        again = math.floor(tower.layers * way.recomputed)
        kinds = {False: tower.attending, True: tower.linear.layers}
        sizes = {kind: layer_bytes(tower, way.adapters, kind) for kind, number in kinds.items() if number}
        # Those that are recomputed are spread over both kinds, and one of the larger kind is made again at a time.
        each = sum(sizes[kind] * kinds[kind] for kind in sizes) / tower.layers
        waiting = (tower.layers - again) * each + again * 2 * tower.hidden
        return count * waiting, count * max(sizes.values()) * (again > 0)

    learning = [(text, load.tokens)]
    if not (way.frozen_vision or way.adapters):
        learning.append((vision, load.patches))
    waiting, made_again = zip(*(kept(*each) for each in learning))
    needed = sum(waiting) + max(made_again)  # the language model is done when the tower begins
    # Of each merger two products' inputs as wide as its patches, of those deep down what was normed, too; and what
    # those have made of the image tokens, which waits for the language model.
    deep = shape.mergers - 1
    merged = 2 * (shape.patch + (2 + 3 * deep) * vision.hidden + deep * text.hidden / shape.per_token)
    return needed + load.tokens * 12 * text.hidden + load.patches * merged


def head(shape: Shape, load: Load, way: Way) -> float:
    """Bytes of the logits that exist at once, of the head's gradients, and of the states that they are made of."""
    rows = min(load.supervised, LOSS_ROWS)
    logits = rows * shape.vocabulary * (4 if way.fused else 16)
    # The head's, in half precision. The embedding's comes when layers keep nothing any more, so it needs no room of its
    # own; but with the optimizer on the CPU the plan was too low already, and keeps it.
    gradients = 0 if way.adapters else 2 * (1 + way.offload) * shape.vocabulary * shape.language.hidden
    return logits + gradients + load.supervised * 4 * shape.language.hidden


# -----------------------------------------------------------------------------
# Candidates

RECOMPUTED_SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


# Of a core, for each micro-batch, in DeepSpeed's and torch's Python; a GPU that needs less waits. 0.5 was measured; a
# fifth is added, by which hosts differ: where two ways are about equal, more pages at once are safer.
HOOK_SECONDS = 0.6
# More time when all layers are recomputed; measured before they left out their last product then (fast_parts).
RECOMPUTING = 0.3
HOOKS = 0.05  # more time when one GPU goes through DeepSpeed's hooks and buckets (43.3 instead of 45.5 % MFU)
FETCH_SECONDS = 5e-11  # for each weight and micro-batch, by layers: 3B on two H200s took 0.19 s more than on one
GATHER_SECONDS = 2e-11  # for each weight and step, all at once: 2 bytes at 100 GB/s; not measured on several GPUs yet


def candidates(
    way: Way,
    pages: int,
    seconds: float,
    weights: float,
    sizes: Iterable[int] | None = None,
    shares: Iterable[float] = RECOMPUTED_SHARES,
    whole: Sequence[bool] = (True, False),
) -> list[Way]:
    """Every way to put `pages` pages of a step, each of `seconds`, through a GPU, the fastest first: `sizes` pages at
    once (None: any number that divides them), `shares` of the layers recomputed, and `weights` gathered once per step
    or by layers, as `whole` allows.

    The constants come from an H200 with 3B (benchmarks/README.md): 1 page x 8 took 4.3 s a step, 4 x 2 took 1.8, and
    2.4 with all layers recomputed.
    """
    sizes = sorted(range(1, pages + 1) if sizes is None else sizes, reverse=True)
    sizes = [size for size in sizes if pages % size == 0]
    kept = whole if way.sharded and not way.offload else [False]
    found = [replace(way, micro_batch=s, recomputed=c, whole=w) for s in sizes for c in shares for w in kept]

    def time(way: Way) -> float:
        alone = way.processes == 1
        busy = way.micro_batch * seconds * (1 + RECOMPUTING * way.recomputed) * (1 + HOOKS * (alone and not way.whole))
        fetching = 0.0 if alone or way.whole or not way.sharded else FETCH_SECONDS * weights
        gathering = GATHER_SECONDS * weights * (way.whole and not alone)
        return pages / way.micro_batch * (max(HOOK_SECONDS, busy) + fetching + 0.02) + gathering

    return sorted(found, key=time)


# -----------------------------------------------------------------------------
# Table


def remedy(way: Way, limit_gib: float) -> str:
    """What to change when nothing fits."""
    options = [] if way.frozen_vision else ["--freeze_vision"]
    options += [] if way.adapters else ["--lora"]
    options += [] if way.offload else ["--config ds_z3_offload.json"]
    fewer = "fewer --max_pixels or --max_html_tokens, more GPUs"
    return f"does not fit {limit_gib:.0f} GiB: {fewer}, {', '.join(options)}"


def table(rows: Iterable[tuple[int, float, MemoryPlan | None]], way: Way) -> str:
    """A line for each (GPUs, GiB of each, what is chosen there or None); `way` says what could be changed."""
    lines = ["GPUs  of GiB  at once  recomputed  weights  gradients  optimizer  gathered  activations  head   sum"]
    for processes, size, plan in rows:
        if plan is None:
            lines.append(f"{processes:4d} {size:7.0f}  {remedy(way, size)}")
            continue
        part = plan.parts_gib
        lines.append(
            f"{processes:4d} {size:7.0f} {plan.way.micro_batch:8d} {plan.way.recomputed:10.0%} "
            f"{part['weights']:8.1f} {part['gradients']:10.1f} {part['optimizer']:10.1f} "
            f"{part['gathered'] + part['buckets']:9.1f} {part['activations']:12.1f} {part['head']:5.1f} "
            f"{plan.total_gib:5.1f}"
        )
    return "\n".join(lines)


def state_table(shape: Shape, way: Way, counts: Iterable[int], sizes_gib: Iterable[float]) -> str:
    """What is there on each GPU without any page, and what is left for pages of its size."""
    sizes = tuple(sizes_gib)
    left = "".join(f"  of {size:3.0f}" for size in sizes)
    lines = [f"GPUs  weights  gradients  optimizer  gathered    sum   left{left}"]
    for processes in counts:
        part = {name: size / GIB for name, size in state(shape, replace(way, processes=processes)).items()}
        there = sum(part.values())
        rest = "".join(
            f"{MEMORY_SHARE * size - there:8.1f}" if there < MEMORY_SHARE * size else "    none" for size in sizes
        )
        lines.append(
            f"{processes:4d} {part['weights']:8.1f} {part['gradients']:10.1f} {part['optimizer']:10.1f} "
            f"{part['gathered']:9.1f} {there:6.1f}       {rest}"
        )
    return "\n".join(lines)
