"""The final folder: every tensor of the base checkpoint as training has left it, written aside, compared, renamed.

    for key, base, tensor in final_tensors(model, tensors): ...     # (all ranks) what is saved and what is judged
    save_final(model, tensors, base, processor, recipe, folder)     # (all ranks)

Nothing is left half-written: a folder that differs from its base is an error, and never takes the old one's place.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from transformers import AutoImageProcessor, GenerationConfig, PreTrainedModel, ProcessorMixin

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
        if base.kept:
            with safe_open(base.file, framework="pt") as file:
                yield key, base, file.get_tensor(key)
            continue
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


# Of the base, all that is not its weights and that something reads: configuration, processor, tokenizer, chat template,
# and the terms, most of which ask that they travel with the weights. Code comes along only where it is trusted.
BASE_FILES = (
    "config.json generation_config.json *processor_config.json tokenizer.json tokenizer_config.json tokenizer.model "
    "special_tokens_map.json added_tokens.json vocab.json merges.txt chat_template.json chat_template.jinja "
    "additional_chat_templates/*.jinja LICENSE* NOTICE*"
).split()


def copy_base_files(base: Path, folder: Path, processor: ProcessorMixin, trust_remote_code: bool) -> None:
    """(one process) The base's own files in the place of any that `folder` has, byte for byte but for the pixel limits.

    Written anew by transformers 5.23, they would be no use to transformers 4, which can read the base's, and some
    generation configurations it refuses to write.
    """
    patterns = [*BASE_FILES, *(["*.py"] if trust_remote_code else [])]
    for earlier in [path for pattern in BASE_FILES for path in folder.glob(pattern)]:
        earlier.unlink()
    # With its config.json, a checkpoint of adapters would look like a whole model.
    left_out = {"config.json"} if (folder / "adapter_config.json").is_file() else set()
    for source in [path for pattern in patterns for path in base.glob(pattern) if path.is_file()]:
        if source.name not in left_out:
            place = folder / source.relative_to(base)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, place)
    own = AutoImageProcessor.from_pretrained(base, trust_remote_code=trust_remote_code)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            write_limits(folder / name, own.to_dict(), processor.image_processor.to_dict())


# The limits of Qwen's processors, as areas: transformers 5's name of each, and the one that older files have as well.
AREAS = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}


def write_limits(path: Path, own: dict, trained: dict) -> None:
    """What training changed of an image processor, from `own` to `trained`, into its file, by the names found there.

    Nothing but the limits is ever changed; a file that has them already stays as it is, byte for byte.
    """
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    options = content if path.name == "preprocessor_config.json" else content.get("image_processor")
    changed = {name: value for name, value in trained.items() if own.get(name) != value}
    if options is None or not changed:
        return
    for name, value in changed.items():
        if name != "size" or "merge_size" not in trained:
            options[name] = dict(value) if isinstance(value, Mapping) else value
            continue
        for edge, limit in dict(value).items():
            if own["size"].get(edge) == limit:
                continue
            size = options.get("size") or {}
            places = [(options, AREAS[edge]), (size, AREAS[edge]), (size, edge)]
            places = [(where, known) for where, known in places if where.get(known) is not None]
            for where, known in places or [(options, AREAS[edge])]:
                where[known] = limit
    indent = re.match(r"\{\s*?\n([ \t]+)", text)
    end = text[len(text.rstrip()) :]
    path.write_text(json.dumps(content, indent=indent and indent[1], ensure_ascii=False) + end, encoding="utf-8")


SHARD_SIZE = "5GB"  # of a file of weights; more become several, with the index that transformers and vLLM read


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
    save_torch_state_dict(state, folder, max_shard_size=SHARD_SIZE, metadata={"format": "pt"})
    # safetensors 0.8 leaves 0600, which a server under another user cannot read.
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)
    copy_base_files(base, folder, processor, recipe["trust_remote_code"])
    (folder / use.RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    compare_tensors(read_safetensors(folder), tensors)
    for file in (path for path in folder.rglob("*") if path.is_file()):
        flush(file)
    flush(folder)


def unset_on(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """`model` with its buffers on `device` and new parameters there, unset and tied as before: to move what is not set
    yet took two seconds of each evaluation of 3B."""
    moved: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, part in module.named_parameters(recurse=False, remove_duplicate=False):
            if part not in moved:
                moved[part] = torch.nn.Parameter(torch.empty_like(part, device=device), part.requires_grad)
            setattr(module, name, moved[part])
    return model.to(device)


def whole_copy(
    model: PreTrainedModel, tensors: dict[str, BaseTensor], base: Path, settings: PageSettings, device: torch.device
) -> PreTrainedModel:
    """(all ranks) A whole model on each rank, of the very tensors that saving would write, as users will load it.

    `generate` on sharded weights gathers all of them again for every token; a copy gathers once (7 GiB for 3B). Raises
    OutOfMemoryError on every rank where it does not fit on one.
    """
    copy, failure, dtype = None, None, use.best_dtype(device.type)
    zero3.release_whole(model)  # as large as the copy, which is made out of the shards
    try:
        # Made on the CPU, as a user's model is: the rotary frequencies, computed on a GPU, differ in the last bit.
        copy = unset_on(empty_model(base, "cpu", dtype, settings.trust_remote_code), device)
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
            if not tensor.kept:
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
    stored = replace(settings, base_model=str(folder), random_weights=False, plan=False)
    for key, tensor in base_tensors(folder, stored).items():
        with safe_open(tensor.file, framework="pt") as file:
            state[tensor.name] = file.get_tensor(key)
    missing, _ = model.load_state_dict(state, strict=False)
    missing = set(missing) - set(model._tied_weights_keys or ())
    if missing:
        raise SettingsError(f"{folder} lacks {', '.join(sorted(missing)[:5])}: it is no checkpoint of this model")
