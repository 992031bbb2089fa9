"""What a layer of a published model's shapes keeps for its backward pass, counted, beside what the memory plan says.

By the code that a GPU runs, in bf16, on tensors without numbers: all that stands in for anything is the launch of a
kernel, and flash-attn 4.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks.make_shapes import SHAPES, make_config
from families import family_of
from kernels import attention
from training import fast_layers, memory_plan

ROWS = 640  # ten windows


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
