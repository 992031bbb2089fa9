"""The dataset on disk, and what became of each page that was asked for.

    with Folder(Path("pages"), settings.digest()) as folder, Workers(16, maker) as workers:
        report = write_pages(sources, folder, workers)
        folder.write_summary(report.summary())

In it: the screenshots, metadata.jsonl and dropped.jsonl with a line for each page, and summary.json. Lines go to disk
and are not kept: an index in a file (SQLite) knows where each one starts, so memory does not grow with the pages.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import signal
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from making.drops import REASONS
from making.sources import Source
from making.workers import Made, Task, Workers
from scoring.bar import progress_bar
from training.errors import SettingsError

RETRIED = ("render", "changing", "duplicate", "died")  # another run may see them otherwise
UNITS = ("characters", "tokens")


@dataclass
class Report:
    """What became of the pages that were asked for: numbers alone."""

    asked: int = 0
    reused: int = 0
    written: int = 0
    interrupted: bool = False
    reasons: Counter[str] = field(default_factory=Counter)  # of dropped pages
    notes: Counter[str] = field(default_factory=Counter)  # what could not be had
    facts: Counter[str] = field(default_factory=Counter)  # of written pages: sums
    sums: dict[str, list[int]] = field(default_factory=dict)  # of written pages: [source, normalised, target] by unit
    browser: str = ""

    def count(self, row: Mapping[str, Any]) -> None:
        """One page, by its line."""
        self.asked += 1
        self.notes.update(row.get("notes", {}))
        if "reason" in row:
            self.reasons[row["reason"]] += 1
            return
        self.written += 1
        for name in ("pictures", "renders"):
            self.facts[name] += row[name]
        for name in ("cut", "kept_back", *UNITS):
            self.facts[name] += bool(row.get(name))
        for unit in UNITS:
            if unit in row:
                self.sums[unit] = [sum(pair) for pair in zip(self.sums.get(unit, [0] * 3), row[unit])]

    def lengths(self) -> dict[str, list[int]]:
        """Sums over the written pages of [source, normalised, target], in the units that all of them have."""
        return {unit: sums for unit, sums in self.sums.items() if self.facts[unit] == self.written}

    def __str__(self) -> str:
        parts = [
            f"{self.asked:,} asked",
            *(f"{self.reasons[reason]:,} {words}" for reason, words in REASONS.items() if self.reasons[reason]),
        ]
        parts.append(f"{self.written:,} written")
        unit, (before, _, after) = list(self.lengths().items() or [("characters", [0, 0, 0])])[-1]
        share = f" ({after / before - 1:+.0%})".replace("%", " %") if before else ""
        ending = "; interrupted, the same command goes on" if self.interrupted else ""
        return f"{', '.join(parts)}; {before:,} -> {after:,} {unit}{share}{ending}"

    def summary(self) -> dict[str, Any]:
        """What summary.json holds; sums over the written pages of [source, normalised, target]."""
        return {
            "line": str(self),
            "asked": self.asked,
            "written": self.written,
            "taken from an earlier run": self.reused,
            "dropped": dict(self.reasons),
            "[source, without scripts and pictures, target]": self.lengths(),
            "cut": self.facts["cut"],
            "pictures": self.facts["pictures"],
            "pages with a reduction kept back": self.facts["kept_back"],
            "renders per page": round(self.facts["renders"] / max(1, self.written), 2),
            "could not be had": dict(self.notes),
        }


# -----------------------------------------------------------------------------
# The folder

FILES = ("metadata.jsonl", "dropped.jsonl")  # of written pages, of dropped ones: `dropped` is the place in here
INDEX = ".index.sqlite"
# Some 150 bytes a page, on disk. earlier: what other runs have made, under the same settings. lines: of this run, by
# the page's number in the source. targets: who has it first. old_files: pictures that lines of before have named.
TABLES = """
create table earlier (page text primary key, dropped integer, start integer, source text, reason text, file text,
                      target blob, asked integer default 0) without rowid;
