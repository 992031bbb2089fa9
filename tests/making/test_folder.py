"""The folder: carried on, interrupted, put in order, summed up."""

import json
import signal
import tracemalloc
from collections.abc import Iterable, Iterator

import pytest

from making.folder import INDEX, Folder, Report, write_pages
from making.sources import Source, find_pages
from making.workers import Made, Task
from training.errors import SettingsError

SIZES = {"characters": [1000, 500, 370], "cut": 0, "pictures": 2, "kept_back": 0, "renders": 3}


def test_the_summary_counts_every_reason():
    report, with_tokens = Report(), Report()
    for row in (SIZES, *[{"reason": "blank"}] * 2, {"reason": "render", "notes": {"style sheets remote": 2}}):
        report.count(row)
    assert str(report) == "4 asked, 1 did not render, 2 blank, 1 written; 1,000 -> 370 characters (-63 %)"
    with_tokens.count({**SIZES, "tokens": [200, 50, 40]})
    assert str(with_tokens).endswith("200 -> 40 tokens (-80 %)")
    assert report.summary()["dropped"] == {"blank": 2, "render": 1}
    assert report.summary()["could not be had"] == {"style sheets remote": 2}
    assert str(Report()) == "0 asked, 0 written; 0 -> 0 characters"


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


class Playing:
    """What workers do, in this process and without a browser: the target is the page, the picture its length. `order`
    is how many pages are ready at once, the last one first."""

    def __init__(self, order: int = 1) -> None:
        self.order, self.made = order, []

    def make(self, tasks: Iterable[Task]) -> Iterator[Made]:
        ready: list[Made] = []
        for task in tasks:
            ready.append(self.page(task))
            if len(ready) == self.order:
                yield from reversed(ready)
                ready.clear()
        yield from reversed(ready)

    def page(self, task: Task) -> Made:
        html = task.source.html or task.source.path.read_text()
        row = {"page": task.source.name, "source": html}
        if html == task.earlier:
            return Made(task, None)
        self.made.append(task.source.name)
        if "STOP" in html and len(self.made) < 4:
            raise KeyboardInterrupt
        if "BLANK" in html:
            return Made(task, row | {"reason": "blank", "detail": "every pixel has the same colour"})
        sizes = SIZES | {"characters": [len(html)] * 3}
        return Made(task, {"file_name": f"{task.source.name}.png", "text": html, **sizes, **row}, b"%d" % len(html))


def run(out, pages, digest="a", order=1) -> tuple[list[str], Report]:
    """(pages made anew, in order; the report)"""
    workers = Playing(order)
    with Folder(out, digest) as folder:
        report = write_pages(pages, folder, workers)
        folder.write_summary(report.summary())
    return sorted(workers.made), report


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.html").write_text(f"<p>page {number}")
    (folder / "4.html").write_text("<p>BLANK")
    (folder / "5.html").write_text("<p>page 0")
    return folder


@pytest.mark.parametrize("order", [1, 6])
def test_a_folder_is_carried_on_and_only_changed_pages_are_made_again(tmp_path, site, order):
    out, everything = tmp_path / "out", [f"{number}.html" for number in range(6)]

    def again(digest="a"):
        return run(out, find_pages(str(site)), digest, order)

    names, report = again()
    assert names == everything and report.asked == 6
    assert [row["reason"] for row in lines(out / "dropped.jsonl")] == ["blank", "duplicate"]
    names, report = again()
    assert names == ["5.html"] and report.reused == 5  # a duplicate may have lost its twin
    with open(out / "metadata.jsonl", "a") as file:
        file.write('{"page": "torn')
    (site / "1.html").write_text("<p>page 1, changed\u2028and not a line's end")
    names, report = again()
    assert names == ["1.html", "5.html"] and report.reused == 4
    assert again()[0] == ["5.html"]
    rows = lines(out / "metadata.jsonl")
    assert [row["page"] for row in rows] == everything[:4]
    assert not list(out.glob("5.html.*"))  # the picture of a duplicate
    assert again("b")[0] == everything
    (site / "0.html").unlink()
    again("b")
    assert sorted(path.name for path in out.glob("*.png")) == [f"{name}.png" for name in (*everything[1:4], "5.html")]
    assert not list(out.glob(".*"))


