"""--fp8 begins where it agrees with bf16 on the run's own pages, and is refused by name where it does not."""

from types import SimpleNamespace

import pytest
import torch
from conftest import Tiny

from training import fast_layers, fp8_training
from training.errors import SettingsError

pytest.importorskip("triton", reason="triton is not installed")
from kernels import fp8


@pytest.fixture
def trainer():
    """What `begin` asks of a Trainer, around a tiny model whose gradients follow the first call of `loss`."""
    tiny = Tiny("qwen2_5_vl")
    model = tiny.model().to(torch.bfloat16)
    fast_layers.install(model, fuse=False)
    batch = tiny.collate(tiny.pages(2), packed=True)
    batch |= {"pixel_values": batch["pixel_values"].to(torch.bfloat16)}
    state = SimpleNamespace(_set_sync_gradients=lambda sync: None)
    accelerator, callbacks = SimpleNamespace(gradient_state=state, backward=lambda loss: loss.backward()), []
    return SimpleNamespace(
        model=model,
        accelerator=accelerator,
        loss=lambda: model(**batch).loss,
        callbacks=callbacks,
        add_callback=callbacks.append,
    )


def test_it_begins_where_it_agrees_and_leaves_no_gradient(trainer, capsys):
    before = trainer.loss().item()
    fp8_training.begin(trainer, trainer.loss, keep=True)
    told = capsys.readouterr().out
    assert "14 products of the language model, weights cast once per step" in told, told
    assert f"{before:.4f} in bf16; gradients off by" in told
    assert not any(part.grad.any() for part in trainer.model.parameters())
    way = trainer.model.model.language_model.layers[0].mlp.up_proj.products
    assert way.kept and trainer.loss().item() != before
    for event in ("on_step_begin", "on_optimizer_step"):
        getattr(trainer.callbacks[0], event)(None, None, None)
        assert not way.kept
        trainer.loss()
        assert way.kept


def wrong_scale(real):
    return lambda gradient, rows, quick=True: 2 * real(gradient, rows, quick)


def not_finite(real):
    return lambda gradient, rows, quick=True: real(gradient, rows, quick) * torch.nan


def fails(real):
    def raises(*unused):
        raise RuntimeError("no fp8 on this GPU")

    return raises


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (wrong_scale, r"does not agree with bf16 on held-out pages: .* gradients off by \d+\.\d% .* in layers\.\d"),
        (not_finite, "does not agree with bf16 on held-out pages: .* gradients off by nan%"),
        (fails, "--fp8: it fails here: no fp8 on this GPU; leave it out to train in bf16"),
    ],
)
def test_it_is_refused_where_a_product_is_wrong(trainer, monkeypatch, fault, words):
    monkeypatch.setattr(fp8, "for_weight", fault(fp8.for_weight))
    with pytest.raises(SettingsError, match=words):
        fp8_training.begin(trainer, trainer.loss, keep=False)


def test_it_is_refused_where_no_layer_takes_it(trainer, monkeypatch):
    monkeypatch.setattr(fp8, "ALIGNED", 7)
    with pytest.raises(SettingsError, match="none of this model's layers can"):
        fp8_training.begin(trainer, trainer.loss, keep=False)


@pytest.mark.parametrize(("scale", "noise", "holds"), [(1, 0.6, True), (2, 0, False), (0.5, 0.1, False)])
def test_a_weight_may_be_off_by_rounding_but_not_by_its_scale(scale, noise, holds):
    """One of two weights, of so small a gradient that all together say nothing of it."""
    torch.manual_seed(0)
    wanted = {"": torch.ones(()), "large.weight": torch.randn(4096), "small.weight": 0.01 * torch.randn(4096)}
    found = wanted | {"small.weight": scale * wanted["small.weight"] + 0.01 * noise * torch.randn(4096)}
    compared = fp8_training.compare(wanted, found, {"large.weight", "small.weight"})
    assert compared.holds == holds and compared.where == compared.where_along == "small", compared.words
