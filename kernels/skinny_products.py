"""Products of a few rows with large weights, at the speed of the memory that the weights come from.

    rows = skinny.Rows(hidden)                                           # the residual stream
    qkv = normed_product("qkv", rows, norm, weight, bias)                # rms_norm(hidden) @ weight.T + bias
    rows = add_product("out", rows, attended, weight, ("gated", norm))   # hidden + attended @ weight.T
    inner = gated_product("gated", rows, norm, weight)                   # silu(gate) * up, of one weight for both

A decoding step reads every weight once for a few rows, so only the bytes count, and what starts a kernel: norm, bias,
activation and residual are part of the product that they stand beside. Where these kernels do all of it, a row comes
out the same to the bit whatever the others hold, of one to eight rows, of nine to sixteen, to 32 and to 64. Many rows
go through broad_products.py.

Where no tile was measured to be faster (TILES), in full precision and on a CPU torch's products and the kernels of
row_kernels.py do it. Shapes: R rows, K in, N out, T tiles of COLUMNS columns.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.nn import functional

from kernels import broad_products
from kernels.broad_products import Broad, takes
from kernels.early import EARLY, NEVER, PLAIN, early, follow, once, way_that_agrees
from kernels.product_parts import (
    MOST_ROWS,
    activated,
    arrived,
    asked_before,
    inverse_of,
    is_last,
    lies_whole,
    store_for_norm,
    sum_of,
    sums_of_squares,
    tile_rows,
    warm_tile,
)
from kernels.row_kernels import on_triton, rms_norm, swiglu

# Numbers of each column of a tile that are asked for early, by the product's kind: a power of two.
WARMED = {"qkv": 1_024, "out": 1_024, "gated": 1_024, "down": 512, "head": 1_024}
# (columns of a tile, depth of a block, warps, stages, programs that share a tile's depth, pieces of a block), or a
# `Broad`, by the product's kind, for up to 8 rows, 16, 32 and 64; None where torch is faster or nobody has looked.
# Measured on an H100 inside a whole step (benchmarks/write_speed.py --tune).
Tile = tuple[int, int, int, int, int, int] | Broad
TILES: dict[str, dict[int, Tile | None]] = {
    "qkv": {
        8: (16, 2048, 8, 1, 1, 8),
        16: (16, 256, 2, 6, 1, 2),
        32: Broad(64, 512, 4, 1, 4),
        64: Broad(64, 128, 4, 4, 3),
    },
    "out": {
        8: (16, 256, 2, 8, 1, 2),
        16: Broad(64, 512, 4, 1, 4),
        32: Broad(64, 512, 4, 1, 4),
        64: Broad(64, 512, 4, 1, 4),
    },
    "gated": {
        8: (16, 512, 2, 3, 1, 2),
        16: (16, 256, 2, 4, 1, 1),
        32: Broad(64, 128, 4, 2, 1),
        64: Broad(64, 128, 4, 2, 1),
    },
    "down": {
        8: (16, 256, 1, 7, 3, 1),
        16: Broad(64, 256, 4, 4, 4),
        32: Broad(64, 256, 4, 4, 4),
        64: Broad(64, 256, 4, 3, 4),
    },
    "head": {
        8: (16, 256, 2, 6, 1, 1),
        16: (16, 256, 2, 4, 1, 1),
        32: Broad(64, 128, 4, 4, 1),
        64: Broad(128, 128, 8, 3, 1),
    },
}
# Instead of those, by rows, where there is no Hopper, which alone takes broad tiles.
ELSEWHERE: dict[tuple[str, int], Tile] = {
    ("qkv", 8): (16, 256, 2, 8, 1, 2),
    ("out", 16): (16, 256, 2, 6, 1, 2),
    ("down", 16): (16, 256, 1, 5, 3, 1),
}
# The product that makes the rows of another one.
BEFORE = {"qkv": "down", "gated": "out", "head": "down"}
# Of tiles of one stage the whole depth of a program is one block; of other depths these are taken instead.
NARROW_OTHERWISE, BROAD_OTHERWISE = (16, 256, 2, 8, 1, 2), Broad(64, 128, 4, 4, 4)
Norm = tuple[torch.Tensor, float]  # weight (K,) and epsilon


def planned(kind: str, source: torch.Tensor, normed: bool) -> Tile | None:
    """The tile that was measured for so many rows, unless nobody can multiply them so here."""
    if not on_triton(source) or len(source) > MOST_ROWS:
        return None
    rows = tile_rows(len(source))
    tile = TILES[kind][rows]
    if not takes(source.device):
        tile = ELSEWHERE.get((kind, rows), tile)
        return None if isinstance(tile, Broad) else tile
    # fp16 has no room for rows that have met the norm's weight, but are not over their root mean square yet.
    broadly = isinstance(tile, Broad) and normed and source.dtype == torch.float16
    return None if broadly else tile


def parts_of(kind: str, source: torch.Tensor) -> int:
    """In how many parts the squares of the rows `source` (R, K) come that a product of `kind` takes."""
    tile = planned(BEFORE[kind], source, False) if kind in BEFORE else None
    return triton.cdiv(source.shape[1], tile[0]) if tile else 1


def fitted(tile: Tile, depth: int, columns: int) -> Tile:
    """`tile` as it is used for a weight of `depth` and `columns`."""
    broad = isinstance(tile, Broad)
    if broad:
        tile = tile.shared(columns)
    _, block, _, stages, sharers, *_ = tile
    if stages > 1 or block * sharers == depth:
        return tile
    return BROAD_OTHERWISE.shared(columns) if broad else NARROW_OTHERWISE


def tile_of(
    kind: str,
    source: torch.Tensor,
    weight: torch.Tensor,
    norm: torch.Tensor | None = None,
    scales: bool = False,
    parts: int | None = None,
    biased: bool = False,
) -> tuple[Tile | None, str]:
    """The tile for `source` (R, K) and `weight` (N, K), of a "gated" product (2N, K), and how it is launched; None
    where torch does it: whole tiles only, both in one piece of memory, and what has just given torch's own result, with
    such a weight of the norm before it, or of the one that it `scales` its result for, the rows' squares in so many
    `parts`, as the product before leaves them, and a bias where it is `biased`."""
    tile, columns = planned(kind, source, norm is not None and not scales), len(weight) // (2 if kind == "gated" else 1)
    if not tile:
        return None, NEVER
    tile = fitted(tile, source.shape[1], columns)
    # The last broad tile need not be whole.
    if columns % (16 if isinstance(tile, Broad) else tile[0]) or source.shape[1] % tile[1]:
        return None, NEVER
    if not lies_whole(source, weight):
        why = "what it multiplies is not in one piece of memory, from a multiple of 16 bytes on"
        warnings.warn(f"product ({kind}) of a weight {tuple(weight.shape)}: {why}; torch does it, slower", stacklevel=2)
        return None, NEVER
    weights = source.dtype if norm is None else norm.dtype
    parts = parts or parts_of(kind, source)
    rows, kinds = tile_rows(len(source)), (source.dtype, source.device, weights)
    way = way_of(kind, tile, rows, source.shape[1], *kinds, scales, parts, biased)
    return tile if way else None, way


@once
def way_of(
    kind: str, tile: Tile, rows: int, depth: int, dtype: torch.dtype, device: torch.device, norms: torch.dtype,
    scales: bool, parts: int, biased: bool,
) -> str:  # fmt: skip
    """How the kernel is launched for weights of `depth`, and of norms in `norms`, before it or, where it `scales`,
    after it, rows' squares in `parts`, and a bias where it is `biased`: by proof on some random tiles."""
    draw = torch.Generator(device).manual_seed(0)
    columns = 8 * tile[0]

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, device=device).to(dtype)

    hidden, weight, norm = some(rows, depth), some(2 * columns, depth) / depth**0.5, (some(depth).to(norms), 1e-6)
    residual, half = some(rows, columns), weight[:columns]
    squares = (hidden.float().square().sum(-1, keepdim=True) / parts).expand(rows, parts).contiguous()
    normed = rms_norm(hidden.float(), norm[0].float(), norm[1])
    if kind == "gated":
        wanted = (swiglu(normed @ weight.float().T),)
        options = {"weight": weight, "norm": norm, "squares": squares, "gated": True}
    elif kind in ("out", "down"):
        added, scale = hidden.float() @ half.float().T + residual.float(), some(columns).to(norms)
        wanted, options = (added, added.square().sum(-1)), {"weight": half, "residual": residual}
        if scales:
            wanted, options = (*wanted, added * scale.float()), options | {"following": scale}
    else:
        bias = residual[0].contiguous() if biased else None
        wanted = (normed @ half.float().T + (bias.float() if biased else 0),)
        options = {"weight": half, "bias": bias, "norm": norm, "squares": squares}

    def by(begins: bool) -> tuple[torch.Tensor, ...]:
        done, left, scaled = launch(tile, begins, hidden, **options, warmed=WARMED[kind])
        return (done, left.sum(-1), scaled)[: len(wanted)]

    ways = {EARLY: lambda: by(True)} if early(device) else {}
    return way_that_agrees(f"products ({kind})", ways | {PLAIN: lambda: by(False)}, wanted)


