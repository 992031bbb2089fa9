"""Work on rows, each function one kernel and one pass over memory.

    normed = rms_norm(hidden, weight, epsilon)
    inner = swiglu(gate_and_up)
    tokens = likeliest(logits)

Without gradients, for reading and writing; training has its own (families/elementwise.py). In half precision on a GPU
by Triton, elsewhere by torch. Shapes: S rows, H and I their widths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.early import PLAIN, once, way_that_agrees
from kernels.launching import launch, power_above
from kernels.product_parts import arrived, is_last


@triton.jit
def norm_kernel(source, weight, target, width, epsilon, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    inside = place < width
    wide = tl.load(source + row * width + place, mask=inside, other=0.0).to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + epsilon)
    scale = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    # Rounded before it meets the weight, as the model's own norm is; a weight in fp32 is met as it is.
    normed = wide.to(weight.dtype.element_ty).to(tl.float32) * scale
    tl.store(target + row * width + place, normed.to(target.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_kernel(source, target, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    gate = tl.load(source + row * 2 * width + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + row * 2 * width + width + place, mask=inside, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(target.dtype.element_ty).to(tl.float32)
    tl.store(target + row * width + place, (silu * up).to(target.dtype.element_ty), mask=inside)


@triton.jit
def embed_kernel(
    tokens, places, table, cos, sin, target, squares, cos_rows, sin_rows, width, angles,
    WIDTH: tl.constexpr, ANGLES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    place, turn = tl.arange(0, WIDTH), tl.arange(0, ANGLES)
    inside, known = place < width, turn < angles
    token, position = tl.load(tokens + row).to(tl.int64), tl.load(places + row).to(tl.int64)
    states = tl.load(table + token * width + place, mask=inside, other=0.0)
    cosine = tl.load(cos + position * angles + turn, mask=known)
    sine = tl.load(sin + position * angles + turn, mask=known)
    wide = states.to(tl.float32)
    tl.store(target + row * width + place, states, mask=inside)
    tl.store(squares + row, tl.sum(wide * wide, 0))
    tl.store(cos_rows + row * angles + turn, cosine, mask=known)
    tl.store(sin_rows + row * angles + turn, sine, mask=known)


@triton.jit
def likeliest_kernel(
    logits, tops, places, target, arrived, width, MANY: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr
):
    """One of MANY parts of a row; the program that ends last looks at what all parts of the row have left."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = part * BLOCK + tl.arange(0, BLOCK)
    scores = tl.load(logits + row * width + place, mask=place < width, other=float("-inf")).to(tl.float32)
    # What is no number is the largest, as torch has it.
    scores = tl.where(scores == scores, scores, float("inf"))
    top, index = tl.max(scores, 0, return_indices=True)
    tl.store(tops + row * MANY + part, top)
    if not is_last(places + row * MANY + part, part * BLOCK + index, arrived + row, MANY):
        return
    each = tl.arange(0, POWER)
    inside = each < MANY
    # Not out of this processor's own cache, which knows nothing of what the others have written.
    top = tl.load(tops + row * MANY + each, mask=inside, other=float("-inf"), cache_modifier=".cg")
    index = tl.load(places + row * MANY + each, mask=inside, other=width, cache_modifier=".cg")
    # Of several that are as likely the first one.
    tl.store(target + row, tl.min(tl.where(top == tl.max(top, 0), index, width), 0).to(tl.int64))


def on_triton(states: torch.Tensor) -> bool:
    """Whether a kernel takes these states: half precision on a GPU, or under TRITON_INTERPRET=1."""
    interpreted = not isinstance(norm_kernel, triton.JITFunction)
    return states.element_size() == 2 and (states.is_cuda or interpreted)


