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

ROOT = Path(__file__).parents[1]
SECONDS = 1_800  # 198 were measured for flash-linear-attention's, none of them compiled
OF_A_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def home() -> Path:
    """The user's folder; the working folder of a user who has none, as of a number in a container."""
    return Path(os.path.expanduser("~")).absolute()


def kept() -> dict[str, str]:
    """What has libraries keep what they find out, where the environment says nothing: triton the times of what it has
    tried, flash-attn 4 (4.0.0b36) what it has compiled, some 20 s of a start; that is loaded as code, so it lies in a
    folder of the user's, and nowhere if no file can be made there."""
    found = {"TRITON_CACHE_AUTOTUNING": "1"}
    folder = Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache") / "flash_attention_cute_dsl_cache"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError:
        return found
    name = "FLASH_ATTENTION_CUTE_DSL_CACHE"
    return found | {f"{name}_ENABLED": "1", f"{name}_DIR": str(folder)}


def keep_on_disk() -> None:
    """Has them keep what they find out from here on, unless the environment says otherwise."""
    for name, value in kept().items():
        os.environ.setdefault(name, value)


def once_aside(name: str, module: str, told: str, known: list[Any]) -> None:
    """Runs `module` on `told`, once on a machine for what is `known`; whoever comes meanwhile waits for it.

    What goes wrong is said by a warning, at each start, and left: kernels are tried where they are used, then. Where
    that was the module itself it is not run again: it would fail again, for each process, for minutes.
    """
    try:
        run_once(name, module, told, known)
    except OSError as error:  # a home that nobody may write to, a full disk, one whose files have no locks
        warnings.warn(f"{name}: its kernels are tried by each process itself ({error})", stacklevel=3)


def run_once(name: str, module: str, told: str, known: list[Any]) -> None:
    """`once_aside`. Raises OSError where the mark or its lock cannot be had."""
    import fcntl  # not on Windows, which has no such kernels

    mark = mark_of(module, known)
    mark.parent.mkdir(parents=True, exist_ok=True)
    with mark.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not mark.exists():
            warnings.warn(
                f"{name}: the shapes of its kernels are tried, once on this machine, which may take minutes",
                stacklevel=4,
            )
            # It holds the lock, too: of a run that is ended meanwhile, the next one waits for what was begun.
            mark.write_text(run_aside(module, told, lock.fileno()), encoding="utf-8")
        if why := mark.read_text(encoding="utf-8"):
            told_each_time = f"{name}: what tries its kernels in a process of its own {why}; remove {mark} to try again"
            warnings.warn(told_each_time, stacklevel=4)


def run_aside(module: str, told: str, *passed: int) -> str:
    """Why `module` has failed; empty where it has not. It is given the open files `passed`."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_GROUP}
    environment = kept() | environment | {"TRITON_CACHE_DIR": str(triton_folder())}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", module, told]
    try:
        # In our own folder: Python looks for modules where it is started, before anywhere else.
        done = subprocess.run(
            command, env=environment, cwd=ROOT, timeout=SECONDS, capture_output=True, text=True, pass_fds=passed
        )
    except subprocess.TimeoutExpired:
        return f"was not done in {SECONDS:,} s"
    last = done.stderr.strip().splitlines()[-1:] or ["no word of why"]
    return f"ended with {done.returncode}: {last[0][:200]}" if done.returncode else ""


def triton_folder() -> Path:
    """Where triton keeps what it compiles (3.6 to 3.8)."""
    typed = os.environ.get("TRITON_CACHE_DIR")
    return Path(typed or Path(os.environ.get("TRITON_HOME") or home()) / ".triton" / "cache").absolute()


def mark_of(module: str, known: list[Any]) -> Path:
    """The file that says that it was done, and what went wrong. It goes when triton's own files do, beside which it
    lies."""
    return triton_folder() / f"tried-{hashlib.sha256(json.dumps([module, known]).encode()).hexdigest()[:16]}"
