"""What Qwen3.5 has of its own on the fast path; what it shares is in test_fast_parts.py."""

import pytest
import torch
from conftest import Tiny
from test_fast_parts import fast_twin

from families import family_of, qwen3_5_layers
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
