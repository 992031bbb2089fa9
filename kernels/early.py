"""Kernels that begin while the one before them ends: programmatic dependent launch, on compute capability 9.0 and up.

    warm(weight, ...)                   # inside a kernel: what nobody writes may come nearer already
    follow(EARLY)                       # all that was written before is there from here on

A decoding step is some two hundred kernels of ten microseconds; what each needs to begin, two or three of them, is
time in which no weight moves. (CUDA C++ Programming Guide, section "Programmatic Dependent Launch".)
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda


@lru_cache
def early(device: torch.device) -> bool:
    """Whether kernels on `device` may begin early."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


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
