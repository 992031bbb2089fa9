"""Qwen3.5 (dense): Qwen3-VL's pictures, and a language model most of whose layers attend linearly.

Three of four layers are gated delta networks (Yang et al. 2024), whose state of a fixed size is written and read token
by token; in the fourth each head has a gate, and positions in a quarter of its width. The vision tower is Qwen3-VL's
without DeepStack. Members with experts (`qwen3_5_moe`) are another architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from families.family import Architecture
from families.page_costs import LinearAttention, Shape, Tower, head_padding
from families.qwen2_5_vl import FAMILY as QWEN2_5_VL

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

    from families.slot_layers import Captured


def shape(config: PretrainedConfig) -> Shape:
    """The widths by which costs are counted, from the configuration."""
    text, vision = config.get_text_config(), config.vision_config
    queries, keys = (text.head_dim * heads for heads in (text.num_attention_heads, text.num_key_value_heads))
    merged, width = vision.hidden_size * vision.spatial_merge_size**2, vision.hidden_size
    linear = LinearAttention(
        layers=text.layer_types.count("linear_attention"),
        keys=text.linear_num_key_heads * text.linear_key_head_dim,
        values=text.linear_num_value_heads * text.linear_value_head_dim,
        heads=text.linear_num_value_heads,
        state=text.linear_key_head_dim,
    )
    layers, inner, padded = text.num_hidden_layers, text.intermediate_size, head_padding(width, vision.num_heads)
    return Shape(
        language=Tower(layers, text.hidden_size, queries, keys, inner, gates=queries, linear=linear, normed_heads=True),
        vocabulary=text.vocab_size,
        tied=config.tie_word_embeddings,  # what the text configuration says does not count (transformers 5.23)
        vision=Tower(vision.depth, width, width, width, vision.intermediate_size, gated=False, padded=padded),
        patch=3 * vision.temporal_patch_size * vision.patch_size**2,
        per_token=vision.spatial_merge_size**2,
        merger=merged * (merged + vision.out_hidden_size),
    )


def architecture() -> Architecture:
    """Its fast path."""
    from families.qwen3_5_layers import architecture

    return architecture()


def geometry(config: PretrainedConfig) -> Callable[[Tensor], dict[str, Any]]:
    """Places, pictures and learned positions of patches."""
    from kernels.positions import interpolated_geometry

    return interpolated_geometry(config)


def captured(model: nn.Module) -> Captured:
    """Gated delta layers, attention whose heads are normed, turned in part and gated, and a tower without windows."""
    from families.slot_layers import Attention, Captured, GatedDelta, Layer, centred_norm
    from families.towers import PlainTower
    from kernels.slot_attention import Extras

    language, layers = model.model.language_model, []
    for layer in language.layers:
        if layer.block_type == "linear_attention":
            mixer = GatedDelta(layer.linear_attn)
        else:
            (query, epsilon), (key, _) = map(centred_norm, (layer.self_attn.q_norm, layer.self_attn.k_norm))
            mixer = Attention(layer.self_attn, Extras((query, key), epsilon, gated=True))
        layers.append(Layer(layer, mixer, centred_norm))
    return Captured(layers, centred_norm(language.norm), PlainTower(model.model.visual, geometry(model.config)).see)


FAMILY = replace(
    QWEN2_5_VL,
    model_type="qwen3_5",
    # Of linear attention what is wide; the products behind its gates have a few outputs a token.
    adapters=r".*language_model\.layers\.\d+\."
    r"(self_attn\.[qkvo]_proj|linear_attn\.(in_proj_qkv|in_proj_z|out_proj)|mlp\.(gate|up|down)_proj)",
    shape=shape,
    architecture=architecture,
    geometry=geometry,
    captured=captured,
    activations=("silu", "gelu_pytorch_tanh"),
)
