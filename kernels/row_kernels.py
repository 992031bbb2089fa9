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

from kernels.early import EARLY, PLAIN, early, follow, once, way_that_agrees
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
    history, places, shifts, table, cos, sin, norm, target, squares, scaled, cos_rows, sin_rows,
    capacity, width, angles,
    NEW: tl.constexpr, WIDTH: tl.constexpr, ANGLES: tl.constexpr, SCALED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One of NEW tokens of a slot."""
    row = tl.program_id(0)
    slot, number = row // NEW, row % NEW
    column, turn = tl.arange(0, WIDTH), tl.arange(0, ANGLES)
    inside, known = column < width, turn < angles
    if SCALED:
        scale = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
    follow(EARLY)
    place = tl.load(places + slot) + number
    token = tl.load(history + slot.to(tl.int64) * capacity + tl.minimum(place, capacity - 1))
    position = place + tl.load(shifts + slot)
    states = tl.load(table + token * width + column, mask=inside, other=0.0)
    cosine = tl.load(cos + position * angles + turn, mask=known)
    sine = tl.load(sin + position * angles + turn, mask=known)
    wide = states.to(tl.float32)
    tl.store(target + row * width + column, states, mask=inside)
    tl.store(squares + row, tl.sum(wide * wide, 0))
    if SCALED:
        tl.store(scaled + row * width + column, (wide * scale).to(states.dtype), mask=inside)
    tl.store(cos_rows + row * angles + turn, cosine, mask=known)
    tl.store(sin_rows + row * angles + turn, sine, mask=known)


@triton.jit
def likeliest_kernel(
    logits, tops, indices, target, places, live, arrived, width, capacity,
    MANY: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr, TAKEN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One of MANY parts of a row; the program that ends last looks at what all parts of the row have left. What is
    TAKEN goes into the history `target` behind the row's place, which moves on where the slot is `live`."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = part * BLOCK + tl.arange(0, BLOCK)
    follow(EARLY)
    scores = tl.load(logits + row * width + index, mask=index < width, other=float("-inf")).to(tl.float32)
    # What is no number is the largest, as torch has it.
    scores = tl.where(scores == scores, scores, float("inf"))
    top, index = tl.max(scores, 0, return_indices=True)
    tl.store(tops + row * MANY + part, top)
    if not is_last(indices + row * MANY + part, part * BLOCK + index, arrived + row, MANY):
        return
    each = tl.arange(0, POWER)
    inside = each < MANY
    # Not out of this processor's own cache, which knows nothing of what the others have written.
    top = tl.load(tops + row * MANY + each, mask=inside, other=float("-inf"), cache_modifier=".cg")
    index = tl.load(indices + row * MANY + each, mask=inside, other=width, cache_modifier=".cg")
    # Of several that are as likely the first one.
    chosen = tl.min(tl.where(top == tl.max(top, 0), index, width), 0).to(tl.int64)
    if TAKEN:
        place = tl.load(places + row)
        tl.store(target + row * capacity + place + 1, chosen)
        tl.store(places + row, place + tl.load(live + row))
    else:
        tl.store(target + row, chosen)


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
    history: torch.Tensor,
    places: torch.Tensor,
    shifts: torch.Tensor,
    table: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    new: int = 1,
    norm: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """What a step begins with: the `new` tokens of each slot from `places` (S,) on in `history` (S, C), as rows (R, H)
    of `table` (V, H), the sums of their squares (R, 1), the rows times the weight `norm` (H,) where there is one, and
    rows (R, D) of `cos` and of `sin` (places, D) by their places and `shifts` (S,)."""
    weights = None if norm is None else norm.dtype
    kinds = (table.shape[1], cos.shape[1], table.dtype, cos.dtype, table.device, new, weights)
    given = (history, places, shifts, table, cos, sin, new, norm)
    if on_triton(table) and (way := embed_proved(*kinds)):
        return embed_by_kernel(*given, begins=way == EARLY)
    return embed_by_torch(*given)


@once
def embed_proved(
    width: int, turns: int, dtype: torch.dtype, angles: torch.dtype, device: torch.device, new: int,
    weights: torch.dtype | None,
) -> str:  # fmt: skip
    """How the kernel is launched that gives for rows of `width`, and `turns` angles, what torch gives."""
    draw = torch.Generator(device).manual_seed(0)
    table = torch.randn(7, width, generator=draw, device=device).to(dtype)
    cos, sin = torch.randn(2, 29, turns, generator=draw, device=device).to(angles)
    history = torch.randint(0, 7, (3, 16), generator=draw, device=device)
    norm = weights and torch.randn(width, generator=draw, device=device).to(weights)
    places, shifts = torch.tensor([6, 0, 3], device=device), torch.tensor([5, 0, 2], device=device)
    asked = history, places, shifts, table, cos, sin, new, norm
    # None where nothing is scaled.
    wanted = [part for part in embed_by_torch(*asked) if part is not None]

    def by(begins: bool) -> list[torch.Tensor]:
        return [part for part in embed_by_kernel(*asked, begins=begins) if part is not None]

    ways = {EARLY: lambda: by(True)} if early(device) else {}
    return way_that_agrees("embedding", ways | {PLAIN: lambda: by(False)}, wanted)


def embed_by_torch(history, places, shifts, table, cos, sin, new, norm):
    """`embed` by torch's own functions."""
    every = places[:, None] + torch.arange(new, device=places.device)
    hidden = table.index_select(0, history.gather(1, every.clamp(max=history.shape[1] - 1)).flatten())
    positions = (every + shifts[:, None]).flatten()
    scaled = None if norm is None else (hidden.float() * norm).to(hidden.dtype)
    squares = hidden.float().square().sum(-1, keepdim=True)
    return hidden, squares, scaled, *(part.index_select(0, positions) for part in (cos, sin))


