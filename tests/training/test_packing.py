"""A row of packed pages, entry by entry, and positions and geometry as the model's own."""

import contextlib
import random

import pytest
import torch
from conftest import make_config, make_processor

from families import family_of
from kernels.positions import image_geometry, page_positions
from training import packing
from training.prompt_and_mask import PageEncoder


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture
def model(processor):
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(make_config(processor.tokenizer)).float()


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


@pytest.mark.slow
def test_positions_and_geometry_equal_the_models_own_for_200_sizes(processor, model, monkeypatch):
    """The model computes them itself in a forward pass; what it computed is caught and compared."""
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl as own

    encoder, rng, caught = PageEncoder(processor, "write this page", family_of("qwen2_5_vl")), random.Random(1), {}
    for name in ("get_vision_position_ids", "get_vision_attention_seqlens", "get_vision_window_index"):
        real = getattr(own, name)

        def keep(*given, name=name, real=real, **options):
            caught[name] = real(*given, **options)
            return caught[name]

        monkeypatch.setattr(own, name, keep)
    geometry, tower = image_geometry(model.config), model.model.visual
    tower.blocks, tower.merger = torch.nn.ModuleList(), torch.nn.Identity()  # only the geometry is looked at
    tower.forward_windows = None
    for _ in range(200):
        rows, columns = rng.randint(2, 40), rng.randint(2, 40)
        grids = torch.tensor([[1, 2 * rows, 2 * columns]])
        ids, _ = encoder.encode("<p>river</p>", [encoder.image_token_id] * (rows * columns))
        ids = torch.tensor([ids])
        kinds = (ids == encoder.image_token_id).long()
        positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grids)
        made = page_positions(len(encoder.before), rows, columns, ids.shape[1])
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
