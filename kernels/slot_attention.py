"""Attention of a few new tokens over what stands in each slot of a static cache, rotary positions and storing included.

    attended = attend_slots(qkv, cos, sin, keys, values, places, heads, scale)

Each slot holds one answer; its new tokens see all that stands before them and themselves. On a GPU in half precision
two kernels do it for any lengths (FlashDecoding: Dao, Haziza, Massa, Sizov 2023), which a CUDA graph can hold since
lengths are read on the GPU; elsewhere torch's SDPA.

Shapes: S slots, each with Q new tokens (R = S x Q rows), C places a slot; D the width of a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 64  # keys that are looked at together
MOST_PARTS = 16  # of one slot's keys, each by a program of its own
PROGRAMS = 512  # that keep all multiprocessors of an H100 busy, some four each


def attend_slots(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    heads: int,
    scale: float,
) -> torch.Tensor:
    """`qkv` (R, (heads + 2 x fewer) x D), `cos` and `sin` (R, D), the cache's `keys` and `values` (S, fewer, C, D),
    which get the new ones at `places` (S,) and the Q - 1 places after. Returns (R, heads x D)."""
    half = qkv.element_size() == 2 and keys.shape[-1] in (16, 32, 64, 128, 256)
    if half and (qkv.is_cuda or not isinstance(attend_kernel, triton.JITFunction)):
        return attend_in_parts(qkv, cos, sin, keys, values, places, heads, scale)
    return attend_plain(qkv, cos, sin, keys, values, places, heads, scale)


def attend_plain(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    heads: int,
    scale: float,
) -> torch.Tensor:
    """`attend_slots` by torch's own functions; reads the longest place, for which a GPU would wait."""
    slots, fewer, _, width = keys.shape
    new = len(qkv) // slots
    parts = qkv.view(slots, new, -1, width)
    query, key, value = parts.split((heads, fewer, fewer), dim=2)
    cos, sin = (part.view(slots, new, 1, width) for part in (cos, sin))
    rows = places[:, None] + torch.arange(new, device=places.device)  # (S, Q)
    slot = torch.arange(slots, device=places.device)[:, None]
    keys[slot, :, rows] = turned(key, cos, sin)
    values[slot, :, rows] = value
    length = int(rows.max()) + 1
    seen = torch.arange(length, device=places.device) <= rows[:, None, :, None]
    done = torch.nn.functional.scaled_dot_product_attention(
        turned(query, cos, sin).transpose(1, 2), keys[:, :, :length], values[:, :, :length],
        attn_mask=seen, scale=scale, enable_gqa=True,
    )  # fmt: skip
    return done.transpose(1, 2).reshape(len(qkv), -1)


def turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (RoPE, Su et al. 2021): the two halves of the last dimension turned against each other."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


@triton.jit
def turned_rows(states, other, cos, sin, HALF: tl.constexpr):
    """`states` (rows, D) and `other`, their halves exchanged, turned by `cos` and `sin` (rows, D), in fp32."""
    place = tl.arange(0, 2 * HALF)
    sign = tl.where(place < HALF, -1.0, 1.0)
    return states * cos + other * sign[None, :] * sin