@dataclass(frozen=True)
class Rows:
    """A residual stream `hidden` (R, H), and `squares` (R, T), whose sum over T is that of the squares of a row: each
    tile of the product that made the row has left its own; `scaled` is the rows times the weight `by` (H,) of the norm
    that follows. None where they were made in another way."""

    hidden: torch.Tensor
    squares: torch.Tensor | None = None
    scaled: torch.Tensor | None = None
    by: torch.Tensor | None = None

    def scaled_for(self, norm: Norm) -> torch.Tensor | None:
        """The rows times the weight of `norm`, where whoever made them knew of it."""
        return self.scaled if self.by is norm[0] else None

    @property
    def parts(self) -> int:
        """How many there are of `squares` of each row."""
        return 1 if self.squares is None else self.squares.shape[1]

    def sums(self) -> torch.Tensor:
        return self.hidden.float().square().sum(-1, keepdim=True) if self.squares is None else self.squares


@triton.jit
def rows_of(source, norm, inverse, at, deep, start, DEPTH: tl.constexpr, NORMED: tl.constexpr):
    """The rows from `start` on, at the depths `deep` (PIECES, STEP) behind it: (PIECES, STEP, ROWS)."""
    kind: tl.constexpr = source.dtype.element_ty
    row, known = at
    places = source + row[None, None, :] * DEPTH + deep[:, :, None] + start
    states = tl.load(places, mask=known[None, None, :], other=0.0)
    if NORMED:
        scale = tl.load(norm + start + deep)[:, :, None]
        if kind == tl.bfloat16:
            # A row's own factor may come after the product: one multiplication here instead of six operations.
            states = (states * scale).to(kind)
        else:
            # fp16 has no room for what is not normed yet.
            states = (states.to(tl.float32) * inverse[None, None, :]).to(kind).to(tl.float32) * scale.to(tl.float32)
            states = states.to(kind)
    return states


