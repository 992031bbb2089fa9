"""The rows of JSON Lines, JSON and CSV, in any order, of which no more than one is in memory.

    table = open_table(file, "jsonl")
    for number in range(len(table)): row = table.row(number)        # None where there is nothing; BadPage

A row that cannot be read is a BadPage and harms no other: `datasets` would end the reading at a number among names.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
from array import array
from collections.abc import Iterator
from typing import BinaryIO, Protocol

from training.dataset import BadPage, Row
from training.errors import DataError


class Table(Protocol):
    """Rows by their numbers."""

    def __len__(self) -> int: ...

    def row(self, number: int) -> Row | None:
        """The row, None for an empty line; BadPage."""

    def place(self, number: int) -> str:
        """Where in the file it stands."""


def open_table(file: BinaryIO, kind: str) -> Table:
    """The rows of a file that can be read from any place; `kind` is jsonl, json or csv. DataError."""
    if kind == "csv":
        return CsvTable(file)
    lines = JsonLines(file)
    if kind == "json" and not lines.begin_well():
        return JsonList(file)
    return lines


class JsonLines:
    """One JSON object a line."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.starts = _starts(file)

    def __len__(self) -> int:
        return len(self.starts)

    def place(self, number: int) -> str:
        return f"byte {self.starts[number]}"

    def begin_well(self) -> bool:
        """Whether the first of several lines is a row, or there is none; a JSON file of one line is one value."""
        try:
            return not self.starts or (len(self.starts) > 1 and self.row(0) is not None)
        except BadPage:
            return False

    def row(self, number: int) -> Row | None:
        self.file.seek(self.starts[number])
        line = self.file.readline().strip()
        if not line:
            return None
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadPage("unreadable", f"no JSON object: {error}") from error
        if not isinstance(row, dict):
            raise BadPage("unreadable", f"no JSON object but {type(row).__name__}")
        return row


def _starts(file: BinaryIO) -> array:
    """Where each line begins; the lines themselves stay on disk."""
    file.seek(0)
    starts, place = array("Q"), 0
    for line in file:
        starts.append(place)
        place += len(line)
    return starts


class JsonList:
    """A list of JSON objects, or the one list in a JSON object, or that object alone; in memory, since only the whole
    file tells."""

    def __init__(self, file: BinaryIO) -> None:
        file.seek(0)
        try:
            value = json.loads(file.read())
        except (ValueError, RecursionError) as error:
            raise DataError(f"neither a JSON object a line nor a list of them: {str(error)[:200]}") from error
        lists = [part for part in value.values() if isinstance(part, list)] if isinstance(value, dict) else []
        only = lists[0] if len(lists) == 1 and all(isinstance(row, dict) for row in lists[0]) else [value]
        self.rows = value if isinstance(value, list) else only

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, number: int) -> str:
        return f"row {number}"

    def row(self, number: int) -> Row | None:
        if not isinstance(self.rows[number], dict):
            raise BadPage("unreadable", f"no JSON object but {type(self.rows[number]).__name__}")
        return self.rows[number]


class CsvTable:
    """Comma-separated values, or by semicolons or tabs where the head has no comma; every value is text."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        csv.field_size_limit(2**31 - 1)  # of 131,072 characters otherwise, and pages are longer
        file.seek(0)
        head = file.readline().decode("utf-8-sig", "surrogateescape")
        self.delimiter = next((mark for mark in ",;\t" if mark in head), ",")
        self.starts = array("Q")
        self.columns: list[str] = []
        self._find_records()

    def _find_records(self) -> None:
        """Where each record begins: at the line that the reader has not asked for yet."""
        end = self.file.seek(0, os.SEEK_END)
        self.file.seek(0)
        self.columns = next(csv.reader(self._lines(), delimiter=self.delimiter), [])
        while (place := self.file.tell()) < end:
            self.starts.append(place)
            with contextlib.suppress(csv.Error):  # told by `row`
                next(csv.reader(self._lines(), delimiter=self.delimiter), None)

    def _lines(self) -> Iterator[str]:
        """The lines from where the file stands; not by the file itself, which reads ahead."""
        for line in iter(self.file.readline, b""):
            yield line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")

    def __len__(self) -> int:
        return len(self.starts)

    def place(self, number: int) -> str:
        return f"byte {self.starts[number]}"

    def row(self, number: int) -> Row | None:
        self.file.seek(self.starts[number])
        try:
            values = next(csv.reader(self._lines(), delimiter=self.delimiter), [])
        except csv.Error as error:
            raise BadPage("unreadable", f"no CSV: {error}") from error
        if len(values) > len(self.columns):
            raise BadPage("unreadable", f"{len(values)} values for {len(self.columns)} columns")
        return dict(zip(self.columns, values)) or None
