"""How a run is asked to stop, at any time: by SIGTERM, SIGINT, SIGHUP, SIGUSR1 or a file SAVE_AND_STOP.

    with stop:                                          # from the beginning of main to its end
        stop.looks_into(output_dir)                     # for the file
        stop.at_the_end_of_a_step()                     # from here on a request is only noted: stop.wanted
        stop.at_once(85, "the model is in ./final")     # and from here on it ends the process, with these words

While a run trains, ranks agree on the flag and save the same step. Before that there is nothing to save, and after it
everything is on disk: a thread ends the process then, also while the main thread is stuck in C, where no handler of
Python's runs. A second SIGTERM or SIGINT over two seconds after the first ends it at any time; a file, a warning or a
closed terminal is no first one. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from training.heartbeat import end, heart
from training.processes import code_of_another, is_main, lead_nowhere, rank, tell
from training.run_record import take_mark_away

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # SLURM warns by the last one
SOFT = (signal.SIGHUP, signal.SIGUSR1)  # a request, but never one of the two that end a run at once
FILE = "SAVE_AND_STOP"
LOOK_S = 1.0  # for the file
AGAIN_S = 2.0  # schedulers signal the wrapper and the ranks at once: that is one request
STATE_SAVED = 85
STOPPED_EARLY = [128 + number for number in SIGNALS]  # what a rank leaves that was stopped before it trained
NOTHING_TRAINED = "nothing was trained, and checkpoints are as they were"


_entered: list[StopRequest | None] = []  # the last one is that of this moment


class StopRequest:
    """Whether this run is asked to stop (`wanted`), and by what; one for each process."""

    def __init__(self):
        self.name = ""  # of what has asked, for messages; empty: nobody
        self.signal = 0  # its number; that of SIGTERM for the file
        self.asked = False  # whether the thread knows of the request
        self.first: float | None = None  # when the first SIGTERM or SIGINT came; the thread's
        self.folder: Path | None = None
        # How a request ends the process at once: exit code (0: 128 + the signal's number) and last words. None: it is
        # only noted.
        self.ends: tuple[int, str] | None = (0, NOTHING_TRAINED)
        self.unbroken = False

    @property
    def wanted(self) -> bool:
        """Whether to stop at the next place where ranks agree."""
        return bool(self.signal) and self.ends is None

    def __enter__(self) -> StopRequest:
        """(main thread only)"""
        self.__init__()
        self.terminals = [file for file in (1, 2) if os.isatty(file)]  # a closed one cannot be asked any more
        self.over = False
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.writing, False)
        # Written by C's handler, at once and in whatever thread: Python's waits for the main thread.
        self.wakeup = signal.set_wakeup_fd(self.writing, warn_on_full_buffer=False)
        self.before = {}
        for number in SIGNALS:
            # nohup has ignored SIGHUP: so do we.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.note)
        self.thread = threading.Thread(target=self.watch, name="stopping", daemon=True)
        self.thread.start()
        if not _entered:  # what is registered stays so: once for each process
            os.register_at_fork(after_in_child=leave_signals_alone)
        _entered.append(self)
        return self

    def __exit__(self, *unused: object) -> None:
        self.over = True
        _entered.append(None)
        os.write(self.writing, b"\0")
        self.thread.join(timeout=5)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.wakeup)
        os.close(self.writing)
        os.close(self.reading)

    def looks_into(self, folder: str | Path) -> None:
        """From now on, SAVE_AND_STOP there is a request, too; on every machine for itself."""
        self.folder = Path(folder)

    def at_the_end_of_a_step(self) -> None:
        """From now on a request is only noted."""
        self.ends = None

    def at_once(self, code: int, words: str) -> None:
        """From now on a request, also one that has come before, ends the process with this exit code and words."""
        self.ends = (code, words)

    @contextlib.contextmanager
    def held_off(self) -> Iterator[None]:
        """What happens inside is not broken off by a first request."""
        self.unbroken = True
        try:
            yield
        finally:
            self.unbroken = False

    def honoured(self) -> None:
        """The request has been followed: the file goes, or the next run would stop, too."""
        if self.folder is not None:
            with contextlib.suppress(OSError):
                (self.folder / FILE).unlink(missing_ok=True)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler, in the main thread. The thread counts; this flag is for a main thread that looks first."""
        self.signal = self.signal or number
        self.name = self.name or signal.Signals(number).name

    # What the thread does

    def watch(self) -> None:
        """Signals as they arrive, the file once a second."""
        while not self.over:
            arrived = select.select([self.reading], [], [], LOOK_S)[0]
            for number in os.read(self.reading, 64) if arrived else b"":
                if number in SIGNALS:
                    self.arrive(number)
            if not self.asked:
                self.look()
            if self.signal and self.ends and not self.unbroken and not self.over:
                self.end()

    def look(self) -> None:
        """For a request that came by no signal."""
        if self.signal:  # somebody has taken the pipe, so that only Python's handler knows of it
            self.ask(self.signal, self.name)
        elif self.folder is not None and (self.folder / FILE).exists():
            self.ask(signal.SIGTERM, FILE)
        # Nothing is to be saved, or all is on disk: a rank that was stopped then is waited for in vain.
        elif self.ends and (found := code_of_another([STATE_SAVED] if self.ends[0] else STOPPED_EARLY)):
            self.ask(signal.SIGTERM, f"a signal to rank {found[0]}")

    def arrive(self, number: int) -> None:
        """A signal: the first is a request; of SIGTERM and SIGINT, one that comes later ends the process."""
        name = signal.Signals(number).name
        if not self.asked:
            self.ask(number, name)
        elif number == signal.SIGHUP:  # a terminal that closes sends two
            self.leave_terminal()
        elif number not in SOFT and self.first is None:
            self.first = time.monotonic()
            if self.ends is None and is_main():
                tell(f"{name}: already stopping at the end of this step, state is saved; once more to stop at once")
        elif number not in SOFT and time.monotonic() - self.first > AGAIN_S:
            tell(f"rank {rank()}: ended at once by a second signal, {name}")
            end(128 + number)

    def ask(self, number: int, name: str) -> None:
        """The request, however it came."""
        self.asked, heart.asked = True, name
        self.signal, self.name = number, name
        # Ranks have no terminal whose end they are told of by SIGHUP: what they are sent for it may be another signal.
        if number == signal.SIGHUP or not all(map(os.isatty, self.terminals)):
            self.leave_terminal()
        if name != FILE and number not in SOFT:
            self.first = time.monotonic()
        if self.ends is None and is_main():
            again = "; once more to stop at once" if self.first is not None else ""
            tell(f"{name}: stopping at the end of this step, state will be saved{again}")

    def leave_terminal(self) -> None:
        """Its window was closed: the next line that is said there would be an error, and nothing would be saved."""
        lead_nowhere(*self.terminals)

    def end(self) -> None:
        """At once."""
        code, words = self.ends or (0, "")
        tell(f"rank {rank()}: stopped by {self.name}: {words}")
        if self.name == FILE:
            time.sleep(2 * LOOK_S)  # until every other rank has seen it, too
        self.honoured()
        if not code and self.signal == signal.SIGINT:  # by whoever sits there, and did not mean this run
            take_mark_away()
        end(code or 128 + self.signal)


def ignored(number: int, frame: FrameType | None) -> None:
    """A handler, so that a program started from there has the system's own again, which SIG_IGN would not give it."""


def leave_signals_alone() -> None:
    """In a forked process, a data worker as a rule: Ctrl-C reaches it, too, and the rank still needs it to save. What
    it is sent is no request to the rank, whose pipe it would write to."""
    request = _entered[-1]
    if request is not None:
        signal.set_wakeup_fd(-1)
        for number in request.before:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else ignored)


stop = StopRequest()
