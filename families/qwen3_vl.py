"""Qwen3-VL: patches of 16 x 16 pixels, four of which become one token of 32 x 32.

No windows, an MLP without a gate in the vision tower, heads whose width is no share of the hidden one, and mergers of
their own for the layers whose states go into the language model deep down (DeepStack). It trains on the plain path.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from families.page_costs import Shape, Tower
from families.qwen2_5_vl import FAMILY as QWEN2_5_VL

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from families.slot_layers import Captured


def shape(config: PretrainedConfig) -> Shape:
    """The widths by which costs are counted, from the configuration; DeepStack adds a merger for each of its layers."""
    text, vision = config.get_text_config(), config.vision_config
    queries, keys = (text.head_dim * heads for heads in (text.num_attention_heads, text.num_key_value_heads))
    merged = vision.hidden_size * vision.spatial_merge_size**2
    mergers = 1 + len(vision.deepstack_visual_indexes)
    width = vision.hidden_size
    return Shape(
        language=Tower(text.num_hidden_layers, text.hidden_size, queries, keys, text.intermediate_size),
        vocabulary=text.vocab_size,
        tied=config.tie_word_embeddings,  # the text configuration has no such field (transformers 5.23)
        vision=Tower(vision.depth, width, width, width, vision.intermediate_size, gated=False),
        patch=3 * vision.temporal_patch_size * vision.patch_size**2,
        per_token=vision.spatial_merge_size**2,
        merger=mergers * merged * (merged + vision.out_hidden_size),
    )


def captured(model: nn.Module) -> Captured:
    """Grouped-query attention whose heads are normed, and a tower without windows."""
    from families.slot_layers import Attention, Captured, Layer, plain_norm
    from families.towers import PlainTower
    from kernels.slot_attention import Extras

    language, layers = model.model.language_model, []
    for layer in language.layers:
        (query, epsilon), (key, _) = (plain_norm(norm) for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm))
        layers.append(Layer(layer, Attention(layer.self_attn, Extras((query, key), epsilon)), plain_norm))
    return Captured(layers, plain_norm(language.norm), PlainTower(model.model.visual).see)


FAMILY = replace(
    QWEN2_5_VL,
    model_type="qwen3_vl",
    shape=shape,
    architecture=None,
    geometry=None,
    captured=captured,
    activations=("silu", "gelu_pytorch_tanh"),
)
