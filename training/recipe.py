"""What a run is made of, all of it looked up: the facts of its recipe, its model card and its report.

    facts = gather_facts(settings, args, base)
    recipe = make_recipe(settings, facts)       # dom_recipe.json: with it, training and use ask the same question

None stands for what could not be found out; no value is made up.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

import use_model_from_hub as use
from families import FAMILIES
from training.dataset import dataset_revision
from training.mixture import AskedDataset, asked_datasets
from training.origins import licence_of_origin, name_in_cache, origin_of_base, origin_of_dataset
from training.processes import world_size
from training.settings import PROJECT, PageSettings

# The last one is optional: Qwen3.5's linear attention runs through it.
PACKAGES = "torch transformers deepspeed accelerate datasets peft bitsandbytes flash-linear-attention".split()


def gather_facts(settings: PageSettings, args: TrainingArguments, base: Path) -> dict[str, Any]:
    """(main process only) What the recipe and the model card say of this run; None is what could not be found out."""
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    commit = ""
    with contextlib.suppress(OSError):  # no git here
        command = ["git", "-C", str(PROJECT), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    snapshot = base.name if base.parent.name == "snapshots" else settings.base_revision  # the Hub cache names commits
    asked, origin = asked_datasets(settings), origin_of_base(settings.base_model)
    model_type = json.loads((base / "config.json").read_text(encoding="utf-8"))["model_type"]
    return {
        "base_model": public_name(settings.base_model),
        "base_built_on": FAMILIES[model_type],
        **({"base_model_from": origin} if origin else {}),
        "base_revision": snapshot,
        **({"random_weights": True} if settings.random_weights else {}),
        "optimizer": optimizer_of(args),
        **({"fp8": "products of the language model's layers, in e4m3"} if settings.fp8 else {}),
        "dataset": " and ".join(public_name(each.name) for each in asked),
        **(facts_of(asked[0]) if len(asked) == 1 else facts_of_several(asked)),
        "commit": commit or None,
        "versions": versions,
        "hardware": f"{world_size()} x {device}",
        "date": time.strftime("%Y-%m-%d"),
    }


def optimizer_of(args: TrainingArguments) -> str:
    """Its name: that of the DeepSpeed JSON where it brings one of its own, else that of --optim."""
    config = args.hf_deepspeed_config.config if args.deepspeed else {}
    own = (config.get("optimizer") or {}).get("type")
    return f"{own} (DeepSpeed's)" if own else str(getattr(args.optim, "value", args.optim))


def facts_of(asked: AskedDataset) -> dict[str, Any]:
    """What there is to say of one dataset, and of those that a local folder's pages come from."""
    origin = origin_of_dataset(asked.name)
    return {
        **({"dataset_from": origin} if origin else {}),
        "dataset_config": asked.source.config,
        "dataset_revision": dataset_revision(asked.name, asked.revision),
        "dataset_licence": asked.source.licence or licence_of_origin(origin),
    }


def facts_of_several(asked: Sequence[AskedDataset]) -> dict[str, Any]:
    """Of each its own, and the terms of all of them together, which all hold for what was trained on them."""
    each = []
    for one in asked:
        head = {"dataset": public_name(one.name), "share": round(one.share, 4), "dataset_split": one.source.split}
        each.append(head | facts_of(one))
    licences = [one["dataset_licence"] or f"unknown for {one['dataset']}" for one in each]
    return {"datasets": each, "dataset_licence": ", ".join(dict.fromkeys(licences))}


def public_name(name: str) -> str:
    """A Hub name as it is, or as the path of a folder in the Hub's cache says it; of any other local folder only its
    last part, since recipe and card are published."""
    if not Path(name).expanduser().exists():
        return name
    return name_in_cache(name, "models") or name_in_cache(name, "datasets") or Path(name).expanduser().resolve().name


def make_recipe(settings: PageSettings, facts: dict[str, Any]) -> dict[str, Any]:
    """What stands in dom_recipe.json: how pages are asked for, and the facts of the run."""
    asked = {item.name: getattr(settings, item.name) for item in fields(use.Recipe) if hasattr(settings, item.name)}
    return {**asdict(use.Recipe()), **asked, "trust_remote_code": settings.trust_remote_code, **facts}
