"""Attention inside segments: pages of a pack, windows and pictures of the vision tower, by the fastest kernel.

    attend(query, key, value, bounds, longest, scale, causal=True)          # (S, heads, D) to (S, heads, D)
    attention_words(model.config, "cuda", torch.bfloat16)                   # which kernel that is, in words

A kernel that is a beta, or our own, is used where it has just given what torch's own gives.

Shapes: S tokens or patches of all segments in one row, D the width of a head. Keys and values may have fewer heads than
queries, each shared by as many queries (grouped queries, Ainslie et al. 2023). Segments follow each other without gaps:
segment g holds the places `bounds[g]` to `bounds[g + 1]` - 1.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import warnings
from collections import defaultdict
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from kernels.trials import keep_on_disk

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The longest segments, windows of the vision tower, for which torch's kernel is faster than flash-attn 4.
SHORT = 128
# The longest that the kernel of windows takes (window_attention.LONGEST, which needs triton to be read), and the widest
# heads of which it keeps a window's in a GPU's registers.
WINDOW, WIDEST = 64, 128
# Segments that kernels are proved with: a long one between shorter ones, of which the last has a single place; windows.
PAGES, WINDOWED = (300, 2048, 64, 1), (64, 32, 64, 16, 64, 48, 1)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    """Attention inside segments: `query` (S, heads, D), `key` and `value` (S, fewer heads, D), `bounds` (segments + 1),
    int32 on the same device, `longest` segment in places. Returns (S, heads, D).

    On a GPU with half precision one flash kernel takes all segments (Dao 2023; no S x S scores in memory); elsewhere
    SDPA takes equal lengths together. flash-attn 4, a beta, and a kernel of our own for the vision tower's windows are
    used where they have just given what torch's own gives.
    """
    kernel = attention_kernel(query.device.type, query.element_size() == 2)
    shapes = (query.shape[1], key.shape[1], query.shape[2])
    if kernel != SEGMENTS and longest <= WINDOW and windows_agree(shapes, query.dtype, causal):
        kernel = WINDOWS
    elif kernel == FLASH_4 and (longest <= SHORT or not agrees(kernel, VARLEN, shapes, query.dtype, causal)):
        kernel = VARLEN
    return KERNELS[kernel](query, key, value, bounds, longest, scale, causal)


# -----------------------------------------------------------------------------
# Kernels: all take what `attend` takes. Packages that may be missing are imported where they are used


def flash_4(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    """flash-attn 4, for Hopper and Blackwell."""
    from flash_attn.cute import flash_attn_varlen_func

    # 80, the vision tower's, is made 96 with zeros, for a fifth more work: as it is, beta 36 gives wrong gradients of
    # the queries, and right values.
    width = query.shape[-1]
    if width % 32:
        query, key, value = (pad(part, (0, -width % 32)) for part in (query, key, value))
    lengths = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest}
    done = flash_attn_varlen_func(query, key, value, **lengths, softmax_scale=scale, causal=causal)
    # Betas differ in what they return: the sums of the scores as well, or the result alone.
    return (done[0] if isinstance(done, tuple) else done)[..., :width]


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    """flash-attn 2, where it is installed."""
    from flash_attn import flash_attn_varlen_func

    lengths = (bounds, bounds, longest, longest)
    return flash_attn_varlen_func(query, key, value, *lengths, softmax_scale=scale, causal=causal)


def varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    """The flash kernel that torch itself carries: no package to build, and the reference of `agrees`."""
    # Imported here, as not every torch has it, and the other kernels do not need it.
    from torch.nn.attention.varlen import varlen_attn

    options = {"scale": scale}
    known = varlen_parameters()
    if causal:
        # torch 2.14 asks for a window, an earlier one whether it is causal.
        options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    # torch 2.11 has no such word and takes fewer keys without it.
    if "enable_gqa" in known:
        options["enable_gqa"] = key.shape[1] != query.shape[1]
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)


def windows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    """A kernel of our own for windows, not causal and with as many heads of keys as of queries."""
    # Imported here, as it needs triton.
    from kernels import window_attention

    return window_attention.see(query, key, value, bounds, longest, scale)


@lru_cache(maxsize=1)
def varlen_parameters() -> frozenset[str]:
    """The words that this torch's kernel knows; looked up once, not at every layer."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def segment_by_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    """Torch's SDPA, on any device and in any precision. `bounds.tolist()` makes a GPU wait, hence the last choice."""
    return equal_segments_together(query, key, value, bounds.tolist(), scale, causal)


def equal_segments_together(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: list[int],
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    """(S, heads, D) to (S, heads, D), one SDPA call for each length that occurs among the segments."""
    starts = defaultdict(list)
    for start, end in zip(bounds, bounds[1:]):
        starts[end - start].append(start)
    result = torch.empty_like(query)
    # A keyword that not every torch has, so it is given only where it is needed.
    grouped = {"enable_gqa": True} if key.shape[1] != query.shape[1] else {}
    for length, places in starts.items():
        rows = torch.tensor(places, device=query.device)[:, None] + torch.arange(length, device=query.device)  # (n, L)
        parts = [tensor[rows].transpose(1, 2) for tensor in (query, key, value)]  # (n, heads, L, D)
        done = scaled_dot_product_attention(*parts, scale=scale, is_causal=causal, **grouped)
        # Not in place: autograd would have to copy what each length wrote over.
        result = result.index_copy(0, rows.flatten(), done.transpose(1, 2).flatten(0, 1))
    return result


# By the words in which a training says at its start what it uses.
FLASH_4, FLASH = "flash-attn 4", "flash-attn"
VARLEN, SEGMENTS = "torch's variable-length kernel", "SDPA, segment by segment"
WINDOWS = "a kernel of our own"
KERNELS = {FLASH_4: flash_4, FLASH: flash, VARLEN: varlen, WINDOWS: windows, SEGMENTS: segment_by_segment}

# -----------------------------------------------------------------------------
# Choice and proof


@lru_cache
def attention_kernel(device: str, half: bool) -> str:
    """Which of KERNELS takes the segments: they need half precision and compute capability 8.0, flash-attn 4 Hopper
    or Blackwell (9, 10)."""
    if device != "cuda" or not half or torch.cuda.get_device_capability() < (8, 0):
        return SEGMENTS
    keep_on_disk()
    if torch.cuda.get_device_capability()[0] in (9, 10) and importable("flash_attn.cute"):
        return FLASH_4
    return FLASH if importable("flash_attn") else VARLEN


def importable(module: str) -> bool:
    """Whether `module` has its function for packed segments. flash-attn 4 lives in a folder of flash-attn 2's package,
    which may itself be missing; both may be built for another torch or driver, and fail in any way."""
    # A broken package must cost a kernel, not the training; but whoever has installed it believes that it is used.
    try:
        return hasattr(importlib.import_module(module), "flash_attn_varlen_func")
    except Exception as error:
        if not isinstance(error, ModuleNotFoundError) or error.name not in (module, module.partition(".")[0]):
            why = f"{type(error).__name__}: {str(error)[:200]}"
            warnings.warn(f"{module} is installed, but cannot be imported, and is not used: {why}", stacklevel=2)
        return False


def attention_words(config: PretrainedConfig, device: str, dtype: torch.dtype) -> str:
    """What takes the segments of a model of `config` in `dtype`; kernels that need a proof are put to it here."""
    kernel, text, vision = attention_kernel(device, dtype.itemsize == 2), config.get_text_config(), config.vision_config
    if kernel == SEGMENTS:
        return kernel
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    language = (text.num_attention_heads, text.num_key_value_heads, width)
    tower = (vision.num_heads, vision.num_heads, vision.hidden_size // vision.num_heads)
    asked = {"the language model": (language, True), "whole pictures": (tower, False)}
    # Said before step one, so that a kernel that is left out shows in the log and not only in the pages per second.
    words = kernel
    if kernel == FLASH_4:
        proved = [name for name, (shapes, causal) in asked.items() if agrees(kernel, VARLEN, shapes, dtype, causal)]
        words = f"{kernel} for {' and '.join(proved) or 'nothing'}, {VARLEN} for the rest"
    # Only Qwen2.5-VL's tower has windows.
    window = (getattr(vision, "window_size", None) or 0) // vision.patch_size
    if 0 < window**2 <= WINDOW and windows_agree(tower, dtype, causal=False):
        words += f", {WINDOWS} for windows"
    return words


@lru_cache
def windows_agree(shapes: tuple[int, int, int], dtype: torch.dtype, causal: bool) -> bool:
    """Whether our own kernel takes windows of `shapes` (heads, those of keys, D), and gives what torch's gives."""
    fits = not causal and shapes[0] == shapes[1] and shapes[2] <= WIDEST
    # Asked first, as its lack is no fault to be warned of.
    there = fits and importlib.util.find_spec("triton") is not None
    return there and agrees(WINDOWS, VARLEN, shapes, dtype, causal, lengths=WINDOWED)


