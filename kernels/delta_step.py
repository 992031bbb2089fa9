"""One step of the gated delta rule for each slot: convolution, state, gated norm, all in one pass over the state.

    done = delta_step(wide, mixing, recent, states, places, live)                       # (S, heads x DV)

Gated delta networks (Yang, Kautz, Hatamizadeh 2024, eq. 10) keep a matrix for each head instead of keys and values of
all that stands before: one step decays it, takes from it what it says of the new key, adds what the value differs from
that, and reads it with the query. As in transformers' Qwen3.5 (5.23) queries, keys and values have gone through a short
causal convolution before, and what was read is normed and gated after.

In half precision on a GPU by Triton, elsewhere by torch. Shapes: S slots; `heads` of values, DV wide, of which as many
share each of the `fewer` heads of queries and keys, DK wide; `mixed` = 2 x fewer x DK + heads x DV channels of the
convolution over K tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn import functional

from kernels.early import EARLY, PLAIN, early, follow, once, warm, way_that_agrees
from kernels.product_parts import arrived, is_last
from kernels.row_kernels import on_triton

LEAST = tl.constexpr(1e-6)  # under the root of a query's and a key's norm
# Columns of a state do not meet each other: so many programs share those of a head, each with so many warps. A whole
# state of 128 x 128 numbers takes 172 registers of a thread in 8 warps (sm_90): no other program beside it on its
# multiprocessor, and nothing is loaded while it waits for its sums. A quarter in 4 warps takes 72: seven at once.
PARTS, WARPS = 4, 4


class Mixing(NamedTuple):
    """The weights of a layer: `taps` (mixed, K) of the convolution, `decay` (heads,), whose exponential is the rate,
    `shift` (heads,) added before, `norm` (DV,) and its `epsilon`; and how many heads there are."""

    taps: torch.Tensor
    decay: torch.Tensor
    shift: torch.Tensor
    norm: torch.Tensor
    epsilon: float
    heads: int
    fewer: int


def delta_step(
    wide: torch.Tensor,
    mixing: Mixing,
    recent: torch.Tensor,
    states: torch.Tensor,
    places: torch.Tensor,
    live: torch.Tensor,
) -> torch.Tensor:
    """`wide` (S, mixed + heads x DV + 2 x heads): query, key, value, gate, learning rate and decay of one token of each
    slot, which stands at `places` (S,). `recent` (S, K, mixed) holds the last tokens' channels, that of a place at its
    remainder by K, zeros before the first; `states` (S, heads, DK, DV), in fp32. Both go one token on where `live` (S,)
    is not 0. Returns (S, heads x DV)."""
    key, value = states.shape[2:]
    given = (wide, mixing, recent, states, places, live)
    if on_triton(wide) and all(extent in (16, 32, 64, 128) for extent in (key, value)):
        kinds = (mixing.norm.dtype, mixing.decay.dtype, wide.dtype, wide.device)
        if way := way_of(mixing.heads, mixing.fewer, key, value, mixing.taps.shape[1], *kinds):
            return step_by_kernel(*given, begins=way == EARLY)
    return step_plain(*given)


@once
def way_of(
    heads: int, fewer: int, key: int, value: int, taps: int,
    norm: torch.dtype, decay: torch.dtype, dtype: torch.dtype, device: torch.device,
) -> str:  # fmt: skip
    """How the kernel is launched for these shapes: by proof on random states, one of them of a slot that stands
    still."""
    draw, slots, mixed = torch.Generator(device).manual_seed(0), 3, 2 * fewer * key + heads * value

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, device=device)

    wide = some(slots, mixed + heads * value + 2 * heads).to(dtype)
    mixing = Mixing(some(mixed, taps).to(dtype), some(heads).to(decay), some(heads).to(decay), some(value).to(norm),
                    1e-6, heads, fewer)  # fmt: skip
    recent, states = some(slots, taps, mixed).to(dtype), some(slots, heads, key, value)
    # Each from a multiple of 16 bytes on, as in a step: others would prove another kernel.
    places, live = (torch.tensor(part, device=device) for part in ([1, 6, 11], [1, 0, 1]))
    # In the precision of the model: what it rounds on the way is one percent of a state in bf16, and the same in both.
    kept = recent.clone(), states.clone()
    wanted = step_plain(wide, mixing, *kept, places, live)

    def by(begins: bool) -> tuple[torch.Tensor, ...]:
        mine = recent.clone(), states.clone()
        done = step_by_kernel(wide, mixing, *mine, places, live, begins=begins)
        return done, mine[0] - recent, mine[1] - states

    ways = {EARLY: lambda: by(True)} if early(device) else {}
    # What was changed: a missing change hides among all that was there.
    changed = kept[0] - recent, kept[1] - states
    return way_that_agrees("a step of the delta rule", ways | {PLAIN: lambda: by(False)}, (wanted, *changed))


def step_plain(
    wide: torch.Tensor,
    mixing: Mixing,
    recent: torch.Tensor,
    states: torch.Tensor,
    places: torch.Tensor,
    live: torch.Tensor,
) -> torch.Tensor:
    """`delta_step` by torch's own functions, each step of which is one of transformers' (5.23)."""
    slots, count, mixed = recent.shape
    heads, fewer, (width, across) = mixing.heads, mixing.fewer, states.shape[2:]
    fresh, gate, rate, decay = wide.split((mixed, heads * across, heads, heads), dim=-1)
    slot, moving = torch.arange(slots, device=wide.device), live.bool()
    here = places % count
    recent[slot, here] = torch.where(moving[:, None], fresh, recent[slot, here])
    before = (places[:, None] + 1 + torch.arange(count - 1, device=wide.device)) % count
    window = torch.cat((recent[slot[:, None], before], fresh[:, None]), dim=1)  # (S, K, mixed), the new one last
    window = functional.silu((window.float() * mixing.taps.float().T).sum(1).to(wide.dtype)).float()
    query, key, value = window.split((fewer * width, fewer * width, heads * across), dim=-1)
    query, key = (unit(part.view(slots, fewer, width)) for part in (query, key))
    query, key = (part.repeat_interleave(heads // fewer, dim=1) for part in (query * width**-0.5, key))
    value = value.view(slots, heads, across)
    fade = torch.exp(-mixing.decay.float().exp() * functional.softplus(decay.float() + mixing.shift.float()))
    new = states * fade[..., None, None]
    differs = (value - (new * key[..., None]).sum(-2)) * rate.sigmoid().float()[..., None]
    new = new + key[..., None] * differs[..., None, :]
    done = (new * query[..., None]).sum(-2).to(wide.dtype)
    states.copy_(torch.where(moving[:, None, None, None], new, states))
    return gated_norm(done, gate.view(slots, heads, across), mixing.norm, mixing.epsilon).flatten(1)


def unit(states: torch.Tensor) -> torch.Tensor:
    """`states` (..., D) over their length."""
    return states * torch.rsqrt((states * states).sum(-1, keepdim=True) + LEAST.value)


def gated_norm(states: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`states` (..., D) over their root mean square, times `weight` (D,) and silu of `gate` (..., D)."""
    wide = states.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (weight * wide.to(weight.dtype) * functional.silu(gate.float())).to(states.dtype)


