"""The training script in bf16 where there is no GPU, which it leaves alone, since it is slow there. MASTERS=whole keeps
fp32 masters as DeepSpeed has them. OVERFLOW=N makes the gradients of step N infinite, on one rank."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import training_args

import holo1_dom_finetune as pipeline
from training import settings, split_masters, zero3

begin, applied = split_masters.begin, []
precision = settings.resolve_precision


def in_bf16(values: dict, machine: settings.Machine, gpu: bool | None, notes: list[str]) -> None:
    precision(values, machine, gpu, notes)
    values["bf16"] = True


def watched(engine, planned: bool) -> None:
    kept = begin(engine, planned and os.environ.get("MASTERS") != "whole")
    assert (kept is None) == (os.environ.get("MASTERS") == "whole")
    optimizer, number = engine.optimizer, [0]
    step = optimizer.step

    def watch(*unused) -> None:
        number[0] += 1
        if os.environ.get("OVERFLOW") == str(number[0]) and os.environ["RANK"] == "0":
            optimizer.averaged_gradients[0][0].fill_(torch.inf)
        step()

    optimizer.step = watch


def noted(engine) -> bool:
    applied.append(engine.was_step_applied())
    return True


def take_bf16() -> None:
    settings.resolve_precision = in_bf16
    training_args.is_torch_bf16_gpu_available = lambda: True
    split_masters.begin = watched


if __name__ == "__main__":
    take_bf16()
    if "OVERFLOW" in os.environ:
        zero3.step_was_applied = noted  # the training would end there
    code = pipeline.main(sys.argv[1:])
    if os.environ["RANK"] == "0":
        print(f"applied {applied}")
    pipeline.leave(code)
