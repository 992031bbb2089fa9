"""What makes a step fast and leaves its result the same.

    use_segment_attention(model)                 # the vision tower's windows in one call instead of one call each
    geometry = image_geometry(model.config)      # in the data workers: what the model would work out on the way
    batch |= geometry(batch["image_grid_thw"])

Nothing of ours is imported, and nothing here changes what is learned: each part equals the model's own way, which the
tests show. Sections: Attention, Geometry.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

# -----------------------------------------------------------------------------
# Attention

# The name must hold "flash": only then does the vision tower hand over its boundaries instead of looping over windows,
# some 2,700 calls a screenshot (transformers 5.23, modeling_qwen2_5_vl.py).
SEGMENT_ATTENTION = "flash_page_segments"


def segment_attention(
    module, query, key, value, attention_mask, scaling, cu_seq_lens_q=None, max_length_q=None, **kwargs
):
    """Attention inside segments. `query`, `key`, `value` (1, heads, S, D), boundaries `cu_seq_lens_q` (segments + 1).

    Returns ((1, S, heads, D), None). On a GPU with half precision one flash kernel takes all segments; elsewhere
    segments of equal length go through SDPA together. Not causal, no dropout: the vision tower has neither.
    """
    import torch

    # The flash kernels need compute capability 8.0; older GPUs, fp32 and CPUs go through SDPA.
    if query.is_cuda and query.element_size() == 2 and torch.cuda.get_device_capability(query.device) >= (8, 0):
        from torch.nn.attention.varlen import varlen_attn

        rows = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]  # (S, heads, D)
        longest = int(max_length_q)
        return varlen_attn(*rows, cu_seq_lens_q, cu_seq_lens_q, longest, longest, scale=scaling)[None], None
    return equal_segments_together(query[0], key[0], value[0], scaling, cu_seq_lens_q.tolist())[None], None


def equal_segments_together(query, key, value, scaling: float, bounds: list[int]):
    """(heads, S, D) to (S, heads, D), one SDPA call for each length that occurs among the segments."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    starts = defaultdict(list)
    for start, end in zip(bounds, bounds[1:]):
        starts[end - start].append(start)
    result = torch.empty_like(query.transpose(0, 1))
    for length, places in starts.items():
        rows = torch.tensor(places, device=query.device)[:, None] + torch.arange(length, device=query.device)  # (n, L)
        parts = [tensor[:, rows].transpose(0, 1) for tensor in (query, key, value)]  # (n, heads, L, D)
        done = scaled_dot_product_attention(*parts, scale=scaling)
        result = result.index_copy(0, rows.flatten(), done.transpose(1, 2).flatten(0, 1))
    return result


def use_segment_attention(model) -> bool:
    """Let the vision tower attend segment by segment; False, and nothing changed, where it has no such attention."""
    from transformers import AttentionInterface

    vision = getattr(model.config, "vision_config", None)
    if getattr(vision, "model_type", "") not in ("qwen2_5_vl", "qwen2_5_vl_vision"):
        return False
    AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
    # Set after loading: asked of from_pretrained, the name would be looked for among the Hub's kernels.
    model.model.visual.config._attn_implementation = SEGMENT_ATTENTION
    return True


# -----------------------------------------------------------------------------
# Geometry


def image_geometry(config) -> Callable | None:
    """A function from `image_grid_thw` (B, 3) to what the vision tower derives from it, as keyword arguments.

    Worked out in the data workers, it costs the GPU no wait. None for architectures whose tower is another one.
    """
    vision = config.vision_config
    if getattr(vision, "model_type", "") not in ("qwen2_5_vl", "qwen2_5_vl_vision"):
        return None
    merge, window, patch = vision.spatial_merge_size, vision.window_size, vision.patch_size

    def geometry(grids) -> dict:
        from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

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


def page_positions(text_before: int, rows: int, columns: int, length: int):
    """Positions (4, length) of one page: the running place, then mRoPE's time, height and width.

    Text counts on from one to the next; the picture's `rows` x `columns` tokens share one moment and spread over height
    and width from there; the text after it begins beyond the larger of the two (Qwen2-VL, Wang et al. 2024, sec. 2.1).
    """
    import torch

    picture = rows * columns
    places = torch.arange(picture)
    height, width = places // columns + text_before, places % columns + text_before
    before = torch.arange(text_before)
    after = torch.arange(length - text_before - picture) + text_before + max(rows, columns)
    moment = torch.full((picture,), text_before)
    parts = [torch.cat([before, part, after]) for part in (moment, height, width)]
    return torch.stack([torch.arange(length), *parts])
