"""make_pages.py, as its users start it."""

import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import datasets
import numpy as np
import psutil
import pytest
from conftest import ROOT, need_browser
from PIL import Image
from small_site import write_site

import make_pages as mp
from making.page_settings import Settings
from scoring import renders
from training.dataset import KNOWN_DATASETS, DatasetSource
from training.errors import SettingsError
from training.page_checks import screenshot_size
from training.reading import read_pages

PAGE = "<!DOCTYPE html>\n<html><head><title>t</title></head><body><p>words</p></body></html>"


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def settings_of(*flags: str, out="out") -> Settings:
    return mp.settings_from(mp.parse_arguments(["site", "--out", str(out), *flags]))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--widths", "wide"), "--widths wide: whole numbers"),
        (("--widths", "1280,5"), "--widths 1280,5: from 100"),
        (("--max_height", "0"), "--max_height 0"),
        (("--height", "3000"), "--height 3000: from 1 px to --max_height 2000"),
        (("--max_html_tokens", "100"), "needs --tokenizer"),
        (("--tokenizer", "nowhere"), "--tokenizer nowhere: no tokenizer.json"),
        (("--max_html_characters", "-1"), "--max_html_characters -1"),
        (("--pages_at_once", "0"), "--pages_at_once 0: at least 1"),
        (("--private_repo",), "--private_repo needs --push_to_hub"),
    ],
)
def test_arguments_that_cannot_work_are_named(flags, words):
    with pytest.raises(SettingsError, match=words.replace("(", r"\(")):
        settings_of(*flags)


def test_main_says_what_is_wrong_and_exits_2(tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert mp.main([str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    assert mp.main([str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "<p>"}\n')
    assert mp.main([str(tmp_path / "other"), "--out", str(tmp_path / "other")]) == 2
    errors = capsys.readouterr().err
    assert "no such file or folder" in errors and "no .html or .htm" in errors and "name another folder" in errors

    def missing(*arguments):
        raise renders.BrowserMissing("no Chromium here: install one")

    monkeypatch.setattr(mp, "find_chromium", missing)
    (tmp_path / "a.html").write_text(PAGE)
    assert mp.main([str(tmp_path / "a.html"), "--out", str(tmp_path / "out")]) == 2
    assert "error: no Chromium here: install one" in capsys.readouterr().err


def test_what_is_known_of_a_dataset_is_said_and_holds_where_nothing_is_typed(tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"talk": [PAGE]}) + "\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def missing(*arguments):
        raise renders.BrowserMissing("no Chromium here")

    monkeypatch.setattr(mp, "find_chromium", missing)
    entry = DatasetSource(html_column="talk.0", note="one page alone")
    monkeypatch.setitem(KNOWN_DATASETS, str(rows), entry)
    flags = [str(rows), "--out", str(tmp_path / "out")]
    assert mp.main(flags) == 2
    assert capsys.readouterr().err == f"{rows}: one page alone\nerror: no Chromium here\n"  # its column was found
    assert mp.main([*flags, "--html_column", "code"]) == 2
    assert "no column code; there are: talk" in capsys.readouterr().err


def test_a_wrong_column_is_named_however_few_pages_are_asked_for(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    row = json.dumps({"file_name": "x.png", "text": PAGE})
    (tmp_path / "data" / "metadata.jsonl").write_text(f"{row}\n" * 9)
    flags = [str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--html_column", "code", "--num_samples", "2"]
    assert mp.main(flags) == 2
    assert "no column code; there are: file_name, text. --html_column names the right one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 81),
        (sqlite3.OperationalError("database or disk is full"), 81),
    ],
)
def test_a_full_disk_is_told_as_what_it_is(tmp_path, monkeypatch, capsys, error, code):
    """A mock: no disk can be filled here."""

    def full(*arguments):
        raise error

    monkeypatch.setattr(mp, "write_pages", full)
    monkeypatch.setattr(mp, "find_chromium", lambda: None)
    (tmp_path / "a.html").write_text(PAGE)
    assert mp.main([str(tmp_path / "a.html"), "--out", str(tmp_path / "out")]) == 81
    assert "the same command goes on" in capsys.readouterr().err


@pytest.fixture
def browser():
    need_browser()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return write_site(tmp_path_factory.mktemp("site"))


@pytest.mark.slow
def test_the_command_line_is_interrupted_carried_on_and_its_folder_loads(browser, site, tmp_path):
    out = tmp_path / "pages"
    command = [sys.executable, str(ROOT / "make_pages.py"), str(site), "--out", str(out), "--pages_at_once", "2"]
    mark = f"MAKE_PAGES_TEST={os.getpid()}"
    environment = os.environ | {"MAKE_PAGES_TEST": str(os.getpid())}
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": environment,
        "start_new_session": True,
    }
    process = subprocess.Popen(command, **options)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metadata.jsonl").is_file() and (out / "metadata.jsonl").stat().st_size:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers hear it, too
            break
        time.sleep(0.05)
    text, errors = process.communicate(timeout=120)
    assert process.returncode in (0, 85), text + errors
    before = {row["page"]: (out / row["file_name"]).stat().st_mtime_ns for row in lines(out / "metadata.jsonl")}
    assert not renders.marked(mark), "nobody is left behind"
    process = subprocess.Popen(command, **options)
    workers = []
    while not workers and process.poll() is None:
        children = psutil.Process(process.pid).children()
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    workers[0].kill()  # and its page is made by another
    text, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and not renders.marked(mark), errors
    assert text.startswith("5 asked, 1 without text, 1 blank, 3 written; "), text
    rows = lines(out / "metadata.jsonl")
    assert [row["page"] for row in rows] == ["index.html", "long.html", "pre.html"]
    after = {row["page"]: (out / row["file_name"]).stat().st_mtime_ns for row in rows}
    assert before.items() <= after.items()
    loaded = {name: html for name, picture, html in read_pages(str(out), DatasetSource(), 0)}
    assert loaded == {row["file_name"]: row["text"] for row in rows}
    for name, picture, _ in read_pages(str(out), DatasetSource(), 0):
        width, height = screenshot_size(picture)
        assert (width, height) == next((row["width"], row["height"]) for row in rows if row["file_name"] == name)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["written"] == 3 and summary["dropped"] == {"blank": 1, "without text": 1}
    assert summary["source_is_on_hub"] is False


def test_the_demos_pages_come_from_here(browser, tmp_path):
    """Texts to the letter; pictures where the fonts are those of the bundled ones."""
    maker = [
        sys.executable,
        str(ROOT / "demo" / "make_demo_pages.py"),
        "--family",
        "demo",
        "--pages",
        "6",
        "--seed",
        "7",
    ]
    subprocess.run([*maker, "--html", str(tmp_path / "site")], check=True, timeout=60)
    sizes = ["--widths", "224", "--height", "112"]
    assert mp.main([str(tmp_path / "site"), "--out", str(tmp_path / "out"), *sizes]) == 0
    bundled, made_now = ROOT / "demo" / "pages", tmp_path / "out"
    pairs = list(zip(lines(bundled / "metadata.jsonl"), lines(made_now / "metadata.jsonl")))
    assert [one["text"] for one, _ in pairs] == [two["text"] for _, two in pairs] and len(pairs) == 6
    browsers = [json.loads((folder / "summary.json").read_text())["browser"] for folder in (bundled, made_now)]
    for one, two in pairs:
        pictures = [Image.open(folder / row["file_name"]) for folder, row in ((bundled, one), (made_now, two))]
        assert pictures[0].size == pictures[1].size
        assert browsers[0] != browsers[1] or np.array_equal(*map(np.asarray, pictures))
