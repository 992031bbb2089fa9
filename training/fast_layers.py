"""What makes a step fast and leaves its result the same.

    make_fast(model, settings, args, sharded)   # (all ranks) all of it, and a line that says what runs
    align_vision_mlp(model)         # (all ranks) the vision MLPs as wide as tensor cores like
    install(model, fuse=True)       # takes pages packed into one row (packing.pack), each part faster than its own

Nothing here changes what is learned: each part equals the model's own way, which the tests show. Instances get forwards
of their own, no class of transformers is changed. Sections: Architectures, Vision MLP.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from families.elementwise import Elementwise, can_fuse
from families.fast_parts import (
    head_forward,
    language_attention,
    language_block,
    layer_forward,
    mlp_forward,
    norm_forward,
    packed_forward,
    patch_forward,
    vision_attention,
    vision_block,
)
from kernels.attention import attention_words
from training import zero3
from training.processes import in_columns, say
from training.settings import PageSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

# -----------------------------------------------------------------------------
# Architectures: the one place that says what is known of each. Another one needs a function like `qwen2_5_vl`, forwards
# for those of its modules that differ, its line in ARCHITECTURES, and `fast` in its file under families/


@dataclass(frozen=True)
class Architecture:
    """What runs instead of transformers' own modules, by their classes.

    `forwards` take the place of one module's forward, `blocks` of a whole layer's (by `layer_forward`), `model` of the
    model's. A subclass may compute something else, so only the very classes count.
    """

    forwards: dict[type, Callable]
    blocks: dict[type, Callable]
    model: Callable

    @property
    def leaves(self) -> list[str]:
        """The classes that ZeRO-3 fetches whole (zero3.set_leaves): its layers."""
        return [layer.__name__ for layer in self.blocks]


def qwen2_5_vl() -> Architecture:
    """Qwen2.5-VL, on which Holo1 is built (transformers 5.23)."""
    # Not at the top: transformers' modules take seconds, and an architecture is needed only where it is trained.
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as own

    return Architecture(
        forwards={
            own.Qwen2_5_VLRMSNorm: norm_forward,
            own.Qwen2_5_VLMLP: mlp_forward,
            own.Qwen2MLP: mlp_forward,
            own.Qwen2_5_VLAttention: language_attention,
            own.Qwen2_5_VLVisionAttention: vision_attention,
            torch.nn.Conv3d: patch_forward,
        },
        blocks={own.Qwen2_5_VLDecoderLayer: language_block, own.Qwen2_5_VLVisionBlock: vision_block},
        model=packed_forward,
    )


# By the `model_type` of config.json, those whose family says `fast`; others train their own way, with padded rows.
ARCHITECTURES = {"qwen2_5_vl": qwen2_5_vl}
# mlp_forward's own activation, by the names that torch and transformers give it.
SILU = ("SiLU", "SiLUActivation")


def architecture_of(model: torch.nn.Module) -> Architecture:
    """Raises KeyError for a model whose `model_type` is not in ARCHITECTURES: ask families.trains_fast before."""
    return ARCHITECTURES[model.config.model_type]()


def make_fast(model: PreTrainedModel, settings: PageSettings, args: TrainingArguments, sharded: bool) -> None:
    """(all ranks) Everything of this room, and a line that says what runs and what could not."""
    obstacle = can_fuse() if settings.fuse == "auto" else ""
    fuse = settings.fuse == "yes" or (settings.fuse == "auto" and not obstacle)
    if fuse:
        # A handful of small kernels: torch's pool of compiling processes would outlive the training by many seconds.
        torch._inductor.config.compile_threads = 1
    # 3,420 columns are no multiple of 8, and half-precision products of such fall back to old tensor-core kernels: 16 %
    # of a step. The zeros that fill them up to 3,424 stay zeros, and are cut off again on saving.
    width = align_vision_mlp(model)
    install(model, fuse)
    if sharded:
        zero3.set_leaves(model, architecture_of(model).leaves)
    fused = "fused" if fuse else f"not fused ({obstacle or 'as asked'})"
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    kernel = attention_words(model.config, args.device.type, dtype)
    told = f"fast path: pages packed, attention by {kernel}, element-wise parts {fused}, vision MLP {width:,} wide"
    say(in_columns(told))


def install(model: torch.nn.Module, fuse: bool) -> None:
    """Let `model` (of ARCHITECTURES, not wrapped) take batches of `pack`, by faster ways to the same numbers.

    `fuse` compiles the element-wise parts, where `can_fuse` has nothing against it. A module whose MLP has another
    activation than silu keeps its own forward.
    """
    known = architecture_of(model)
    # One set of functions for each tower: their shapes differ, and torch compiles a function for few shapes.
    for part in (model.model.visual, model.model.language_model):
        fused = Elementwise(fuse)
        for module in part.modules():
            if type(module) in known.forwards and activation_of(module) in ("NoneType", *SILU):
                module.fused = fused
                module.forward = types.MethodType(known.forwards[type(module)], module)
            elif type(module) in known.blocks and activation_of(module.mlp) in SILU:
                module.block = known.blocks[type(module)]
                module.forward = types.MethodType(layer_forward, module)
    model.lm_head.fused = fused  # the language model's, which is the second of the two
    model.lm_head.forward = types.MethodType(head_forward, model.lm_head)
    model.forward = types.MethodType(known.model, model)


def activation_of(module: torch.nn.Module) -> str:
    """The class of a module's `act_fn`, by name; "NoneType" for a module that has none."""
    return type(getattr(module, "act_fn", None)).__name__


