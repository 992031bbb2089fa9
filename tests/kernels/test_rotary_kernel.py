"""The Triton kernel: on a GPU as it is, elsewhere run by Triton's own interpreter, which is no mock, but slow."""

import importlib
import sys

import pytest
import torch

from families import elementwise

pytest.importorskip("triton", reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def rotary_kernel(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernel is declared
    monkeypatch.delitem(sys.modules, "kernels.rotary_kernel", raising=False)
    yield importlib.import_module("kernels.rotary_kernel")
    sys.modules.pop("kernels.rotary_kernel", None)


BOTH = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("kind", "angles"), [*BOTH, (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize(
    ("heads", "fewer", "size"), [(16, 2, 128), (16, 16, 80), (3, 1, 6)], ids=["language", "vision", "odd"]
)
def test_the_kernel_equals_the_formula(rotary_kernel, heads, fewer, size, kind, angles, checkpointed):
    """In half precision it equals the formula in fp32, rounded once."""
    torch.manual_seed(0)
    # The queries are a part with strides of its own.
    together = torch.randn(5, 3, heads, size, device=DEVICE).to(kind).requires_grad_()
    key = torch.randn(5, fewer, size, device=DEVICE).to(kind).requires_grad_()
    cos, sin = torch.randn(2, 5, 1, size, device=DEVICE).to(angles)
    found = []
    for function in (elementwise.rotate, rotary_kernel.rotate):
        given = [together.unbind(1)[1], key, cos, sin]
        if function is elementwise.rotate:
            given = [part.float() for part in given]
        if checkpointed:  # as a layer that is recomputed
            done = torch.utils.checkpoint.checkpoint(function, *given, use_reentrant=False)
        else:
            done = function(*given)
        done = [part.to(kind) for part in done]
        outer = [torch.linspace(-1, 1, part.numel(), device=DEVICE).view_as(part).to(kind) for part in done]
        gradients = torch.autograd.grad(done, (together, key), [part.mT.contiguous().mT for part in outer])
        found.append([*done, *gradients])
    for wanted, got in zip(*found):
        assert got.dtype == kind
        assert torch.allclose(wanted, got, atol=1e-6 if kind == torch.float32 else 1e-3, rtol=1e-2)
