"""The rows of a dataset, wherever it lies: on the Hub, in a folder, in a file.

    for name, screenshot, html in read_pages(dataset, resolve_dataset(dataset), seed): ...
    for name, html in read_html("USER/NAME", known_dataset("USER/NAME")):   # make_pages.py, which draws the screenshots

A row that cannot be read is a BadPage in its place; what ends the reading is a DataError. Files that hold names are
read here (training/tables.py), a row at a time; what holds the pictures themselves is read by `datasets`.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import random
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.containers import FILE_KINDS, LAYOUTS, MAX_FILE_BYTES, PICTURES, Container, Folder, find_container
from training.dataset import BadPage, DatasetSource, Row, shortened
from training.errors import DataError, is_disk_full, is_out_of_memory
from training.tables import Table, open_table

if TYPE_CHECKING:
    from datasets import IterableDataset

__all__ = ["FILE_KINDS", "read_html", "read_pages"]
MAX_NAME = 255  # characters of a page's name: as long as a file's
TellCount = Callable[[int], None]


def read_pages(
    dataset: str,
    source: DatasetSource,
    seed: int,
    revision: str | None = None,
    skip: int = 0,
    tell_count: TellCount | None = None,
) -> Iterator[tuple[str, bytes | BadPage, Any]]:
    """Yields (name, the screenshot's file or what is wrong with the row, html) in an order that `seed` alone decides,
    without the first `skip` of them, whose pictures are not opened.

    `tell_count` is called before the first row with the number of rows, where that is known without reading them.
    DataError where `dataset` cannot be read, or lacks a column.
    """
    rows = _Rows(dataset, source, "--dataset", seed, revision, tell_count)
    every = rows.read(image_column=source.image_column, html_column=source.html_column)
    for name, row in itertools.islice(every, skip, None):
        try:
            screenshot, html = source.page(row) if not isinstance(row, BadPage) else (row, None)
        except BadPage as bad:
            screenshot, html = bad, None
        screenshot = _picture(screenshot, rows)
        html = _text(html)
        yield name, html if isinstance(html, BadPage) else screenshot, html


def read_html(dataset: str, source: DatasetSource) -> Iterator[tuple[str, Any]]:
    """Yields (name, html or the BadPage that says why there is none) in the dataset's own order, without reading any
    screenshot. DataError as read_pages."""
    for name, row in _Rows(dataset, source, "SOURCE").read(html_column=source.html_column):
        try:
            yield name, row if isinstance(row, BadPage) else _text(source.html(row))
        except BadPage as bad:
            yield name, bad


class _Rows:
    """The rows of a dataset, and where the names of pictures in them lead. `asked_by` is what the user typed `dataset`
    after; `seed` None: in the dataset's own order."""

    def __init__(
        self,
        dataset: str,
        source: DatasetSource,
        asked_by: str,
        seed: int | None = None,
        revision: str | None = None,
        tell_count: TellCount | None = None,
    ) -> None:
        self.dataset, self.source, self.asked_by, self.seed, self.revision = dataset, source, asked_by, seed, revision
        self.tell_count = tell_count or (lambda count: None)
        self.path = Path(dataset).expanduser()
        self.found: Container | None = None

    @property
    def place(self) -> Any:
        """Where names lead."""
        return self.found.place if self.found else Folder(self.path)

    def read(self, **columns: str) -> Iterator[tuple[str, Row | BadPage]]:
        """(name, row) of each row, once it is known that there are `columns`, by the fields of `source` that name them.

        DataError.
        """
        if not self.path.exists() and (self.dataset.startswith((".", "~", "/")) or self.dataset.count("/") > 1):
            raise DataError(f"{self.asked_by} {self.dataset}: no such file or folder")
        wanted = {} if self.source.page_of else columns
        try:
            if self.path.exists():
                self.found = find_container(self.path, self.source.split)
            kind = self.found.kind if self.found else "unknown"
            if kind in ("jsonl", "json", "csv"):
                yield from self._of_tables(wanted)
            elif kind == "pairs":
                yield from self._of_pairs(wanted)
            else:
                yield from self._of_datasets(wanted)
        except DataError:
            raise
        # Not found, no network, no such split, a script, damaged files: datasets 5.2, pyarrow, fsspec, huggingface_hub
        # and zipfile have classes of their own for that, which have nothing in common.
        except Exception as error:
            if is_out_of_memory(error) or is_disk_full(error):
                raise
            raise DataError(f"{self.asked_by} {self.dataset} cannot be read: {_reason(error)}") from error

    def _order(self, count: int) -> Collection[int]:
        self.tell_count(count)
        return range(count) if self.seed is None else random.Random(self.seed).sample(range(count), count)

    def _of_tables(self, wanted: Mapping[str, str]) -> Iterator[tuple[str, Row | BadPage]]:
        """The rows of all tables as one, each named by its picture's file where that is a name."""
        names = self.found.files
        with contextlib.ExitStack() as files:
            tables = []
            for name in names:
                tables.append(open_table(files.enter_context(self.found.place.open(name)), self.found.kind))
            _check_table_columns(tables, wanted)
            ends = list(itertools.accumulate(map(len, tables)))
            for number in self._order(ends[-1]):
                which = bisect.bisect_right(ends, number)
                table, inside = tables[which], number - (ends[which] - len(tables[which]))
                place = f"{names[which]}, {table.place(inside)}"
                try:
                    row = table.row(inside)
                except BadPage as bad:
                    yield place, bad
                    continue
                if row is not None:
                    row = _with_twin(row)
                    yield self._name(row, place), row

    def _name(self, row: Row, otherwise: str) -> str:
        file = row.get("file_name" if self.source.page_of else self.source.image_column)
        if not isinstance(file, str) or not 0 < len(file) <= MAX_NAME:
            return otherwise
        return file.encode("utf-8", "backslashreplace").decode()  # half a character can be stored nowhere

    def _of_pairs(self, wanted: Mapping[str, str]) -> Iterator[tuple[str, Row | BadPage]]:
        """A row of each page, whose text is the column `text`, its picture of the same name `image`."""
        _check_columns(("image", "file_name", "text"), wanted)
        for number in self._order(len(self.found.files)):
            picture, page = self.found.files[number]
            name = (picture or page).encode("utf-8", "backslashreplace").decode()
            if not picture:
                yield name, BadPage("unreadable", "no picture of the same name beside the page")
                continue
            try:
                yield name, {"image": picture, "file_name": picture, "text": _decoded(self.place.read(page))}
            except BadPage as bad:
                yield name, bad
            except Exception as error:  # counted: the system's, zipfile's
                yield name, _unreadable("page", error)

    def _of_datasets(self, wanted: Mapping[str, str]) -> Iterator[tuple[str, Row | BadPage]]:
        stream = self._stream()
        if stream.features:
            stream = stream.decode(False)  # at any depth: a picture stays a file, or a broken one would end the stream
        first = next(iter(stream), {})
        _check_columns(first, wanted, _with_twin(first), first)
        if stream.features and wanted:  # what nobody needs is not fetched
            columns = {column if column in first else column.split(".")[0] for column in wanted.values()}
            columns = {"file_name" if column not in first and column == "image" else column for column in columns}
            stream = stream.select_columns(sorted(columns & first.keys()))
        if self.seed is not None:  # shards are shuffled, too; the buffer holds undecoded screenshots, some 100 MB
            stream = stream.shuffle(seed=self.seed, buffer_size=500)
        for number, row in enumerate(stream):
            yield f"row-{number:07d}", _with_twin(row)

    def _stream(self) -> IterableDataset:
        """What `datasets` reads, undecoded; it tells the number of rows where that is known."""
        import datasets

        split = self.source.split
        if self.found is not None and self.found.kind == "saved":
            return self._saved()
        where: dict[str, Any] = {"path": str(self.path) if self.path.exists() else self.dataset}
        where["name"] = self.source.config
        if self.found is not None:
            split = "train"
            where = {"path": self.found.kind, "data_files": [str(self.place.path / name) for name in self.found.files]}
        builder = datasets.load_dataset_builder(**where, revision=self.revision)
        stream = builder.as_streaming_dataset(split=split)
        if (count := _known_count(builder, split)) is not None:
            self.tell_count(count)
        return stream

    def _saved(self) -> IterableDataset:
        """What save_to_disk has written."""
        import datasets

        saved = datasets.load_from_disk(str(self.place.path))
        if isinstance(saved, datasets.DatasetDict):
            if self.source.split not in saved:
                raise DataError(
                    f"{self.asked_by} {self.dataset}: no split {self.source.split}; there are: {', '.join(saved)}. "
                    "--dataset_split names the right one"
                )
            saved = saved[self.source.split]
        self.tell_count(len(saved))
        return saved.to_iterable_dataset(num_shards=max(1, min(64, len(saved) // 100)))


def _known_count(builder: Any, split: str) -> int | None:
    """The rows of a split by a dataset's card, or by the ends of its Parquet files here; None where neither tells."""
    import pyarrow.parquet

    info = (builder.info.splits or {}).get(split)
    if info is not None and info.num_examples:
        return info.num_examples
    files = (builder.config.data_files or {}).get(split) or []
    if (
        not files
        or len(files) > 1000
        or not all(Path(file).suffix == ".parquet" and Path(file).is_file() for file in files)
    ):
        return None
    return sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)


def _reason(error: BaseException) -> str:
    """What went wrong, in a line."""
    if "scripts are no longer supported" in str(error):
        return (
            "it is read by a script of its own, which nobody runs any more; --dataset_revision refs/convert/parquet "
            "where the Hub has converted it, else save its rows as Parquet or JSON Lines"
        )
    if type(error).__name__ in ("EmptyDatasetError", "DataFilesNotFoundError"):  # their own name no remedy
        return f"nothing in it is a dataset; {LAYOUTS}"
    if "error occurred while generating" in str(error) and error.__cause__ is not None:  # which says nothing
        error = error.__cause__
    return shortened(f"{type(error).__name__}: {error}", 400)


def _check_table_columns(tables: list[Table], wanted: Mapping[str, str]) -> None:
    """DataError before the first row is given away, since nobody may ask for the last one. One row may lack what the
    others have: read until every column was seen, which is one row of a sound table, all rows of a wrong name."""
    columns: dict[str, Any] = {}
    for table in tables:
        for number in range(len(table)):
            with contextlib.suppress(BadPage):
                columns = {**(table.row(number) or {}), **columns}
            if columns and not _missing(columns, wanted, _with_twin(columns)):
                return
    _check_columns(columns, wanted, _with_twin(columns), columns)


def _with_twin(row: Row) -> Row:
    """The imagefolder convention: what `file_name` names is the column `image`. Either name asks for it."""
    if "file_name" in row:
        return {"image": row["file_name"], **row}
    return {"file_name": row["image"], **row} if "image" in row else row


def _missing(columns: Collection[str], wanted: Mapping[str, str], more: Collection[str] = ()) -> list[str]:
    known = {*columns, *more}
    return [column for column in wanted.values() if column not in known and column.split(".")[0] not in known]


def _check_columns(
    columns: Collection[str], wanted: Mapping[str, str], more: Collection[str] = (), row: Row | None = None
) -> None:
    """DataError that names the columns there are; `more` may be asked for, too. What `row` holds says what to type."""
    if missing := _missing(columns, wanted, more):
        flags = " and ".join(f"--{name}" for name in wanted)
        raise DataError(
            f"no column {' and '.join(missing)}; there are: {shortened(', '.join(columns), 1000) or 'none'}. "
            f"{flags} {'name the right ones' if len(wanted) > 1 else 'names the right one'}{_what_to_type(wanted, row)}"
        )


def _what_to_type(wanted: Mapping[str, str], row: Row | None) -> str:
    """The columns that look like a screenshot and like HTML; "" where none does."""
    looks_like = {"image_column": _path_to_picture, "html_column": _path_to_html}
    typed = []
    for field, column in wanted.items():
        if _missing(row or {}, {field: column}, _with_twin(row or {})):
            paths = [looks_like[field](name, value) for name, value in (row or {}).items()]
            if not any(paths):
                return ""
            typed.append(f"--{field} {next(filter(None, paths))}")
    return f": {' '.join(typed)}"


def _path_to_picture(name: str, value: Any) -> str:
    if isinstance(value, list) and value and _path_to_picture(name, value[0]):
        return f"{name}.0"
    is_html = isinstance(value, bytes) and value.lstrip().startswith(b"<")
    held = (isinstance(value, bytes) and not is_html) or (isinstance(value, dict) and {"bytes", "path"} & value.keys())
    return name if held or (isinstance(value, str) and value.lower().endswith(PICTURES)) else ""


def _path_to_html(name: str, value: Any) -> str:
    """A text with a tag in it, or what is answered in a conversation, as TRL, ms-swift and LLaVA store it."""
    if isinstance(value, str | bytes):
        text = value if isinstance(value, str) else value.decode("utf-8", "replace")
        return name if "\0" not in text and re.search("<[a-z!]", text, re.I) else ""
    for place, turn in reversed([*enumerate(value)] if isinstance(value, list) else []):
        if isinstance(turn, dict) and turn.get("role", turn.get("from")) in ("assistant", "gpt"):
            content = "content" if "content" in turn else "value"
            part = ".0.text" if isinstance(turn.get(content), list) else ""
            return f"{name}.{place}.{content}{part}"
    return ""


def _text(html: Any) -> Any:
    """The html of a cell; binary columns and WebDataset's files hold bytes."""
    if not isinstance(html, bytes):
        return html
    try:
        return _decoded(html)
    except BadPage as bad:
        return bad


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadPage(
            "unreadable", f"the page is not in UTF-8 ({error.reason}); make_pages.py reads other encodings"
        ) from error


def _picture(value: Any, rows: _Rows) -> bytes | BadPage:
    """The content of an image cell: bytes, or a file inside the dataset, wherever `..` and links lead."""
    if isinstance(value, list | tuple) and len(value) == 1:  # as TRL and ms-swift store the one picture of a page
        value = value[0]
    if isinstance(value, BadPage):
        return value
    source = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
    if isinstance(source, bytes):
        too_large = len(source) > MAX_FILE_BYTES
        return BadPage("too large", f"{len(source):,} bytes") if too_large else source
    if not isinstance(source, str) or "\0" in source or source.startswith("data:"):
        return BadPage("unreadable", f"no picture and no file name but {_kind(value, rows.source.image_column)}")
    try:
        # `datasets` names pictures of a Hub dataset so.
        if not rows.path.exists() and re.match(rf"(?:zip://[^:]*::)?hf://datasets/{re.escape(rows.dataset)}@", source):
            return _fetched(source)
        return rows.place.read(source)
    except BadPage as bad:
        return bad
    # Counted, whatever it is: names too long or with half a character, links in a circle, no permission, no network, no
    # such file on the Hub, damaged archives.
    except Exception as error:
        return _unreadable("picture", error)


def _unreadable(what: str, error: Exception) -> BadPage:
    """The BadPage that `error` makes of a row; raised where memory ran out."""
    if is_out_of_memory(error):
        raise error
    why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    if isinstance(error, RuntimeError) and "Symlink loop" in str(error):
        why = "a link to itself"
    return BadPage("unreadable", f"the {what} cannot be read: {why}")


def _kind(value: Any, column: str) -> str:
    """What a cell holds, without quoting it, and what to type where that helps."""
    if isinstance(value, list | tuple):
        first = f"; --image_column {column}.0 takes the first" if value else ""
        return f"a list of {len(value):,}{first}"
    if isinstance(value, dict):
        return f"fields named {', '.join(map(str, value))}" if value else "no fields"
    if isinstance(value, str):
        return "a data: URL; decode it into a file" if value.startswith("data:") else "text with NUL in it"
    return f"{type(value).__name__}"


def _fetched(address: str) -> bytes:
    import fsspec

    with fsspec.open(address, "rb") as file:
        return file.read(MAX_FILE_BYTES)
