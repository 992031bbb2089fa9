"""Which compiled kernel a launch finds again, and how it is called. There is no GPU in a test, so what Triton compiles
is played: a stand-in for its own `run` notes what it was asked for; what is here on a GPU is proved there itself."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from kernels import launching


@triton.jit
def played_kernel(source, target, factor, count, BLOCK: tl.constexpr, TWICE: tl.constexpr = False):
    pass


@pytest.fixture
def played(monkeypatch):
    """What was launched: ("triton" or "short", arguments)."""
    launched = []

    def run(*given, grid, warmup, **options):
        launched.append(("triton", (*grid, *given, options)))
        number = len(launched)
        return SimpleNamespace(
            run=lambda *words: launched.append(("short", words)),
            function=f"function {number}",
            packed_metadata=f"metadata {number}",
        )

    monkeypatch.setattr(played_kernel, "run", run)
    monkeypatch.setattr(launching, "is_right", lambda: True)
    monkeypatch.setattr(launching, "_found", {})
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda at: 77)))
    return launched


def test_a_kernel_that_was_launched_before_is_called_with_all_that_it_takes(played):
    (first, second), (third, fourth) = torch.zeros(2, 16), torch.ones(2, 16)
    launching.launch(played_kernel, (4, 2), first, second, 0.5, 16, BLOCK=8, num_warps=4)
    launching.launch(played_kernel, (5, 2), third, fourth, 0.5, 16, BLOCK=8, num_warps=4)
    (by_triton, words), (short, all_words) = played
    assert by_triton == "triton" and short == "short"
    assert words[:2] == (4, 2) and words[-1] == {"BLOCK": 8, "num_warps": 4}
    places, given = all_words[:9], all_words[9:]
    assert places == (5, 2, 1, 77, "function 1", "metadata 1", None, None, None)
    assert given[0] is third and given[1] is fourth
    assert given[2:] == (0.5, 16, 8, False)  # in the kernel's order, with what stands there by itself


@pytest.mark.parametrize(
    "other",
    [
        lambda x: ((x.half(), x, 0.5, 16), {"BLOCK": 8}),
        lambda x: ((torch.zeros(17)[1:], x, 0.5, 16), {"BLOCK": 8}),  # four bytes behind a multiple of 16
        lambda x: ((x, x, 0.25, 16), {"BLOCK": 8}),
        lambda x: ((x, x, 0.5, 1), {"BLOCK": 8}),
        lambda x: ((x, x, 0.5, 16), {"BLOCK": 16}),
        lambda x: ((x, x, 0.5, 16), {"BLOCK": 8, "TWICE": True}),
        lambda x: ((x, x, 0.5, 16), {"TWICE": 8}),
        lambda x: ((x, x, 0.5, 16.0), {"BLOCK": 8}),
    ],
    ids=["precision", "address", "factor", "count", "block", "option", "name", "type"],
)
def test_what_may_be_another_kernel_is_asked_of_triton(played, other):
    states = torch.zeros(16)
    assert states.data_ptr() % 16 == 0 != torch.zeros(17)[1:].data_ptr() % 16
    launching.launch(played_kernel, (1,), states, states, 0.5, 16, BLOCK=8)
    given, options = other(states)
    launching.launch(played_kernel, (1,), *given, **options)
    launching.launch(played_kernel, (1,), *given, **options)
    assert [way for way, _ in played] == ["triton", "triton", "short"]
    assert played[2][1][4] == "function 2"


def test_no_more_are_kept_than_a_number_of_them(played, monkeypatch):
    monkeypatch.setattr(launching, "MOST", 3)
    states = torch.zeros(16)
    for count in range(7):
        launching.launch(played_kernel, (1,), states, states, 0.5, count, BLOCK=8)
        assert len(launching._found) <= 3
    launching.launch(played_kernel, (1,), states, states, 0.5, 6, BLOCK=8)
    assert [way for way, _ in played] == ["triton"] * 7 + ["short"]


def test_a_launch_that_is_not_right_is_tritons_and_that_is_said(monkeypatch):
    monkeypatch.setattr(launching, "launch", lambda *given, **options: None)  # writes nothing
    monkeypatch.setattr(torch, "arange", lambda *given, device, real=torch.arange, **kind: real(*given, **kind))
    launching.proved.cache_clear()
    with pytest.warns(UserWarning, match="short launch.*differs"):
        assert launching.proved(0) == ""
    launching.proved.cache_clear()


def test_a_triton_that_nobody_has_looked_at_launches_its_kernels_itself(monkeypatch):
    for version, there in (("3.6.0", True), ("3.8.0+git1", True), ("4.0.0", False), ("main", False)):
        monkeypatch.setattr(triton, "__version__", version)
        assert launching.is_known() == there, version


def test_powers_of_two():
    assert [launching.power_above(count) for count in (1, 2, 3, 64, 65, 11_008)] == [1, 2, 4, 64, 128, 16_384]
