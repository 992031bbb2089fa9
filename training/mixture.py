"""The datasets of a run, one or several: their columns, their shares, whose turn it is.

    for asked in asked_datasets(settings):              # SettingsError for what cannot be meant
        asked.name, asked.share, asked.source           # a DatasetSource, with what was typed on top
    turns = Turns([0.7, 0.3], seed=0)
    turns.next(kept=[7, 2], still={0, 1})               # 1

--dataset A:0.7 --dataset B is seven pages of A to three of B. Every other flag of a dataset is given once, or as
often as --dataset, in the same order.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.dataset import KNOWN_DATASETS, DatasetSource, resolve_dataset
from training.errors import SettingsError

# Flags that belong to a dataset, by the field of DatasetSource that each sets (None: the revision, which is no field).
FLAGS = {
    "image_column": "image_column",
    "html_column": "html_column",
    "dataset_config": "config",
    "dataset_split": "split",
    "dataset_revision": None,
}
COLUMNS = ("image_column", "html_column")
NOT_SAID = "-"  # typed where one dataset of several needs no such flag


@dataclass(frozen=True)
class AskedDataset:
    """One --dataset: `share` of the pages, `label` its short name in messages and, of several, before a page's name."""

    name: str
    share: float
    source: DatasetSource
    revision: str | None
    label: str


def listed(value: str | Sequence[str] | None) -> list[str]:
    """What was typed, as often as it was typed; a record or a test may hold a single one as it is."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def one_or_all(value: Any) -> Any:
    """A list of one as that one, which is how records have always held it."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def asked_datasets(settings: Any) -> list[AskedDataset]:
    """The datasets of `settings`, in the order in which they were typed. SettingsError, with every problem on a line
    of its own, for shares that do not add up, flags that belong to nobody, benchmarks, and a dataset given twice."""
    names, shares, problems = _shares(listed(settings.dataset))
    typed: list[dict[str, str]] = [{} for _ in names]
    for flag in FLAGS:
        values = listed(getattr(settings, flag))
        if len(values) == 1 < len(names):
            values = _for_unknown(flag, values[0], names, problems)
        if values and len(values) != len(names):
            problems.append(
                f"--{flag} is given {len(values)} times for {len(names)} datasets; give it once for each --dataset, in "
                f"their order, {NOT_SAID} where there is nothing to say"
            )
            continue
        for place, value in zip(typed, values):
            if value != NOT_SAID:
                place[flag] = value
    found = []
    for name, share, place, label in zip(names, shares, typed, _labels(names)):
        fields = {field: place.get(flag) for flag, field in FLAGS.items() if field}
        try:
            source = resolve_dataset(name, **fields)
        except SettingsError as error:
            problems.append(str(error))
            continue
        found.append(AskedDataset(name, share, source, place.get("dataset_revision"), label))
    seen: list[tuple] = []
    for asked in found:
        what = (_place(asked.name), asked.source, asked.revision)
        if what in seen:
            problems.append(f"--dataset {asked.name} is given twice; its pages would only be found to be duplicates")
        seen.append(what)
    if problems:
        raise SettingsError("\n".join(problems))
    return found


