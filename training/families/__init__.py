"""What differs between architectures: one file each, chosen by the `model_type` of config.json, never by a name.

    family = family_of(config)          # or family_of("qwen3_vl"); refuses what it does not know

family.py says what to write for another one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from training.errors import SettingsError
from training.families.family import Family, Picture

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

__all__ = ["FAMILIES", "Family", "Picture", "family_of", "trains_fast"]


def family_of(model: object) -> Family:
    """The family of a configuration, or of a `model_type`. Raises `SettingsError` for one that nobody has written."""
    model_type = model if isinstance(model, str) else model.model_type
    if dense := EXPERTS.get(model_type):
        raise SettingsError(
            f"--base_model is a {model_type}, a mixture of experts, which cannot be trained here; give a dense "
            f"{FAMILIES[dense]} ({dense})"
        )
    if model_type not in FAMILIES:
        known = " or ".join(f"{title} ({name})" for name, title in FAMILIES.items())
        raise SettingsError(
            f"--base_model is a {model_type}; {known} can be trained. Give one of these, or write "
            f"training/families/{model_type}.py as training/families/family.py says"
        )
    return importlib.import_module(f"training.families.{model_type}").FAMILY


def trains_fast(config: PretrainedConfig, settings: Any) -> bool:
    """Whether pages are packed into one row and go through `fast_layers.py`, not padded and the model's own way."""
    return settings.fast and family_of(config).fast