def test_an_interrupted_run_leaves_a_valid_folder(tmp_path):
    pages, out = [Source(f"{number}", html=f"<p>{number}{'STOP' * (number == 2)}") for number in range(9)], "out"
    _, report = run(tmp_path / out, pages)
    assert report.interrupted and "interrupted" in str(report)
    rows = lines(tmp_path / out / "metadata.jsonl")
    assert [row["page"] for row in rows] == ["0", "1"]
    assert all((tmp_path / out / row["file_name"]).is_file() for row in rows)
    _, report = run(tmp_path / out, pages[1:], order=3)  # again interrupted
    assert [row["page"] for row in lines(tmp_path / out / "metadata.jsonl")] == ["0", "1"]
    _, report = run(tmp_path / out, [*pages[:2], *pages[3:]])
    assert not report.interrupted and report.written == 8 and report.reused == 2
    assert json.loads((tmp_path / out / "summary.json").read_text())["written"] == 8


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path):
    """Nothing is put in order then: lines stand as they came, the last one torn, and the index is left behind."""
    pages, out = [Source(f"{number}", html=f"<p>{number % 8}") for number in range(10)], tmp_path / "out"
    folder = Folder(out, "a")
    for made in [Playing().page(Task(number, pages[number])) for number in (8, 3, 1, 0)]:
        folder.keep(made)  # 8 and 0 are the same: first 8 is written, then 0, and 8 becomes a duplicate
    folder.index.close()
    folder.index = None  # so closing does not remove it
    folder.close()
    with open(out / "metadata.jsonl", "ab") as file:
        file.write(b'{"page": "2", "te')
    assert (out / INDEX).exists() and (out / "8.png").exists(), "and all that lines name is there"
    names, report = run(out, pages)
    assert names == ["2", "4", "5", "6", "7", "8", "9"] and report.reused == 3
    assert [row["page"] for row in lines(out / "metadata.jsonl")] == [str(number) for number in range(8)]
    assert [row["page"] for row in lines(out / "dropped.jsonl")] == ["8", "9"]
    assert not (out / "8.png").exists() and not (out / INDEX).exists()


def test_a_source_that_breaks_off_leaves_a_folder_in_order(tmp_path):
    def pages():
        yield from (Source(f"{number}", html=f"<p>{number}") for number in range(4))
        raise SettingsError("the network is gone")

    with pytest.raises(SettingsError, match="network"):
        run(tmp_path / "out", pages(), order=2)
    assert [row["page"] for row in lines(tmp_path / "out" / "metadata.jsonl")] == ["0", "1", "2", "3"]


def test_a_folder_is_one_runs_own(tmp_path):
    with Folder(tmp_path / "out", "a"), pytest.raises(SettingsError, match="is writing there"):
        Folder(tmp_path / "out", "a")
    Folder(tmp_path / "out", "a").close()
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"--out .*file: "):
        Folder(tmp_path / "file", "a")


def test_a_page_is_written_whole_before_ctrl_c_is_heard(tmp_path, monkeypatch):
    with Folder(tmp_path / "out", "a") as folder:
        append = folder._append

        def pressed(*arguments):
            signal.raise_signal(signal.SIGINT)
            return append(*arguments)

        monkeypatch.setattr(folder, "_append", pressed)
        report = write_pages([Source(f"{number}", html=f"<p>{number}") for number in range(3)], folder, Playing())
    assert report.interrupted and report.written == 1
    assert len(lines(tmp_path / "out" / "metadata.jsonl")) == len(list((tmp_path / "out").glob("*.png"))) == 1


def test_memory_does_not_grow_with_the_pages(tmp_path):
    """Python's own: what SQLite holds is bounded by its cache of 2 MB."""
    peaks = []
    for count in (100, 1000):
        pages = (Source(f"{number}", html=f"<p>{number}" + "x" * 5000) for number in range(count))
        tracemalloc.start()
        _, report = run(tmp_path / f"{count}", pages, order=4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert report.written == count
    assert peaks[1] - peaks[0] < 100 * 900, "bytes; a row has 5 kB"
