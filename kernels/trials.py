"""What kernels' libraries find out on the machine that runs them: kept on its disk, and tried in a process of its own.

    keep_on_disk()                                          # before such kernels are imported
    once_aside("the library", "kernels.gated_delta", told, known)   # `python -m kernels.gated_delta told`

Of the shapes that lose some spill so much that CUDA sets gigabytes aside for them, which a process has back only when
it ends: one of those that flash-linear-attention tries for the norm of heads has 8.6 kB of stack a thread (by ptxas),
2.2 GiB for all threads of an H100, on which a plain training of Qwen3.5-4B had 7.8 GiB less than torch knew of. And
triton compiles them one after another, for minutes. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

# What is found in the environment stays. Of what triton has tried it keeps the times; flash-attn 4 (4.0.0b36) what it
# has compiled, some 20 s of a start, in a folder of all users' unless it is told another one.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
KEPT = {
    "TRITON_CACHE_AUTOTUNING": "1",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(CACHE / "flash_attention_cute_dsl_cache"),
}
SECONDS = 1_800  # 198 were measured for flash-linear-attention's, none of them compiled
OF_A_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def keep_on_disk() -> None:
    """Has them keep what they find out from here on, unless the environment says otherwise."""
    for name, value in KEPT.items():
        os.environ.setdefault(name, value)


def once_aside(name: str, module: str, told: str, known: list[Any]) -> None:
    """Runs `module` on `told`, once on a machine for what is `known`; whoever comes meanwhile waits for it.

    What goes wrong there is said by a warning and left: kernels are tried where they are used, then.
    """
    import fcntl  # not on Windows, which has no such kernels

    mark = mark_of(module, known)
    mark.parent.mkdir(parents=True, exist_ok=True)
    with mark.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if mark.exists():
            return
        warnings.warn(
            f"{name}: the shapes of its kernels are tried, once on this machine, which may take minutes", stacklevel=3
        )
        if why := run_aside(module, told):
            warnings.warn(f"{name}: what should try its kernels in a process of its own {why}", stacklevel=3)
        else:
            mark.touch()


def run_aside(module: str, told: str) -> str:
    """Why `module` has failed; empty where it has not."""
    root = str(Path(__file__).parents[1])
    kept = KEPT | {name: value for name, value in os.environ.items() if name not in OF_A_GROUP}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, told], env=kept, timeout=SECONDS, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return f"was not done in {SECONDS:,} s"
    last = done.stderr.strip().splitlines()[-1:] or ["no word of why"]
    return f"ended with {done.returncode}: {last[0][:200]}" if done.returncode else ""


def mark_of(module: str, known: list[Any]) -> Path:
    """The file that says that it was done. It goes when triton's own files do, which lie beside it."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    return folder / f"tried-{hashlib.sha256(json.dumps([module, known]).encode()).hexdigest()[:16]}"
