"""What differs between architectures: one file each, chosen by the `model_type` of config.json, never by a name.

    qwen = family_of(config)            # or family_of("qwen3_vl"); refuses what it does not know

Rooms from top to bottom; each may import those below it, and none above:

    qwen3_5         what Qwen3.5 has of its own
    qwen3_5_layers  its layers on packed pages
    qwen3_vl        what Qwen3-VL has of its own
    qwen2_5_vl      what Qwen2.5-VL has of its own
    family          the list of what to write for another one
    fp8_parts       the products of layers in fp8, and beside those in bf16
    fast_parts      layers that take packed pages, which families share
    elementwise     the element-wise parts of layers, fused
    towers          vision towers without gradients, for reading
    slot_layers     layers that read pages into slots and write from there
    chunked_loss    the loss on supervised tokens alone, in chunks
    page_costs      how many operations a page costs

Training and writing ask one file a family for all that differs, and import none of them by name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from families.family import Architecture, Family, FamilyError, Picture

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Each file of this folder by its model_type, and what people call these models. Another architecture: one line here.
FAMILIES = {
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_5": "Qwen3.5",
}

# Mixtures of experts, and the dense members of their line: their experts' weights are merged as transformers loads them
# (5.23), so that nothing could be saved by the base's keys, and no adapter finds a projection in them.
EXPERTS = {"qwen3_vl_moe": "qwen3_vl", "qwen3_5_moe": "qwen3_5"}

__all__ = ["FAMILIES", "Architecture", "Family", "FamilyError", "Picture", "family_of", "trains_fast"]


def family_of(model: object) -> Family:
    """The family of a configuration, or of a `model_type`. Raises `FamilyError` for one that nobody has written."""
    model_type = model if isinstance(model, str) else model.model_type
    if dense := EXPERTS.get(model_type):
        raise FamilyError(
            f"a {model_type}, a mixture of experts, which cannot be trained here; give a dense {FAMILIES[dense]} "
            f"({dense})"
        )
    if model_type not in FAMILIES:
        *others, last = (f"{title} ({name})" for name, title in FAMILIES.items())
        known = f"{', '.join(others)} or {last}"
        raise FamilyError(
            f"a {model_type}; {known} can be trained. Give one of these, or write families/{model_type}.py as "
            "families/family.py says"
        )
    return importlib.import_module(f"families.{model_type}").FAMILY


def trains_fast(config: PretrainedConfig, settings: Any) -> bool:
    """Whether pages are packed into one row and go through fast layers, not padded and the model's own way."""
    return settings.fast and family_of(config).fast
