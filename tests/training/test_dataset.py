"""What is known of datasets: known ones by their names, what the user types on top, benchmarks refused."""

from pathlib import Path

import pytest
from small_pages import load

from training.dataset import (
    KNOWN_DATASETS,
    DatasetSource,
    known_dataset,
    resolve_dataset,
)
from training.errors import SettingsError


def test_an_entry_of_a_hub_dataset_is_not_taken_for_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert known_dataset("HuggingFaceM4/WebSight").config == "v0.1"
    Path("HuggingFaceM4/WebSight").mkdir(parents=True)
    assert known_dataset("HuggingFaceM4/WebSight") == DatasetSource()
    assert known_dataset("salt-nlp/design2code-hf").refused and known_dataset("some/thing") == DatasetSource()


def test_a_typed_column_beats_the_function_of_an_entry(monkeypatch):
    monkeypatch.setitem(
        KNOWN_DATASETS, "some/talks", DatasetSource(page_of=lambda row: (row["a"], row["b"]), split="test")
    )
    found = resolve_dataset("some/talks", html_column="code", image_column=None)
    assert (found.page_of, found.image_column, found.html_column, found.split) == (None, "image", "code", "test")


@pytest.mark.parametrize("name", ["SALT-NLP/Design2Code-hf", "salt-nlp/design2code-hf", "SALT-NLP/Design2Code-HARD"])
def test_a_benchmark_is_refused_with_the_remedy(tmp_path, name):
    with pytest.raises(SettingsError, match="never to be trained on: take HuggingFaceM4/WebSight"):
        load(name, tmp_path)


def test_known_datasets_need_only_their_name_and_the_users_word_wins():
    found = resolve_dataset("HuggingFaceM4/WebSight")
    assert (found.config, found.split, found.image_column, found.html_column) == ("v0.1", "train", "image", "text")
    assert resolve_dataset("HuggingFaceM4/WebSight", config="v0.2", split=None).config == "v0.2"
    assert resolve_dataset("xcodemind/webcode2m_test").split == "short"
    assert resolve_dataset("xcodemind/webcode2m_test", split="long").split == "long"
    assert resolve_dataset("some/thing", html_column="code").html_column == "code"
    assert {name: source.licence for name, source in KNOWN_DATASETS.items()} == {
        "HuggingFaceM4/WebSight": "cc-by-4.0",
        "xcodemind/webcode2m": "cc-by-4.0",
        "xcodemind/webcode2m_purified": "cc-by-4.0",
        "xcodemind/webcode2m_test": "cc-by-4.0",
        "SALT-NLP/Design2Code-hf": "odc-by",
        "SALT-NLP/Design2Code-HARD": "odc-by",
    }
