"""Packed pages through layers of each family's fast path give what the model's own way gives, page by page."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import Tiny
from torch.utils._python_dispatch import TorchDispatchMode

from families import FAMILIES, chunked_loss, family_of, fast_parts, qwen3_5_layers
from training import fast_layers, memory_plan, treatment

FAST = [name for name in FAMILIES if family_of(name).fast]


@pytest.fixture(scope="module", params=FAST)
def tiny(request):
    return Tiny(request.param)


@pytest.fixture
def model(tiny):
    return tiny.model()


def fast_twin(model, fuse: bool = False):
    twin = copy.deepcopy(model)
    fast_layers.align_vision_mlp(twin)
    fast_layers.install(twin, fuse)
    return twin


def gradients(model, batch, shapes=None) -> dict:
    """Loss and gradients, cut to the `shapes` of the parameters of another model."""
    model.zero_grad()
    mean = model(**batch).loss
    mean.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    cut = {n: fast_layers.narrowed(grad, shapes[n]) for n, grad in found.items()} if shapes else found
    for name, grad in found.items():
        assert grad.abs().sum() == pytest.approx(cut[name].abs().sum()), f"{name}: the padding learns"
    return {"loss": mean.detach(), **cut}


def worst_difference(first: dict, second: dict) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def check_against_own(tiny, fuse, monkeypatch):
    """Everything together: packing, segments, the loss on supervised tokens in chunks, the widened vision MLP."""
    model = tiny.model()
    monkeypatch.setattr(chunked_loss, "LOSS_ROWS", 50)
    made, shapes = tiny.pages(5), {n: p.shape for n, p in model.named_parameters()}
    plain = gradients(model, tiny.collate(made))
    twin = fast_twin(model, fuse)
    fast = gradients(twin, tiny.collate(made, packed=True), shapes)
    assert worst_difference(plain, fast) <= 1e-5
    one_by_one = [gradients(twin, tiny.collate([page], packed=True), shapes) for page in made]
    counts = [len(tiny.collate([page], packed=True)["targets"]) for page in made]
    mean = {n: sum(part[n] * count for part, count in zip(one_by_one, counts)) / sum(counts) for n in fast}
    assert worst_difference(mean, fast) <= 1e-5


def test_packed_pages_give_the_models_own_loss_and_gradients(tiny, monkeypatch):
    check_against_own(tiny, False, monkeypatch)


@pytest.mark.slow
def test_so_they_do_with_fused_functions(monkeypatch):
    """Of Qwen3-VL, which needs all that Qwen2.5-VL needs and its own: compiling takes longer than all else here."""
    check_against_own(Tiny("qwen3_vl"), True, monkeypatch)


@pytest.mark.slow
def test_the_fused_functions_need_few_graphs(tiny, model, monkeypatch):
    """torch leaves a function as it is, and slow, that would need more than eight. They are counted, and nothing is
    compiled: some layers are recomputed, others offloaded, lengths change, gradients are followed or not."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiled(function, backend="eager"))
    torch._dynamo.reset()
    twin = fast_twin(model, fuse=True).train()
    twin.gradient_checkpointing_enable({"use_reentrant": False})
    treatment.Treatment(twin, memory_plan.Way(recomputed=0.5, recomputed_vision=0.5, offloaded=0.5))
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        for count in (3, 2, 4):
            batch = tiny.collate(tiny.pages(count, seed=count), packed=True)
            with torch.no_grad():
                twin(**batch)
            twin(**batch).loss.backward()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 5  # they are compiled at all
    torch._dynamo.reset()


