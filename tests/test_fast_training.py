"""Fast training changes nothing: each part equals the model's own way."""

import contextlib
import copy
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import make_config, make_processor, page_html

import holo1_dom_finetune as pipeline
from training import attention, fast_layers, loss, memory_plan, packing, zero3
from training.base_model import BaseTensor
from training.final_folder import final_tensors


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
    encoder, config = pipeline.PageEncoder(processor, "write this page"), make_config(processor.tokenizer)
    batch = pipeline.PageCollator(processor, encoder, made, 4, config=config, packed=packed)(made)
    assert batch.pop("flops") > 0
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
    monkeypatch.setattr(loss, "LOSS_ROWS", 50)
    made, shapes = pages(5), {n: p.shape for n, p in model.named_parameters()}
    plain = gradients(model, collate(processor, made))
    twin = fast_twin(model, fuse)
    fast = gradients(twin, collate(processor, made, packed=True), shapes)
    assert worst_difference(plain, fast) <= 1e-5
    one_by_one = [gradients(twin, collate(processor, [page], packed=True), shapes) for page in made]
    counts = [len(collate(processor, [page], packed=True)["targets"]) for page in made]
    mean = {n: sum(part[n] * count for part, count in zip(one_by_one, counts)) / sum(counts) for n in fast}
    assert worst_difference(mean, fast) <= 1e-5


