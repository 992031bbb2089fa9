"""The base model: its folder, its architecture without weights, and every tensor of its checkpoint.

    base = fetch_base(settings)                     # a folder, downloaded where the name is the Hub's
    tensors = base_tensors(base, settings)          # what a final folder must hold, by the checkpoint's own keys

Nothing here trains: what a base holds decides what a final folder has to hold, key by key.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
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
from training import zero3
from training.errors import SettingsError
from training.families import family_of
from training.settings import PageSettings

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # of weights: safetensors' name, torch's name


@dataclass(frozen=True)
class BaseTensor:
    """One tensor of the base checkpoint: its name in the loaded model, shape, dtype, and file (None: no weights)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path | None


def fetch_base(settings: PageSettings) -> Path:
    """(main process only) The folder of the base model, downloaded when it is on the Hub."""
    if Path(settings.base_model).is_dir():
        return Path(settings.base_model)
    wanted = ["*.json", "*.txt", "*.jinja", "*.model", "README.md", "LICENSE*", "NOTICE*", "*.py"]
    wanted += [] if settings.random_weights or settings.plan else ["*.safetensors"]
    try:
        return Path(snapshot_download(settings.base_model, revision=settings.base_revision, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        raise SettingsError(
            f"--base_model {settings.base_model} cannot be fetched: {error}; check the name, the network, and "
            "`hf auth login` for a gated model"
        ) from error


def load_config(base: Path, settings: PageSettings) -> PretrainedConfig:
    """The configuration of the model in the folder `base`; a model's own code runs only where the settings trust it."""
    return AutoConfig.from_pretrained(base, trust_remote_code=settings.trust_remote_code)


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


def read_safetensors(folder: Path) -> dict[str, tuple[tuple[int, ...], str, Path]]:
    """Shape, dtype and file of every tensor in a folder, from the headers alone."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (a safetensors file is no dict)
                    view = opened.get_slice(key)
                    found[key] = (tuple(view.get_shape()), view.get_dtype(), file)
        except SafetensorError as error:
            raise SettingsError(f"{file} is damaged ({error}); fetch it again") from error
    return found


def base_tensors(base: Path, settings: PageSettings) -> dict[str, BaseTensor]:
    """What the base checkpoint holds, by its own key; from the architecture where it has no weights."""
    family_of(load_config(base, settings))  # refuses what nobody has written a family for
    model = empty_model(base, "meta", torch.bfloat16, settings.trust_remote_code)
    names = dict(model.state_dict())
    found = read_safetensors(base)
    if not found and not settings.random_weights and not settings.plan:
        raise SettingsError(
            f"--base_model {settings.base_model}: no .safetensors there; convert the weights, or --random_weights"
        )
    if settings.random_weights or not found:
        tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
        asked = str(model.config.dtype).removeprefix("torch.")
        dtype = next((short for short, name in DTYPES.items() if name == asked), "F32")
        keys = {name: next(iter(revert_weight_conversion(model, {name: names[name]}))) for name in names}
        return {keys[n]: BaseTensor(n, tuple(t.shape), dtype, None) for n, t in names.items() if n not in tied}
    mapping = get_model_conversion_mapping(model)
    others = [step for step in mapping if not isinstance(step, WeightRenaming)]
    if others:
        raise SettingsError(f"--base_model {settings.base_model}: its weights are merged on loading, not only renamed")
    tensors = {}
    for key, (shape, dtype, file) in found.items():
        if dtype not in DTYPES:
            raise SettingsError(f"--base_model {settings.base_model}: {key} is {dtype}, not {', '.join(DTYPES)}")
        name, _ = rename_source_key(key, mapping, [], model.base_model_prefix, names)
        if name not in names:
            raise SettingsError(f"--base_model {settings.base_model}: {key} is no weight of {type(model).__name__}")
        tensors[key] = BaseTensor(name, shape, dtype, file)
    return tensors


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
