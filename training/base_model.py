"""The base model: its folder, its architecture without weights, and every tensor of its checkpoint.

    base = fetch_base(settings)                     # a folder, downloaded where the name is the Hub's
    tensors = base_tensors(base, settings)          # what a final folder must hold, by the checkpoint's own keys

Nothing here trains: what a base holds decides what a final folder has to hold, key by key. A base that lacks a weight
is refused: transformers would fill it with random numbers and only warn.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key, revert_weight_conversion
from transformers.initialization import no_init_weights

import use_model_from_hub as use
from families import FamilyError, family_of
from training import zero3
from training.errors import SettingsError
from training.settings import PageSettings

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # of weights: safetensors' name, torch's name


@dataclass(frozen=True)
class BaseTensor:
    """One tensor of the base checkpoint: its name in the loaded model, shape, dtype, and file (None: no weights).

    One that is `kept` is no weight of the model, by transformers' own list, as Qwen3.5's layers that draft tokens ahead
    (mtp): the final folder holds it as the base does, and its name is its key.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path | None
    kept: bool = False


def fetch_base(settings: PageSettings) -> Path:
    """(main process only) The folder of the base model, downloaded when it is on the Hub."""
    if Path(settings.base_model).is_dir():
        return Path(settings.base_model)
    wanted = ["*.json", "*.txt", "*.jinja", "*.model", "README.md", "LICENSE*", "NOTICE*", "*.py"]
    looks = settings.plan or settings.show_supervision
    wanted += [] if settings.random_weights or looks else ["*.safetensors"]
    try:
        return Path(snapshot_download(settings.base_model, revision=settings.base_revision, allow_patterns=wanted))
    except LocalEntryNotFoundError as error:
        raise SettingsError(
            f"--base_model {settings.base_model} is not in the cache, and the Hub does not answer; wait for the "
            "network, or give a folder"
        ) from error
    except (HfHubHTTPError, ValueError) as error:
        raise SettingsError(
            f"--base_model {settings.base_model} cannot be fetched: {error}; check the name, the network, and "
            "`hf auth login` for a gated model"
        ) from error


def load_config(base: Path, settings: PageSettings) -> PretrainedConfig:
    """The configuration of the model in the folder `base`; a model's own code runs only where the settings trust it.

    Raises `SettingsError` for one that cannot be read, or of a family that nobody has written.
    """
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, StrictDataclassError) as error:  # the last one of values that contradict each other
        raise SettingsError(f"--base_model {settings.base_model} has no configuration that loads: {error}") from error
    try:
        family_of(config)
    except FamilyError as error:
        raise SettingsError(f"--base_model {settings.base_model} is {error}") from error
    return config