# -----------------------------------------------------------------------------
# Vision MLP


def align_vision_mlp(model: torch.nn.Module, multiple: int = 32) -> int:
    """(all ranks) Widen the vision MLPs with zeros to a multiple of `multiple`; returns the new width.

    3,420 is no multiple of 8, so half-precision products fall back to old tensor-core kernels. Zeros stay zeros:
    silu(0) x 0 = 0, and so are all their gradients. What is saved has to be cut to the base's shapes again
    (`narrowed`).
    """
    width = 0
    for block in model.model.visual.blocks:
        for name in ("gate_proj", "up_proj", "down_proj"):
            old = getattr(block.mlp, name)
            shape = [old.out_features, old.in_features]
            axis = 1 if name == "down_proj" else 0
            width = shape[axis] = math.ceil(shape[axis] / multiple) * multiple
            # Wide enough already, as all other blocks are, then.
            if shape == [old.out_features, old.in_features]:
                return width
            options = {"bias": old.bias is not None, "dtype": old.weight.dtype, "device": old.weight.device}
            with zero3.sharded_from_birth():
                new = torch.nn.Linear(shape[1], shape[0], **options)
            with zero3.gathered([*old.parameters(), *new.parameters()], writer=0), torch.no_grad():
                for part, narrow in old.named_parameters():
                    wide = getattr(new, part)
                    wide.zero_()[tuple(map(slice, narrow.shape))] = narrow
                    # A frozen tower, which was frozen before it came here, stays so.
                    wide.requires_grad_(narrow.requires_grad)
            new.register_load_state_dict_pre_hook(widen)
            setattr(block.mlp, name, new)
    return width


def widen(module: torch.nn.Module, state: dict[str, torch.Tensor], prefix: str, *unused) -> None:
    """Saved weights have the base's shapes; a checkpoint that is resumed is widened on its way in: a hook of torch's
    `load_state_dict`, which changes `state`."""
    for name, parameter in module.named_parameters():
        narrow = state.get(prefix + name)
        if narrow is not None and narrow.dim() == parameter.dim() and narrow.shape != parameter.shape:
            # `pad` counts from the last dimension, before and after each; zeros are added after.
            missing = [wide - now for wide, now in zip(parameter.shape, narrow.shape)]
            padding = [side for size in reversed(missing) for side in (0, size)]
            state[prefix + name] = torch.nn.functional.pad(narrow, padding)


def narrowed(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The part of a widened tensor that the base has, of the base's `shape`; a view."""
    return tensor[tuple(map(slice, shape))]
