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
