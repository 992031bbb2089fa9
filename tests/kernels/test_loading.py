"""Kernels that several threads load at once. The launchers are real ones, as far as a machine without a GPU has any: C
modules of one name, built and loaded by Triton itself. The driver that loads a kernel is played."""

import collections
import os
import random
import shutil
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton
from triton.compiler import compiler
from triton.compiler.compiler import CompiledKernel
from triton.runtime import build
from triton.runtime.jit import JITFunction

from kernels import launching, loading

SOURCE = """
#include <Python.h>
static PyObject *launch(PyObject *self, PyObject *args) { return PyLong_FromLong(NUMBER); }
static PyMethodDef methods[] = {{"launch", launch, METH_VARARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "__triton_launcher", NULL, -1, methods};
PyMODINIT_FUNC PyInit___triton_launcher(void) { return PyModule_Create(&definition); }
"""


PLACES = [
    (build, "_load_module_from_path"),
    (CompiledKernel, "_init_handles"),
    (JITFunction, "_do_compile"),
    (JITFunction, "run"),
]


@pytest.fixture
def stock(monkeypatch):
    """Triton as it comes, also where an engine of an earlier test has mended it; and as it was afterwards."""
    for owner, name in PLACES:
        found = getattr(owner, name)
        monkeypatch.setattr(owner, name, getattr(found, "stock", found))


