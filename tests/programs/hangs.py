"""The real training script, but for one thing that happens on rank AT_RANK when the step AT_STEP begins: HOW is

    memory  the memory runs out; with OTHERS=hang, the other ranks are stuck in that step, as NCCL would wait
    pages   the main thread is stuck where pages are read, before any step
    publish the upload takes until the other rank has left its exit code, or for 30 seconds
    judge   each batch of held-out pages is written only once a file `go_on` is in the current folder

`reached-<rank>` in the current folder tells that it has come so far.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import Trainer

import holo1_dom_finetune as pipeline
from training import evaluation
from training.processes import rank

how, mine = os.environ["HOW"], rank() == int(os.environ.get("AT_RANK", "0"))
compute_loss, prepare_pages, write_pages = (
    Trainer.compute_loss,
    pipeline.prepare_pages,
    evaluation.use.write_pages,
)


def reached() -> None:
    Path(f"reached-{rank()}").touch()


def stuck_loss(self, *arguments, **options):
    others = not mine and os.environ.get("OTHERS") == "hang"
    if (mine or others) and self.state.global_step + 1 == int(os.environ["AT_STEP"]):
        reached()
        if mine:
            raise torch.OutOfMemoryError("CUDA out of memory, as planned by the test")
        time.sleep(10_000)
    return compute_loss(self, *arguments, **options)


def stuck_pages(*arguments):
    if mine:
        reached()
        torch.multinomial(torch.rand(20_000_000), 2**24 - 1)  # seconds in C, where no handler of Python's runs
        time.sleep(10_000)
    return prepare_pages(*arguments)


def slow_writing(model, *arguments):
    if how == "judge" and hasattr(model, "judged"):
        reached()
        while not Path("go_on").exists():
            time.sleep(0.05)
    return write_pages(model, *arguments)


def judged(self, real=pipeline.Evaluator.copy):
    copy = real(self)
    if self.args.output_dir and Path(self.args.output_dir, "page_order.jsonl").exists():  # not the rehearsal's
        copy.judged = True
    return copy


def slow_publishing(*arguments, real=pipeline.publish):
    other, end = Path(os.environ["HOLO1_STATUS_DIR"], "rank-1"), time.monotonic() + 30
    while not other.exists() and time.monotonic() < end:
        time.sleep(0.05)
    print("while it was published, the other rank", "had ended" if other.exists() else "waited", flush=True)
    return real(*arguments)


if how == "publish":
    pipeline.publish = slow_publishing
elif how == "memory":
    Trainer.compute_loss = stuck_loss
elif how == "pages":
    pipeline.prepare_pages = stuck_pages
else:
    pipeline.Evaluator.copy, evaluation.use.write_pages = judged, slow_writing
pipeline.leave(pipeline.main(sys.argv[1:]))
