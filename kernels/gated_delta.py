"""Linear attention inside packed pages: the convolution and the gated delta rule of Qwen3.5's layers (Gated Delta
Networks, Yang et al. 2024), by the fastest way that proves right.

    done = gated_delta(mixed, write, decay, conv, rate, bias, shape, bounds)        # (S, C) to (S, value heads, D)
    done, states = read_pages(given, shape, bounds, lengths)                        # and where each page's state ends
    delta_words(shape, "cuda", torch.bfloat16)                                      # which way that is, in words

flash-linear-attention, which few have and which compiles its kernels as they are used, takes a whole pack at once where
it has just given what transformers' own torch function gives; that one takes a page at a time.

Shapes: S tokens of all pages in one row, C the channels of queries, keys and values together, D the width of a value's
head. Pages follow each other without gaps: page g holds the places `bounds[g]` to `bounds[g + 1]` - 1.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import torch
from packaging.version import Version
from torch.nn.functional import softplus
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from kernels.trials import keep_on_disk, once_aside

# Tokens of a page that transformers' function takes at once, a multiple of its chunks, which changes no more than how
# gradients are rounded: for each chunk its backward pass makes zeros as long as all that it was given, and twice the
# tokens took five times as long.
STRETCH = 1_024
BESIDE = 4  # pages that are read beside each other; torch's functions keep a quarter of a megabyte of each token of 4B


class DeltaShape(NamedTuple):
    """Heads and their widths; each key's head serves as many heads of values. `taps` is the length of the convolution.
    A named tuple, as `proved` remembers its answer for each."""

    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    taps: int

    @property
    def channels(self) -> int:
        """C: queries, keys and values, in this order."""
        return 2 * self.key_heads * self.key_width + self.value_heads * self.value_width


@dataclass(frozen=True)
class DeltaInputs:
    """What a layer's products have made of S tokens, and its parameters beside them.

    `mixed` (S, C) before the convolution, `write` (S, value heads) the logits of how much of a value is written (beta),
    `decay` (S, value heads) what the state's decay comes from, `conv` (C, taps), `rate` (A_log) and `bias` (dt_bias)
    (value heads,).
    """

    mixed: torch.Tensor
    write: torch.Tensor
    decay: torch.Tensor
    conv: torch.Tensor
    rate: torch.Tensor
    bias: torch.Tensor


def gated_delta(given: DeltaInputs, shape: DeltaShape, bounds: torch.Tensor) -> torch.Tensor:
    """(S, value heads, value width): what each token reads from the state that the tokens before it in its page, and
    itself, have written. `bounds` (pages + 1), int32 on the same device."""
    way = delta_way(shape, given.mixed.device.type, given.mixed.dtype)
    return WAYS[way](given, shape, bounds)


def apart(mixed: torch.Tensor, shape: DeltaShape) -> list[torch.Tensor]:
    """Queries, keys (..., key heads, key width) and values (..., value heads, value width) of `mixed` (..., C)."""
    keys = shape.key_heads * shape.key_width
    parts = mixed.split([keys, keys, shape.value_heads * shape.value_width], dim=-1)
    widths = (shape.key_width, shape.key_width, shape.value_width)
    return [part.unflatten(-1, (-1, width)) for part, width in zip(parts, widths)]


# -----------------------------------------------------------------------------
# Ways


def by_fla(given: DeltaInputs, shape: DeltaShape, bounds: torch.Tensor) -> torch.Tensor:
    """flash-linear-attention's convolution and chunked rule, all pages at once; its kernels make gates and norms, too,
    in fp32."""
    return fla_with_ends(given, shape, bounds, ends=False)[0]


def fla_with_ends(
    given: DeltaInputs, shape: DeltaShape, bounds: torch.Tensor, ends: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`by_fla`, and where it `ends` the states of all pages (pages, value heads, key width, value width), in fp32."""
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    mixed, _ = causal_conv1d(given.mixed[None], given.conv, activation="silu", cu_seqlens=bounds)
    query, key, value = apart(mixed, shape)
    gates = {"g": given.decay[None], "beta": given.write[None], "A_log": given.rate, "dt_bias": given.bias}
    inside = {f"use_{part}_in_kernel": True for part in ("qk_l2norm", "beta_sigmoid", "gate")}
    options = {**gates, **inside, "cu_seqlens": bounds, "output_final_state": ends}
    done, states = chunk_gated_delta_rule(query, key, value, **options)
    return done[0], states


