"""What writes pages here: the engine where it can, else transformers' generate(), and documents end either way.

    for request, written in writer(model, processor, recipe, batch=8).write(requests): ...

Without torch at import, which use_model_from_hub.py does without until it must.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import use_model_from_hub as use
from families import FamilyError, family_of

# Endings of the names of the linear layers whose weights the engine takes, and of those that it knows without a bias.
LINEARS = ("_proj", "qkv", "attn.proj", "lm_head", "_fc1", "_fc2", "in_proj_z", "in_proj_b", "in_proj_a")
UNBIASED = ("o_proj", "out_proj", "gate_proj", "up_proj", "down_proj")

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


def writer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    recipe: use.Recipe,
    batch: int,
    wanted: int | None = None,
    tell: Callable[[str], None] = use.say,
    meanwhile: Callable[[], None] = lambda: None,
) -> Any:
    """A writer of `wanted` answers in all, `batch` at once where generate() writes; the engine decides that itself.
    What cannot be done as it should is told. `meanwhile` is called every few tokens, and ends the writing by raising.
    """
    from writing import endings

    tokenizer, limit = processor.tokenizer, recipe.max_html_tokens
    watch, ends = partial(endings.Watch, tokenizer, limit), partial(endings.Endings, meanwhile=meanwhile)
    if why := endings.obstacle(tokenizer):
        tell(f"pages that do not end are not closed: {why}")
        watch, ends = None, partial(ends, watch=endings.Unwatched)
    if why := obstacle(model):
        tell(f"pages are written by generate(), not by the engine: {why}")
        return use.Generating(model, processor, recipe, batch, ends)
    from writing.engine import Engine

    try:
        engine = Engine(model, processor, recipe, wanted, watch, meanwhile=meanwhile)
    except Exception as error:
        if not use.is_out_of_memory(error):
            raise
        engine = None
    if engine is None:  # out of the except block, which keeps alive what the error's frames hold
        tell(f"pages are written by generate(), not by the engine: no memory for one slot of {limit:,} tokens")
        return use.Generating(model, processor, recipe, batch, ends)
    # Whatever batch was asked for.
    tell(f"pages are written by the engine, {engine.count} at once")
    return engine


def obstacle(model: PreTrainedModel) -> str:
    """Why the engine cannot write with `model`, for people; "" where it can."""
    if model.device.type != "cuda":
        return "there is no GPU"
    import torch

    if model.device.index != torch.cuda.current_device():
        return f"{model.device} is not the current GPU, on which its kernels run (torch.cuda.set_device)"
    if model.dtype.itemsize != 2:
        return f"weights are {model.dtype}, and its kernels take half precision"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return unknown_parts(model)


def unknown_parts(model: PreTrainedModel) -> str:
    """What of `model` the engine does not know; "" where it knows all."""
    try:
        family = family_of(model.config)
    except FamilyError:
        family = None
    if not (family and family.captured):
        return f"it does not know the architecture {model.config.model_type}"
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "the weights are sharded"
    from torch.nn import Linear

    linears = {name: module for name, module in model.named_modules() if name.endswith(LINEARS)}
    # By the class itself: an adapter's, whose weights would be passed over, may have the same name.
    kinds = {type(module) for module in linears.values()} - {Linear}
    if other := {f"{kind.__module__}.{kind.__name__}" for kind in kinds}:
        return f"it does not know layers of {', '.join(sorted(other))}"
    for name, module in linears.items():
        if "language_model" in name and name.endswith(UNBIASED) and module.bias is not None:
            return f"it does not know a bias of {name}"
    text = model.config.get_text_config()
    if (acts := (text.hidden_act, model.config.vision_config.hidden_act)) != family.activations:
        return f"it does not know the activations {acts[0]} and {acts[1]}"
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        return "it does not know sliding windows"
    if (rope := text.rope_parameters["rope_type"]) != "default":
        return f"it does not know rotary positions of the kind {rope}"
    return ""
