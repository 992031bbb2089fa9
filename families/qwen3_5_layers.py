"""Qwen3.5's layers on packed pages, each part faster than the model's own way to the same (transformers 5.23).

`architecture()` says which of them stands for which module. Shapes as in fast_parts.py; R is the width of the part of a
head that positions turn, C the channels of what linear attention mixes: queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import silu

import families.fast_parts as fast
from families.elementwise import Elementwise
from families.family import Architecture
from kernels.attention import attend
from kernels.gated_delta import DeltaInputs, DeltaShape, delta_words, gated_delta

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# -----------------------------------------------------------------------------
# Element-wise


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`hidden` (..., H) over its root mean square, times 1 + `weight` (H,), rounded once; (..., H)."""
    wide = hidden.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * (1 + weight.to(torch.float32))).to(hidden.dtype)


def rms_norm_backward(
    hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, gradient: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `rms_norm` for `hidden` (S, H), plus `residual` (S, H) or (), which went past it, and for `weight`
    (H,)."""
    wide = hidden.to(torch.float32)
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    normed, outer = wide * inverse, gradient.float()
    inner = outer * (1 + weight.to(torch.float32))
    for_hidden = inverse * (inner - normed * (inner * normed).mean(-1, keepdim=True)) + residual.float()
    return for_hidden.to(hidden.dtype), (outer * normed).sum(0).to(weight.dtype)


def turned_heads(
    states: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Heads `states` (S, heads, D), normed by `weight` (D,), their first R numbers turned by `cos`, `sin` (S, 1, R)."""
    normed = rms_norm(states, weight, epsilon)
    turning, rest = normed.tensor_split([cos.shape[-1]], dim=-1)
    first, second = turning.chunk(2, dim=-1)
    return torch.cat((turning * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1)


def turned_heads_backward(
    states: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    epsilon: float,
    gradient: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `turned_heads` for `states` (S, heads, D) and `weight` (D,)."""
    turned, rest = gradient.float().tensor_split([cos.shape[-1]], dim=-1)
    first, second = (turned * sin.float()).chunk(2, dim=-1)
    outer = torch.cat((turned * cos.float() + torch.cat((second, -first), dim=-1), rest), dim=-1)
    wide = states.to(torch.float32)
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    normed, inner = wide * inverse, outer * (1 + weight.to(torch.float32))
    for_states = inverse * (inner - normed * (inner * normed).mean(-1, keepdim=True))
    return for_states.to(states.dtype), (outer * normed).sum((0, 1)).to(weight.dtype)


def opened(states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`states` (S, heads, D) as far as the sigmoid of `gate` (S, heads, D) opens; (S, heads x D)."""
    return (states * torch.sigmoid(gate)).flatten(1)


def opened_backward(
    states: torch.Tensor, gate: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `opened` for `states` and `gate`, and its value recomputed (S, heads x D)."""
    share, wide = torch.sigmoid(gate.float()), gradient.float().view(states.shape)
    for_gate = wide * states.float() * share * (1 - share)
    return (wide * share).to(states.dtype), for_gate.to(gate.dtype), opened(states, gate)


def gated_norm(states: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`states` (S, heads, D) over their root mean square, times `weight` (D,) and silu(`gate`) (S, heads x D);
    (S, heads x D)."""
    wide = states.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    normed = (weight * wide.to(states.dtype)).flatten(1)
    return (normed * silu(gate.to(torch.float32))).to(states.dtype)


def gated_norm_backward(
    states: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, epsilon: float, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `gated_norm` for `states`, `gate` and `weight`, and its value recomputed (S, heads x D)."""
    wide, opening = states.to(torch.float32), gate.to(torch.float32).view(states.shape)
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    normed, outer, share = wide * inverse, gradient.float().view(states.shape), torch.sigmoid(opening)
    # The norm was rounded before it met the weight, so it is here, too.
    rounded, inner = normed.to(states.dtype).float(), outer * opening * share
    for_gate = outer * weight.float() * rounded * (share + opening * share * (1 - share))
    weighed = inner * weight.float()
    for_states = inverse * (weighed - normed * (weighed * normed).mean(-1, keepdim=True))
    for_weight = (inner * rounded).sum((0, 1))
    value = gated_norm(states, gate, weight, epsilon)
    return for_states.to(states.dtype), for_gate.flatten(1).to(gate.dtype), for_weight.to(weight.dtype), value


# -----------------------------------------------------------------------------
# Autograd functions, which keep for the backward pass no more than they have to


class TurnedHeads(torch.autograd.Function):
    """`turned_heads` by `norm` for autograd: keeps what was not normed yet."""

    @staticmethod
    def forward(
        ctx,
        states: torch.Tensor,
        norm: torch.nn.Module,
        weight: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(states, weight, cos, sin)
        ctx.norm = norm
        return norm.fused.turned_heads(states, weight, cos, sin, norm.eps)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        norm = ctx.norm
        for_states, for_weight = norm.fused.turned_heads_backward(*ctx.saved_tensors, norm.eps, gradient)
        return for_states, None, for_weight, None, None


class Opened(torch.autograd.Function):
    """`opened` for autograd: keeps what it is given."""

    @staticmethod
    def forward(ctx, fused: Elementwise, states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(states, gate)
        ctx.fused = fused
        return fused.opened(states, gate)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        for_states, for_gate, _ = ctx.fused.opened_backward(*ctx.saved_tensors, gradient)
        return None, for_states, for_gate


class GatedNorm(torch.autograd.Function):
    """`gated_norm` by `norm` for autograd: keeps what it is given."""

    @staticmethod
    def forward(
        ctx, norm: torch.nn.Module, states: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(states, gate, weight)
        ctx.norm = norm
        return norm.fused.gated_norm(states, gate, weight, norm.variance_epsilon)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        norm = ctx.norm
        *found, _ = norm.fused.gated_norm_backward(*ctx.saved_tensors, norm.variance_epsilon, gradient)
        return None, *found


class AddOpened(torch.autograd.Function):
    """`residual` + linear(`opened`(`states`, `gate`)) for autograd: what came through the gate is made again."""

    @staticmethod
    def forward(
        ctx,
        fused: Elementwise,
        residual: torch.Tensor,
        states: torch.Tensor,
        gate: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(states, gate, weight)
        ctx.fused = fused
        return fast.add_linear(residual, fused.opened(states, gate), weight, bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        states, gate, weight = ctx.saved_tensors
        for_states, for_gate, value = ctx.fused.opened_backward(states, gate, gradient @ weight)
        return None, gradient, for_states, for_gate, *fast.weight_gradients(ctx, 4, gradient, value)


class AddGatedNorm(torch.autograd.Function):
    """`residual` + linear(`gated_norm`(`states`, `gate`)) for autograd: what was normed is made again."""

    @staticmethod
    def forward(
        ctx,
        norm: torch.nn.Module,
        residual: torch.Tensor,
        states: torch.Tensor,
        gate: torch.Tensor,
        norm_weight: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(states, gate, norm_weight, weight)
        ctx.norm = norm
        value = norm.fused.gated_norm(states, gate, norm_weight, norm.variance_epsilon)
        return fast.add_linear(residual, value, weight, bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        states, gate, norm_weight, weight = ctx.saved_tensors
        given = (states, gate, norm_weight, ctx.norm.variance_epsilon)
        *found, value = ctx.norm.fused.gated_norm_backward(*given, gradient @ weight)
        return None, gradient, *found, *fast.weight_gradients(ctx, 5, gradient, value)


# -----------------------------------------------------------------------------
# Layers


def attention_heads(
    self,
    parts: Sequence[torch.Tensor],
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    page_bounds: torch.Tensor,
    longest_page: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries with their gates (T, heads x 2D), keys and values (T, fewer heads x D), cos and sin (1, T, R), to what
    attention makes of them and the gates, both (T, heads, D)."""
    key, value = (part.view(len(part), -1, self.head_dim) for part in parts[1:])
    query, gate = parts[0].view(len(key), -1, 2 * self.head_dim).chunk(2, dim=-1)
    cos, sin = (part[0, :, None] for part in position_embeddings)
    query = TurnedHeads.apply(query, self.q_norm, self.q_norm.weight, cos, sin)
    key = TurnedHeads.apply(key, self.k_norm, self.k_norm.weight, cos, sin)
    # A flash kernel takes all three in one precision.
    done = attend(query, key, value.to(query.dtype), page_bounds, longest_page, self.scaling, causal=True)
    return done, gate


def attention_forward(
    self,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    page_bounds: torch.Tensor,
    longest_page: int,
    **unused,
) -> tuple[torch.Tensor, None]:
    """(1, T, H) to ((1, T, H), None); pages see themselves only, and only what stands before."""
    rows = fast.rows_of(hidden_states)
    parts = [part(rows) for part in (self.q_proj, self.k_proj, self.v_proj)]
    done = attention_heads(self, parts, position_embeddings, page_bounds, longest_page)
    return self.o_proj(Opened.apply(self.fused, *done))[None], None


def gated_norm_forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """(S, heads, D) and (S, heads x D) to (S, heads x D)."""
    return GatedNorm.apply(self, hidden_states, gate, self.weight)


def delta_heads(
    self, mixed: torch.Tensor, write: torch.Tensor, decay: torch.Tensor, page_bounds: torch.Tensor
) -> torch.Tensor:
    """What is mixed (T, C), and two numbers (T, heads) for each head, to what each token reads (T, heads, D)."""
    given = DeltaInputs(mixed, write, decay, self.conv1d.weight.squeeze(1), self.A_log, self.dt_bias)
    return gated_delta(given, shape_of_layer(self), page_bounds)


def delta_forward(self, hidden_states: torch.Tensor, page_bounds: torch.Tensor, **unused) -> torch.Tensor:
    """(1, T, H) to (1, T, H); pages see themselves only, and only what stands before."""
    rows = fast.rows_of(hidden_states)
    done = delta_heads(self, self.in_proj_qkv(rows), self.in_proj_b(rows), self.in_proj_a(rows), page_bounds)
    return self.out_proj(self.norm(done, self.in_proj_z(rows)))[None]


def language_block(
    self,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    page_bounds: torch.Tensor,
    longest_page: int,
    again: bool = False,
    **unused,
) -> torch.Tensor:
    """A layer of the language model, of either kind, (1, T, H) to (1, T, H)."""
    rows, norm = fast.rows_of(hidden_states), self.input_layernorm
    if self.block_type == "linear_attention":
        inner = self.linear_attn
        products = (inner.in_proj_qkv, inner.in_proj_z, inner.in_proj_b, inner.in_proj_a)
        mixed, gate, write, decay = fast.normed_products(rows, norm, *products)
        done, last = delta_heads(inner, mixed, write, decay, page_bounds), inner.out_proj
        rows = AddGatedNorm.apply(inner.norm, rows, done, gate, inner.norm.weight, last.weight, last.bias)
    else:
        inner = self.self_attn
        parts = fast.normed_products(rows, norm, inner.q_proj, inner.k_proj, inner.v_proj)
        done, gate = attention_heads(inner, parts, position_embeddings, page_bounds, longest_page)
        rows = AddOpened.apply(inner.fused, rows, done, gate, inner.o_proj.weight, inner.o_proj.bias)
    return fast.add_mlp(rows, self.post_attention_layernorm, self.mlp, again)[None]


def shape_of_layer(layer: torch.nn.Module) -> DeltaShape:
    """The heads of a layer of linear attention."""
    heads = (layer.num_k_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim)
    return DeltaShape(*heads, layer.conv_kernel_size)


def words(config: PretrainedConfig, device: str, dtype: torch.dtype) -> str:
    """What takes the linear attention of a model of `config`; flash-linear-attention is put to the proof here."""
    text = config.get_text_config()
    heads = (text.linear_num_key_heads, text.linear_num_value_heads)
    widths = (text.linear_key_head_dim, text.linear_value_head_dim)
    shape, layers = DeltaShape(*heads, *widths, text.linear_conv_kernel_dim), text.layer_types.count("linear_attention")
    return f"linear attention by {delta_words(shape, device, dtype, layers)}"


def architecture() -> Architecture:
    """Its fast path."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as own

    return Architecture(
        model=fast.packed_forward,
        forwards={
            own.Qwen3_5RMSNorm: fast.norm_forward,
            own.Qwen3_5MLP: fast.mlp_forward,
            own.Qwen3_5Attention: attention_forward,
            own.Qwen3_5GatedDeltaNet: delta_forward,
            own.Qwen3_5RMSNormGated: gated_norm_forward,
            own.Qwen3_5VisionAttention: fast.vision_attention,
            torch.nn.Conv3d: fast.patch_forward,
        },
        blocks={own.Qwen3_5DecoderLayer: language_block, own.Qwen3_5VisionBlock: fast.vision_gelu_block},
        activations={own.Qwen3_5MLP: fast.SILU, own.Qwen3_5VisionMLP: fast.GELU},
        widened={"linear_fc1": 0, "linear_fc2": 1},
        elementwise=(
            rms_norm,
            rms_norm_backward,
            turned_heads,
            turned_heads_backward,
            opened,
            opened_backward,
            gated_norm,
            gated_norm_backward,
        ),
        words=words,
    )
