"""The training script in bf16 with split masters, which says at its end who asked for a tensor's number between a step
of DeepSpeed's optimizer and the next forward pass: on a GPU each would wait for that step. STEPS is how many there are,
the last of which may be asked."""

import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import bf16_on_a_cpu
import torch

import holo1_dom_finetune as pipeline
from training import zero3
from training.progress import Meter

lean, arrived, steps = zero3.lean_steps, Meter.arrived, int(os.environ["STEPS"])
watching, asked, done = [False], set(), []


def watched(method):
    def ask(self, *arguments):
        if watching[0]:
            callers = [frame for frame in traceback.extract_stack()[:-1] if "torch/" not in frame.filename]
            asked.add(f"{Path(callers[-1].filename).name}: {callers[-1].line}")
        return method(self, *arguments)

    return ask


def watched_steps(engine) -> None:
    lean(engine)
    step = engine.optimizer.step

    def watch(*unused) -> None:
        step()
        done.append(1)
        watching[0] = len(done) < steps

    engine.optimizer.step = watch


def unwatched(work, over=False):
    """What asks for numbers that are in the CPU's memory; or where it is `over` until the next step."""

    def do(self, *arguments, **options):
        watching[0], before = False, watching[0]
        try:
            return work(self, *arguments, **options)
        finally:
            watching[0] = before and not over

    return do


def main() -> None:
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name)))
    zero3.lean_steps = watched_steps
    trainer = pipeline.PageTrainer
    trainer.compute_loss = unwatched(trainer.compute_loss, over=True)
    trainer._get_num_items_in_batch = unwatched(trainer._get_num_items_in_batch)  # added up on the CPU
    pipeline.PageCollator.__call__ = unwatched(pipeline.PageCollator.__call__)
    Meter.arrived = unwatched(arrived)  # of what was sent before the step
    bf16_on_a_cpu.take_bf16()
    code = pipeline.main(sys.argv[1:])
    print(f"asked after a step: {sorted(asked)}")
    pipeline.leave(code)


if __name__ == "__main__":
    main()
