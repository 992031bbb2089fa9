"""Which pages there are, and their text.

    for source in find_pages("site/"):
        html = read_html(source)                    # decoded as browsers do; PageDropped where it is no page

A source is a folder of HTML files, one of them, a list of them, or a dataset (training/reading.py reads those).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from making.drops import PageDropped
from making.local_files import MAX_FILE_BYTES
from training import dataset, reading
from training.dataset import BadPage, DatasetSource
from training.errors import DataError, SettingsError
from training.reading import FILE_KINDS


@dataclass(frozen=True)
class Source:
    """A page before anything is done: a file, or the HTML of a dataset's row. Only files under `root` are read."""

    name: str
    path: Path | None = None
    root: Path | None = None
    html: Any = None


def find_pages(source: str, known: DatasetSource | None = None) -> Iterator[Source]:
    """Every page of `source`, in an order that stays; SettingsError when there is nothing of the kind.

    `known` says where the HTML of a dataset is; None: what is known of it by its name.
    """
    path = Path(source).expanduser()
    if path.is_dir() and not (path / "metadata.jsonl").is_file():
        root, seen = path.resolve(), False
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in (".html", ".htm", ".xhtml") and file.is_file():
                seen = True
                yield Source(file.relative_to(path).as_posix(), file, root)
        if not seen:
            raise SettingsError(f"{source}: no .html or .htm file in it, nor a metadata.jsonl")
    elif path.is_file() and path.suffix.lower() in (".html", ".htm", ".xhtml"):
        yield Source(path.name, path, path.resolve().parent)
    elif path.is_file() and path.suffix.lower() in (".txt", ".lst", ""):
        yield from _listed_pages(path)
    elif path.exists() or (source.count("/") <= 1 and not source.startswith((".", "~", "/"))):
        yield from _dataset_pages(path, source, known or dataset.known_dataset(source))
    else:
        raise SettingsError(f"{source}: no such file or folder")


def _listed_pages(listing: Path) -> Iterator[Source]:
    """One path a line, relative to the list; each page may use the files of its own folder and below."""
    lines = [line.strip() for line in listing.read_text(encoding="utf-8").splitlines()]
    files = [listing.parent / line for line in lines if line and not line.startswith("#")]
    if not files:
        raise SettingsError(f"{listing}: names no file; one path a line")
    common = Path(os.path.commonpath([str(file.absolute().parent) for file in files]))
    for file in files:
        yield Source(file.absolute().relative_to(common).as_posix(), file, file.resolve().parent)


def _dataset_pages(path: Path, source: str, known: DatasetSource) -> Iterator[Source]:
    if path.is_file() and path.suffix not in FILE_KINDS:
        raise SettingsError(f"{source}: neither HTML, nor a list (.txt), nor a dataset ({', '.join(FILE_KINDS)})")
    try:
        for number, (_, html) in enumerate(reading.read_html(source, known)):
            yield Source(f"row-{number:07d}", html=html)
    except DataError as error:  # here the source is an argument like any other: exit code 2
        raise SettingsError(str(error)) from error


def read_html(source: Source) -> str:
    """The page's text, decoded as a browser would; PageDropped where that makes no text."""
    if source.path is None:
        if isinstance(source.html, BadPage):
            raise PageDropped("unreadable", str(source.html))
        if not isinstance(source.html, str):
            raise PageDropped("unreadable", f"html is no text but {type(source.html).__name__}")
        return _not_empty(source.html)
    try:
        if source.path.stat().st_size > MAX_FILE_BYTES:
            raise PageDropped("unreadable", f"{source.path.stat().st_size:,} bytes, more than {MAX_FILE_BYTES:,}")
        data = source.path.read_bytes()
    except OSError as error:
        raise PageDropped("unreadable", str(error)) from error
    return _not_empty(decode(data))


def _not_empty(html: str) -> str:
    if "\0" in html:
        raise PageDropped("unreadable", "holds NUL characters: no HTML")
    if not re.search("<[a-z]", html, re.I):
        raise PageDropped("empty", f"no element in {html[:40]!r}")
    return html.encode(errors="replace").decode()  # half a character (a lone surrogate) becomes a question mark


def decode(data: bytes) -> str:
    """By its byte order mark, by what it declares, as UTF-8, and at last as Windows-1252 (WHATWG's order)."""
    for mark, name in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if data.startswith(mark):
            return data[len(mark) :].decode(name, "replace")
    declared = re.search(rb"""<meta[^>]+charset\s*=\s*["']?\s*([\w:.-]+)""", data[:4096], re.I)
    name = declared[1].decode().lower() if declared else ""
    if name in ("iso-8859-1", "latin1", "ascii", "us-ascii"):  # all of them mean Windows-1252 on the web
        name = "cp1252"
    if name.startswith(("utf-16", "utf16")):  # what could be read as far as here is not
        name = "utf-8"
    try:
        return data.decode(name or "utf-8")
    except UnicodeDecodeError:
        text = data.decode(name or "cp1252", "replace")
        if text.count("\ufffd") > 0.01 * len(text):
            raise PageDropped("unreadable", f"is not in {name or 'utf-8'}, nor in Windows-1252") from None
        return text
    except (LookupError, UnicodeError):  # Python's "undefined", "idna" and the like are encodings, but of no page
        raise PageDropped("unreadable", f"no such encoding: {name}") from None
