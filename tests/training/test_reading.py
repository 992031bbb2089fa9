"""The rows of a dataset arrive as they are, from whatever holds them; a broken one is named in its place."""

import itertools
import json
from pathlib import Path

import pytest
from small_pages import dropped, good_pages, load, page_html, picture, write_folder

from training import reading
from training.dataset import (
    KNOWN_DATASETS,
    BadPage,
    DatasetSource,
    Row,
)
from training.errors import DataError


def test_every_page_of_a_folder_arrives_as_it_is(tmp_path):
    pages = good_pages(30)
    training, held_out, report = load(write_folder(tmp_path / "in", pages), tmp_path / "out")
    assert (len(training), len(held_out)) == (26, 4)
    assert str(report).startswith("104 asked, 30 kept; the dataset ended after 30 pages: ")
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
    assert str(report).startswith("102 asked, 1 unreadable, 11 kept; the dataset ended after 12 pages: ")
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
    assert str(report).startswith("102 asked, 12 kept; the dataset ended after 12 pages: ")
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
    assert str(report).startswith(
        "101 asked, 1 unreadable, 2 outside the folder, 9 kept; the dataset ended after 12 pages: "
    )


def test_wrong_columns_are_named_beside_those_that_are_there(tmp_path):
    folder = write_folder(tmp_path / "in", good_pages(6))
    with pytest.raises(DataError) as error:
        load(folder, tmp_path / "out", html_column="html")
    assert str(error.value).startswith("no column html; there are: file_name, text. --image_column and --html_column")


def test_a_wrong_column_is_named_before_the_first_row_and_one_that_some_rows_lack_is_none(tmp_path):
    """A reader that asks for few rows never comes to the end of the folder."""
    folder = write_folder(tmp_path / "in", good_pages(6))
    with pytest.raises(DataError, match="no column html; there are: file_name, text"):
        next(reading.read_pages(str(folder), DatasetSource(image_column="file_name", html_column="html"), 0))
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(['{"torn', '{"file_name": "x.png"}', "", *lines]) + "\n")
    first, second, third = itertools.islice(reading.read_html(str(folder), DatasetSource()), 3)
    assert [str(html).partition(":")[0] for _, html in (first, second)] == ["no JSON object", "no text in this row"]
    assert third[1] == page_html(0)


