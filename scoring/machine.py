"""How many browsers this machine bears, by the cores and the memory that are this process's own.

with Workers(most_at_once(), ...) as workers: ...
"""

from __future__ import annotations

import os
import re
from pathlib import Path

GB_PER_BROWSER = 0.4
CGROUPS = Path("/sys/fs/cgroup")


def most_at_once(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Browsers for this machine: one for each core that this process may use, while the memory lasts."""
    import psutil

    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    free = float(psutil.virtual_memory().available)
    for line in _read(own).splitlines():
        _, kinds, name = line.split(":", 2)  # without kinds: version 2, one tree for all
        tree = cgroups / kinds
        inner = tree / name.lstrip("/")
        for group in (inner, *inner.parents):  # in a container, `name` may lead nowhere; the tree's root is ours then
            if group == tree or tree in group.parents:
                cores, free = min(cores, _cores(group)), min(free, _free_bytes(group))
    return max(1, min(int(cores), int(free / (GB_PER_BROWSER * 1e9))))


def _cores(group: Path) -> float:
    """By a control group's quota, infinite where it has none."""
    quota, _, period = _read(group / "cpu.max").partition(" ")
    if not quota:  # version 1
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else float("inf")


def _free_bytes(group: Path) -> float:
    """Up to a control group's limit, infinite where it has none. What is kept of files gives way."""
    for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        most, used = _read(group / limit), _read(group / usage)
        if most.isdigit() and used.isdigit():
            files = re.search(r"^(?:total_)?inactive_file (\d+)$", _read(group / "memory.stat"), re.M)
            return int(most) - int(used) + (int(files[1]) if files else 0)
    return float("inf")


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
