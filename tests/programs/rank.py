"""One rank of the wrapper's tests: RANK_DOES is a JSON list, the name of a function of this file and its arguments.

Each leaves `ready-<rank>` (its id and the run's) in the current folder before it does what the test is about.
"""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

rank = int(os.environ["RANK"])


def ready() -> None:
    file = Path(f"ready-{rank}.part")
    file.write_text(f"{os.getpid()} {os.environ['HOLO1_RUN_ID']}")
    file.rename(f"ready-{rank}")


def leave(code: int) -> None:
    """As the training script does: its code where the wrapper looks for it, then an end without ceremony."""
    (Path(os.environ["HOLO1_STATUS_DIR"]) / f"rank-{rank}").write_text(str(code))
    os._exit(code)


def meet():
    """Two ranks add up what they bring; returns torch.distributed and the sum. Torch is loaded here and not above: it
    takes seconds, and most ranks never meet."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    assert total.item() == 3
    return dist, total


def reduce_until_the_other_is_gone(dist, total) -> None:
    try:
        while True:
            dist.all_reduce(total)
    except RuntimeError:
        leave(1)


def start_a_helper() -> None:
    subprocess.Popen(["sleep", "300"], start_new_session=True)


class Beats(threading.Thread):
    """What a rank tells of itself, five times a second; SIGUSR2 writes its stacks."""

    def __init__(self, stage: str, **fields):
        super().__init__(daemon=True)
        folder = Path.cwd()
        stacks = folder / f"stacks-{rank}"
        self.beat = {"stage": stage, "step": 0, "since": time.time(), "limit_s": None, "pages": [], "micro_batch": 1}
        self.beat |= {"output_dir": str(folder), "stacks": str(stacks)} | fields
        faulthandler.register(signal.SIGUSR2, file=stacks.open("w"), all_threads=True)
        self.write()
        self.start()

    def write(self) -> None:
        file = Path(os.environ["HOLO1_STATUS_DIR"]) / f"beat-{rank}"
        file.with_suffix(".part").write_text(json.dumps(self.beat | {"time": time.time()}))
        file.with_suffix(".part").rename(file)

    def progress(self, **fields) -> None:
        self.beat |= {"since": time.time()} | fields

    def run(self) -> None:
        while True:
            time.sleep(0.2)
            self.write()


# -----------------------------------------------------------------------------
# Ends


def leaves(codes: list[int], meeting: bool = False) -> None:
    """With the code of its rank; half a second later, as a rank that loads torch lives longer."""
    ready()
    time.sleep(0.5)
    if meeting:
        meet()
    leave(codes[rank])


def leaves_when_told() -> None:
    ready()
    while not Path("go").exists():
        time.sleep(0.05)
    leave(0)


def runs_out_of_memory() -> None:
    """Until --micro_batch is 1; `starts-<rank>` has a line for each start: the folder for codes and the arguments."""
    ready()
    with Path(f"starts-{rank}").open("a") as file:
        print(os.environ["HOLO1_STATUS_DIR"], os.environ["MASTER_PORT"], *sys.argv[2:], file=file)
    typed = [number for flag, number in zip(sys.argv, sys.argv[1:], strict=False) if flag == "--micro_batch"]
    pages = int(typed[-1])
    if pages == 1:
        leave(0)
    if rank == 0:
        asked = {"micro_batch": pages // 2, "resume": pages == 2}
        (Path(os.environ["HOLO1_STATUS_DIR"]) / "smaller").write_text(json.dumps(asked))
    time.sleep(0.5)
    leave(83)


def exits(code: int) -> None:
    """As a script that does not know the wrapper's contract."""
    ready()
    sys.exit(code)


def leaves_late(seconds: float) -> None:
    """The main rank, long after the others."""
    ready()
    if rank == 0:
        time.sleep(seconds)
    leave(0)


def cannot_end() -> None:
    """Every rank but the main one hangs after its last act."""
    ready()
    time.sleep(0.5)
    os._exit = lambda code: time.sleep(300 * rank)
    leave(0)


