"""What a page costs: weights that multiply, floating-point operations, seconds, and steps of equal cost. No memory.

    flops = page_flops(config, tokens=2_800, supervised=1_500, patches=5_000)
    page_seconds(flops, peak_tflops("NVIDIA H200"))
    deal(costs, bins=8)             # the pages of a step in groups that take equally long

Imports neither torch nor anything of ours: the numbers that the plan and the layers share stand here, below both.
"""

from __future__ import annotations

from collections.abc import Sequence

LOSS_ROWS = 2_048  # rows of logits that exist at once: 0.6 GiB in bf16 for 151,936 words

# Dense bf16 TFLOP/s by NVIDIA's datasheets; the first name that the device's own contains.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165}
PEAK_TFLOPS |= {"B200": 2250}


def peak_tflops(device: str) -> float | None:
    """What the device can do at most; None where it is not known."""
    return next((tflops for name, tflops in PEAK_TFLOPS.items() if name in device), None)


def page_flops(config, tokens: int, supervised: int, patches: int) -> float:
    """Floating-point operations that one page needs, forward and backward: products and attention, nothing recomputed.

    6 per weight and token, as Kaplan et al. 2020 count, the head for supervised tokens only; causal attention half.
    """
    text, vision = config.get_text_config(), config.vision_config
    language, head, tower, merger = parameters(config)
    attention = 12 * text.num_hidden_layers * text.hidden_size * tokens**2 / 2
    whole = len(getattr(vision, "fullatt_block_indexes", range(vision.depth)))  # Qwen3-VL has no windows
    window = (getattr(vision, "window_size", 0) // vision.patch_size) ** 2
    seen = whole * patches + (vision.depth - whole) * min(window, patches)
    merged = merger * patches / vision.spatial_merge_size**2
    products = 6 * (language * tokens + head * supervised + tower * patches + merged)
    return products + attention + 12 * vision.hidden_size * patches * seen


def parameters(config) -> tuple[int, int, int, int]:
    """Weights that multiply: (language layers, head, vision blocks, merger)."""
    text, vision = config.get_text_config(), config.vision_config
    narrow = text.hidden_size * text.num_key_value_heads // text.num_attention_heads
    layer = 2 * text.hidden_size * (text.hidden_size + narrow) + 3 * text.hidden_size * text.intermediate_size
    block = 4 * vision.hidden_size**2 + 3 * vision.hidden_size * vision.intermediate_size
    wide = vision.hidden_size * vision.spatial_merge_size**2
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2 * vision.hidden_size
    head = text.hidden_size * text.vocab_size
    return layer * text.num_hidden_layers, head, block * vision.depth + patch, wide * (wide + vision.out_hidden_size)


def weights_of(config) -> tuple[int, int, int]:
    """Weights of (language layers and norms, vision tower and merger, embedding and head)."""
    language, head, tower, merger = parameters(config)
    tied = getattr(config, "tie_word_embeddings", False) or config.get_text_config().tie_word_embeddings
    return language, tower + merger, head if tied else 2 * head


USED_SHARE = 0.45  # of a GPU's peak that a step can reach


def page_seconds(flops: float, tflops: float | None) -> float:
    """Seconds that a page of `flops` keeps a GPU of `tflops` (by its datasheet; unknown: an H100's) busy."""
    return flops / (USED_SHARE * (tflops or 989) * 1e12)


def deal(costs: Sequence[float], bins: int) -> list[list[int]]:
    """Places 0..len(costs)-1 in `bins` groups of equal size (one more in some, if they do not divide) and cost.

    The dearest first, each to the cheapest group with room (LPT, Graham 1969); groups come back dearest first.
    """
    groups: list[list[int]] = [[] for _ in range(bins)]
    sums = [0.0] * bins
    room = [len(costs) // bins + (place < len(costs) % bins) for place in range(bins)]
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        chosen = min((group for group in range(bins) if len(groups[group]) < room[group]), key=lambda g: (sums[g], g))
        groups[chosen].append(place)
        sums[chosen] += costs[place]
    return [groups[group] for group in sorted(range(bins), key=lambda group: (-sums[group], group))]
