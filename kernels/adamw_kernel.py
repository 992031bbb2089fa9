"""AdamW's step on split masters (kernels/masters.py) by one kernel, one pass over memory.

    step(gradients, Shard(weights, rests, first, second), rule, scale, count)

A parameter's step reads 2 bytes of gradient and reads and writes 2 of weight, 2 of rest and 8 of moments: 26 bytes. The
way of torch and DeepSpeed 0.19.8 makes an fp32 copy of all gradients first, scales it, runs AdamW over it, and copies
the masters to bf16: some 48. Imported only where it is used: it needs triton. (N,) is the length of a flat shard.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from kernels.early import PLAIN, way_that_agrees
from kernels.masters import Rule, Shard, join, split, step_by_torch

BLOCK = 1024  # numbers of a program


@triton.jit
def adamw_kernel(
    gradients, weights, rests, firsts, seconds, numbers, count, lr, decay, beta1, beta2, new1, new2, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`weights` as bits; `numbers` are the scale of gradients and both bias corrections, the second's root; `new1` and
    `new2` are what is missing of the betas to one. The order, each fused product and each division rounded to the
    nearest, are those of torch's fused AdamW (2.14, fused_adam_utils.cuh)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    scale, bias, root = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    bits = tl.load(weights + place, mask=inside, other=0).to(tl.int32) << 16
    bits += tl.load(rests + place, mask=inside, other=0).to(tl.int32)
    gradient = tl.load(gradients + place, mask=inside, other=0.0).to(tl.float32) * scale
    first = tl.load(firsts + place, mask=inside, other=0.0)
    second = tl.load(seconds + place, mask=inside, other=0.0)

    master = bits.to(tl.float32, bitcast=True)
    master = tl.fma(master, -(lr * decay), master)
    first = tl.fma(first, beta1, gradient * new1)
    second = tl.fma(second, beta2, (gradient * gradient) * new2)
    spread = tl.div_rn(tl.sqrt_rn(second), tl.zeros_like(second) + root) + eps
    size = tl.div_rn(lr, bias)
    master -= tl.div_rn(first * size, spread)

    # As masters.split has it, where each of these lines has its reason.
    bits = master.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rest = tl.minimum(bits - (rounded << 16), 0x7FFF)
    none = master != master
    tl.store(weights + place, tl.where(none, 0x7FC0, rounded).to(tl.int16), mask=inside)
    tl.store(rests + place, tl.where(none, 0, rest).to(tl.int16), mask=inside)
    tl.store(firsts + place, first, mask=inside)
    tl.store(seconds + place, second, mask=inside)


def step(gradients: torch.Tensor, shard: Shard, rule: Rule, scale: torch.Tensor, count: torch.Tensor) -> None:
    """`masters.step_by_torch`, by the kernel where it has proved right on this GPU, or under TRITON_INTERPRET=1."""
    interpreted = not isinstance(adamw_kernel, triton.JITFunction)
    there = gradients.is_cuda or interpreted
    way = step_by_kernel if there and proved(gradients.dtype, gradients.device) else step_by_torch
    way(gradients, shard, rule, scale, count)


def step_by_kernel(gradients: torch.Tensor, shard: Shard, rule: Rule, scale: torch.Tensor, count: torch.Tensor) -> None:
    device, (beta1, beta2) = gradients.device, (torch.tensor(beta).item() for beta in rule.betas)  # as fp32 has them
    if count.device != device:  # where torch keeps the count in the CPU's memory, it is no wait
        count = torch.full((), count.item(), device=device)
    # In fp32, as torch's own kernel has them: the powers of what the moments were multiplied with.
    bias, bias2 = (1 - torch.full((), beta, device=device) ** count.float() for beta in (beta1, beta2))
    numbers = torch.stack((scale.float(), bias, bias2.sqrt()))
    places = gradients, shard.weights.view(torch.int16), shard.rests, shard.first, shard.second
    rates = rule.lr, rule.weight_decay, beta1, beta2, 1 - beta1, 1 - beta2, rule.eps
    # The end by itself: where the number is no multiple of 16, a thread reads its numbers one by one.
    body = len(gradients) // BLOCK * BLOCK
    for start, stop in ((0, body), (body, len(gradients))):
        if stop > start:
            parts, grid = (part[start:stop] for part in places), (triton.cdiv(stop - start, BLOCK),)
            adamw_kernel[grid](*parts, numbers, stop - start, *rates, BLOCK=BLOCK, num_warps=4)


@lru_cache
def proved(dtype: torch.dtype, device: torch.device) -> str:
    """Whether the kernel takes the step that torch takes, by gradients of `dtype`: as far, up to rounding, with the
    same moments and weights that are its masters rounded; where it does not, that is said and torch does it."""
    draw = torch.Generator(device).manual_seed(0)
    gradients, before, first, second = torch.randn(4, 3 * BLOCK + 5, generator=draw, device=device).unbind()
    # Of many sizes: masters that a step changes in their last places, and others that it turns.
    before = before * 10.0 ** torch.linspace(-4, 1, len(before), device=device)
    rule, scale = Rule(1e-2, (0.9, 0.99), 1e-8, 0.1), torch.full((), 0.5, device=device)

    def after(way) -> tuple[torch.Tensor, ...]:
        shard = Shard(
            torch.empty_like(before, dtype=torch.bfloat16),
            torch.empty_like(before, dtype=torch.int16),
            first.clone(),
            second.abs(),
        )
        split(before, *shard[:2])
        way(gradients.to(dtype), shard, rule, scale, torch.full((), 3.0, device=device))
        masters, again = join(*shard[:2]), torch.empty_like(shard.weights)
        split(masters, again, torch.empty_like(shard.rests))
        return masters - before, (again == shard.weights).float(), shard.first, shard.second

    wanted = after(step_by_torch)
    return way_that_agrees("AdamW", {PLAIN: lambda: after(step_by_kernel)}, wanted)
