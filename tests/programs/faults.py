"""The real training script, with one real fault in it: FAULT=kind@rank:step, in that rank's step of this number (from
1). FAULT_PLACE says where in the step: `forward` (as it is not set), `backward`, or `saving`, when the checkpoint of
the step is half written.

With TRAINED=FOLDER every rank leaves there what it has trained on: `rank-<R>.jsonl`, a line for each step that ended.
"""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import TrainerCallback

import holo1_dom_finetune as pipeline
from training.heartbeat import heart
from training.processes import rank

# -----------------------------------------------------------------------------
# Kinds


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def fill() -> None:
    """The disk is full for this process: what it writes into one file ends at 150 kB: no log is that long, all files of
    weights are. A write fails with an error of its own then; what the library that wrote makes of it is real, too."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def hang() -> None:
    while True:
        time.sleep(3600)


def run_out_of_gpu_memory() -> None:
    """The GPU's own error; raised by hand where there is none."""
    if torch.cuda.is_available():
        torch.empty(1 << 45, dtype=torch.uint8, device="cuda")
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def fail() -> None:
    raise ValueError("a bug, as planned by the test")


KINDS: dict[str, Callable[[], object]] = {
    "kill": partial(send, signal.SIGKILL),
    "stop": partial(send, signal.SIGSTOP),
    "term": partial(send, signal.SIGTERM),
    "int": partial(send, signal.SIGINT),
    "hup": partial(send, signal.SIGHUP),
    "usr1": partial(send, signal.SIGUSR1),
    "oom": run_out_of_gpu_memory,
    "oomhost": partial(torch.empty, 1 << 50, dtype=torch.uint8),  # the CPU allocator's own error
    "full": fill,
    "hang": hang,
    "slow": partial(time.sleep, 3),
    "bug": fail,
    "nan": lambda: None,  # what comes of it is done where the gradient is
}


# -----------------------------------------------------------------------------
# Where


class Fault(TrainerCallback):
    """FAULT, which strikes once."""

    def __init__(self, words: str, place: str):
        self.kind, _, where = words.partition("@")
        struck, _, step = where.partition(":")
        self.step, self.place = int(step), place
        self.mine, self.now = int(struck) == rank(), False

    def on_step_begin(self, args, state, control, **unused: object) -> None:
        self.now = self.mine and state.global_step + 1 == self.step

    def strikes(self, place: str) -> bool:
        """Whether now and here; not a second time."""
        found = self.now and place == self.place
        self.now = self.now and not found
        return found

    def at(self, place: str, *unused: object) -> None:
        if self.strikes(place):
            KINDS[self.kind]()

    def on_gradient(self, gradient: torch.Tensor) -> torch.Tensor | None:
        if not self.strikes("backward"):
            return None
        KINDS[self.kind]()
        return gradient * float("nan") if self.kind == "nan" else None


class Trained(TrainerCallback):
    """What was trained on, in the order in which it was."""

    def __init__(self, folder: Path):
        folder.mkdir(exist_ok=True)
        self.file, self.pages = (folder / f"rank-{rank()}.jsonl").open("a"), []
        heart.trains_on = self.note

    def note(self, pages: list[str], micro_batch: int) -> None:
        self.pages += pages
        type(heart).trains_on(heart, pages, micro_batch)

    def on_step_begin(self, *unused: object, **named: object) -> None:
        self.pages = []  # those of the proof before step one, too

    def on_step_end(self, args, state, control, **unused: object) -> None:
        print(json.dumps({"step": state.global_step, "pages": self.pages}), file=self.file, flush=True)


def make_trainer(*arguments: object, real=pipeline.make_trainer):
    trainer = real(*arguments)
    if words := os.environ.get("FAULT"):
        fault = Fault(words, os.environ.get("FAULT_PLACE") or ("backward" if words.startswith("nan") else "forward"))
        trainer.add_callback(fault)
        trainer.model.register_forward_pre_hook(partial(fault.at, "forward"))
        next(weight for name, weight in trainer.model.named_parameters() if name.endswith("norm.weight")).register_hook(
            fault.on_gradient
        )
        save = trainer._save_rng_state  # each rank's own file, behind weights and optimizer
        trainer._save_rng_state = lambda folder: (fault.at("saving"), save(folder))
    if folder := os.environ.get("TRAINED"):
        trainer.add_callback(Trained(Path(folder)))
    return trainer


if os.environ.get("FAULT", "").startswith("hup"):
    signal.signal(
        signal.SIGHUP, signal.SIG_DFL
    )  # whoever starts tests under nohup has it ignored, and so it would stay
pipeline.make_trainer = make_trainer
pipeline.leave(pipeline.main(sys.argv[1:]))
