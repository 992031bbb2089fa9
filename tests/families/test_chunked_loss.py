"""The loss in chunks equals torch's own, gradients included."""

import pytest
import torch

from families import chunked_loss


@pytest.mark.parametrize("rows", [2, 7, 1000])
def test_the_chunked_loss_equals_torchs_own(rows, monkeypatch):
    monkeypatch.setattr(chunked_loss, "LOSS_ROWS", rows)
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(50, (23,))
    own = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum") * 0.25
    wanted = torch.autograd.grad(own, (hidden, weight))
    sum_of_losses = chunked_loss.supervised_loss(hidden, weight, targets) * 0.25
    found = torch.autograd.grad(sum_of_losses, (hidden, weight))
    assert sum_of_losses.item() == pytest.approx(own.item(), abs=1e-5)
    for first, second in zip(wanted, found):
        assert torch.allclose(first, second, atol=1e-5)
