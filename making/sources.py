"""Which pages there are, and their text.

    for source in find_pages("site/"):
        page = read_html(source, renderer)          # decoded as browsers do; PageDropped where it is no page

A source is a folder of HTML files, one of them, a list of them, or a dataset (training/reading.py reads those).
"""

from __future__ import annotations

import contextlib
import heapq
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from making.decoding import decode_page
from making.drops import PageDropped
from making.local_files import MAX_FILE_BYTES, Page
from scoring.renders import Renderer
from training import dataset, reading
from training.dataset import BadPage, DatasetSource
from training.errors import DataError, SettingsError
from training.reading import FILE_KINDS

XML = (".xhtml", ".xht")  # by the ends of their names; read by the rules of XML, whatever a page says of itself
HTML, LISTS = (".html", ".htm", *XML), (".txt", ".lst", "")
NAMES_AT_ONCE = 10_000  # of a folder's, held while they are put in order


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
        root, name = path.resolve(), None
        for name in html_files(path):
            yield Source(_readable(name), path / name, root)
        if name is None and any(file.suffix in FILE_KINDS for file in path.rglob("*")):
            yield from _dataset_pages(path, source, known or dataset.known_dataset(source))
        elif name is None:
            kinds = ", ".join(FILE_KINDS)
            raise SettingsError(f"{source}: no .html or .htm file in it, nor a metadata.jsonl, nor a dataset ({kinds})")
    elif path.is_file() and path.suffix.lower() in HTML:
        yield Source(_readable(path.name), path, path.resolve().parent)
    elif path.is_file() and path.suffix.lower() in LISTS:
        yield from _listed_pages(path)
    elif path.exists() or (source.count("/") <= 1 and not source.startswith((".", "~", "/"))):
        yield from _dataset_pages(path, source, known or dataset.known_dataset(source))
    else:
        raise SettingsError(f"{source}: no such file or folder")


def count_pages(source: str) -> int | None:
    """How many pages find_pages gives, where that is cheap to know."""
    path = Path(source).expanduser()
    if (path / "metadata.jsonl").is_file():
        with open(path / "metadata.jsonl", "rb") as lines:
            return sum(1 for line in lines if line.strip())
    if path.is_dir():
        return sum(1 for _ in html_files(path)) or None
    if path.is_file() and path.suffix.lower() in LISTS:
        return sum(1 for _ in _listed(path))
    return 1 if path.is_file() and path.suffix.lower() in HTML else None


def html_files(folder: Path, below: str = "") -> Iterator[str]:
    """The HTML files of a folder, by their names from there, in the order of their parts; links to folders are not
    followed, and what cannot be read is passed over."""
    for name, inside in _in_order(folder / below):
        if inside:
            yield from html_files(folder, f"{below}{name}/")
        elif os.path.splitext(name)[1].lower() in HTML and (folder / below / name).is_file():
            yield below + name


def _in_order(folder: Path) -> Iterator[tuple[str, bool]]:
    """(name, whether it is a folder) by name: the next so many at a time, since a folder may hold millions."""
    last = ""
    while True:
        found = []
        with contextlib.suppress(PermissionError, FileNotFoundError), os.scandir(folder) as entries:
            later = ((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries if entry.name > last)
            found = heapq.nsmallest(NAMES_AT_ONCE, later)
        yield from found
        if len(found) < NAMES_AT_ONCE:
            return
        last = found[-1][0]


def _readable(name: str) -> str:
    """A file's name as text: bytes that are no UTF-8 stand there as their numbers."""
    return name.encode("utf-8", "backslashreplace").decode()


def _listed(listing: Path) -> Iterator[Path]:
    with open(listing, encoding="utf-8", errors="surrogateescape") as lines:
        for line in map(str.strip, lines):
            if line and not line.startswith("#"):
                yield listing.parent / line


def _listed_pages(listing: Path) -> Iterator[Source]:
    """One path a line, relative to the list; each page may use the files of its own folder and below."""
    common = ""
    for file in _listed(listing):
        folder = str(file.absolute().parent)
        common = os.path.commonpath([common or folder, folder])
    if not common:
        raise SettingsError(f"{listing}: names no file; one path a line")
    for file in _listed(listing):
        yield Source(_readable(file.absolute().relative_to(common).as_posix()), file, file.resolve().parent)


def _dataset_pages(path: Path, source: str, known: DatasetSource) -> Iterator[Source]:
    if path.is_file() and path.suffix not in FILE_KINDS:
        raise SettingsError(f"{source}: neither HTML, nor a list (.txt), nor a dataset ({', '.join(FILE_KINDS)})")
    try:
        for number, (_, html) in enumerate(reading.read_html(source, known)):
            yield Source(f"row-{number:07d}", html=html)
    except DataError as error:  # here the source is an argument like any other: exit code 2
        raise SettingsError(str(error)) from error


def read_html(source: Source, renderer: Renderer | None = None) -> Page:
    """The page's text, decoded as a browser would; PageDropped where that makes no text.

    Without a `renderer` only UTF-8 can be read.
    """
    if source.path is None:
        if isinstance(source.html, BadPage):
            raise PageDropped("unreadable", str(source.html))
        if not isinstance(source.html, str):
            raise PageDropped("unreadable", f"html is no text but {type(source.html).__name__}")
        return _not_empty(Page(source.html))
    try:
        if source.path.stat().st_size > MAX_FILE_BYTES:
            raise PageDropped("unreadable", f"{source.path.stat().st_size:,} bytes, more than {MAX_FILE_BYTES:,}")
        data = source.path.read_bytes()
    except OSError as error:
        raise PageDropped("unreadable", str(error)) from error
    xml = source.path.suffix.lower() in XML
    return _not_empty(Page(*decode_page(data, renderer, xml), xml))


def _not_empty(page: Page) -> Page:
    if "\0" in page.html:
        raise PageDropped("unreadable", "holds NUL characters: no HTML")
    if not re.search("<[a-z]", page.html, re.I):
        raise PageDropped("empty", f"no element in {page.html[:40]!r}")
    # half a character (a lone surrogate) becomes a question mark
    return replace(page, html=page.html.encode(errors="replace").decode())
