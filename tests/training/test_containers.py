"""Whatever holds pictures and pages on a disk gives them, or a word says what to type."""

import csv
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from small_pages import good_pages, picture, write_folder

from training.dataset import BadPage, DatasetSource, known_dataset
from training.errors import DataError
from training.reading import read_pages

PAGES = good_pages(12)
WANTED = sorted((data, html) for _, data, html in PAGES)


def arrived(dataset: Path, **typed: str) -> list[tuple[object, object]]:
    """(screenshot, html) of each page, as a training reads them, and the number of rows that was told before."""
    told: list[int] = []
    read = list(read_pages(str(dataset), known_dataset(str(dataset), **typed), 3, None, 0, told.append))
    assert not [str(shot) for _, shot, _ in read if isinstance(shot, BadPage)]
    assert told == [len(read)]
    return sorted((shot, html) for _, shot, html in read)


def pictures_in(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data, _ in PAGES:
        (folder / name).write_bytes(data)
    return folder


def rows(before: str = "", column: str = "file_name") -> list[dict[str, str]]:
    return [{column: before + name, "text": html} for name, _, html in PAGES]


def write_rows(file: Path, some: list[dict[str, str]]) -> None:
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in some))
    elif file.suffix == ".json":
        file.write_text(json.dumps(some, indent=1))
    else:
        with open(file, "w", newline="") as text:
            writer = csv.DictWriter(text, [*some[0]])
            writer.writeheader()
            writer.writerows(some)


@pytest.mark.parametrize(
    "name", ["metadata.csv", "data.jsonl", "train.jsonl", "pages.json", "labels.csv", "my-train.jsonl"]
)
@pytest.mark.parametrize("column", ["file_name", "image"])
def test_a_table_of_any_name_beside_its_pictures(tmp_path, name, column):
    folder = pictures_in(tmp_path / "in" / "shots").parent
    write_rows(folder / name, rows("shots/", column))
    assert arrived(folder) == WANTED
    assert arrived(folder / name) == WANTED


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metadata.parquet", "pages.parquet"])
def test_parquet_that_names_the_pictures_beside_it(tmp_path, monkeypatch, name):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = pictures_in(tmp_path / "in")
    datasets.Dataset.from_list(rows()).to_parquet(folder / name)
    assert arrived(folder) == WANTED


def test_the_table_of_the_split_is_taken(tmp_path):
    folder = pictures_in(tmp_path / "in")
    write_rows(folder / "train.jsonl", rows()[:8])
    write_rows(folder / "test.jsonl", rows()[8:])
    assert len(arrived(folder)) == 8 and len(arrived(folder, split="test")) == 4
    with pytest.raises(DataError, match=r"no split dev in test\.jsonl, train\.jsonl; --dataset_split names another"):
        arrived(folder, split="dev")
    (folder / "train.jsonl").unlink()
    with pytest.raises(DataError, match="no split train in test"):
        arrived(folder)


def test_a_folder_for_each_split(tmp_path):
    for split, part in (("train", rows()[:8]), ("test", rows()[8:])):
        write_rows(pictures_in(tmp_path / "in" / split) / "metadata.jsonl", part)
    assert len(arrived(tmp_path / "in")) == 8 and len(arrived(tmp_path / "in", split="test")) == 4


def test_names_as_windows_writes_them_and_whole_paths(tmp_path):
    folder = pictures_in(tmp_path / "in" / "images").parent
    write_rows(folder / "metadata.jsonl", rows("images\\"))
    assert arrived(folder) == WANTED
    write_rows(folder / "metadata.jsonl", rows(".\\images\\..\\images\\"))
    assert arrived(folder) == WANTED
    (folder / "metadata.jsonl").unlink()
    write_rows(folder / "data.jsonl", rows(f"{folder}/images/"))
    assert arrived(folder) == WANTED
    (tmp_path / "secret.png").write_bytes(picture(1))
    outside = ["..\\secret.png", "images\\..\\..\\secret.png", str(tmp_path / "secret.png"), "C:\\secret.png"]
    write_rows(folder / "data.jsonl", [{"file_name": name, "text": "<p>"} for name in outside])
    read = list(read_pages(str(folder), DatasetSource(), 0))
    assert sorted(shot.reason for _, shot, _ in read) == ["outside the folder"] * 3 + ["unreadable"]


