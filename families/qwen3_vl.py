"""Qwen3-VL: patches of 16 x 16 pixels, four of which become one token of 32 x 32.

No windows, an MLP without a gate and learned positions in the vision tower, norms of each head in the language model,
heads whose width is no share of the hidden one, and mergers of their own for the layers whose states go into the
language model deep down (DeepStack).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from families.family import Architecture
from families.page_costs import Shape, Tower, head_padding
from families.qwen2_5_vl import FAMILY as QWEN2_5_VL

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

    from families.slot_layers import Captured


def shape(config: PretrainedConfig) -> Shape:
    """The widths by which costs are counted, from the configuration; DeepStack adds a merger for each of its layers."""
    text, vision = config.get_text_config(), config.vision_config
    queries, keys = (text.head_dim * heads for heads in (text.num_attention_heads, text.num_key_value_heads))
    merged = vision.hidden_size * vision.spatial_merge_size**2
    mergers = 1 + len(vision.deepstack_visual_indexes)
    width, padded = vision.hidden_size, head_padding(vision.hidden_size, vision.num_heads)
    return Shape(
        language=Tower(
            text.num_hidden_layers, text.hidden_size, queries, keys, text.intermediate_size, normed_heads=True
        ),
        vocabulary=text.vocab_size,
        tied=config.tie_word_embeddings,  # the text configuration has no such field (transformers 5.23)
        vision=Tower(vision.depth, width, width, width, vision.intermediate_size, gated=False, padded=padded),
        patch=3 * vision.temporal_patch_size * vision.patch_size**2,
        per_token=vision.spatial_merge_size**2,
        merger=mergers * merged * (merged + vision.out_hidden_size),
        mergers=mergers,
    )


def architecture() -> Architecture:
    """Its fast path (transformers 5.23)."""
    import torch
    from transformers.models.qwen3_vl import modeling_qwen3_vl as own

    import families.fast_parts as fast

    return Architecture(
        model=fast.packed_forward,
        forwards={
            own.Qwen3VLTextRMSNorm: fast.norm_forward,
            own.Qwen3VLTextMLP: fast.mlp_forward,
            own.Qwen3VLTextAttention: fast.language_attention,
            own.Qwen3VLVisionAttention: fast.vision_attention,
            torch.nn.Conv3d: fast.patch_forward,
        },
        methods={own.Qwen3VLTextModel: {"_deepstack_process": fast.add_at_places}},
        blocks={own.Qwen3VLTextDecoderLayer: fast.language_block, own.Qwen3VLVisionBlock: fast.vision_gelu_block},
        activations={own.Qwen3VLTextMLP: fast.SILU, own.Qwen3VLVisionMLP: fast.GELU},
        widened={"linear_fc1": 0, "linear_fc2": 1},
    )


def geometry(config: PretrainedConfig) -> Callable[[Tensor], dict[str, Any]]:
    """Places, pictures and learned positions of patches."""
    from kernels.positions import interpolated_geometry

    return interpolated_geometry(config)


def captured(model: nn.Module) -> Captured:
    """Grouped-query attention whose heads are normed, and a tower without windows."""
    from families.slot_layers import Attention, Captured, Layer, plain_norm
    from families.towers import PlainTower
    from kernels.slot_attention import Extras

    language, layers = model.model.language_model, []
    for layer in language.layers:
        (query, epsilon), (key, _) = map(plain_norm, (layer.self_attn.q_norm, layer.self_attn.k_norm))
        layers.append(Layer(layer, Attention(layer.self_attn, Extras((query, key), epsilon)), plain_norm))
    return Captured(layers, plain_norm(language.norm), PlainTower(model.model.visual, geometry(model.config)).see)


FAMILY = replace(
    QWEN2_5_VL,
    model_type="qwen3_vl",
    shape=shape,
    architecture=architecture,
    geometry=geometry,
    captured=captured,
    activations=("silu", "gelu_pytorch_tanh"),
)