def test_the_fused_functions_need_few_graphs(processor, model, monkeypatch):
    """torch leaves a function as it is, and slow, that would need more than eight. They are counted, and nothing is
    compiled: some layers are worked out twice, lengths change, gradients are followed or not."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiled(function, backend="eager"))
    torch._dynamo.reset()
    twin = fast_twin(model, fuse=True).train()
    twin.gradient_checkpointing_enable({"use_reentrant": False})
    pipeline.checkpoint_some_layers(twin, 0.5)
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
    from training import memory_plan

    twin, kept = fast_twin(model), {}
    monkeypatch.setattr(fast_layers, "attend", lambda query, key, value, *_, **__: KeepsFour.apply(query, key, value))
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
    planned = 2 * memory_plan.layer_bytes(width, narrow, inner, adapters=False)  # fp32 here, half precision there
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


def test_a_pack_is_written_out_whole(processor):
    """Two pages by hand: every entry, so that a slip by one place cannot hide."""
    rows = [([1, 9, 9, 5, 6, 7], [-100, -100, -100, -100, 6, 7]), ([1, 9, 5, 8], [-100, -100, -100, 8])]
    batch = packing.pack(rows, [(1, 2), (1, 1)], before=1, ignored=-100)
    assert {name: value.tolist() if torch.is_tensor(value) else value for name, value in batch.items()} == {
        "input_ids": [[1, 9, 9, 5, 6, 7, 1, 9, 5, 8]],
        "position_ids": [
            [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]],
            [[0, 1, 1, 3, 4, 5, 0, 1, 2, 3]],
            [[0, 1, 1, 3, 4, 5, 0, 1, 2, 3]],
            [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]],
        ],
        "image_places": [1, 2, 7],
        "supervised_places": [3, 4, 8],
        "targets": [6, 7, 8],
        "page_bounds": [0, 6, 10],
        "longest_page": 6,
    }


@pytest.mark.parametrize("rows", [2, 7, 1000])
def test_the_chunked_loss_equals_torchs_own(rows, monkeypatch):
    monkeypatch.setattr(loss, "LOSS_ROWS", rows)
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(50, (23,))
    own = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum") * 0.25
    wanted = torch.autograd.grad(own, (hidden, weight))
    sum_of_losses = loss.supervised_loss(hidden, weight, targets) * 0.25
    found = torch.autograd.grad(sum_of_losses, (hidden, weight))
    assert sum_of_losses.item() == pytest.approx(own.item(), abs=1e-5)
    for first, second in zip(wanted, found):
        assert torch.allclose(first, second, atol=1e-5)


def test_adapters_begin_the_same_in_every_run_with_a_seed(model):
    def first(seed: int) -> list:
        torch.randn(seed + 1)  # whatever happened before
        twin = pipeline.add_adapters(copy.deepcopy(model), pipeline.PageSettings(lora=True), seed)
        return [weight for name, weight in twin.named_parameters() if "lora_A" in name]

    assert len(first(7)) == 14, "seven projections in each of two layers"
    assert all(torch.equal(one, other) for one, other in zip(first(7), first(7)))
    assert not any(torch.equal(one, other) for one, other in zip(first(7), first(8)))


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


def test_positions_and_geometry_equal_the_models_own_for_200_sizes(processor, model, monkeypatch):
    """The model works them out itself in a forward pass; what it worked out is caught and compared."""
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl as own

    encoder, rng, caught = pipeline.PageEncoder(processor, "write this page"), random.Random(1), {}
    for name in ("get_vision_position_ids", "get_vision_attention_seqlens", "get_vision_window_index"):
        real = getattr(own, name)

        def keep(*given, name=name, real=real, **options):
            caught[name] = real(*given, **options)
            return caught[name]

        monkeypatch.setattr(own, name, keep)
    geometry, tower = packing.image_geometry(model.config), model.model.visual
    tower.blocks, tower.merger = torch.nn.ModuleList(), torch.nn.Identity()  # only the geometry is looked at
    tower.forward_windows = None
    for _ in range(200):
        rows, columns = rng.randint(2, 40), rng.randint(2, 40)
        grids = torch.tensor([[1, 2 * rows, 2 * columns]])
        ids, _ = encoder.encode("<p>river</p>", rows * columns)
        ids = torch.tensor([ids])
        kinds = (ids == encoder.image_token_id).long()
        positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grids)
        made = packing.page_positions(len(encoder.before), rows, columns, ids.shape[1])
        assert torch.equal(made[1:], positions[:, 0]) and torch.equal(made[0], torch.arange(ids.shape[1]))
        with torch.no_grad(), contextlib.suppress(IndexError):  # without blocks the merged rows are too many
            tower(torch.zeros(4 * rows * columns, 1176), grid_thw=grids)
        ready = geometry(grids)
        index, windows = caught["get_vision_window_index"]
        bounds, _ = caught["get_vision_attention_seqlens"]
        assert torch.equal(ready["image_position_ids"], caught["get_vision_position_ids"])
        assert torch.equal(ready["image_window_index"], index)
        assert torch.equal(ready["image_cu_window_seqlens"], windows)
        assert torch.equal(ready["image_cu_seqlens"], bounds)
        assert ready["image_max_window_seqlen"] == windows.diff().max()
        assert ready["image_max_seqlen"] == bounds.diff().max()


def test_a_segment_sees_nothing_of_its_neighbours():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 12, 2, 8)
    bounds = torch.tensor([0, 3, 8, 12])
    before = attention.attend(query, key, value, bounds, 5, 0.3, causal=False)
    changed = [tensor.clone() for tensor in (query, key, value)]
    for tensor in changed:
        tensor[3:8] += 1
    after = attention.attend(*changed, bounds, 5, 0.3, causal=False)
    assert torch.equal(before[:3], after[:3]) and torch.equal(before[8:], after[8:])
    assert not torch.allclose(before[3:8], after[3:8])


def test_attention_with_fewer_keys_is_causal_inside_each_segment():
    torch.manual_seed(0)
    query, key, value = torch.randn(10, 4, 8), torch.randn(10, 2, 8), torch.randn(10, 2, 8)
    done = attention.attend(query, key, value, torch.tensor([0, 4, 10]), 6, 0.3, causal=True)
    for head in range(4):
        for start, end in ((0, 4), (4, 10)):
            for place in range(start, end):
                scores = query[place, head] @ key[start : place + 1, head // 2].T * 0.3
                wanted = scores.softmax(-1) @ value[start : place + 1, head // 2]
                assert torch.allclose(done[place, head], wanted, atol=1e-5)


class NoNumber(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states):
        return states.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def altered(part: str):
    """A kernel of attention that does something wrong with `part`."""

    def kernel(query, key, value, bounds, longest, scale, causal):
        if part == "gradients only":  # as flash-attn 4 beta 36 does for heads of 80
            query = query.detach() + 0 * query
        elif part == "no number":
            key = NoNumber.apply(key)
        elif part == "its run":
            raise TypeError("no such word")
        done = attention.segment_by_segment(query, key, value, bounds, longest, scale, causal)
        return done * 1.1 if part == "the values" else done

    return kernel


PROOF = (attention.SEGMENTS, (4, 2, 16), torch.float32, True, "cpu")


@pytest.mark.parametrize("part", ["nothing", "the values", "gradients only", "no number", "its run"])
def test_a_kernel_is_believed_only_where_it_gives_the_same(monkeypatch, part):
    monkeypatch.setitem(attention.KERNELS, part, altered(part))
    attention.agrees.cache_clear()
    if part == "nothing":
        assert attention.agrees(part, *PROOF)
    else:
        said = "its run fails .* no such word" if part == "its run" else f"{part} differs from SDPA"
        with pytest.warns(UserWarning, match=said):
            assert not attention.agrees(part, *PROOF)


def test_a_kernel_may_be_proved_inside_a_layer_that_is_worked_out_twice(monkeypatch):
    monkeypatch.setitem(attention.KERNELS, "nothing", altered("nothing"))
    attention.agrees.cache_clear()
    weight = torch.randn(3, 3, requires_grad=True)

    def layer(hidden):
        hidden = torch.tanh(hidden @ weight)
        assert attention.agrees("nothing", *PROOF)
        return torch.tanh(hidden @ weight)

    hidden = torch.randn(2, 3)
    (wanted,) = torch.autograd.grad(torch.tanh(torch.tanh(hidden @ weight) @ weight).sum(), weight)
    done = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=False)
    (found,) = torch.autograd.grad(done.sum(), weight)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("longest", "agreeing", "taken"), [(128, True, "VARLEN"), (300, True, "FLASH_4"), (300, False, "VARLEN")]
)
def test_flash_attn_4_takes_long_segments_that_it_has_proved(monkeypatch, longest, agreeing, taken):
    """Its kernel needs a GPU: who is asked is tested here, and what for."""
    asked = []
    kernels = {name: lambda *given, name=name: asked.append((name, *given)) for name in attention.KERNELS}
    monkeypatch.setattr(attention, "KERNELS", kernels)
    monkeypatch.setattr(attention, "attention_kernel", lambda device, half: attention.FLASH_4)
    proofs = []
    monkeypatch.setattr(attention, "agrees", lambda *given: proofs.append(given) or agreeing)
    query, key, value = torch.zeros(300, 4, 16), torch.zeros(300, 2, 16), torch.ones(300, 2, 16)
    bounds = torch.tensor([0, 300])
    attention.attend(query, key, value, bounds, longest, 0.3, True)
    ((name, *given),) = asked
    assert name == getattr(attention, taken)
    assert all(a is b for a, b in zip(given, (query, key, value, bounds, longest, 0.3, True), strict=True))
    wanted = (attention.FLASH_4, attention.VARLEN, (4, 2, 16), torch.float32, True)
    assert proofs == ([wanted] if longest > 128 else [])


@pytest.mark.parametrize("pair", [True, False], ids=["with sums", "alone"])
@pytest.mark.parametrize("width", [80, 96])
def test_heads_of_odd_widths_are_filled_up_for_flash_attn_4(monkeypatch, tmp_path, width, pair):
    """In place of its kernel, which needs a GPU: SDPA, under its name, with its arguments."""
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    module = tmp_path / "flash_attn" / "cute.py"
    module.parent.mkdir()
    module.write_text(
        "from training import attention\n"
        "def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,"
        " softmax_scale, causal):\n"
        "    assert q.shape[-1] == k.shape[-1] == v.shape[-1] == 96 and cu_seqlens_q is cu_seqlens_k\n"
        "    done = attention.segment_by_segment(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal)\n"
        f"    return (done, None) if {pair} else done\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    parts = [torch.randn(7, heads, width, requires_grad=True) for heads in (4, 2, 2)]
    bounds, found = torch.tensor([0, 3, 7]), []
    for kernel in (attention.flash_4, attention.segment_by_segment):
        done = kernel(*parts, bounds, 4, width**-0.5, True)
        found.append([done, *torch.autograd.grad(done.square().sum(), parts)])
    for name in ("flash_attn", "flash_attn.cute"):
        sys.modules.pop(name, None)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found))


@pytest.fixture
def fresh_kernel_choice():
    attention.attention_kernel.cache_clear()
    yield
    attention.attention_kernel.cache_clear()


@pytest.mark.usefixtures("fresh_kernel_choice")
@pytest.mark.parametrize(
    ("capability", "files", "kernel"),
    [
        ((9, 0), ["cute/__init__.py"], "FLASH_4"),  # flash-attn 4 alone: the package itself has no code
        ((8, 0), ["cute/__init__.py"], "VARLEN"),
        ((8, 0), ["cute/__init__.py", "__init__.py"], "FLASH"),
        ((9, 0), ["__init__.py"], "FLASH"),
        ((9, 0), [], "VARLEN"),
        ((7, 5), ["__init__.py"], "SEGMENTS"),
    ],
)
def test_the_installed_kernel_is_taken(monkeypatch, tmp_path, capability, files, kernel):
    """What a GPU says of itself and packages that need one cannot be had here: both are played."""
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    for file in files:
        path = tmp_path / "flash_attn" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("def flash_attn_varlen_func(): pass\n", encoding="utf-8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    found = attention.attention_kernel("cuda", True)
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        sys.modules.pop(name)
    assert found == getattr(attention, kernel)


def test_other_architectures_and_the_plain_way_are_left_alone(model):
    settings = pipeline.PageSettings()
    assert pipeline.trains_fast(model.config, settings)
    assert not pipeline.trains_fast(model.config, pipeline.PageSettings(fast=False))
    model.config.model_type = "qwen3_vl"
    assert not pipeline.trains_fast(model.config, settings)


def test_pages_are_dealt_out_by_cost():
    rng, dealt, blind = random.Random(0), 0.0, 0.0
    for bins in (2, 3, 8) * 20:
        costs = [rng.lognormvariate(0, 0.8) for _ in range(24)]
        groups = memory_plan.deal(costs, bins)
        assert sorted(place for group in groups for place in group) == list(range(24))
        assert {len(group) for group in groups} == {24 // bins}
        sums = [sum(costs[place] for place in group) for group in groups]
        assert sums == sorted(sums, reverse=True)
        dealt += max(sums)  # all ranks wait for the dearest group
        blind += max(sum(costs[start::bins]) for start in range(bins))
    assert dealt < 0.85 * blind
    assert [len(group) for group in memory_plan.deal([1.0] * 7, 3)] == [3, 2, 2]


def shapes_of_3b():
    from transformers import Qwen2_5_VLConfig

    text = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
    text |= {"num_key_value_heads": 2, "vocab_size": 151_936}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
    vision |= {"fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)


def test_cost_of_a_page_is_the_published_formula():
    """Holo1-3B: 2.775e9 weights in the language layers, 3.11e8 in the head, 0.63e9 in the vision tower."""
    config = shapes_of_3b()
    language, head, tower, merger = memory_plan.parameters(config)
    assert (language, head) == (pytest.approx(2.775e9, rel=2e-3), pytest.approx(3.11e8, rel=2e-3))
    assert tower == pytest.approx(0.63e9, rel=0.02) and merger == pytest.approx(3.67e7, rel=0.01)
    tokens, supervised, patches = 2_800, 1_500, 5_000
    products = 6 * (2.775e9 * tokens + 3.11e8 * supervised) + 6 * 0.63e9 * patches
    attention = 12 * 36 * 2048 * tokens**2 / 2 + 12 * 1280 * patches * (4 * patches + 28 * 64)
    assert memory_plan.page_flops(config, tokens, supervised, patches) == pytest.approx(products + attention, rel=0.02)


@pytest.mark.parametrize(
    ("share", "threshold", "whole"), [(1.0, "auto", True), (1.0, 100_000, False), (0.3, "auto", False)]
)
def test_weights_are_gathered_once_per_step_where_they_fit(share, threshold, whole, processor, monkeypatch):
    """Two H200s of which torch may use a share. No GPU here, so what torch says of one is given; the plan is real."""
    import datasets

    cuda = {"get_device_properties": SimpleNamespace(total_memory=140 * 2**30), "get_device_name": "NVIDIA H200"}
    for name, answer in (cuda | {"get_per_process_memory_fraction": share}).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    monkeypatch.setattr(pipeline, "world_size", lambda: 2)
    zero = {"stage": 3, zero3.THRESHOLD: threshold}
    args = SimpleNamespace(
        device=torch.device("cuda"),
        deepspeed="ds_z3.json",
        hf_deepspeed_config=SimpleNamespace(config={"zero_optimization": zero}),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
    )
    pages = datasets.Dataset.from_dict({"html_tokens": [2_000] * 20, "image_tokens": [1_200] * 20})
    encoder = pipeline.PageEncoder(processor, "Write the page.")
    plan = pipeline.choose_micro_batch(args, pipeline.PageSettings(), shapes_of_3b(), pages, encoder)
    assert plan.way.whole == whole
    assert zero[zero3.THRESHOLD] == (10**11 if whole else threshold)
    assert plan.total <= memory_plan.MEMORY_SHARE * share * 140
    assert plan.parts["gathered"] == pytest.approx(7.0 if whole else 1.86, rel=0.02)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 8
