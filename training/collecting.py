"""The pages of a run, from its datasets to the disk: every page is kept, or dropped for a reason that is counted.

    report = load_pages(settings, output_dir, count_tokens, seed)           # main process; DropReport
    train, held_out = load_pages_from_disk(output_dir)                      # all ranks

Nothing here knows of models. Where several datasets are asked for, each has its lane of checked pages, and takes turns
by its share; which page comes next depends on the pages before it alone, never on how fast they were checked.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scoring.bar import progress_bar
from training.dataset import BROKEN, REASONS, BadPage
from training.duplicates import KnownPages
from training.errors import DataError, DiskError
from training.mixture import AskedDataset, Turns, asked_datasets, dealt_out
from training.page_checks import CountTokens, WantedPages, marks_of
from training.page_store import SPLITS, PageStore
from training.page_workers import Checked, Job, Lane, PagePool
from training.reading import read_pages

if TYPE_CHECKING:
    from datasets import Dataset
    from tqdm import tqdm

    from scoring.bar import Lines

SEAL_ROWS = 1000  # read, after which a killed reading would go on
KEPT = ("asked", "read", "kept", "dropped", "broken", "ending")  # of a DropReport, in a seal
HEADROOM = 1.02  # of a page on the disk, beside its screenshot and html


@dataclass
class DropReport:
    """What became of the rows that were read; `broken` names the first broken ones. Of several datasets, `parts` are
    the reports of each."""

    asked: int
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    ending: str = ""
    parts: dict[str, DropReport] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons = [f"{self.dropped[reason]:,} {reason}" for reason in REASONS if self.dropped[reason]]
        whole = ", ".join([f"{self.asked:,} asked", *reasons, f"{self.kept:,} kept"]) + self.ending
        return "; ".join([whole, *(f"of {label}: {part}" for label, part in self.parts.items())])

    @property
    def bad(self) -> int:
        """How many of them are broken."""
        return sum(self.dropped[reason] for reason in BROKEN)


def load_pages(
    settings: WantedPages,
    output_dir: str | Path,
    count_tokens: CountTokens,
    seed: int,
    pool: PagePool | None = None,
    place: Path | None = None,
) -> DropReport:
    """Reads, cleans, checks and splits the pages, stores them for load_pages_from_disk in `output_dir`/pages, and names
    the dropped ones in dropped_pages.jsonl. DataError when too much is broken or too little is left.

    (one process of each disk) `pool` checks them, not given: this process alone. In `place`, not given: a new folder,
    a reading that was killed goes on. The index of held-out texts is held in memory, and no page longer than it is
    looked at.
    """
    reading = Path(output_dir) / "pages" / "reading" if place is None else place
    if place is None:
        shutil.rmtree(reading, ignore_errors=True)
    pool = pool or PagePool(Job(settings), count_tokens, most_workers=1)
    try:
        report, held_out = _fitting(settings, reading, pool, seed)
    finally:
        pool.close()
    give_pages(reading / f"held_out_{held_out}", Path(output_dir), keep=place is not None)
    if place is None:
        shutil.rmtree(reading)
    return judged(report, settings, output_dir, held_out)


def judged(report: DropReport, settings: WantedPages, output_dir: str | Path, held_out: int) -> DropReport:
    """The report, in the words of what was asked. DataError where it says that nobody should train on these pages."""
    report.asked = settings.num_samples + settings.eval_pages
    where = f"every dropped page is named in {Path(output_dir) / 'dropped_pages.jsonl'}"
    for label, part in (report.parts or {"": report}).items():  # a small set's broken pages are few among all
        if part.bad > settings.max_bad_share * part.read:
            of = f" of {label}" if label else ""
            raise DataError(
                f"{part.bad:,} of {part.read:,} pages{of} are broken, more than --max_bad_share "
                f"{settings.max_bad_share:g}: {'; '.join(part.broken)}; repair them, leave them out, or give "
                f"--max_bad_share {math.ceil(100 * part.bad / part.read) / 100:g}; {where}"
            )
    if report.kept < 1 + min(held_out, 1):
        raise DataError(f"{report}: too few to train on one and hold one out; {where}")
    if report.kept < report.asked:
        trained, asked = report.kept - held_out, f"{settings.num_samples:,} and {settings.eval_pages:,}"
        report.ending += f"{'; ' if report.parts else ': '}{trained:,} to train on and {held_out:,} held out, of "
        report.ending += f"{asked} that were asked for"
    return report


def give_pages(store: Path, output_dir: Path, keep: bool) -> None:
    """The pages of a finished `store` as those of a run: by a second name of the same file where `keep` is asked for,
    or by a link where the disk is another, so that they lie on a disk once."""
    pages = output_dir / "pages"
    pages.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:  # renamed: another process may still be reading the old file
        source, new = store / f"{split}.arrow", pages / f"{split}.tmp"
        new.unlink(missing_ok=True)
        if not keep:
            os.replace(source, new)
        else:
            try:
                os.link(source, new)
            except OSError:  # another disk, or one without hard links
                new.symlink_to(source.resolve())
        os.replace(new, pages / f"{split}.arrow")
    shutil.copyfile(store / "dropped_pages.jsonl", output_dir / "dropped_pages.jsonl")


def load_pages_from_disk(output_dir: str | Path) -> tuple[Dataset, Dataset]:
    """(all ranks) (training, held-out) pages, dicts of PAGE_FIELDS; memory-mapped, so ranks share the memory."""
    import datasets

    train, held_out = (
        datasets.Dataset.from_file(str(Path(output_dir) / "pages" / f"{split}.arrow"))
        for split in ("train", "held_out")
    )
    return train, held_out


def _fitting(settings: WantedPages, reading: Path, pool: PagePool, seed: int) -> tuple[DropReport, int]:
    """(report, held-out pages). A dataset smaller than asked is read again for fewer held-out pages: a page is then
    judged by the final split. Of an earlier try only the report stays."""
    asked = asked_datasets(settings)
    held_out = max(settings.eval_pages, len(asked) if settings.eval_pages and len(asked) > 1 else 0)
    while True:
        with PageStore(reading / f"held_out_{held_out}") as store:
            report = Collector(settings, asked, store, seed, held_out).collect(pool)
            fewer = max(len(asked), report.kept // 5)
            if report.kept >= report.asked or held_out <= fewer:
                return report, held_out
            store.empty()
        held_out = fewer


class Collector:
    """One reading: the first `held_out` pages that are kept are held out, the next num_samples are trained on; of
    several datasets, each has its share of both. What decides the next page stands in the seal."""

    def __init__(
        self, settings: WantedPages, asked: Sequence[AskedDataset], store: PageStore, seed: int, held_out: int
    ):
        self.settings, self.asked, self.store, self.seed = settings, asked, store, seed
        shares = [each.share for each in asked]
        self.held_out, self.quotas = held_out, dealt_out(held_out, shares, 1 if held_out else 0)
        wanted = dealt_out(settings.num_samples, shares, 0)
        # Of each dataset, by their number; `since` as Turns.next has it, "still": it may have more.
        self.parts = [DropReport(quota + count) for quota, count in zip(self.quotas, wanted)]
        self.held = [0] * len(asked)
        self.since: list[int] | None = None
        self.still = set(range(len(asked)))
        self.known = KnownPages()
        self.training_turns = Turns(shares, seed)
        self.held_turns = Turns(self.quotas, seed) if held_out else None
        if store.state is not None:
            self.go_on(store.state)

    @property
    def kept(self) -> int:
        """Pages so far, held-out ones too."""
        return sum(part.kept for part in self.parts)

    def go_on(self, state: dict[str, Any]) -> None:
        """From where an earlier process was when it sealed."""
        self.parts = [DropReport(**{**part, "dropped": Counter(part["dropped"])}) for part in state["parts"]]
        self.held, self.since, self.still = state["held"], state["since"], set(state["still"])
        if not self.store.finished:
            for page in self.store.held_out():
                self.known.add(marks_of(page), is_held_out=True)
            self.known.digests.update(self.store.digests())

    def state(self) -> dict[str, Any]:
        """What go_on needs."""
        parts = [{name: getattr(part, name) for name in KEPT} for part in self.parts]
        return {"parts": parts, "held": self.held, "since": self.since, "still": sorted(self.still)}

    def collect(self, pool: PagePool) -> DropReport:
        """All that is asked for, or all there is."""
        total = self.held_out + self.settings.num_samples
        if self.store.finished:
            return self.report(total)
        counts: dict[int, int] = {}  # rows of each dataset that knows them, before its first one comes
        rows = [
            read_pages(each.name, each.source, self.seed, each.revision, part.read, partial(counts.__setitem__, number))
            for number, (each, part) in enumerate(zip(self.asked, self.parts))
        ]
        lanes = pool.lanes(rows, [each.share for each in self.asked])
        unsealed = 0
        again = f" again, with {self.held_out:,} held out" if self.held_out < self.settings.eval_pages else ""
        with progress_bar(f"pages read{again}", None) as progress:
            while self.kept < total and self.still:
                pool.remaining = total - self.kept
                number = self.turn()
                if (checked := self.next_of(number, lanes[number])) is None:
                    continue
                self.take(number, checked)
                self.show(progress, total, counts)
                unsealed += 1
                if unsealed == SEAL_ROWS:
                    self.store.seal(self.state())
                    self.check_room(total)
                    unsealed = 0
        self.store.finish(self.state())
        return self.report(total)

    def show(self, progress: tqdm | Lines, total: int, counts: Mapping[int, int]) -> None:
        """A bar that counts to what there is: pages kept as asked; rows read, where there are fewer than that, or where
        nobody knows how many there are."""
        every = sum(counts.values()) if len(counts) == len(self.parts) else None
        progress.total = None if every is None else min(total, every)
        done = self.kept if progress.total == total else sum(part.read for part in self.parts)
        progress.update(done - progress.n)

    def turn(self) -> int:
        """The dataset whose page comes next: while pages are held out, one that still lacks some, if there is one."""
        if sum(self.held) < self.held_out:
            lacking = {number for number in self.still if self.held[number] < self.quotas[number]}
            return self.held_turns.next(self.held, lacking or self.still)
        trained = [part.kept - held for part, held in zip(self.parts, self.held)]
        return self.training_turns.next(trained, self.still, self.since)

    def next_of(self, number: int, lane: Lane) -> Checked | None:
        """The next row of a dataset; None where it has ended."""
        part = self.parts[number]
        gave_up = part.read == 10 * part.asked + 1000  # or a tiny budget would read millions of them
        checked = None if gave_up else next(lane, None)
        if checked is None:
            part.ending = f"; {'gave up' if gave_up else 'the dataset ended'} after {part.read:,} pages"
            self.still.discard(number)
            self.since = [each.kept - held for each, held in zip(self.parts, self.held)]
        return checked

    def take(self, number: int, checked: Checked) -> bool:
        """Whether the row becomes a page of the run."""
        part, is_held_out = self.parts[number], sum(self.held) < self.held_out
        label = self.asked[number].label if len(self.asked) > 1 else ""
        part.read += 1
        bad = checked.bad
        try:
            if bad is None:
                self.known.check(checked.marks, is_held_out)
        except BadPage as found:
            bad = found
        if bad is not None:
            part.dropped[bad.reason] += 1
            if bad.reason in BROKEN and len(part.broken) < 3:
                part.broken.append(f"{checked.name} ({bad.reason}: {bad})")
            row = {"name": checked.name, "reason": bad.reason, "detail": str(bad)}
            self.store.drop({"dataset": label, **row} if label else row)
            return False
        self.known.add(checked.marks, is_held_out)
        name = f"{label}/{checked.name}" if label else checked.name
        self.store.append(SPLITS[is_held_out], checked.page | {"name": name}, checked.marks)
        part.kept += 1
        self.held[number] += is_held_out
        return True

    def check_room(self, total: int) -> None:
        """DiskError before the disk is full, as soon as the size of a page is known."""
        kept, size = self.kept, self.store.bytes_written()
        needed = HEADROOM * size / max(kept, 1) * (total - kept)
        free = shutil.disk_usage(self.store.folder).free
        if kept and needed > free:
            raise DiskError(
                f"{total:,} pages of {size / kept / 1e3:,.0f} kB need {needed / 1e9:.1f} GB more, and the disk of "
                f"{self.store.folder} has {free / 1e9:.1f} GB free; give a --pages_dir on another disk, or fewer "
                "--num_samples"
            )

    def report(self, total: int) -> DropReport:
        """Of all datasets together, and, where there are several, of each."""
        if len(self.parts) == 1:
            return self.parts[0]
        whole = DropReport(total)
        for part in self.parts:
            whole.read += part.read
            whole.kept += part.kept
            whole.dropped.update(part.dropped)
            whole.broken += part.broken
        trained = [part.kept - held for part, held in zip(self.parts, self.held)]
        if any(part.ending for part in self.parts):
            came_out = [
                f"{each.label} {count / max(1, sum(trained)):.3f} instead of {each.share:.3f}"
                for each, count in zip(self.asked, trained)
            ]
            whole.ending = f"; not all had their share of pages: {', '.join(came_out)}"
        whole.parts = {each.label: part for each, part in zip(self.asked, self.parts)}
        return whole