@pytest.mark.parametrize("top", ["", "my_pages/", "a/b/"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "data.jsonl"])
def test_a_zip_is_a_folder(tmp_path, top, name):
    folder = pictures_in(tmp_path / "in" / top / "images").parent
    write_rows(folder / name, rows("images/"))
    (folder / ".DS_Store").touch()
    (tmp_path / "in" / "__MACOSX").mkdir()
    (tmp_path / "in" / "__MACOSX" / "._x.jsonl").write_text("x")
    file = Path(shutil.make_archive(str(tmp_path / "pages"), "zip", tmp_path / "in"))
    assert arrived(file) == WANTED
    assert arrived(tmp_path / "in") == WANTED


def test_what_is_wrong_in_a_zip_is_told_in_its_place(tmp_path):
    folder = write_folder(tmp_path / "in", PAGES)
    with open(folder / "metadata.jsonl", "a") as lines:
        for name in ("missing.png", "../secret.png", "/etc/hostname", "http://127.0.0.1:9/x.png", "spoilt.png"):
            lines.write(json.dumps({"file_name": name, "text": "<p>"}) + "\n")
    mark = b"a picture that the ZIP holds as it is"
    (folder / "spoilt.png").write_bytes(mark)
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    whole = (tmp_path / "p.zip").read_bytes()
    (tmp_path / "p.zip").write_bytes(whole.replace(mark, mark[::-1]))
    read = list(read_pages(str(tmp_path / "p.zip"), DatasetSource(), 0))
    bad = {name: f"{shot.reason}: {shot}" for name, shot, _ in read if isinstance(shot, BadPage)}
    assert len(read) == 17 and {name: said.partition(":")[0] for name, said in bad.items()} == {
        "missing.png": "unreadable",
        "../secret.png": "outside the folder",
        "/etc/hostname": "outside the folder",
        "http://127.0.0.1:9/x.png": "outside the folder",
        "spoilt.png": "unreadable",
    }
    (tmp_path / "p.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"p\.zip: no ZIP that can be read"):
        arrived(tmp_path / "p.zip")
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr("train.parquet", b"PAR1")
    with pytest.raises(DataError, match=r"p\.zip: no metadata\.jsonl and no pairs .* give the unpacked folder"):
        arrived(tmp_path / "p.zip")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["html", "HTM", "xhtml"])
@pytest.mark.parametrize("below", ["", "train/", "a/b/", "other/"])
def test_pictures_and_pages_of_the_same_names(tmp_path, packed, kind, below):
    folder = pictures_in(tmp_path / "in" / below)
    for number, (name, _, html) in enumerate(PAGES):
        (folder / Path(name).with_suffix(f".{kind}")).write_bytes(
            (b"\xef\xbb\xbf" if number % 2 else b"") + html.encode()
        )
    (tmp_path / "in" / "README.md").write_text("How I made it.")
    (folder / "rick.jpg").write_bytes(picture(99, "JPEG"))  # a picture of the pages themselves
    (folder / PAGES[0][0].replace("png", "webp")).write_bytes(picture(98, "WEBP"))  # the PNG comes first
    if packed:
        shutil.make_archive(str(tmp_path / "pages"), "zip", tmp_path / "in")
    assert arrived(tmp_path / ("pages.zip" if packed else "in")) == WANTED


