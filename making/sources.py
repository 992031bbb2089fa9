"""Which pages there are, and their text.

    for source in find_pages("site/"):
        page = read_html(source, renderer)          # decoded as browsers do; PageDropped where it is no page

A source is a folder of HTML files, one of them, a list of them, or a dataset (training/dataset.py reads those).
"""

from __future__ import annotations

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
from training import dataset
from training.dataset import FILE_KINDS, BadPage, DatasetSource
from training.errors import DataError, SettingsError

HTML_KINDS = (".html", ".htm")
XML_KINDS = (".xhtml", ".xht")  # read by the rules of XML, whatever the page says of itself


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
            if file.suffix.lower() in (*HTML_KINDS, *XML_KINDS) and file.is_file():
                seen = True
                yield Source(file.relative_to(path).as_posix(), file, root)
        if not seen:
            raise SettingsError(f"{source}: no .html or .htm file in it, nor a metadata.jsonl")
    elif path.is_file() and path.suffix.lower() in (*HTML_KINDS, *XML_KINDS):
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
        for number, (_, html) in enumerate(dataset.read_html(source, known)):
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
    xml = source.path.suffix.lower() in XML_KINDS
    return _not_empty(Page(*decode_page(data, renderer, xml), xml))


def _not_empty(page: Page) -> Page:
    if "\0" in page.html:
        raise PageDropped("unreadable", "holds NUL characters: no HTML")
    if not re.search("<[a-z]", page.html, re.I):
        raise PageDropped("empty", f"no element in {page.html[:40]!r}")
    # half a character (a lone surrogate) becomes a question mark
    return replace(page, html=page.html.encode(errors="replace").decode())
