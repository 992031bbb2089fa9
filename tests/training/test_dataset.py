"""From a dataset to checked, cleaned and split pages: every page kept, or dropped for the reason that is told."""

import io
import itertools
import json
import multiprocessing
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import need_shared

from training import dataset
from training.dataset import (
    KNOWN_DATASETS,
    BadPage,
    DatasetSource,
    Row,
    known_dataset,
    load_pages,
    load_pages_from_disk,
    resolve_dataset,
    screenshot_size,
)
from training.errors import DataError, SettingsError

WORDS = "river stone amber cloud maple ember lake north garden silver piano coral meadow lantern harbour".split()


def picture(number: int, kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    noise = random.Random(number).randbytes(size[0] * size[1] * 3)
    Image.frombytes("RGB", size, noise).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def page_html(number: int, words: int = 30) -> str:
    text = " ".join(random.Random(number).choices(WORDS, k=words))
    return f"<!DOCTYPE html>\n<html><body><h1>Page</h1><p>{text}</p></body></html>"


def write_folder(folder: Path, pages: list[tuple[str, bytes | None, object]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, data, html in pages:
        if data is not None:
            (folder / name).write_bytes(data)
        lines.append(json.dumps({"file_name": name, "text": html}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def good_pages(count: int) -> list[tuple[str, bytes, str]]:
    kinds = [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")]
    return [(f"p{n:03d}.{kinds[n % 3][1]}", picture(n, kinds[n % 3][0]), page_html(n)) for n in range(count)]


def count_tokens(html: str, width: int, height: int) -> tuple[int, int]:
    return len(html.split()), width * height // 100


def load(dataset, output: Path, seed: int = 0, **changes):
    settings = {"dataset": str(dataset), "dataset_config": None, "dataset_split": None, "dataset_revision": None}
    settings |= {
        "image_column": None,
        "html_column": None,
        "num_samples": 100,
        "eval_pages": 4,
        "max_html_tokens": 1000,
    }
    settings |= {"max_bad_share": 0.02, "clean": "comments,scripts,tracking,base64"} | changes
    report = load_pages(SimpleNamespace(**settings), output, count_tokens, seed)
    return (*load_pages_from_disk(output), report)


def dropped(output: Path) -> dict[str, str]:
    lines = (output / "dropped_pages.jsonl").read_text().splitlines()
    return {row["name"]: row["reason"] for row in map(json.loads, lines)}


# -----------------------------------------------------------------------------
# Reading


def test_every_page_of_a_folder_arrives_as_it_is(tmp_path):
    pages = good_pages(30)
    training, held_out, report = load(write_folder(tmp_path / "in", pages), tmp_path / "out")
    assert (len(training), len(held_out)) == (26, 4)
    assert str(report) == "104 asked, 30 kept; the dataset ended after 30 pages"
    expected = [
        {
            "name": name,
            "screenshot": data,
            "html": html,
            "width": 40,
            "height": 30,
            "html_tokens": len(html.split()),
            "image_tokens": 12,
        }
        for name, data, html in pages
    ]
    assert sorted([*training, *held_out], key=lambda page: page["name"]) == expected
    assert dropped(tmp_path / "out") == {}


def test_asked_is_enough_when_the_dataset_has_more(tmp_path):
    folder = write_folder(tmp_path / "in", good_pages(30))
    training, held_out, report = load(folder, tmp_path / "out", num_samples=10, eval_pages=5)
    assert (len(training), len(held_out), str(report)) == (10, 5, "15 asked, 15 kept")


def order_of(folder: Path, output: Path, seed: int) -> list[list[str]]:
    training, held_out, _ = load(folder, output, seed)
    return [held_out["name"][:], training["name"][:]]


def test_the_seed_alone_decides_the_pages_and_their_order(tmp_path):
    folder = write_folder(tmp_path / "in", good_pages(30))
    orders = []
    for number, seed in enumerate((0, 0, 1)):
        orders.append(order_of(folder, tmp_path / f"out{number}", seed))
    assert orders[0] == orders[1] != orders[2]
    with multiprocessing.get_context("spawn").Pool(1) as another:  # its own hashes, its own random numbers
        assert another.apply(order_of, (folder, tmp_path / "other", 0)) == orders[0]


def test_loading_again_leaves_pages_that_are_in_use_alone(tmp_path):
    folder = write_folder(tmp_path / "in", good_pages(30))
    first, _, _ = load(folder, tmp_path / "out", seed=0)
    before = list(first)
    load(folder, tmp_path / "out", seed=1)
    assert list(first) == before


def write_metadata(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir()
    for number in range(len(rows)):
        (folder / f"p{number}.png").write_bytes(picture(number))
        (folder / f"other{number}.png").write_bytes(picture(100 + number))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("columns", "typed", "taken"),
    [
        (["file_name"], None, "file_name"),  # imagefolder's convention
        (["file_name"], "image", "file_name"),  # what it becomes by that convention
        (["image"], "image", "image"),
        (["image"], None, "image"),
        (["file_name", "image"], None, "file_name"),
        (["file_name", "image"], "image", "image"),
        (["image", "file_name"], "file_name", "file_name"),
        (["shot", "file_name"], "shot", "shot"),
    ],
)
def test_the_picture_of_a_folder_is_the_column_that_was_asked_for(tmp_path, columns, typed, taken):
    names = [dict(zip(columns, (f"p{n}.png", f"other{n}.png"))) for n in range(6)]
    folder = write_metadata(tmp_path / "in", [{**row, "text": page_html(n)} for n, row in enumerate(names)])
    training, held_out, report = load(folder, tmp_path / "out", image_column=typed, eval_pages=1)
    assert report.kept == 6
    wanted = {row[taken]: (folder / row[taken]).read_bytes() for row in names}
    assert {page["name"]: page["screenshot"] for page in [*training, *held_out]} == wanted


def answered_page(row: Row) -> tuple[object, object]:
    """What a new contributor writes: the last answer of a conversation, and the first picture of a list."""
    return row["images"][0], [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"][-1]


def write_talks(folder: Path, pages: list[tuple[str, bytes, str]], kind: str) -> Path:
    """Screenshots in a list, HTML in a conversation: as JSONL that names files, or as parquet that holds pictures."""
    import datasets

    folder.mkdir()
    talks = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": html}] for _, _, html in pages]
    if kind == "jsonl":
        for name, data, _ in pages:
            (folder / name).write_bytes(data)
        rows = [{"images": [name], "messages": talk} for (name, _, _), talk in zip(pages, talks)]
        (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / "talks.jsonl"
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features(images=datasets.List(datasets.Image()), messages=datasets.List(turn))
    images = [[{"bytes": data, "path": None}] for _, data, _ in pages]
    table = datasets.Dataset.from_dict({"images": images, "messages": talks}, features=features)
    table.to_parquet(folder / "talks.parquet")
    return folder / "talks.parquet"


@pytest.mark.parametrize("kind", ["jsonl", pytest.param("parquet", marks=pytest.mark.slow)])
@pytest.mark.parametrize("asked", ["entry with a function", "entry with paths", "command line"])
def test_a_screenshot_in_a_list_and_html_in_a_conversation_arrive(tmp_path, monkeypatch, kind, asked):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pages = good_pages(12)
    pages[3] = ("p003.png", pages[3][1][:500], pages[3][2])  # a broken picture ends no stream, however deep it is
    file = write_talks(tmp_path / "in", pages, kind)
    paths = {"image_column": "images.0", "html_column": "messages.1.content"}
    if asked == "entry with a function":
        monkeypatch.setitem(KNOWN_DATASETS, str(file), DatasetSource(page_of=answered_page))
    elif asked == "entry with paths":
        monkeypatch.setitem(KNOWN_DATASETS, str(file), DatasetSource(**paths))
    changes = paths if asked == "command line" else {}
    training, held_out, report = load(file, tmp_path / "out", eval_pages=2, max_bad_share=0.1, **changes)
    assert str(report) == "102 asked, 1 unreadable, 11 kept; the dataset ended after 12 pages"
    kept = [(page["screenshot"], page["html"]) for page in [*training, *held_out]]
    assert sorted(kept) == sorted((data, html) for place, (_, data, html) in enumerate(pages) if place != 3)


def test_rows_for_which_a_function_or_a_path_fails_are_counted_as_broken(tmp_path, monkeypatch):
    rows = [{"images": [f"p{n}.png"], "messages": [{"role": "assistant", "content": page_html(n)}]} for n in range(9)]
    rows[2]["messages"] = []
    rows[5] = {"images": [], "messages": rows[5]["messages"]}
    folder = write_metadata(tmp_path / "in", rows)
    monkeypatch.setitem(KNOWN_DATASETS, str(folder), DatasetSource(page_of=answered_page))
    _, _, report = load(folder, tmp_path / "out", max_bad_share=0.5, eval_pages=1)
    assert (report.kept, dict(report.dropped)) == (7, {"unreadable": 2})
    assert all("answered_page: IndexError" in said for said in report.broken)
    columns = {"image_column": "images.0", "html_column": "messages.-1.content"}
    _, _, report = load(folder, tmp_path / "out", max_bad_share=0.5, eval_pages=1, **columns)
    assert (report.kept, dict(report.dropped)) == (7, {"unreadable": 2})
    assert {said.partition(": ")[2] for said in report.broken} == {
        "no images.0 in this row)",
        "no messages.-1.content in this row)",
    }


def test_an_entry_of_a_hub_dataset_is_not_taken_for_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert known_dataset("HuggingFaceM4/WebSight").config == "v0.1"
    Path("HuggingFaceM4/WebSight").mkdir(parents=True)
    assert known_dataset("HuggingFaceM4/WebSight") == DatasetSource()
    assert known_dataset("salt-nlp/design2code-hf").refused and known_dataset("some/thing") == DatasetSource()


def test_a_typed_column_beats_the_function_of_an_entry(monkeypatch):
    monkeypatch.setitem(KNOWN_DATASETS, "some/talks", DatasetSource(page_of=answered_page, split="test"))
    found = resolve_dataset("some/talks", html_column="code", image_column=None)
    assert (found.page_of, found.image_column, found.html_column, found.split) == (None, "image", "code", "test")


# datasets 5.2 sleeps 5 s at the end of each parquet stream.
SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("folder", "parquet", "no image feature")]


@pytest.mark.parametrize("kind", ["jsonl", "no text", *SLOW_KINDS])
def test_what_datasets_can_stream_from_a_path(tmp_path, kind, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pages = good_pages(12)
    rows = {"shot": [{"bytes": data, "path": None} for _, data, _ in pages], "code": [html for _, _, html in pages]}
    features = datasets.Features(shot=datasets.Image(), code=datasets.Value("string"))
    (tmp_path / "in").mkdir()
    place = tmp_path / "in" / "train-00000-of-00001.parquet"
    columns = {"image_column": "shot", "html_column": "code"}
    if kind == "no image feature":
        datasets.Dataset.from_dict(rows).to_parquet(place)
    elif kind == "jsonl":
        place = tmp_path / "in" / "pages.jsonl"
        for name, data, _ in pages:
            (tmp_path / "in" / name).write_bytes(data)
        place.write_text("".join(json.dumps({"shot": name, "code": html}) + "\n" for name, _, html in pages))
    elif kind == "no text":
        (tmp_path / "in" / "p.png").write_bytes(pages[0][1])
        with pytest.raises(DataError, match=r"no column (shot and )?code; there are: image"):
            load(tmp_path / "in", tmp_path / "out", html_column="code")
        return
    else:
        datasets.Dataset.from_dict(rows, features=features).to_parquet(place)
    source = tmp_path / "in" if kind == "folder" else place
    training, held_out, report = load(source, tmp_path / "out", eval_pages=2, **columns)
    assert str(report) == "102 asked, 12 kept; the dataset ended after 12 pages"
    kept = [(page["screenshot"], page["html"]) for page in [*training, *held_out]]
    assert sorted(kept) == sorted((data, html) for _, data, html in pages)


@pytest.mark.slow
def test_a_broken_picture_does_not_end_a_stream(tmp_path):
    import datasets

    pages = good_pages(12)
    pages[3] = ("broken", pages[3][1][:500], pages[3][2])
    rows = {"image": [{"bytes": data, "path": None} for _, data, _ in pages], "text": [html for _, _, html in pages]}
    rows["image"][5] = {"bytes": None, "path": "/etc/hostname"}
    rows["image"][6] = {"bytes": None, "path": "http://127.0.0.1:9/x.png"}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "in.parquet")
    _, _, report = load(tmp_path / "in.parquet", tmp_path / "out", max_bad_share=0.5, eval_pages=1)
    assert str(report) == ("101 asked, 1 unreadable, 2 outside the folder, 9 kept; the dataset ended after 12 pages")


def test_wrong_columns_are_named_beside_those_that_are_there(tmp_path):
    folder = write_folder(tmp_path / "in", good_pages(6))
    with pytest.raises(DataError) as error:
        load(folder, tmp_path / "out", html_column="html")
    assert str(error.value).startswith("no column html; there are: file_name, text. --image_column and --html_column")


def test_a_wrong_column_is_named_before_the_first_row_and_one_that_some_rows_lack_is_none(tmp_path):
    """A reader that asks for few rows never comes to the end of the folder."""
    folder = write_folder(tmp_path / "in", good_pages(6))
    with pytest.raises(DataError, match="no column html; there are: file_name, text"):
        next(dataset.read_pages(str(folder), DatasetSource(image_column="file_name", html_column="html"), 0))
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(['{"torn', '{"file_name": "x.png"}', "", *lines]) + "\n")
    first, second, third = itertools.islice(dataset.read_html(str(folder), DatasetSource()), 3)
    assert [str(html).partition(":")[0] for _, html in (first, second)] == ["no JSON object", "no text in this row"]
    assert third[1] == page_html(0)


@pytest.mark.parametrize(
    ("dataset", "changes", "message"),
    [
        ("./nowhere", {}, "--dataset ./nowhere: no such file or folder"),
        ("a/b/c/d", {}, "--dataset a/b/c/d: no such file or folder"),
        ("EMPTY", {}, "cannot be read"),
        ("damaged.parquet", {}, "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_a_data_error(tmp_path, monkeypatch, dataset, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        load(dataset, tmp_path / "out", **changes)


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


# -----------------------------------------------------------------------------
# Broken pages and attacks


def header_bomb(width: int = 20_000, height: int = 20_000) -> bytes:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_every_broken_page_is_found_and_no_other(tmp_path):
    from PIL import Image

    gif = io.BytesIO()
    Image.new("RGB", (40, 30)).save(gif, "GIF")
    (tmp_path / "secret.png").write_bytes(picture(999))
    folder = tmp_path / "in"
    bad = [
        ("truncated.png", picture(100)[:-900], page_html(100), "unreadable"),
        ("truncated.jpg", picture(101, "JPEG")[:-300], page_html(101), "unreadable"),
        ("truncated.webp", picture(102, "WEBP")[:-300], page_html(102), "unreadable"),
        ("text.png", b"<html>no picture</html>", page_html(103), "unreadable"),
        ("gif.png", gif.getvalue(), page_html(104), "unreadable"),
        ("nothing.png", b"", page_html(105), "unreadable"),
        ("missing.png", None, page_html(106), "unreadable"),
        ("strip.png", picture(107, size=(1000, 2)), page_html(107), "unreadable"),
        ("bomb.png", header_bomb(), page_html(108), "too large"),
        ("small_bomb.png", header_bomb(5_000, 4_001), page_html(109), "too large"),
        ("empty.png", picture(110), "", "empty"),
        ("blank.png", picture(111), " \n\t", "empty"),
        ("none.png", picture(112), None, "empty"),
        ("only_comment.png", picture(113), "<!-- nothing -->", "empty"),
        ("prose.png", picture(114), "I cannot see a page", "empty"),
        ("number.png", picture(115), 7, "unreadable"),
        ("surrogate.png", picture(116), page_html(116) + "\ud800", "unreadable"),
        ("../secret.png", None, page_html(117), "outside the folder"),
        (str(tmp_path / "secret.png"), None, page_html(118), "outside the folder"),
        (str(folder / "p000.png"), None, page_html(119), "outside the folder"),
        ("file:///etc/passwd", None, page_html(120), "outside the folder"),
        ("http://127.0.0.1:9/x.png", None, page_html(121), "outside the folder"),
        ("link.png", None, page_html(122), "outside the folder"),
        ("linked/secret.png", None, page_html(123), "outside the folder"),
        ("nul\0.png", None, page_html(124), "unreadable"),
        ("pipe.png", None, page_html(125), "unreadable"),
        (".", None, page_html(126), "unreadable"),
    ]
    write_folder(folder, [row[:3] for row in bad] + good_pages(40))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "inside.png").symlink_to(folder / "p001.jpg")
    os.mkfifo(folder / "pipe.png")
    with open(folder / "metadata.jsonl", "a") as lines:
        lines.write('{"file_name": "p000.png"\n\n[1]\n' + "[" * 100_000 + "\n" + '{"other": 1}\n')
    training, held_out, report = load(folder, tmp_path / "out", max_bad_share=0.5)
    found = dropped(tmp_path / "out")
    lines = [name for name in found if name.startswith("metadata.jsonl, byte ")]
    assert [found.pop(name) for name in lines] == ["unreadable"] * 4
    assert found == {name: reason for name, _, _, reason in bad}
    assert sorted(page["name"] for page in [*training, *held_out]) == [name for name, _, _ in good_pages(40)]
    assert str(report) == (
        "104 asked, 17 unreadable, 2 too large, 7 outside the folder, 5 empty, 40 kept; "
        "the dataset ended after 71 pages"
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_cut_or_spoilt_anywhere_is_told_as_unreadable_or_read(kind):
    whole = picture(1, kind)
    assert screenshot_size(whole) == (40, 30)
    rng = random.Random(0)
    for _ in range(150):
        with pytest.raises(BadPage):
            screenshot_size(whole[: rng.randrange(len(whole) * 9 // 10)])
        spoilt = bytearray(whole)
        for _ in range(3):
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
        try:
            screenshot_size(bytes(spoilt))
        except BadPage as bad:
            assert bad.reason in ("unreadable", "too large")


def test_too_many_broken_pages_are_refused_by_name(tmp_path):
    pages = [*good_pages(49), ("a.png", b"x", page_html(50))]
    _, _, report = load(write_folder(tmp_path / "in", pages), tmp_path / "out")
    assert str(report) == "104 asked, 1 unreadable, 49 kept; the dataset ended after 50 pages"  # 2 % are borne
    pages[7] = ("b.png", picture(7), "")
    with pytest.raises(DataError) as error:
        load(write_folder(tmp_path / "in", pages), tmp_path / "out")
    assert "2 of 50 pages are broken, more than --max_bad_share 0.02: " in str(error.value)
    assert all(part in str(error.value) for part in ("a.png (unreadable: 1 b", "b.png (empty", "dropped_pages.jsonl"))


def test_a_picture_that_the_system_does_not_read_is_a_broken_page(tmp_path):
    """Errors of the system itself: a name that is too long, a link to itself, half a character, a file for a folder."""
    folder = write_folder(tmp_path / "in", good_pages(12))
    (folder / "circle.png").symlink_to("circle.png")
    names = ["x" * 300 + ".png", "circle.png", "half\ud800.png", "p000.png/p.png"]
    with open(folder / "metadata.jsonl", "a") as file:
        for number, name in enumerate(names):
            file.write(json.dumps({"file_name": name, "text": page_html(100 + number)}) + "\n")
    _, _, report = load(folder, tmp_path / "out", eval_pages=1, max_bad_share=0.5)
    assert (report.kept, dict(report.dropped)) == (12, {"unreadable": 4})
    rows = map(json.loads, (tmp_path / "out" / "dropped_pages.jsonl").read_text().splitlines())
    details = {row["name"]: row["detail"] for row in rows}
    assert set(details) == set(names) and all(len(detail) <= 200 for detail in details.values())
    assert details[names[0]] == "the picture cannot be read: File name too long"
    with pytest.raises(DataError, match="4 of 16 pages are broken"):
        load(folder, tmp_path / "out", eval_pages=1)


def test_an_address_of_the_hub_that_cannot_be_fetched_is_a_broken_page(tmp_path, monkeypatch):
    """`datasets` names pictures of a Hub dataset so; nobody listens at the port."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for address in ("hf://datasets/a/b@main/p.png", "zip://p.png::hf://datasets/a/b@main/p.zip"):
        bad = dataset._picture({"bytes": None, "path": address}, Path("a/b"), "a/b")
        assert (bad.reason, len(str(bad)) <= 200) == ("unreadable", True)


# -----------------------------------------------------------------------------
# Lengths, duplicates, the split


def test_drops_are_counted_by_reason_and_told_in_one_line(tmp_path):
    pages = good_pages(100) + [(f"long{n}.png", picture(200 + n), page_html(200 + n, words=1200)) for n in range(3)]
    pages += [("bad.png", b"", page_html(300)), ("twin.png", picture(301), page_html(5).replace("><", ">\n  <"))]
    pages += [("shot.png", picture(6), page_html(302))]
    _, _, report = load(write_folder(tmp_path / "in", pages), tmp_path / "out", num_samples=996)
    assert str(report) == (
        "1,000 asked, 3 too long, 1 unreadable, 2 duplicate, 100 kept; the dataset ended after 106 pages"
    )
    names = dropped(tmp_path / "out")
    assert sorted(names.values()) == ["duplicate", "duplicate", "too long", "too long", "too long", "unreadable"]


def test_a_budget_that_no_page_meets_does_not_read_for_ever(tmp_path):
    folder = write_folder(tmp_path / "in", [("p.png", picture(0), page_html(0))])
    line = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(line * 3000)
    with pytest.raises(DataError, match="2 asked, 1,020 too long, 0 kept; gave up after 1,020 pages: too few"):
        load(folder, tmp_path / "out", max_html_tokens=2, num_samples=1, eval_pages=1)


def test_held_out_pages_have_no_twin_in_training_and_siblings_stay(tmp_path):
    originals = [(f"a{n:02d}.png", picture(n), page_html(n, 80)) for n in range(20)]
    # One word of eighty is another one: alike in 76 of 82 shingles.
    twins = [(f"b{n:02d}.png", picture(100 + n), html.replace("</p>", " changed</p>").replace("Page", "<b>Page</b>"))
             for n, (_, _, html) in enumerate(originals)]  # fmt: skip
    # The same template and style with other words, and pages with hardly a word.
    siblings = [(f"c{n:02d}.png", picture(200 + n), page_html(500 + n, 80)) for n in range(20)]
    short = [(f"d{n:02d}.png", picture(300 + n), f"<html><body><b style='top:{n}px'>Sign in</b></body></html>")
             for n in range(10)]  # fmt: skip
    folder = write_folder(tmp_path / "in", originals + twins + siblings + short)
    training, held_out, _ = load(folder, tmp_path / "out", eval_pages=10)
    held, kept = set(held_out["name"][:]), set(training["name"][:])
    other = str.maketrans("ab", "ba")
    expected = {name.translate(other) for name in held if name[0] in "ab"} - held
    assert dropped(tmp_path / "out") == dict.fromkeys(expected, "like a held-out page")
    assert not held & kept and len(held) == 10 and len(kept) == 70 - 10 - len(expected)
    assert len(expected) >= 2
    assert {name for name in held | kept if name[0] in "cd"} == {name for name, _, _ in siblings + short}


def test_a_dataset_smaller_than_asked_gives_a_fifth_at_most_to_the_held_out_part(tmp_path):
    training, held_out, report = load(write_folder(tmp_path / "in", good_pages(20)), tmp_path / "out", eval_pages=64)
    assert (len(training), len(held_out)) == (16, 4)
    assert str(report) == "164 asked, 20 kept; the dataset ended after 20 pages; 4 held out instead of 64"


@pytest.mark.parametrize(("count", "expected"), [(0, "0 kept"), (1, "1 kept"), (2, None)])
def test_too_few_pages_for_a_split(tmp_path, count, expected):
    folder = write_folder(tmp_path / "in", good_pages(count))
    if expected is None:
        training, held_out, _ = load(folder, tmp_path / "out")
        assert (len(training), len(held_out)) == (1, 1)
    else:
        with pytest.raises(DataError, match=expected if count else "no column file_name and text; there are: none"):
            load(folder, tmp_path / "out")


def test_no_held_out_page_is_needed_when_none_is_asked(tmp_path):
    training, held_out, _ = load(write_folder(tmp_path / "in", good_pages(1)), tmp_path / "out", eval_pages=0)
    assert (len(training), len(held_out)) == (1, 0)


# -----------------------------------------------------------------------------
# Real pages


def test_the_shared_pages_load_with_the_real_tokenizer(tmp_path, monkeypatch):
    pages = need_shared("pages")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(need_shared("qwen_tokenizer"))
    monkeypatch.setattr(sys.modules[__name__], "count_tokens", lambda html, *size: (len(tokenizer(html).input_ids), 1))
    training, held_out, report = load(pages, tmp_path, num_samples=1000, eval_pages=8, max_html_tokens=8192)
    assert str(report) == "1,008 asked, 8 too long, 66 kept; the dataset ended after 74 pages"
    assert (len(training), len(held_out)) == (58, 8)
    assert max(training["html_tokens"]) <= 8192


def anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status, which only Linux has")
def test_pages_are_stored_on_disk_and_not_in_memory(tmp_path, monkeypatch):
    shot = picture(0, size=(400, 300))
    rows = ((f"p{n}", shot + n.to_bytes(4, "big"), page_html(n)) for n in range(3_000))
    monkeypatch.setattr(dataset, "read_pages", lambda *args: rows)
    load("any/name", tmp_path, num_samples=100, eval_pages=50)  # what is imported and allocated once
    before = anonymous_mib()
    training, _, _ = load("any/name", tmp_path, num_samples=2_700, eval_pages=50)
    assert len(training) == 2_700 and training[2_699]["width"] == 400
    assert anonymous_mib() - before < 100  # the pages are 1 GB
