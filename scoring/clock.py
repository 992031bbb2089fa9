"""How long a page has taken by its own work: time in which its processes waited for a busy machine's cores is not its.

    clock = Clock(worker.pid, seconds=15)
    while not select.select([stream], [], [], clock.tick())[0]: ...      # TimeoutError once the seconds are used up

So a machine that does ten other things gives the same scores as one that is idle, only later.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

LOOK_S = 0.5
LEAST_SHARE = 0.05  # of any time that counts: whatever the system tells, a page ends, at the latest 20 times later


def cores_had(pids: list[int]) -> dict[str, tuple[int, int]]:
    """(nanoseconds on a core, ready to run without one) of each thread of these processes, by Linux' schedstat; none
    where the system does not tell."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(OSError, ValueError, IndexError):
                    ran, waited = (task / "schedstat").read_text().split()[:2]
                    found[task.name] = int(ran), int(waited)
    return found


class Clock:
    """Runs for a process and all its children, from now on."""

    def __init__(self, pid: int, seconds: float):
        self.pid, self.seconds, self.used_s = pid, seconds, 0.0
        self.looked, self.seen = time.monotonic(), cores_had(self.family())

    def family(self) -> list[int]:
        import psutil

        try:
            return [self.pid, *(child.pid for child in psutil.Process(self.pid).children(recursive=True))]
        except psutil.NoSuchProcess:
            return []

    def tick(self) -> float:
        """Seconds to wait until the next call. Raises TimeoutError."""
        passed = time.monotonic() - self.looked
        if passed >= min(LOOK_S, self.seconds / 4):
            now = cores_had(self.family())
            ran, waited = (
                sum(had[part] - self.seen.get(task, had)[part] for task, had in now.items()) / 1e9 for part in (0, 1)
            )
            # A page's threads wait one after the other for most of its time, so waits add up; where they wait side by
            # side they do too much, and what they ran, which is work for sure, sets the least.
            self.used_s += min(passed, max(ran, passed - waited, LEAST_SHARE * passed))
            self.looked, self.seen = self.looked + passed, now
        if self.used_s >= self.seconds:
            raise TimeoutError
        return min(LOOK_S, self.seconds / 4, self.seconds - self.used_s)
