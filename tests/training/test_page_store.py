"""Pages on their way to the disk: what was sealed is found again, and nothing that came after it."""

import datasets
import pytest
from small_pages import page_html, picture

from training import page_store
from training.page_checks import marks_of
from training.page_store import PageStore


def page(number: int) -> dict:
    fields = {"name": f"p{number}", "screenshot": picture(number), "html": page_html(number)}
    return fields | {"width": 40, "height": 30, "html_tokens": number, "image_tokens": 4}


def append(store: PageStore, *numbers: int, split: str = "train") -> None:
    for number in numbers:
        store.append(split, page(number), marks_of(page(number)))


def names(folder, split: str = "train") -> list[str]:
    return datasets.Dataset.from_file(str(folder / f"{split}.arrow"))["name"][:]


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_what_was_sealed_is_gone_on_with(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(page_store, "BATCH_PAGES", batch)
    with PageStore(tmp_path) as store:
        assert store.state is None
        append(store, 0, split="held_out")
        append(store, 1, 2, 3)
        store.drop({"name": "a"})
        store.seal({"read": 5})
        append(store, 4, 5, 6)
        store.drop({"name": "b"})
    with PageStore(tmp_path) as store:
        assert store.state == {"read": 5} and not store.finished
        assert [each["name"] for each in store.held_out()] == ["p0"]
        assert list(store.digests()) == [digest for n in range(4) for digest in marks_of(page(n)).digests]
        append(store, 7)
        store.finish({"read": 6})
    assert names(tmp_path) == ["p1", "p2", "p3", "p7"] and names(tmp_path, "held_out") == ["p0"]
    assert datasets.Dataset.from_file(str(tmp_path / "train.arrow"))[3] == page(7)
    assert (tmp_path / "dropped_pages.jsonl").read_text() == '{"name": "a"}\n'
    assert PageStore(tmp_path).finished


@pytest.mark.parametrize("file", ["train.arrow", "digests", "sealed.json"])
def test_a_file_that_lost_its_end_begins_anew(tmp_path, file):
    with PageStore(tmp_path) as store:
        append(store, 1, 2)
        store.seal({})
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-9])
    with PageStore(tmp_path) as store:
        assert store.state is None
        store.finish({})
    assert names(tmp_path) == []


def test_pages_are_written_in_batches_that_memory_bears(tmp_path, monkeypatch):
    monkeypatch.setattr(page_store, "BATCH_PAGES", 3)
    with PageStore(tmp_path) as store:
        append(store, *range(7))
        store.finish({})
    assert [len(batch) for batch in datasets.Dataset.from_file(str(tmp_path / "train.arrow")).data.to_batches()] == [
        3,
        3,
        1,
    ]
