"""Root-mean-square norms of many rows and their gradients, each by one kernel: what a training step asks for.

    normed = norm_kernels.rms_norm(hidden, weight, epsilon)                     # elementwise.rms_norm, on a GPU
    outer, for_weight = norm_kernels.rms_norm_backward(hidden, weight, epsilon, gradient, residual)

torch.compile reads each row twice to norm it, and all rows once more for the weight's gradient: on an H100, by one
profile of 3B and a count of bytes, at some 40 % of the memory's rate. Here a row stays in registers, and so do sums for
the weight. Imported only where it is used: it needs triton. Shapes: S rows of H numbers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from kernels.early import PLAIN, way_that_agrees
from kernels.launching import launch, power_above
from kernels.row_kernels import norm_by_kernel, norm_kernel

PROGRAMS = 1_024  # that share the rows of a backward pass, each with a sum of its own: some eight for each processor


@triton.jit(do_not_specialize=["rows"])  # another row count would be another kernel, in the middle of a training
def norm_backward_kernel(
    source, weight, gradient, residual, target, sums, rows, width, epsilon,
    WIDTH: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Rows of one program; `sums` (programs, H) of what they say of the weight. With RESIDUAL one of (S, H), else a
    single number."""
    place = tl.arange(0, WIDTH)
    inside = place < width
    scale = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    # In 64 bits: a row times its width may pass 2**31.
    apart = tl.full([], width, tl.int64)
    for number in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = number * apart
        wide = tl.load(source + start + place, mask=inside, other=0.0).to(tl.float32)
        outer = tl.load(gradient + start + place, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            past = tl.load(residual + start + place, mask=inside, other=0.0).to(tl.float32)
        else:
            past = tl.load(residual).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(wide * wide, 0) / width + epsilon)
        normed, inner = wide * inverse, outer * scale
        done = inverse * (inner - normed * (tl.sum(inner * normed, 0) / width)) + past
        tl.store(target + start + place, done.to(target.dtype.element_ty), mask=inside)
        # The norm was rounded before it met the weight, so it is here, too.
        total += outer * normed.to(source.dtype.element_ty).to(tl.float32)
    tl.store(sums + tl.program_id(0).to(tl.int64) * width + place, total, mask=inside)


def takes(hidden: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor | float) -> bool:
    """Whether the kernels take these: contiguous rows and weights in one half precision, on a GPU or under
    TRITON_INTERPRET=1, where nobody follows gradients through them."""
    interpreted = not isinstance(norm_kernel, triton.JITFunction)
    alike = hidden.element_size() == 2 and hidden.dtype == weight.dtype and hidden.dim() == 2
    there = alike and hidden.is_contiguous() and (hidden.is_cuda or interpreted) and not torch.is_grad_enabled()
    return bool(there and proved(hidden.shape[1], hidden.dtype, hidden.device))


rms_norm = norm_by_kernel  # (S, H), weight (H,), epsilon to (S, H)


def rms_norm_backward(
    hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, gradient: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """elementwise.rms_norm_backward: gradients for `hidden` (S, H), plus `residual` (S, H) or (), and for `weight`
    (H,)."""
    gradient, residual = gradient.contiguous(), residual.contiguous()
    rows, width = hidden.shape
    programs = max(1, min(rows, PROGRAMS))
    target, sums = torch.empty_like(hidden), hidden.new_empty(programs, width, dtype=torch.float32)
    sizes = {"WIDTH": power_above(width), "RESIDUAL": residual.dim() == 2, "num_warps": 8}
    given = (hidden, weight, gradient, residual, target, sums, rows, width, epsilon)
    launch(norm_backward_kernel, (programs,), *given, **sizes)
    return target, sums.sum(0).to(weight.dtype)


@lru_cache
def proved(width: int, dtype: torch.dtype, device: torch.device) -> str:
    """Whether both kernels give for rows of `width` what autograd gives in fp32, up to rounding; where they do not,
    that is said and torch.compile does it."""
    # Hooks of its own, lest a layer that is checkpointed around this takes these tensors for its own.
    apart = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False), apart:
        draw = torch.Generator(device).manual_seed(0)
        shapes = ((7, width), (width,), (7, width), (7, width))
        hidden, weight, *both = (torch.randn(shape, generator=draw, device=device).to(dtype) for shape in shapes)
        rows, scale = (part.float().requires_grad_() for part in (hidden, weight))
        wanted = scale * (rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6))
        exact = torch.autograd.grad(wanted, (rows, scale), both[0].float())
    exact = wanted.detach(), exact[0] + both[1].float(), exact[1]

    def found() -> tuple[torch.Tensor, ...]:
        return rms_norm(hidden, weight, 1e-6), *rms_norm_backward(hidden, weight, 1e-6, *both)

    return way_that_agrees("norm of many rows", {PLAIN: found}, exact)
