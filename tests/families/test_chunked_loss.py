"""The loss in chunks equals torch's own, gradients included."""

from dataclasses import replace

import conftest
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from families import chunked_loss, family_of
from training import memory_plan


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


class MostBytes(TorchDispatchMode):
    """Bytes of all that was made inside and is still there, at most."""

    def __init__(self):
        super().__init__()
        self.living, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.living = {key: kept for key, kept in self.living.items() if not kept[0].expired()}
        given = {part.untyped_storage()._cdata for part in args if torch.is_tensor(part)}
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if torch.is_tensor(tensor) and (storage := tensor.untyped_storage())._cdata not in given:  # no view
                self.living[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self.living.values()))
        return made


def test_no_more_exists_at_once_than_the_plan_counts(monkeypatch):
    """Of several chunks, with an entropy that is fused into one pass."""
    monkeypatch.setattr(chunked_loss, "LOSS_ROWS", 64)
    monkeypatch.setattr(memory_plan, "LOSS_ROWS", 64)
    shape = replace(family_of("qwen2_5_vl").shape(conftest.shapes_of_3b()), vocabulary=4_096)
    shape = replace(shape, language=replace(shape.language, hidden=32))
    hidden = torch.randn(300, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4_096, 32, dtype=torch.bfloat16, requires_grad=True)
    with MostBytes() as counted:
        loss = chunked_loss.supervised_loss(
            hidden, weight, torch.zeros(300, dtype=torch.long), lambda logits, _: (logits.sum(), logits.clone())
        )
        loss.backward()
    planned = memory_plan.head(shape, memory_plan.Load(1, 1, len(hidden)), memory_plan.Way())
    assert counted.most == pytest.approx(planned, rel=0.1)
