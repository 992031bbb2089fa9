"""Attention of a few new tokens over what stands in each slot of a static cache, rotary positions and storing included.

    attended = attend_slots(qkv, cos, sin, keys, values, places, heads, scale)

Each slot holds one answer; its new tokens see all that stands before them and themselves. On a GPU in half precision
one or two kernels do it for any lengths (FlashDecoding: Dao, Haziza, Massa, Sizov 2023), which a CUDA graph can hold
since lengths are read on the GPU; elsewhere torch's SDPA.

Shapes: S slots, each with Q new tokens (R = S x Q rows), C places a slot; D the width of a head, the first of which
are turned, an even number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.early import EARLY, PLAIN, early, follow, once, way_that_agrees
from kernels.row_kernels import on_triton, rms_norm

# Keys that are looked at together, warps and stages, by the most parts that a slot's keys are cut into: on an H100 the
# fastest at 64, 32 and 8 slots (write_speed.py --tune).
SHAPES = {1: (64, 8, 4), 2: (64, 8, 3), 32: (64, 4, 3)}  # in this order
WIDE = (64, 8, 2)  # of heads wider than 128; nobody has measured them
PROOF_PLACES = 1_024  # of each slot on which the kernels are tried
# Parts of one slot's keys, each by a program of its own; as many as keep an H100 busy (write_speed.py --tune). A single
# one needs no kernel that joins them.
MOST_PARTS, PROGRAMS = 32, 128


class Extras(NamedTuple):
    """What some architectures do to each head: queries and keys over their root mean square, times the weights (D,) of
    `norms`, before they are turned; what was attended times the sigmoid of a gate, which then stands behind each
    query in `qkv` (`gated`)."""

    norms: tuple[torch.Tensor, torch.Tensor] | None = None
    epsilon: float = 0.0
    gated: bool = False


NO_EXTRAS = Extras()


def attend_slots(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    heads: int,
    scale: float,
    extras: Extras = NO_EXTRAS,
) -> torch.Tensor:
    """`qkv` (R, (heads + 2 x fewer) x D), `cos` and `sin` (R, D or what of it is turned), the cache's `keys` and
    `values` (S, fewer, C, D), which get the new ones at `places` (S,) and the Q - 1 places after. With a gate queries
    are twice as wide in `qkv`. Returns (R, heads x D)."""
    width, given = keys.shape[-1], (qkv, cos, sin, keys, values, places, heads, scale)
    if on_triton(qkv) and width in (16, 32, 64, 128, 256):
        new, fewer = len(qkv) // len(keys), keys.shape[1]
        norm = extras.norms and extras.norms[0].dtype
        kinds = (cos.shape[-1], norm, extras.gated, qkv.dtype, qkv.device)
        if way := way_of(len(keys), heads, fewer, width, new, *kinds):
            return attend_in_parts(*given, begins=way == EARLY, extras=extras)
    return attend_plain(*given, extras)


def most_of(parts: int) -> int:
    """The key in SHAPES for so many parts."""
    return next(most for most in SHAPES if parts <= most)


def shape_of(parts: int, width: int) -> tuple[int, int, int]:
    return WIDE if width > 128 else SHAPES[most_of(parts)]


@once
def way_of(
    slots: int, heads: int, fewer: int, width: int, new: int,
    turns: int, norm: torch.dtype | None, gated: bool, dtype: torch.dtype, device: torch.device,
) -> str:  # fmt: skip
    """How the kernels are launched for these shapes, of which `turns` of `width` are turned and weights of the heads'
    norms are `norm`: by proof on random states, whose slots are of all lengths."""
    draw, capacity = torch.Generator(device).manual_seed(0), PROOF_PLACES

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, device=device).to(dtype)

    states = some(2, slots, fewer, capacity, width)
    qkv, angles = some(slots * new, (heads * (1 + gated) + 2 * fewer) * width), some(slots * new, turns // 2).float()
    cos, sin = (torch.cat((part, part), -1).to(dtype) for part in (angles.cos(), angles.sin()))
    places = torch.randint(0, capacity - new, (slots,), generator=draw, device=device)
    norms = norm and tuple(some(width).to(norm) for _ in range(2))
    wide, options = states.float(), {"places": places, "heads": heads, "scale": width**-0.5}
    options["extras"] = Extras(norms, 1e-6, gated)
    widely = {**options, "extras": Extras(norms and tuple(part.float() for part in norms), 1e-6, gated)}
    wanted = attend_plain(qkv.float(), cos.float(), sin.float(), *wide, **widely)

    def by(begins: bool) -> tuple[torch.Tensor, ...]:
        mine = states.clone()
        # Old keys are read while the kernel before still runs, which in a step is never one that has written them.
        mine.new_zeros(1)
        done = attend_in_parts(qkv, cos, sin, *mine, **options, begins=begins)
        return done, mine - states

    ways = {EARLY: lambda: by(True)} if early(device) else {}
    ways |= {PLAIN: lambda: by(False)}
    changed = wide - states.float()  # what was stored: a missing one hides among all that was there
    return way_that_agrees("attention over slots", ways, (wanted, changed))


def attend_plain(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    heads: int,
    scale: float,
    extras: Extras = NO_EXTRAS,
) -> torch.Tensor:
    """`attend_slots` by torch's own functions."""
    slots, fewer, _, width = keys.shape
    new = len(qkv) // slots
    query, key, value, gate = split_heads(qkv.view(slots, new, -1), heads, fewer, width, extras)
    cos, sin = (part.view(slots, new, 1, -1) for part in (cos, sin))
    rows = places[:, None] + torch.arange(new, device=places.device)  # (S, Q)
    slot = torch.arange(slots, device=places.device)[:, None]
    keys[slot, :, rows] = turned(key, cos, sin)
    values[slot, :, rows] = value
    # A GPU would wait for the longest place; one that has no kernels looks at all of them.
    length = keys.shape[2] if keys.is_cuda else int(rows.max()) + 1
    seen = torch.arange(length, device=places.device) <= rows[:, None, :, None]
    done = torch.nn.functional.scaled_dot_product_attention(
        turned(query, cos, sin).transpose(1, 2), keys[:, :, :length], values[:, :, :length],
        attn_mask=seen, scale=scale, enable_gqa=True,
    )  # fmt: skip
    done = done.transpose(1, 2)
    return (done if gate is None else done * torch.sigmoid(gate)).reshape(len(qkv), -1)