class KeepsFour(torch.autograd.Function):
    """Stands for the flash kernels, which keep query, key, value and output, where a CPU's keep more."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = query.clone()
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None


@pytest.mark.parametrize("part", ["language", "vision"])
def test_a_layer_keeps_what_the_memory_plan_counts(tiny, model, part, monkeypatch):
    twin, kept, rows = fast_twin(model), {}, 300
    for room in (fast_parts, qwen3_5_layers):
        monkeypatch.setattr(room, "attend", lambda query, key, value, *_, **__: KeepsFour.apply(query, key, value))
    known = {parameter.data_ptr() for parameter in twin.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in known and tensor.numel() > 1000:  # neither weights nor positions
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tower = replace(getattr(family_of(model.config).shape(model.config), part), layers=1)
    layers = twin.model.language_model.layers if part == "language" else twin.model.visual.blocks
    layer = next(layer for layer in layers if part == "vision" or hasattr(layer, "self_attn"))
    turned = 2 * len(twin.model.language_model.rotary_emb.inv_freq)  # of a head, which may be wider
    size = turned if part == "language" else tower.hidden // layer.attn.num_heads
    angles = torch.ones(1, rows, size) if part == "language" else torch.ones(rows, size)
    known.add(angles.data_ptr())
    hidden = torch.randn(rows, tower.hidden, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if part == "language":
            layer(hidden[None] * 1, position_embeddings=(angles, angles), page_bounds=None, longest_page=rows)
        else:
            layer(hidden * 1, cu_seqlens=None, max_seqlen=rows, position_embeddings=(angles, angles))
    if part == "vision":
        tower = replace(tower, intermediate=next(layer.mlp.children()).out_features)  # it has been widened
    planned = 2 * memory_plan.layer_bytes(tower, adapters=False)  # fp32 here, half precision there
    assert sum(kept.values()) / rows == pytest.approx(planned, rel=0.02)


def test_layers_that_are_recomputed_learn_the_same_without_their_last_product(tiny, model):
    """What is run again makes what the backward pass needs, and no gated product, of which nothing is kept."""
    batch, twin, calls = tiny.collate(tiny.pages(2), packed=True), fast_twin(model).train(), []
    wanted = gradients(twin, batch)
    twin.gradient_checkpointing_enable()
    fused = twin.lm_head.fused
    fused.swiglu = lambda *parts, real=fused.swiglu: calls.append(1) or real(*parts)
    found = gradients(twin, batch)
    assert len(calls) == len(twin.model.language_model.layers)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_layers_that_are_recomputed_leave_the_random_state_alone(tiny, model, monkeypatch):
    """A block draws nothing; to read the state and set it again costs each layer's CPU time twice."""
    batch, twin = tiny.collate(tiny.pages(2), packed=True), fast_twin(model).train()
    twin.gradient_checkpointing_enable()
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("the random state was read"))
    monkeypatch.setattr(torch, "set_rng_state", lambda state: pytest.fail("the random state was set"))
    assert gradients(twin, batch)


def test_a_page_of_a_pack_changes_no_other_pages_states(tiny, model):
    twin, made = fast_twin(model), tiny.pages(4)
    states = []
    twin.model.language_model.norm.register_forward_hook(lambda module, given, made: states.append(made[0].detach()))
    batch = tiny.collate(made, packed=True)
    twin(**batch)
    start, end = batch["page_bounds"][1:3].tolist()
    changed = [made[0], tiny.pages(4, seed=9)[2] | {"screenshot": made[1]["screenshot"]}, *made[2:]]
    changed[1]["html"] = made[1]["html"].replace("<p>", "<b>").replace("</p>", "</b>")  # as many tokens
    other = tiny.collate(changed, packed=True)
    assert torch.equal(other["page_bounds"], batch["page_bounds"])
    twin(**other)
    outside = torch.ones(len(states[0]), dtype=torch.bool)
    outside[start:end] = False
    assert torch.equal(states[0][outside], states[1][outside])
    assert not torch.allclose(states[0][~outside], states[1][~outside])


def test_a_frozen_head_costs_no_gradient_of_its_own(tiny, model):
    twin = fast_twin(model)
    twin.lm_head.weight.requires_grad_(False)
    fast = tiny.collate(tiny.pages(2), packed=True)
    twin(**fast).loss.backward()
    assert twin.lm_head.weight.grad is None
    assert twin.model.language_model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_no_layer_of_the_language_model_copies_its_gradient_into_zeros(tiny, model):
    """As the gradient of an index does: two passes over the residual stream, twice a layer."""
    twin, batch = fast_twin(model), tiny.collate(tiny.pages(2), packed=True)
    copied = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, given=(), named=None):
            if function is torch.ops.aten.select_backward.default:
                copied.append(tuple(given[1]))
            return function(*given, **(named or {}))

    loss = twin(**batch).loss
    with Watch():
        loss.backward()
    assert twin.lm_head.weight.grad.any()
    assert not [shape for shape in copied if shape[-1] == twin.config.get_text_config().hidden_size], copied
