"""A thread in every rank that tells that it lives and where it is, and that ends a rank which hangs.

    with heart:                                     # from the beginning of main to its end
        heart.knows(output_dir, collective_s=7200, hang_timeout=None)
        heart.enter("training")
        heart.step_ends(3)                          # progress: the clock starts again
        with heart.stage("saving"): ...             # and back to training

Under the wrapper (HOLO1_STATUS_DIR is set) the thread writes `beat-<RANK>` about once a second, the wrapper decides
what hangs, and SIGUSR2 makes this process write the stacks of all its threads, also while it is stuck in C. Without it
the thread decides: every rank that waits in a collective finds that out by itself, and ends with 84. The main thread
only sets attributes: no step waits for a file. Standard library only.

Sections: Where, Heart.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from training.errors import MEANINGS, HangError
from training.processes import (
    Result,
    code_of_another,
    leave_note,
    on_main,
    rank,
    report_end,
    several,
    take_note_back,
    tell,
)

BEAT_S = 1.0
OTHERS_S = 3.0  # that a rank leaves the others for finding the same hang
# Seconds without progress after which a rank hangs. Kernels are compiled in the first step; later ones are known by
# what they have taken. Held-out pages are progress every few tokens, but a page that is rendered is long on a busy CPU.
FIRST_STEP_S, LEAST_STEP_S, TIMES_THE_LONGEST, WRITTEN_BATCH_S = 1800.0, 300.0, 10, 1800.0
# What another rank has failed of comes to this one by itself, as a rule: its own message says more.
PATIENCE_S = 2.0
ASLEEP_S = 5.0  # a beat that comes later than this was stopped (Ctrl-Z, SIGSTOP), and so was the main thread

# -----------------------------------------------------------------------------
# Where


@dataclass(frozen=True)
class Place:
    """What the main thread is doing since its last progress (`time.monotonic()`): "loading", "reading pages",
    "training", "saving", "finishing" (an earlier checkpoint, after a failure), "judging" or "publishing". `waits`: for
    other ranks, which have limits of their own."""

    stage: str
    since: float
    waits: bool = False


# -----------------------------------------------------------------------------
# Heart


class Heart:
    """Where this rank is; one for each process. Its thread reads, the main thread writes; no attribute needs another
    one that was written with it, but those of `Place`, which is replaced as a whole."""

    def __init__(self):
        self.place = Place("loading", time.monotonic())
        self.step, self.micro_batch = 0, 0  # optimizer steps that have ended; pages at once
        self.pages: Sequence[str] = ()  # names of those that are trained on
        self.longest_s = 0.0  # of the steps so far
        self.hang_timeout: float | None = None  # --hang_timeout
        self.collective_s: float | None = None  # --ddp_timeout: longer than this no rank waits for another
        self.output_dir = self.stacks = ""  # known once the settings are
        self.asked = ""  # by what this rank was asked to stop: the wrapper need not pass that on
        self.file: IO[str] | None = None
        self.last_beat, self.awake = time.monotonic(), time.monotonic()
        self.failed_elsewhere: float | None = None  # when another rank's failure was first seen
        self.over, self.thread = threading.Event(), None

    def __enter__(self) -> Heart:
        """(main thread only)"""
        self.__init__()
        # On the console until there is a folder: without a handler SIGUSR2 would end the process.
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True, chain=False)
        self.thread = threading.Thread(target=self.beat_on, name="heartbeat", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.over.set()
        self.thread.join(timeout=5)
        faulthandler.unregister(signal.SIGUSR2)
        if self.file is not None:
            self.file.close()
            with contextlib.suppress(OSError):  # somebody else has removed it
                if not os.path.getsize(self.stacks):
                    os.unlink(self.stacks)
                    os.rmdir(os.path.dirname(self.stacks))  # refused where other ranks' stacks lie

    def falls_silent(self) -> None:
        """This process is about to become another program: until that beats, it is one that still imports."""
        self.over.set()
        if self.thread is not None:
            self.thread.join(timeout=5)
        take_note_back(f"beat-{rank()}")

    def knows(self, output_dir: str | Path, collective_s: float, hang_timeout: float | None) -> None:
        """The settings: seconds that a collective waits at most, and that a step may take (None: as measured).

        From here on stacks go to output_dir/stacks/rank-<RANK>.txt, behind those of earlier runs.
        """
        self.collective_s, self.hang_timeout = collective_s, hang_timeout
        self.output_dir = os.path.abspath(output_dir)
        path = Path(self.output_dir) / "stacks" / f"rank-{rank()}.txt"
        with contextlib.suppress(OSError):  # training will say what is wrong with the folder; the console stays
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a", encoding="utf-8")
            self.stacks = str(path)
            faulthandler.register(signal.SIGUSR2, file=self.file, all_threads=True, chain=False)

    def enter(self, stage: str, step: int | None = None) -> None:
        """A stage begins, until the next one does; after so many steps, where a run goes on with an earlier one."""
        self.step = self.step if step is None else step
        self.place = Place(stage, time.monotonic())

    @contextlib.contextmanager
    def stage(self, name: str, waits: bool = False) -> Iterator[None]:
        """A stage inside another, which goes on after it."""
        before = self.place
        self.place = Place(name, time.monotonic(), waits)
        try:
            yield
        finally:
            self.place = replace(before, since=time.monotonic())

    def waiting(self, waits: bool = True) -> contextlib.AbstractContextManager[None]:
        """The same stage, while this rank waits for what others do alone."""
        return self.stage(self.place.stage, waits)

    def mark(self) -> None:
        """Progress, inside a stage."""
        self.place = replace(self.place, since=time.monotonic())

    def trains_on(self, pages: Sequence[str], micro_batch: int) -> None:
        """A forward pass begins."""
        self.pages, self.micro_batch = pages, micro_batch

    def step_ends(self, step: int) -> None:
        """The optimizer step of this number has ended."""
        self.step, self.longest_s = step, max(self.longest_s, time.monotonic() - self.place.since)
        self.mark()

    def limit_s(self, place: Place) -> float | None:
        """Seconds without progress after which this is a hang; None where nobody can say, as while a model is loaded
        or downloaded."""
        if place.waits or place.stage in ("saving", "finishing"):
            return self.collective_s
        if place.stage == "judging":
            return max(WRITTEN_BATCH_S, self.hang_timeout or 0.0)
        if place.stage != "training":
            return None
        if self.hang_timeout is not None:
            return self.hang_timeout
        return max(LEAST_STEP_S, TIMES_THE_LONGEST * self.longest_s) if self.longest_s else FIRST_STEP_S

    # What the thread does

    def beat_on(self) -> None:
        """Once a second until `over`."""
        self.beat()
        while not self.over.wait(BEAT_S):
            self.beat()

    def beat(self) -> None:
        """Tell the wrapper, or judge."""
        now, place = time.monotonic(), self.place
        if now - self.last_beat > BEAT_S + ASLEEP_S:
            self.awake = now
        self.last_beat = now
        quiet_s, limit_s = now - max(place.since, self.awake), self.limit_s(place)
        if os.environ.get("HOLO1_STATUS_DIR"):
            leave_note(f"beat-{rank()}", json.dumps(self.words(place, quiet_s, limit_s)))
            self.follow(place, now)
        elif limit_s is not None and quiet_s > limit_s:
            self.end_hanging(place, quiet_s, limit_s)

    def words(self, place: Place, quiet_s: float, limit_s: float | None) -> dict:
        """What the wrapper reads; times as `time.time()`."""
        now = time.time()
        return {
            "time": now,
            "stage": place.stage,
            "step": self.step,
            "since": now - quiet_s,
            "limit_s": limit_s,
            "pages": list(self.pages),
            "micro_batch": self.micro_batch,
            "output_dir": self.output_dir,
            "stacks": self.stacks,
            "asked": self.asked,
        }

    def follow(self, place: Place, now: float) -> None:
        """End as another rank has ended, whose memory ran out, say: in the collective of a step it would be waited for
        until NCCL gives up. What this rank does alone, or saves, is not broken off."""
        found = code_of_another(range(80, 85)) if place.stage == "training" and several() else None
        if found is None:
            self.failed_elsewhere = None
            return
        self.failed_elsewhere = self.failed_elsewhere or now
        if now - self.failed_elsewhere >= PATIENCE_S:
            number, code = found
            tell(f"rank {rank()}: ending after {self.step} steps, as rank {number} has: {code}, {MEANINGS[code]}")
            end(code)

    def end_hanging(self, place: Place, quiet_s: float, limit_s: float) -> None:
        """Say where this rank stands, write its stacks, and end it with 84."""
        error = HangError(
            f"rank {rank()} hangs: {place.stage}, {self.step} steps done, no progress for {quiet_s:.0f} s (limit "
            f"{limit_s:.0f} s), pages: {listed(self.pages)}"
        )
        target = self.file or 2
        with contextlib.suppress(OSError):  # a full disk does not keep it from ending
            if self.file is not None:
                self.file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {error}\n")
                self.file.flush()
            faulthandler.dump_traceback(file=target, all_threads=True)
        where = self.stacks or "above"
        tell(
            f"{error}; its stacks: {where}. --resume goes on from the last checkpoint; where steps only take long, "
            "give --hang_timeout SECONDS"
        )
        # The others are about to find the same, and would otherwise find a lost connection, which says less.
        time.sleep(OTHERS_S if several() else 0)
        end(error.code)


def on_main_alone(work: Callable[[], Result]) -> Result:
    """(all ranks) `on_main` for long work, whose progress the main process marks: the others only wait for it."""
    with heart.waiting(rank() != 0):
        return on_main(work)


def listed(names: Iterable[str]) -> str:
    """For a message."""
    return ", ".join(names) or "none"


def end(code: int) -> None:
    """End this process from any of its threads, whatever the main thread does."""
    report_end(code)
    os._exit(code)


heart = Heart()
