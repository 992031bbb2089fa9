"""Linear attention of packed pages is the model's own; benchmarks/linear_attention.py proves the kernels on a GPU."""

import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5

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
        (fails, "fails: built for another triton"),
    ],
)
def test_what_does_not_prove_right_is_not_used_and_that_is_said(way, said, monkeypatch):
    monkeypatch.setitem(gated_delta.WAYS, FLA, way)
    gated_delta.flaw.cache_clear()
    with pytest.warns(UserWarning, match=said):
        assert gated_delta.flaw(SHAPE, torch.float32, "cpu")
    monkeypatch.setitem(gated_delta.WAYS, FLA, gated_delta.page_by_page)
    gated_delta.flaw.cache_clear()
    assert gated_delta.flaw(SHAPE, torch.float32, "cpu") == ""
    gated_delta.flaw.cache_clear()


def test_the_price_of_the_slow_way_is_said_and_measured_where_it_counts(monkeypatch):
    """With the reason, which names a remedy."""
    words = gated_delta.delta_words(SHAPE, "cpu", torch.float32, 24)
    assert words == f"{PAGES}, in fp32 and much slower (flash-linear-attention: no GPU)"
    assert gated_delta.obstacle("cuda", half=False) == "it takes half precision"
    asked, measure = [], gated_delta.seconds_of_page
    assert 0 < measure(SHAPE, torch.float32, "cpu") < 60
    monkeypatch.setattr(gated_delta, "seconds_of_page", lambda *given: asked.append(given) or 0.125)
    monkeypatch.setattr(gated_delta, "missing", lambda: "")
    monkeypatch.setattr(gated_delta, "flaw", lambda *unused: "fails: upgrade Triton to >= 3.7.1")
    assert gated_delta.delta_words(SHAPE, "cuda", torch.bfloat16, 24) == (
        f"{PAGES}, in fp32 and much slower: at least 3.0 s for a page of 2,800 tokens, in 24 layers of it alone "
        "(flash-linear-attention: measured 47 times as fast, on an H100: fails: upgrade Triton to >= 3.7.1)"
    )
    assert asked == [(SHAPE, torch.bfloat16, "cuda")]


@pytest.mark.parametrize(
    ("triton", "capability", "named"),
    [("3.6.0", 9, True), ("3.7.0", 9, True), ("3.7.1", 9, False), ("3.3.1", 9, False), ("3.6.0", 8, False)],
)
def test_the_triton_that_gradients_need_is_named_where_the_one_here_is_refused(monkeypatch, triton, capability, named):
    monkeypatch.setattr(gated_delta, "version", lambda name: triton)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    words = f"; and `pip install --no-deps triton==3.7.1`, in place of {triton}"
    assert gated_delta.and_triton() == (words if named else "")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'fla'", name="fla"), "not installed; `pip install flash-linear"),
        (ModuleNotFoundError("No module named 'einops'", name="einops"), "broken: No module named 'einops'"),
        (RuntimeError("another triton"), "broken: another triton"),
    ],
)
def test_what_is_missing_is_told_from_what_is_broken(monkeypatch, error, said):
    monkeypatch.setattr(gated_delta.importlib, "import_module", lambda name: (_ for _ in ()).throw(error))
    assert gated_delta.missing.__wrapped__().startswith(said)


def test_a_page_in_stretches_is_what_it_is_at_once(monkeypatch):
    trial = gated_delta.trial_of(SHAPE, torch.float32, "cpu", (300, 64, 1))
    whole = gated_delta.outcome(PAGES, SHAPE, *trial)
    rule, lengths = qwen3_5.torch_chunk_gated_delta_rule.__wrapped__, []

    def noted(query, *rest, **options):
        lengths.append(query.shape[1])
        return rule(query, *rest, **options)

    monkeypatch.setattr(gated_delta, "STRETCH", 128)
    monkeypatch.setattr(qwen3_5.torch_chunk_gated_delta_rule, "__wrapped__", noted)
    found = gated_delta.outcome(PAGES, SHAPE, *trial)
    assert lengths[:5] == [128, 128, 44, 64, 1]
    assert torch.equal(found["values"], whole["values"])
    assert all(
        torch.allclose(found[name], part, rtol=1e-5, atol=1e-6 * part.abs().max()) for name, part in whole.items()
    )


def test_kernels_that_read_pages_are_proved_on_rows_that_lie_apart(monkeypatch):
    """As reading gives them; one that takes them for dense reads other tokens."""
    way, trial_of = pytest.importorskip("kernels.early", reason="triton is not installed"), gated_delta.trial_of
    monkeypatch.setattr(gated_delta, "obstacle", lambda *unused: "")
    monkeypatch.setattr(gated_delta, "trial_of", lambda *given: trial_of(*given[:3], (70, 5)))
    monkeypatch.setattr(gated_delta, "padded_with_ends", lambda given, *unused: (given.mixed, given.write))

    def as_if_dense(given, *unused):
        return given.mixed.as_strided(given.mixed.shape, (given.mixed.shape[1], 1)), given.write

    monkeypatch.setattr(gated_delta, "fla_with_ends", as_if_dense)
    with pytest.warns(UserWarning, match="differs by"):
        assert way.NEVER == "" and not gated_delta.reads_by_fla.__wrapped__(SHAPE, torch.float32, torch.device("cpu"))
