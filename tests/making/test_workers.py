"""Worker processes: answers, deaths, hangs, and that nobody is left behind."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from making.sources import Source
from making.workers import Made, Task, Workers, picture_name


def test_every_page_has_a_file_of_its_own():
    assert picture_name("a/b.html") == "a/b.html"
    names = [picture_name(name) for name in ("a b.html", "a_b.html", "../a.html", "é", "ü", "a?b.html")]
    assert len(set(names)) == 6 and not any(name.startswith(".") or "/." in name for name in names)


ASLEEP = ["sleep", "617"]


@dataclass
class Playing:
    """(worker process) Does what the page says. What it starts stands for its browser."""

    folder: Path

    def open(self) -> None:
        self.browser = psutil.Popen(ASLEEP, start_new_session=True)
        if (self.folder / "none begins").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    def close(self) -> None:
        self.browser.kill()

    def make(self, task: Task) -> Made:
        word = task.source.html
        first = not (begun := self.folder / f"{task.number}").exists()
        begun.touch()
        if word == "dies" or (word == "dies once" and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "raises":
            raise ZeroDivisionError("of the worker")
        if word == "hangs":
            time.sleep(600)
        return Made(task, {"page": task.source.name, "pid": os.getpid()}, b"picture")


def tasks(*words: str) -> list[Task]:
    return [Task(number, Source(f"page {number}", html=word)) for number, word in enumerate(words)]


@pytest.fixture
def workers(tmp_path):
    """Two of them; afterwards none is left, nor anything that they have started."""
    before = {child.pid for child in psutil.Process().children()}  # other tests' browsers
    workers = Workers(2, Playing(tmp_path), seconds_per_page=4)
    with workers:
        yield workers
    new = [child.cmdline() for child in psutil.Process().children() if child.pid not in before]
    left = [command for command in new if "resource_tracker" not in str(command)]
    asleep = [one.pid for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ASLEEP]
    assert not left and not asleep


@pytest.mark.slow
def test_a_page_that_kills_its_worker_is_tried_again_and_named(workers):
    made = list(workers.make(tasks("fine", "dies once", "dies", "hangs", "fine", "fine")))
    rows = {one.task.number: one.row for one in made}
    assert len(made) == len(rows) == 6
    assert {number for number, row in rows.items() if "pid" in row} == {0, 1, 4, 5}
    died, hung = rows[2], rows[3]
    assert died["reason"] == hung["reason"] == "died" and died["page"] == "page 2"
    assert died["detail"] == "its worker ended by signal 9, then ended by signal 9"
    assert hung["detail"] == "its worker took over 4 s, then took over 4 s"


@pytest.mark.slow
def test_what_a_worker_raises_is_raised_here_with_its_place(workers):
    with pytest.raises(ZeroDivisionError, match="of the worker") as raised:
        list(workers.make(tasks("fine", "raises")))
    assert "test_workers.py" in raised.value.__notes__[0]


@pytest.mark.slow
def test_workers_that_never_begin_end_the_run(workers, tmp_path):
    (tmp_path / "none begins").touch()
    with pytest.raises(RuntimeError, match="3 workers have died before they began; the last one ended by signal 9"):
        list(workers.make(tasks("fine", "fine")))


@pytest.mark.slow
def test_leaving_ends_those_at_work(workers):
    pages = workers.make(tasks("fine", "hangs"))
    assert next(pages).row["page"] == "page 0"
