"""The push of pages, against a Hub on the loopback device, driven by the real main and the real huggingface_hub."""

import hashlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import PROGRAMS, ROOT, need_browser
from fake_hub import READER, WRITER, FakeHub
from PIL import Image

from making import pushing
from making.pushing import card_of, columns, write_shards
from training.dataset import DatasetSource, known_dataset
from training.reading import read_pages


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        yield server


def make_folder(folder: Path, pages: int) -> list[dict]:
    """What make_pages.py leaves behind, with pictures of noise."""
    folder.mkdir()
    rows = []
    for number in range(pages):
        row = {"file_name": f"{number}.png", "page": f"{number}.html", "text": f"<p>{number}", "viewport": 1280}
        row |= {"width": 40, "height": 30 + number, "characters": [90, 50, 4], "tokens": [9, 5, number]}
        Image.effect_noise((row["width"], row["height"]), 90).save(folder / row["file_name"])
        rows.append(row)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_shards_hold_every_page_once_and_are_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(pushing, "GROUP_PAGES", 2)
    rows = make_folder(tmp_path / "pages", 7)
    (place := tmp_path / "shards").mkdir()
    first = []
    for shard in write_shards(tmp_path / "pages", place, 4_000):
        assert list(place.iterdir()) == [shard.file], "one at a time"
        first.append((shard, shard.file.read_bytes()))
        shard.file.unlink()
    assert [shard.file.name for shard, _ in first] == [f"train-{number:05d}.parquet" for number in range(len(first))]
    assert 1 < len(first) < 7 and sum(shard.pages for shard, _ in first) == 7
    tables = [pq.read_table(io.BytesIO(content)) for _, content in first]
    found = [row for table in tables for row in table.to_pylist()]
    assert [row["page"] for row in found] == [row["page"] for row in rows]
    for row, known in zip(found, rows):
        assert row["image"] == {
            "bytes": (tmp_path / "pages" / known["file_name"]).read_bytes(),
            "path": known["file_name"],
        }
        assert (row["characters"], row["tokens"]) == (4, known["tokens"][2])
    again = [shard.file.read_bytes() for shard in write_shards(tmp_path / "pages", place, 4_000)]
    assert again == [content for _, content in first]
    trained = {html for _, _, html in read_pages(str(place), known_dataset(str(place)), 0)}
    assert trained == {row["text"] for row in rows}
    assert columns(False).keys() == columns(True).keys() - {"tokens"}


SUMMARY = {
    "line": "2 asked, 2 written; 9 -> 5 characters (-44 %)",
    "source": "USER/set",
    "settings": {"scripts": "drop", "widths": [1280], "height": 720, "max_height": 2000, "tokenizer": None},
    "browser": {"chromium": "1.2"},
}


def test_the_card_says_where_pages_come_from_and_under_which_licence(tmp_path):
    card = card_of("user/name", [], SUMMARY, DatasetSource(licence="cc-by-4.0", refused="a benchmark"))
    assert 'license: "cc-by-4.0"\n' in card and 'source_datasets: ["USER/set"]\n' in card
    assert "A benchmark." in card and "2 asked" in card and "`tokens`" not in card
    (tmp_path / "secret").mkdir()
    card = card_of("user/name", [], SUMMARY | {"source": str(tmp_path / "secret")}, DatasetSource())
    assert "license:" not in card and "whoever shares them has to know it" in card
    assert "secret" not in card and "HTML files" in card
    assert not re.search(r"\{\w*\}", card)


@pytest.fixture
def site(tmp_path):
    need_browser()
    folder = tmp_path / "site"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.html").write_text(f"<title>t</title><h1>Page {number}</h1>")
    return folder


def run(hub: FakeHub, cwd: Path, *command: str, token: str = WRITER) -> subprocess.CompletedProcess:
    environment = hub.environment(cwd / "hub_home", token)
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120, cwd=cwd
    )
    assert token not in done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_pages_arrive_and_load_by_name_alone(hub, site, tmp_path):
    command = [str(ROOT / "make_pages.py"), "site", "--out", "out", "--push_to_hub", "name", "--private_repo"]
    hub.fail_next("/commit/", 403, message="no")
    done = run(hub, tmp_path, *command)
    assert done.returncode == 86, done.stdout + done.stderr
    again = done.stderr.strip().splitlines()[-1].partition("To upload them: ")[2]
    assert "The pages are whole in out." in done.stderr and not hub.commits("user/name")
    program, script, *flags = shlex.split(again)
    assert (program, script) == ("python", "make_pages.py")
    done = run(hub, tmp_path, str(ROOT / script), *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"{hub.url}/datasets/user/name\n")
    assert hub.count("PUT", "/lfs/") == 1, "the shard was there already"
    assert hub.repos["user/name"].private and len(hub.commits("user/name")) == 1
    assert set(hub.repos["user/name"].files) == {".gitattributes", "README.md", "data/train-00000.parquet"}
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert not list((tmp_path / "out").glob(".*")) and len(rows) == 2
    done = run(hub, tmp_path, str(PROGRAMS / "loads_pages.py"), "user/name")
    assert done.returncode == 0, done.stdout + done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert [row["text"] for row in loaded["rows"]] == [row["text"] for row in rows]
    assert [row["size"] for row in loaded["rows"]] == [[row["width"], row["height"]] for row in rows]
    files = {row["text"]: (tmp_path / "out" / row["file_name"]).read_bytes() for row in rows}
    assert loaded["trained"] == {html: hashlib.sha256(picture).hexdigest() for html, picture in files.items()}


@pytest.mark.slow
def test_who_may_not_push_is_told_before_anything_is_rendered(hub, site, tmp_path):
    command = [str(ROOT / "make_pages.py"), "site", "--out", "out", "--push_to_hub", "user/name"]
    done = run(hub, tmp_path, *command, token=READER)
    assert done.returncode == 2 and "error: --push_to_hub 'user/name': " in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
