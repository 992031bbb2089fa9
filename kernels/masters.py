"""fp32 masters kept as the bf16 weights that stand beside them and a rest of 16 bits, and AdamW's step on them.

    split(masters, weights, rests)                              # masters into both, in place
    masters = join(weights, rests)
    step_by_torch(gradients, Shard(weights, rests, first, second), rule, scale, count)     # on a GPU: adamw_kernel.step

A master is 32 bits, of which its bf16 weight holds the upper 16 already: kept beside it they would be kept twice. As a
whole number a master is its weight's bits times 65,536, plus a rest from -32,768 to 32,767; the weight is the master
rounded to the nearest, of two as near to the even one, which is how torch makes it. All masters come back bit by bit
but two kinds. One that lies exactly half-way above an even weight would need a rest of +32,768: it is moved by one unit
of its last place, to +32,767, which of random masters one in 131,072 is, by 2**-24 of its size. And whatever is no
number comes back as one and the same NaN; infinities stay infinities. (N,) is the length of a flat shard.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

NAN = 0x7FC0  # torch's own in bf16
CHUNK = 2**22  # numbers at once: what a step holds for a moment stays at some 100 MB, however long a shard is


class Shard(NamedTuple):
    """What a step reads and writes of a flat shard."""

    weights: torch.Tensor  # (N,) bf16
    rests: torch.Tensor  # (N,) int16
    first: torch.Tensor  # (N,) fp32, of the gradients
    second: torch.Tensor  # (N,) fp32, of their squares


class Rule(NamedTuple):
    """AdamW's settings (Loshchilov & Hutter 2019), by torch's names."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def join(weights: torch.Tensor, rests: torch.Tensor) -> torch.Tensor:
    """The masters (N,) in fp32; takes no other memory."""
    masters = torch.empty_like(weights, dtype=torch.float32)
    bits = masters.view(torch.int32)
    bits.copy_(weights.view(torch.int16)).bitwise_left_shift_(16).add_(rests)
    return masters


def split(masters: torch.Tensor, weights: torch.Tensor, rests: torch.Tensor) -> None:
    """Write what `masters` (N,) in fp32 are into `weights` and `rests`."""
    upper = weights.view(torch.int16)
    for start in range(0, len(masters), CHUNK):
        place = slice(start, start + CHUNK)
        bits, none = masters[place].view(torch.int32), masters[place].isnan()
        # Half a unit more, less one where the weight would be even; the carry goes up to where it belongs.
        rounded = bits.bitwise_right_shift(16).bitwise_and_(1).add_(0x7FFF).add_(bits).bitwise_right_shift_(16)
        rest = bits.sub(rounded.bitwise_left_shift(16)).clamp_(max=0x7FFF)
        upper[place] = rounded.masked_fill_(none, NAN)
        rests[place] = rest.masked_fill_(none, 0)


def step_by_torch(gradients: torch.Tensor, shard: Shard, rule: Rule, scale: torch.Tensor, count: torch.Tensor) -> None:
    """AdamW's step number `count` by gradients (N,) in any precision times `scale`, both of them scalars on a device.

    In fp32, in the order of torch's own functions. A scale that is no number makes all of it none: that a step is left
    out is decided before.
    """
    steps, (beta1, beta2) = count.double(), rule.betas
    size, root = rule.lr / (1 - beta1**steps), (1 - beta2**steps).sqrt()
    for start in range(0, len(gradients), CHUNK):
        weights, rests, first, second = (part[start : start + CHUNK] for part in shard)
        gradient, masters = gradients[start : start + CHUNK].float() * scale, join(weights, rests)
        masters.sub_(masters * (rule.lr * rule.weight_decay))
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        spread = second.sqrt().div_(root).add_(rule.eps)
        masters.sub_((first * size).div_(spread))
        split(masters, weights, rests)
