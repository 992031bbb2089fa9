"""The final folder: every tensor of the base checkpoint as training has left it, written aside, compared, renamed.

    for key, base, tensor in final_tensors(model, tensors): ...     # (all ranks) what is saved and what is judged
    save_final(model, tensors, base, processor, recipe, folder)     # (all ranks)

Nothing is left half-written: a folder that differs from its base is an error, and never takes the old one's place.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, ProcessorMixin

import use_model_from_hub as use
from training import zero3
from training.base_model import DTYPES, BaseTensor, base_tensors, empty_model, read_safetensors
from training.checkpoints import flush, keep_earlier_folder
from training.errors import (
    DiskError,
    NotFiniteError,
    PipelineError,
    SettingsError,
    is_disk_full,
    is_out_of_memory,
)
from training.fast_layers import narrowed
from training.processes import on_main, rank, together
from training.settings import PageSettings


def final_tensors(
    model: PreTrainedModel, tensors: dict[str, BaseTensor]
) -> Iterator[tuple[str, BaseTensor, torch.Tensor]]:
    """(all ranks) Every tensor of the base checkpoint as training has left it: (key, BaseTensor, tensor).

    Gathered one at a time under ZeRO-3, adapters merged in fp32, rounded to the base's dtype. With quantisation the
    full-precision weight is read from the base's own file. These tensors are what is saved and what evaluation uses.
    """
    weights = {}
    for name, parameter in model.named_parameters():
        weights[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = parameter
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # beneath the adapters
    tied = inner._tied_weights_keys or {}
    scales = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    for key, base in tensors.items():
        weight = weights.get(base.name)
        if weight is None:
            weight = weights[tied[base.name]]
        stem = base.name.removesuffix(".weight")
        down, up = (weights.get(f"{stem}.lora_{part}.default.weight") for part in "AB")
        with zero3.gathered([part for part in (weight, down, up) if part is not None]):
            value = narrowed(weight.detach(), base.shape)
            if type(weight).__name__ == "Params4bit":
                with safe_open(base.file, framework="pt") as file:
                    value = file.get_tensor(key).to(weight.device)
            if down is not None:
                value = value.float() + scales[stem] * (up.detach().float() @ down.detach().float())
            yield key, base, value.to(getattr(torch, DTYPES[base.dtype]))


def save_final(
    model: PreTrainedModel,
    tensors: dict[str, BaseTensor],
    base: Path,
    processor: ProcessorMixin,
    recipe: dict,
    folder: Path,
    keep_earlier: bool = False,
) -> None:
    """(all ranks) Write a folder that loads anywhere, with exactly the base checkpoint's keys, shapes and dtypes.

    Written beside its place and renamed, so that an interrupted save never leaves half a model. What lay there is
    replaced, or with `keep_earlier` moved to a dated name. Raises `PipelineError` when what was written differs from
    the base, naming the difference, `NotFiniteError` for poisoned weights, and `DiskError` where the disk is full.
    """
    state = {}
    for key, _, tensor in final_tensors(model, tensors):
        # Whole on every rank, so that all of them stop here, and none waits in the next gathering.
        if not tensor.isfinite().all():
            raise NotFiniteError(f"not saved: {key} holds NaN or infinite numbers")
        if rank() == 0:
            state[key] = tensor.cpu().clone().contiguous()

    def write() -> None:
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            write_folder(state, tensors, base, processor, recipe, partial)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            if is_disk_full(error):
                raise DiskError(f"no space for {folder} ({error}); nothing half-written is left") from error
            raise
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if keep_earlier:
            keep_earlier_folder(folder)
        elif folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    on_main(write)


def copy_generation_config(base: Path, folder: Path) -> None:
    """(one process) The base's own, as it is: transformers 5.23 refuses to write some that it reads."""
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")


