"""Attention inside windows of 64 patches at most, a window and a head at a time by one Triton program.

    seen = window_attention.see(query, key, value, bounds, longest, scale)       # (P, heads, D), all three

A window's scores fit into registers at once, so the backward pass makes them again from query and key instead of
keeping their sums, and no two programs write the same gradient: none is added up, and all are the same every time.
Flash kernels cut rows into tiles of 128 and read bounds of their own for each. Imported only where it is used: it needs
triton.

Shapes: P patches of all windows in one row, D the width of a head.
"""

import torch
import triton
import triton.language as tl

from kernels.launching import launch, power_above

# The longest window: 8 x 8 patches of Qwen2.5-VL's tower. Twice as many no longer fit into registers.
LONGEST = 64


@triton.jit
def window_of(bounds, heads: tl.constexpr, ROWS: tl.constexpr):
    """This program's first patch and head, its places, and which of ROWS there are."""
    # Heads of a window follow each other, so that its rows, in which they stand side by side, are read together.
    window, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    # In 64 bits: a row times its stride, of a long pack, may pass 2**31.
    start = tl.load(bounds + window).to(tl.int64)
    length = tl.load(bounds + window + 1).to(tl.int64) - start
    place = tl.arange(0, ROWS)
    return start, head, place, place < length


@triton.jit
def rows_of(states, start, head, place, known, row, width: tl.constexpr, WIDTH: tl.constexpr):
    """(ROWS, WIDTH) of `states`, whose rows lie `row` apart; zeros where there is no patch, and beyond `width`."""
    column = tl.arange(0, WIDTH)
    places = states + (start + place)[:, None] * row + head * width + column[None, :]
    return tl.load(places, mask=known[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def keep_rows(target, states, start, head, place, known, heads: tl.constexpr, width: tl.constexpr, WIDTH: tl.constexpr):
    """The reverse of `rows_of`, into (P, heads, width) without gaps."""
    column = tl.arange(0, WIDTH)
    places = target + (start + place)[:, None] * (heads * width) + head * width + column[None, :]
    tl.store(places, states, mask=known[:, None] & (column < width)[None, :])


@triton.jit
def shares_of(query, key, known, scale):
    """(ROWS, ROWS), softmax over the window's places in fp32; rows without a patch share evenly, and are never used."""
    scores = tl.dot(query, tl.trans(key)) * (scale * 1.4426950408889634)  # exp(x) = exp2(x / ln 2)
    scores = tl.where(known[None, :], scores, float("-inf"))
    shares = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return shares / tl.sum(shares, 1)[:, None]


@triton.jit
def see_window(
    query, key, value, target, bounds, query_row, key_row, value_row, scale,
    heads: tl.constexpr, width: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One head of one window, forward."""
    start, head, place, known = window_of(bounds, heads, ROWS)
    q = rows_of(query, start, head, place, known, query_row, width, WIDTH)
    k = rows_of(key, start, head, place, known, key_row, width, WIDTH)
    v = rows_of(value, start, head, place, known, value_row, width, WIDTH)
    done = tl.dot(shares_of(q, k, known, scale).to(v.dtype), v)
    keep_rows(target, done, start, head, place, known, heads, width, WIDTH)


@triton.jit
def see_window_backward(
    query, key, value, outer, to_query, to_key, to_value, bounds, query_row, key_row, value_row, outer_row, scale,
    heads: tl.constexpr, width: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One head of one window: its gradients from `outer`, that of its result. (Dao et al. 2022, algorithm 4, with all
    of a row's scores at hand.)"""
    start, head, place, known = window_of(bounds, heads, ROWS)
    q = rows_of(query, start, head, place, known, query_row, width, WIDTH)
    k = rows_of(key, start, head, place, known, key_row, width, WIDTH)
    v = rows_of(value, start, head, place, known, value_row, width, WIDTH)
    o = rows_of(outer, start, head, place, known, outer_row, width, WIDTH)
    shares = shares_of(q, k, known, scale)
    keep_rows(to_value, tl.dot(tl.trans(shares.to(o.dtype)), o), start, head, place, known, heads, width, WIDTH)
    to_shares = tl.dot(o, tl.trans(v))
    # The gradient of a softmax: what a share lacks of its row's mean.
    to_scores = shares * (to_shares - tl.sum(shares * to_shares, 1)[:, None]) * scale
    to_scores = to_scores.to(q.dtype)
    keep_rows(to_query, tl.dot(to_scores, k), start, head, place, known, heads, width, WIDTH)
    keep_rows(to_key, tl.dot(tl.trans(to_scores), q), start, head, place, known, heads, width, WIDTH)


def dense(states: torch.Tensor) -> torch.Tensor:
    """`states` (P, heads, D) where the heads of a patch lie side by side, else a copy; rows may lie apart."""
    return states if states.stride()[1:] == (states.shape[2], 1) else states.contiguous()


def extents(states: torch.Tensor) -> tuple[int, int, int, int]:
    """Heads, width, and the blocks that hold a window and a width: powers of two, 16 at least, which products need."""
    heads, width = states.shape[1:]
    return heads, width, LONGEST, max(16, power_above(width))


class Windows(torch.autograd.Function):
    """`see` for autograd."""

    @staticmethod
    def forward(
        ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, scale: float
    ) -> torch.Tensor:
        query, key, value = dense(query), dense(key), dense(value)
        ctx.save_for_backward(query, key, value, bounds)
        ctx.scale = scale
        target = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        rows = [part.stride(0) for part in (query, key, value)]
        programs = ((len(bounds) - 1) * query.shape[1],)
        launch(see_window, programs, query, key, value, target, bounds, *rows, scale, *extents(query))
        return target

    @staticmethod
    def backward(ctx, outer: torch.Tensor) -> tuple:
        # Asked for once: in a checkpointed layer they are recomputed for whoever asks.
        query, key, value, bounds = ctx.saved_tensors
        outer = dense(outer)
        found = [torch.empty(query.shape, dtype=query.dtype, device=query.device) for _ in range(3)]
        rows = [part.stride(0) for part in (query, key, value, outer)]
        programs = ((len(bounds) - 1) * query.shape[1],)
        given = (query, key, value, outer, *found, bounds, *rows, ctx.scale, *extents(query))
        launch(see_window_backward, programs, *given)
        return *found, None, None


def see(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """`query`, `key`, `value` (P, heads, D), window g at `bounds[g]` to `bounds[g + 1]` - 1, to (P, heads, D), all on
    a GPU (or under TRITON_INTERPRET=1). Raises ValueError for windows longer than LONGEST."""
    if longest > LONGEST:
        raise ValueError(f"a window of {longest} places is longer than the {LONGEST} of this kernel")
    return Windows.apply(query, key, value, bounds, scale)
