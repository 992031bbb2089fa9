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

from training import page_costs
from training.errors import DataError
from training.processes import rank, world_size

if TYPE_CHECKING:
    from datasets import Dataset


class PageSampler(BatchRebalanceSampler):  # the Trainer deals with its kind, rank by rank
    """Batches of equal cost: the pages of a step, drawn at random, are dealt out so that all ranks finish together.

    `costs` are the operations of each page. No page comes twice in an epoch, and all ranks have equally many batches:
    of the last pages, as many as cannot be shared out evenly are left out of this epoch; another one draws others.
    Raises `DataError` for fewer pages than processes.
    """

    def __init__(self, costs: list[float], args: TrainingArguments):
        if len(costs) < world_size():
            raise DataError(
                f"{len(costs)} training pages for {world_size()} processes: each needs one; give more pages"
            )
        self.costs, self.epoch = costs, 0
        self.seed = args.seed if args.data_seed is None else args.data_seed
        self.micro_batch, self.accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps

    def steps(self) -> Iterator[list[list[int]]]:
        """The pages of each optimizer step, in groups: one for each rank and micro-batch, rank by rank."""
        ranks = world_size()
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.costs), generator=generator).tolist()
        order = order[: len(order) // ranks * ranks]
        size = self.micro_batch * self.accumulated * ranks
        for start in range(0, len(order), size):
            pages = order[start : start + size]
            groups = page_costs.deal(
                [self.costs[page] for page in pages], math.ceil(len(pages) / self.micro_batch / ranks) * ranks
            )
            yield [[pages[place] for place in group] for group in groups]

    def __iter__(self) -> Iterator[list[int]]:
        for groups in self.steps():
            yield from groups[rank() :: world_size()]

    def __len__(self) -> int:
        mine, step = len(self.costs) // world_size(), self.micro_batch * self.accumulated
        return mine // step * self.accumulated + math.ceil(mine % step / self.micro_batch)


def write_page_order(sampler: PageSampler, pages: Dataset, file: Path) -> None:
    """(main process only) Which page is trained on in which step of the first epoch, a line of JSON for each step."""
    names = pages.select_columns(["name"])["name"]
    with file.open("w", encoding="utf-8") as lines:
        for step, groups in enumerate(sampler.steps(), start=1):
            lines.write(json.dumps({"step": step, "pages": [names[page] for group in groups for page in group]}) + "\n")