@pytest.fixture
def mended(stock):
    """Triton as `threads_may_load` leaves it, whoever else has asked before."""
    assert loading.threads_may_load() and loading.threads_may_load(), "the version that is installed was looked at"


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """Makes the launcher that gives a number, and loads it, once more where it was loaded before."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        pytest.skip("no C compiler, with which Triton builds what loads kernels")
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        pytest.skip("no headers of Python, which Triton needs to build what loads kernels")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return lambda number: build.compile_module_from_src(SOURCE.replace("NUMBER", str(number)), "__triton_launcher")


def test_a_launcher_that_is_loaded_once_more_changes_no_other(mended, launcher):
    first, second = launcher(1), launcher(2)
    again = launcher(1)
    assert [module.launch() for module in (first, second, again)] == [1, 2, 1]


def test_each_thread_gets_the_launcher_that_it_has_loaded(mended, launcher):
    numbers, turn = range(6), sys.getswitchinterval()
    for number in numbers:
        launcher(number)

    def work(seed: int) -> list[tuple[int, int]]:
        order = random.Random(seed).choices(numbers, k=100)
        return [(number, launcher(number).launch()) for number in order]

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = [pair for pairs in pool.map(work, range(8)) for pair in pairs]
    finally:
        sys.setswitchinterval(turn)
    assert len(found) == 800 and all(number == given for number, given in found)


class Played:
    """A driver whose first load of a kernel takes until it is told to end."""

    def __init__(self, fails: bool = False):
        self.begun, self.ends, self.loads, self.fails = threading.Event(), threading.Event(), 0, fails
        self.utils, self.launcher_cls = self, lambda source, metadata: f"launcher of {source}"
        self.unloaded = []  # by 3.8, as a compiled kernel ends

    def get_current_device(self):
        return 0

    def get_current_target(self):
        return SimpleNamespace(warp_size=32)

    def unload_module(self, module):
        self.unloaded.append(module)

    def load_binary(self, name, binary, shared, device):
        self.loads += 1
        self.begun.set()
        assert self.ends.wait(20)
        if self.fails and self.loads == 1:
            raise RuntimeError("Triton Error [CUDA]: out of memory")
        return f"module of {name}", f"function of {name}", 32, 0, 1_024


@pytest.fixture
def kernel(monkeypatch):
    """Makes a compiled kernel that nobody has loaded yet, of such a driver."""

    def make(driver: Played) -> CompiledKernel:
        monkeypatch.setattr(compiler, "driver", SimpleNamespace(active=driver))
        monkeypatch.setattr(compiler, "max_shared_mem", lambda device: 232_448)
        made = CompiledKernel.__new__(CompiledKernel)
        made.module = made.function = made._run = None
        made.name, made.kernel, made.hash, made.src, made.metadata_group = "product", b"", "", "product", {}
        made.metadata = SimpleNamespace(shared=0, num_warps=4, tmem_size=None, target=SimpleNamespace(arch=90))
        return made

    return make


def test_a_thread_that_wants_a_kernel_which_another_is_loading_gets_all_of_it(mended, kernel):
    driver = Played()
    made = kernel(driver)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: (made.run, made.function))
        assert driver.begun.wait(20)
        second = pool.submit(lambda: (made.run, made.function))
        threading.Timer(0.2, driver.ends.set).start()
        assert first.result() == second.result() == ("launcher of product", "function of product")
    assert driver.loads == 1 and made.module == "module of product" and made.n_regs == 32
    assert driver.unloaded == [], "what is in use is unloaded"
    made.module = None  # the driver is played no longer when it ends


def test_a_kernel_that_did_not_load_is_loaded_the_next_time(mended, kernel):
    driver = Played(fails=True)
    driver.ends.set()
    made = kernel(driver)
    with pytest.raises(RuntimeError, match="out of memory"):
        made.run  # noqa: B018
    assert (made.run, made.function) == ("launcher of product", "function of product")
    made.module = None


@triton.jit
def twice_wanted_kernel(source):
    pass


def test_two_threads_that_want_the_same_kernel_compile_it_once(mended, monkeypatch):
    begun, ends, sources = threading.Event(), threading.Event(), []

    def compile_slowly(source, **options):
        sources.append(source)
        begun.set()
        assert ends.wait(20)
        return f"compiled {source}"

    for name, played in (
        ("device_caches", {0: ({}, {}, None, None, None)}),
        ("ASTSource", lambda kernel, signature, *rest: signature["source"]),
        ("compile", compile_slowly),
        ("_call_hook", lambda *told: False),
    ):
        monkeypatch.setattr(twice_wanted_kernel, name, played, raising=False)

    def want(key: str):
        given = {"source": key}, 0, {}, SimpleNamespace(), {}
        return twice_wanted_kernel._do_compile(key, *given, warmup=False)  # by its name, as `preload` gives it

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(want, "in bf16")
        assert begun.wait(20)
        second, other = pool.submit(want, "in bf16"), pool.submit(want, "in fp16")
        threading.Timer(0.2, ends.set).start()
        assert first.result() == second.result() == "compiled in bf16" and other.result() == "compiled in fp16"
    assert sorted(sources) == ["in bf16", "in fp16"]


def test_what_two_threads_compile_of_a_kernel_that_neither_has_launched_is_kept_in_one_place(stock, monkeypatch):
    """Making the place takes Triton longer than a thread's turn."""
    monkeypatch.setattr(loading, "driver", SimpleNamespace(active=Played()))
    monkeypatch.setattr(JITFunction, "run", lambda source, key: source.device_caches[0][0].setdefault(key, key))
    loading.threads_may_load()
    both = threading.Barrier(2)

    def want(key: str) -> str:
        both.wait(20)
        return twice_wanted_kernel.run(key)

    for _ in range(20):
        caches = collections.defaultdict(lambda: time.sleep(0.001) or ({}, {}, None, None, None))
        monkeypatch.setattr(twice_wanted_kernel, "device_caches", caches)
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(want, ("in bf16", "in fp16"))) == ["in bf16", "in fp16"]
        assert set(caches[0][0]) == {"in bf16", "in fp16"}


def test_a_version_that_nobody_has_looked_at_is_said_and_left_alone(stock, monkeypatch):
    before = [getattr(*place) for place in PLACES]
    monkeypatch.setattr(triton, "__version__", "9.1.0")
    assert launching.is_known() is False
    with pytest.warns(UserWarning, match=r"triton 9\.1\.0: nobody has looked at how it loads kernels"):
        assert loading.threads_may_load() is False
    assert [getattr(*place) for place in PLACES] == before
