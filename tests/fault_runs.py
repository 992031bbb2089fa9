"""Trainings with a fault in them: N real ranks, forked, and what became of each.

    end = run_with_fault("ZeRO-3", flags, tmp_path, "kill@1:3", ranks=2)
    end.codes, end.said, end.left                       # [1, -9], what all have said, who was still there

Ways: "plain" (one rank without a launcher), "DDP", "ZeRO-3". No launcher ends the ranks that a fault spares: what they
do by themselves is what is looked at.
"""

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import warm
from conftest import ON_CPU, PROGRAMS, zero_3

FAULTS = str(PROGRAMS / "faults.py")


@dataclass
class End:
    """`codes`: each rank's exit code as subprocess has it, None where it did not end by itself. `reported`: what each
    left in the wrapper's folder. `left`: ids of processes of this run that outlived all ranks."""

    codes: list[int | None]
    reported: dict[str, str]
    said: str
    seconds: float
    cpu_seconds: float
    left: list[int]


def members(mark: str, ranks: list[warm.Forked]) -> list[int]:
    """Living processes of a run: in the session of a rank, or with the run's mark in the environment."""
    sessions, found = {rank.pid for rank in ranks}, []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            state, _, _, session = (place / "stat").read_text().rpartition(")")[2].split()[:4]
            marked = mark.encode() in (place / "environ").read_bytes()
            if state != "Z" and (int(session) in sessions or marked):
                found.append(int(place.name))
    return found


def wait_for_ends(ranks: list[warm.Forked], seconds: float) -> bool:
    """Whether all have ended by themselves by then."""
    until = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


@contextlib.contextmanager
def started(way: str, flags: list[str], cwd: Path, environment: dict[str, str], ranks: int, stream: int):
    """The ranks as processes; none is there when the block is over, nor anything that they have started."""
    if way == "ZeRO-3":
        environment, flags = environment | ON_CPU, [*zero_3(cwd, None), *flags]
    pipes, store = {"stdout": stream, "stderr": stream}, None
    if way == "plain":
        processes = [warm.fork(FAULTS, flags, cwd, environment, **pipes)]
    else:
        store, place = warm.meeting(ranks)
        processes = warm.fork_ranks(ranks, FAULTS, flags, cwd, environment=environment | place, **pipes)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill_all()
        for pid in members(environment["HOLO1_RUN_ID"], processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        del store


def run_with_fault(
    way: str,
    flags: list[str],
    cwd: Path,
    fault: str = "",
    ranks: int = 1,
    timeout: float = 120,
    env: dict | None = None,
    wrapped: bool = False,
    act: Callable[[list[warm.Forked]], None] | None = None,
) -> End:
    """Start the ranks, let `act` do to them what it likes, and wait until all have ended, for `timeout` s at most.
    `wrapped`: they find the wrapper's folder, and leave what hangs to the wrapper, which is not there."""
    status, mark, log = cwd / f"status-{uuid.uuid4().hex[:8]}", uuid.uuid4().hex, cwd / "said.log"
    status.mkdir()
    environment = warm.usual_environment() | {"HOLO1_RUN_ID": mark, "FAULT": fault} | (env or {})
    if wrapped:
        environment |= {"HOLO1_STATUS_DIR": str(status)}
    start = time.monotonic()
    with log.open("ab") as stream:
        begun = stream.tell()
        with started(way, flags, cwd, environment, ranks, stream.fileno()) as processes:
            if act:
                act(processes)
            ended = wait_for_ends(processes, timeout)
            codes, seconds, left = [process.poll() for process in processes], time.monotonic() - start, []
            if ended and members(mark, processes):  # a browser may take a moment to notice that nobody asks any more
                time.sleep(2)
                left = members(mark, processes)
    reported = {file.name: file.read_text() for file in status.iterdir() if file.name.startswith("rank-")}
    said = log.read_bytes()[begun:].decode(errors="replace")
    return End(codes, reported, said, seconds, sum(process.cpu_seconds for process in processes), left)