@triton.jit
def multiply(
    places, source, norm, inverse, at, deep, columns, begin, end,
    DEPTH: tl.constexpr, NORMED: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """(PIECES, COLUMNS, ROWS) of the weight at `places` and, where it is GATED, of those `columns` further on, over the
    depth from `begin` to `end`."""
    done = tl.zeros((PIECES, COLUMNS, ROWS), tl.float32)
    second = tl.zeros((PIECES, COLUMNS, ROWS), tl.float32)
    for start in range(begin, end, BLOCK):
        first_weight = tl.load(places + start)
        states = rows_of(source, norm, inverse, at, deep, start, DEPTH, NORMED)
        done = tl.dot(first_weight, states, done)
        if GATED:
            second = tl.dot(tl.load(places + columns.to(tl.int64) * DEPTH + start), states, second)
    return done, second


@triton.jit(do_not_specialize=["rows"])  # one row would be compiled anew, after the proof with eight
def product_kernel(
    source, weight, bias, residual, squares, norm, target, scaled, squares_done, shares, arrived,
    rows, columns, parts, epsilon,
    DEPTH: tl.constexpr, PARTS: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    SHARERS: tl.constexpr, PIECES: tl.constexpr, EARLY: tl.constexpr, WARMED: tl.constexpr,
):  # fmt: skip
    """One tile of COLUMNS columns for all rows; DEPTH is a multiple of BLOCK, `columns` of COLUMNS. SHARERS programs
    take a part of the depth each; PIECES of a block are multiplied by warps of their own, in fewer turns. `norm` is the
    weight of the norm before the product where it is NORMED, of the one after it where it is SCALED. A tensor core's
    tile has 16 of the weight, the left matrix, and 8 of the rows. Where the depth is one block its weights are all on
    their way before the kernel before has ended."""
    tl.static_assert(SHARERS == 1 or not GATED)
    kind: tl.constexpr = source.dtype.element_ty
    LATER: tl.constexpr = NORMED and kind == tl.bfloat16  # a row's own factor comes after the product
    WHOLE: tl.constexpr = BLOCK == DEPTH and SHARERS == 1 and not GATED
    STEP: tl.constexpr = BLOCK // PIECES
    row, tile, share = tl.arange(0, ROWS), tl.program_id(0), tl.program_id(1)
    column, known = tile * COLUMNS + tl.arange(0, COLUMNS), row < rows
    many: tl.constexpr = (DEPTH // BLOCK + SHARERS - 1) // SHARERS * BLOCK
    begin, end = share * many, tl.minimum(share * many + many, DEPTH)
    deep = tl.arange(0, PIECES)[:, None] * STEP + tl.arange(0, STEP)[None, :]
    # In 64 bits: the head of a large vocabulary has more numbers than 2**31.
    # (PIECES, COLUMNS, STEP), and the rows are (PIECES, STEP, ROWS).
    places = weight + column.to(tl.int64)[None, :, None] * DEPTH + deep[:, None, :]
    if WHOLE:
        first_weight = tl.load(places)
    elif EARLY:
        warm_tile(weight, column, columns, begin, DEPTH, WARMED if many >= WARMED else BLOCK, GATED)
    out, both, inside = row[None, :] * columns + column[:, None], known[None, :], column < columns
    added, scale = asked_before(bias, residual, norm, column, inside, out, both, BIAS, RESIDUAL, SCALED)
    follow(EARLY)
    inverse = tl.full((ROWS,), 1.0, tl.float32)
    if NORMED:
        sums = sums_of_squares(squares, row, known, parts, PARTS)
        inverse = inverse if LATER else inverse_of(sums, epsilon, DEPTH)
    if WHOLE:
        states = rows_of(source, norm, inverse, (row, known), deep, 0, DEPTH, NORMED)
        inverse = inverse_of(sums, epsilon, DEPTH) if LATER else inverse
        done = tl.dot(first_weight, states)
        second = done
    else:
        done, second = multiply(
            places, source, norm, inverse, (row, known), deep, columns, begin, end,
            DEPTH, NORMED, GATED, ROWS, COLUMNS, BLOCK, PIECES,
        )  # fmt: skip
        inverse = inverse_of(sums, epsilon, DEPTH) if LATER else inverse
    done, second = tl.sum(done, 0), tl.sum(second, 0)
    done, second = (done * inverse[None, :], second * inverse[None, :]) if LATER else (done, second)
    if SHARERS > 1:
        mine = shares + tile * (SHARERS * COLUMNS * ROWS) + tl.arange(0, COLUMNS)[:, None] * ROWS + row[None, :]
        if not is_last(mine + share * (COLUMNS * ROWS), done, arrived + tile, SHARERS):
            return
        done = sum_of(mine, COLUMNS * ROWS, SHARERS)
    done = activated(done, second, kind) if GATED else done
    rounded = (done + added if BIAS or RESIDUAL else done).to(kind)
    tl.store(target + out, rounded, mask=both)
    if RESIDUAL:
        left = squares_done + row * tl.num_programs(0) + tile
        store_for_norm(rounded, scale, left, scaled + out, known, both, SCALED)


def launch(
    tile: Tile,
    begins: bool,
    source: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: Norm | None = None,
    squares: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    following: torch.Tensor | None = None,
    gated: bool = False,
    scaled: torch.Tensor | None = None,
    warmed: int = 1_024,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`source` (R, K) times `weight` (N, K), or (2N, K) where it is `gated`; returns (R, N), with `residual` added, the
    squares of that (R, T), and it times the weight (N,) of the norm that is `following`; the latter two hold nothing
    where nothing was added or follows. `squares` of the rows for `norm`, of which broad tiles take what `scaled` holds,
    the rows times its weight; `begins` before the kernel that was launched before has ended, and narrow tiles ask for
    `warmed` numbers of each column until then."""
    if isinstance(tile, Broad):
        if norm:
            source = (source * norm[0]).to(source.dtype) if scaled is None else scaled
        given = (bias, norm[1] if norm else None, squares, residual, following, gated)
        return broad_products.launch(tile, begins, source, weight, *given)
    width, block, warps, stages, sharers, pieces = tile
    rows, depth = source.shape
    columns = weight.shape[0] // (2 if gated else 1)
    target = source.new_empty(rows, columns)
    done = target if following is None else torch.empty_like(target)
    left = source.new_empty(rows, columns // width if residual is not None else 1, dtype=torch.float32)
    parts, scale = squares.shape[1] if norm else 1, norm[0] if norm else following
    shares = target.new_empty(sharers * columns * tile_rows(rows) if sharers > 1 else 1, dtype=torch.float32)
    product_kernel[(columns // width, sharers)](
        source, weight, weight if bias is None else bias, source if residual is None else residual,
        squares if norm else left, weight if scale is None else scale, target, done, left,
        shares, arrived(source.device) if sharers > 1 else shares,
        rows, columns, parts, norm[1] if norm else 0.0,
        DEPTH=depth, PARTS=triton.next_power_of_2(parts), NORMED=norm is not None, BIAS=bias is not None,
        RESIDUAL=residual is not None, SCALED=following is not None, GATED=gated, ROWS=tile_rows(rows), COLUMNS=width,
        BLOCK=block, SHARERS=sharers, PIECES=pieces, EARLY=begins, WARMED=warmed,
        num_warps=warps, num_stages=stages,
        **({"launch_pdl": True} if begins else {}),
    )  # fmt: skip
    return target, left, done


def normed_product(
    kind: str, rows: Rows, norm: Norm, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """rms_norm of the rows, by weight (K,) and epsilon in `norm`, times `weight` (N, K) and plus `bias` (N,):
    (R, N)."""
    tile, way = tile_of(kind, rows.hidden, weight, norm[0], parts=rows.parts, biased=bias is not None)
    if tile is None:
        return functional.linear(rms_norm(rows.hidden, *norm), weight, bias)
    given = (rows.hidden, weight, bias, norm, rows.sums())
    return launch(tile, way == EARLY, *given, scaled=rows.scaled_for(norm), warmed=WARMED[kind])[0]


def gated_product(kind: str, rows: Rows, norm: Norm, weight: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of the normed rows, of `weight` (2N, K), gate before up; (R, N)."""
    tile, way = tile_of(kind, rows.hidden, weight, norm[0], parts=rows.parts)
    if tile is None:
        return swiglu(functional.linear(rms_norm(rows.hidden, *norm), weight))
    given = (rows.hidden, weight, None, norm, rows.sums())
    asked = {"scaled": rows.scaled_for(norm), "warmed": WARMED[kind]}
    return launch(tile, way == EARLY, *given, gated=True, **asked)[0]


def scale_for(following: tuple[str, Norm] | None, source: torch.Tensor) -> torch.Tensor | None:
    """The weight of the norm of the product that is `following` where that takes rows that have met it."""
    broad = following and isinstance(planned(following[0], source, True), Broad)
    return following[1][0] if broad else None


def prove(
    kind: str,
    source: torch.Tensor,
    weight: torch.Tensor,
    norm: Norm | None = None,
    following: tuple[str, Norm] | None = None,
    parts: int | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """Has all compiled and proved that the product of `kind` takes for such a `source` (R, K), whose squares come in
    `parts`, without the product."""
    scale = scale_for(following, source)
    tile, _ = tile_of(kind, source, weight, norm[0] if norm else scale, scale is not None, parts, bias is not None)
    if tile is None and norm:
        rms_norm(source, *norm)
    if tile is None and kind == "gated":
        swiglu(source.new_zeros(len(source), len(weight)))


def add_product(
    kind: str, rows: Rows, inner: torch.Tensor, weight: torch.Tensor, following: tuple[str, Norm] | None = None
) -> Rows:
    """`rows` plus `inner` (R, K) times `weight` (N, K); what was in `rows` may be written over. `following` is the
    product that takes them next, with its norm. Whatever made `inner` was launched after what made the rows: those are
    read while it still runs."""
    scale = scale_for(following, rows.hidden)
    tile, way = tile_of(kind, inner, weight, scale, scale is not None)
    if tile is None:
        return Rows(rows.hidden.addmm_(inner, weight.T))
    given = {"residual": rows.hidden, "following": scale, "warmed": WARMED[kind]}
    hidden, squares, scaled = launch(tile, way == EARLY, inner, weight, **given)
    return Rows(hidden, squares, None if scale is None else scaled, scale)
