"""What is known of DeepSpeed's insides holds for the version that is installed."""

import torch

from training import zero3


def test_pages_are_written_with_torchs_own_linear_function(monkeypatch):
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    with zero3.plain_linear():
        assert torch.nn.functional.linear is torch._C._nn.linear
    assert torch.nn.functional.linear is zero3_linear_wrap
