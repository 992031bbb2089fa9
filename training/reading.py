"""The rows of a dataset, wherever it lies: on the Hub, in a folder, in a file.

    for name, screenshot, html in read_pages(dataset, resolve_dataset(dataset), seed): ...
    for name, html in read_html("USER/NAME", known_dataset("USER/NAME")):   # make_pages.py, which draws the screenshots

A row that cannot be read is a BadPage in its place; what ends the reading is a DataError.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from training.dataset import BadPage, DatasetSource, Row
from training.errors import DataError, is_out_of_memory

MAX_PICTURE_BYTES = 64 * 2**20
FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow", ".parquet": "parquet"}


def read_pages(
    dataset: str, source: DatasetSource, seed: int, revision: str | None = None, skip: int = 0
) -> Iterator[tuple[str, bytes | BadPage, Any]]:
    """Yields (name, the screenshot's file or what is wrong with the row, html) in an order that `seed` alone decides,
    without the first `skip` of them, whose pictures are not opened.

    DataError where `dataset` cannot be read, or lacks a column.
    """
    path = Path(dataset).expanduser()
    in_folder = (path / "metadata.jsonl").is_file()
    rows = _read_rows(dataset, source, ("image_column", "html_column"), "--dataset", seed, revision)
    for name, row in itertools.islice(rows, skip, None):
        try:
            screenshot, html = source.page(row) if not isinstance(row, BadPage) else (row, None)
        except BadPage as bad:
            screenshot, html = bad, None
        yield name, _picture(screenshot, path, "" if in_folder else dataset), html


def read_html(dataset: str, source: DatasetSource) -> Iterator[tuple[str, Any]]:
    """Yields (name, html or the BadPage that says why there is none) in the dataset's own order, without reading any
    screenshot. DataError as read_pages."""
    for name, row in _read_rows(dataset, source, ("html_column",), "SOURCE"):
        try:
            yield name, row if isinstance(row, BadPage) else source.html(row)
        except BadPage as bad:
            yield name, bad


def _read_rows(
    dataset: str,
    source: DatasetSource,
    needed: Sequence[str],
    asked_by: str,
    seed: int | None = None,
    revision: str | None = None,
) -> Iterator[tuple[str, Row | BadPage]]:
    """(name, row) of each row. `needed` are the fields of `source` whose columns are read, `asked_by` what the user
    typed `dataset` after; `seed` None: in the dataset's own order."""
    import datasets

    path = Path(dataset).expanduser()
    if not path.exists() and (dataset.startswith((".", "~", "/")) or dataset.count("/") > 1):
        raise DataError(f"{asked_by} {dataset}: no such file or folder")
    wanted = {} if source.page_of else {name: getattr(source, name) for name in needed}
    try:
        if (path / "metadata.jsonl").is_file():
            yield from _read_folder(path, source, wanted, seed)
            return
        place: dict[str, Any] = {"path": str(path) if path.exists() else dataset, "name": source.config}
        place["split"] = source.split
        if path.is_file():
            place = {"path": FILE_KINDS.get(path.suffix, "parquet"), "data_files": str(path), "split": "train"}
        stream = datasets.load_dataset(**place, revision=revision, streaming=True)
        if stream.features:
            stream = stream.decode(False)  # at any depth: a picture stays a file, or a broken one would end the stream
        first = next(iter(stream), {})
        _check_columns(first, wanted)
        if stream.features and wanted:  # what nobody needs is not fetched
            columns = {column if column in first else column.split(".")[0] for column in wanted.values()}
            stream = stream.select_columns(sorted(columns))
        if seed is not None:  # shards are shuffled, too; the buffer holds undecoded screenshots, some 100 MB
            stream = stream.shuffle(seed=seed, buffer_size=500)
        for number, row in enumerate(stream):
            yield f"row-{number:07d}", row
    except (OSError, ValueError) as error:  # not found, no network, no such config or split, damaged parquet
        raise DataError(f"{asked_by} {dataset} cannot be read: {type(error).__name__}: {error}") from error


def _read_folder(
    folder: Path, source: DatasetSource, wanted: Mapping[str, str], seed: int | None
) -> Iterator[tuple[str, Row | BadPage]]:
    """The lines of metadata.jsonl, each named by its picture's file where that is a name."""
    with open(folder / "metadata.jsonl", "rb") as lines:
        starts = list(itertools.accumulate(map(len, lines), initial=0))[:-1]  # the pages themselves stay on disk
        _check_folder_columns(lines, wanted)
        for start in starts if seed is None else random.Random(seed).sample(starts, len(starts)):
            lines.seek(start)
            if not (line := lines.readline().strip()):
                continue
            name = f"metadata.jsonl, byte {start}"
            try:
                row = _parse_line(line)
            except BadPage as bad:
                yield name, bad
                continue
            row = _with_twin(row)
            file = row.get("file_name" if source.page_of else source.image_column)
            yield file if isinstance(file, str) else name, row


def _parse_line(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadPage("unreadable", f"no JSON object: {error}"[:200]) from error
    if not isinstance(row, dict):
        raise BadPage("unreadable", f"no JSON object but {type(row).__name__}")
    return row


def _check_folder_columns(lines: BinaryIO, wanted: Mapping[str, str]) -> None:
    """DataError before the first row is given away, since nobody may ask for the last one. One row may lack what the
    others have: read until every column was seen, which is one line of a sound folder, all lines of a wrong name."""
    lines.seek(0)
    columns: dict[str, None] = {}
    for line in lines:
        with contextlib.suppress(BadPage):
            columns |= dict.fromkeys(_parse_line(line))
        if not _missing(columns, wanted, _with_twin(columns)):
            return
    _check_columns(columns, wanted, _with_twin(columns))


def _with_twin(row: Row) -> Row:
    """The imagefolder convention: what `file_name` names is the column `image`. Either name asks for it."""
    if "file_name" in row:
        return {"image": row["file_name"], **row}
    return {"file_name": row["image"], **row} if "image" in row else row


def _missing(columns: Collection[str], wanted: Mapping[str, str], more: Collection[str] = ()) -> list[str]:
    known = {*columns, *more}
    return [column for column in wanted.values() if column not in known and column.split(".")[0] not in known]


def _check_columns(columns: Collection[str], wanted: Mapping[str, str], more: Collection[str] = ()) -> None:
    """DataError that names the columns there are; `more` may be asked for, too."""
    if missing := _missing(columns, wanted, more):
        flags = " and ".join(f"--{name}" for name in wanted)
        raise DataError(
            f"no column {' and '.join(missing)}; there are: {', '.join(columns) or 'none'}. "
            f"{flags} {'name the right ones' if len(wanted) > 1 else 'names the right one'}"
        )


def _picture(value: Any, path: Path, dataset: str) -> bytes | BadPage:
    """The content of an image cell: bytes, or a file inside the dataset, wherever `..` and links lead.

    `dataset` is the name or path that `datasets` has read, whose cells may hold addresses of its own making; empty
    where the names are a folder's own.
    """
    if isinstance(value, BadPage):
        return value
    source = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str) or "\0" in source:
        return BadPage("unreadable", f"no picture and no file name: {source!r}"[:200])
    from huggingface_hub.errors import HTTPError

    try:
        if dataset and re.match(rf"(?:zip://[^:]*::)?hf://datasets/{re.escape(dataset)}@", source):
            return _fetched(source)
        return _picture_file(source, path.parent if path.is_file() else path, absolute=bool(dataset))
    # Names too long or with half a character, links in a circle, no permission, no network, damaged archives.
    except (OSError, ValueError, RuntimeError, HTTPError, zipfile.BadZipFile) as error:
        if is_out_of_memory(error):
            raise
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        return BadPage("unreadable", f"the picture cannot be read: {why}"[:200])


def _fetched(address: str) -> bytes:
    import fsspec

    with fsspec.open(address, "rb") as file:
        return file.read(MAX_PICTURE_BYTES)


def _picture_file(name: str, folder: Path, absolute: bool) -> bytes | BadPage:
    """The file of that name inside `folder`; `absolute`: the name may be."""
    file = (folder / name).resolve()
    if "://" in name or not file.is_relative_to(folder.resolve()) or (not absolute and Path(name).is_absolute()):
        return BadPage("outside the folder", "only files inside the dataset's folder are read")
    if not file.is_file():  # nor a pipe or a device, which would keep us waiting
        return BadPage("unreadable", "no such file")
    too_large = file.stat().st_size > MAX_PICTURE_BYTES
    return BadPage("too large", f"{file.stat().st_size:,} bytes") if too_large else file.read_bytes()
