"""Triton's kernels, loaded by several threads at once, which Triton (3.6 to 3.8) does not allow for.

    if threads_may_load():                  # before there are any
        ...

Two faults of its own are mended here, for all kernels of the process. Imported only where it is used: it needs triton.

Each signature has a launcher in C (3.6), a Python module of its own file, but all of one name. Python keeps one module
of a name (`import_find_extension` in its `import.c`): whatever launcher is loaded once more puts its functions into the
one that another thread has just loaded, and that thread's kernel is launched with the wrong arguments. On an H100 that
was "misaligned address" or "function takes exactly 49 arguments", once in some two hundred starts of the engine.

A compiled kernel shows its launcher before it has the function that is launched (triton-lang/triton#11518): another
thread that wants the same kernel launches nothing.
"""

from __future__ import annotations

import copy
import threading
import warnings
from functools import lru_cache, wraps
from types import ModuleType

import triton
from triton.compiler.compiler import CompiledKernel
from triton.runtime import build

from kernels.launching import is_known

_guard = threading.Lock()


@lru_cache
def threads_may_load() -> bool:
    """Mends Triton in this process; False, with a warning, for a version that nobody has looked at."""
    load, fill = getattr(build, "_load_module_from_path", None), getattr(CompiledKernel, "_init_handles", None)
    if not is_known() or load is None or fill is None:
        why = "nobody has looked at how it loads kernels in several threads: they are compiled one after another, later"
        warnings.warn(f"triton {triton.__version__}: {why}", stacklevel=2)
        return False
    build._load_module_from_path, CompiledKernel._init_handles = alone(load), at_once(fill)
    return True


def alone(load):
    """`load`, of whose module each caller gets what it held when it was loaded."""

    @wraps(load)
    def loaded(name: str, path: str) -> ModuleType:
        with _guard:
            mine = ModuleType(name)
            mine.__dict__.update(vars(load(name, path)))
            return mine

    return loaded


def at_once(fill):
    """`fill` of a compiled kernel, whose launcher is there last; once, and again where it has raised."""

    @wraps(fill)
    def filled(kernel: CompiledKernel) -> None:
        with kernel.__dict__.setdefault("_filling", threading.Lock()):
            if kernel._run is not None:
                return
            fresh = copy.copy(kernel)
            fill(fresh)
            found = dict(vars(fresh))
            fresh.module = None  # or it would unload that as it ends (3.8)
            launcher = found.pop("_run")
            kernel.__dict__.update(found)
            kernel._run = launcher

    return filled
