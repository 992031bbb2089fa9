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


def opened(states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`states` (S, heads, D) as far as the sigmoid of `gate` (S, heads, D) opens; (S, heads x D)."""
    return (states * torch.sigmoid(gate)).flatten(1)


def gated_norm(states: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`states` (S, heads, D) over their root mean square, times `weight` (D,) and silu(`gate`) (S, heads x D);
    (S, heads x D)."""
    wide = states.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    normed = (weight * wide.to(states.dtype)).flatten(1)
    return (normed * silu(gate.to(torch.float32))).to(states.dtype)


# -----------------------------------------------------------------------------
# Layers


def attention_heads(
    self,
    parts: Sequence[torch.Tensor],
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    page_bounds: torch.Tensor,
    longest_page: int,
) -> torch.Tensor:
    """Queries with their gates (T, heads x 2D), keys and values (T, fewer heads x D), cos and sin (1, T, R), to
    (T, heads x D)."""
    key, value = (part.view(len(part), -1, self.head_dim) for part in parts[1:])
    query, gate = parts[0].view(len(key), -1, 2 * self.head_dim).chunk(2, dim=-1)
    angles = [part[0, :, None] for part in position_embeddings]
    query, key = (
        self.fused.turned_heads(part, norm.weight, *angles, norm.eps)
        for part, norm in ((query, self.q_norm), (key, self.k_norm))
    )
    # A flash kernel takes all three in one precision.
    done = attend(query, key, value.to(query.dtype), page_bounds, longest_page, self.scaling, causal=True)
    return self.fused.opened(done, gate)


def attention_forward(
    self,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    page_bounds: torch.Tensor,
    longest_page: int,
    **unused,
) -> tuple[torch.Tensor, None]:
    """(1, T, H) to ((1, T, H), None); pages see themselves only, and only what stands before."""
    parts = [part(hidden_states[0]) for part in (self.q_proj, self.k_proj, self.v_proj)]
    return self.o_proj(attention_heads(self, parts, position_embeddings, page_bounds, longest_page))[None], None


def delta_heads(self, parts: Sequence[torch.Tensor], page_bounds: torch.Tensor) -> torch.Tensor:
    """What is mixed (T, C), its gate (T, heads x D), and two numbers (T, heads) for each head, to (T, heads x D)."""
    mixed, gate, write, decay = parts
    given = DeltaInputs(mixed, write, decay, self.conv1d.weight.squeeze(1), self.A_log, self.dt_bias)
    done = gated_delta(given, shape_of_layer(self), page_bounds)
    return self.fused.gated_norm(done, gate, self.norm.weight, self.norm.variance_epsilon)


def delta_forward(self, hidden_states: torch.Tensor, page_bounds: torch.Tensor, **unused) -> torch.Tensor:
    """(1, T, H) to (1, T, H); pages see themselves only, and only what stands before."""
    products = (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
    return self.out_proj(delta_heads(self, [part(hidden_states[0]) for part in products], page_bounds))[None]


def language_block(
    self,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    page_bounds: torch.Tensor,
    longest_page: int,
    **unused,
) -> torch.Tensor:
    """A layer of the language model, of either kind, (1, T, H) to (1, T, H)."""
    rows, norm = hidden_states[0], self.input_layernorm
    if self.block_type == "linear_attention":
        inner = self.linear_attn
        products = (inner.in_proj_qkv, inner.in_proj_z, inner.in_proj_b, inner.in_proj_a)
        done = delta_heads(inner, fast.normed_products(rows, norm, *products), page_bounds)
        rows = fast.add_product(rows, done, inner.out_proj)
    else:
        inner = self.self_attn
        parts = fast.normed_products(rows, norm, inner.q_proj, inner.k_proj, inner.v_proj)
        done = attention_heads(inner, parts, position_embeddings, page_bounds, longest_page)
        rows = fast.add_product(rows, done, inner.o_proj)
    return fast.add_mlp(rows, self.post_attention_layernorm, self.mlp)[None]


def shape_of_layer(layer: torch.nn.Module) -> DeltaShape:
    """The heads of a layer of linear attention."""
    heads = (layer.num_k_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim)
    return DeltaShape(*heads, layer.conv_kernel_size)


def words(config: PretrainedConfig, device: str, dtype: torch.dtype) -> str:
    """What takes the linear attention of a model of `config`; flash-linear-attention is put to the proof here."""
    text = config.get_text_config()
    heads = (text.linear_num_key_heads, text.linear_num_value_heads)
    widths = (text.linear_key_head_dim, text.linear_value_head_dim)
    return f"linear attention by {delta_words(DeltaShape(*heads, *widths, text.linear_conv_kernel_dim), device, dtype)}"


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
            own.Qwen3_5VisionAttention: fast.vision_attention,
            torch.nn.Conv3d: fast.patch_forward,
        },
        blocks={own.Qwen3_5DecoderLayer: language_block},
        activations={own.Qwen3_5MLP: fast.SILU},
        elementwise=(rms_norm, rms_norm_backward, turned_heads, opened, gated_norm),
        words=words,
    )
