"""From a dataset to checked, cleaned and split pages: every page is kept, or dropped for a reason that is counted.

    report = load_pages(settings, output_dir, count_tokens, seed)           # main process; DropReport
    train, held_out = load_pages_from_disk(output_dir)                      # all ranks
    for name, html in read_html("USER/NAME", known_dataset("USER/NAME")):   # make_pages.py, which draws the screenshots

Another dataset is another entry of KNOWN_DATASETS, here and nowhere else. Nothing here knows of models. Sections:
What is known of datasets, Reading, Checks of a page, Duplicates, Loading.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import re
import struct
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from training.cleaning import clean_html, cleaning_steps, visible_text
from training.errors import DataError, SettingsError, is_out_of_memory
from use_model_from_hub import MAX_PICTURE_PIXELS, PICTURE_FORMATS

if TYPE_CHECKING:
    from datasets import Dataset

BROKEN = ("unreadable", "too large", "outside the folder", "empty")  # what --max_bad_share counts
REASONS = ("too long", *BROKEN, "duplicate", "like a held-out page")


class BadPage(Exception):
    """A page that is dropped: `reason` is one of REASONS, the message says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


# -----------------------------------------------------------------------------
# What is known of datasets

Row = Mapping[str, Any]


@dataclass(frozen=True)
class DatasetSource:
    """What is known of one dataset: an entry of KNOWN_DATASETS.

    A page is a screenshot (the bytes of a picture, an image cell of `datasets`, or the name of a file inside the
    dataset) and its html (text). Two columns name them, nested ones by a path with dots, in which lists count from 0,
    or from -1 at their end. Screenshots in a list and HTML in a conversation are one line:

        "USER/NAME": DatasetSource(image_column="images.0", html_column="messages.1.content", licence="mit"),

    Where a path does not say it, a function of this module takes a row and returns (screenshot, html):

        def answered_page(row: Row) -> tuple[Any, Any]:
            answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
            return row["images"][0], answers[-1]

        "USER/NAME": DatasetSource(page_of=answered_page, licence="mit"),

    A row for which either fails is dropped as unreadable, and counted by --max_bad_share.
    """

    config: str | None = None  # of a Hub dataset
    split: str = "train"
    image_column: str = "image"
    html_column: str = "text"
    page_of: Callable[[Row], tuple[Any, Any]] | None = None  # instead of the columns
    licence: str | None = None  # as the Hub spells it; None: not known
    note: str = ""  # said to whoever takes the dataset
    refused: str = ""  # why nobody may train on it

    def page(self, row: Row) -> tuple[Any, Any]:
        """(screenshot, html) of a row, as the dataset holds them; BadPage where the row has no such thing."""
        if self.page_of is None:
            return cell(row, self.image_column), cell(row, self.html_column)
        try:
            screenshot, html = self.page_of(row)
        except Exception as error:  # whatever a function meets in a stranger's row: the row is counted as broken
            detail = f"{self.page_of.__name__}: {type(error).__name__}: {error}"
            raise BadPage("unreadable", detail[:300]) from error
        return screenshot, html

    def html(self, row: Row) -> Any:
        """The html alone, for a row whose screenshot nobody needs; BadPage."""
        return cell(row, self.html_column) if self.page_of is None else self.page(row)[1]


_BENCHMARK = "a benchmark, never to be trained on: take HuggingFaceM4/WebSight or xcodemind/webcode2m"
_WEBCODE2M = DatasetSource(licence="cc-by-4.0", note="half of its pages are longer than 3,844 tokens")
# A Hub name, in any case, or a local path that starts with . / or ~. README_DeepSpeed.md's table is held against it.
KNOWN_DATASETS = {
    "HuggingFaceM4/WebSight": DatasetSource(
        "v0.1", licence="cc-by-4.0", note="v0.2 needs the network to look like its screenshots, v0.1 does not"
    ),
    "xcodemind/webcode2m": _WEBCODE2M,
    "xcodemind/webcode2m_purified": _WEBCODE2M,
    "xcodemind/webcode2m_test": DatasetSource(
        split="short", licence="cc-by-4.0", note="a test set; its other splits are mid and long"
    ),
    "SALT-NLP/Design2Code-hf": DatasetSource(licence="odc-by", refused=_BENCHMARK),
    "SALT-NLP/Design2Code-HARD": DatasetSource(licence="odc-by", refused="images without HTML; " + _BENCHMARK),
}