@lru_cache
def agrees(
    kernel: str,
    other: str,
    shapes: tuple[int, int, int],
    dtype: torch.dtype,
    causal: bool,
    device: str = "cuda",
    lengths: tuple[int, ...] = PAGES,
) -> bool:
    """Whether two of KERNELS give the same, gradients included, for `shapes` (heads, those of keys, D) and segments of
    `lengths`.

    False, with a warning that names the difference, where `kernel` fails or differs by 2 % of the norm. Raises
    torch.OutOfMemoryError, which says nothing about the kernel.
    """
    heads, fewer, width = shapes
    longest = max(lengths)
    # Kernels keep these for their gradients, which torch forbids for tensors of inference mode.
    with torch.inference_mode(False):
        draw = torch.Generator(device).manual_seed(0)
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        sizes = [(sum(lengths), count, width) for count in (heads, fewer, fewer, heads)]
        *given, outer = (torch.randn(size, generator=draw, device=device, dtype=dtype) for size in sizes)

    def run(name: str) -> list[torch.Tensor]:
        parts = [part.clone().requires_grad_() for part in given]
        done = KERNELS[name](*parts, bounds, longest, width**-0.5, causal)
        return [done.detach(), *torch.autograd.grad(done, parts, outer)]

    # Hooks of its own, lest a layer that is checkpointed around this takes these tensors for its own.
    apart = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)
    with torch.inference_mode(False), torch.enable_grad(), apart:
        wanted = run(other)
        try:
            found = run(kernel)
        except torch.OutOfMemoryError:
            raise
        # A beta that is compiled as it is used may raise anything; the training goes on without it.
        except Exception as error:
            warnings.warn(f"{kernel} fails for {shapes}, {other} is used there: {error}", stacklevel=2)
            return False
    errors = [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(found, wanted)]
    # Rounding alone: some 0.003 in bf16. What is no number is not below the limit either.
    if all(error < 0.02 for error in errors):
        return True
    shown = ", ".join(f"{error:.2g}" for error in errors)
    warnings.warn(
        f"{kernel} differs from {other} for {shapes}, which is used there: "
        f"values and gradients of queries, keys, values by {shown}",
        stacklevel=2,
    )
    return False
