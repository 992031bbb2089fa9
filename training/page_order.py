"""Which pages are trained on when: batches of equal cost, drawn at random by seed and epoch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler

from families import page_costs
from scoring.report_values import plural
from training.errors import DataError, SettingsError
from training.processes import rank, say, world_size

if TYPE_CHECKING:
    from datasets import Dataset


class PageSampler(BatchRebalanceSampler):  # the Trainer deals with its kind, rank by rank
    """Batches of equal cost: the pages of a step, drawn at random, are dealt out so that all ranks finish together.

    `costs` are the operations of each page. No page comes twice in an epoch, and all ranks have equally many batches:
    of the last pages, as many as cannot be shared out evenly are left out of this epoch; another one draws others.
    A run that `began_on` another number of processes has the same steps on any: only of an epoch's last one may pages
    be left out, `left_out` of them.

    Raises `DataError` for fewer pages than processes, `SettingsError` where an epoch's last step has fewer.
    """

    def __init__(self, costs: list[float], args: TrainingArguments, began_on: int | None = None):
        if len(costs) < world_size():
            raise DataError(
                f"{plural(len(costs), 'training page')} for {world_size()} processes: each needs one; give more pages"
            )
        self.costs, self.epoch = costs, 0
        self.seed = args.seed if args.data_seed is None else args.data_seed
        self.micro_batch, self.accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
        ranks, began_on = world_size(), began_on or world_size()
        self.size = self.micro_batch * self.accumulated * ranks  # pages per step
        self.kept = len(costs) // began_on * began_on  # of an epoch
        last = self.kept % self.size
        if 0 < last < ranks:
            raise SettingsError(
                f"--resume: of {self.kept} pages in steps of {self.size}, an epoch's last step has {last}, which "
                f"cannot be dealt out to {ranks} processes; the run began with {began_on}: take as many, or at most "
                f"{last}"
            )
        # Each micro-batch of each rank needs a page.
        self.left_out = last % ranks if math.ceil(last / self.micro_batch / ranks) * ranks > last else 0
        self.kept -= self.left_out

    def steps(self) -> Iterator[list[list[int]]]:
        """The pages of each optimizer step, in groups: one for each rank and micro-batch, rank by rank. They come
        dearest first, so every second micro-batch is dealt out the other way round: else the first rank would have the
        dearest of each, and the others wait for it at the end of the step."""
        ranks = world_size()
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.costs), generator=generator).tolist()
        order = order[: self.kept]
        for start in range(0, len(order), self.size):
            pages = order[start : start + self.size]
            groups = page_costs.deal(
                [self.costs[page] for page in pages], math.ceil(len(pages) / self.micro_batch / ranks) * ranks
            )
            rows = [groups[row : row + ranks] for row in range(0, len(groups), ranks)]
            turned = [row[::-1] if number % 2 else row for number, row in enumerate(rows)]
            yield [[pages[place] for place in group] for row in turned for group in row]

    def __iter__(self) -> Iterator[list[int]]:
        for groups in self.steps():
            yield from groups[rank() :: world_size()]

    def __len__(self) -> int:
        steps, last = divmod(self.kept, self.size)
        return steps * self.accumulated + math.ceil(last / self.micro_batch / world_size())


def check_steps(pages: int, args: TrainingArguments, began_on: int) -> None:
    """(all ranks) Whether so many `pages` can be dealt out to the processes of now, before the model loads; what is
    left out of the steps with which the run began is said. Raises what `PageSampler` does."""
    if left_out := PageSampler([0.0] * pages, args, began_on).left_out:
        say(f"of each epoch's last step, {left_out} pages are left out: {world_size()} processes have to have as many")


def write_page_order(sampler: PageSampler, pages: Dataset, file: Path) -> None:
    """(main process only) Which page is trained on in which step of the first epoch, a line of JSON for each step."""
    names = pages.select_columns(["name"])["name"]
    with file.open("w", encoding="utf-8") as lines:
        for step, groups in enumerate(sampler.steps(), start=1):
            lines.write(json.dumps({"step": step, "pages": [names[page] for group in groups for page in group]}) + "\n")
