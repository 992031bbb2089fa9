"""--fp8 begins where it agrees with bf16 on the run's own pages, and is refused by name where it does not."""

from types import SimpleNamespace

import pytest
import torch
from conftest import Tiny

from training import fast_layers, fp8_training
from training.errors import PipelineError, SettingsError

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
    assert "14 products of the language model, forward and for both gradients, weights cast once per step" in told, told
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


def test_another_fault_than_of_fp8_is_told_as_what_it_is(trainer, monkeypatch):
    """A layer that did not wait for its weights, memory that runs out in whatever words, a rank whose others do not
    come: leaving fp8 out would help against none."""

    def begin(error):
        def raises():
            raise error

        fp8_training.begin(trainer, raises, keep=False)

    for error in (PipelineError("1 layers did not wait"), RuntimeError("CUDA driver error: out of memory")):
        with pytest.raises(type(error), match=str(error)):
            begin(error)

    def others_are_elsewhere(flag):
        raise RuntimeError("rank 1 does not come")

    monkeypatch.setattr(fp8_training, "together", others_are_elsewhere)
    with pytest.raises(RuntimeError, match="rank 1 does not come"):
        fp8_training.begin(trainer, trainer.loss, keep=False)
    with pytest.raises(ValueError, match="here alone"):
        begin(ValueError("here alone"))


def test_it_is_refused_where_no_layer_takes_it(trainer, monkeypatch):
    monkeypatch.setattr(fp8, "ALIGNED", 7)
    with pytest.raises(SettingsError, match="none of this model's layers can"):
        fp8_training.begin(trainer, trainer.loss, keep=False)


@pytest.mark.parametrize(("scale", "noise", "holds"), [(1, 0.6, True), (2, 0, False), (0, 0.1, False)])
def test_a_weight_may_be_off_by_rounding_but_not_missing_or_doubled(scale, noise, holds):
    """One of two weights, of so small a gradient that all together say nothing of it."""
    torch.manual_seed(0)
    wanted = {"": torch.ones(()), "large.weight": torch.randn(4096), "small.weight": 0.01 * torch.randn(4096)}
    found = wanted | {"small.weight": scale * wanted["small.weight"] + 0.01 * noise * torch.randn(4096)}
    compared = fp8_training.compare(wanted, found, {"large.weight", "small.weight"}, {"small": torch.full((4,), 0.07)})
    assert compared.holds == holds and compared.where == compared.where_along == "small", compared.words


def test_a_deep_and_wide_model_may_be_off_by_what_rounding_adds_up_to():
    """As random weights in 3B's shapes were: 41 % of all gradients' norm, 28 % along one."""
    torch.manual_seed(0)
    wanted = {"": torch.full((), 6.4354), "one.weight": torch.randn(4096), "other.weight": torch.randn(4096)}
    found = wanted | {"": torch.full((), 6.4484), "one.weight": 0.72 * wanted["one.weight"] + 0.5 * torch.randn(4096)}
    compared = fp8_training.compare(wanted, found, {"one.weight", "other.weight"}, {"one": torch.full((4,), 0.07)})
    assert compared.whole > 0.4 and compared.along > 0.25 and compared.holds, compared.words
    for place in range(4):
        errors = torch.full((4,), 0.07)
        errors[place] = 0.5
        assert not fp8_training.compare(wanted, found, {"one.weight"}, {"one": errors}).holds


def test_one_products_wrong_scale_in_one_layer_is_found(trainer, monkeypatch):
    """Of the whole model's gradients it changes less than rounding does."""
    real, down = fp8.Weights.forward, trainer.model.model.language_model.layers[0].mlp.down_proj

    def halved(self, *given):
        done, way = real(self, *given), getattr(down.products, "way", down.products)
        return [part / 2 for part in done] if self is way.kept.get(down) else done

    monkeypatch.setattr(fp8.Weights, "forward", halved)
    with pytest.raises(SettingsError, match=r"parts of layers off by up to .* forward of layers\.0\.mlp\.gate_proj"):
        fp8_training.begin(trainer, trainer.loss, keep=True)


def test_every_column_of_a_gradient_is_compared(trainer, monkeypatch):
    """Where each row is as long as many of the steps in which numbers are picked."""
    monkeypatch.setattr(fp8_training, "SAMPLE", 256)
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    trainer.model = torch.nn.Module()
    trainer.model.register_parameter("weight", weight)
    columns = torch.arange(64.0).expand(64, 64)
    found = fp8_training.gradients(trainer, (weight * columns).sum())["weight"]
    assert len((found / found.max()).round(decimals=4).unique()) == 64, "16 of 4,096 are left out each time"
