"""silu(gate) * up and its gradients, one pass over memory each, of tensors that lie apart.

    product = swiglu_kernels.swiglu(gate, up)                                   # elementwise.swiglu, on a GPU
    for_gate, for_up, product = swiglu_kernels.swiglu_backward(gate, up, gradient)

What torch.compile makes of the same formulas asks at each call whether its graph still holds: by a profile up to 0.3 ms
passed around one on the host of an H100, whose GPU waited. What these alone give there has not been measured: with
shorter launches and the rest of that day's changes a step of 3B took some 4 % less (benchmarks/README.md).
Computed in fp32 and rounded once, as there. Imported only where it is used: it needs triton. Shapes: S rows of I
numbers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from kernels.early import PLAIN, way_that_agrees
from kernels.launching import launch

BLOCK = 2048  # numbers of a program
# What their number is a multiple of. Triton has to know it: else a thread reads and writes its numbers one by one.
MULTIPLE = 16


@triton.jit
def swiglu_kernel(gates, ups, target, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    gate = tl.load(gates + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(ups + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + place, (gate * tl.sigmoid(gate) * up).to(target.dtype.element_ty), mask=inside)


@triton.jit
def gradients_of(gate, up, outer):
    """For `gate` and for `up`, and their product, all in fp32, of the gradient `outer` of silu(gate) * up."""
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    return outer * up * (sigmoid + silu * (1 - sigmoid)), outer * silu, silu * up


@triton.jit
def swiglu_backward_kernel(gates, ups, gradients, for_gates, for_ups, products, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    gate = tl.load(gates + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(ups + place, mask=inside, other=0.0).to(tl.float32)
    outer = tl.load(gradients + place, mask=inside, other=0.0).to(tl.float32)
    for_gate, for_up, product = gradients_of(gate, up, outer)
    kind = products.dtype.element_ty
    tl.store(for_gates + place, for_gate.to(kind), mask=inside)
    tl.store(for_ups + place, for_up.to(kind), mask=inside)
    tl.store(products + place, product.to(kind), mask=inside)


def takes(gate: torch.Tensor, *rest: torch.Tensor) -> bool:
    """Whether the kernels take these: dense tensors of one half precision and shape, of a multiple of MULTIPLE numbers,
    on a GPU or under TRITON_INTERPRET=1, where nobody follows gradients through them."""
    interpreted = not isinstance(swiglu_kernel, triton.JITFunction)
    there = gate.element_size() == 2 and gate.numel() % MULTIPLE == 0 and not torch.is_grad_enabled()
    alike = all(part.dtype == gate.dtype and part.shape == gate.shape for part in rest)
    dense = gate.is_contiguous() and all(part.is_contiguous() for part in rest)
    return bool(there and alike and dense and (gate.is_cuda or interpreted) and proved(gate.dtype, gate.device))


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """elementwise.swiglu: `gate`, `up` (S, I) to (S, I)."""
    target, count = torch.empty_like(gate), gate.numel()
    launch(swiglu_kernel, (-(-count // BLOCK),), gate, up, target, count, BLOCK=BLOCK, num_warps=4)
    return target


def swiglu_backward(
    gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """elementwise.swiglu_backward: gradients for gate and up, and the product again, all (S, I)."""
    found, count = tuple(torch.empty_like(gate) for _ in range(3)), gate.numel()
    given = (gate, up, gradient, *found, count)
    launch(swiglu_backward_kernel, (-(-count // BLOCK),), *given, BLOCK=BLOCK, num_warps=4)
    return found


@lru_cache
def proved(dtype: torch.dtype, device: torch.device) -> str:
    """Whether both kernels give what autograd gives in fp32, up to rounding; where they do not, that is said and
    torch.compile does it."""
    # Hooks of its own, lest a layer that is checkpointed around this takes these tensors for its own.
    apart = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False), apart:
        draw = torch.Generator(device).manual_seed(0)
        gate, up, outer = torch.randn(3, 3, BLOCK + MULTIPLE, generator=draw, device=device).mul(3).to(dtype).unbind()
        wide = [part.float().requires_grad_() for part in (gate, up)]
        wanted = torch.nn.functional.silu(wide[0]) * wide[1]
        exact = (wanted.detach(), *torch.autograd.grad(wanted, wide, outer.float()), wanted.detach())

    def found() -> tuple[torch.Tensor, ...]:
        return swiglu(gate, up), *swiglu_backward(gate, up, outer)

    return way_that_agrees("silu(gate) * up", {PLAIN: found}, exact)
