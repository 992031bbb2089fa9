"""Fast training changes nothing: each part equals the model's own way."""

import copy
import random

import pytest
import torch
from conftest import make_config, make_processor, page_html

import holo1_dom_finetune as pipeline
from families import FAMILIES, chunked_loss, family_of, fast_parts, page_costs, trains_fast
from training import fast_layers, memory_fit, memory_plan
from training.base_model import BaseTensor
from training.final_folder import final_tensors
from training.prompt_and_mask import PageEncoder
from training.settings import PageSettings


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture
def model(processor):
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(make_config(processor.tokenizer)).float()


def pages(count: int, seed: int = 0) -> list[dict]:
    import io

    from PIL import Image

    rng, made = random.Random(seed), []
    for number in range(count):
        file = io.BytesIO()
        noise = rng.randbytes(3)
        Image.new("RGB", (rng.randint(30, 300), rng.randint(30, 300)), tuple(noise)).save(file, "PNG")
        made.append({"name": str(number), "screenshot": file.getvalue(), "html": page_html(rng)})
    return made


def collate(processor, made, packed=False):
    encoder = PageEncoder(processor, "write this page", family_of("qwen2_5_vl"))
    config = make_config(processor.tokenizer)
    batch = pipeline.PageCollator(processor, encoder, made, 4, config=config, packed=packed)(made)
    assert batch.pop("flops") > 0 and batch.pop("pages")
    return batch


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


@pytest.mark.parametrize("fuse", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_packed_pages_give_the_models_own_loss_and_gradients(processor, model, fuse, monkeypatch):
    """Everything together: packing, segments, the loss on supervised tokens in chunks, the widened vision MLP."""
    monkeypatch.setattr(chunked_loss, "LOSS_ROWS", 50)
    made, shapes = pages(5), {n: p.shape for n, p in model.named_parameters()}
    plain = gradients(model, collate(processor, made))
    twin = fast_twin(model, fuse)
    fast = gradients(twin, collate(processor, made, packed=True), shapes)
    assert worst_difference(plain, fast) <= 1e-5
    one_by_one = [gradients(twin, collate(processor, [page], packed=True), shapes) for page in made]
    counts = [len(collate(processor, [page], packed=True)["targets"]) for page in made]
    mean = {n: sum(part[n] * count for part, count in zip(one_by_one, counts)) / sum(counts) for n in fast}
    assert worst_difference(mean, fast) <= 1e-5


@pytest.mark.slow
def test_the_fused_functions_need_few_graphs(processor, model, monkeypatch):
    """torch leaves a function as it is, and slow, that would need more than eight. They are counted, and nothing is
    compiled: some layers are recomputed, lengths change, gradients are followed or not."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiled(function, backend="eager"))
    torch._dynamo.reset()
    twin = fast_twin(model, fuse=True).train()
    twin.gradient_checkpointing_enable({"use_reentrant": False})
    memory_fit.recompute_some_layers(twin, 0.5)
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True):
        for count in (3, 2, 4):
            batch = collate(processor, pages(count, seed=count), packed=True)
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


@pytest.mark.parametrize("tower", ["language", "vision"])
def test_a_layer_keeps_what_the_memory_plan_counts(processor, model, tower, monkeypatch):
    twin, kept = fast_twin(model), {}
    monkeypatch.setattr(fast_parts, "attend", lambda query, key, value, *_, **__: KeepsFour.apply(query, key, value))
    known = {parameter.data_ptr() for parameter in twin.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in known and tensor.numel() > 1000:  # neither weights nor positions
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    rows, text = 300, twin.config.text_config
    width = text.hidden_size if tower == "language" else twin.config.vision_config.hidden_size
    part = twin.model.language_model.layers[0] if tower == "language" else twin.model.visual.blocks[0]
    size = part.self_attn.head_dim if tower == "language" else width // part.attn.num_heads
    angles = torch.ones(1, rows, size) if tower == "language" else torch.ones(rows, size)
    known.add(angles.data_ptr())
    hidden = torch.randn(rows, width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if tower == "language":
            part(hidden[None] * 1, position_embeddings=(angles, angles), page_bounds=None, longest_page=rows)
        else:
            part(hidden * 1, cu_seqlens=None, max_seqlen=rows, position_embeddings=(angles, angles))
    narrow = text.hidden_size // 2 if tower == "language" else width
    inner = part.mlp.gate_proj.out_features
    tower = page_costs.Tower(1, width, width, narrow, inner)
    planned = 2 * memory_plan.layer_bytes(tower, adapters=False)  # fp32 here, half precision there
    assert sum(kept.values()) / rows == pytest.approx(planned, rel=0.02)


def test_a_page_of_a_pack_changes_no_other_pages_states(processor, model):
    twin, made = fast_twin(model), pages(4)
    states = []
    twin.model.language_model.norm.register_forward_hook(lambda module, given, made: states.append(made[0].detach()))
    batch = collate(processor, made, packed=True)
    twin(**batch)
    start, end = batch["page_bounds"][1:3].tolist()
    changed = [made[0], pages(4, seed=9)[2] | {"screenshot": made[1]["screenshot"]}, *made[2:]]
    changed[1]["html"] = made[1]["html"].replace("<p>", "<b>").replace("</p>", "</b>")  # as many tokens
    other = collate(processor, changed, packed=True)
    assert torch.equal(other["page_bounds"], batch["page_bounds"])
    twin(**other)
    outside = torch.ones(len(states[0]), dtype=torch.bool)
    outside[start:end] = False
    assert torch.equal(states[0][outside], states[1][outside])
    assert not torch.allclose(states[0][~outside], states[1][~outside])


def test_a_frozen_head_costs_no_gradient_of_its_own(processor, model):
    twin = fast_twin(model)
    twin.lm_head.weight.requires_grad_(False)
    fast = collate(processor, pages(2), packed=True)
    twin(**fast).loss.backward()
    assert twin.lm_head.weight.grad is None
    assert twin.model.language_model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_the_widened_vision_mlp_is_the_same_function_and_saves_the_same_shapes(processor, model):
    twin = copy.deepcopy(model)
    assert fast_layers.align_vision_mlp(twin) == 64, "60 in the base"
    batch = collate(processor, pages(3))
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, twin(**batch).logits, atol=1e-6)
    plan = {name: BaseTensor(name, tuple(p.shape), "F32", None) for name, p in model.named_parameters()}
    saved = {key: tensor for key, _, tensor in final_tensors(twin, plan)}
    for name, parameter in model.named_parameters():
        assert torch.equal(saved[name], parameter), name
    assert twin.model.visual.blocks[0].mlp.up_proj.weight.shape == (64, 32)
    twin.load_state_dict(model.state_dict())  # a checkpoint has the base's shapes, and is widened on its way in
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, twin(**batch).logits, atol=1e-6)


def test_a_family_trains_fast_where_it_has_an_architecture_and_a_geometry():
    known = [family_of(name) for name in FAMILIES]
    assert any(family.fast for family in known)
    for family in known:
        assert family.fast == (family.architecture is not None) == (family.geometry is not None)


def test_other_architectures_and_the_plain_way_are_left_alone(model):
    settings = PageSettings()
    assert trains_fast(model.config, settings)
    assert not trains_fast(model.config, PageSettings(fast=False))
    model.config.model_type = "qwen3_vl"
    assert not trains_fast(model.config, settings)
