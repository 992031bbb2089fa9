"""Linear attention of packed pages is the model's own; benchmarks/linear_attention.py proves the kernels on a GPU."""

import pytest
import torch

from kernels import gated_delta
from kernels.gated_delta import FLA, PAGES, DeltaInputs, DeltaShape

SHAPE = DeltaShape(key_heads=2, value_heads=4, key_width=8, value_width=12, taps=4)


def test_no_page_sees_another():
    lengths = (70, 1, 130)
    given, bounds, outer = gated_delta.trial_of(SHAPE, torch.float32, "cpu", lengths)
    together = gated_delta.outcome(PAGES, SHAPE, given, bounds, outer)
    for start, end in zip(bounds.tolist(), bounds[1:].tolist()):
        rows = {name: getattr(given, name)[start:end] for name in ("mixed", "write", "decay")}
        alone = DeltaInputs(**{**vars(given), **rows})
        found = gated_delta.outcome(PAGES, SHAPE, alone, torch.tensor([0, end - start]), outer[start:end])
        for name in ("values", *rows):
            assert torch.allclose(found[name], together[name][start:end], atol=1e-6), name


def test_it_is_the_models_own_layer():
    """Of one page, between the layer's products: what transformers' module computes there."""
    from conftest import make_qwen3_5_config, make_tokenizer
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    torch.manual_seed(0)
    layer = Qwen3_5GatedDeltaNet(make_qwen3_5_config(make_tokenizer()).text_config, 0)
    kept = {}
    layer.norm.register_forward_hook(lambda module, inputs, output: kept.update(done=inputs[0]))
    hidden = torch.randn(1, 150, 32)
    layer(hidden)
    products = (part(hidden)[0] for part in (layer.in_proj_qkv, layer.in_proj_b, layer.in_proj_a))
    given = DeltaInputs(*products, layer.conv1d.weight.squeeze(1), layer.A_log, layer.dt_bias)
    done = gated_delta.gated_delta(given, SHAPE, torch.tensor([0, 150], dtype=torch.int32))
    assert torch.equal(done.flatten(0, 1), kept["done"])


def fails(*unused):
    raise RuntimeError("built for another triton")


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (
            lambda *given: 1.1 * gated_delta.page_by_page(*given),
            r"differs from .*torch function.*values 0\.1, mixed 0\.1",
        ),
        (lambda *given: gated_delta.page_by_page(*given) * float("nan"), "differs from .*values nan"),
        (fails, "fails for .*built for another triton"),
    ],
)
def test_what_does_not_prove_right_is_not_used_and_that_is_said(way, said, monkeypatch):
    monkeypatch.setitem(gated_delta.WAYS, FLA, way)
    gated_delta.proved.cache_clear()
    with pytest.warns(UserWarning, match=said):
        assert not gated_delta.proved(SHAPE, torch.float32, "cpu")
    monkeypatch.setitem(gated_delta.WAYS, FLA, gated_delta.page_by_page)
    gated_delta.proved.cache_clear()
    assert gated_delta.proved(SHAPE, torch.float32, "cpu")
    gated_delta.proved.cache_clear()


def test_the_price_of_the_slow_way_is_said():
    words = gated_delta.delta_words(SHAPE, "cpu", torch.float32)
    assert words == f"{PAGES}, in fp32 and much slower (flash-linear-attention: no GPU)"
    assert gated_delta.obstacle("cuda", half=False) == "it takes half precision"
