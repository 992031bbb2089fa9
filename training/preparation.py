"""The pages of a run: read once, checked, and found again by every rank, and by later runs with the same settings.

    pages = prepare_pages(settings, args, encoder, processor)       # (all ranks)
    pages.training[0]["html"], pages.report

The main process reads; a machine that does not share its disk reads for itself, and must come to the same pages.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow
from transformers import ProcessorMixin, TrainingArguments

import use_model_from_hub as use
from scoring.report_values import plural
from scoring.statistics import FEW
from training.collecting import load_pages, load_pages_from_disk
from training.dataset import dataset_revision
from training.errors import DataError, DiskError, PipelineError, SettingsError, is_disk_full
from training.mixture import NOT_SAID, asked_datasets
from training.page_workers import PagePool, TokenizerCount, cores, job_of
from training.prepared import age, claimed, describe
from training.processes import in_columns, on_each_machine, same_everywhere, say
from training.progress import say_memory
from training.prompt_and_mask import PageEncoder, count_tokens
from training.settings import PAGES_FOLDER, PageSettings

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
    mark = f"prepared-{os.environ.get('HOLO1_RUN_ID', '')}-{time.time_ns()}"  # rank 0's, told to the others below

    def prepare() -> tuple[str, str, str]:
        report, found = report_if_same(args.output_dir, known), (known or {}).get("fingerprint", "")
        if report is None:
            report, found = find_or_make_on_disk(settings, args, encoder, processor)
        for earlier in (Path(args.output_dir) / "pages").glob("prepared-*"):
            earlier.unlink()
        (Path(args.output_dir) / "pages" / mark).touch()
        return report, mark, found

    # The process that prepares reads all the text for its fingerprint, or knows it: not every rank again.
    report, _, found = on_each_machine(prepare, lambda done: (Path(args.output_dir) / "pages" / done[1]).exists())
    training, held_out = load_pages_from_disk(args.output_dir)
    if not same_everywhere(f"{found} {len(training)} {len(held_out)}"):
        raise DataError("the machines have read different pages; give a --dataset_revision, or a shared --output_dir")
    if known is not None and known["fingerprint"] != found:
        raise SettingsError(
            f"--dataset {' '.join(settings.dataset)} gives other pages than the run in {args.output_dir} began with; "
            "put those back, or begin a new run"
        )
    say(in_columns(report))
    if 0 < len(held_out) < min(FEW, settings.eval_pages):
        say(f"{plural(len(held_out), 'page')} held out: from fewer than {FEW}, scores and their intervals mean little")
    say_memory(f"{len(training):,} training and {plural(len(held_out), 'held-out page')}", start)
    return Pages(training, held_out, report, found)


def one_page(settings: PageSettings, seed: int, encoder: PageEncoder, processor: ProcessorMixin) -> tuple[list, list]:
    """(one process) Ids and labels, both of length T, of a page that a run would train on; nothing stays on the disk.

    No more is read than it takes to know which pages would be held out. Raises `DataError` where there is none.
    """
    settings = replace(settings, num_samples=1, max_bad_share=1.0)  # of so few pages one broken one is a large share
    with tempfile.TemporaryDirectory() as place:
        load_pages(settings, place, count_tokens(encoder, processor), seed)
        page = load_pages_from_disk(place)[0][0]
    (picture,) = encoder.family.pictures(processor, [use.open_screenshot(page["screenshot"])])
    return encoder.encode(page["html"], picture.ids)


def find_or_make_on_disk(
    settings: PageSettings, args: TrainingArguments, encoder: PageEncoder, processor: ProcessorMixin
) -> tuple[str, str]:
    """(one process of each disk) As find_or_make. DiskError that says where, since a full disk itself does not."""
    try:
        return find_or_make(settings, args, encoder, processor)
    except Exception as error:
        if isinstance(error, PipelineError) or not is_disk_full(error):
            raise
        place = pages_dir_of(settings, args)
        raise DiskError(
            f"a disk is full ({error}) while pages are prepared in {place}, whose own has "
            f"{shutil.disk_usage(place).free / 1e9:.2f} GB free; give a --pages_dir on another disk, or fewer "
            "--num_samples; what is prepared is gone on with"
        ) from error


def pages_dir_of(settings: PageSettings, args: TrainingArguments) -> Path:
    """Where prepared pages lie for later runs."""
    return Path(settings.pages_dir or Path(args.output_dir).absolute().parent / PAGES_FOLDER).expanduser().resolve()


def find_or_make(
    settings: PageSettings, args: TrainingArguments, encoder: PageEncoder, processor: ProcessorMixin
) -> tuple[str, str]:
    """(one process of each disk) (report, fingerprint) of the pages, which then lie in the output folder: found where
    an earlier run has prepared the same, else made, by as many workers as there are cores."""
    pages_dir = pages_dir_of(settings, args)
    # What is read is what was looked up: a dataset may change between the two.
    asked = asked_datasets(settings)
    commits = [dataset_revision(each.name, each.revision) for each in asked]
    settings = replace(settings, dataset_revision=[commit or NOT_SAID for commit in commits])
    # Where the Hub is silent, a branch comes back as it was asked for, and may move.
    certain = [is_commit(commit) or commit != each.revision for each, commit in zip(asked, commits)]
    asked = [replace(each, revision=commit if sure else None) for each, commit, sure in zip(asked, commits, certain)]
    counting, worker_count = how_to_count(encoder, processor)
    apart = [args.output_dir, pages_dir, *(Path(settings.final_dir).glob("holo1_dom_finetune_*"))]
    wanted = describe(settings, asked, args.seed, counting, apart)
    count, image_tokens = count_tokens(encoder, processor), partial(encoder.family.image_tokens, processor)
    with (
        claimed(pages_dir, wanted) as prepared,
        PagePool(job_of(settings, worker_count), count, cores(), image_tokens) as pool,
    ):
        if prepared.done is not None:
            say(f"pages: found in {prepared.folder}, prepared {age(prepared)}; remove it to have them made anew")
        elif prepared.begun():
            say(f"pages: going on with those that an earlier run has begun in {prepared.folder}")
        report = load_pages(settings, args.output_dir, count, args.seed, pool, prepared.folder)
        if prepared.done is None:
            fingerprint = fingerprint_of(*load_pages_from_disk(args.output_dir))
            prepared.note(fingerprint)
            say(f"pages: in {prepared.folder}, where a later run with the same settings finds them")
        else:
            fingerprint = prepared.done["fingerprint"]
    return str(report), fingerprint


def is_commit(revision: str | None) -> bool:
    """Whether it is the name of a commit, which never means another one."""
    return bool(re.fullmatch("[0-9a-f]{40}", revision or ""))


def how_to_count(encoder: PageEncoder, processor: ProcessorMixin) -> tuple[str, TokenizerCount | None]:
    """(SHA-256 of all that decides a page's tokens, the same count for workers; None for a tokenizer of Python's)."""
    parts = [encoder.family.model_type, encoder.lead, processor.image_processor.to_dict()]
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    if backend is None:
        parts += [type(encoder.tokenizer).__name__, encoder.tokenizer.get_vocab()]
    else:
        tokenizer = backend.to_str()
        # Left over from what was tokenised last.
        parts.append({**json.loads(tokenizer), "padding": None, "truncation": None})
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    return digest, None if backend is None else TokenizerCount(tokenizer, encoder.lead)


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