def norm_by_kernel(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    target = torch.empty_like(hidden)
    rows, width = hidden.shape
    launch(norm_kernel, (rows,), hidden, weight, target, width, epsilon, WIDTH=power_above(width))
    return target


def swiglu_by_kernel(gate_and_up: torch.Tensor) -> torch.Tensor:
    rows, width = len(gate_and_up), gate_and_up.shape[1] // 2
    target = gate_and_up.new_empty(rows, width)
    swiglu_kernel[(rows, triton.cdiv(width, 2048))](gate_and_up, target, width, BLOCK=2048)
    return target


@once
def proved(name: str, width: int, dtype: torch.dtype, device: torch.device, weights: torch.dtype | None = None) -> str:
    """Whether the kernel called `name` gives for rows of `width` what torch gives, in fp32, up to rounding; with norms
    whose weights are of another precision."""
    draw = torch.Generator(device).manual_seed(0)
    rows, weight = (torch.randn(shape, generator=draw, device=device).to(dtype) for shape in ((5, width), (width,)))
    if name == "norm":
        weight = weight.to(weights or dtype)
        wanted = rms_norm(rows.float(), weight.float(), 1e-6)
        return way_that_agrees(name, {PLAIN: lambda: (norm_by_kernel(rows, weight, 1e-6),)}, (wanted,))
    return way_that_agrees(name, {PLAIN: lambda: (swiglu_by_kernel(rows),)}, (swiglu(rows.float()),))


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`hidden` (S, H) over its root mean square, times `weight` (H,) (Zhang and Sennrich 2019); (S, H). With a
    weight in fp32 it rounds once, at the end: norms whose weight is kept less one are such (Qwen3.5)."""
    if on_triton(hidden) and proved("norm", hidden.shape[1], hidden.dtype, hidden.device, weight.dtype):
        return norm_by_kernel(hidden, weight, epsilon)
    wide = hidden.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (weight * wide.to(weight.dtype)).to(hidden.dtype)


def swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020) of both side by side (S, 2I); (S, I)."""
    if on_triton(gate_and_up) and proved("swiglu", gate_and_up.shape[1], gate_and_up.dtype, gate_and_up.device):
        return swiglu_by_kernel(gate_and_up)
    gate, up = gate_and_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def embed(
    tokens: torch.Tensor, places: torch.Tensor, table: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a step begins with: rows (S, H) of `table` (V, H) by `tokens` (S,), the sums of their squares (S, 1), and
    rows (S, D) of `cos` and of `sin` (places, D) by `places` (S,)."""
    kinds = (table.shape[1], cos.shape[1], table.dtype, cos.dtype, table.device)
    way = embed_by_kernel if on_triton(table) and embed_proved(*kinds) else embed_by_torch
    return way(tokens, places, table, cos, sin)


@once
def embed_proved(width: int, turns: int, dtype: torch.dtype, angles: torch.dtype, device: torch.device) -> str:
    """Whether the kernel gives for rows of `width`, and `turns` angles, what torch gives."""
    draw = torch.Generator(device).manual_seed(0)
    table = torch.randn(7, width, generator=draw, device=device).to(dtype)
    cos, sin = torch.randn(2, 9, turns, generator=draw, device=device).to(angles)
    asked = torch.tensor([6, 0, 3], device=device), torch.tensor([8, 2, 0], device=device), table, cos, sin
    return way_that_agrees("embedding", {PLAIN: lambda: embed_by_kernel(*asked)}, embed_by_torch(*asked))


def embed_by_torch(
    tokens: torch.Tensor, places: torch.Tensor, table: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = table.index_select(0, tokens)
    angles = (part.index_select(0, places) for part in (cos, sin))
    return hidden, hidden.float().square().sum(-1, keepdim=True), *angles


def embed_by_kernel(
    tokens: torch.Tensor, places: torch.Tensor, table: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, width = len(tokens), table.shape[1]
    hidden, squares = table.new_empty(rows, width), table.new_empty(rows, 1, dtype=torch.float32)
    found = cos.new_empty(rows, cos.shape[1]), sin.new_empty(rows, sin.shape[1])
    sizes = {"WIDTH": triton.next_power_of_2(width), "ANGLES": triton.next_power_of_2(cos.shape[1])}
    embed_kernel[(rows,)](tokens, places, table, cos, sin, hidden, squares, *found, width, cos.shape[1], **sizes)
    return hidden, squares, *found


LIKELIEST = 8192  # logits that one program looks at


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The place of the largest of each row of `logits` (S, V), of several the first one; (S,)."""
    if on_triton(logits) and likeliest_proved(logits.shape[1], logits.dtype, logits.device):
        return likeliest_by_kernel(logits)
    return logits.argmax(-1)


@once
def likeliest_proved(width: int, dtype: torch.dtype, device: torch.device) -> str:
    """Whether the kernel finds what stands largest in rows of `width`, twice in one of them."""
    draw = torch.Generator(device).manual_seed(0)
    logits = torch.randn(5, width, generator=draw, device=device).to(dtype)
    wanted = torch.tensor([0, width - 1, width // 2, width // 3, 1], device=device)
    logits[torch.arange(5, device=device), wanted] = 9
    logits[3, width // 2 :] = 9
    return way_that_agrees("likeliest", {PLAIN: lambda: (likeliest_by_kernel(logits) - wanted + 1,)}, (wanted * 0 + 1,))


def likeliest_by_kernel(logits: torch.Tensor) -> torch.Tensor:
    (rows, width), parts = logits.shape, triton.cdiv(logits.shape[1], LIKELIEST)
    tops = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    places, target = torch.empty_like(tops, dtype=torch.int32), tops.new_empty(rows, dtype=torch.int64)
    given, power = (logits, tops, places, target, arrived(logits.device), width), triton.next_power_of_2(parts)
    likeliest_kernel[(rows, parts)](*given, MANY=parts, POWER=power, BLOCK=LIKELIEST, num_warps=8)
    return target
