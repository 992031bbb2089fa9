"""The pages of a run: read once, checked, and found again by every rank.

    pages = prepare_pages(settings, args, encoder, processor)       # (all ranks)
    pages.training[0]["html"], pages.report

The main process reads; a machine that does not share its disk reads for itself, and must come to the same pages.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow
from transformers import ProcessorMixin, TrainingArguments

from training.collecting import load_pages, load_pages_from_disk
from training.errors import DataError, SettingsError
from training.processes import on_each_machine, same_everywhere, say
from training.progress import say_memory
from training.prompt_and_mask import PageEncoder, count_tokens
from training.settings import PageSettings

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Pages:
    """Checked pages as datasets, the line that says what became of the others, and the pages' fingerprint."""

    training: Dataset
    held_out: Dataset
    report: str
    fingerprint: str

    @property
    def known(self) -> dict[str, str]:
        """What the record of a run keeps of them."""
        return {"fingerprint": self.fingerprint, "report": self.report}


def prepare_pages(
    settings: PageSettings,
    args: TrainingArguments,
    encoder: PageEncoder,
    processor: ProcessorMixin,
    known: Mapping[str, str] | None = None,
) -> Pages:
    """(all ranks) Read once, by the main process, and by one of each machine that does not share its disk.

    `known` are the pages of the run that is gone on with: those on the disk if they are still the same, else the
    dataset is read again and must give them. Raises `DataError` for data that cannot be trained on, or where machines
    have read different pages, `SettingsError` where the dataset is no longer what it was.
    """
    start = time.monotonic()
    count = count_tokens(encoder, processor)
    mark = f"prepared-{os.environ.get('HOLO1_RUN_ID', '')}-{time.time_ns()}"  # rank 0's, told to the others below

    def prepare() -> tuple[str, str]:
        report = report_if_same(args.output_dir, known)
        if report is None:
            report = str(load_pages(settings, args.output_dir, count, args.seed))
        for earlier in (Path(args.output_dir) / "pages").glob("prepared-*"):
            earlier.unlink()
        (Path(args.output_dir) / "pages" / mark).touch()
        return report, mark

    report, _ = on_each_machine(prepare, lambda done: (Path(args.output_dir) / "pages" / done[1]).exists())
    training, held_out = load_pages_from_disk(args.output_dir)
    found = fingerprint_of(training, held_out)
    if not same_everywhere(found):
        raise DataError("the machines have read different pages; give a --dataset_revision, or a shared --output_dir")
    if known is not None and known["fingerprint"] != found:
        raise SettingsError(
            f"--dataset {settings.dataset} gives other pages than the run in {args.output_dir} began with; put those "
            "back, or begin a new run"
        )
    say(report)
    say_memory(f"{len(training):,} training and {len(held_out):,} held-out pages", start)
    return Pages(training, held_out, report, found)


def report_if_same(output_dir: str | Path, known: Mapping[str, str] | None) -> str | None:
    """(one process of each disk) What was said of the pages on the disk, where they are those `known`; else None."""
    if known is None:
        return None
    try:
        same = fingerprint_of(*load_pages_from_disk(output_dir)) == known["fingerprint"]
    except (OSError, ValueError, pyarrow.ArrowException):  # not there any more, or torn
        same = False
    say("pages: as they were when this run began" if same else "pages: no longer on the disk, read again")
    return known["report"] if same else None


COMPARED = ("name", "html", "width", "height", "html_tokens", "image_tokens")  # screenshots by their size alone


def fingerprint_of(training: Dataset, held_out: Dataset) -> str:
    """SHA-256 of which pages are trained on and which are held out, in order, with all their text, in hex."""
    digest = hashlib.sha256()
    for part in (training, held_out):
        for batch in part.select_columns([*COMPARED]).iter(1000):
            digest.update(json.dumps(batch, sort_keys=True).encode())
        digest.update(b"end")
    return digest.hexdigest()
