"""Products of up to 64 rows with large weights: the weight is the left matrix of a Hopper tensor core's product.

    target, left, scaled = launch(Broad(64, 128, 4, 4, 4), begins, source, weight, residual=hidden, following=norm)

A warp group's product (wgmma) takes 64 columns of the weight at least, and as many rows as there are, both out of
shared memory, where the copy engine (TMA) brings them: no register holds what is under way, so that as much can be as
shared memory has room for. Norms come in two halves: what made the rows left them times the next norm's weight
(`following`), and a row's own factor comes after the product.

Every tile reads all rows, out of the second-level cache, which gives some twice of what the memory gives: narrow tiles
would read more of rows than of weights. So tiles are broad, and where they are too few to fill a GPU, programs share a
tile's depth. Shapes: R rows, K in, N out, T tiles of `columns` columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.early import follow
from kernels.product_parts import (
    activated,
    arrived,
    asked_before,
    bring_tile,
    inverse_of,
    is_last,
    store_for_norm,
    sum_of,
    sums_of_squares,
    tile_rows,
)

PROGRAMS = 264  # no more share tiles: two on each multiprocessor of an H100
WARMED = tl.constexpr(512)  # numbers of each row of a tile that are asked for early


class Broad(NamedTuple):
    """Columns of a tile, depth of a block, warps, stages, and the most programs that share a tile's depth."""

    columns: int
    block: int
    warps: int
    stages: int
    sharers: int

    def shared(self, columns: int) -> Broad:
        """For a weight of `columns`: no more programs share a tile than a GPU wants."""
        tiles = triton.cdiv(columns, self.columns)
        return self._replace(sharers=max(1, min(self.sharers, PROGRAMS // tiles)))


def takes(device: torch.device) -> bool:
    """Whether a GPU multiplies so: Hopper alone does. On a CPU it is Triton's interpreter."""
    return device.type == "cpu" or (torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9)


@triton.jit
def multiply_broadly(
    sources, weights, column, columns, begin, end,
    GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(COLUMNS, ROWS) of the weight's columns from `column` on and, where it is GATED, of those `columns` further on,
    over the depth from `begin` to `end`."""
    done = tl.zeros((COLUMNS, ROWS), tl.float32)
    second = tl.zeros((COLUMNS, ROWS), tl.float32)
    for start in range(begin, end, BLOCK):
        states = sources.load([0, start]).T
        done = tl.dot(weights.load([column, start]), states, done)
        if GATED:
            second = tl.dot(weights.load([columns + column, start]), states, second)
    return done, second


@triton.jit(do_not_specialize=["rows"])
def broad_kernel(
    sources, weights, weight, bias, residual, squares, following, target, scaled, squares_done, shares, arrived,
    rows, columns, parts, epsilon,
    DEPTH: tl.constexpr, PARTS: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    SHARERS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One tile of COLUMNS columns for all rows; DEPTH is a multiple of BLOCK. `sources` and `weights` are the copy
    engine's view of the rows and of the weight, which is zero beyond their edges. SHARERS programs take a part of the
    depth each; where that is one block the weights are all there when the kernel before ends."""
    tl.static_assert(SHARERS == 1 or not GATED)
    kind: tl.constexpr = target.dtype.element_ty
    WHOLE: tl.constexpr = BLOCK * SHARERS == DEPTH and not GATED
    tile, share = tl.program_id(0), tl.program_id(1)
    row, column = tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
    many: tl.constexpr = (DEPTH // BLOCK + SHARERS - 1) // SHARERS * BLOCK
    begin = share * many
    end = tl.minimum(begin + many, DEPTH)
    known, inside = row < rows, column < columns
    out = row[None, :] * columns + column[:, None]
    both = known[None, :] & inside[:, None]
    if WHOLE:
        first_weight = weights.load([tile * COLUMNS, begin])
    elif EARLY:
        asked: tl.constexpr = WARMED if many >= WARMED else BLOCK
        bring_tile(weight, tl.minimum(column, columns - 1), columns, begin, DEPTH, asked, GATED, COLUMNS)
    added, scale = asked_before(bias, residual, following, column, inside, out, both, BIAS, RESIDUAL, SCALED)
    follow(EARLY)
    if NORMED:
        sums = sums_of_squares(squares, row, known, parts, PARTS)
    if WHOLE:
        done = tl.dot(first_weight, sources.load([0, begin]).T)
    else:
        done, second = multiply_broadly(
            sources, weights, tile * COLUMNS, columns, begin, end, GATED, ROWS, COLUMNS, BLOCK
        )  # fmt: skip
    if SHARERS > 1:
        mine = shares + tile * (SHARERS * COLUMNS * ROWS) + tl.arange(0, COLUMNS)[:, None] * ROWS + row[None, :]
        if not is_last(mine + share * (COLUMNS * ROWS), done, arrived + tile, SHARERS):
            return
        done = sum_of(mine, COLUMNS * ROWS, SHARERS)
    if NORMED:
        inverse = inverse_of(sums, epsilon, DEPTH)
        done *= inverse[None, :]
        if GATED:
            second *= inverse[None, :]
    if GATED:
        done = activated(done, second, kind)
    if BIAS or RESIDUAL:
        done += added
    rounded = done.to(kind)
    tl.store(target + out, rounded, mask=both)
    if RESIDUAL:
        left = squares_done + row * tl.num_programs(0) + tile
        store_for_norm(rounded, scale, left, scaled + out, known, both, SCALED)


def launch(
    tile: Broad,
    begins: bool,
    source: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    epsilon: float | None = None,
    squares: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    following: torch.Tensor | None = None,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`source` (R, K) times `weight` (N, K), or (2N, K) where it is `gated`; returns (R, N), with `residual` added,
    the squares of that (R, T), and it times the weight (N,) of the norm that is `following`; the latter two hold
    nothing where nothing was added or follows. With `epsilon` each row is over its root mean square, of which `squares`
    are the parts; `begins` before the kernel that was launched before has ended."""
    (rows, depth), size = source.shape, tile_rows(len(source))
    columns = weight.shape[0] // (2 if gated else 1)
    tiles, normed = triton.cdiv(columns, tile.columns), epsilon is not None
    target = source.new_empty(rows, columns)
    scaled = target if following is None else torch.empty_like(target)
    left = source.new_empty(rows, 1 if residual is None else tiles, dtype=torch.float32)
    parts = squares.shape[1] if normed else 1
    numbers = tile.sharers * tiles * tile.columns * size if tile.sharers > 1 else 1
    shares = target.new_empty(numbers, dtype=torch.float32)
    broad_kernel[(tiles, tile.sharers)](
        TensorDescriptor.from_tensor(source, [size, tile.block]),
        TensorDescriptor.from_tensor(weight, [tile.columns, tile.block]),
        weight, weight if bias is None else bias, source if residual is None else residual,
        squares if normed else left, weight if following is None else following, target, scaled, left,
        shares, arrived(source.device) if tile.sharers > 1 else shares,
        rows, columns, parts, epsilon if normed else 0.0,
        DEPTH=depth, PARTS=triton.next_power_of_2(parts), NORMED=normed, BIAS=bias is not None,
        RESIDUAL=residual is not None, SCALED=following is not None, GATED=gated, ROWS=size, COLUMNS=tile.columns,
        BLOCK=tile.block, SHARERS=tile.sharers, EARLY=begins, num_warps=tile.warps, num_stages=tile.stages,
        **({"launch_pdl": True} if begins else {}),
    )  # fmt: skip
    return target, left, scaled