def _place(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name.lower()


def split_share(text: str) -> tuple[str, str]:
    """(name, share as typed, or "") of a --dataset. What exists by its whole name is that; else a number behind the
    last colon is a share, with or without %."""
    name, colon, share = text.rpartition(":")
    number = colon and re.fullmatch(r"[+-]?\d*\.?\d+(e[+-]?\d+)?%?|nan|inf", share, re.I)
    return (name, share) if number and name and not Path(text).expanduser().exists() else (text, "")


def _shares(texts: Sequence[str]) -> tuple[list[str], list[float], list[str]]:
    """(names, shares that add up to 1, problems)."""
    parts, problems = [split_share(text) for text in texts], []
    names, given = [name for name, _ in parts], []
    for text, (name, share) in zip(texts, parts):
        if not name.strip():  # a variable of a shell that is not set; as a path it would be the folder we are in
            problems.append(f"--dataset {text!r} names nothing; give a name on the Hub, a folder or a file")
        number = float(share.rstrip("%")) / (100 if share.endswith("%") else 1) if share else None
        if number is not None and not 0 < number <= 1:
            problems.append(f"--dataset {text}: {share} is no share; give more than 0 and at most 1, or 0% to 100%")
        given.append(number)
    if problems or not names:
        return names, [1 / len(names) for _ in names], problems
    total, silent = sum(share for share in given if share is not None), given.count(None)
    told = " and ".join(f"--dataset {text}" for text in texts)
    if silent and total >= 1 - 1e-9:
        problems.append(f"{told}: the shares leave nothing for the dataset without one; give smaller ones")
    elif not silent and abs(total - 1) > 0.011:  # thirds as 0.33 are meant to be thirds
        problems.append(f"{told}: the shares add up to {total:g}; they must give 1, or leave one out for the rest")
    if problems:
        return names, [1 / len(names) for _ in names], problems
    rest = (1 - total) / silent if silent else 0.0
    shares = [rest if share is None else share for share in given]
    return names, [share / sum(shares) for share in shares], []


def _for_unknown(flag: str, value: str, names: Sequence[str], problems: list[str]) -> list[str]:
    """A column that is given once is that of every dataset that is not known by name."""
    known = {name.lower() for name in KNOWN_DATASETS}
    unknown = [name for name in names if name.lower() not in known or Path(name).exists()]
    if flag not in COLUMNS or not unknown:
        why = "every dataset here is known by name" if flag in COLUMNS else "of which dataset"
        problems.append(
            f"--{flag} {value} is given once for {len(names)} datasets ({why}); give it once for each --dataset, in "
            f"their order, {NOT_SAID} where there is nothing to say"
        )
        return []
    return [value if name in unknown else NOT_SAID for name in names]


def _labels(names: Sequence[str]) -> list[str]:
    """The last part of each name; numbered where several have the same."""
    labels: list[str] = []
    for name in names:
        label = Path(name).expanduser().resolve().name if Path(name).expanduser().exists() else name.split("/")[-1]
        number = 1 + sum(re.fullmatch(rf"{re.escape(label)}(-\d+)?", other) is not None for other in labels)
        labels.append(label if number == 1 else f"{label}-{number}")
    return labels


# -----------------------------------------------------------------------------
# Turns


class Turns:
    """Whose page comes next, so that after every page each dataset has its share to within one (Tijdeman, 1980: "The
    chairman assignment problem"). Where several are equally near to their turn, the seed decides."""

    def __init__(self, shares: Sequence[float], seed: int):
        self.shares = list(shares)
        self.order = random.Random(seed).sample(range(len(shares)), len(shares))

    def next(self, kept: Sequence[int], still: Collection[int], since: Sequence[int] | None = None) -> int:
        """The dataset whose turn it is among `still`, those that have pages left. `kept` are the pages of each, `since`
        those of each when another last ended: from there on the rest share the pages by their own shares."""
        counts = [count - (since[number] if since else 0) for number, count in enumerate(kept)]
        total = sum(self.shares[number] for number in still)
        page = 1 + sum(counts[number] for number in still)
        slack = 1 / (2 * len(still) - 2) if len(still) > 1 else 0.0
        behind = {number: self.shares[number] / total * page - counts[number] for number in still}
        due = [number for number in self.order if number in still and behind[number] >= slack - 1e-9]
        due = due or [number for number in self.order if number in still]
        return min(due, key=lambda number: (1 - slack - behind[number]) / self.shares[number])


def dealt_out(count: int, shares: Sequence[float], least: int) -> list[int]:
    """`count` by shares, whole, at least `least` each (the largest give up what is missing)."""
    parts = [int(count * share + 1e-9) for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda number: parts[number] - count * shares[number])
    for number in by_rest[: count - sum(parts)]:
        parts[number] += 1
    for number in range(len(parts)):
        while parts[number] < least and max(parts) > least:
            parts[parts.index(max(parts))] -= 1
            parts[number] += 1
    return parts