create table lines (number integer primary key, dropped integer, start integer, reused integer);
create table targets (target blob primary key, number integer) without rowid;
create table old_files (file text primary key) without rowid;
create table files (file text primary key) without rowid;
"""


class Folder:
    """The dataset on disk. Each page is there as soon as it is made; what an earlier run made is found again."""

    def __init__(self, place: Path, digest: str) -> None:
        """SettingsError where it cannot be written into, or holds what is none of ours."""
        self.place, self.digest, self.index, self.lock = place, digest, None, None
        try:
            place.mkdir(parents=True, exist_ok=True)
            self._own()
            (place / INDEX).unlink(missing_ok=True)  # of a run that was killed: the lines are the truth
            self.index = sqlite3.connect(place / INDEX, isolation_level=None)
            # Nothing in it outlives this run, so nothing is made safe; and no other process wants it.
            self.index.executescript("pragma journal_mode=off; pragma synchronous=off; pragma locking_mode=exclusive;")
            self.index.executescript(TABLES + "begin;")
            for dropped, lines in enumerate([self._read_earlier(dropped) for dropped in (0, 1)]):
                if self._one("select count(*) from earlier where dropped = ?", dropped)[0] != lines:
                    self._rewrite_earlier(dropped)
        except (OSError, sqlite3.OperationalError) as error:
            self.close()
            raise SettingsError(f"--out {place}: {error}") from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the folder; twice does no harm."""
        if self.index is not None:
            self.index.close()
            (self.place / INDEX).unlink(missing_ok=True)
        if self.lock is not None:
            os.close(self.lock)
        self.index = self.lock = None

    def _own(self) -> None:
        """One run a folder: two would write over each other. The system lets go when the process ends."""
        import fcntl  # not on Windows, where --help is still answered

        self.lock = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                raise SettingsError(
                    f"--out {self.place}: another make_pages.py is writing there; wait, or name another"
                ) from None  # else: a file system without such locks

    def _read_earlier(self, dropped: int) -> int:
        """Finds what other runs have made; how many lines there are, -1 where the last one is torn."""
        file, whole, lines = self.place / FILES[dropped], True, 0
        file.touch()
        with open(file, "rb") as stream:
            for start, line, row in _rows(stream):
                whole, lines = line.endswith(b"\n"), lines + 1
                if row is None:  # the line at which an earlier run was killed
                    continue
                if not {"page", "settings", "source"} <= row.keys():
                    raise SettingsError(
                        f"--out {self.place} holds a dataset that make_pages.py did not write: name another folder"
                    )
                if "file_name" in row:
                    self.index.execute("insert or ignore into old_files values (?)", [row["file_name"]])
                if row["settings"] == self.digest:
                    facts = [row["page"], dropped, start, row["source"], row.get("reason"), row.get("file_name")]
                    facts += [target_digest(row["text"]) if "text" in row else None, 0]
                    # A page in both files was written last, or is since known to be a duplicate.
                    written = self._one("select 1 from earlier where page = ? and not dropped", row["page"])
                    if not (dropped and written) or row["reason"] == "duplicate":
                        self.index.execute("insert or replace into earlier values (?, ?, ?, ?, ?, ?, ?, ?)", facts)
        return lines if whole else -1

    def _rewrite_earlier(self, dropped: int) -> None:
        """Without lines that are torn, superseded or of other settings."""
        file = self.place / FILES[dropped]
        with open(file, "rb") as stream, replaced(file) as copy:
            for start, line, row in _rows(stream):
                page = (row or {}).get("page")
                if self._one("select start from earlier where page = ? and dropped = ?", page, dropped) == (start,):
                    self.index.execute("update earlier set start = ? where page = ?", [copy.tell(), page])
                    copy.write(line.rstrip(b"\n") + b"\n")

    def _one(self, query: str, *values: Any) -> tuple[Any, ...] | None:
        return self.index.execute(query, values).fetchone()

    def earlier(self, page: str) -> str | None:
        """The source digest under which an earlier run made the page, where what it made still stands."""
        found = self._one("select source, reason, file from earlier where page = ?", page)
        if found is None:
            return None
        source, reason, file = found
        stands = reason not in RETRIED if reason else (self.place / file).is_file()
        return source if stands else None

    def keep(self, made: Made) -> None:
        """Puts one page where it belongs: its screenshot first, then its line in one piece.

        Of pages with the same target the first in the source stays, whichever is made first.
        """
        number, page, row, picture = made.task.number, made.task.source.name, made.row, made.picture
        if row is None:
            dropped, start, source, target = self._one(
                "select dropped, start, source, target from earlier where page = ?", page
            )
        else:
            row = row | {"settings": self.digest}
            dropped, start, source = int("reason" in row), None, row["source"]
            target = None if dropped else target_digest(row["text"])
        if target is not None:
            first = self._one("select number from targets where target = ?", target)
            if first and first[0] < number:
                dropped, start, row, picture = 1, None, self._duplicate(page, source), None
            else:
                self.index.execute("insert or replace into targets values (?, ?)", [target, number])
                if first:
                    self._drop_line(first[0])
        reused = start is not None
        if picture is not None:
            replace_file(self.place / row["file_name"], picture)
        if not reused:
            start = self._append(dropped, row)
        self.index.execute("insert into lines values (?, ?, ?, ?)", [number, dropped, start, reused])
        self.index.execute("update earlier set asked = 1 where page = ?", [page])

    def _duplicate(self, page: str, source: str) -> dict[str, Any]:
        row = {"page": page, "source": source, "settings": self.digest, "reason": "duplicate"}
        return row | {"detail": "the target of an earlier page"}

    def _drop_line(self, number: int) -> None:
        """A page was written, and one before it in the source is found to have its target. Its picture and its line
        stay until the end, so that the folder is one that loads."""
        (start,) = self._one("select start from lines where number = ?", number)
        with open(self.place / FILES[0], "rb") as lines:
            lines.seek(start)
            row = json.loads(lines.readline())
        self.index.execute("insert or ignore into old_files values (?)", [row["file_name"]])
        start = self._append(1, self._duplicate(row["page"], row["source"]))
        self.index.execute("update lines set dropped = 1, start = ?, reused = 0 where number = ?", [start, number])

    def _append(self, dropped: int, row: Mapping[str, Any]) -> int:
        """Where the line starts."""
        line = json.dumps(row, ensure_ascii=False) + "\n"
        with open(self.place / FILES[dropped], "ab", buffering=0) as file:
            start = file.tell()
            file.write(line.encode("utf-8", "replace"))
        return start

    def finish(self, interrupted: bool = False) -> Report:
        """Puts the lines in the order of the source, counts them, and removes pictures that no line names any more.

        Where this run was interrupted, lines of pages that it has not come to stay behind those."""
        report = Report(interrupted=interrupted)
        for dropped, name in enumerate(FILES):
            with open(self.place / name, "rb") as lines, replaced(self.place / name) as copy:
                asked = self.index.execute("select start from lines where dropped = ? order by number", [dropped])
                for (start,) in asked:
                    self._copy(lines, start, copy, report)
                if interrupted:
                    rest = "select start from earlier where dropped = ? and not asked order by start"
                    for (start,) in self.index.execute(rest, [dropped]):
                        self._copy(lines, start, copy, None)
        report.reused = self._one("select count(*) from lines where reused")[0]
        for (file,) in self.index.execute("select file from old_files where file not in (select file from files)"):
            (self.place / file).unlink(missing_ok=True)
        return report

    def _copy(self, lines: BinaryIO, start: int, copy: BinaryIO, report: Report | None) -> None:
        lines.seek(start)
        row = json.loads(line := lines.readline())
        copy.write(line)
        if report is not None:
            report.count(row)
        if "file_name" in row:
            self.index.execute("insert or ignore into files values (?)", [row["file_name"]])

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        replace_file(self.place / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())