def load_processor(base: Path, settings: PageSettings) -> ProcessorMixin:
    """Tokenizer and image processor of the base, bounded to the pixels that are asked for.

    Raises `SettingsError` for a base without a processor that loads, or of a family that nobody has written.
    """
    try:
        processor = AutoProcessor.from_pretrained(base, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:  # an ImportError names the package that the processor wants
        raise SettingsError(f"--base_model {settings.base_model} has no processor that loads: {error}") from error
    family = family_of(load_config(base, settings))
    family.limit_pixels(processor, use.Recipe.min_pixels, settings.max_pixels)
    return processor


def empty_model(base: Path, device: str, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The model's architecture with unset weights on `device` ("meta" needs no memory)."""
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    with zero3.without_zero3(), no_init_weights(), torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    # Left out together with the initialisation: heads would stay apart from their embeddings (transformers 5.23).
    model.tie_weights()
    return model


WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # one file, or what says which tensor is in which


def read_index(folder: Path) -> dict[str, str] | None:
    """The file of each tensor, as the folder's index says it; None where there is no index."""
    if not (folder / INDEX).is_file():
        return None
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {str(key): str(Path(name)) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{folder / INDEX} is damaged ({error!r}); fetch it again") from error


def weight_files(folder: Path, index: dict[str, str] | None) -> list[Path]:
    """The files that hold the weights: model.safetensors, or those of the index. Empty where there are no weights.

    transformers and vLLM choose differently where there are more files than that, so `SettingsError` is raised there,
    and where a file is missing.
    """
    there = {path.name for path in folder.glob("*.safetensors")}
    if index is None:
        if there and WHOLE not in there:
            raise SettingsError(f"{folder} has {', '.join(sorted(there)[:3])} and no {INDEX}; fetch that, too")
        named = {WHOLE} & there
    else:
        named = set(index.values())
        if lost := sorted(name for name in named if not (folder / name).is_file()):
            raise SettingsError(f"{folder} lacks {shortened(lost)}, which its {INDEX} names; fetch it again")
    if strays := sorted(there - named):
        beside = WHOLE if index is None else f"what {INDEX} names"
        raise SettingsError(
            f"{folder} has {shortened(strays)} beside {beside}: transformers leaves that out, others load it; give a "
            "folder without it"
        )
    return [folder / name for name in sorted(named)]


def read_safetensors(folder: Path) -> dict[str, tuple[tuple[int, ...], str, Path]]:
    """Shape, dtype and file of every tensor in a folder, from the headers alone.

    Raises `SettingsError` for a damaged file, a tensor in two files, and an index that does not fit its files.
    """
    found, index = {}, read_index(folder)
    for file in weight_files(folder, index):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (a safetensors file is no dict)
                    if key in found:
                        raise SettingsError(f"{folder}: {key} is in {found[key][2].name} and in {file.name}")
                    view = opened.get_slice(key)
                    found[key] = (tuple(view.get_shape()), view.get_dtype(), file)
        except (SafetensorError, OSError) as error:
            raise SettingsError(f"{file} is damaged ({error}); fetch it again") from error
    if index is not None:
        lost = sorted(f"{key} ({name})" for key, name in index.items() if key not in found)
        if lost:
            raise SettingsError(f"{folder} lacks {shortened(lost)}, which its {INDEX} names; fetch it again")
        wrong = sorted(key for key, (_, _, file) in found.items() if file != folder / index.get(key, ""))
        if wrong:
            raise SettingsError(f"{folder / INDEX} does not say where {shortened(wrong)} is; fetch it again")
    return found


def shortened(names: list[str]) -> str:
    """The first ten, and how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def base_tensors(base: Path, settings: PageSettings) -> dict[str, BaseTensor]:
    """What the base checkpoint holds, by its own key; from the architecture where it has no weights.

    Reads headers alone. Raises `SettingsError` unless every parameter and persistent buffer of the model comes from
    the base's files, in its shape, once; a tied one is there where the one is that it is tied to.
    """
    load_config(base, settings)  # refuses what nobody has written a family for
    try:
        model = empty_model(base, "meta", torch.bfloat16, settings.trust_remote_code)
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:  # whatever a layer finds wrong
        raise SettingsError(f"--base_model {settings.base_model}: no model fits its config.json: {error}") from error
    # A plan of a model on the Hub downloads no weights; an earlier download may have left some of them in the cache.
    planned = settings.plan and not (Path(settings.base_model).is_dir() and any(base.glob("*.safetensors")))
    if settings.random_weights or planned:
        return architecture_tensors(model)
    found = read_safetensors(base)
    if not found:
        raise SettingsError(
            f"--base_model {settings.base_model}: no .safetensors there; convert the weights, or --random_weights"
        )
    mapping = get_model_conversion_mapping(model)
    if any(not isinstance(step, WeightRenaming) for step in mapping):
        raise SettingsError(f"--base_model {settings.base_model}: its weights are merged on loading, not only renamed")
    names, tensors, keys = dict(model.state_dict()), {}, {}
    for key, (shape, dtype, file) in found.items():
        if dtype not in DTYPES:
            raise SettingsError(f"--base_model {settings.base_model}: {key} is {dtype}, not {', '.join(DTYPES)}")
        name, _ = rename_source_key(key, mapping, [], model.base_model_prefix, names)
        if name not in names and any(
            re.search(pattern, key) for pattern in model._keys_to_ignore_on_load_unexpected or []
        ):
            tensors[key] = BaseTensor(key, shape, dtype, file, kept=True)
            continue
        if name not in names:
            raise SettingsError(f"--base_model {settings.base_model}: {key} is no weight of {type(model).__name__}")
        if shape != tuple(names[name].shape):
            raise SettingsError(
                f"--base_model {settings.base_model}: {key} is {list(shape)}, by config.json {list(names[name].shape)}"
            )
        if name in keys:
            raise SettingsError(f"--base_model {settings.base_model}: {keys[name]} and {key} are the same weight")
        keys[name], tensors[key] = key, BaseTensor(name, shape, dtype, file)
    check_complete(model, keys, settings)
    check_tied(model, keys, tensors, settings)
    return tensors


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """The weights that the configuration ties, by their names in the model: {tied: the one that it is tied to}."""
    return model.get_expanded_tied_weights_keys(all_submodels=True)


def architecture_tensors(model: PreTrainedModel) -> dict[str, BaseTensor]:
    """What a checkpoint of this model would hold, by the keys and in the dtype in which transformers would save it."""
    names, tied = dict(model.state_dict()), tied_weights(model)
    asked = str(model.config.dtype).removeprefix("torch.")
    dtype = next((short for short, name in DTYPES.items() if name == asked), "F32")
    keys = {name: next(iter(revert_weight_conversion(model, {name: names[name]}))) for name in names}
    return {keys[n]: BaseTensor(n, tuple(t.shape), dtype, None) for n, t in names.items() if n not in tied}


def check_complete(model: PreTrainedModel, keys: dict[str, str], settings: PageSettings) -> None:
    """Raise `SettingsError` where a weight is in no file; `keys` are those that are, by their names in the model. Of
    tied ones, only what they are tied to has to be there: transformers 4 and vLLM fill nothing else."""
    names, tied = dict(model.state_dict()), tied_weights(model)
    missing = [name for name in names if name not in keys and name not in tied]
    if not missing:
        return
    # Named as the base names the others: by the names of the modules, or by the older ones of most repositories.
    if any(name != key for name, key in keys.items()):
        missing = [next(iter(revert_weight_conversion(model, {name: names[name]}))) for name in missing]
    raise SettingsError(
        f"--base_model {settings.base_model} lacks {len(missing)} of the {len(names) - len(tied)} weights that its "
        f"config.json asks for, which would begin as random numbers: {shortened(missing)}; fetch it again, or correct "
        "its config.json (tie_word_embeddings, the number of layers), or begin from nothing with --random_weights"
    )


def check_tied(
    model: PreTrainedModel, keys: dict[str, str], tensors: dict[str, BaseTensor], settings: PageSettings
) -> None:
    """Raise `SettingsError` where both of two tied weights are stored and differ: transformers 5.23 would then train
    two, transformers 4 and vLLM load one. Few bases store both; only those are read, some rows at a time."""
    for pair in tied_weights(model).items():
        if not keys.keys() >= set(pair):
            continue
        one, other = (keys[name] for name in pair)
        with safe_open(tensors[one].file, "pt") as left, safe_open(tensors[other].file, "pt") as right:
            views = left.get_slice(one), right.get_slice(other)
            for row in range(0, tensors[one].shape[0], 4096):
                first, second = (view[row : row + 4096].float() for view in views)
                if not torch.equal(first.nan_to_num(), second.nan_to_num()):
                    raise SettingsError(
                        f"--base_model {settings.base_model}: its config.json ties {one} to {other}, and they differ; "
                        'write "tie_word_embeddings": false there if the head is one of its own, or remove the head'
                    )


SAMPLE = 4096  # bytes of each tensor that tell one base from another: every tensor of a fine-tune differs early on


def fingerprint(base: Path, tensors: dict[str, BaseTensor]) -> str:
    """SHA-256 of a base's configuration and of the beginning of each of its tensors, in hex. Reads a few MB."""
    digest = hashlib.sha256((base / "config.json").read_bytes())
    for file in sorted({tensor.file for tensor in tensors.values() if tensor.file is not None}):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            start = opened.tell()
            for key, entry in sorted(header.items()):
                if key != "__metadata__":
                    first, last = entry["data_offsets"]
                    opened.seek(start + first)
                    digest.update(f"{key} {entry['dtype']} {entry['shape']}".encode())
                    digest.update(opened.read(min(SAMPLE, last - first)))
    return digest.hexdigest()
