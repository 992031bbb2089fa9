"""The pages of a run, from a dataset to the disk: every page is kept, or dropped for a reason that is counted.

    report = load_pages(settings, output_dir, count_tokens, seed)           # main process; DropReport
    train, held_out = load_pages_from_disk(output_dir)                      # all ranks

Nothing here knows of models.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from training.dataset import BROKEN, REASONS, BadPage, resolve_dataset
from training.errors import DataError
from training.page_checks import PAGE_FIELDS, CountTokens, WantedPages, check_new, check_page
from training.reading import read_pages

if TYPE_CHECKING:
    from datasets import Dataset


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


def _bars_total(asked: int, known: list[int]) -> int | None:
    """What the bar counts to: pages kept as asked, rows read where there are fewer, nothing where nobody knows."""
    return min(asked, known[0]) if known else None


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
    known: list[int] = []  # how many rows there are, before the first one comes
    rows = read_pages(settings.dataset, source, seed, settings.dataset_revision, known.append)
    report, seen, sizes, pages_with = DropReport(held_out + settings.num_samples), set(), [], defaultdict(list)
    folder, schema = Path(output_dir) / "pages", pyarrow.schema(list(PAGE_FIELDS.items()))
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as files:
        log = files.enter_context(open(folder.parent / "dropped_pages.jsonl", "w", encoding="utf-8"))
        writers = [
            files.enter_context(pyarrow.ipc.new_stream(str(folder / f"{split}.tmp"), schema))
            for split in ("held_out", "train")
        ]
        progress = files.enter_context(tqdm(desc="pages", unit="page", mininterval=1))
        while report.kept < report.asked:
            row = next(rows, None)
            progress.total = _bars_total(report.asked, known)
            if row is None or report.read == 10 * report.asked + 1000:  # or a tiny budget would read millions of them
                report.ending = f"; {'the dataset ended' if row is None else 'gave up'} after {report.read:,} pages"
                break
            report.read += 1
            progress.update(progress.total != report.asked)  # all rows are read where fewer are there than asked
            try:
                page = check_page(*row, settings, count_tokens)
                check_new(page, seen, sizes, pages_with, is_held_out=report.kept < held_out)
            except BadPage as bad:
                report.dropped[bad.reason] += 1
                if bad.reason in BROKEN and len(report.broken) < 3:
                    report.broken.append(f"{row[0]} ({bad.reason}: {bad})")
                log.write(json.dumps({"name": row[0], "reason": bad.reason, "detail": str(bad)}) + "\n")
                continue
            writers[report.kept >= held_out].write_batch(pyarrow.RecordBatch.from_pylist([page], schema=schema))
            report.kept += 1
            progress.update(progress.total == report.asked)
    for split in ("held_out", "train"):  # renamed only now: another process may still be reading the old file
        os.replace(folder / f"{split}.tmp", folder / f"{split}.arrow")
    return report
