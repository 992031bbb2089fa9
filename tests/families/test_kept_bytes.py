"""What a layer of a published model's shapes keeps for its backward pass, counted, beside what the memory plan says.

By the code that a GPU runs, in bf16, on tensors without numbers: all that stands in for anything is the launch of a
kernel, flash-attn 4, and beside adapters what torch.compile makes of two functions.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.make_shapes import SHAPES, make_config
from families import elementwise, family_of
from holo1_dom_finetune import add_adapters
from kernels import attention
from training import fast_layers, memory_plan, zero3
from training.memory_plan import Load, Way
from training.settings import PageSettings

ROWS = 640  # ten windows, and no width of any model


class Launches:
    """Stands for a kernel: any grid, any arguments, nothing written."""

    def __getitem__(self, grid):
        return lambda *given, **options: None


class Flash(torch.autograd.Function):
    """Stands for flash-attn 4's: keeps query, key, value, output, and a sum for each row and head in fp32."""

    @staticmethod
    def forward(ctx, query, key, value):
        output, sums = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(part) for part in ctx.saved_tensors[:3])


def flash_attn_varlen_func(query, key, value, **lengths):
    assert query.shape[-1] % 32 == 0, "flash-attn 4 has wrong gradients for these heads"
    return Flash.apply(query, key, value)


@pytest.fixture
def play(monkeypatch):
    """A function that lets a model, made before, run as on a GPU: transformers looks for flash-attn as it is loaded."""
    pytest.importorskip("triton", reason="triton is not installed")
    from kernels import rotary_kernel, window_attention

    def begin(model):
        for module in model.modules():
            if hasattr(module, "fused"):
                module.fused.rotate = rotary_kernel.rotate
        for room, name in ((rotary_kernel, "rotate_row"), (window_attention, "see_window")):
            monkeypatch.setattr(room, name, Launches())
        played = ModuleType("flash_attn.cute")
        played.flash_attn_varlen_func = flash_attn_varlen_func
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        monkeypatch.setitem(sys.modules, "flash_attn.cute", played)
        monkeypatch.setattr(attention, "attention_kernel", lambda device, half: attention.FLASH_4)
        monkeypatch.setattr(attention, "agrees", lambda *given, **options: True)
        monkeypatch.setattr(attention, "windows_agree", lambda shapes, dtype, causal: not causal)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # knows no tensors without numbers
        return model

    return begin


def one_of_each(shape: str, **vision_parts: int) -> torch.nn.Module:
    """A model with one layer of each kind, without numbers, on the fast path; other `vision_parts` than the shape's."""
    from transformers import AutoModelForImageTextToText

    config = make_config(shape, SimpleNamespace(convert_tokens_to_ids=lambda name: 1))
    text, vision = config.get_text_config(), config.vision_config
    text.num_hidden_layers, text.vocab_size = 1, 64
    if hasattr(text, "layer_types"):
        text.layer_types = ["full_attention"]
    vision.depth = 2
    for name, value in vision_parts.items():
        setattr(vision, name, value)
    if hasattr(vision, "fullatt_block_indexes"):
        vision.fullatt_block_indexes = [1]
    if hasattr(vision, "deepstack_visual_indexes"):
        vision.deepstack_visual_indexes = [0]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    fast_layers.align_vision_mlp(model)
    fast_layers.install(model, fuse=False)
    return model


def kept_by(layer: torch.nn.Module, hidden: torch.Tensor, angles: torch.Tensor, **options) -> float:
    """Bytes for each row, each storage once, but for weights and positions."""
    others = {part.untyped_storage()._cdata for part in (*layer.parameters(), angles)}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in others and tensor.numel() > ROWS:
            kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other comes to lie there
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden * 1, position_embeddings=(angles, angles), **options)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / ROWS


WIDER = {"hidden_size": 1_152, "intermediate_size": 4_304}  # of the towers of Qwen3-VL-8B and more: 16 heads of 72
WINDOWED = [shape for shape, parts in SHAPES.items() if "window_size" in parts["vision"]]


