"""The folder: carried on, interrupted, summed up."""

import json
from types import SimpleNamespace

import numpy as np

from making import folder as folder_room
from making.drops import PageDropped
from making.folder import Folder, Report, picture_name, write_pages
from making.page_settings import Settings
from making.sources import Source, find_pages


def test_the_summary_counts_every_reason():
    sizes = {"characters": [1000, 500, 370], "cut": 0, "pictures": 2, "kept_back": 0, "renders": 3}
    drops = [{"reason": "blank"}, {"reason": "blank"}, {"reason": "render", "notes": {"style sheets remote": 2}}]
    report = Report(asked=4, written=[sizes], dropped=drops)
    assert str(report) == "4 asked, 1 did not render, 2 blank, 1 written; 1,000 -> 370 characters (-63 %)"
    assert str(Report(1, written=[{**sizes, "tokens": [200, 50, 40]}])).endswith("200 -> 40 tokens (-80 %)")
    assert report.summary()["dropped"] == {"blank": 2, "render": 1}
    assert report.summary()["could not be had"] == {"style sheets remote": 2}


def test_every_page_has_a_file_of_its_own():
    assert picture_name("a/b.html") == "a/b.html"
    names = [picture_name(name) for name in ("a b.html", "a_b.html", "../a.html", "é", "ü", "a?b.html")]
    assert len(set(names)) == 6 and not any(name.startswith(".") or "/." in name for name in names)


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def fake_page(monkeypatch, made: list) -> None:
    """make_page without a browser: the target is the page, its screenshot a picture of the page's length."""

    def make_page(name, html, settings, renderer, count):
        made.append(name)
        if "STOP" in html and len(made) < 4:
            raise KeyboardInterrupt
        if "BLANK" in html:
            raise PageDropped("blank", "every pixel has the same colour")
        sizes = [len(html)] * 3
        record = {"text": html, "width": 10, "height": 10, "cut": 0, "pictures": 0, "kept_back": 0, "renders": 3}
        return {**record, "characters": sizes}, np.full((10, 10, 3), len(html) % 256, np.uint8)

    monkeypatch.setattr(folder_room, "make_page", make_page)
    monkeypatch.setattr(folder_room, "inline_files", lambda page, *_: page.html)


def test_a_folder_is_carried_on_and_only_changed_pages_are_made_again(tmp_path, monkeypatch):
    made: list[str] = []
    fake_page(monkeypatch, made)
    site = tmp_path / "site"
    site.mkdir()
    for number in range(4):
        (site / f"{number}.html").write_text(f"<p>page {number}")
    (site / "4.html").write_text("<p>BLANK")
    (site / "5.html").write_text("<p>page 0")

    def run(**changes) -> tuple[list[str], Report]:
        made.clear()
        settings = Settings(**changes)
        folder = Folder(tmp_path / "out", settings.digest())
        pages = list(find_pages(str(site)))
        report = write_pages(pages, settings, folder, SimpleNamespace())
        folder.finish(report, report.summary())
        return sorted(made), report

    everything = [f"{number}.html" for number in range(6)]
    names, report = run()
    assert names == everything
    assert [row["reason"] for row in report.dropped] == ["blank", "duplicate"]
    assert run()[0] == ["5.html"]  # a duplicate may have lost its twin
    with open(tmp_path / "out" / "metadata.jsonl", "a") as file:
        file.write('{"page": "torn')
    (site / "1.html").write_text("<p>page 1, changed")
    names, report = run()
    assert names == ["1.html", "5.html"] and report.reused == 4
    rows = lines(tmp_path / "out" / "metadata.jsonl")
    assert [row["page"] for row in rows] == everything[:4]
    assert run(max_height=1000)[0] == everything
    (site / "0.html").unlink()
    run(max_height=1000)
    assert not list((tmp_path / "out").glob("0.html.*")) and len(list((tmp_path / "out").glob("*.html.*"))) == 4


def test_an_interrupted_run_leaves_a_valid_folder(tmp_path, monkeypatch):
    made: list[str] = []
    fake_page(monkeypatch, made)
    pages = [Source(f"{number}", html=f"<p>{number}{'STOP' * (number == 2)}") for number in range(9)]
    settings = Settings()

    def run() -> Report:
        folder = Folder(tmp_path / "out", settings.digest())
        report = write_pages(pages, settings, folder, SimpleNamespace(), pages_at_once=1)
        folder.finish(report, report.summary())
        return report

    report = run()
    assert report.interrupted and "interrupted" in str(report)
    rows = lines(tmp_path / "out" / "metadata.jsonl")
    assert [row["page"] for row in rows] == ["0", "1"]
    assert all((tmp_path / "out" / row["file_name"]).is_file() for row in rows)
    report = run()
    assert not report.interrupted and len(report.written) == 9 and report.reused == 2
