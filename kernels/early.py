"""Kernels that begin while the one before them ends: programmatic dependent launch, on compute capability 9.0 and up.

    warm(weight, ...), bring(weight, ...)       # inside a kernel: what nobody writes may come nearer already
    follow(EARLY)                       # all that was written before is there from here on
    way_that_agrees("name", {EARLY: work, PLAIN: work}, wanted)     # which of them may be used
    @once                               # what is proved is kept, and proved by one thread

A decoding step is some two hundred kernels of ten microseconds; what each needs to begin, two or three of them, is
time in which no weight moves. (CUDA C++ Programming Guide, section "Programmatic Dependent Launch".)
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache, wraps

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

EARLY, PLAIN, NEVER = "early", "plain", ""  # how a kernel is launched; not at all
ROUNDING = 0.02  # of the norm; in half precision kernels differ from torch by some 0.004


def way_that_agrees(
    name: str, ways: Mapping[str, Callable[[], tuple[torch.Tensor, ...]]], wanted: tuple[torch.Tensor, ...]
) -> str:
    """The first of `ways` whose results are `wanted`, up to rounding; NEVER, with a warning, where none is.

    A kernel may be wrong on one GPU, one triton, one shape, and a model that writes a little worse says so to nobody.
    Raises torch.OutOfMemoryError, which says nothing about the kernel.
    """
    for way, work in ways.items():
        try:
            found = work()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler may raise anything, and torch's own functions are there
            if "out of memory" in str(error).lower():  # Triton's own words, when it loads a kernel
                raise torch.OutOfMemoryError(str(error)) from error
            reason = f"fails: {str(error)[:200]}"
        else:
            errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(found, wanted)]
            if all(error < ROUNDING for error in errors):  # what is no number is not below the limit either
                return way
            reason = f"differs by {max(errors):.2g} of the norm"
        warnings.warn(f"the kernel of {name}, launched {way}, {reason}; another way is used", stacklevel=2)
    return NEVER


def once(work: Callable) -> Callable:
    """`work`, whose results are kept, each of them worked out by one thread while others that want it wait: a kernel
    that two threads prove at once is compiled twice, which `lru_cache` alone does not see."""
    kept, locks, guard = lru_cache(maxsize=None)(work), {}, threading.Lock()

    @wraps(work)
    def asked(*given):
        with guard:
            lock = locks.setdefault(given, threading.Lock())
        with lock:
            return kept(*given)

    asked.cache_clear, asked.cache_info = kept.cache_clear, kept.cache_info
    return asked


def read_compiler() -> None:
    """What Triton (3.8) does before it compiles a first kernel, which is to read all of itself: half a second, in each
    of the threads that compile a first one at once. It is kept for later ones."""
    from triton.runtime import cache

    getattr(cache, "triton_key", lambda: None)()


def driver_version() -> int:
    """The newest CUDA that the GPU's driver knows, 12030 for 12.3; 0 where it cannot be asked."""
    found = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found))
    except (OSError, AttributeError):
        return 0
    return found.value


@lru_cache
def early(device: torch.device) -> bool:
    """Whether kernels on `device` may begin early."""
    # ROCm calls its GPUs "cuda", too, of capability 9 and more.
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    # Graphs hold such launches from the drivers of CUDA 12.3 on; a proof outside of a graph would not show it.
    return torch.cuda.get_device_capability(device) >= (9, 0) and driver_version() >= 12_030


@triton.jit
def follow(EARLY: tl.constexpr):
    """Waits for the kernel before, then lets the next one begin: in this order no more than two are under way."""
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def warm(places):
    """Asks for the lines of memory at `places`, some pointers, to come into the second-level cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def bring(places, size, COUNT: tl.constexpr):
    """The same of `size` bytes, a multiple of 16, from each of COUNT `places` on, by the copy engine: one instruction
    of a thread for each, where `warm` takes one for each line."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred mine;
        .reg .b32 thread;
        mov.u32 thread, %tid.x;
        setp.lt.u32 mine, thread, $3;
        @mine cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r,r", [places, size, COUNT], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
