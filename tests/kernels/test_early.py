"""How kernels are launched, and what that is decided by; the kernels themselves: tests/kernels/interpreted.py."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

early = pytest.importorskip("kernels.early", reason="triton is not installed")


def raising(error):
    def work():
        raise error

    return work


def test_a_way_that_fails_gives_way_to_the_next():
    wanted = (torch.ones(3),)
    ways = {early.EARLY: raising(RuntimeError("out of resource: shared memory")), early.PLAIN: lambda: wanted}
    with pytest.warns(UserWarning, match="launched early, fails: out of resource"):
        assert early.way_that_agrees("nothing", ways, wanted) == early.PLAIN


def test_memory_that_runs_out_says_nothing_about_a_kernel():
    """Triton says it in words of its own; the kernel would never be used again."""
    for error in (torch.OutOfMemoryError("none"), RuntimeError("Triton Error [CUDA]: out of memory")):
        with pytest.raises(torch.OutOfMemoryError):
            early.way_that_agrees("nothing", {early.PLAIN: raising(error)}, (torch.ones(3),))


@pytest.mark.parametrize(("hip", "driver", "begins"), [(None, 12_030, True), (None, 12_020, False), ("7.0", 0, False)])
def test_kernels_begin_early_on_nvidia_alone_and_where_graphs_can_hold_it(monkeypatch, hip, driver, begins):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(early, "driver_version", lambda: driver)
    assert early.early.__wrapped__(torch.device("cuda", 0)) is begins


def test_the_driver_itself_is_asked_for_its_version():
    """12030 for CUDA 12.3; where there is no driver nothing may begin early, and nothing fails."""
    found = early.driver_version()
    assert found >= 11_000 if torch.cuda.is_available() else found >= 0


def test_what_several_threads_ask_for_at_once_is_worked_out_once():
    """Other things meanwhile, and again what failed; `lru_cache` would work it out in each thread."""
    asked, all_here, gate = [], threading.Barrier(3, timeout=20), threading.Event()

    @early.once
    def work(name):
        asked.append(name)
        if name == "long":
            assert gate.wait(20)
        return object()

    def ask(name):
        all_here.wait()
        return work(name)

    with ThreadPoolExecutor(3) as pool:
        one, other, short = [pool.submit(ask, name) for name in ("long", "long", "short")]
        assert short.result(20) and not one.done() and not other.done()
        gate.set()
        assert one.result(20) is other.result(20)
    assert sorted(asked) == ["long", "short"] and work.cache_info().currsize == 2
    work.cache_clear()
    assert work("short") is not short.result() and asked[2:] == ["short"]

    @early.once
    def fails(name):
        asked.append(name)
        raise torch.OutOfMemoryError(name)

    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            fails("none")
    assert asked[3:] == ["none", "none"]


def test_what_triton_reads_before_its_first_kernel_is_kept():
    from triton.runtime.cache import triton_key

    triton_key.cache_clear()
    early.read_compiler()
    assert triton_key.cache_info().currsize == 1
