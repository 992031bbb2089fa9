"""How much memory pages take on a GPU, from the architecture alone, and which ways of training come first.

    plan = estimate(shape, Load(tokens=21_000, patches=20_000, supervised=16_000), Way(processes=4))
    plan.parts_gib, plan.total_gib                  # on each GPU: weights, gradients, optimizer, activations, ...
    candidates(shape, Way(), 8, page, page.times, Hardware(75))     # the fastest first; memory_fit takes one that fits
    Rungs(shape, ways, 75).plan_for(load)           # of these the first that fits a batch of that size
    layer_ways(36, 18, 9)                           # which layers are kept, recomputed, offloaded

Imports no torch. Sections: What is planned, Layers, Estimate, Candidates, Rungs, Table.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from families.page_costs import LOSS_ROWS, Shape, Tower, page_operations, page_seconds, weights_of
from training.command_line import WRAPPER_FLAGS
from training.eight_bit import MOMENT_BYTES, NAMES

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
    """How it is trained. Of the language model's layers the share `recomputed` makes its activations again, the share
    `offloaded` has them wait in the CPU's memory, the others keep them; of the vision tower's `recomputed_vision` makes
    them again. `whole` gathers the weights once per step, not for each layer of each micro-batch (one GPU: never, it
    has them all)."""

    processes: int = 1
    micro_batch: int = 1
    recomputed: float = 1.0
    recomputed_vision: float = 1.0
    offloaded: float = 0.0
    whole: bool = False
    sharded: bool = True  # ZeRO-3; else each GPU holds everything, in fp32
    offload: bool = False  # of the optimizer
    adapters: bool = False  # LoRA: only these learn
    four_bit: bool = False
    frozen_vision: bool = False
    fused: bool = True
    moments: int = 2  # numbers that the optimizer keeps for one that learns, beside its master
    eight_bit: bool = False  # these
    split: bool = False  # masters: of 32 bits the lower 16, the others being the weights (split_masters.py)
    fp8: bool = False  # products of the language model's layers

    @property
    def moment_bytes(self) -> float:
        """Of all moments of one number; of embeddings without ZeRO-3 it is more (`state`)."""
        return self.moments * (MOMENT_BYTES if self.eight_bit else 4)

    @property
    def vision_learns(self) -> bool:
        """Whether the tower has a backward pass."""
        return not (self.frozen_vision or self.adapters)

    @property
    def by_layers(self) -> bool:
        """Whether ZeRO-3 gathers the weights of each layer when it comes to it, in the backward pass again."""
        return self.sharded and not self.whole


@dataclass(frozen=True)
class Hardware:
    """What each process has: GiB of its GPU that may be planned for, the TFLOP/s of that by its datasheet (None: not
    known), GB/s that the link to the CPU carries each way while all processes use it, and GiB of the CPU's memory that
    may be pinned."""

    gpu_gib: float
    tflops: float | None = None
    link_gb_s: float = 0.0
    pinned_gib: float = math.inf


@dataclass(frozen=True)
class MemoryPlan:
    """What a way of training takes of each GPU at the worst moment of a step, by parts, and of the CPU's memory for
    activations that wait there (`pinned_gib`, for each process). A plan that training goes by has `rungs`, from which
    each batch takes its own."""

    way: Way
    parts_gib: dict[str, float]
    pinned_gib: float = 0.0
    rungs: Rungs | None = field(default=None, compare=False, repr=False)

    @property
    def total_gib(self) -> float:
        """GiB of each GPU, all parts together."""
        return sum(self.parts_gib.values())


# -----------------------------------------------------------------------------
# Layers


def share_of(layers: int, share: float) -> int:
    """How many `share` of so many layers are; one that is a quotient of them comes to its whole number."""
    return math.floor(layers * share + 1e-6)


def count_of(tower: Tower, share: float) -> int:
    """`share_of` a tower's layers."""
    return share_of(tower.layers, share)