def write_folder(
    state: dict[str, torch.Tensor],
    tensors: dict[str, BaseTensor],
    base: Path,
    processor: ProcessorMixin,
    recipe: dict,
    folder: Path,
) -> None:
    """(main process only) The tensors of `state` and all that belongs to them, compared with the base, on the disk."""
    folder.mkdir(parents=True)
    save_torch_state_dict(state, folder, max_shard_size="5GB", metadata={"format": "pt"})
    # safetensors 0.8 leaves 0600, which a server under another user cannot read.
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)
    # From the base, not from the model in memory, which training has changed (no cache, another dtype).
    AutoConfig.from_pretrained(base, trust_remote_code=recipe["trust_remote_code"]).save_pretrained(folder)
    copy_generation_config(base, folder)
    processor.save_pretrained(folder)
    # Most licences ask that they travel with the weights.
    for terms in (path for name in ("LICENSE*", "NOTICE*") for path in base.glob(name)):
        shutil.copyfile(terms, folder / terms.name)
    (folder / use.RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    compare_tensors(read_safetensors(folder), tensors)
    for file in (path for path in folder.rglob("*") if path.is_file()):
        flush(file)
    flush(folder)


def whole_copy(
    model: PreTrainedModel, tensors: dict[str, BaseTensor], base: Path, settings: PageSettings, device: torch.device
) -> PreTrainedModel:
    """(all ranks) A whole model on each rank, of the very tensors that saving would write, as users will load it.

    `generate` on sharded weights gathers all of them again for every token; a copy gathers once (7 GiB for 3B). Raises
    OutOfMemoryError on every rank where it does not fit on one.
    """
    copy, failure, dtype = None, None, use.best_dtype(device.type)
    try:
        # Made on the CPU, as a user's model is: the rotary frequencies, computed on a GPU, differ in the last bit.
        copy = empty_model(base, "cpu", dtype, settings.trust_remote_code).to(device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failure = error
    # The largest allocation comes before the first collective: ranks that went on would wait there for this one.
    if together(failure is not None, seconds=600):
        raise failure or torch.OutOfMemoryError("another rank has no memory for the copy that writes held-out pages")
    if (base / "generation_config.json").is_file():
        copy.generation_config = GenerationConfig.from_pretrained(base)
    slots = dict(copy.state_dict())
    with torch.no_grad():
        # The very tensors that are saved, rounded and merged: what is judged is what users get.
        for _, tensor, value in final_tensors(model, tensors):
            slots[tensor.name].copy_(value)
    return copy.eval()


def compare_tensors(written: dict, tensors: dict[str, BaseTensor]) -> None:
    """Raise `PipelineError` when a saved checkpoint differs from its base in keys, shapes or dtypes."""
    problems = [f"missing {key}" for key in sorted(tensors.keys() - written.keys())]
    problems += [f"unexpected {key}" for key in sorted(written.keys() - tensors.keys())]
    for key in sorted(tensors.keys() & written.keys()):
        if written[key][:2] != (tensors[key].shape, tensors[key].dtype):
            problems.append(f"{key} is {written[key][:2]}, the base has {(tensors[key].shape, tensors[key].dtype)}")
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise PipelineError("the saved model differs from its base: " + "; ".join(problems[:10]) + more)


def load_weights(model: PreTrainedModel, folder: Path, settings: PageSettings) -> None:
    """The weights of a checkpoint, by their names in the model. The Trainer of transformers 5.23 saves them by their
    older names, looks for the newer ones, finds none, and goes on with the base's weights and a warning."""

    state = {}
    for key, tensor in base_tensors(folder, replace(settings, random_weights=False, plan=False)).items():
        with safe_open(tensor.file, framework="pt") as file:
            state[tensor.name] = file.get_tensor(key)
    missing, _ = model.load_state_dict(state, strict=False)
    missing = set(missing) - set(model._tied_weights_keys or ())
    if missing:
        raise SettingsError(f"{folder} lacks {', '.join(sorted(missing)[:5])}: it is no checkpoint of this model")
