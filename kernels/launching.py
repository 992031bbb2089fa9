"""Launches of Triton kernels that were launched before, by less Python than Triton takes for them.

    launch(norm_kernel, (rows,), hidden, weight, target, width, epsilon, WIDTH=size)    # norm_kernel[(rows,)](...)

Before each launch Triton (3.6 to 3.8) asks the environment for its settings, binds the arguments by name and works out
from all of them again which of its compiled kernels is meant. A training step launches some thousands, and where Python
is slower than the GPU, as in a vision tower's layers, the GPU waits for that. Here what was found is kept, by the
arguments themselves. Imported only where it is used: it needs triton.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from kernels.early import PLAIN, once, way_that_agrees

# Kept at most; then all are found again. Numbers of rows differ from batch to batch, so there is no end of them.
MOST = 4096
KNOWN = {(3, 6), (3, 7), (3, 8)}  # whose compiled kernels are called as below; of others nobody has looked


def power_above(count: int) -> int:
    """The least power of two that is at least `count`; triton's own takes 2 us of Python."""
    return 1 << (count - 1).bit_length()


class Found(NamedTuple):
    """A compiled kernel as `launch` calls it: `tail` are the arguments that were not given by their place."""

    kernel: Any  # Triton unloads what nobody holds any more (3.8)
    run: Callable[..., None]
    function: int
    metadata: Any
    tail: tuple


_found: dict[tuple, Found] = {}
_guard = threading.local()  # .proving: this thread is at the proof, which launches both ways


def launch(kernel: Any, grid: tuple[int, ...], *given: Any, **options: Any) -> None:
    """`kernel[grid](*given, **options)`, all that changes while a program runs `given` by its place, on the current
    GPU's current stream. Triton's look at globals that have changed since is left out, and what hooks Triton's
    launches, as its profiler does, does not see those of kernels that were launched before."""
    key = [kernel]
    for one in given:
        if isinstance(one, torch.Tensor):
            # As Triton has it: a kernel of its own for addresses that are multiples of 16.
            key += (one.dtype, one.data_ptr() % 16 == 0)
        else:
            key += (type(one), one)  # 1 and True are one key else, and 1.0
    key = (*key, *options.items(), torch.cuda.current_device() if torch.cuda.is_initialized() else -1)
    found = _found.get(key)
    if found is None:
        compiled = kernel[grid](*given, **options)
        keep(key, kernel, compiled, len(given), options)
        return
    stream = driver.active.get_current_stream(key[-1])
    first, second, third = (*grid, 1, 1)[:3]
    found.run(
        first, second, third, stream, found.function, found.metadata, None, None, None, *given, *found.tail
    )  # fmt: skip


def keep(key: tuple, kernel: Any, compiled: Any, given: int, options: dict[str, Any]) -> None:
    """What the same arguments find the next time; nothing under TRITON_INTERPRET=1, nor of a Triton nobody knows."""
    if not isinstance(kernel, triton.JITFunction) or not is_right():
        return
    names, defaults = kernel.arg_names[given:], {p.name: p.default for p in kernel.params}
    tail = tuple(options[name] if name in options else defaults[name] for name in names)
    if len(_found) >= MOST:
        _found.clear()
    _found[key] = Found(compiled, compiled.run, compiled.function, compiled.packed_metadata, tail)


@triton.jit
def probe_kernel(source, target, factor, count, apart: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.load(source + place, mask=place < count, other=0.0)
    tl.store(target + place, wide * factor + apart, mask=place < count)


def is_right() -> bool:
    """Whether launches may be made so on this GPU: a kernel launched so has just given what it gives by Triton."""
    if getattr(_guard, "proving", False):
        return True
    usable = torch.cuda.is_available() and torch.version.hip is None and is_known()
    return usable and bool(proved(torch.cuda.current_device()))


def is_known() -> bool:
    return tuple(int(part) for part in triton.__version__.split(".")[:2] if part.isdigit()) in KNOWN


@once
def proved(device: int) -> str:
    """PLAIN where the second launch, which is ours, has done what is wanted, with other tensors and as many numbers."""
    _guard.proving = True
    try:
        sources = torch.arange(600, dtype=torch.float32, device=f"cuda:{device}").view(2, 300)
        found = torch.zeros_like(sources)

        def work() -> tuple[torch.Tensor, ...]:
            for source, target in zip(sources, found):
                launch(probe_kernel, (3,), source, target, 0.5, 300, 7, BLOCK=128, num_warps=1)
            return (found,)

        return way_that_agrees("a short launch", {PLAIN: work}, (sources * 0.5 + 7,))
    finally:
        _guard.proving = False