def layer_ways(layers: int, recomputed: int, offloaded: int) -> list[str]:
    """`kept`, `recomputed` or `offloaded` for each of `layers`, the first layer first. Raises ValueError where the last
    two are more than there are.

    Those offloaded are spread, so that a copy has the time of several layers, the first layer among them, since its
    activations come back last. Of the others the last are kept: the backward pass has done with them before it makes
    any again, so that the two need not stand in memory together.
    """
    if recomputed + offloaded > layers:
        raise ValueError(f"{recomputed} layers recomputed and {offloaded} offloaded are more than {layers}")
    away = {number * layers // offloaded for number in range(offloaded)}
    rest = [number for number in range(layers) if number not in away]
    again = {*rest[:recomputed]}
    return ["offloaded" if n in away else "recomputed" if n in again else "kept" for n in range(layers)]


# -----------------------------------------------------------------------------
# Estimate

LIVE_WEIGHTS = 1_000_000_000  # gathered at once at most: DeepSpeed's stage3_max_live_parameters
# reduce_bucket_size in flight: two to overlap, one being copied; or DeepSpeed's own, one of large gradients under way,
# and one of small ones, as they are and joined (scattering.py).
BUCKETS = 3
FP8_BYTES = 1  # for each weight of the language model's layers whose e4m3 stays for a step
ADAPTER_SHARE = 0.01  # of the weights; rank 16 on 3B is 0.8 %
MEMORY_SHARE = 0.93  # of a GPU that is planned for: the rest is the driver's, and the allocator's gaps
# What several processes take besides, outside of torch: two groups of theirs, ours and DeepSpeed's, and for each of
# some 24 channels NCCL's buffers of 10 MB to and from another one. By count; not measured.
NCCL_GIB = 1.0
# Of that, what batches fill that are not the longest. Every one of them does, and their sizes differ: on one H100 torch
# ran out in a second step of which 75.2 of 79.2 GiB were planned, with 3.7 GiB in gaps between what it had allocated.
# So filled, 14 steps of 3B went through there, 71.5 GiB at the peak, and torch gave its cache back once.
FILLED_SHARE = 0.965


def plannable_gib(size: float, processes: int) -> float:
    """Of a GPU of `size` GiB, one of `processes`, what torch's tensors may take."""
    return MEMORY_SHARE * size - NCCL_GIB * (processes > 1)


def estimate(shape: Shape, load: Load, way: Way, bucket: int = 0) -> MemoryPlan:
    """GiB on each GPU at the worst moment of a step, `bucket` weights in each of DeepSpeed's buckets.

    Within a tenth of what was measured (benchmarks/README.md).
    """
    parts = state(shape, way)
    # One process sends no gradients, and is given no bucket for them (zero3.tune_zero).
    parts["buckets"] = 2 * BUCKETS * bucket * way.sharded * (way.processes > 1 or way.offload)
    parts["activations"] = activations(shape, load, way)
    parts["head"] = head(shape, load, way)
    if way.split:  # a run that goes on reads its masters whole, beside its moments, when there are no activations yet
        least = sum(state(shape, replace(way, split=False)).values()) - sum(parts.values())
        parts["activations"] += max(0.0, least)
    pinned = pinned_rate(shape, way) * load.tokens
    return MemoryPlan(way, {name: size / GIB for name, size in parts.items()}, pinned / GIB)


def moments_gib(plan: MemoryPlan) -> float:
    """Of a plan's optimizer, what is no master."""
    moments, masters = plan.way.moment_bytes, (2 if plan.way.split else 4) * plan.way.sharded
    return plan.parts_gib["optimizer"] * moments / ((moments + masters) or 1)


def state(shape: Shape, way: Way) -> dict[str, float]:
    """Bytes on each GPU that no page changes: weights, gradients, optimizer, and weights gathered at once."""
    language, vision, embedding = weights_of(shape)
    total, shared = language + vision + embedding, way.processes if way.sharded else 1
    learning = ADAPTER_SHARE * total if way.adapters else total - (vision if way.frozen_vision else 0)
    kept_fp8 = FP8_BYTES * language * (way.fp8 and (way.whole or way.processes == 1))  # cast once per step
    if not way.sharded:  # fp32 weights and their half-precision copies, which autocast keeps for the backward pass
        stored = (0.55 * language + 2 * (vision + embedding)) if way.four_bit else (2 if way.adapters else 6) * total
        moments = way.moment_bytes * learning
        if way.eight_bit and not way.adapters:  # transformers 5.23 leaves those of embeddings in fp32
            moments += (4 * way.moments - way.moment_bytes) * embedding / (1 if shape.tied else 2)
        return {"weights": stored, "gradients": 4 * learning, "optimizer": moments, "gathered": kept_fp8}
    # What of an fp32 copy the weights do not hold, and the moments.
    optimizer = ((2 if way.split else 4) + way.moment_bytes) * learning
    live = total if way.whole else min(total, LIVE_WEIGHTS)
    parts = {"weights": 2 * total / shared, "gradients": 2 * learning / shared, "optimizer": optimizer / shared}
    parts["gathered"] = 2 * live * (shared > 1 or way.offload)  # one process: DeepSpeed gathers without a copy
    parts["gathered"] += kept_fp8
    if way.offload:
        parts |= {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0}  # they leave as they come
    return parts


def layer_bytes(tower: Tower, adapters: bool, linear: bool = False, whole: bool = False) -> float:
    """Bytes per token that one layer, of `linear` attention or not, keeps for its backward pass: the residual stream
    before and after attention, what attention keeps, more where it sees the `whole` picture, gate and up, or what goes
    into an MLP without a gate; with adapters what was normed and gated, too, which their products read."""
    attention = tower.linear.kept if linear else tower.kept + tower.padded * whole
    kept = 2 * (2 * tower.hidden + attention + (1 + tower.gated) * tower.intermediate)
    opened = tower.linear.values if linear else tower.gates
    return kept + 2 * (2 * tower.hidden + tower.intermediate + opened) * adapters


def adapter_work(tower: Tower) -> float:
    """Bytes per token that the backward pass of a layer with adapters makes beside what the layer keeps, at most: of
    the product behind gate and up two gradients as wide as they are, the base's and the adapter's, which become one,
    and the layer's own. Counted, within 1 % of what keeping and making take together (tests/families)."""
    return 2 * (2 * tower.intermediate + tower.hidden)


def layer_sizes(tower: Tower, adapters: bool) -> tuple[float, float]:
    """`layer_bytes` of the mean layer of a tower, and of the largest kind that it has."""
    kinds = [
        (tower.windowed, layer_bytes(tower, adapters)),
        (tower.attending - tower.windowed, layer_bytes(tower, adapters, whole=True)),
        (tower.linear.layers, layer_bytes(tower, adapters, linear=True)),
    ]
    there = [(number, size) for number, size in kinds if number]
    return sum(number * size for number, size in there) / tower.layers, max(size for _, size in there)


def tower_bytes(tower: Tower, adapters: bool, again: int, away: int = 0) -> tuple[float, float]:
    """Bytes per token that wait when the forward pass of a tower is done, and the most that there are at once until its
    backward pass is: `again` layers have only their inputs, `away` wait in the CPU's memory, of which one at a time is
    on its way back.

    Layers that are kept are the last, and done with before the first is made again or has come back (`layer_ways`).
    """
    mean, largest = layer_sizes(tower, adapters)
    inputs, coming = again * 2 * tower.hidden, mean * (away > 0)
    kept = (tower.layers - again - away) * mean
    return inputs + coming + kept, inputs + coming + max(kept, coming, largest * (again > 0))


def activation_rates(shape: Shape, way: Way) -> tuple[float, float, float]:
    """Bytes that the layers of both towers keep at most, of those that are recomputed only their inputs and one layer
    at a time, of those that are offloaded only what travels: of each token and of each patch as long as the language
    model is at work, and of each patch when it is done (`held`)."""
    text, vision = shape.language, shape.vision
    again, away = count_of(text, way.recomputed), count_of(text, way.offloaded)
    _, needed = tower_bytes(text, way.adapters, again, away)
    if not way.vision_learns:
        return needed, 0.0, 0.0
    return needed, *tower_bytes(vision, way.adapters, count_of(vision, way.recomputed_vision))


def held(rates: tuple[float, float, float], load: Load) -> float:
    """Bytes of `activation_rates` for a batch: the language model is done when the tower's backward pass begins, and
    the tower waits for it."""
    token, waiting, patch = rates
    return max(load.tokens * token + load.patches * waiting, load.patches * patch)


def activations(shape: Shape, load: Load, way: Way) -> float:
    """Bytes that all layers keep, and what lies between the towers."""
    text, vision = shape.language, shape.vision
    # Of each merger two products' inputs as wide as its patches, of those deep down what was normed, too; and what
    # those have made of the image tokens, which waits for the language model.
    deep = shape.mergers - 1
    merged = 2 * (shape.patch + (2 + 3 * deep) * vision.hidden + deep * text.hidden / shape.per_token)
    # Of the layer whose backward pass is under way.
    passing = load.tokens * (12 * text.hidden + 2 * text.linear.made)
    if way.adapters:  # which have a head without gradients: what it takes is free again by then
        passing = max(passing, load.tokens * adapter_work(text) - head(shape, load, way))
    return held(activation_rates(shape, way), load) + passing + load.patches * merged


def pinned_rate(shape: Shape, way: Way) -> float:
    """Bytes per token that wait in the CPU's memory."""
    return count_of(shape.language, way.offloaded) * layer_sizes(shape.language, way.adapters)[0]


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

# Time is counted from operations (page_costs), with constants from runs of 8 pages a step (benchmarks/README.md), one
# process, weights whole: an H200 with 3B, 4 x 2 pages, took 1.67 s, and 2.4 instead of 1.8 with all layers recomputed,
# which did not leave out their last product then; an H100 with 3B, 4 x 2, 88 % of both towers recomputed, 2.0; an H100
# with the shapes of Qwen3-VL-4B, all recomputed, 2.63 by 2 x 4 and 2.31 by 4 x 2.

# For each micro-batch, besides its pages: what a GPU waits for Python's first calls, and small launches. By this much
# 4 pages at once, a quarter of the layers recomputed, are 1 % faster on an H100 than 8 with two thirds; it was 2 %.
MICRO_BATCH_SECONDS = 0.09
# What recomputing takes, of the time that its operations should: 2.4 instead of 1.8 s is what says so.
RECOMPUTING = 1.15
# At least, for each micro-batch, where DeepSpeed's hooks gather layers one by one in Python; a GPU that needs less time
# waits. 0.5 was measured of a core; a fifth is added, by which hosts differ.
HOOK_SECONDS = 0.6
HOOKS = 0.05  # more time when one GPU goes through DeepSpeed's hooks and buckets (43.3 instead of 45.5 % MFU)
FETCH_SECONDS = 5e-11  # for each weight and micro-batch, by layers: 3B on two H200s took 0.19 s more than on one
GATHER_SECONDS = 2e-11  # for each weight and step, all at once: 2 bytes at 100 GB/s; not measured on several GPUs yet
FP8_SPEED = 1.75  # of bare products on an H200, without their casts; only what the link has time for depends on it
# Of the language model's forward pass, in which copies to the CPU's memory have to be done; so no layer waits for them.
LINK_SHARE = 0.8


@dataclass(frozen=True)
class Work:
    """Seconds of a GPU for a page of a training: forward and backward (`busy`), of that the forward pass of the
    language model's layers (`forward`), and what more it takes to recompute all layers of either tower; and the
    `bytes` that all of the language model's layers keep of it."""

    busy: float
    forward: float
    again: float
    again_vision: float
    bytes: float


def work_of(shape: Shape, way: Way, page: Load, tflops: float | None) -> Work:
    """The work of a page, of which each layer is recomputed without its last product; where the tower has no backward
    pass, nothing of it is recomputed."""
    parts = page_operations(shape, page.tokens, page.supervised, page.patches)
    text, vision, gain = shape.language, shape.vision, FP8_SPEED if way.fp8 else 1.0
    again = (parts.language / 3 - 2 * text.last * page.tokens) / gain
    again_vision = (parts.vision / 3 - 2 * vision.last * page.patches) * way.vision_learns
    operations = (parts.total - parts.language * (1 - 1 / gain), parts.language / 3 / gain, again, again_vision)
    busy, forward, again, again_vision = (page_seconds(each, tflops) for each in operations)
    kept = text.layers * layer_sizes(text, way.adapters)[0] * page.tokens
    return Work(busy, forward, RECOMPUTING * again, RECOMPUTING * again_vision, kept)


def step_seconds(way: Way, pages: int, work: Work, weights: float, link_gb_s: float) -> float:
    """What a step of `pages` pages takes, `weights` being those that are gathered; what is offloaded costs nothing as
    long as the link keeps up."""
    alone = way.processes == 1
    busy = work.busy + way.recomputed * work.again + way.recomputed_vision * work.again_vision
    if way.offloaded:
        copying = way.offloaded * work.bytes / (LINK_SHARE * link_gb_s * 1e9) if link_gb_s else math.inf
        busy += max(0.0, copying - work.forward)
    each = MICRO_BATCH_SECONDS + way.micro_batch * busy * (1 + HOOKS * (alone and way.by_layers))
    if way.by_layers:
        each = max(HOOK_SECONDS, each) + FETCH_SECONDS * weights * (not alone)
    return pages / way.micro_batch * each + GATHER_SECONDS * weights * (way.whole and not alone)


def candidates(
    shape: Shape,
    way: Way,
    pages: int,
    page: Load,
    load_of: Callable[[int], Load],
    hardware: Hardware,
    sizes: Iterable[int] | None = None,
    recomputed: float | None = None,
    offloaded: float | None = None,
    whole: Sequence[bool] = (True, False),
) -> list[Way]:
    """Every way worth a thought to put `pages` pages of a step, `page` being their mean, through a GPU, the fastest
    first: `sizes` of them at once (None: any number that divides them), of which `load_of` is the longest batch;
    weights gathered once per step or by layers, as `whole` allows.

    For each of these fewer and fewer activations are kept: as few layers offloaded as help, no more than the link and
    the CPU's memory take without a wait; then the layers of one tower recomputed, and when these are all, those of the
    other. The first is the tower that saves more bytes for its seconds. A share that is not None is fixed.
    """
    work, weights = work_of(shape, way, page, hardware.tflops), sum(weights_of(shape))
    sizes = sorted(range(1, pages + 1) if sizes is None else sizes, reverse=True)
    found = []
    for size in sizes:
        if pages % size:
            continue
        rungs = ladder(shape, way, load_of(size), work, hardware, recomputed, offloaded)
        for gathered in whole if way.sharded and not way.offload else [False]:
            found += [
                replace(way, micro_batch=size, recomputed=a, recomputed_vision=v, offloaded=o, whole=gathered)
                for a, v, o in rungs
            ]
    seconds = {each: step_seconds(each, pages, work, weights, hardware.link_gb_s) for each in found}
    return sorted(seconds, key=lambda way: (seconds[way], way.offloaded))


def ladder(
    shape: Shape,
    way: Way,
    longest: Load,
    work: Work,
    hardware: Hardware,
    recomputed: float | None,
    offloaded: float | None,
) -> list[tuple[float, float, float]]:
    """Shares (recomputed, recomputed_vision, offloaded) in the order of `candidates`, of batches up to `longest`."""
    text, vision = shape.language, shape.vision
    mean, wide = layer_sizes(text, way.adapters)[0], layer_sizes(vision, way.adapters)[0]
    if offloaded is None:
        carried = LINK_SHARE * hardware.link_gb_s * 1e9 * work.forward / (work.bytes / text.layers)
        most = min(carried, hardware.pinned_gib * GIB / (mean * longest.tokens)) * (not way.offload)
        away = [*range(min(text.layers - count_of(text, recomputed or 0.0), math.floor(most)) + 1)]
    else:
        away = [count_of(text, offloaded)]
    if recomputed is not None:
        return [(recomputed, recomputed, number / text.layers) for number in away]
    counts = vision.layers * way.vision_learns
    saved = (mean - 2 * text.hidden) * longest.tokens * text.layers
    saved_vision = (wide - 2 * vision.hidden) * longest.patches * vision.layers
    vision_first = saved_vision * work.again > saved * work.again_vision
    steps = [(0, 0, number) for number in away]
    for number in {away[0], away[-1]}:
        rest = text.layers - number
        if vision_first:
            steps += [(0, n, number) for n in range(1, counts + 1)]
            steps += [(n, counts, number) for n in range(1, rest + 1)]
        else:
            steps += [(n, 0, number) for n in range(1, rest + 1)]
            steps += [(rest, n, number) for n in range(1, counts + 1)]
    return [(n / text.layers, v / vision.layers, number / text.layers) for n, v, number in steps]


# -----------------------------------------------------------------------------
# Rungs


class Rungs:
    """The ways in which the batches of a training may go, `ways`, which differ in shares alone, the fastest first. A
    batch takes the first that fits `limit_gib` of the GPU and `pinned_gib` of the CPU's memory by its own size; the
    last, which the longest batch takes, where none does.

    A choice takes some 0.1 ms: it is made before every forward pass.
    """

    def __init__(
        self, shape: Shape, ways: Sequence[Way], limit_gib: float, pinned_gib: float = math.inf, bucket: int = 0
    ):
        self.shape, self.ways, self.limit_gib, self.pinned_gib, self.bucket = shape, ways, limit_gib, pinned_gib, bucket
        self.rates = [(way, activation_rates(shape, way), pinned_rate(shape, way)) for way in ways]

    def plan_for(self, load: Load) -> MemoryPlan:
        """What becomes of a batch of that size."""
        last = self.plan_of(load, self.ways[-1])
        # Shares change what layers keep, and nothing else: `estimate` need not be asked about each of them.
        room = (self.limit_gib - last.total_gib) * GIB + held(self.rates[-1][1], load)
        pinned = self.pinned_gib * GIB
        for way, rates, waiting in self.rates[:-1]:
            if held(rates, load) <= room and waiting * load.tokens <= pinned:
                return self.plan_of(load, way)
        return last

    def plan_of(self, load: Load, way: Way) -> MemoryPlan:
        """What a batch of that size takes by one of the ways."""
        return estimate(self.shape, load, way, self.bucket)

    def below(self, gib: float) -> Rungs:
        """The same ways with so much less of the GPU's memory."""
        return Rungs(self.shape, self.ways, self.limit_gib - gib, self.pinned_gib, self.bucket)


# -----------------------------------------------------------------------------
# Table


def remedy(way: Way, limit_gib: float) -> str:
    """What to change when nothing fits: nothing that would change nothing, or be refused beside what is asked for."""
    options = ["--freeze_vision"] if way.vision_learns else []
    options += ["no --fp8"] if way.fp8 else []
    options += [] if way.adapters or way.fp8 else ["--lora"]
    smaller = way.moment_bytes > 2 * MOMENT_BYTES
    options += [f"--optim {NAMES[0]}"] if smaller and not way.adapters and not way.offload else []
    file = f"{'--config' if WRAPPER_FLAGS in os.environ else '--deepspeed'} ds_z3_offload.json"
    file += " instead of moments in 8 bits" if way.eight_bit else ""
    options += [] if way.offload or way.four_bit else [file]
    fewer = "fewer --max_pixels or --max_html_tokens, more GPUs"
    return f"does not fit {limit_gib:.0f} GiB: {', '.join([fewer, *options])}"


def way_words(plan: MemoryPlan) -> str:
    """What becomes of the layers' activations, for the console."""
    way = plan.way
    shares = f"{way.recomputed:.0%} of the language model's layers"
    shares += f" and {way.recomputed_vision:.0%} of the tower's" if way.vision_learns else ""
    waiting = f", {way.offloaded:.0%} wait in {plan.pinned_gib:.1f} GiB of the CPU's memory" if way.offloaded else ""
    return f"recomputed {shares}{waiting}"


def table(rows: Iterable[tuple[int, float, MemoryPlan | None]], way: Way) -> str:
    """A line for each (GPUs, GiB of each, what is chosen there or None); `way` says what could be changed."""
    lines = [
        "                  recomputed       offloaded",
        "GPUs  of GiB  at once  language  vision       GiB  weights  gradients  optimizer  gathered  activations  head"
        "   sum",
    ]
    for processes, size, plan in rows:
        if plan is None:
            lines.append(f"{processes:4d} {size:7.0f}  {remedy(way, size)}")
            continue
        part = plan.parts_gib
        lines.append(
            f"{processes:4d} {size:7.0f} {plan.way.micro_batch:8d} {plan.way.recomputed:9.0%} "
            f"{plan.way.recomputed_vision:7.0%} {plan.way.offloaded:5.0%} {plan.pinned_gib:5.1f} "
            f"{part['weights']:7.1f} {part['gradients']:10.1f} {part['optimizer']:10.1f} "
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
        rooms = [plannable_gib(size, processes) - there for size in sizes]
        rest = "".join(f"{room:8.1f}" if room > 0 else "    none" for room in rooms)
        lines.append(
            f"{processes:4d} {part['weights']:8.1f} {part['gradients']:10.1f} {part['optimizer']:10.1f} "
            f"{part['gathered']:9.1f} {there:6.1f}       {rest}"
        )
    return "\n".join(lines)
