"""What holds a dataset on a disk, a folder or a ZIP: which of its files tell of the pages, and where their names lead.

    found = find_container(Path("my_pages"), "train")       # Container; None: `datasets` has to see for itself
    found.place.read("images/1.png")                        # bytes; BadPage

No file outside the folder is read, wherever `..` and links lead.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from training.dataset import BadPage
from training.errors import DataError

MAX_FILE_BYTES = 64 * 2**20
PICTURES = (".png", ".jpg", ".jpeg", ".webp")  # in the order in which one of several of the same name is taken
PAGES = (".html", ".htm", ".xhtml")
# The kind of each file that holds rows; the last three are read by `datasets`, which knows tar as WebDataset.
FILE_KINDS = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".zip": "zip"}
FILE_KINDS |= {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
LAYOUTS = (  # what a folder may be, for whoever has given another one
    "give a folder of pictures (PNG, JPEG, WebP) and HTML files of the same names (shop.png, shop.html), or of "
    "pictures and a table that names them (metadata.jsonl)"
)
_METADATA = ("jsonl", "csv", "parquet")  # kinds of the imagefolder convention's table
_FACTS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # JSON that holds no rows
_SPLITS = {"train": "train|training", "test": "test|testing|eval|evaluation"}
_SPLITS |= {"validation": "validation|valid|val|dev", "val": "validation|valid|val|dev"}


@dataclass(frozen=True)
class Folder:
    """A folder and what is below it; `absolute`: names of files inside may say the whole path."""

    path: Path
    absolute: bool = True

    def top(self) -> tuple[set[str], set[str]]:
        """(files, folders) that lie directly in it, without hidden ones."""
        entries = [entry for entry in os.scandir(self.path) if not _hidden(entry.name)]
        folders = {entry.name for entry in entries if os.path.isdir(entry)}  # entry.is_dir() raises at a link to itself
        return {entry.name for entry in entries} - folders, folders

    def inside(self, name: str) -> Folder:
        return Folder(self.path / name, self.absolute)

    def files(self) -> list[str]:
        """Every file at any depth, sorted."""
        found = []
        for place, folders, names in os.walk(self.path):
            folders[:] = [name for name in folders if not _hidden(name)]
            below = PurePosixPath(os.path.relpath(place, self.path))
            found += [(below / name).as_posix() for name in names if not _hidden(name)]
        return sorted(found)

    def open(self, name: str) -> BinaryIO:
        return open(self.path / name, "rb")

    def read(self, name: str) -> bytes:
        """The file of that name; BadPage, and whatever the system says of it."""
        if "://" in name:
            raise BadPage("outside the folder", "an address: only files inside the dataset's folder are read")
        inside = self.path.resolve()
        file = (self.path / name).resolve()
        if "\\" in name and not file.exists():  # as Windows writes it
            file = (self.path / name.replace("\\", "/")).resolve()
        if not file.is_relative_to(inside):
            raise BadPage("outside the folder", "only files inside the dataset's folder are read")
        if not self.absolute and Path(name).is_absolute():
            raise BadPage("outside the folder", "an absolute path: names are relative to the dataset's folder")
        if not file.is_file():  # nor a pipe or a device, which would keep us waiting
            other = (
                "no file but a folder, a pipe or a device" if file.exists() else "no such file in the dataset's folder"
            )
            raise BadPage("unreadable", other)
        if file.stat().st_size > MAX_FILE_BYTES:
            raise BadPage("too large", f"{file.stat().st_size:,} bytes")
        return file.read_bytes()


@dataclass(frozen=True)
class Archive:
    """A ZIP, or a folder in it."""

    file: zipfile.ZipFile
    members: dict[str, zipfile.ZipInfo]  # by their whole names
    base: str = ""

    @staticmethod
    def opened(path: Path) -> Archive:
        """DataError where the file is no ZIP."""
        try:
            file = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise DataError(f"{path}: no ZIP that can be read ({error})") from error
        members = {info.filename.replace("\\", "/"): info for info in file.infolist() if not info.is_dir()}
        members = {name: info for name, info in members.items() if not any(map(_hidden, name.split("/")))}
        return Archive(file, members)

    def files(self) -> list[str]:
        return sorted(name.removeprefix(self.base) for name in self.members if name.startswith(self.base))

    def top(self) -> tuple[set[str], set[str]]:
        parts = [name.partition("/") for name in self.files()]
        return {head for head, deeper, _ in parts if not deeper}, {head for head, deeper, _ in parts if deeper}

    def inside(self, name: str) -> Archive:
        return Archive(self.file, self.members, f"{self.base}{name}/")

    def open(self, name: str) -> BinaryIO:
        """Unpacked, since nobody can go to a place in a packed file."""
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it, as what open() gives
        with self.file.open(self.members[self.base + name]) as packed:
            shutil.copyfileobj(packed, unpacked, 2**20)
        unpacked.seek(0)
        return unpacked

    def read(self, name: str) -> bytes:
        """As `Folder.read`; whatever zipfile says of a damaged or encrypted member is raised."""
        if "://" in name:
            raise BadPage("outside the folder", "an address: only files inside the ZIP are read")
        whole = posixpath.normpath(posixpath.join(self.base, name.replace("\\", "/")))
        if whole.startswith(("../", "/")):
            raise BadPage("outside the folder", "only files inside the ZIP are read")
        if whole not in self.members:
            raise BadPage("unreadable", "no such file in the ZIP")
        with self.file.open(self.members[whole]) as packed:
            data = packed.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise BadPage("too large", f"more than {MAX_FILE_BYTES:,} bytes")
        return data


@dataclass(frozen=True)
class Container:
    """Where the rows of a dataset are, and where the names in them lead.

    `kind` is one of FILE_KINDS' values but zip, "saved" (by save_to_disk), or "pairs" (a picture and a page of one
    name); `files` are tables, or of pairs (picture or "", page)."""

    place: Folder | Archive
    kind: str
    files: tuple = ()


def find_container(path: Path, split: str) -> Container | None:
    """What lies at `path`, a file or a folder; None where only `datasets` can tell. DataError that says what to do."""
    if path.is_file():
        kind = FILE_KINDS.get(path.suffix.lower())
        if kind is None:
            packed = "; unpack it, and give the folder" if path.suffix.lower() in PACKED else ""
            raise DataError(f"{path}: no dataset in one file is called so ({', '.join(FILE_KINDS)}){packed}")
        if kind != "zip":
            return Container(Folder(path.parent), kind, (path.name,))
    elif not path.is_dir():  # a pipe would keep us waiting
        raise DataError(f"{path}: neither a file nor a folder")
    elif not has_metadata(path) and _has_configurations(path):
        return None
    place = Folder(path) if path.is_dir() else Archive.opened(path)
    places = _places(place, split)
    found = next(filter(None, (_tables(inner, split) for inner in places)), None) or _pairs(places[-1])
    if found is None and not place.files():
        raise DataError(f"{path}: no file is in there; {LAYOUTS}")
    if isinstance(place, Archive) and (found is None or found.kind not in ("jsonl", "json", "csv", "pairs")):
        raise DataError(
            f"{path}: no metadata.jsonl and no pairs of a picture and a page in it; give the unpacked folder"
        )
    return found


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def has_metadata(folder: Path) -> bool:
    """Whether a folder follows the imagefolder convention."""
    return any((folder / f"metadata.{kind}").is_file() for kind in _METADATA)


def _has_configurations(folder: Path) -> bool:
    """Whether a card says which files are which split, as on the Hub."""
    card = folder / "README.md"
    return card.is_file() and b"\nconfigs:" in card.read_bytes().partition(b"\n---")[0]


def _places(place: Folder | Archive, split: str) -> list[Folder | Archive]:
    """`place`, or the only folder in it (a ZIP often has one at its top), and the folder of the split in that."""
    for _ in range(3):
        files, folders = place.top()
        if (
            {name for name in files if not name.upper().startswith(("README", "LICENSE"))}
            or len(folders) != 1
            or split in folders
        ):
            break
        place = place.inside(next(iter(folders)))
    _, folders = place.top()
    return [place, *(place.inside(name) for name in folders if _is_of(split, name))][:2]


def _is_of(split: str, name: str) -> bool:
    words = _SPLITS.get(split, re.escape(split))
    return bool(re.search(rf"(?<![a-z0-9])(?:{words})(?![a-z0-9])", name.lower()))


def _tables(place: Folder | Archive, split: str) -> Container | None:
    files, _ = place.top()
    for kind in _METADATA:
        if f"metadata.{kind}" in files:
            relative = Folder(place.path, absolute=False) if isinstance(place, Folder) else place
            return Container(relative, kind, (f"metadata.{kind}",))
    if "dataset_dict.json" in files or {"dataset_info.json", "state.json"} <= files:
        return Container(place, "saved")
    by_kind: dict[str, list[str]] = {}
    for name in sorted(files - {*_FACTS}):
        by_kind.setdefault(FILE_KINDS.get(PurePosixPath(name).suffix.lower(), ""), []).append(name)
    if {"arrow", "webdataset", "zip"} & by_kind.keys():
        return None
    for kind in ("jsonl", "json", "csv", "parquet"):
        # Parquet files alone are what `datasets` knows best; beside pictures it would take these for the dataset.
        if kind not in by_kind or (kind == "parquet" and not _holds(place, PICTURES)):
            continue
        return Container(place, kind, _of_split(by_kind[kind], split))
    return None


def _of_split(names: list[str], split: str) -> tuple[str, ...]:
    """The tables of a split, or those of none. DataError where all are of others."""
    others = [name for name in names if not any(_is_of(other, name) for other in ("train", "test", "validation"))]
    if found := [name for name in names if _is_of(split, name)] or others:
        return tuple(found)
    raise DataError(f"no split {split} in {', '.join(names[:5])}; --dataset_split names another")


def _holds(place: Folder | Archive, suffixes: tuple[str, ...]) -> bool:
    return any(name.lower().endswith(suffixes) for name in place.files())


def _pairs(place: Folder | Archive) -> Container | None:
    """Pictures and pages of the same names, at any depth; a page without a picture is named, too. DataError where no
    page has one."""
    names = place.files()
    pages = [name for name in names if name.lower().endswith(PAGES)]
    pictures = [name for name in names if name.lower().endswith(PICTURES)]
    if not pages:
        return None
    # Beside the page as a rule, else by the names alone, in folders for each (html/1.html, images/1.png).
    for paired in (_paired(pages, pictures), _paired(pages, pictures, anywhere=True)):
        if any(picture for picture, _ in paired):
            return Container(place, "pairs", tuple(paired))
    if any(name.lower().endswith(tuple(FILE_KINDS)) for name in names):
        return None
    where = place.path if isinstance(place, Folder) else place.file.filename
    raise DataError(
        f"{where} holds {len(pages):,} pages and {len(pictures):,} pictures, none of which have the same name: call "
        "them alike (a.png, a.html), or name them in a metadata.jsonl; "
        f"`python make_pages.py {where} --out FOLDER` draws pictures of pages"
    )


def _paired(pages: list[str], pictures: list[str], anywhere: bool = False) -> list[tuple[str, str]]:
    """(picture or "", page) of each page; a.png or a.html.png belongs to a.html, A.PNG too where there is no other.
    `anywhere`: in whatever folder, but no picture to two pages."""

    def key(name: str) -> str:
        return posixpath.basename(name) if anywhere else name

    found: dict[str, str] = {}
    by_rank = sorted(pictures, key=lambda name: PICTURES.index(posixpath.splitext(name)[1].lower()))
    for alike in (str, str.lower):
        for picture in by_rank:
            found.setdefault(alike(key(posixpath.splitext(picture)[0])), picture)
    pairs, taken = [], set()
    for page in pages:
        stem = key(posixpath.splitext(page)[0])
        candidates = (stem, key(page), stem.lower())
        picture = next((found[name] for name in candidates if name in found), "")
        pairs.append(("" if anywhere and picture in taken else picture, page))
        taken.add(picture)
    return pairs