def embed_by_kernel(history, places, shifts, table, cos, sin, new, norm, begins):
    """`embed` by a kernel that `begins` before the one before it has ended."""
    rows, width = len(history) * new, table.shape[1]
    hidden, squares = table.new_empty(rows, width), table.new_empty(rows, 1, dtype=torch.float32)
    scaled = None if norm is None else torch.empty_like(hidden)
    found = cos.new_empty(rows, cos.shape[1]), sin.new_empty(rows, sin.shape[1])
    embed_kernel[(rows,)](
        history, places, shifts, table, cos, sin, table if norm is None else norm, hidden, squares,
        hidden if scaled is None else scaled, *found, history.shape[1], width, cos.shape[1],
        NEW=new, WIDTH=triton.next_power_of_2(width), ANGLES=triton.next_power_of_2(cos.shape[1]),
        SCALED=norm is not None, EARLY=begins, **({"launch_pdl": True} if begins else {}),
    )  # fmt: skip
    return hidden, squares, scaled, *found


LIKELIEST = 8192  # logits that one program looks at


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The place of the largest of each row of `logits` (S, V), of several the first one; (S,)."""
    if on_triton(logits) and (way := likeliest_proved(logits.shape[1], logits.dtype, logits.device)):
        return likeliest_by_kernel(logits, way == EARLY)
    return logits.argmax(-1)


def take_likeliest(logits: torch.Tensor, history: torch.Tensor, places: torch.Tensor, live: torch.Tensor) -> None:
    """The same into `history` (S, C) behind `places` (S,), which move on by `live` (S,)."""
    if on_triton(logits) and (way := likeliest_proved(logits.shape[1], logits.dtype, logits.device)):
        likeliest_by_kernel(logits, way == EARLY, history, places, live)
    else:
        history.scatter_(1, places[:, None] + 1, logits.argmax(-1)[:, None])
        places += live


@once
def likeliest_proved(width: int, dtype: torch.dtype, device: torch.device) -> str:
    """How the kernel is launched that finds what stands largest in rows of `width`, twice in one of them, both as it is
    returned and as it is taken."""
    draw = torch.Generator(device).manual_seed(0)
    logits = torch.randn(5, width, generator=draw, device=device).to(dtype)
    wanted = torch.tensor([0, width - 1, width // 2, width // 3, 1], device=device)
    logits[torch.arange(5, device=device), wanted] = 9
    logits[3, width // 2 :] = 9
    before, live = torch.tensor([0, 3, 1, 2, 0], device=device), torch.tensor([1, 0, 1, 1, 1], device=device)

    def by(begins: bool) -> tuple[torch.Tensor, ...]:
        history, places = torch.zeros(5, 16, dtype=torch.long, device=device), before.clone()
        likeliest_by_kernel(logits, begins, history, places, live)
        taken = history.gather(1, before[:, None] + 1)[:, 0]
        # Each is one where it is right.
        found = likeliest_by_kernel(logits, begins) - wanted, taken - wanted, places - before - live
        return (*(1 + part for part in found), 1 + (history.count_nonzero(1) > 1).long())

    ways = {EARLY: lambda: by(True)} if early(device) else {}
    return way_that_agrees("likeliest", ways | {PLAIN: lambda: by(False)}, (torch.ones(5, device=device),) * 4)


def likeliest_by_kernel(
    logits: torch.Tensor,
    begins: bool,
    history: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    live: torch.Tensor | None = None,
) -> torch.Tensor:
    """`likeliest`, or with a `history` `take_likeliest`, by a kernel that `begins` before the one before has ended."""
    (rows, width), parts = logits.shape, triton.cdiv(logits.shape[1], LIKELIEST)
    tops = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    indices, taken = torch.empty_like(tops, dtype=torch.int32), history is not None
    target = history if taken else tops.new_empty(rows, dtype=torch.int64)
    capacity = history.shape[1] if taken else 16  # one of a slot's, so that it is no other kernel
    likeliest_kernel[(rows, parts)](
        logits, tops, indices, target, places if taken else target, live if taken else target, arrived(logits.device),
        width, capacity, MANY=parts, POWER=triton.next_power_of_2(parts), BLOCK=LIKELIEST, TAKEN=taken,
        EARLY=begins, num_warps=8, **({"launch_pdl": True} if begins else {}),
    )  # fmt: skip
    return target
