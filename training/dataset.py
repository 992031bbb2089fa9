"""What is known of datasets: where a row's screenshot and HTML lie, under which licence, who may train on it.

    source = resolve_dataset("HuggingFaceM4/WebSight")      # DatasetSource; SettingsError for a benchmark
    screenshot, html = source.page(row)                     # BadPage

Another dataset is another entry of KNOWN_DATASETS, here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training.errors import SettingsError

BROKEN = ("unreadable", "too large", "outside the folder", "empty")  # what --max_bad_share counts
REASONS = ("too long", *BROKEN, "duplicate", "like a held-out page")


class BadPage(Exception):
    """A page that is dropped: `reason` is one of REASONS, the message says more, in MOST_WORDS characters at most."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(shortened(detail))
        self.reason = reason


MOST_WORDS = 200


def shortened(text: str, most: int = MOST_WORDS) -> str:
    """One line of at most `most` characters, each of which can be printed: errors may quote what they were given."""
    line = "".join(letter if letter.isprintable() else " " for letter in text[: 2 * most])
    line = re.sub(" +", " ", line).strip()
    return line if len(line) <= most else line[: most - 1] + "\u2026"


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
            raise BadPage("unreadable", detail) from error
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
    convention = any((path / f"metadata.{kind}").is_file() for kind in ("jsonl", "csv", "parquet"))  # of imagefolder
    unknown = DatasetSource(image_column="file_name") if convention else DatasetSource()
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
