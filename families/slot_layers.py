"""Layers as the writing engine takes them: pages read into slots without gradients, then token by token from there.

    captured = family_of(model.config).captured(model)                  # a `Captured`
    mixed = layer.mixer.read(wide, pages, kept)                         # all tokens of some pages
    mixed = layer.mixer.step(wide, moment, kept)                        # one token of each slot, or a few

A layer is a norm, a product (`taken`) whose columns its mixer mixes with what stands before, a product back (`out`),
and an MLP with a gate. What a mixer keeps of a slot has a fixed place in memory, as a captured step needs it.

Shapes: T tokens of all pages that are read together; S slots, each with Q new tokens (R = S x Q rows); H the width of
the residual stream, D that of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch.nn import functional

from kernels import row_kernels, slot_attention
from kernels.attention import attend
from kernels.delta_step import Mixing, delta_step, gated_norm
from kernels.gated_delta import DeltaInputs, DeltaShape, read_pages
from kernels.slot_attention import NO_EXTRAS, Extras, attend_slots

Norm = tuple[torch.Tensor, float]  # weight (H,) and epsilon
Kept = tuple[torch.Tensor, ...]  # what a mixer keeps of each slot, (S, ...) each


@dataclass
class Pages:
    """Where the tokens of the pages that are read stand: `angles`, cos and sin (T, D or what is turned), `bounds` of
    the pages (pages + 1) and their `lengths`, the `slots` that they are read into (pages,), and of each token the slot
    and the place in it (T,)."""

    angles: Sequence[torch.Tensor]
    bounds: torch.Tensor
    lengths: list[int]
    slots: torch.Tensor
    slot: torch.Tensor
    place: torch.Tensor
    ends: dict[int, torch.Tensor] = field(default_factory=dict)

    def last(self, count: int) -> torch.Tensor:
        """The rows of the last `count` tokens of each page, or of all that it has; the same for all layers."""
        if count not in self.ends:
            bounds = [0, *itertools.accumulate(self.lengths)]
            rows = [row for begin, end in itertools.pairwise(bounds) for row in range(max(begin, end - count), end)]
            self.ends[count] = torch.tensor(rows, device=self.slot.device)
        return self.ends[count]


@dataclass
class Moment:
    """What a step knows of each row: `angles` (R, ...) as of `Pages`; and of each slot, the place of its first new
    token and whether it is `live`, (S,)."""

    angles: Sequence[torch.Tensor]
    places: torch.Tensor
    live: torch.Tensor


class Mixer(Protocol):
    """What differs between the layers of one language model. `taken` (N, H) and `taken_bias` are weights whose product
    with what was normed it takes, `out` (H, mixed) those that its result meets. `takes_back` says whether tokens that
    a step has kept may be taken back by moving a slot's place: only then there can be drafts."""

    taken: torch.Tensor
    taken_bias: torch.Tensor | None
    out: torch.Tensor
    takes_back: bool

    def keeps(self, capacity: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and precision of each part that is kept of one slot of `capacity` places."""

    def read(self, wide: torch.Tensor, pages: Pages, kept: Kept) -> torch.Tensor:
        """`wide` (T, N) of whole pages to (T, mixed); leaves in `kept` what stands in the pages' slots from here on."""

    def step(self, wide: torch.Tensor, moment: Moment, kept: Kept) -> torch.Tensor:
        """`wide` (R, N) of the new tokens to (R, mixed), after what is `kept` of the slots, which goes on by them."""


class Attention:
    """Grouped-query attention over keys and values, (S, fewer heads, capacity, D) each; `extras` of each head. The
    weights of `module` become views of larger ones."""

    takes_back = True

    def __init__(self, module: torch.nn.Module, extras: Extras = NO_EXTRAS):
        config, self.extras, self.scale = module.config, extras, module.scaling
        self.heads, self.fewer, self.width = config.num_attention_heads, config.num_key_value_heads, module.head_dim
        self.taken, self.taken_bias = side_by_side(module.q_proj, module.k_proj, module.v_proj)
        self.out = module.o_proj.weight

    def keeps(self, capacity: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [((self.fewer, capacity, self.width), dtype)] * 2

    def read(self, wide: torch.Tensor, pages: Pages, kept: Kept) -> torch.Tensor:
        query, key, value, gate = slot_attention.split_heads(wide, self.heads, self.fewer, self.width, self.extras)
        query, key = rotate(query, key, *pages.angles)
        keys, values = kept
        keys[pages.slot, :, pages.place], values[pages.slot, :, pages.place] = key, value
        longest = max(pages.lengths)
        done = attend(query, key, value.contiguous(), pages.bounds, longest, self.scale, causal=True)
        return (done if gate is None else done * torch.sigmoid(gate)).flatten(1)

    def step(self, wide: torch.Tensor, moment: Moment, kept: Kept) -> torch.Tensor:
        return attend_slots(wide, *moment.angles, *kept, moment.places, self.heads, self.scale, extras=self.extras)


class GatedDelta:
    """Linear attention by the gated delta rule: the last tokens' channels before the convolution, and a state in fp32,
    as kernels.delta_step takes them. The weights of `module` become views of larger ones."""

    takes_back = False

    def __init__(self, module: torch.nn.Module):
        self.taken, self.taken_bias = side_by_side(
            module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a
        )
        self.out = module.out_proj.weight
        heads = (module.num_k_heads, module.num_v_heads, module.head_k_dim, module.head_v_dim)
        self.shape = DeltaShape(*heads, module.conv_kernel_size)
        weights = (module.conv1d.weight.squeeze(1), module.A_log, module.dt_bias)
        self.mixing = Mixing(*weights, *plain_norm(module.norm), heads=heads[1], fewer=heads[0])

    def keeps(self, capacity: int, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        shape = self.shape
        return [
            ((shape.taps, shape.channels), dtype),
            ((shape.value_heads, shape.key_width, shape.value_width), torch.float32),
        ]

    def read(self, wide: torch.Tensor, pages: Pages, kept: Kept) -> torch.Tensor:
        (recent, states), shape, mixing = kept, self.shape, self.mixing
        heads = shape.value_heads
        mixed, gate, write, decay = wide.split((shape.channels, heads * shape.value_width, heads, heads), dim=1)
        last = pages.last(shape.taps)
        # Of another answer before: a page shorter than the convolution leaves zeros there.
        recent[pages.slots] = 0
        recent[pages.slot[last], pages.place[last] % shape.taps] = mixed[last]
        given = DeltaInputs(mixed, write, decay, mixing.taps, mixing.decay, mixing.shift)
        done, states[pages.slots] = read_pages(given, shape, pages.bounds, pages.lengths)
        return gated_norm(done, gate.view(done.shape), mixing.norm, mixing.epsilon).flatten(1)

    def step(self, wide: torch.Tensor, moment: Moment, kept: Kept) -> torch.Tensor:
        return delta_step(wide, self.mixing, *kept, moment.places, moment.live)


class Layer:
    """A layer of a language model: its `mixer` and its MLP, whose weights become views of larger ones."""

    def __init__(self, layer: torch.nn.Module, mixer: Mixer, norm_of: Callable[[torch.nn.Module], Norm]):
        self.mixer, self.norms = mixer, (norm_of(layer.input_layernorm), norm_of(layer.post_attention_layernorm))
        self.gated, _ = side_by_side(layer.mlp.gate_proj, layer.mlp.up_proj)
        self.down = layer.mlp.down_proj.weight


@dataclass(frozen=True)
class Captured:
    """What the engine writes with: the `layers` of the language model, its last `norm`, and `see(pictures, grids)`, of
    towers.py, from patches to what the language model takes of them."""

    layers: list[Layer]
    norm: Norm
    see: Callable[[Sequence[torch.Tensor], torch.Tensor], tuple[torch.Tensor, list[torch.Tensor]]]


def plain_norm(module: torch.nn.Module) -> Norm:
    """Of a norm whose weight is kept as it is."""
    return module.weight, module.variance_epsilon


def centred_norm(module: torch.nn.Module) -> Norm:
    """Of a norm whose weight is kept less one, in fp32, in which the model adds that (Qwen3.5, transformers 5.23)."""
    with torch.no_grad():
        return 1 + module.weight.float(), module.eps


def side_by_side(*linears: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights (N of all, K) and biases (N of all,) as one tensor each, of which the linears' own become views: the
    model stays as it was, and nothing is in memory twice."""
    with torch.no_grad():
        whole = []
        for name in ("weight", "bias"):
            parts = [getattr(module, name) for module in linears]
            if parts[0] is None:
                whole.append(None)
                continue
            joined = torch.cat(parts)
            for part, view in zip(parts, joined.split([len(part) for part in parts])):
                part.data = view
            whole.append(joined)
    return whole[0], whole[1]


def add_linear(
    hidden: torch.Tensor, inner: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`hidden` (S, N) plus `inner` (S, K) times `weight` (N, K). Where there is no bias that is one call, which writes
    into `hidden`: nobody looks at a residual stream of before, and a copy of it would take as long as a norm."""
    return hidden.addmm_(inner, weight.T) if bias is None else functional.linear(inner, weight, bias).add_(hidden)


def read_layer(layer: Layer, hidden: torch.Tensor, pages: Pages, kept: Kept) -> torch.Tensor:
    """`hidden` (T, H) of whole pages through a layer, which keeps what their slots go on with."""
    mixer = layer.mixer
    wide = functional.linear(row_kernels.rms_norm(hidden, *layer.norms[0]), mixer.taken, mixer.taken_bias)
    hidden = add_linear(hidden, mixer.read(wide, pages, kept), mixer.out)
    both = functional.linear(row_kernels.rms_norm(hidden, *layer.norms[1]), layer.gated)
    return add_linear(hidden, row_kernels.swiglu(both), layer.down)


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`query` and `key` (S, heads, D) turned by `cos` and `sin` (S, D or what of it is turned), in the precision of the
    angles."""
    if query.is_cuda and query.element_size() == 2 and cos.shape[-1] == query.shape[-1]:
        from kernels import rotary_kernel

        return rotary_kernel.turned(query, cos, sin, False), rotary_kernel.turned(key, cos, sin, False)
    turn = slot_attention.turned
    return tuple(turn(part.to(cos.dtype), cos[:, None], sin[:, None]).to(part.dtype) for part in (query, key))