@triton.jit
def convolved(fresh, recent, taps, channel, place, moves, MIXED: tl.constexpr, TAPS: tl.constexpr):
    """Some channels of the newest token, of `fresh` and of those before it, in fp32; what is `fresh` is kept where the
    slot `moves`. Programs that share channels write the same to where none of them reads."""
    new = tl.load(fresh + channel)
    done = new.to(tl.float32) * tl.load(taps + channel * TAPS + TAPS - 1).to(tl.float32)
    for number in tl.static_range(TAPS - 1):
        old = tl.load(recent + (place + 1 + number) % TAPS * MIXED + channel).to(tl.float32)
        done += old * tl.load(taps + channel * TAPS + number).to(tl.float32)
    tl.store(recent + place % TAPS * MIXED + channel, new, mask=(channel >= 0) & moves)
    done = done.to(new.dtype).to(tl.float32)
    return (done * tl.sigmoid(done)).to(new.dtype).to(tl.float32)


@triton.jit
def delta_kernel(
    wide, taps, decay, shift, norm, recent, states, places, live, target, shares, arrived, epsilon, scale,
    HEADS: tl.constexpr, FEWER: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, TAPS: tl.constexpr,
    PARTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One of PARTS of the columns of one head's state of one slot, which stay in registers from their load to their
    store. What the head reads is normed by the program that ends last."""
    slot, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    mine: tl.constexpr = VALUE // PARTS
    mixed: tl.constexpr = 2 * FEWER * KEY + HEADS * VALUE
    kind: tl.constexpr = wide.dtype.element_ty
    # Moved on at the end of the step before: there already.
    place, moves = tl.load(places + slot), tl.load(live + slot) != 0
    row, column = tl.arange(0, KEY), part * mine + tl.arange(0, mine)
    at = states + (slot * HEADS + head).to(tl.int64) * (KEY * VALUE)
    if EARLY:
        # 32 numbers of fp32 are a line of memory.
        for line in tl.static_range(0, mine, 32):
            warm(at + row * VALUE + part * mine + line)
    follow(EARLY)
    at = at + row[:, None] * VALUE + column[None, :]
    state = tl.load(at)
    fresh = wide + slot * (mixed + HEADS * VALUE + 2 * HEADS)
    recent = recent + slot * (TAPS * mixed)
    first = head // (HEADS // FEWER) * KEY
    query = convolved(fresh, recent, taps, first + row, place, moves, mixed, TAPS)
    key = convolved(fresh, recent, taps, FEWER * KEY + first + row, place, moves, mixed, TAPS)
    value = convolved(fresh, recent, taps, 2 * FEWER * KEY + head * VALUE + column, place, moves, mixed, TAPS)
    query = query * tl.rsqrt(tl.sum(query * query, 0) + LEAST) * scale
    key = key * tl.rsqrt(tl.sum(key * key, 0) + LEAST)
    rest = fresh + mixed + HEADS * VALUE + head
    rate = tl.sigmoid(tl.load(rest).to(tl.float32)).to(kind).to(tl.float32)
    raw = tl.load(rest + HEADS).to(tl.float32) + tl.load(shift + head).to(tl.float32)
    # As torch's softplus, which is the identity from 20 on.
    soft = tl.where(raw > 20.0, raw, tl.log(1.0 + tl.exp(tl.minimum(raw, 20.0))))
    fade = tl.exp(-tl.exp(tl.load(decay + head).to(tl.float32)) * soft)
    # Both sums over the state as it was, side by side: what is written adds as much to what is read as the query is
    # like the key.
    told, read = tl.sum(state * key[:, None], 0) * fade, tl.sum(state * query[:, None], 0) * fade
    differs = (value - told) * rate
    state = state * fade + key[:, None] * differs[None, :]
    tl.store(at, state, mask=(row >= 0)[:, None] & (column >= 0)[None, :] & moves)
    done = read + tl.sum(query * key, 0) * differs
    every = tl.arange(0, VALUE)
    if PARTS > 1:
        left = shares + (slot * HEADS + head) * VALUE
        if not is_last(left + column, done, arrived + slot * HEADS + head, PARTS):
            return
        done = tl.load(left + every, cache_modifier=".cg")  # as in `sum_of`
    done = done.to(kind).to(tl.float32)
    done = done * tl.rsqrt(tl.sum(done * done, 0) / VALUE + epsilon)
    weight = tl.load(norm + every)
    done = (done.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)).to(weight.dtype).to(tl.float32)
    gate = tl.load(fresh + mixed + head * VALUE + every).to(tl.float32)
    done = done * gate * tl.sigmoid(gate)
    tl.store(target + (slot * HEADS + head) * VALUE + every, done.to(kind))


def step_by_kernel(
    wide: torch.Tensor,
    mixing: Mixing,
    recent: torch.Tensor,
    states: torch.Tensor,
    places: torch.Tensor,
    live: torch.Tensor,
    begins: bool = False,
    parts: int = PARTS,
    warps: int = WARPS,
) -> torch.Tensor:
    """`delta_step` by the kernel above, which `begins` before the one before has ended; `parts` programs of `warps`
    hold a head's state."""
    slots, heads, key, value = states.shape
    parts = min(parts, value // 16)
    target = wide.new_empty(slots, heads * value)
    shares, count = wide.new_empty(slots, heads, value, dtype=torch.float32), arrived(wide.device)
    delta_kernel[(slots, heads, parts)](
        wide, mixing.taps, mixing.decay, mixing.shift, mixing.norm, recent, states, places, live, target, shares, count,
        mixing.epsilon, key**-0.5, HEADS=heads, FEWER=mixing.fewer, KEY=key, VALUE=value, TAPS=mixing.taps.shape[1],
        PARTS=parts, EARLY=begins, num_warps=warps, **({"launch_pdl": True} if begins else {}),
    )  # fmt: skip
    return target
