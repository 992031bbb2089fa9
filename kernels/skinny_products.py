"""Products of a few rows with large weights, at the speed of the memory that the weights come from.

    rows = skinny.Rows(hidden)                                           # the residual stream
    qkv = normed_product("qkv", rows, norm, weight, bias)                # rms_norm(hidden) @ weight.T + bias
    rows = add_product("out", rows, attended, weight)                    # hidden + attended @ weight.T
    inner = gated_product("gated", rows, norm, weight)                   # silu(gate) * up, of one weight for both

A decoding step reads every weight once for a few rows, so only the bytes count, and what starts a kernel: norm, bias,
activation and residual are part of the product that they stand beside. Each row is computed in the same order whatever
the other rows hold, so that an answer does not depend on what is written beside it.

Where no tile was measured to be faster (TILES), in full precision and on a CPU torch's products and the kernels of
row_kernels.py do it. Shapes: R rows, K in, N out, T tiles of COLUMNS columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.nn.functional import linear

from kernels.row_kernels import on_triton, rms_norm, swiglu

# (columns of a tile, depth of a block, warps, stages) by the product's kind and its most rows; None where torch is
# faster. Measured by benchmarks/write_speed.py --tune on an H100.
Tile = tuple[int, int, int, int]
TILES: dict[str, dict[int, Tile | None]] = {
    "qkv": {16: (16, 256, 2, 4)},
    "out": {16: (16, 256, 2, 4)},
    "gated": {16: (32, 256, 4, 3)},
    "down": {16: (16, 256, 2, 4)},
    "head": {16: (32, 256, 4, 3)},
}


def tile_of(kind: str, source: torch.Tensor, columns: int) -> Tile | None:
    """The tile for `source` (R, K) and a weight of `columns` (N); None where torch does it. Whole tiles only."""
    if not on_triton(source):
        return None
    rows = next((rows for rows in TILES[kind] if rows >= len(source)), None)
    tile = rows and TILES[kind][rows]
    return tile if tile and not columns % tile[0] and not source.shape[1] % tile[1] else None


@dataclass(frozen=True)
class Rows:
    """A residual stream `hidden` (R, H), and `squares` (R, T), whose sum over T is that of the squares of a row: each
    tile of the product that made the row has left its own. None where it was made in another way."""

    hidden: torch.Tensor
    squares: torch.Tensor | None = None

    def sums(self) -> torch.Tensor:
        return self.hidden.float().square().sum(-1, keepdim=True) if self.squares is None else self.squares


@triton.jit
def product_kernel(
    source, weight, bias, residual, squares, norm, target, squares_done,
    rows, columns, parts, epsilon,
    DEPTH: tl.constexpr, PARTS: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of COLUMNS columns for all rows; DEPTH is a multiple of BLOCK, `columns` of COLUMNS."""
    row, inner = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    tile = tl.program_id(0)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    known = row < rows
    inverse = tl.zeros((ROWS,), tl.float32)
    if NORMED:
        part = tl.arange(0, PARTS)
        inside = known[:, None] & (part < parts)[None, :]
        sums = tl.sum(tl.load(squares + row[:, None] * parts + part[None, :], mask=inside, other=0.0), 1)
        inverse = tl.rsqrt(sums / DEPTH + epsilon)
    # In 64 bits: the head of a large vocabulary has more numbers than 2**31.
    places = weight + column.to(tl.int64)[None, :] * DEPTH + inner[:, None]
    rows_at = source + row[:, None] * DEPTH + inner[None, :]
    done = tl.zeros((ROWS, COLUMNS), tl.float32)
    second = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, DEPTH, BLOCK):
        first_weight = tl.load(places + start)
        states = tl.load(rows_at + start, mask=known[:, None], other=0.0)
        if NORMED:
            scale = tl.load(norm + start + inner).to(tl.float32)
            # Rounded before it meets the weight, as the model's own norm is.
            states = (states.to(tl.float32) * inverse[:, None]).to(source.dtype.element_ty).to(tl.float32)
            states = (states * scale[None, :]).to(source.dtype.element_ty)
        done = tl.dot(states, first_weight, done)
        if GATED:
            second = tl.dot(states, tl.load(places + columns.to(tl.int64) * DEPTH + start), second)
    out = row[:, None] * columns + column[None, :]
    if GATED:
        gate = done.to(target.dtype.element_ty).to(tl.float32)
        done = (gate * tl.sigmoid(gate)).to(target.dtype.element_ty).to(tl.float32) * second
    if BIAS:
        done += tl.load(bias + column).to(tl.float32)[None, :]
    if RESIDUAL:
        done += tl.load(residual + out, mask=known[:, None], other=0.0).to(tl.float32)
    rounded = done.to(target.dtype.element_ty)
    tl.store(target + out, rounded, mask=known[:, None])
    if RESIDUAL:
        wide = rounded.to(tl.float32)
        tl.store(squares_done + row * tl.num_programs(0) + tile, tl.sum(wide * wide, 1), mask=known)


def launch(
    tile: Tile,
    source: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    squares: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`source` (R, K) times `weight` (N, K), or (2N, K) where it is `gated`; returns (R, N) and the squares of what was
    added to `residual` (R, T), which nobody has written where nothing was added. `squares` of the rows for `norm`."""
    width, block, warps, stages = tile
    rows, depth = source.shape
    columns = weight.shape[0] // (2 if gated else 1)
    target = source.new_empty(rows, columns)
    left = source.new_empty(rows, columns // width if residual is not None else 1, dtype=torch.float32)
    parts = squares.shape[1] if norm else 1
    product_kernel[(columns // width,)](
        source, weight, weight if bias is None else bias, source if residual is None else residual,
        squares if norm else left, norm[0] if norm else weight, target, left,
        rows, columns, parts, norm[1] if norm else 0.0,
        DEPTH=depth, PARTS=triton.next_power_of_2(parts), NORMED=norm is not None, BIAS=bias is not None,
        RESIDUAL=residual is not None, GATED=gated, ROWS=max(16, triton.next_power_of_2(rows)), COLUMNS=width,
        BLOCK=block, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return target, left


def normed_product(
    kind: str, rows: Rows, norm: tuple[torch.Tensor, float], weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """rms_norm of the rows, by weight (K,) and epsilon in `norm`, times `weight` (N, K) and plus `bias` (N,):
    (R, N)."""
    tile = tile_of(kind, rows.hidden, len(weight))
    if tile is None:
        return linear(rms_norm(rows.hidden, *norm), weight, bias)
    return launch(tile, rows.hidden, weight, bias, norm, rows.sums())[0]


def gated_product(kind: str, rows: Rows, norm: tuple[torch.Tensor, float], weight: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of the normed rows, of `weight` (2N, K), gate before up; (R, N)."""
    tile = tile_of(kind, rows.hidden, len(weight) // 2)
    if tile is None:
        return swiglu(linear(rms_norm(rows.hidden, *norm), weight))
    return launch(tile, rows.hidden, weight, None, norm, rows.sums(), gated=True)[0]


def add_product(kind: str, rows: Rows, inner: torch.Tensor, weight: torch.Tensor) -> Rows:
    """`rows` plus `inner` (R, K) times `weight` (N, K)."""
    tile = tile_of(kind, inner, len(weight))
    if tile is None:
        return Rows(torch.addmm(rows.hidden, inner, weight.T))
    return Rows(*launch(tile, inner, weight, residual=rows.hidden))