@triton.jit
def attend_kernel(
    qkv, cos, sin, keys, values, places, sums, tops, partial, capacity, scale, parts,
    HEADS: tl.constexpr, FEWER: tl.constexpr, NEW: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, NEW_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one slot and one head of keys, for all NEW x (HEADS / FEWER) queries that share it."""
    slot, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    shared: tl.constexpr = HEADS // FEWER
    line: tl.constexpr = (HEADS + 2 * FEWER) * WIDTH
    half: tl.constexpr = WIDTH // 2
    place = tl.load(places + slot)
    total = place + NEW
    chunk = tl.cdiv(tl.cdiv(total, parts), BLOCK) * BLOCK
    begin = part * chunk
    end = tl.minimum(begin + chunk, total)
    wide, turn = tl.arange(0, WIDTH), (tl.arange(0, WIDTH) + half) % WIDTH
    sign = tl.where(wide < half, -1.0, 1.0)
    cache = (slot * FEWER + head).to(tl.int64) * capacity * WIDTH

    # New keys and values, by the program in whose part they lie.
    fresh = tl.arange(0, NEW_ROWS)
    mine = (fresh < NEW) & (place + fresh >= begin) & (place + fresh < end)
    row = slot * NEW + fresh
    angles = row[:, None] * WIDTH + wide[None, :]
    cosine = tl.load(cos + angles, mask=mine[:, None], other=0.0).to(tl.float32)
    sine = tl.load(sin + angles, mask=mine[:, None], other=0.0).to(tl.float32)
    source = qkv + row[:, None] * line + (HEADS + head) * WIDTH
    key = tl.load(source + wide[None, :], mask=mine[:, None], other=0.0).to(tl.float32)
    other = tl.load(source + turn[None, :], mask=mine[:, None], other=0.0).to(tl.float32)
    stored = cache + (place + fresh)[:, None] * WIDTH + wide[None, :]
    tl.store(keys + stored, (key * cosine + other * sign[None, :] * sine).to(keys.dtype.element_ty), mask=mine[:, None])
    value = tl.load(source + FEWER * WIDTH + wide[None, :], mask=mine[:, None], other=0.0)
    tl.store(values + stored, value, mask=mine[:, None])
    # The warps of this program read below what its other warps have just written.
    tl.debug_barrier()

    lane = tl.arange(0, ROWS)
    token, of_head = lane // shared, head * shared + lane % shared
    known = lane < NEW * shared
    row = slot * NEW + token
    angles = row[:, None] * WIDTH + wide[None, :]
    cosine = tl.load(cos + angles, mask=known[:, None], other=0.0).to(tl.float32)
    sine = tl.load(sin + angles, mask=known[:, None], other=0.0).to(tl.float32)
    source = qkv + row[:, None] * line + of_head[:, None] * WIDTH
    query = tl.load(source + wide[None, :], mask=known[:, None], other=0.0).to(tl.float32)
    other = tl.load(source + turn[None, :], mask=known[:, None], other=0.0).to(tl.float32)
    query = (query * cosine + other * sign[None, :] * sine).to(qkv.dtype.element_ty)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    weights = tl.zeros((ROWS,), tl.float32)
    done = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(begin, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < end
        at = cache + column.to(tl.int64)[:, None] * WIDTH + wide[None, :]
        key_block = tl.load(keys + at, mask=inside[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(key_block)) * scale
        seen = inside[None, :] & (column[None, :] <= place + token[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing yet: minus infinity less itself is no number.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        chances = tl.exp(scores - base[:, None])
        fade = tl.exp(top - base)
        weights = weights * fade + tl.sum(chances, 1)
        value_block = tl.load(values + at, mask=inside[:, None], other=0.0)
        done = done * fade[:, None] + tl.dot(chances.to(value_block.dtype), value_block)
        top = higher
    # (R, heads, parts) and (R, heads, parts, D)
    out = (row * HEADS + of_head) * parts + part
    tl.store(tops + out, top, mask=known)
    tl.store(sums + out, weights, mask=known)
    tl.store(partial + out[:, None] * WIDTH + wide[None, :], done, mask=known[:, None])


@triton.jit
def join_kernel(sums, tops, partial, target, parts, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """One query of one head: its parts, each by the weight of what it has seen."""
    row = tl.program_id(0)
    part, wide = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    inside = part < parts
    top = tl.load(tops + row * parts + part, mask=inside, other=float("-inf"))
    fade = tl.exp(top - tl.max(top, 0))
    weight = tl.load(sums + row * parts + part, mask=inside, other=0.0) * fade
    each = tl.load(partial + (row * parts + part)[:, None] * WIDTH + wide[None, :], mask=inside[:, None], other=0.0)
    done = tl.sum(each * fade[:, None], 0) / tl.sum(weight, 0)
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
) -> torch.Tensor:
    """`attend_slots` by the kernels above; the keys of a slot in `parts` parts, as many as keep a GPU busy."""
    slots, fewer, capacity, width = keys.shape
    new, rows = len(qkv) // slots, len(qkv)
    parts = parts or max(1, min(MOST_PARTS, PROGRAMS // (slots * fewer)))
    sums = qkv.new_empty(rows, heads, parts, dtype=torch.float32)
    tops, partial = torch.empty_like(sums), qkv.new_empty(rows, heads, parts, width, dtype=torch.float32)
    target = qkv.new_empty(rows, heads * width)
    lanes = max(16, triton.next_power_of_2(new * heads // fewer))
    attend_kernel[(slots, fewer, parts)](
        qkv, cos, sin, keys, values, places, sums, tops, partial, capacity, scale, parts,
        HEADS=heads, FEWER=fewer, NEW=new, WIDTH=width, ROWS=lanes, NEW_ROWS=triton.next_power_of_2(new), BLOCK=BLOCK,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    join_kernel[(rows * heads,)](
        sums, tops, partial, target, parts, PARTS=triton.next_power_of_2(parts), WIDTH=width, num_warps=2
    )
    return target