@pytest.mark.parametrize(
    ("shape", "whole", "parts"),
    [
        *((shape, False, {}) for shape in WINDOWED),
        *((shape, True, {}) for shape in SHAPES),
        *((shape, True, WIDER) for shape in SHAPES if shape not in WINDOWED),
    ],
)
def test_a_layer_of_a_tower_keeps_what_the_plan_counts(shape, whole, parts, play):
    model = play(one_of_each(shape, **parts))
    tower = family_of(model.config).shape(model.config).vision
    layer, heads = model.model.visual.blocks[0], model.config.vision_config.num_heads
    hidden = torch.empty(ROWS, tower.hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
    angles = torch.empty(ROWS, tower.hidden // heads, device="meta")
    longest = ROWS if whole else attention.WINDOW
    bounds = torch.empty(ROWS // longest + 1, dtype=torch.int32, device="meta")
    found = kept_by(layer, hidden, angles, cu_seqlens=bounds, max_seqlen=longest)
    planned = memory_plan.layer_bytes(tower, adapters=False, whole=whole)
    assert found == pytest.approx(planned, rel=0.005), f"{found / planned - 1:+.1%}"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_of_a_language_model_keeps_what_the_plan_counts(shape, play):
    model = play(one_of_each(shape))
    tower, language = family_of(model.config).shape(model.config).language, model.model.language_model
    hidden = torch.empty(1, ROWS, tower.hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
    turned = 2 * len(language.rotary_emb.inv_freq)
    angles = torch.empty(1, ROWS, turned, dtype=torch.bfloat16, device="meta")
    bounds = torch.empty(2, dtype=torch.int32, device="meta")
    found = kept_by(language.layers[0], hidden, angles, page_bounds=bounds, longest_page=ROWS)
    planned = memory_plan.layer_bytes(tower, adapters=False)
    assert found == pytest.approx(planned, rel=0.005), f"{found / planned - 1:+.1%}"


# -----------------------------------------------------------------------------
# Adapters, beside which a layer goes its own way, through peft's products


class Normed(torch.autograd.Function):
    """Stands for what torch.compile makes of a norm: keeps what it reads, and a number for each row."""

    @staticmethod
    def forward(ctx, hidden, weight, epsilon):
        ctx.save_for_backward(hidden, hidden.new_empty(len(hidden), dtype=torch.float32))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx, gradient):
        return torch.empty_like(ctx.saved_tensors[0]), None, None


class Gated(torch.autograd.Function):
    """Stands for what torch.compile makes of `swiglu`: keeps what it reads."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(part) for part in ctx.saved_tensors)


def sizes_kept(function, *given) -> list[tuple[torch.Size, torch.dtype]]:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        function(*given)
    return sorted(((part.numel(), part.dtype) for part in kept if part.dim() > 1 or len(part) == 8), key=str)


def test_what_stands_for_compiled_functions_keeps_what_they_keep():
    rows, gate, up = (torch.randn(8, width).bfloat16().requires_grad_() for width in (16, 32, 32))
    norm = (rows, torch.ones(16, dtype=torch.bfloat16), 1e-6)
    for function, stand_in, given in ((elementwise.rms_norm, Normed, norm), (elementwise.swiglu, Gated, (gate, up))):
        compiled = torch.compile(function, backend="aot_eager_decomp_partition")
        assert sizes_kept(compiled, *given) == sizes_kept(stand_in.apply, *given)


class Living(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside, have ROWS rows and live; the most is `peak`."""

    def __init__(self):
        super().__init__()
        self.made, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, given=(), options=None):
        done = function(*given, **(options or {}))
        for tensor in tree_leaves(done):
            if isinstance(tensor, torch.Tensor) and ROWS in tensor.shape:
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.made = {place: (held, size) for place, (held, size) in self.made.items() if not held.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.made.values()))
        return done


@pytest.fixture
def adapted(play, monkeypatch):
    """A function from a shape to a model with adapters as they are under ZeRO-3, and its family's Shape."""

    def begin(shape):
        model = one_of_each(shape)
        with monkeypatch.context() as under:  # of all that, the adapters' precision is what counts here
            under.setattr(zero3, "is_on", lambda: True)
            inner = add_adapters(model, PageSettings(lora=True), seed=0).get_base_model()
        play(inner)
        for module in inner.modules():
            if hasattr(module, "fused"):
                module.fused.rms_norm, module.fused.swiglu = Normed.apply, Gated.apply
        return inner, family_of(inner.config).shape(inner.config)

    return begin


def passed(model, tower, monkeypatch, recomputed: bool) -> Living:
    """The language model's one layer forward and backward."""
    language, layer = model.model.language_model, model.model.language_model.layers[0]
    monkeypatch.setattr("torch.utils.checkpoint._infer_device_type", lambda *given: "cpu")
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    layer.gradient_checkpointing = recomputed
    hidden = torch.empty(1, ROWS, tower.hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
    angles = torch.empty(1, ROWS, 2 * len(language.rotary_emb.inv_freq), dtype=torch.bfloat16, device="meta")
    bounds = torch.empty(2, dtype=torch.int32, device="meta")
    with Living() as living:
        done = layer(hidden * 1, position_embeddings=(angles, angles), page_bounds=bounds, longest_page=ROWS)
        # Made first, and counted as what is alive: the loss has its own, and lets go of what the layer made.
        gradient, living.peak = torch.empty_like(done), 0
        edge = torch.autograd.graph.get_gradient_edge(done)
        del done
        torch.autograd.backward(edge, gradient)
    return living


@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_with_adapters_keeps_what_the_plan_counts(shape, adapted):
    """peft's were fp32 under ZeRO-3, and each of seven products kept a copy in fp32 of what it read: twice the plan."""
    model, counted = adapted(shape)
    tower, language = counted.language, model.model.language_model
    assert {part.dtype for name, part in model.named_parameters() if "lora_" in name} == {torch.bfloat16}
    hidden = torch.empty(1, ROWS, tower.hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
    angles = torch.empty(1, ROWS, 2 * len(language.rotary_emb.inv_freq), dtype=torch.bfloat16, device="meta")
    bounds = torch.empty(2, dtype=torch.int32, device="meta")
    found = kept_by(language.layers[0], hidden, angles, page_bounds=bounds, longest_page=ROWS)
    planned = memory_plan.layer_bytes(tower, adapters=True)
    assert found == pytest.approx(planned, rel=0.01), f"{found / planned - 1:+.1%}"


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if not shape.startswith("qwen3.5")])
def test_a_backward_pass_with_adapters_takes_what_the_plan_counts(shape, recomputed, adapted, monkeypatch):
    """At its highest; of Qwen3.5's layers more is compiled, and a kernel that no CPU has makes most of it."""
    model, counted = adapted(shape)
    found = passed(model, counted.language, monkeypatch, recomputed).peak / ROWS
    way = Way(adapters=True, recomputed=float(recomputed))
    planned = memory_plan.activations(counted, Load(10**6, 0, 0), way) / 10**6
    assert found == pytest.approx(planned, rel=0.05), f"{found / planned - 1:+.1%}"