def writes(variables: list[str]) -> None:
    """What it sees, once both ranks have met: its interpreter, these variables, its arguments, and where codes go. It
    has a helper."""
    meet()
    start_a_helper()
    Path("where").write_text(os.environ["HOLO1_STATUS_DIR"])
    seen = [sys.executable, *[os.environ[name] for name in variables], *sys.argv[1:]]
    Path(f"seen-{rank}").write_text(" ".join(seen))
    subprocess.run(["ninja", "--version"], check=True)
    ready()
    leave(0)


# -----------------------------------------------------------------------------
# Signals and kills


def waits(deaf: bool = False, helper: bool = False) -> None:
    """For ever; a deaf one ignores SIGTERM."""
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if helper:
        start_a_helper()
    ready()
    time.sleep(300)


def saves(main_seconds: float = 0, seconds: float = 0, code: int = 85, undo: bool = False, either: bool = False):
    """Until it is signalled; `stopped-<rank>` then tells by what and when ("0 0" for a rank that nobody signalled).
    Saving takes the main rank `main_seconds`, every rank `seconds`. With `undo`, a second SIGTERM would kill it; with
    `either`, the second rank's signal stops both."""
    stopped: list[tuple[int, float]] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: stopped.append((number, time.time())))
    ready()
    while not stopped and not (either and Path("stopped-1").exists()):
        time.sleep(0.01)
    number, when = (stopped or [(0, 0)])[0]
    Path(f"stopped-{rank}").write_text(f"{int(number)} {when}")
    if undo:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(seconds + (main_seconds if rank == 0 else 0))
    leave(code)


def stops_in(stage: str, code: int | None, seconds: float = 0) -> None:
    """At a signal, in this stage: with a code, `seconds` later, or by the signal where no code is given."""
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1) if code is not None else os._exit(143))
    Beats(stage, step=7, limit_s=None)
    ready()
    while not stopped:
        time.sleep(0.05)
    time.sleep(seconds)
    leave(code)


def hangs(stops: bool, limit_s: float | None) -> None:
    """Rank 1 makes no progress after its third step and does not listen to SIGTERM; or it is stopped as a whole, and
    rank 0 waits for it."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    beats = Beats("training", limit_s=limit_s)
    ready()
    for step in range(1, 4):
        time.sleep(0.3)
        beats.progress(step=step, pages=[f"page {step}-{rank}"])
    last = Path("last-step-of-1")
    if stops and rank == 1:
        last.touch()
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGSTOP)
    while stops and not last.exists():  # ranks of a training are never further apart, however loaded the machine is
        time.sleep(0.05)
        beats.progress()
    while True:
        time.sleep(0.2)
        if rank == 0 and not stops:
            beats.progress()


def imports_for_long(limit_s: float, seconds: float) -> None:
    """Rank 1 says nothing of itself for longer than the limit of rank 0, which goes on."""
    if rank == 1:
        time.sleep(seconds)
    beats = Beats("loading", limit_s=limit_s)
    ready()
    while not Path("ready-1").exists():
        time.sleep(0.1)
        beats.progress()
    leave(0)


def reduces() -> None:
    dist, total = meet()
    ready()
    reduce_until_the_other_is_gone(dist, total)


# -----------------------------------------------------------------------------
# Two machines


def fails(failing: int, code: int | None) -> None:
    """The rank `failing` ends after two seconds, by a signal where no code is given; the other reduces on."""
    dist, total = meet()
    ready()
    time.sleep(2)
    if rank == failing:
        leave(code) if code is not None else os.kill(os.getpid(), signal.SIGKILL)
    reduce_until_the_other_is_gone(dist, total)


def agrees_to_save() -> None:
    """Both stop at the same step once either is signalled."""
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    dist, total = meet()
    ready()
    while total.item():
        total.fill_(float(not stopped))
        dist.all_reduce(total, op=dist.ReduceOp.MIN)
        time.sleep(0.05)
    leave(85)


if __name__ == "__main__":
    name, *arguments = json.loads(os.environ["RANK_DOES"])
    options = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
    globals()[name](*arguments, **options)
