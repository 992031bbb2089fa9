"""The Triton kernel, run by Triton's own interpreter where there is no GPU: no mock, but slow."""

import importlib
import sys

import pytest
import torch

import fast_training

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture
def rotary_kernel(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernel is declared
    monkeypatch.delitem(sys.modules, "rotary_kernel", raising=False)
    yield importlib.import_module("rotary_kernel")
    sys.modules.pop("rotary_kernel", None)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("heads", "fewer", "size"), [(16, 2, 128), (16, 16, 80), (3, 1, 6)], ids=["language", "vision", "odd"]
)
def test_the_kernel_equals_the_formula(rotary_kernel, heads, fewer, size, checkpointed):
    torch.manual_seed(0)
    together = torch.randn(5, 3, heads, size, requires_grad=True)  # the queries are a part with strides of its own
    key = torch.randn(5, fewer, size, requires_grad=True)
    cos, sin = torch.randn(2, 5, 1, size)
    found = []
    for function in (fast_training.rotate, rotary_kernel.rotate):
        given = (together.unbind(1)[1], key, cos, sin)
        if checkpointed:  # as a layer that is worked out twice
            done = torch.utils.checkpoint.checkpoint(function, *given, use_reentrant=False)
        else:
            done = function(*given)
        weights = [torch.linspace(-1, 1, part.numel()).view_as(part) for part in done]
        gradients = torch.autograd.grad(done, (together, key), [weight.mT.contiguous().mT for weight in weights])
        found.append([*done, *gradients])
    for wanted, got in zip(*found):
        assert torch.allclose(wanted, got, atol=1e-6)
