"""What makes a step fast and leaves its result the same.

    make_fast(model, settings, args, sharded)   # (all ranks) all of it, and a line that says what runs
    align_vision_mlp(model)         # (all ranks) the vision MLPs as wide as tensor cores like
    install(model, fuse=True)       # takes pages packed into one row (packing.pack), each part faster than its own

Nothing here changes what is learned: each part equals the model's own way, which the tests show. Instances get forwards
of their own, no class of transformers is changed. Sections: Fast path, Vision MLP.
"""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from families import Architecture, family_of
from families.elementwise import Elementwise, can_fuse
from families.fast_parts import head_forward, is_plain, layer_forward, parts_of
from kernels.attention import attention_words
from training import zero3
from training.processes import in_columns, say
from training.settings import PageSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

# -----------------------------------------------------------------------------
# Fast path


def architecture_of(model: torch.nn.Module) -> Architecture:
    """What stands for the modules of `model`, of a family that has a fast path: ask families.trains_fast before."""
    return family_of(model.config).architecture()


def make_fast(model: PreTrainedModel, settings: PageSettings, args: TrainingArguments, sharded: bool) -> None:
    """(all ranks) Everything of this room, and a line that says what runs and what could not."""
    obstacle = can_fuse() if settings.fuse == "auto" else ""
    fuse = settings.fuse == "yes" or (settings.fuse == "auto" and not obstacle)
    if fuse:
        # A handful of small kernels: torch's pool of compiling processes would outlive the training by many seconds.
        torch._inductor.config.compile_threads = 1
    # 3,420 columns of Qwen2.5-VL are no multiple of 8, and half-precision products of such fall back to old tensor-core
    # kernels: 16 % of a step. The zeros that fill them up to 3,424 stay zeros, and are cut off again on saving.
    width = align_vision_mlp(model)
    install(model, fuse)
    if sharded:
        zero3.set_leaves(model, architecture_of(model).leaves)
    fused = "fused" if fuse else f"not fused ({obstacle or 'as asked'})"
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    kernel = attention_words(model.config, args.device.type, dtype)
    told, words = f"fast path: pages packed, attention by {kernel}, ", architecture_of(model).words
    told += f"{words(model.config, args.device.type, dtype)}, " if words else ""
    say(in_columns(f"{told}element-wise parts {fused}, vision MLP {width:,} wide"))


def install(model: torch.nn.Module, fuse: bool) -> None:
    """Let `model` (of a family with an `Architecture`, not wrapped) take batches of `pack`, by faster ways to the same
    numbers.

    `fuse` compiles the element-wise parts, where `can_fuse` has nothing against it. A module with another activation
    than those that its family computes keeps its own forward.
    """
    known = architecture_of(model)
    # One set of functions for each tower: their shapes differ, and torch compiles a function for few shapes.
    for name in known.towers:
        fused = Elementwise(fuse, known.elementwise)
        for module in model.get_submodule(name).modules():
            kind = type(module)
            for method, function in known.methods.get(kind, {}).items():
                setattr(module, method, types.MethodType(function, module))
            if kind in known.forwards and computes(known, module):
                module.fused = fused
                module.forward = types.MethodType(known.forwards[kind], module)
            elif kind in known.blocks and computes(known, module) and is_plain(module):
                module.block, module.plain_parts = known.blocks[kind], parts_of(module)
                module.forward = types.MethodType(layer_forward, module)
    model.lm_head.fused = fused  # the last tower's, which is the language model
    model.lm_head.forward = types.MethodType(head_forward, model.lm_head)
    model.forward = types.MethodType(known.model, model)


def computes(known: Architecture, module: torch.nn.Module) -> bool:
    """Whether the activations of `module`, and of all in it, are those that its family computes for their classes."""
    parts = [part for part in module.modules() if type(part) in known.activations]
    return all(type(part.act_fn).__name__ in known.activations[type(part)] for part in parts)


# -----------------------------------------------------------------------------
# Vision MLP


def align_vision_mlp(model: torch.nn.Module, multiple: int = 32) -> int:
    """(all ranks) Widen the vision MLPs with zeros to a multiple of `multiple`, where they are none of 8; returns the
    width that they have then.

    Half-precision products of other widths fall back to old tensor-core kernels. Zeros stay zeros: silu(0) x 0 = 0 and
    gelu(0) = 0, and so are all their gradients. What is saved has to be cut to the base's shapes again (`narrowed`).
    """
    known, width = architecture_of(model), 0
    for block in model.get_submodule(known.vision_layers):
        for name, axis in known.widened.items():
            old = getattr(block.mlp, name)
            shape = [old.out_features, old.in_features]
            width = shape[axis]
            if width % 8:
                width = shape[axis] = math.ceil(width / multiple) * multiple
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
