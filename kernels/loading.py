"""Triton's kernels, loaded by several threads at once, which Triton (3.6 to 3.8) does not allow for.

    if threads_may_load():                  # before there are any
        ...

What is wrong with that is mended here, for all kernels of the process. Imported only where it is used: it needs
triton.

Each signature has a launcher in C (3.6), a Python module of its own file, but all of one name. Python keeps one module
of a name (`import_find_extension` in its `import.c`): whatever launcher is loaded once more puts its functions into the
one that another thread has just loaded, and that thread's kernel is launched with the wrong arguments. On an H100 that
was "misaligned address" or "function takes exactly 49 arguments", once in some sixty starts of the engine that loaded
all its kernels anew.

A compiled kernel shows its launcher before it has the function that is launched (triton-lang/triton#11518): another
thread that wants the same kernel launches nothing.

Two threads that want the same kernel both compile it, and where both are the first to launch what it is compiled of,
what one of them compiles is kept where nobody looks; 3.8 unloads what is lost so, which may have been launched.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import triton
from triton.compiler.compiler import CompiledKernel
from triton.runtime import build, driver
from triton.runtime.jit import JITFunction

from kernels.launching import is_known

_guard = threading.RLock()


def threads_may_load() -> bool:
    """Mends Triton in this process, once; False, with a warning, for a version that nobody has looked at."""
    places = {
        (build, "_load_module_from_path"): alone,
        (CompiledKernel, "_init_handles"): at_once,
        (JITFunction, "_do_compile"): one_at_a_time,
        (JITFunction, "run"): one_place,
    }
    with _guard:
        if not is_known() or not all(hasattr(*place) for place in places):
            why = "nobody has looked at how it loads kernels in several threads, so each is compiled when it is needed"
            warnings.warn(f"triton {triton.__version__}: {why}", stacklevel=2)
            return False
        for (owner, name), mend in places.items():
            found = getattr(owner, name)
            if not hasattr(found, "stock"):  # one that is mended twice would wait for itself
                mended = mend(found)
                mended.stock = found
                setattr(owner, name, mended)
    return True


def alone(load: Callable[[str, str], ModuleType]) -> Callable[[str, str], ModuleType]:
    """`load`, of whose module each caller gets what it held when it was loaded."""

    @wraps(load)
    def loaded(name: str, path: str) -> ModuleType:
        with _guard:
            mine = ModuleType(name)
            mine.__dict__.update(vars(load(name, path)))
            return mine

    return loaded


def at_once(fill: Callable[[CompiledKernel], None]) -> Callable[[CompiledKernel], None]:
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


def one_at_a_time(compile_it: Callable[..., Any]) -> Callable[..., Any]:
    """`compile_it` of a kernel's source, by one thread for the same arguments; others that want it wait."""
    locks: dict[tuple, threading.Lock] = {}

    @wraps(compile_it)
    def compiled(source: JITFunction, key: Any, signature: Any, device: Any, *rest: Any, **more: Any) -> Any:
        with locks.setdefault((id(source), key, device), threading.Lock()):
            known = source.device_caches[device][0].get(key)
            return compile_it(source, key, signature, device, *rest, **more) if known is None else known

    return compiled


def one_place(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` of a kernel's source, which has one place on a GPU for what is compiled of it, whoever launches it first.
    The price is 0.7 us of Python for each launch (one core of a small machine)."""

    @wraps(run)
    def ran(source: JITFunction, *given: Any, **options: Any) -> Any:
        device = driver.active.get_current_device()
        if device not in source.device_caches:
            with _guard:
                source.device_caches[device]  # which makes it
        return run(source, *given, **options)

    return ran
