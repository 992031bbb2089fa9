"""Where tokens and patches stand: mRoPE's positions of a page, and what the vision tower derives from a picture's size.

inputs |= image_geometry(model.config)(grids)
positions = page_positions(before, rows, columns, length)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)


def image_geometry(config: PretrainedConfig) -> Callable[[torch.Tensor], dict[str, Any]]:
    """A function from `image_grid_thw` (B, 3) to what the vision tower derives from it, as keyword arguments.

    Worked out in the data workers, it costs the GPU no wait.
    """
    vision = config.vision_config
    merge, window, patch = vision.spatial_merge_size, vision.window_size, vision.patch_size

    def geometry(grids: torch.Tensor) -> dict[str, Any]:
        index, windows = get_vision_window_index(grids, merge, window, patch)
        bounds = get_vision_cu_seqlens(grids)
        return {
            "image_position_ids": get_vision_position_ids(grids, merge),
            "image_cu_seqlens": bounds,
            "image_max_seqlen": int(bounds.diff().max()),
            "image_window_index": index,
            "image_cu_window_seqlens": windows,
            "image_max_window_seqlen": int(windows.diff().max()),
        }

    return geometry


def interpolated_geometry(config: PretrainedConfig) -> Callable[[torch.Tensor], dict[str, Any]]:
    """As `image_geometry`, for a tower without windows whose learned positions, a square of them, are stretched over
    each picture (Qwen3-VL, Qwen3.5): with the four of them between which each patch stands, and their shares. These as
    the integers of the same bits: under DeepSpeed the Trainer (transformers 5.23) makes half precision of what is a
    float, and the model's own are in fp32."""
    vision = config.vision_config
    merge, side = vision.spatial_merge_size, int(vision.num_position_embeddings**0.5)

    def geometry(grids: torch.Tensor) -> dict[str, Any]:
        options = {"num_grid_per_side": side, "mode": "bilinear", "align_corners": True, "spatial_merge_size": merge}
        places, shares = get_vision_interpolation_indices_and_weights(grids, **options)
        bounds = get_vision_cu_seqlens(grids)
        return {
            "image_position_ids": get_vision_position_ids(grids, merge),
            "image_cu_seqlens": bounds,
            "image_max_seqlen": int(bounds.diff().max()),
            "image_interp_indices": places,
            "image_interp_bits": shares.view(torch.int32),
        }

    return geometry


def page_positions(text_before: int, rows: int, columns: int, length: int) -> torch.Tensor:
    """Positions (4, length) of one page: the running place, then mRoPE's time, height and width.

    Text counts on from one to the next; the picture's `rows` x `columns` tokens share one moment and spread over height
    and width from there; the text after it begins beyond the larger of the two (Qwen2-VL, Wang et al. 2024, sec. 2.1).
    """
    picture = rows * columns
    places = torch.arange(picture)
    height, width = places // columns + text_before, places % columns + text_before
    before = torch.arange(text_before)
    after = torch.arange(length - text_before - picture) + text_before + max(rows, columns)
    moment = torch.full((picture,), text_before)
    parts = [torch.cat([before, part, after]) for part in (moment, height, width)]
    return torch.stack([torch.arange(length), *parts])
