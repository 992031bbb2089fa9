"""The real training, in which memory runs out before step one on the ranks of FAILING_RANKS, as long as more than two
pages go through at once. There is no GPU here: what was decided for one, and that it failed, is told; the rest is real.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import holo1_dom_finetune as pipeline
from training import memory_fit
from training.memory_plan import MemoryPlan, Way
from training.processes import rank


def choose(args, settings, *unused) -> MemoryPlan:
    settings.micro_batch = "auto"  # as it stays where there is a GPU and no number was typed
    return MemoryPlan(Way(processes=2, micro_batch=args.per_device_train_batch_size), {"weights": 1.0})


def forward(self, trainer, batch, real=memory_fit.Fit.forward):
    pages = len(batch["image_grid_thw"])
    if trainer.model.training and pages > 2 and str(rank()) in os.environ["FAILING_RANKS"]:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return real(self, trainer, batch)


pipeline.choose_micro_batch, memory_fit.Fit.forward = choose, forward
torch.cuda.max_memory_allocated = lambda: 2**30
pipeline.leave(pipeline.main(sys.argv[1:]))
