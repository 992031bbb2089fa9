"""How a run is asked to stop: signals only set a flag, ranks agree on it at the end of a step and save the same one."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from training.processes import say


class StopRequest:
    """SIGTERM or Ctrl-C only set a flag; ranks agree on it at a step boundary and save the same step."""

    def __init__(self):
        self.signal, self.first = 0, 0.0

    def __enter__(self) -> StopRequest:
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler of both signals: the first one is noted, one that comes over 2 seconds later ends the process."""
        if self.signal and time.monotonic() - self.first > 2:  # schedulers signal the wrapper and the ranks at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.signal:
            say(f"signal {number}: stopping at the end of this step, state will be saved; once more to stop at once")
            self.signal, self.first = number, time.monotonic()