def split_heads(
    qkv: torch.Tensor, heads: int, fewer: int, width: int, extras: Extras
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Queries and keys, normed where they are, values, and the gate or None, each (..., heads or fewer, D)."""
    across = heads * (1 + extras.gated)
    query, key, value = qkv.unflatten(-1, (-1, width)).split((across, fewer, fewer), dim=-2)
    gate = None
    if extras.gated:
        query, gate = query.unflatten(-2, (heads, 2)).unbind(-2)
    if extras.norms:
        query, key = (
            rms_norm(part.reshape(-1, width), norm, extras.epsilon).view(part.shape)
            for part, norm in zip((query, key), extras.norms)
        )
    return query, key, value, gate


def turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (RoPE, Su et al. 2021): the two halves of the last dimension, or of as much of it as `cos` and
    `sin` are wide, turned against each other."""
    states, rest = states.tensor_split((cos.shape[-1],), dim=-1)
    first, second = states.chunk(2, dim=-1)
    done = states * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((done, rest), dim=-1) if rest.shape[-1] else done


@triton.jit
def states_at(source, cos, sin, row, known, WIDTH: tl.constexpr, TURNS: tl.constexpr):
    """The states at `source` (rows,), pointers, those that each is turned against, and cos and sin of each `row`, all
    (rows, D)."""
    wide = tl.arange(0, WIDTH)
    turns = known[:, None] & (wide < TURNS)[None, :]
    angles = row[:, None] * TURNS + wide[None, :]
    cosine = tl.load(cos + angles, mask=turns, other=1.0)
    sine = tl.load(sin + angles, mask=turns, other=0.0)
    states = tl.load(source[:, None] + wide[None, :], mask=known[:, None], other=0.0)
    other = tl.where(wide < TURNS, (wide + TURNS // 2) % TURNS, wide)
    halves = tl.load(source[:, None] + other[None, :], mask=known[:, None], other=0.0)
    return states, halves, cosine, sine


@triton.jit
def turned_rows(found, norm, epsilon, WIDTH: tl.constexpr, TURNS: tl.constexpr, NORMED: tl.constexpr):
    """What was `found` by states_at, over its root mean square where it is NORMED, the first TURNS of it turned by its
    angles, in fp32 (rows, D)."""
    states, halves, cosine, sine = found
    given: tl.constexpr = states.dtype
    states, halves = states.to(tl.float32), halves.to(tl.float32)
    wide = tl.arange(0, WIDTH)
    if NORMED:
        # Rounded as row_kernels.norm_kernel does, before and after it meets the weight.
        other = tl.where(wide < TURNS, (wide + TURNS // 2) % TURNS, wide)
        inverse = tl.rsqrt(tl.sum(states * states, 1) / WIDTH + epsilon)[:, None]
        kind: tl.constexpr = norm.dtype.element_ty
        states = (states * inverse).to(kind).to(tl.float32) * tl.load(norm + wide)[None, :].to(tl.float32)
        halves = (halves * inverse).to(kind).to(tl.float32) * tl.load(norm + other)[None, :].to(tl.float32)
        states, halves = states.to(given).to(tl.float32), halves.to(given).to(tl.float32)
    signs = tl.where(wide < TURNS // 2, -1.0, 1.0)[None, :]
    return states * cosine.to(tl.float32) + halves * signs * sine.to(tl.float32)


@triton.jit
def gate_with(done, gate, kind: tl.constexpr):
    """`done` times the sigmoid of `gate`, rounded as torch's own functions round it."""
    return done.to(kind).to(tl.float32) * tl.sigmoid(gate.to(tl.float32)).to(kind).to(tl.float32)


@triton.jit
def seen(scores, value, found):
    """What queries have `found` so far, (ROWS, D) times the sum of their weights, that sum, and by which score they
    are, and the `scores` (ROWS, K) and `value` (K, D) of more places; minus infinity is one that is not seen."""
    done, weights, top = found
    higher = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen nothing yet: minus infinity less itself is no number.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    chances, fade = tl.exp(scores - base[:, None]), tl.exp(top - base)
    weights = weights * fade + tl.sum(chances, 1)
    return done * fade[:, None] + tl.dot(chances.to(value.dtype), value), weights, higher


@triton.jit
def nothing(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """What queries have found that have seen nothing."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    return tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS,), tl.float32), top


@triton.jit
def queries_of(slot, head, shared, NEW: tl.constexpr, LANES: tl.constexpr):
    """Of LANES lanes which are queries, in which row and of which head each is: all new tokens, and of each all the
    `shared` heads that share a head of keys."""
    lane = tl.arange(0, LANES)
    return lane < NEW * shared, slot * NEW + lane // shared, head * shared + lane % shared


@triton.jit
def gates_at(qkv, row, of_head, known, HEADS: tl.constexpr, FEWER: tl.constexpr, WIDTH: tl.constexpr):
    """The gate behind each query: a row has each query and its gate, all heads of it, then keys and values."""
    at = qkv + row * ((HEADS * 2 + 2 * FEWER) * WIDTH) + of_head * (WIDTH * 2) + WIDTH
    return tl.load(at[:, None] + tl.arange(0, WIDTH)[None, :], mask=known[:, None], other=0.0)


@triton.jit
def leave(sums, tops, partial, out, known, found, WIDTH: tl.constexpr):
    """What one part has `found` for the queries at `out` (LANES,): (R, heads, parts) and (R, heads, parts, D)."""
    done, weights, top = found
    tl.store(tops + out, top, mask=known)
    tl.store(sums + out, weights, mask=known)
    tl.store(partial + out[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], done, mask=known[:, None])


@triton.jit
def newest(
    qkv, cos, sin, keys, values, at, scale, query_norm, key_norm, epsilon,
    HEADS: tl.constexpr, FEWER: tl.constexpr, NEW: tl.constexpr, WIDTH: tl.constexpr,
    TURNS: tl.constexpr, NORMED: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, NEW_ROWS: tl.constexpr,
):  # fmt: skip
    """The queries (ROWS, D) of a slot and head of keys, and what they find in those of the new tokens that are in this
    part, which are stored."""
    slot, head, place, begin, end = at
    apart: tl.constexpr = 2 if GATED else 1
    line: tl.constexpr = (HEADS * apart + 2 * FEWER) * WIDTH
    wide, fresh = tl.arange(0, WIDTH), tl.arange(0, NEW_ROWS)
    known, row, of_head = queries_of(slot, head, HEADS // FEWER, NEW, ROWS)
    # All that the kernel before has left is asked for at once: queries, and new keys and values of this part.
    asked = states_at(qkv + row * line + of_head * (WIDTH * apart), cos, sin, row, known, WIDTH, TURNS)
    mine = (fresh < NEW) & (place + fresh >= begin) & (place + fresh < end)
    source = qkv + (slot * NEW + fresh) * line + (HEADS * apart + head) * WIDTH
    made = states_at(source, cos, sin, slot * NEW + fresh, mine, WIDTH, TURNS)
    value = tl.load(source[:, None] + FEWER * WIDTH + wide[None, :], mask=mine[:, None], other=0.0)
    query = turned_rows(asked, query_norm, epsilon, WIDTH, TURNS, NORMED).to(qkv.dtype.element_ty)
    found = nothing(ROWS, WIDTH)
    if end > place:
        key = turned_rows(made, key_norm, epsilon, WIDTH, TURNS, NORMED).to(keys.dtype.element_ty)
        stored = (place + fresh)[:, None] * WIDTH + wide[None, :]
        tl.store(keys + stored, key, mask=mine[:, None])
        tl.store(values + stored, value, mask=mine[:, None])
        inside = mine[None, :] & (fresh[None, :] <= (row - slot * NEW)[:, None])
        scores = tl.where(inside, tl.dot(query, tl.trans(key)) * scale, float("-inf"))
        found = seen(scores, value, found)
    return query, found


@triton.jit
def attend_kernel(
    qkv, cos, sin, keys, values, places, sums, tops, partial, target, capacity, scale,
    query_norm, key_norm, epsilon,
    HEADS: tl.constexpr, FEWER: tl.constexpr, NEW: tl.constexpr, WIDTH: tl.constexpr,
    TURNS: tl.constexpr, NORMED: tl.constexpr, GATED: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, NEW_ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One of PARTS parts of the keys of one slot and one head of keys, for all NEW x (HEADS / FEWER) queries that share
    it. What was attended goes to `target` where the part is the whole."""
    slot, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Moved on at the end of the step before: there already.
    place = tl.load(places + slot).to(tl.int32)
    chunk = tl.cdiv(tl.cdiv(place + NEW, PARTS), 16) * 16
    begin = part * chunk
    end = tl.minimum(begin + chunk, place + NEW)
    old, at = tl.minimum(end, place), (slot, head, place, begin, end)
    wide, group = tl.arange(0, WIDTH), slot * FEWER + head
    keys += group.to(tl.int64) * capacity * WIDTH
    values += group.to(tl.int64) * capacity * WIDTH
    query, found = tl.zeros((ROWS, WIDTH), qkv.dtype.element_ty), nothing(ROWS, WIDTH)
    for start in range(begin, old, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < old
        # A slot and head has fewer than 2**31 numbers.
        before = column[:, None] * WIDTH + wide[None, :]
        key = tl.load(keys + before, mask=inside[:, None], other=0.0)
        value = tl.load(values + before, mask=inside[:, None], other=0.0)
        if start == begin:
            # Not before the loop: by here the first old keys and values, which nobody writes, are on their way. Triton
            # (3.6 to 3.8) asks for what a loop loads ahead of all that stands in it; one that did not would be slower.
            follow(EARLY)
            query, found = newest(
                qkv, cos, sin, keys, values, at, scale, query_norm, key_norm, epsilon,
                HEADS, FEWER, NEW, WIDTH, TURNS, NORMED, GATED, ROWS, NEW_ROWS,
            )  # fmt: skip
        scores = tl.where(inside[None, :], tl.dot(query, tl.trans(key)) * scale, float("-inf"))
        found = seen(scores, value, found)
    if begin >= old:
        follow(EARLY)
        query, found = newest(
            qkv, cos, sin, keys, values, at, scale, query_norm, key_norm, epsilon,
            HEADS, FEWER, NEW, WIDTH, TURNS, NORMED, GATED, ROWS, NEW_ROWS,
        )  # fmt: skip
    known, row, of_head = queries_of(slot, head, HEADS // FEWER, NEW, ROWS)
    if PARTS == 1:
        done, weights, _ = found
        done = done / weights[:, None]
        if GATED:
            gate = gates_at(qkv, row, of_head, known, HEADS, FEWER, WIDTH)
            done = gate_with(done, gate, qkv.dtype.element_ty)
        out = (row * HEADS + of_head)[:, None] * WIDTH + wide[None, :]
        tl.store(target + out, done.to(target.dtype.element_ty), mask=known[:, None])
    else:
        leave(sums, tops, partial, (row * HEADS + of_head) * PARTS + part, known, found, WIDTH)


@triton.jit
def join_kernel(
    sums, tops, partial, target, parts, qkv,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, EARLY: tl.constexpr,
    HEADS: tl.constexpr, FEWER: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One query of one head: its parts, each by the weight of what it has seen."""
    row = tl.program_id(0)
    follow(EARLY)
    part, wide = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    inside = part < parts
    top = tl.load(tops + row * parts + part, mask=inside, other=float("-inf"))
    fade = tl.exp(top - tl.max(top, 0))
    weight = tl.load(sums + row * parts + part, mask=inside, other=0.0) * fade
    each = tl.load(partial + (row * parts + part)[:, None] * WIDTH + wide[None, :], mask=inside[:, None], other=0.0)
    done = tl.sum(each * fade[:, None], 0) / tl.sum(weight, 0)
    if GATED:
        # Each query and its gate, all heads of a row, then the keys and values.
        at = qkv + (row // HEADS) * ((HEADS * 2 + 2 * FEWER) * WIDTH) + (row % HEADS * 2 + 1) * WIDTH
        done = gate_with(done, tl.load(at + wide), target.dtype.element_ty)
    tl.store(target + row * WIDTH + wide, done.to(target.dtype.element_ty))


def attend_in_parts(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    heads: int,
    scale: float,
    parts: int | None = None,
    begins: bool = False,
    extras: Extras = NO_EXTRAS,
    shape: tuple[int, int, int] | None = None,
) -> torch.Tensor:
    """`attend_slots` by the kernels above, the first of which `begins` before the one before has ended; the keys of a
    slot in `parts` parts, as many as keep a GPU busy, by programs of such a `shape` as in SHAPES."""
    slots, fewer, capacity, width = keys.shape
    new, rows = len(qkv) // slots, len(qkv)
    parts = parts or max(1, min(MOST_PARTS, PROGRAMS // (slots * fewer)))
    block, warps, stages = shape or shape_of(parts, width)
    target = qkv.new_empty(rows, heads * width)
    sums = tops = partial = target
    if parts > 1:
        sums, tops = torch.empty(2, rows, heads, parts, dtype=torch.float32, device=qkv.device)
        partial = qkv.new_empty(rows, heads, parts, width, dtype=torch.float32)
    launch = {"launch_pdl": True} if begins else {}
    # What is not there is not read.
    query_norm, key_norm = extras.norms or (qkv, qkv)
    attend_kernel[(slots, fewer, parts)](
        qkv, cos, sin, keys, values, places, sums, tops, partial, target,
        capacity, scale, query_norm, key_norm, extras.epsilon,
        TURNS=cos.shape[-1], NORMED=extras.norms is not None, GATED=extras.gated, PARTS=parts,
        HEADS=heads, FEWER=fewer, NEW=new, WIDTH=width, ROWS=max(16, triton.next_power_of_2(new * heads // fewer)),
        NEW_ROWS=max(16, triton.next_power_of_2(new)), BLOCK=block, EARLY=begins,
        num_warps=warps, num_stages=stages, **launch,
    )  # fmt: skip
    if parts > 1:
        join_kernel[(rows * heads,)](
            sums, tops, partial, target, parts, qkv, PARTS=triton.next_power_of_2(parts), WIDTH=width, EARLY=begins,
            HEADS=heads, FEWER=fewer, GATED=extras.gated, num_warps=2, **launch,
        )  # fmt: skip
    return target
