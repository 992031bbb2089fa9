"""How many browsers a machine bears."""

import os
from pathlib import Path

import psutil
import pytest
import torch

from scoring.machine import GB_PER_BROWSER, free_gpu_bytes, most_at_once


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


def test_browsers_are_as_many_as_cores_and_memory_allow(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    memory = psutil.virtual_memory()._replace(available=int(64e9))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    tree, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("0::/slice/job\n")
    assert most_at_once(tree, own) == 16, "without groups"
    write(tree / "slice" / "job", cpu__max="max 100000", memory__max="max", memory__current="5")
    assert most_at_once(tree, own) == 16
    write(tree / "slice", cpu__max="650000 100000")
    assert most_at_once(tree, own) == 6, "an outer group's quota holds, too"
    limits = {
        "memory__max": str(8 * 10**9),
        "memory__current": str(7 * 10**9),
        "memory__stat": "inactive_file 1000000000",
    }
    write(tree / "slice" / "job", **limits)
    assert most_at_once(tree, own) == 2 / GB_PER_BROWSER
    write(tree / "slice", cpu__max="50000 100000")
    assert most_at_once(tree, own) == 1
    own.write_text("4:memory:/process/of_the_host\n1:cpu:/\n")  # version 1, in a container
    write(tree / "cpu", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    assert most_at_once(tree, own) == 3
    write(tree / "memory", memory__limit_in_bytes=str(2 * 10**9), memory__usage_in_bytes=str(10**9))
    assert most_at_once(tree, own) == 2


@pytest.mark.parametrize(
    ("share", "reserved", "free"), [(1.0, 10, 68), (0.3, 10, 14), (0.3, 24, 0), (0.9, 0, 68)], ids=str
)
def test_of_a_gpu_whose_share_is_limited_only_that_is_free(share, reserved, free, monkeypatch):
    """There is no GPU here: what torch says of one of 80 GB is given; 2 are CUDA's own, 10 or 0 another's."""
    said = {"mem_get_info": (68, 80), "get_per_process_memory_fraction": share, "memory_reserved": reserved}
    for name, answer in said.items():
        monkeypatch.setattr(torch.cuda, name, lambda device=None, answer=answer: answer)
    assert free_gpu_bytes() == pytest.approx(free)
