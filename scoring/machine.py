"""How many browsers this machine bears, by the cores and the memory that are this process's own.

with Workers(most_at_once(), ...) as workers: ...
free_bytes()                                    # of memory, for whoever wants it for something else
free_gpu_bytes()                                # of a GPU's
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GB_PER_BROWSER = 0.4
CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def most_at_once(cgroups: Path = CGROUPS, own: Path = OWN_GROUPS) -> int:
    """Browsers for this machine: one for each core that this process may use, while the memory lasts."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    cores = min([cores, *map(_cores, _groups(cgroups, own))])
    return max(1, min(int(cores), int(free_bytes(cgroups, own) / (GB_PER_BROWSER * 1e9))))


def free_bytes(cgroups: Path = CGROUPS, own: Path = OWN_GROUPS) -> float:
    """Of the machine's memory what is free, or would be if files were forgotten, and this process may have."""
    import psutil

    return min([float(psutil.virtual_memory().available), *map(_free_bytes, _groups(cgroups, own))])


def free_gpu_bytes(device: torch.device | None = None) -> float:
    """Of a GPU's memory what is free, and torch may still take for this process, beside what it has taken: a share may
    have been set (PYTORCH_CUDA_ALLOC_CONF), of which the driver knows nothing."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    return min(float(free), share * total - torch.cuda.memory_reserved(device))


def _groups(cgroups: Path, own: Path) -> Iterator[Path]:
    """The folders of the control groups that this process is in, inner ones first."""
    for line in _read(own).splitlines():
        _, kinds, name = line.split(":", 2)  # without kinds: version 2, one tree for all
        tree = cgroups / kinds
        inner = tree / name.lstrip("/")
        for group in (inner, *inner.parents):  # in a container, `name` may lead nowhere; the tree's root is ours then
            if group == tree or tree in group.parents:
                yield group


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
