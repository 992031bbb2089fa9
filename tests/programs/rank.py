"""One rank of the wrapper's tests: RANK_DOES is a JSON list, the name of a function of this file and its arguments.

Each leaves `ready-<rank>` (its id and the run's) in the current folder before it does what the test is about.
"""

import json
import os
import signal
import subprocess
import sys
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


# -----------------------------------------------------------------------------
# Ends


def leaves(codes: list[int], meeting: bool = False) -> None:
    """With the code of its rank; half a second later, as a rank that loads torch lives longer."""
    ready()
    time.sleep(0.5)
    if meeting:
        meet()
    leave(codes[rank])


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


def leaves_a_helper() -> None:
    start_a_helper()
    ready()
    leave(0)


def writes(variables: list[str]) -> None:
    """What it sees, once both ranks have met: its interpreter, these variables, its arguments."""
    meet()
    seen = [sys.executable, *[os.environ[name] for name in variables], *sys.argv[1:]]
    Path(f"seen-{rank}").write_text(" ".join(seen))
    subprocess.run(["ninja", "--version"], check=True)
    ready()
    leave(0)


def writes_where_codes_go() -> None:
    Path("where").write_text(os.environ["HOLO1_STATUS_DIR"])
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
    for number in (signal.SIGTERM, signal.SIGINT):
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
