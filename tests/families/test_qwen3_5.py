"""What Qwen3.5 has of its own on the fast path; what it shares is in test_fast_parts.py."""

from dataclasses import replace

import pytest
import torch
from conftest import Tiny
from test_fast_parts import fast_twin

from families import family_of, qwen3_5_layers
from families.page_costs import LinearAttention
from training import memory_plan


class KeepsAsKernels(torch.autograd.Function):
    """Stands for flash-linear-attention's: keeps what goes in, queries, keys and values apart, and rows of chunks."""

    @staticmethod
    def forward(ctx, mixed, write, decay, shape):
        chunks, gates = (mixed.new_empty(len(mixed), count, shape.value_heads) for count in (64, 2))
        # Gates in fp32, as all is here: in half precision each counts twice.
        ctx.save_for_backward(mixed, write, decay, mixed.clone(), chunks, gates, gates.clone())
        values = shape.value_heads * shape.value_width
        return mixed[:, -values:].clone().unflatten(1, (shape.value_heads, shape.value_width))

    @staticmethod
    def backward(ctx, gradient):
        return None, None, None, None


def test_a_layer_of_linear_attention_keeps_what_the_memory_plan_counts(monkeypatch):
    twin, kept, rows = fast_twin(Tiny("qwen3_5").model()), {}, 300

    def stand_in(given, shape, _):
        return KeepsAsKernels.apply(given.mixed, given.write, given.decay, shape)

    monkeypatch.setattr(qwen3_5_layers, "gated_delta", stand_in)
    known = {parameter.data_ptr() for parameter in twin.parameters()}
    tower = family_of("qwen3_5").shape(twin.config).language

    def keep(tensor):
        if tensor.data_ptr() not in known and tensor.numel() > 1000:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hidden = torch.randn(rows, tower.hidden, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer = twin.model.language_model.layers[0]
        layer(hidden[None] * 1, position_embeddings=None, page_bounds=None, longest_page=rows)
    planned = 2 * memory_plan.layer_bytes(tower, adapters=False, linear=True)  # fp32 here, half precision there
    assert sum(kept.values()) / rows == pytest.approx(planned, rel=0.02)


def test_what_the_backward_pass_makes_of_a_layer_is_in_the_plan():
    """Of Qwen3.5-4B's layers, which were measured on an H100: 8,800 tokens, what is kept and made, 1.29 GiB."""
    linear = LinearAttention(layers=24, keys=2_048, values=4_096, heads=32, state=128)
    assert 2 * 8_800 * (linear.kept + linear.made) / 2**30 == pytest.approx(1.29, rel=0.02)
    shape = family_of("qwen3_5").shape(Tiny("qwen3_5").model().config)
    load, way = memory_plan.Load(10_000, 0, 2_000), memory_plan.Way(micro_batch=1, recomputed=1.0)
    without = replace(shape, language=replace(shape.language, linear=NothingMade(**vars(shape.language.linear))))
    more = memory_plan.activations(shape, load, way) - memory_plan.activations(without, load, way)
    assert more == 2 * 10_000 * shape.language.linear.made > 0


class NothingMade(LinearAttention):
    made = 0
