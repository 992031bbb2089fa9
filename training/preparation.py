"""The pages of a run: read once, checked, and found again by every rank.

    pages = prepare_pages(settings, args, encoder, processor)       # (all ranks)
    pages.training[0]["html"], pages.report

The main process reads; a machine that does not share its disk reads for itself, and must come to the same pages.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import ProcessorMixin, TrainingArguments

from training.dataset import load_pages, load_pages_from_disk
from training.errors import DataError
from training.processes import on_each_machine, same_everywhere, say
from training.progress import say_memory
from training.prompt_and_mask import PageEncoder, count_tokens
from training.settings import PageSettings

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Pages:
    """Checked pages as datasets, and the line that says what became of the others."""

    training: Dataset
    held_out: Dataset
    report: str


def prepare_pages(
    settings: PageSettings, args: TrainingArguments, encoder: PageEncoder, processor: ProcessorMixin
) -> Pages:
    """(all ranks) Read once, by the main process, and by one of each machine that does not share its disk.

    Raises `DataError` for data that cannot be trained on, or where machines have read different pages.
    """
    start = time.monotonic()
    count = count_tokens(encoder, processor)
    mark = f"prepared-{os.environ.get('HOLO1_RUN_ID', '')}-{time.time_ns()}"  # rank 0's, told to the others below

    def prepare() -> tuple[str, str]:
        report = str(load_pages(settings, args.output_dir, count, args.seed))
        for earlier in (Path(args.output_dir) / "pages").glob("prepared-*"):
            earlier.unlink()
        (Path(args.output_dir) / "pages" / mark).touch()
        return report, mark

    report, _ = on_each_machine(prepare, lambda done: (Path(args.output_dir) / "pages" / done[1]).exists())
    training, held_out = load_pages_from_disk(args.output_dir)
    names = repr([part.select_columns(["name", "html_tokens"]).to_list() for part in (training, held_out)])
    if not same_everywhere(hashlib.sha256(names.encode()).hexdigest()):
        raise DataError("the machines have read different pages; give a --dataset_revision, or a shared --output_dir")
    say(report)
    say_memory(f"{len(training):,} training and {len(held_out):,} held-out pages", start)
    return Pages(training, held_out, report)