def cell(row: Row, column: str) -> Any:
    """The value of a column: of that very name, else by a path such as messages.1.content; BadPage where it ends."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        try:
            value = value[int(part)] if isinstance(value, list | tuple) else value[part]
        except (LookupError, TypeError, ValueError):
            raise BadPage("unreadable", f"no {column} in this row") from None
    return value


def known_dataset(dataset: str, **typed: str | None) -> DatasetSource:
    """What is known of `dataset` (a Hub name or a path), the `typed` fields on top: a typed column beats a function."""
    path = Path(dataset).expanduser()
    known = {name.lower(): source for name, source in KNOWN_DATASETS.items()}  # the Hub ignores case, too
    if path.exists() and not dataset.startswith((".", "/", "~")):
        known = {}  # a folder here that is named as a dataset on the Hub is not that one
    unknown = DatasetSource(image_column="file_name") if (path / "metadata.jsonl").is_file() else DatasetSource()
    changes: dict[str, Any] = {name: value for name, value in typed.items() if value}
    if {"image_column", "html_column"} & changes.keys():
        changes["page_of"] = None
    return replace(known.get(dataset.lower(), unknown), **changes)


def resolve_dataset(dataset: str, **typed: str | None) -> DatasetSource:
    """As known_dataset; SettingsError where it must not be trained on."""
    source = known_dataset(dataset, **typed)
    if source.refused:
        raise SettingsError(f"--dataset {dataset}: {source.refused}")
    return source


def dataset_revision(dataset: str, revision: str | None) -> str | None:
    """The commit of a Hub dataset that `revision` (None: the newest) stands for; as asked where the Hub is silent."""
    import huggingface_hub as hub

    if Path(dataset).expanduser().exists():
        return revision
    try:
        return hub.HfApi().dataset_info(dataset, revision=revision, timeout=10).sha
    except (hub.errors.HTTPError, OSError, ValueError):
        return revision


# -----------------------------------------------------------------------------
# Reading

MAX_PICTURE_BYTES = 64 * 2**20
FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow", ".parquet": "parquet"}


def read_pages(
    dataset: str, source: DatasetSource, seed: int, revision: str | None = None
) -> Iterator[tuple[str, bytes | BadPage, Any]]:
    """Yields (name, the screenshot's file or what is wrong with the row, html) in an order that `seed` alone decides.

    DataError where `dataset` cannot be read, or lacks a column.
    """
    path = Path(dataset).expanduser()
    in_folder = (path / "metadata.jsonl").is_file()
    for name, row in _read_rows(dataset, source, ("image_column", "html_column"), "--dataset", seed, revision):
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


# -----------------------------------------------------------------------------
# Checks of a page

MAX_ASPECT_RATIO = 200  # Qwen2-VL's processors raise beyond it
PAGE_FIELDS = {
    "name": "string",
    "screenshot": "binary",
    "html": "string",
    "width": "int32",
    "height": "int32",
    "html_tokens": "int32",
    "image_tokens": "int32",
}
CountTokens = Callable[[str, int, int], tuple[int, int]]  # (html, width, height) -> (html tokens, image tokens)


def screenshot_size(data: bytes) -> tuple[int, int]:
    """(width, height) of a PNG, JPEG or WebP. BadPage when it is damaged and, before anything is decoded, a bomb."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PICTURE_PIXELS:
                raise BadPage("too large", f"{width:,} x {height:,} pixels")
            if max(width, height) >= MAX_ASPECT_RATIO * min(width, height):
                raise BadPage("unreadable", f"{width:,} x {height:,} pixels: a strip that no processor takes")
            # Only decoding finds every damaged file: 10 ms for 1,280 x 2,000 pixels, 2 ms for a JPEG at an eighth.
            picture.draft("L", (1, 1))
            picture.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadPage("too large", str(error)) from error
    except (OSError, SyntaxError, ValueError, TypeError, IndexError, struct.error, zlib.error) as error:
        raise BadPage("unreadable", f"{len(data):,} bytes, no whole PNG, JPEG or WebP: {error}") from error
    return width, height


def _check_page(
    name: str, screenshot: bytes | BadPage, html: Any, settings: WantedPages, count_tokens: CountTokens
) -> dict[str, Any]:
    """The page as it is stored; BadPage, the cheap reasons first."""
    if isinstance(screenshot, BadPage):
        raise screenshot
    if not isinstance(html, str | None):
        raise BadPage("unreadable", f"html is no text but {type(html).__name__}")
    html = clean_html(html or "", cleaning_steps(settings.clean)).strip()
    if not re.search("<[a-z]", html, re.I):
        raise BadPage("empty", f"no element in {html[:40]!r}")
    if html != html.encode(errors="replace").decode():
        raise BadPage("unreadable", "html holds half a character (a lone surrogate)")
    width, height = screenshot_size(screenshot)
    # No page's tokens hold 64 characters on average; one of many megabytes need not be counted.
    html_tokens, image_tokens = len(html) // 64, 0
    if html_tokens <= settings.max_html_tokens:
        html_tokens, image_tokens = count_tokens(html, width, height)
    if html_tokens > settings.max_html_tokens:
        raise BadPage("too long", f"{html_tokens:,} tokens of html, {settings.max_html_tokens:,} allowed")
    return dict(zip(PAGE_FIELDS, (name, screenshot, html, width, height, html_tokens, image_tokens), strict=True))


# -----------------------------------------------------------------------------
# Duplicates


def _shingles(html: str) -> set[tuple[str, ...]]:
    """Every three words in a row of the visible text; none under ten words, too few to tell one page from another."""
    words = re.findall(r"\w+", visible_text(html).lower())
    return set(zip(words, words[1:], words[2:], strict=False)) if len(words) >= 10 else set()


def _check_new(
    page: dict[str, Any],
    seen: set[bytes],
    sizes: list[int],
    pages_with: dict[tuple[str, ...], list[int]],
    is_held_out: bool,
) -> None:
    """BadPage for a duplicate of any page, or a near-duplicate of a held-out one: word 3-shingles with a Jaccard
    similarity of 0.8 and more (Broder, 1997), found by an index from shingle to held-out pages."""
    html = re.sub(r"\s+", " ", re.sub(r">\s+<", "><", page["html"]))
    hashes = {hashlib.sha256(content).digest() for content in (page["screenshot"], html.encode())}
    if seen & hashes:
        raise BadPage("duplicate", "the screenshot or the html of an earlier page")
    shingles = _shingles(html)
    shared = Counter(other for shingle in shingles for other in pages_with.get(shingle, ()))
    if not is_held_out and any(both >= 0.8 * (len(shingles) + sizes[other] - both) for other, both in shared.items()):
        raise BadPage("like a held-out page", "nearly the same text")
    seen |= hashes
    for shingle in shingles if is_held_out else ():
        pages_with[shingle].append(len(sizes))
    sizes.append(len(shingles))


# -----------------------------------------------------------------------------
# Loading


class WantedPages(Protocol):
    """What load_pages reads of the training's settings (training/settings.py says what each means)."""

    dataset: str
    dataset_config: str | None
    dataset_split: str | None
    dataset_revision: str | None
    image_column: str | None
    html_column: str | None
    clean: str
    num_samples: int
    eval_pages: int
    max_html_tokens: int
    max_bad_share: float


@dataclass
class DropReport:
    """What became of the rows that were read; `broken` names the first broken ones."""

    asked: int
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    ending: str = ""

    def __str__(self) -> str:
        reasons = [f"{self.dropped[reason]:,} {reason}" for reason in REASONS if self.dropped[reason]]
        return ", ".join([f"{self.asked:,} asked", *reasons, f"{self.kept:,} kept"]) + self.ending


def load_pages(settings: WantedPages, output_dir: str | Path, count_tokens: CountTokens, seed: int) -> DropReport:
    """Reads, cleans, checks and splits the pages, stores them for load_pages_from_disk in `output_dir`/pages, and names
    the dropped ones in dropped_pages.jsonl. DataError when too much is broken or too little is left.

    (one process of each disk) It holds the index of held-out texts in memory, and no page longer than it is looked at.
    """
    held_out = settings.eval_pages
    # A dataset smaller than asked is read again for fewer held-out pages: a page is then judged by the final split.
    while (report := _collect_pages(settings, output_dir, count_tokens, seed, held_out)).kept < report.asked:
        if held_out <= max(1, report.kept // 5):
            break
        held_out = max(1, report.kept // 5)
    report.asked = settings.num_samples + settings.eval_pages
    if held_out < settings.eval_pages:
        report.ending += f"; {held_out:,} held out instead of {settings.eval_pages:,}"
    where = f"every dropped page is named in {Path(output_dir) / 'dropped_pages.jsonl'}"
    if (bad := sum(report.dropped[reason] for reason in BROKEN)) > settings.max_bad_share * report.read:
        raise DataError(
            f"{bad:,} of {report.read:,} pages are broken, more than --max_bad_share "
            f"{settings.max_bad_share:g}: {'; '.join(report.broken)}; {where}"
        )
    if report.kept < 1 + min(held_out, 1):
        raise DataError(f"{report}: too few to train on one and hold one out; {where}")
    return report


def load_pages_from_disk(output_dir: str | Path) -> tuple[Dataset, Dataset]:
    """(all ranks) (training, held-out) pages, dicts of PAGE_FIELDS; memory-mapped, so ranks share the memory."""
    import datasets

    train, held_out = (
        datasets.Dataset.from_file(str(Path(output_dir) / "pages" / f"{split}.arrow"))
        for split in ("train", "held_out")
    )
    return train, held_out


def _collect_pages(
    settings: WantedPages, output_dir: str | Path, count_tokens: CountTokens, seed: int, held_out: int
) -> DropReport:
    """One reading: the first `held_out` pages that are kept are held out, the next num_samples are trained on."""
    import pyarrow
    from tqdm import tqdm

    source = resolve_dataset(
        settings.dataset,
        config=settings.dataset_config,
        split=settings.dataset_split,
        image_column=settings.image_column,
        html_column=settings.html_column,
    )
    rows = read_pages(settings.dataset, source, seed, settings.dataset_revision)
    report, seen, sizes, pages_with = DropReport(held_out + settings.num_samples), set(), [], defaultdict(list)
    folder, schema = Path(output_dir) / "pages", pyarrow.schema(list(PAGE_FIELDS.items()))
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as files:
        log = files.enter_context(open(folder.parent / "dropped_pages.jsonl", "w", encoding="utf-8"))
        writers = [
            files.enter_context(pyarrow.ipc.new_stream(str(folder / f"{split}.tmp"), schema))
            for split in ("held_out", "train")
        ]
        progress = files.enter_context(tqdm(total=report.asked, desc="pages", unit="page", mininterval=1))
        while report.kept < report.asked:
            row = next(rows, None)
            if row is None or report.read == 10 * report.asked + 1000:  # or a tiny budget would read millions of them
                report.ending = f"; {'the dataset ended' if row is None else 'gave up'} after {report.read:,} pages"
                break
            report.read += 1
            try:
                page = _check_page(*row, settings, count_tokens)
                _check_new(page, seen, sizes, pages_with, is_held_out=report.kept < held_out)
            except BadPage as bad:
                report.dropped[bad.reason] += 1
                if bad.reason in BROKEN and len(report.broken) < 3:
                    report.broken.append(f"{row[0]} ({bad.reason}: {bad})")
                log.write(json.dumps({"name": row[0], "reason": bad.reason, "detail": str(bad)}) + "\n")
                continue
            writers[report.kept >= held_out].write_batch(pyarrow.RecordBatch.from_pylist([page], schema=schema))
            report.kept += 1
            progress.update()
    for split in ("held_out", "train"):  # renamed only now: another process may still be reading the old file
        os.replace(folder / f"{split}.tmp", folder / f"{split}.arrow")
    return report
