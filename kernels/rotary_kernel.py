"""Rotary positions by one Triton kernel per tensor: a GPU runs it at the speed of its memory.

    query, key = rotary_kernel.rotate(query, key, cos, sin)         # elementwise.rotate, on a GPU

What torch.compile makes of the same formula (elementwise.rotate) takes two to eight times as long, since each element
finds its place among heads and halves by divisions. Imported only where it is used: it needs triton.

Shapes: S tokens or patches in one row, D the width of a head, whose two halves are turned against each other.
"""

import torch
import triton
import triton.language as tl

from kernels.launching import launch, power_above


@triton.jit
def rotate_row(
    source, target, cos, sin, source_row, source_head, cos_row,
    heads: tl.constexpr, half: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """One token: `heads` heads of two halves, in a block of HEADS x HALF, the powers of two that hold them."""
    # In 64 bits: a row times its stride, of a long pack, may pass 2**31.
    row = tl.program_id(0).to(tl.int64)
    # One program a token: cos and sin, which all heads share, are read once, and no place is found by a division.
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside, known = (head < heads) & (column < half), column < half
    places = source + row * source_row + head * source_head + column
    first = tl.load(places, mask=inside).to(tl.float32)
    second = tl.load(places + half, mask=inside).to(tl.float32)
    angles = row * cos_row + column
    cos_first = tl.load(cos + angles, mask=known).to(tl.float32)
    cos_second = tl.load(cos + angles + half, mask=known).to(tl.float32)
    sin_first = tl.load(sin + angles, mask=known).to(tl.float32)
    sin_second = tl.load(sin + angles + half, mask=known).to(tl.float32)
    # The gradient of a rotation is the rotation back. Where both halves of sin differ, each has to bring its own.
    if BACKWARD:
        first_done, second_done = first * cos_first + second * sin_second, second * cos_second - first * sin_first
    else:
        first_done, second_done = first * cos_first - second * sin_first, second * cos_second + first * sin_second
    places = target + row * heads * half * 2 + head * half * 2 + column
    tl.store(places, first_done, mask=inside)
    tl.store(places + half, second_done, mask=inside)


def turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool) -> torch.Tensor:
    """`states` (S, heads, D) of any strides, `cos` and `sin` (S, 1, D); returns (S, heads, D), contiguous.

    Computed in fp32 and rounded once, to the precision of `states`.
    """
    # Rows and heads may lie apart, as queries do among keys and values; only the last dimension has to be dense.
    if states.stride(2) != 1:
        states = states.contiguous()
    length, heads, size = states.shape
    # A kernel's blocks are powers of two; 80 wastes some lanes, and is bound by memory all the same.
    target = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    blocks = power_above(heads), power_above(size // 2)
    strides = states.stride(0), states.stride(1), cos.stride(0)
    launch(rotate_row, (length,), states, target, cos, sin, *strides, heads, size // 2, *blocks, backward)
    return target


class Rotary(torch.autograd.Function):
    """`rotate` for autograd; positions learn nothing, so only queries and keys have gradients."""

    # Query and key by one function, so that cos and sin are saved once for both.

    @staticmethod
    def forward(
        ctx, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        return turned(query, cos, sin, backward=False), turned(key, cos, sin, backward=False)

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple:
        # Asked for once: in a checkpointed layer they are recomputed for whoever asks.
        cos, sin = ctx.saved_tensors
        return *(turned(gradient, cos, sin, backward=True) for gradient in gradients), None, None


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """elementwise.rotate: `query` (S, heads, D), `key` (S, fewer heads, D), `cos`, `sin` (S, 1, D), all on a GPU
    (or under TRITON_INTERPRET=1). Returns both, turned (RoPE, Su et al. 2021)."""
    return Rotary.apply(query, key, cos.contiguous(), sin.contiguous())