def target_digest(html: str) -> bytes:
    """8 bytes that stand for a target: of 100 million pages two would share them once in 3,000 times."""
    return hashlib.sha256(html.encode("utf-8", "replace")).digest()[:8]


def _rows(stream: BinaryIO) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """(where it starts, the line, what it says or None where it is torn)."""
    start = 0
    for line in stream:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        yield start, line, row if isinstance(row, dict | None) else {}
        start += len(line)


@contextlib.contextmanager
def replaced(file: Path) -> Iterator[BinaryIO]:
    """A stream for new content, which takes the place of the old one at the end, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    with open(part, "wb") as stream:
        yield stream
    os.replace(part, file)


def replace_file(file: Path, content: bytes) -> None:
    with replaced(file) as stream:
        stream.write(content)


# -----------------------------------------------------------------------------
# A run


def write_pages(sources: Iterable[Source], folder: Folder, workers: Workers, total: int | None = None) -> Report:
    """Makes every page; Ctrl-C leaves a folder that is valid and can be gone on with. `total` is for the bar.

    So does a source that ends in a SettingsError, which is raised again.
    """
    tasks = (Task(number, source, folder.earlier(source.name)) for number, source in enumerate(sources))
    interrupted, browser = False, ""
    try:
        with progress_bar("pages", total) as bar:
            for made in workers.make(tasks):
                with uninterrupted():
                    folder.keep(made)
                browser = made.browser or browser
                bar.update()
    except KeyboardInterrupt:
        interrupted = True
    except SettingsError:
        folder.finish(interrupted=True)
        raise
    report = folder.finish(interrupted)
    report.browser = browser
    return report


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is over: a picture without its line would never be found again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda caught, _: came.append(caught)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt
