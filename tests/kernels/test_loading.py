"""Kernels that several threads load at once. The launchers are real ones, as far as a machine without a GPU has any: C
modules of one name, built and loaded by Triton itself. The driver that loads a kernel is played."""

import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton
from triton.compiler import compiler
from triton.runtime import build

from kernels import launching, loading

SOURCE = """
#include <Python.h>
static PyObject *launch(PyObject *self, PyObject *args) { return PyLong_FromLong(NUMBER); }
static PyMethodDef methods[] = {{"launch", launch, METH_VARARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "__triton_launcher", NULL, -1, methods};
PyMODINIT_FUNC PyInit___triton_launcher(void) { return PyModule_Create(&definition); }
"""


@pytest.fixture
def mended(monkeypatch):
    """Triton as `threads_may_load` leaves it, and as it was afterwards."""
    monkeypatch.setattr(build, "_load_module_from_path", build._load_module_from_path)
    monkeypatch.setattr(compiler.CompiledKernel, "_init_handles", compiler.CompiledKernel._init_handles)
    assert loading.threads_may_load.__wrapped__(), "the version that is installed is one that was looked at"


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    """Makes the launcher that gives a number, and loads it, once more where it was loaded before."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def load(number: int):
        return build.compile_module_from_src(SOURCE.replace("NUMBER", str(number)), "__triton_launcher")

    try:
        load(0)
    except Exception as error:
        pytest.skip(f"no C compiler, or no headers of Python: {str(error)[:100]}")
    return load


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

    def get_current_device(self):
        return 0

    def get_current_target(self):
        return SimpleNamespace(warp_size=32)

    def unload_module(self, module):
        raise AssertionError(f"{module} is in use")

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

    def make(driver: Played) -> compiler.CompiledKernel:
        monkeypatch.setattr(compiler, "driver", SimpleNamespace(active=driver))
        monkeypatch.setattr(compiler, "max_shared_mem", lambda device: 232_448)
        made = compiler.CompiledKernel.__new__(compiler.CompiledKernel)
        made.module = made.function = made._run = None
        made.name, made.kernel, made.hash, made.src, made.metadata_group = "product", b"", "", "product", {}
        made.metadata = SimpleNamespace(shared=0, num_warps=4, tmem_size=None, target=SimpleNamespace(arch=90))
        return made

    return make


def test_a_thread_that_wants_a_kernel_which_another_is_loading_gets_all_of_it(mended, kernel, monkeypatch):
    driver = Played()
    made = kernel(driver)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: (made.run, made.function))
        assert driver.begun.wait(20)
        second = pool.submit(lambda: (made.run, made.function))
        threading.Timer(0.2, driver.ends.set).start()
        assert first.result() == second.result() == ("launcher of product", "function of product")
    assert driver.loads == 1 and made.module == "module of product" and made.n_regs == 32
    made.module = None  # the driver is played no longer when it ends


def test_a_kernel_that_did_not_load_is_loaded_the_next_time(mended, kernel):
    driver = Played(fails=True)
    driver.ends.set()
    made = kernel(driver)
    with pytest.raises(RuntimeError, match="out of memory"):
        made.run  # noqa: B018
    assert (made.run, made.function) == ("launcher of product", "function of product")
    made.module = None


def test_a_version_that_nobody_has_looked_at_is_said_and_left_alone(monkeypatch):
    load = build._load_module_from_path
    monkeypatch.setattr(triton, "__version__", "9.1.0")
    assert launching.is_known() is False
    with pytest.warns(UserWarning, match=r"triton 9\.1\.0: nobody has looked at how it loads kernels"):
        assert loading.threads_may_load.__wrapped__() is False
    assert build._load_module_from_path is load
