"""Products in fp8: rows cast with a scale each, also as they are normed or gated, and transposed.

    rows = cast(hidden)                                     # (S, K) to fp8, a scale for each row
    weights = Weights([gate.weight, up.weight])             # cast
    gate, up = weights.forward(rows, [None, None])          # hidden @ weight.T, in bf16
    inner = weights.for_input(cast(gradient))               # gradient @ weight
    both = for_weight(cast(gradient), rows)                 # gradient.T @ hidden

e4m3 has three bits behind the first, so a product's operands are off by some 2.6 % each, by chance, and their product,
summed over many, by some 3.7 % of its norm.

Hopper's fp8 products take both operands with what is summed over lying dense, so gradients need transposes. A scale is
a power of two for each row, of a token or of an output: found in the pass that casts, where one for the whole tensor
would need a pass of its own, and in no token's way that another one is a thousand times as large (as in what goes into
an MLP's last product: Fishman et al. 2024). Over S, where scales of tokens stand inside the sum, both sides' are moved
into the gradient as it is transposed, relative to the largest: a power of two moves without rounding, until it is so
small beside others that it does not count.

Shapes: S tokens; K and N widths, multiples of 16. On a GPU by Triton and torch._scaled_mm, elsewhere by torch, which
computes with the same fp8 numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.launching import launch, power_above
from kernels.swiglu_kernels import gradients_of

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
NAMES = {E4M3: tl.float8e4nv, E5M2: tl.float8e5}
TILE = (128, 64, 4)  # rows and columns of a piece that is transposed at once, and its warps
# Numbers of a row that the gradients of gate and up are made of at once, and the warps of the row. It is read twice: by
# half as many warps, twice as many rows of 66 KB would be under way, more than the second reading finds in a Hopper's
# cache of 50 MB. That is reckoned, not measured.
PIECE = (4096, 16)
ALIGNED = 16  # of fp8 numbers, what every side of a product's operands is a multiple of

# Of a scale's exponent, as fp32 has it (127 is 2 ** 0). Two scales multiplied must not vanish, and what is below
# 448 x 2 ** -60 in a whole row does not count beside other rows.
LEAST, MOST = tl.constexpr(127 - 60), tl.constexpr(253)


class Rows(NamedTuple):
    """`values` (S, K) in fp8 times `scales` (S, 1), powers of two in fp32."""

    values: torch.Tensor
    scales: torch.Tensor

    def dequantised(self) -> torch.Tensor:
        """(S, K) in fp32."""
        return self.values.float() * self.scales


# -----------------------------------------------------------------------------
# Kernels


@triton.jit
def scale_of(most, LARGEST: tl.constexpr):
    """The power of two by which `most`, the largest of a row, is at most LARGEST, and one over it."""
    # Both kinds' largest number is 1.75 times a power of two. A division would be off by a bit at times, as it is made
    # on a GPU, and the scale then twice as large where `most` is such a number itself, one row in some 60 of bf16.
    POWER: tl.constexpr = 8 if LARGEST == 448.0 else 15
    exponent = ((most.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - POWER
    exponent = tl.minimum(tl.maximum(exponent, LEAST), MOST)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    # What has no end would be cast to the largest number there is, and nobody told.
    scale = tl.where(most < float("inf"), scale, most)
    return scale, ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def cast_kernel(source, target, scales, width, stride, LARGEST: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    inside = place < width
    wide = tl.load(source + row * stride + place, mask=inside, other=0.0).to(tl.float32)
    scale, inverse = scale_of(tl.max(tl.abs(wide), 0), LARGEST)
    tl.store(target + row * width + place, (wide * inverse).to(target.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def norm_cast_kernel(
    source, weight, target, scales, width, epsilon, LARGEST: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    inside = place < width
    wide = tl.load(source + row * width + place, mask=inside, other=0.0).to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + epsilon)
    # Rounded before it meets the weight, as the model's own norm is.
    normed = wide.to(source.dtype.element_ty).to(tl.float32)
    normed *= tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    scale, inverse = scale_of(tl.max(tl.abs(normed), 0), LARGEST)
    tl.store(target + row * width + place, (normed * inverse).to(target.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def swiglu_cast_kernel(gates, ups, target, scales, width, LARGEST: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    inside = place < width
    gate = tl.load(gates + row * width + place, mask=inside, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * tl.load(ups + row * width + place, mask=inside, other=0.0).to(tl.float32)
    scale, inverse = scale_of(tl.max(tl.abs(product), 0), LARGEST)
    tl.store(target + row * width + place, (product * inverse).to(target.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def swiglu_parts(gates, ups, gradients, start, width, BLOCK: tl.constexpr):
    """The gradients for gate and up, and their product, at the places from `start` on of one row."""
    place = start + tl.arange(0, BLOCK)
    inside = place < width
    gate = tl.load(gates + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(ups + place, mask=inside, other=0.0).to(tl.float32)
    outer = tl.load(gradients + place, mask=inside, other=0.0).to(tl.float32)
    return gradients_of(gate, up, outer)


@triton.jit
def swiglu_backward_kernel(
    gates, ups, gradients, inner, inner_scales, products, product_scales, width,
    LARGEST: tl.constexpr, PRODUCTS_LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    gates, ups, gradients, products = (gates + row * width, ups + row * width, gradients + row * width,
                                       products + row * width)  # fmt: skip
    inner += row * width * 2
    most, most_product = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    # Three rows of 11,008 and what is made of them are too much for registers; the second time they are in the cache.
    for start in range(0, width, BLOCK):
        for_gate, for_up, product = swiglu_parts(gates, ups, gradients, start, width, BLOCK)
        most = tl.maximum(most, tl.maximum(tl.abs(for_gate), tl.abs(for_up)))
        most_product = tl.maximum(most_product, tl.abs(product))
    scale, inverse = scale_of(tl.max(most, 0), LARGEST)
    product_scale, product_inverse = scale_of(tl.max(most_product, 0), PRODUCTS_LARGEST)
    tl.store(inner_scales + row, scale)
    tl.store(product_scales + row, product_scale)
    for start in range(0, width, BLOCK):
        for_gate, for_up, product = swiglu_parts(gates, ups, gradients, start, width, BLOCK)
        place = start + tl.arange(0, BLOCK)
        inside = place < width
        tl.store(inner + place, (for_gate * inverse).to(inner.dtype.element_ty), mask=inside)
        tl.store(inner + width + place, (for_up * inverse).to(inner.dtype.element_ty), mask=inside)
        tl.store(products + place, (product * product_inverse).to(products.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])  # another row count would be another kernel, in the middle of a training
def transpose_kernel(
    source, target, scales, other_scales, most, rows, columns, padded,
    KIND: tl.constexpr, SCALED: tl.constexpr, TWICE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Bytes of `source` (rows, columns) to `target` (columns, padded), zeros where there is no row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    part = tl.load(source + row[:, None] * columns + column[None, :], mask=inside, other=0)
    if SCALED:
        factor = tl.load(scales + row, mask=row < rows, other=0.0)
        if TWICE:
            factor *= tl.load(other_scales + row, mask=row < rows, other=0.0)
        factor /= tl.load(most)
        wide = part.to(KIND, bitcast=True).to(tl.float32) * factor[:, None]
        part = wide.to(KIND).to(tl.uint8, bitcast=True)
    kept = (column < columns)[:, None] & (row < padded)[None, :]
    tl.store(target + column[:, None] * padded + row[None, :], tl.trans(part), mask=kept)


# -----------------------------------------------------------------------------
# Casts


def on_triton(states: torch.Tensor) -> bool:
    """Whether kernels take these states: a GPU's, or any under TRITON_INTERPRET=1."""
    return states.is_cuda or not isinstance(cast_kernel, triton.JITFunction)


