"""What a local folder says of where it comes from; what it does not say stays unknown."""

import json
from pathlib import Path

import pytest

from training.mixture import asked_datasets
from training.origins import licence_of_origin, origin_of_base, origin_of_dataset
from training.recipe import facts_of, public_name
from training.settings import resolve


def lay_out(folder: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


QWEN, HOLO = "Qwen/Qwen2.5-VL-3B-Instruct", "Hcompany/Holo1-3B"
BASES = [
    ({"dom_recipe.json": {"base_model": HOLO}}, [HOLO]),
    ({"dom_recipe.json": {"base_model": "mine", "base_model_from": [HOLO]}}, [HOLO]),
    ({"dom_recipe.json": {"base_model": "tiny_holo1"}}, ["tiny_holo1"]),  # a name for the title, none on the Hub
    ({"dom_recipe.json": {"base_model": HOLO, "random_weights": True}}, []),
    ({"dom_recipe.json": "torn", "README.md": f"---\nbase_model: {QWEN}\n---\n"}, [QWEN]),
    ({"README.md": f"---\nbase_model:\n- {QWEN}\n- ./mine\n- a/b\n---\n"}, [QWEN, "a/b"]),
    ({"README.md": "---\nbase_model: ../bases/qwen\n---\n", "config.json": {"_name_or_path": QWEN}}, [QWEN]),
    ({"README.md": "---\nbase_model: [unclosed\n---\n"}, []),
    ({"README.md": "# No head"}, []),
    ({"config.json": {"_name_or_path": HOLO}}, [HOLO]),
    ({"config.json": {"_name_or_path": "output/checkpoint-500"}}, []),  # reads as a name on the Hub, and is a path
    ({"config.json": {"_name_or_path": None}}, []),
    ({"config.json": [1, 2]}, []),
    ({}, []),
]


@pytest.mark.parametrize(("files", "origin"), BASES)
def test_a_bases_origin_is_what_it_says_itself(files: dict, origin: list[str], tmp_path: Path) -> None:
    assert origin_of_base(str(lay_out(tmp_path / "Hcompany" / "Holo1-7B", files))) == origin
    assert origin_of_base("Hcompany/Holo1-7B") == [], "a name on the Hub is its own origin"


SAVED = {
    "dataset_name": "web_sight",
    "download_checksums": {"hf://datasets/HuggingFaceM4/WebSight@abc/data/1.parquet": {}},
}
MADE = {"browser": {"chromium": "140"}, "settings": {}}
DATASETS = [
    ({"summary.json": MADE | {"source": "a/b", "source_is_on_hub": True}}, ["a/b"]),
    ({"summary.json": MADE | {"source": "sites/mine", "source_is_on_hub": False}}, []),
    ({"summary.json": MADE | {"source": "sites/mine"}}, []),  # by an older version, which did not say it
    ({"summary.json": MADE | {"source": "huggingfacem4/websight"}}, ["huggingfacem4/websight"]),
    ({"summary.json": {"source": "HuggingFaceM4/WebSight"}}, []),  # somebody else's file of that name
    ({"dataset_info.json": SAVED}, ["HuggingFaceM4/WebSight"]),
    ({"dataset_dict.json": {"splits": ["train"]}, "train/dataset_info.json": SAVED}, ["HuggingFaceM4/WebSight"]),
    ({"dataset_info.json": {"dataset_name": "WebSight", "download_checksums": None}}, []),
    ({"metadata.jsonl": "{}\n"}, []),
]


@pytest.mark.parametrize(("files", "origin"), DATASETS)
def test_a_datasets_origin_is_what_it_says_itself(files: dict, origin: list[str], tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "HuggingFaceM4" / "WebSight", files)
    assert origin_of_dataset(str(folder)) == origin
    for name, known in (("metadata.jsonl", "summary.json" in files), ("other.jsonl", False)):
        (folder / name).touch()
        assert origin_of_dataset(str(folder / name)) == (origin if known else []), "beside other people's files"


def test_a_folder_in_the_hubs_cache_has_its_name_in_its_path(tmp_path: Path) -> None:
    base = lay_out(tmp_path / "models--Hcompany--Holo1-3B" / "snapshots" / "abc", {"config.json": {}})
    data = lay_out(tmp_path / "datasets--a-b--c--d" / "snapshots" / "abc", {"1.parquet": ""})
    assert origin_of_base(str(base)) == [public_name(str(base))] == [HOLO]
    assert origin_of_dataset(str(data)) == [public_name(str(data))] == ["a-b/c--d"]


def test_the_terms_of_the_pages_source_hold_for_them_too(tmp_path: Path) -> None:
    made = MADE | {"source": "HuggingFaceM4/WebSight", "source_is_on_hub": True}
    folder = lay_out(tmp_path / "my_pages", {"summary.json": made})
    (asked,) = asked_datasets(resolve(["--dataset", str(folder)]).settings)
    assert facts_of(asked)["dataset_from"] == ["HuggingFaceM4/WebSight"]
    assert facts_of(asked)["dataset_licence"] == "cc-by-4.0"
    assert licence_of_origin(["HuggingFaceM4/WebSight", "somebody/else"]) is None, "not all are known"
    (asked,) = asked_datasets(resolve(["--dataset", str(lay_out(tmp_path / "other", {}))]).settings)
    assert "dataset_from" not in facts_of(asked) and facts_of(asked)["dataset_licence"] is None