@pytest.mark.parametrize(
    ("dataset", "changes", "message"),
    [
        ("./nowhere", {}, "--dataset ./nowhere: no such file or folder"),
        ("a/b/c/d", {}, "--dataset a/b/c/d: no such file or folder"),
        ("EMPTY", {}, "no file is in there"),
        ("damaged.parquet", {}, "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_a_data_error(tmp_path, monkeypatch, dataset, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        load(dataset, tmp_path / "out", **changes)


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
    too_long = next(name for name in details if name.startswith("metadata.jsonl, byte"))  # no name for a page either
    assert set(details) == {too_long, "circle.png", "half\\ud800.png", "p000.png/p.png"}
    assert all(len(detail) <= 200 for detail in details.values())
    assert details[too_long] == "the picture cannot be read: File name too long"
    assert details["circle.png"] == "the picture cannot be read: a link to itself"
    with pytest.raises(DataError, match="4 of 16 pages are broken"):
        load(folder, tmp_path / "out", eval_pages=1)


def test_an_address_of_the_hub_that_cannot_be_fetched_is_a_broken_page(tmp_path, monkeypatch):
    """`datasets` names pictures of a Hub dataset so; nobody listens at the port."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for address in ("hf://datasets/a/b@main/p.png", "zip://p.png::hf://datasets/a/b@main/p.zip"):
        rows = reading._Rows("a/b", DatasetSource(), "--dataset")
        bad = reading._picture({"bytes": None, "path": address}, rows)
        assert (bad.reason, len(str(bad)) <= 200) == ("unreadable", True)


BASE64 = "iVBORw0KGgo" + "A" * 200_000


def one_bad_cell(folder: Path, value: object) -> str:
    """What is said of one bad image cell among eleven good ones; the others must arrive."""
    pages = good_pages(11)
    write_folder(folder, pages)
    row = json.dumps({"file_name": value, "text": page_html(99)})
    with open(folder / "metadata.jsonl", "a") as lines:
        lines.write(row + "\n")
    read = list(reading.read_pages(str(folder), DatasetSource(image_column="file_name"), 1))
    bad = [(name, shot) for name, shot, _ in read if isinstance(shot, BadPage)]
    assert len(read) == 12 and len(bad) == 1
    ((name, said),) = bad
    assert len(name) <= 255 and len(str(said)) <= 200 and name.encode()
    return str(said)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("nothing.png", "no such file in the dataset's folder"),
        ("a" * 300 + ".png", "File name too long"),
        (BASE64, "File name too long"),
        (BASE64.replace("A", "A/"), "cannot be read"),
        (f"data:image/png;base64,{BASE64}", "a data: URL; decode it into a file"),
        ("\ud83d.png", "cannot be read"),
        ("loop.png", "a link to itself"),
        ("secret.png", "Permission denied"),
        ("", "no file but a folder, a pipe or a device"),
        ("/dev/zero", "only files inside"),
        ("zero.png", "only files inside"),
        ("nul\0.png", "text with NUL in it"),
        (7, "int"),
        (None, "NoneType"),
        (True, "bool"),
        ({}, "no fields"),
        ({"url": "http://127.0.0.1:9/x.png", "pixels": [0] * 99_999}, "fields named url, pixels"),
        ({"bytes": None, "path": None}, "fields named bytes, path"),
        ({"bytes": [137, 80, 78, 71] * 9999}, "fields named bytes"),
        ([], "a list of 0"),
        (["p000.png", "p001.jpg"], "a list of 2; --image_column file_name.0 takes the first"),
        ([["p000.png"]], "a list of 1"),
        ([[[0, 0, 0]] * 999] * 999, "a list of 999"),
        ("http://127.0.0.1:9/x.png", "an address"),
        ("hf://datasets/a/b@main/p.png", "an address"),
    ],
    ids=lambda value: str(value)[:20].encode("ascii", "replace").decode(),
)
def test_one_bad_cell_is_told_in_its_place_and_ends_nothing(tmp_path, monkeypatch, value, said):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    if value == "secret.png":  # as root may read anything, the system's answer is made
        whole = Path.read_bytes
        refused = PermissionError(13, "Permission denied")
        (folder / "secret.png").write_bytes(b"x")

        def read_bytes(self: Path) -> bytes:
            if self.name == "secret.png":
                raise refused
            return whole(self)

        monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert said in one_bad_cell(folder, value)


def test_a_list_of_one_picture_is_that_picture(tmp_path):
    pages = good_pages(6)
    rows = [{"images": [name], "text": html} for name, _, html in pages]
    rows += [{"images": [{"path": name, "bytes": None}], "text": html} for name, _, html in pages]
    folder = write_folder(tmp_path / "in", pages)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = list(reading.read_pages(str(folder), DatasetSource(image_column="images"), 0))
    assert sorted(shot for _, shot, _ in read) == sorted([data for _, data, _ in pages] * 2)


@pytest.mark.slow
def test_bytes_in_a_list_are_read_and_never_quoted(tmp_path):
    import datasets

    pages = good_pages(4)
    cells = [[{"bytes": data + bytes(300_000), "path": None}] for _, data, _ in pages]
    cells[2] *= 2
    cells[3] = []
    rows = {"images": cells, "text": [html.encode() for _, _, html in pages]}  # a binary column of text
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    read = list(reading.read_pages(str(tmp_path / "train.parquet"), DatasetSource(image_column="images"), 1))
    bad = sorted(str(shot) for _, shot, _ in read if isinstance(shot, BadPage))
    assert bad == [
        "no picture and no file name but a list of 0",
        "no picture and no file name but a list of 2; --image_column images.0 takes the first",
    ]
    assert sorted(html for _, _, html in read) == sorted(html for _, _, html in pages)


def test_the_columns_of_chats_are_named_as_they_must_be_typed(tmp_path):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "<image>"}]
    trl = {"images": ["p.png"], "messages": [*turns, {"role": "assistant", "content": "<p>"}]}
    parts = {"images": ["p.png"], "messages": [{"role": "assistant", "content": [{"type": "text", "text": "<p>"}]}]}
    llava = {
        "id": 1,
        "image": "p.png",
        "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": ""}],
    }
    cases = [
        (trl, "--image_column images.0 --html_column messages.2.content"),
        (llava, "--html_column conversations.1.value"),
    ]
    cases += [
        (parts, "--html_column messages.0.content.0.text"),
        ({"shot": "a.jpg", "code": "<p>"}, "--image_column shot"),
    ]
    for number, (row, said) in enumerate(cases):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match="no column") as error:
            next(reading.read_pages(str(file), DatasetSource(), 0))
        assert said in str(error.value)


def test_a_script_is_not_run_and_says_so(tmp_path):
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text("raise SystemExit(3)")
    with pytest.raises(
        DataError, match="scripted cannot be read: it is read by a script of its own, which nobody runs"
    ):
        load(folder, tmp_path / "out")


@pytest.mark.parametrize(
    "error", [RuntimeError("x" * 900), NotImplementedError(), KeyError("train"), AttributeError("a\nb")]
)
def test_whatever_datasets_raises_is_a_data_error_in_a_line(tmp_path, monkeypatch, error):
    """In place of a Hub: which errors a dataset there may cause is not for us to say."""
    import datasets

    def raises(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset_builder", raises)
    with pytest.raises(DataError, match=type(error).__name__) as raised:
        load("some/thing", tmp_path / "out")
    assert len(str(raised.value)) < 500 and "\n" not in str(raised.value)