def test_pages_without_a_picture_are_named_and_where_none_has_one_the_remedy(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.html").write_text("<p>page")
    (folder / "logo.png").write_bytes(picture(9))
    with pytest.raises(DataError, match="3 pages and 1 pictures, none of which have the same name") as error:
        arrived(folder)
    assert f"make_pages.py {folder} --out FOLDER` draws" in str(error.value)
    (folder / "a.png").write_bytes(picture(1))
    (folder / "b.png").write_bytes(picture(2))
    (folder / "b.html").write_bytes("<p>caf\u00e9".encode("latin-1"))
    (folder / "secret.html").symlink_to("/etc/hostname")
    (folder / "secret.png").write_bytes(picture(3))
    said = {
        name: str(shot) for name, shot, _ in read_pages(str(folder), DatasetSource(), 0) if isinstance(shot, BadPage)
    }
    assert said["c.html"] == "no picture of the same name beside the page"
    assert "not in UTF-8" in said["b.png"] and "make_pages.py reads other encodings" in said["b.png"]
    assert "only files inside" in said["secret.png"] and "a.png" not in said


@pytest.mark.parametrize("layout", ["images/{0}{1} html/{0}.html", "{0}.html{1} {0}.html", "{0}{1} {2}.HTML"])
def test_pairs_in_folders_of_their_own_and_in_other_spellings(tmp_path, layout):
    for name, data, html in PAGES:
        stem, dot, kind = name.partition(".")
        parts = layout.format(stem, dot + kind, stem.upper()).split()
        for part, content in zip(parts, (data, html.encode())):
            (tmp_path / "in" / part).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / part).write_bytes(content)
    assert arrived(tmp_path / "in") == WANTED


def test_a_clone_whose_rows_lie_below_its_card(tmp_path):
    folder = pictures_in(tmp_path / "in" / "data" / "images").parent
    write_rows(folder / "rows.jsonl", rows("images/"))
    (tmp_path / "in" / "README.md").write_text("What this is.")
    assert arrived(tmp_path / "in") == WANTED


@pytest.mark.slow
@pytest.mark.parametrize("split", [None, "test"])
def test_what_save_to_disk_has_written(tmp_path, split):
    import datasets

    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    cells = {"image": [{"bytes": data, "path": None} for _, data, _ in PAGES], "text": [html for *_, html in PAGES]}
    saved = datasets.Dataset.from_dict(cells, features=features)
    if split is None:
        saved.save_to_disk(tmp_path / "in")
        assert arrived(tmp_path / "in") == WANTED
        return
    datasets.DatasetDict({"test": saved}).save_to_disk(tmp_path / "in")
    assert arrived(tmp_path / "in", split="test") == WANTED
    with pytest.raises(DataError, match=r"no split train; there are: test\. --dataset_split names the right one"):
        arrived(tmp_path / "in")


@pytest.mark.slow
def test_a_tar_of_pairs_is_web_dataset_and_says_what_to_type(tmp_path):
    folder = pictures_in(tmp_path / "in")
    for name, data, html in PAGES:
        (folder / name).unlink()
        (folder / Path(name).with_suffix(".png")).write_bytes(data)
        (folder / Path(name).with_suffix(".html")).write_text(html)
    file = Path(shutil.make_archive(str(tmp_path / "pages"), "tar", folder, "."))
    source = known_dataset(str(file), image_column="png", html_column="html")
    assert sorted((shot, html) for _, shot, html in read_pages(str(file), source, 0)) == WANTED
    with pytest.raises(
        DataError, match=r"no column image and text; there are: .*: --image_column png --html_column html"
    ):
        next(read_pages(str(file), DatasetSource(), 0))


@pytest.mark.parametrize(
    ("name", "said"), [("a.tar.gz", "unpack it, and give the folder"), ("a.txt", "no dataset in one")]
)
def test_a_file_that_holds_no_dataset_is_refused_by_name(tmp_path, name, said):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=said):
        arrived(tmp_path / name)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.parquet")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        arrived(tmp_path / "p.parquet")


def test_a_folder_without_a_dataset_says_what_one_is(tmp_path):
    (tmp_path / "notes.foo").write_text("none")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path, tmp_path / "empty"):
        with pytest.raises(DataError, match=r"HTML files of the same names \(shop.png, shop.html\)"):
            arrived(folder)
