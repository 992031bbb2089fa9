"""Which names on the Hub a local folder comes from, as far as it says so itself: for a card's `base_model`, `datasets`.

    origin_of_base("./Holo1-3B")            # ["Qwen/Qwen2.5-VL-3B-Instruct"], by the card in that folder
    origin_of_dataset("./my_pages")         # ["HuggingFaceM4/WebSight"], by what make_pages.py has left there

An empty list where nothing is said: a folder's own name proves nothing, nor does a name that might be a path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub as hub
import yaml

import use_model_from_hub as use
from training.dataset import KNOWN_DATASETS, known_dataset

# Bases whose name in a configuration is believed: any other USER/NAME there may be a path of whoever has saved it.
KNOWN_BASES = [f"Hcompany/Holo1-{size}" for size in ("3B", "7B")]
KNOWN_BASES += [f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B", "32B", "72B")]
KNOWN_BASES += [f"Qwen/Qwen3-VL-{size}-Instruct" for size in ("2B", "4B", "8B", "32B")]
KNOWN_BASES += [f"Qwen/Qwen3.5-{size}" for size in ("0.8B", "2B", "4B", "9B", "27B")]


def reads_as_hub_id(name: object) -> bool:
    """Whether it reads USER/NAME, as all but the oldest repositories are called; the Hub is not asked."""
    return isinstance(name, str) and bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name))


def name_in_cache(path: str | Path, kind: str) -> str | None:
    """USER/NAME of a folder in the Hub's cache, whose path says it; `kind` is models or datasets."""
    found = re.search(rf"/{kind}--([\w.-]+?)--([\w.-]+)/snapshots/", f"{Path(path).expanduser().absolute()}/")
    return found and f"{found[1]}/{found[2]}"


def origin_of_base(name: str) -> list[str]:
    """What the base in a local folder is, or was trained from; one that this project has trained may name a folder."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return []
    if cached := name_in_cache(folder, "models"):
        return [cached]
    recipe = read_json(folder / use.RECIPE_FILE)
    if recipe:
        told = recipe.get("base_model_from") or recipe.get("base_model")
        return [] if recipe.get("random_weights") else strings(told)
    try:
        card = hub.metadata_load(folder / "README.md") if (folder / "README.md").is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        card = None
    if isinstance(card, dict) and (parents := [one for one in strings(card.get("base_model")) if reads_as_hub_id(one)]):
        return parents
    return [one for one in strings(read_json(folder / "config.json").get("_name_or_path")) if one in KNOWN_BASES]


def origin_of_dataset(name: str) -> list[str]:
    """The datasets on the Hub that the pages of a local folder, or file, were taken or made from."""
    path = Path(name).expanduser()
    if not path.exists():
        return []
    if cached := name_in_cache(path, "datasets"):
        return [cached]
    folder = path if path.is_dir() else path.parent
    # By make_pages.py. What else lies in the folder of a single file may have nothing to do with it.
    made = read_json(folder / "summary.json") if path.is_dir() or path.name == "metadata.jsonl" else {}
    source = made.get("source")
    if "browser" in made and reads_as_hub_id(source):
        known = {one.lower() for one in KNOWN_DATASETS}  # folders that an older version has made do not say it
        return [source] if made.get("source_is_on_hub", source.lower() in known) else []
    # What save_to_disk has written notes each file that was downloaded, where they were checked.
    splits = path.is_dir() and (path / "dataset_dict.json").is_file()
    places = [] if path.is_file() and path.suffix != ".arrow" else [folder / "dataset_info.json"]
    places += folder.glob("*/dataset_info.json") if splits else []
    files = [file for place in places for file in read_json(place).get("download_checksums") or ()]
    found = (re.match(r"hf://datasets/([\w.-]+/[\w.-]+)@", file) for file in files)
    return [*dict.fromkeys(one[1] for one in found if one)]


def licence_of_origin(names: Iterable[str]) -> str | None:
    """The terms of the datasets that pages come from, which hold for these, too; None where not all are known."""
    licences = [known_dataset(name).licence for name in names]
    return ", ".join(dict.fromkeys(licences)) if licences and all(licences) else None


def read_json(file: Path) -> dict[str, Any]:
    """Of a stranger's folder: {} where the file is not there, or holds something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def strings(value: object) -> list[str]:
    """A string or a list of them, as a list, without what is none."""
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str) and one]
