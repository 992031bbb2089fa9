"""Sources: which pages there are, and their text."""

import json
import os

import datasets
import pytest

from making import sources
from making.drops import PageDropped
from making.sources import Source, count_pages, find_pages, read_html
from training.dataset import KNOWN_DATASETS, DatasetSource
from training.errors import SettingsError

PAGE = "<!DOCTYPE html>\n<html><head><title>t</title></head><body><p>words</p></body></html>"


def test_sources_are_found_in_folders_lists_and_datasets(tmp_path):
    (tmp_path / "site" / "sub").mkdir(parents=True)
    for name in ("b.html", "sub/a.HTM", "sub/c.txt"):
        (tmp_path / "site" / name).write_text(PAGE)
    (tmp_path / "list.txt").write_text("# two\nsite/b.html\n\nsite/sub/a.HTM\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "metadata.jsonl").write_text(json.dumps({"file_name": "x.png", "page": PAGE}) + "\n")

    def names(source) -> list[str]:
        return [page.name for page in find_pages(str(source), DatasetSource(html_column="page"))]

    assert names(tmp_path / "site") == ["b.html", "sub/a.HTM"]
    assert names(tmp_path / "list.txt") == ["b.html", "sub/a.HTM"]
    assert names(tmp_path / "data") == ["row-0000000"]
    message = r"no column text; there are: file_name, page\. --html_column names the right one"
    with pytest.raises(SettingsError, match=message):
        list(find_pages(str(tmp_path / "data")))


def test_the_order_of_a_folder_stays_however_few_names_are_held_at_once(tmp_path, monkeypatch):
    names = ["a/x.html", "a.html", "b/b/1.htm", "b/b/2.xhtml", "b/c.HTML", "c.html", "d/e.html", "f.html"]
    for name in reversed([*names, "a/none.txt", ".html", "e/empty"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "g").symlink_to(tmp_path / "b")
    (tmp_path / "z.html").symlink_to(tmp_path / "nowhere")
    for at_once in (1, 3, 10_000):
        monkeypatch.setattr(sources, "NAMES_AT_ONCE", at_once)
        assert [page.name for page in find_pages(str(tmp_path))] == names
    assert count_pages(str(tmp_path)) == 8


def test_pages_are_counted_where_that_is_cheap(tmp_path):
    (tmp_path / "metadata.jsonl").write_text("{}\n\n{}\n")
    (tmp_path / "list.txt").write_text("# two\na.html\n\nb.html")
    (tmp_path / "a.html").write_text(PAGE)
    counts = [count_pages(str(tmp_path / name)) for name in ("", "list.txt", "a.html", "rows.parquet")]
    assert counts == [2, 2, 1, None] and count_pages("USER/NAME") is None


def test_a_file_whose_name_is_no_utf_8_has_a_name_of_its_own(tmp_path):
    for name in (b"caf\xe9.html", b"caf\xe8.html"):
        (tmp_path / os.fsdecode(name)).write_text(PAGE)
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.html\n")
    names = [page.name for page in find_pages(str(tmp_path))]
    assert names == ["caf\\udce8.html", "caf\\udce9.html"]
    (listed,) = find_pages(str(tmp_path / "list.txt"))
    assert listed.name == names[1] and read_html(listed).html == PAGE


@pytest.mark.parametrize("name", ["train.parquet", "data/train-00000.parquet"])
def test_a_folder_of_parquet_files_is_a_dataset(tmp_path, name, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    (folder / name).parent.mkdir(parents=True)
    datasets.Dataset.from_dict({"text": [PAGE, PAGE.replace("words", "more")]}).to_parquet(folder / name)
    assert [read_html(page).html for page in find_pages(str(folder))] == [PAGE, PAGE.replace("words", "more")]
    assert [page.name for page in find_pages(str(folder))] == ["row-0000000", "row-0000001"]
    with pytest.raises(SettingsError, match="no column code; there are: text"):
        list(find_pages(str(folder), DatasetSource(html_column="code")))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"no markup", "empty"),
        (b"<p>\0", "unreadable"),
        (b"<meta charset=hz-gb-2312><p>x", "encoding"),
    ],
)
def test_what_is_no_page_is_dropped_with_its_reason(tmp_path, renderer, data, reason):
    (tmp_path / "a.html").write_bytes(data)
    with pytest.raises(PageDropped) as dropped:
        read_html(Source("a.html", tmp_path / "a.html", tmp_path), renderer)
    assert dropped.value.reason == reason


def test_a_line_that_is_no_json_is_a_page_that_is_dropped_with_its_reason(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "x.png", "text": PAGE}) + '\n{"torn\n[1]\n')
    good, torn, no_object = find_pages(str(tmp_path))
    assert read_html(good).html == PAGE
    for page in (torn, no_object):
        with pytest.raises(PageDropped, match="no JSON object") as dropped:
            read_html(page)
        assert dropped.value.reason == "unreadable"


def answered(row):
    return row["images"][0], row["messages"][-1]["content"]


@pytest.mark.parametrize(
    "known",
    [DatasetSource(page_of=answered), DatasetSource(html_column="messages.1.content")],
    ids=["function", "path"],
)
def test_html_deep_in_a_row_is_found_by_a_function_or_by_a_path(tmp_path, known, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    talk = [{"role": "user", "content": "Write it."}, {"role": "assistant", "content": PAGE}]
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps({"images": ["no_such.png"], "messages": talk}) + "\n")
    monkeypatch.setitem(KNOWN_DATASETS, str(file), known)
    assert [read_html(page).html for page in find_pages(str(file))] == [PAGE]
