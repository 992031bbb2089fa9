"""The training script, which says at its end how often DeepSpeed released all weights, and how many numbers of them
were whole after each step. PLAIN_STEPS=1 leaves its steps as DeepSpeed makes them."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero

import holo1_dom_finetune as pipeline
from training import zero3

release, calls = Zero._partition_all_parameters, []
lean, whole = zero3.lean_steps, []


def watched_release(self) -> None:
    calls.append(1)
    release(self)


def watched_steps(engine) -> None:
    if os.environ["PLAIN_STEPS"] == "0":
        lean(engine)
    step = engine.optimizer.step

    def watch(*unused) -> None:
        step()
        whole.append(sum(weight.numel() for weight in engine.module.parameters()))

    engine.optimizer.step = watch


if __name__ == "__main__":
    Zero._partition_all_parameters = watched_release
    zero3.WORTH_A_CALL = 1_000  # some of the tiny weights are large, then
    zero3.lean_steps = watched_steps
    code = pipeline.main(sys.argv[1:])
    if os.environ["RANK"] == "0":  # two ranks may write into one line
        print(f"released {len(calls)} times, whole {whole}")
    pipeline.leave(code)
