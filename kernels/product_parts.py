"""What kernels have in common whose programs share a piece of work, and those of products with large weights.

warm_tile(weight, column, columns, begin, DEPTH, ASKED, GATED)      # inside a kernel, before it follows; or bring_tile
if not is_last(mine, done, arrived, SHARERS): return                # of several programs the last one adds up
done = sum_of(first, apart, SHARERS)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.early import bring, once, warm

MOST_ROWS = 64
LINE = tl.constexpr(64)  # numbers of half precision in one line of memory


def tile_rows(rows: int) -> int:
    """Rows of a tile that holds `rows`: a tensor core takes eight at least."""
    return next(count for count in (8, 16, 32, MOST_ROWS) if rows <= count)


def lies_whole(*tensors: torch.Tensor) -> bool:
    """Whether each lies in one piece, as kernels count its places, and from a multiple of 16 bytes on, as the copy
    engine takes it and as it was when a kernel was proved."""
    return all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in tensors)


@once
def arrived(device: torch.device) -> torch.Tensor:
    """How many of the programs that share a piece of work have ended: zeros, as each kernel leaves them again. Kernels
    that use it run one after another: one stream a device, and one that begins early counts only once it has waited for
    the one before, all of it (`follow`)."""
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


@triton.jit
def warm_tile(weight, column, columns, begin, DEPTH: tl.constexpr, ASKED: tl.constexpr, GATED: tl.constexpr):
    """The weights are nobody's to write: the first ASKED numbers of each `column` come while the kernel before this one
    ends."""
    line = tl.minimum(begin + tl.arange(0, ASKED // LINE) * LINE, DEPTH - LINE)
    ahead = weight + column.to(tl.int64)[:, None] * DEPTH + line[None, :]
    warm(ahead)
    if GATED:
        warm(ahead + columns.to(tl.int64) * DEPTH)


@triton.jit
def bring_tile(
    weight, column, columns, begin, DEPTH: tl.constexpr, ASKED: tl.constexpr, GATED: tl.constexpr, COLUMNS: tl.constexpr
):
    """The same of COLUMNS columns by the copy engine, which takes whole pieces of 16 bytes: where less than ASKED
    numbers are left those before them, too."""
    ahead = weight + column.to(tl.int64) * DEPTH + tl.minimum(begin, DEPTH - ASKED)
    bring(ahead, 2 * ASKED, COLUMNS)
    if GATED:
        bring(ahead + columns.to(tl.int64) * DEPTH, 2 * ASKED, COLUMNS)


@triton.jit
def inverse_of(sums, epsilon, DEPTH: tl.constexpr):
    """One over the root mean square of each row, from the parts of the sum of its squares."""
    return tl.rsqrt(tl.sum(sums, 1) / DEPTH + epsilon)


@triton.jit
def asked_before(
    bias, residual, norm, column, inside, out, both,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """What comes after the products, asked for before the kernel before has ended: what is added, bias (COLUMNS, 1) or
    residual (COLUMNS, ROWS) in fp32, and the weight (COLUMNS,) of the norm that follows.

    Whoever made the residual was launched before that kernel, which lets this one begin only once it has waited for
    all before it (`follow`), or is launched plainly; past the processor's own cache, which may hold what stood there
    before.
    """
    added, scale = 0.0, 0.0
    if BIAS:
        added = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[:, None]
    if RESIDUAL:
        added = tl.load(residual + out, mask=both, other=0.0, cache_modifier=".cg").to(tl.float32)
    if SCALED:
        scale = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
    return added, scale


@triton.jit
def sums_of_squares(squares, row, known, parts, PARTS: tl.constexpr):
    """The parts of the sum of each row's squares, (ROWS, PARTS)."""
    part = tl.arange(0, PARTS)
    inside = known[:, None] & (part < parts)[None, :]
    return tl.load(squares + row[:, None] * parts + part[None, :], mask=inside, other=0.0)


@triton.jit
def is_last(mine, done, arrived, SHARERS: tl.constexpr):
    """Leaves `done` at `mine` for whoever of the SHARERS comes last: that one adds up, in their order, so that the sum
    is the same each time. It sees what they all have left, past its processor's own cache; the count `arrived` is zero
    again then."""
    tl.store(mine, done)
    # All warps have stored before one of them says so to the others (acquire and release, Triton's own default).
    tl.debug_barrier()
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == SHARERS - 1
    if last:
        tl.store(arrived, 0)
    return last


@triton.jit
def sum_of(first, apart: tl.constexpr, SHARERS: tl.constexpr):
    """Of what stands at `first` and `apart` numbers behind each other; not out of this processor's own cache, which
    knows nothing of what the others have written."""
    done = tl.load(first, cache_modifier=".cg")
    for other in tl.static_range(1, SHARERS):
        done += tl.load(first + other * apart, cache_modifier=".cg")
    return done


@triton.jit
def store_for_norm(rounded, scale, squares, scaled, known, both, SCALED: tl.constexpr):
    """What the norm that follows takes of a tile (COLUMNS, ROWS) of the residual stream: each row's sum of squares and,
    where it is SCALED, the numbers times the norm's weight."""
    wide = rounded.to(tl.float32)
    tl.store(squares, tl.sum(wide * wide, 0), mask=known)
    if SCALED:
        tl.store(scaled, (wide * scale[:, None]).to(rounded.dtype), mask=both)


@triton.jit
def activated(gate, up, kind: tl.constexpr):
    """silu(gate) * up, rounded as row_kernels.swiglu_kernel rounds it."""
    gate = gate.to(kind).to(tl.float32)
    return (gate * tl.sigmoid(gate)).to(kind).to(tl.float32) * up
