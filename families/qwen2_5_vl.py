"""Qwen2.5-VL, on which Holo1 is built: patches of 14 x 14 pixels, four of which become one token of 28 x 28.

Most layers of its vision tower attend inside windows. Qwen3-VL's pictures are made and joined in the same way, so it
takes these functions from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import use_model_from_hub as use
from families.family import Architecture, Family, Picture
from families.page_costs import Shape, Tower, head_padding

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn
    from transformers import PretrainedConfig, ProcessorMixin

    from families.slot_layers import Captured


def image_tokens(processor: ProcessorMixin, width: int, height: int) -> int:
    """Tokens of a screenshot of `width` x `height` pixels: its patches, after resizing, by `merge_size` squared."""
    patches = processor.image_processor.get_number_of_image_patches(height, width, {})
    return patches // processor.image_processor.merge_size**2


def most_image_tokens(config: PretrainedConfig, most_pixels: int) -> int:
    """The processor resizes to whole tokens and to no more than `most_pixels`."""
    vision = config.vision_config
    return most_pixels // (vision.patch_size * vision.spatial_merge_size) ** 2


def pictures(processor: ProcessorMixin, screenshots: list[Image]) -> list[Picture]:
    """`pixel_values` (patches, dim) and `image_grid_thw` (3,), time x height x width in patches, of each screenshot."""
    features = processor.image_processor(images=screenshots, return_tensors="pt")
    grids = features["image_grid_thw"]
    sizes = grids.prod(dim=1).tolist()
    merged, token = processor.image_processor.merge_size**2, processor.image_token_id
    return [
        Picture([token] * (size // merged), {"pixel_values": pixels, "image_grid_thw": grid})
        for size, pixels, grid in zip(sizes, features["pixel_values"].split(sizes), grids)
    ]


def join(pictures: Sequence[Picture]) -> dict[str, Tensor]:
    """`pixel_values` (patches of all, dim), since pictures differ in size, and `image_grid_thw` (B, 3)."""
    import torch

    return {
        "pixel_values": torch.cat([picture.inputs["pixel_values"] for picture in pictures]),
        "image_grid_thw": torch.stack([picture.inputs["image_grid_thw"] for picture in pictures]),
    }


def shape(config: PretrainedConfig) -> Shape:
    """The widths by which costs are counted, from the configuration."""
    text, vision = config.get_text_config(), config.vision_config
    keys = text.hidden_size * text.num_key_value_heads // text.num_attention_heads
    merged = vision.hidden_size * vision.spatial_merge_size**2
    return Shape(
        language=Tower(text.num_hidden_layers, text.hidden_size, text.hidden_size, keys, text.intermediate_size),
        vocabulary=text.vocab_size,
        tied=getattr(config, "tie_word_embeddings", False) or text.tie_word_embeddings,
        vision=Tower(
            vision.depth,
            vision.hidden_size,
            vision.hidden_size,
            vision.hidden_size,
            vision.intermediate_size,
            windowed=vision.depth - len(vision.fullatt_block_indexes),
            window=(vision.window_size // vision.patch_size) ** 2,
            padded=head_padding(vision.hidden_size, vision.num_heads),
        ),
        patch=3 * vision.temporal_patch_size * vision.patch_size**2,
        per_token=vision.spatial_merge_size**2,
        merger=merged * (merged + vision.out_hidden_size),
    )


def architecture() -> Architecture:
    """Its fast path (transformers 5.23)."""
    # Not at the top: they take seconds, and an architecture is needed only where a model is loaded.
    import torch
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as own

    import families.fast_parts as fast

    return Architecture(
        model=fast.packed_forward,
        forwards={
            own.Qwen2_5_VLRMSNorm: fast.norm_forward,
            own.Qwen2_5_VLMLP: fast.mlp_forward,
            own.Qwen2MLP: fast.mlp_forward,
            own.Qwen2_5_VLAttention: fast.language_attention,
            own.Qwen2_5_VLVisionAttention: fast.vision_attention,
            torch.nn.Conv3d: fast.patch_forward,
        },
        blocks={own.Qwen2_5_VLDecoderLayer: fast.language_block, own.Qwen2_5_VLVisionBlock: fast.vision_block},
        activations={own.Qwen2_5_VLMLP: fast.SILU, own.Qwen2MLP: fast.SILU},
        widened={"gate_proj": 0, "up_proj": 0, "down_proj": 1},
    )


def geometry(config: PretrainedConfig) -> Callable[[Tensor], dict[str, Any]]:
    """Places, pictures and windows of patches."""
    from kernels.positions import image_geometry

    return image_geometry(config)


def captured(model: nn.Module) -> Captured:
    """Grouped-query attention in each layer, and a tower with windows."""
    from families.slot_layers import Attention, Captured, Layer, plain_norm
    from families.towers import WindowedTower

    language = model.model.language_model
    layers = [Layer(layer, Attention(layer.self_attn), plain_norm) for layer in language.layers]
    return Captured(layers, plain_norm(language.norm), WindowedTower(model.model.visual, geometry(model.config)).see)


FAMILY = Family(
    model_type="qwen2_5_vl",
    vision=("model.visual",),  # "visual" alone matches nothing (transformers 5.23)
    adapters=r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
    limit_pixels=use.limit_pixels,
    image_tokens=image_tokens,
    most_image_tokens=most_image_tokens,
    pictures=pictures,
    join=join,
    shape=shape,
    token_types=True,  # without them positions silently become one-dimensional (transformers 5.23)
    architecture=architecture,
    geometry=geometry,
    captured=captured,
)