def page_by_page(given: DeltaInputs, shape: DeltaShape, bounds: torch.Tensor) -> torch.Tensor:
    """transformers' torch functions, on any device and in any precision. `bounds.tolist()` makes a GPU wait."""
    # A page's steps are made again in the backward pass: what they keep in fp32, a quarter of a megabyte a token of
    # 4B's layers, would be ten times what all else of a layer keeps.
    done = []
    for start, end in pairwise(bounds.tolist()):
        rows = (part[start:end] for part in (given.mixed, given.write, given.decay))
        parts = (*rows, given.conv, given.rate, given.bias, shape)
        # Nothing is drawn there: to keep the state of the random numbers, a GPU would be waited for.
        kept = functools.partial(checkpoint, one_page, use_reentrant=False, preserve_rng_state=False)
        done.append(kept(*parts) if torch.is_grad_enabled() else one_page(*parts))
    return torch.cat(done)


def one_page(
    mixed: torch.Tensor,
    write: torch.Tensor,
    decay: torch.Tensor,
    conv: torch.Tensor,
    rate: torch.Tensor,
    bias: torch.Tensor,
    shape: DeltaShape,
) -> torch.Tensor:
    """`DeltaInputs` of a single page to (S, value heads, value width)."""
    # Imported here: it takes seconds, and flash-linear-attention does without it.
    from transformers.models.qwen3_5 import modeling_qwen3_5 as own

    # Beneath transformers' decorators, which put flash-linear-attention in their place wherever it is installed.
    convolve, rule = own.causal_conv1d_fn.__wrapped__, own.torch_chunk_gated_delta_rule.__wrapped__
    mixed = convolve(mixed.T[None], conv, activation="silu").transpose(1, 2)  # (1, S, C)
    gate = -rate.float().exp() * softplus(decay.float() + bias)
    parts = (part.split(STRETCH, dim=1) for part in (*apart(mixed, shape), gate[None], write.sigmoid()[None]))
    done, state = [], None
    for some in zip(*parts):
        values, state = rule(*some, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
        done.append(values[0])
    return torch.cat(done)


def padded_with_ends(
    given: DeltaInputs, shape: DeltaShape, lengths: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' torch functions without gradients, some pages of `lengths` at once, and the states where they end.

    Beside each other, shorter ones filled up with tokens that change no state: what decays nothing and writes nothing.
    """
    from transformers.models.qwen3_5 import modeling_qwen3_5 as own

    convolve, rule = own.causal_conv1d_fn.__wrapped__, own.torch_chunk_gated_delta_rule.__wrapped__
    gate, write = -given.rate.float().exp() * softplus(given.decay.float() + given.bias), given.write.sigmoid()
    done, states, begin = [], [], 0
    for some in (lengths[first : first + BESIDE] for first in range(0, len(lengths), BESIDE)):
        end = begin + sum(some)
        mixed, gates, writes = (
            pad_sequence(part[begin:end].split(list(some)), batch_first=True) for part in (given.mixed, gate, write)
        )
        mixed = convolve(mixed.transpose(1, 2), given.conv, activation="silu").transpose(1, 2)
        parts = (*apart(mixed, shape), gates, writes)
        values, ends = rule(*parts, output_final_state=True, use_qk_l2norm_in_kernel=True)
        done += [row[:length] for row, length in zip(values, some)]
        states.append(ends)
        begin = end
    return torch.cat(done), torch.cat(states)


def read_pages(
    given: DeltaInputs, shape: DeltaShape, bounds: torch.Tensor, lengths: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gated_delta`, without gradients, of pages of `lengths`, and the state that each of them ends with (pages,
    value heads, key width, value width), in fp32."""
    if reads_by_fla(shape, given.mixed.dtype, given.mixed.device):
        return fla_with_ends(given, shape, bounds)
    return padded_with_ends(given, shape, lengths)


@lru_cache
def reads_by_fla(shape: DeltaShape, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether flash-linear-attention gives values and states as the torch way does; with no gradients to compile."""
    if obstacle(device.type, dtype.itemsize == 2):
        return False
    try_aside(shape, dtype, device)
    # It needs triton, as flash-linear-attention does, which a machine that trains on a CPU may lack.
    from kernels.early import PLAIN, way_that_agrees

    lengths = (300, 1500, 64, 1)
    given, bounds, _ = trial_of(shape, dtype, device.type, lengths)
    # As reading gives them, columns of one product: kernels may take rows that lie apart for others.
    columns = (given.mixed, given.write, given.decay)
    views = torch.cat(columns, dim=1).split([part.shape[1] for part in columns], dim=1)
    given = replace(given, **dict(zip(("mixed", "write", "decay"), views)))
    wanted = padded_with_ends(given, shape, lengths)
    return bool(way_that_agrees(FLA, {PLAIN: lambda: fla_with_ends(given, shape, bounds)}, wanted))


# By the words in which a training says at its start what it uses.
FLA, PAGES = "flash-linear-attention", "transformers' torch function, page by page"
WAYS: dict[str, Callable] = {FLA: by_fla, PAGES: page_by_page}

# -----------------------------------------------------------------------------
# Choice and proof

INSTALL = "`pip install flash-linear-attention==0.6.0`"  # as in requirements.txt
# Its backward pass refuses those on Hopper (#640 there). torch 2.11 pins 3.6.0, and works with this one beside it.
REFUSED, TRITON = ("3.4", "3.7.1"), "`pip install --no-deps triton==3.7.1`"
GAIN = "measured 47 times as fast, on an H100"  # forward and backward, results/h100_linear_attention.json
PRICED = 2_800  # tokens of a page, most of them its HTML
# Kernels keep tensors of a proof for their gradients, which torch forbids for those of inference mode; and a layer that
# is checkpointed around a proof must not take them for its own.
OWN_TENSORS = functools.partial(
    torch.autograd.graph.saved_tensors_hooks, lambda tensor: tensor.detach(), lambda tensor: tensor
)


def obstacle(device: str, half: bool) -> str:
    """Why flash-linear-attention cannot be tried; empty where it can."""
    if device != "cuda":
        return "no GPU"
    return missing() if half else "it takes half precision"


@lru_cache
def missing() -> str:
    """Why what is used of flash-linear-attention cannot be imported; built for another triton, it may fail in any way.
    Empty where it can."""
    parts = ("fla.modules.causal_conv1d", "causal_conv1d"), ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
    keep_on_disk()
    # A broken package must cost speed, not the training: it is said which way is used (`delta_words`).
    try:
        for module, name in parts:
            getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        return f"not installed; {INSTALL}" if error.name == "fla" else f"broken: {error}"
    except Exception as error:
        return f"broken: {error}"
    # Another version may keep them elsewhere: a trial too many is no reason to do without it.
    with contextlib.suppress(ImportError, AttributeError):
        try_once(importlib.import_module("fla.modules.norm.l2norm"))
    return ""


def delta_way(shape: DeltaShape, device: str, dtype: torch.dtype) -> str:
    """Which of WAYS takes layers of `shape`."""
    return PAGES if obstacle(device, dtype.itemsize == 2) or flaw(shape, dtype) else FLA


def delta_words(shape: DeltaShape, device: str, dtype: torch.dtype, layers: int) -> str:
    """What takes the linear attention of a model of so many `layers` of it; where it is the slow way, why, and what
    that costs on a GPU, by a measurement; the proof happens here."""
    if delta_way(shape, device, dtype) == FLA:
        return FLA
    why, price = obstacle(device, dtype.itemsize == 2) or flaw(shape, dtype), ""
    if device == "cuda":
        seconds = layers * seconds_of_page(shape, dtype, device)
        price = f": at least {seconds:.1f} s for a page of {PRICED:,} tokens, in {layers} layers of it alone"
        why = f"{GAIN}: {why}{and_triton()}"
    return f"{PAGES}, in fp32 and much slower{price} ({FLA}: {why})"


def and_triton() -> str:
    """What it needs besides for its gradients, in words: a newer triton, on a Hopper with one that it refuses."""
    try:
        found = Version(version("triton"))
    except PackageNotFoundError:
        return ""
    least, next_good = map(Version, REFUSED)
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    return f"; and {TRITON}, in place of {found}" if hopper and least <= found < next_good else ""


def seconds_of_page(shape: DeltaShape, dtype: torch.dtype, device: str) -> float:
    """What one layer of `shape` takes by torch for a page of PRICED tokens, forward and backward, measured."""
    with torch.inference_mode(False), torch.enable_grad(), OWN_TENSORS():
        trial = trial_of(shape, dtype, device, (PRICED,))
        for _ in range(2):  # the first one loads what it needs
            start = time.monotonic()
            outcome(PAGES, shape, *trial)["values"].sum().item()  # which waits for the GPU
    return time.monotonic() - start


@lru_cache
def flaw(shape: DeltaShape, dtype: torch.dtype, device: str = "cuda") -> str:
    """How flash-linear-attention fails for `shape`, or differs from what the torch way gives, gradients included, with
    a warning; empty where it gives that.

    Raises torch.OutOfMemoryError, which says nothing about the kernels.
    """
    try_aside(shape, dtype, torch.device(device))
    with torch.inference_mode(False), torch.enable_grad(), OWN_TENSORS():
        trial = trial_of(shape, dtype, device)
        wanted = outcome(PAGES, shape, *trial)
        try:
            found = outcome(FLA, shape, *trial)
        except torch.OutOfMemoryError:
            raise
        # Compiled as they are used, its kernels may raise anything; the training goes on without them. It names the
        # remedy itself where it knows one: on Hopper it refuses triton 3.4 to 3.7.0 without tilelang (0.6.0).
        except Exception as error:
            told = f"fails: {error}"
        else:
            told = difference(wanted, found)
    if told:
        warnings.warn(f"{FLA}, for {shape}, {told}; {PAGES} is used there", stacklevel=2)
    return told


def try_once(module: ModuleType) -> None:
    """Have the norms of heads tried once for all batches: fla-core 0.6.0 tries 25 shapes of each anew for any other
    number of 65,536 heads, in the middle of a training."""
    for kernel in (module.l2norm_fwd_kernel, module.l2norm_bwd_kernel):
        if list(kernel.keys) == ["D", "NB"]:
            kernel.keys = ["D"]


def try_aside(shape: DeltaShape, dtype: torch.dtype, device: torch.device) -> None:
    """Have its kernels for layers of `shape` tried in a process of their own, once on a machine (kernels/trials.py)."""
    if device.type != "cuda":
        return
    number = torch.cuda.current_device() if device.index is None else device.index
    told = json.dumps({"shape": shape, "dtype": str(dtype).removeprefix("torch."), "device": number})
    known = [shape, str(dtype), torch.cuda.get_device_name(number), *map(version_of, ("triton", "fla-core", "torch"))]
    once_aside(FLA, "kernels.gated_delta", told, known)


def version_of(package: str) -> str:
    """Empty where it is not installed by that name."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def try_kernels(told: str) -> None:
    """What `try_aside` has its process do."""
    given = json.loads(told)
    shape, dtype = DeltaShape(*given["shape"]), getattr(torch, given["dtype"])
    torch.cuda.set_device(given["device"])
    if why := missing():
        raise SystemExit(why)
    trial = trial_of(shape, dtype, "cuda")
    with torch.no_grad():  # first, as it is all that writing takes: a triton may refuse gradients alone
        fla_with_ends(trial[0], shape, trial[1])
    outcome(FLA, shape, *trial)
    torch.cuda.synchronize()


def difference(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> str:
    """Of two `outcome`s, each part's by its norm, in words; empty where all are within rounding."""
    errors = {name: ((found[name] - part).norm() / part.norm()).item() for name, part in wanted.items()}
    # What is no number is not below the limit either.
    if all(error < LIMITS.get(name, 0.02) for name, error in errors.items()):
        return ""
    return f"differs from {PAGES}: " + ", ".join(f"{name} {error:.2g}" for name, error in errors.items())


# Sums over all tokens, much of which cancels: there rounding alone is more.
LIMITS = {"rate": 0.05, "bias": 0.05}


def trial_of(
    shape: DeltaShape, dtype: torch.dtype, device: str, lengths: tuple[int, ...] = (300, 1500, 64, 1)
) -> tuple[DeltaInputs, torch.Tensor, torch.Tensor]:
    """Inputs as a layer has them, by chance but always the same, their pages' bounds, and a gradient to come back."""
    draw, places = torch.Generator(device).manual_seed(0), sum(lengths)
    heads = (places, shape.value_heads)
    sizes = [(places, shape.channels), heads, heads, (shape.channels, shape.taps), heads[1:], heads[1:]]
    parts = [torch.randn(size, generator=draw, device=device, dtype=dtype) for size in sizes]
    parts[3] = parts[3] / shape.taps**0.5
    # A state that lasts from a few tokens to hundreds: what is forgotten at once would leave nothing to compare.
    parts[4] = torch.rand(heads[1:], generator=draw, device=device).mul(16).log().to(dtype)
    parts[5] = parts[5] - 4
    outer = torch.randn((*heads, shape.value_width), generator=draw, device=device, dtype=dtype)
    ends = torch.tensor((0, *lengths), device=device).cumsum(0, dtype=torch.int32)
    return DeltaInputs(*parts), ends, outer


def outcome(
    way: str, shape: DeltaShape, given: DeltaInputs, bounds: torch.Tensor, outer: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Values and all gradients of one of WAYS, by name, in fp32."""
    parts = {name: part.clone().requires_grad_() for name, part in vars(given).items()}
    done = WAYS[way](DeltaInputs(**parts), shape, bounds)
    found = torch.autograd.grad(done, list(parts.values()), outer)
    return {"values": done.detach().float(), **{name: part.float() for name, part in zip(parts, found)}}


if __name__ == "__main__":
    try_kernels(sys.argv[1])
