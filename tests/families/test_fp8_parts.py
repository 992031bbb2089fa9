"""Layers whose products are in fp8: near to bf16, gradients included, and the same when they are recomputed."""

import copy

import pytest
import torch
from conftest import Tiny

from families import FAMILIES
from training import fast_layers

pytest.importorskip("triton", reason="triton is not installed")
from families import fp8_parts
from kernels import fp8


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request):
    return Tiny(request.param)


def learned(model, batch) -> dict:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: part.grad.clone() for name, part in model.named_parameters()}


def off(found, wanted) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def test_layers_in_fp8_learn_what_they_learn_in_bf16(tiny):
    model, batch = tiny.model().to(torch.bfloat16), tiny.collate(tiny.pages(2), packed=True)
    batch |= {"pixel_values": batch["pixel_values"].to(torch.bfloat16)}
    fast_layers.install(model, fuse=False)
    language, way = model.model.language_model, fp8_parts.Fp8(keep=True)
    wanted = learned(model, batch)
    fp8_parts.put_into_fp8(language, way)
    found = learned(model, batch)
    ours = {name for name, part in language.named_modules() if part in way.used}
    # Of Qwen3.5's linear attention some products are 4 wide here, and with them all stay that take the same rows.
    shared = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    shared |= {"o_proj"} if tiny.name != "qwen3_5" else set()
    assert ours == {name for name, _ in language.named_modules() if name.split(".")[-1] in shared}
    errors = {name: off(found[f"model.language_model.{name}.weight"], wanted[f"model.language_model.{name}.weight"])
              for name in ours}  # fmt: skip
    # Of one product it is 3.7 %; by a wrong scale, the least that could be wrong, 50 %.
    assert min(errors.values()) > 0.02 and max(errors.values()) < 0.3, errors
    assert off(found["loss"], wanted["loss"]) < 0.01
    # Recomputed, from the weights that were kept or from the weights themselves: to the bit.
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = learned(model, batch)
    way.keep = False
    assert all(torch.equal(found[name], again[name]) for again in (recomputed, learned(model, batch)) for name in found)
    # What is kept is of the weights as they were, until it is forgotten.
    way.keep = True
    with torch.no_grad():
        language.layers[0].mlp.down_proj.weight.mul_(4)
    assert torch.equal(learned(model, batch)["loss"], found["loss"])
    way.forget()
    assert not torch.equal(learned(model, batch)["loss"], found["loss"])
    fp8_parts.put_into_fp8(language, None)
    before = copy.copy(way.used)
    way.used.clear()
    learned(model, batch)
    assert before and not way.used


@pytest.mark.parametrize("size", [1, 0.1, 0.03, 0.01, 0.003, 0.001])
def test_a_residual_streams_own_rounding_is_not_taken_for_fp8s(size):
    """A layer may add so little to it that bf16 rounds the sum by as much."""
    torch.manual_seed(0)
    rest, added = torch.randn(64, 256).bfloat16(), size * torch.randn(64, 256)
    wanted, found = ((rest + part).bfloat16() for part in (added, added + 0.066 * size * torch.randn(64, 256)))
    assert fp8_parts.off_in_rows(found, wanted, rest) < 0.12
    if size > 0.01:
        assert fp8_parts.off_in_rows(rest + (2 * added).bfloat16(), wanted, rest) > 0.5


def test_each_part_beside_bf16_is_off_by_its_own_rounding():
    """What is passed on, forward and back, is bf16's to the bit, layers that are recomputed included."""
    tiny = Tiny("qwen2_5_vl")
    model, batch = tiny.model().to(torch.bfloat16), tiny.collate(tiny.pages(2), packed=True)
    batch |= {"pixel_values": batch["pixel_values"].to(torch.bfloat16)}
    fast_layers.install(model, fuse=False)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    language = model.model.language_model
    wanted = learned(model, batch)
    names = {part: name for name, part in language.named_modules() if isinstance(part, torch.nn.Linear)}
    beside = fp8_parts.Beside(fp8_parts.Fp8(), names)
    fp8_parts.put_into_fp8(language, beside)
    found = learned(model, batch)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert beside.way.used == {*names} and len(beside.errors) == 3 * len(language.layers)
    for name, errors in beside.errors.items():
        assert (errors < (0.12 if "down" in name else 0.06)).all() and (errors[:3] > 0.001).all(), (name, errors)


@pytest.mark.parametrize("kind", [fp8.E4M3, fp8.E5M2], ids=str)
def test_products_are_off_by_their_rounding_alone(kind):
    """Tokens a thousand times as large as others, as in what goes into an MLP's last product, and gradients that differ
    by tokens, too; the rows are no multiple of 16."""
    torch.manual_seed(0)
    hidden, gradient = torch.randn(101, 64), torch.randn(101, 48) * torch.logspace(-6, 0, 101)[:, None]
    hidden[::20] *= 1000
    gradient[::20] *= 1e-3
    weights = [torch.randn(32, 64), torch.randn(16, 64)]
    bias, whole = torch.randn(16), torch.cat(weights)
    rows, outer, held = fp8.cast(hidden), fp8.cast(gradient, kind), fp8.Weights(weights)
    first, second = held.forward(rows, [None, bias])
    assert off(first, hidden @ weights[0].T) < 0.05 and off(second - bias, hidden @ weights[1].T) < 0.05
    limit = 0.05 if kind == fp8.E4M3 else 0.08
    assert off(held.for_input(outer), gradient @ whole) < limit
    assert off(fp8.for_weight(outer, rows), gradient.T @ hidden) < limit
    # Gradients of zeros, of a batch whose loss counts for nothing, are zeros.
    assert not fp8.for_weight(fp8.cast(gradient * 0, kind), rows).any()
    # What is no number must not become one.
    gradient[3, 5] = torch.nan
    assert fp8.for_weight(fp8.cast(gradient, kind), rows).isnan().any()