def warps_for(width: int) -> int:
    """How many warps take a row of `width` at once: up to 64 numbers a thread."""
    return min(max(power_above(width) // 1024, 1), 16)


def scales_by_torch(most: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """`scale_of` for `most` (S, 1) in fp32."""
    exponent = ((most.view(torch.int32) + 0x1FFFFF) >> 23) - (8 if kind == E4M3 else 15)
    exponent = exponent.clamp(LEAST.value, MOST.value)
    return torch.where(most < torch.inf, (exponent << 23).view(torch.float32), most)


def cast_by_torch(wide: torch.Tensor, kind: torch.dtype) -> Rows:
    """`cast` of `wide` (S, K) in fp32."""
    scales, largest = scales_by_torch(wide.abs().amax(-1, keepdim=True), kind), torch.finfo(kind).max
    return Rows((wide / scales).clamp(-largest, largest).to(kind), scales)


def empty_rows(like: torch.Tensor, count: int, width: int, kind: torch.dtype) -> Rows:
    scales = torch.empty(count, 1, dtype=torch.float32, device=like.device)
    return Rows(torch.empty(count, width, dtype=kind, device=like.device), scales)


def cast(states: torch.Tensor, kind: torch.dtype = E4M3, into: Rows | None = None) -> Rows:
    """`states` (S, K), whose rows may lie apart, in fp8 of `kind`; written `into` rows that are there already, if
    given."""
    if not on_triton(states):
        done = cast_by_torch(states.float(), kind)
        return done if into is None else Rows(into.values.copy_(done.values), into.scales.copy_(done.scales))
    count, width = states.shape
    if states.stride(1) != 1:
        states = states.contiguous()
    into = into or empty_rows(states, count, width, kind)
    options = {"LARGEST": torch.finfo(kind).max, "WIDTH": power_above(width), "num_warps": warps_for(width)}
    launch(cast_kernel, (count,), states, *into, width, states.stride(0), **options)
    return into


def norm_cast(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, kind: torch.dtype = E4M3) -> Rows:
    """`hidden` (S, H) over its root mean square, times `weight` (H,), in fp8 alone: elementwise.rms_norm, but for the
    rounding of its result."""
    if not on_triton(hidden):
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        return cast_by_torch(wide.to(hidden.dtype).float() * weight.float(), kind)
    count, width = hidden.shape
    rows = empty_rows(hidden, count, width, kind)
    options = {"LARGEST": torch.finfo(kind).max, "WIDTH": power_above(width), "num_warps": warps_for(width)}
    launch(norm_cast_kernel, (count,), hidden.contiguous(), weight, *rows, width, epsilon, **options)
    return rows


def swiglu_cast(gate: torch.Tensor, up: torch.Tensor, kind: torch.dtype = E4M3) -> Rows:
    """silu(`gate`) * `up`, all (S, I), in fp8 alone."""
    if not on_triton(gate):
        return cast_by_torch(torch.nn.functional.silu(gate.float()) * up.float(), kind)
    count, width = gate.shape
    rows = empty_rows(gate, count, width, kind)
    options = {"LARGEST": torch.finfo(kind).max, "WIDTH": power_above(width), "num_warps": warps_for(width)}
    launch(swiglu_cast_kernel, (count,), gate.contiguous(), up.contiguous(), *rows, width, **options)
    return rows


def swiglu_backward_cast(
    gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor, kind: torch.dtype = E4M3
) -> tuple[Rows, Rows]:
    """Of silu(`gate`) * `up` (S, I) and its `gradient`: those of gate and up side by side (S, 2I) in fp8 of `kind`, and
    the product again, in e4m3 as `swiglu_cast` makes it."""
    count, width = gate.shape
    if not on_triton(gate):
        wide, outer, wide_up = gate.float(), gradient.float(), up.float()
        sigmoid = torch.sigmoid(wide)
        silu = wide * sigmoid
        for_gate = outer * wide_up * (sigmoid + silu * (1 - sigmoid))
        return cast_by_torch(torch.cat((for_gate, outer * silu), 1), kind), cast_by_torch(silu * wide_up, E4M3)
    inner, products = empty_rows(gate, count, 2 * width, kind), empty_rows(gate, count, width, E4M3)
    block, warps = PIECE
    options = {"LARGEST": torch.finfo(kind).max, "PRODUCTS_LARGEST": torch.finfo(E4M3).max, "num_warps": warps}
    options |= {"BLOCK": min(power_above(width), block)}
    given = gate.contiguous(), up.contiguous(), gradient.contiguous()
    launch(swiglu_backward_kernel, (count,), *given, *inner, *products, width, **options)
    return inner, products


# -----------------------------------------------------------------------------
# Transposes


def transposed(values: torch.Tensor, factors: Sequence[torch.Tensor] = (), most: torch.Tensor | None = None):
    """`values` (S, K) in fp8 to (K, S made a multiple of 16 by zeros); with `factors`, one or two of (S, 1), each row
    times their product over `most`, a scalar."""
    count, width = values.shape
    padded = -(-count // ALIGNED) * ALIGNED
    if not on_triton(values):
        if factors:
            values = (values.float() * factors[0] * (factors[1] if len(factors) > 1 else 1.0) / most).to(values.dtype)
        done = torch.zeros(width, padded, dtype=values.dtype, device=values.device)
        done[:, :count] = values.T
        return done
    target = torch.empty(width, padded, dtype=values.dtype, device=values.device)
    source, (rows, columns, warps) = values.view(torch.uint8), TILE
    scales, most = [*factors, source, source][:2], source if most is None else most
    options = {"KIND": NAMES[values.dtype], "SCALED": len(factors) > 0, "TWICE": len(factors) > 1}
    options |= {"ROWS": rows, "COLUMNS": columns, "num_warps": warps}
    grid = -(-padded // rows), -(-width // columns)
    launch(transpose_kernel, grid, source, target.view(torch.uint8), *scales, most, count, width, padded, **options)
    return target


# -----------------------------------------------------------------------------
# Products


def product(
    left: torch.Tensor,
    right: torch.Tensor,
    left_scale: torch.Tensor,
    right_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    quick: bool = True,
) -> torch.Tensor:
    """`left` (S, K) @ `right` (N, K).T in bf16, times their scales: (S, 1) and (1, N), or scalars both; plus `bias`
    (N,). `quick` sums up in the tensor cores alone, which keep some 14 bits; else fp32 takes over every 128 terms."""
    if left.is_cuda:
        # As torch 2.11 has it (ScaledBlas.cpp, CUDABlas.cpp): the first operand dense by rows, the second by columns,
        # N and K multiples of 16, S any number; scales in fp32, dense, of rows (S, 1) and (1, N) both or of one number
        # both; a bias in bf16. From CUDA 12.9 on all of that goes to cuBLAS on Hopper, where scales of rows are as
        # good as free and both ways to sum are had; elsewhere rows' go to a kernel of torch's own.
        options = {"bias": bias, "out_dtype": torch.bfloat16, "use_fast_accum": quick}
        return torch._scaled_mm(left, right.T, scale_a=left_scale, scale_b=right_scale, **options)
    done = (left.float() @ right.float().T) * left_scale * right_scale
    return (done if bias is None else done + bias.float()).to(torch.bfloat16)


class Weights:
    """Weights (N, K) that take the same rows, one below the other in fp8, with a scale for each row.

    Transposed, with one scale in all, they are made each time that they are asked for, which a layer's tokens outweigh
    by far; kept they would be a second byte of each weight.
    """

    def __init__(self, weights: Sequence[torch.Tensor]):
        self.sizes = [len(weight) for weight in weights]
        self.rows = empty_rows(weights[0], sum(self.sizes), weights[0].shape[1], E4M3)
        for weight, *into in zip(weights, *(part.split(self.sizes) for part in self.rows)):
            cast(weight, into=Rows(*into))

    def forward(self, rows: Rows, biases: Sequence[torch.Tensor | None], quick: bool = True) -> list[torch.Tensor]:
        """`rows` (S, K) times each weight, (S, N) each in bf16, plus its bias (N,)."""
        return [
            product(rows.values, values, rows.scales, scales.view(1, -1), bias, quick)
            for values, scales, bias in zip(*(part.split(self.sizes) for part in self.rows), biases)
        ]

    @cached_property
    def largest(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest of all scales, a scalar, and so many of it as a product over the weights asks for (1, K)."""
        most = self.rows.scales.amax()
        # A scale for each row again: torch takes both sides' by row or neither's.
        return most, most.expand(1, self.rows.values.shape[1]).contiguous()

    def for_input(self, gradient: Rows, quick: bool = True) -> torch.Tensor:
        """`gradient` (S, N of all) times the weights, (S, K): the sum over all of them in one product."""
        most, scales = self.largest
        across = transposed(self.rows.values, [self.rows.scales], most)
        return product(gradient.values, across, gradient.scales, scales, quick=quick)


@lru_cache
def one_on(device: torch.device) -> torch.Tensor:
    """A scale of one; kept, since Python takes as long to make it as to launch a product."""
    with torch.inference_mode(False):
        return torch.ones((), dtype=torch.float32, device=device)


def for_weight(gradient: Rows, rows: Rows, quick: bool = True) -> torch.Tensor:
    """`gradient` (S, N).T times `rows` (S, K), (N, K) in bf16."""
    most = (gradient.scales * rows.scales).amax()
    across = transposed(gradient.values, [gradient.scales, rows.scales], most)
    return product(across, transposed(rows.values), most, one_on(most.device), quick=quick)
