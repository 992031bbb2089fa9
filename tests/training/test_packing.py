"""A row of packed pages, entry by entry, and positions and geometry as the model's own."""

import contextlib
import random
import sys

import pytest
import torch
from conftest import Tiny

from families import FAMILIES, family_of
from kernels.positions import page_positions
from training import packing
from training.prompt_and_mask import PageEncoder


def test_a_pack_is_written_out_whole():
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


# What the tower's own forward works out, by the function that does, and by what it is called in a batch.
GEOMETRY = {
    "get_vision_position_ids": ["image_position_ids"],
    "get_vision_attention_seqlens": ["image_cu_seqlens"],
    "get_vision_window_index": ["image_window_index", "image_cu_window_seqlens"],
    "get_vision_interpolation_indices_and_weights": ["image_interp_indices", "image_interp_bits"],
}


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if family_of(name).fast])
def test_positions_and_geometry_equal_the_models_own_for_200_sizes(family, monkeypatch):
    """The model computes them itself in a forward pass; what it computed is caught and compared."""
    tiny, rng, caught = Tiny(family), random.Random(1), {}
    model, encoder = tiny.model(), PageEncoder(tiny.processor, "write this page", family_of(family))
    own = sys.modules[type(model).__module__]
    for function in GEOMETRY.keys() & vars(own).keys():
        real = getattr(own, function)

        def keep(*given, function=function, real=real, **options):
            caught[function] = real(*given, **options)
            return caught[function]

        monkeypatch.setattr(own, function, keep)
    geometry, tower = family_of(family).geometry(model.config), model.model.visual
    tower.blocks, tower.merger = torch.nn.ModuleList(), torch.nn.Identity()  # only the geometry is looked at
    patch = family_of(family).shape(model.config).patch
    for _ in range(200):
        rows, columns = rng.randint(2, 40), rng.randint(2, 40)
        grids = torch.tensor([[1, 2 * rows, 2 * columns]])
        ids, _ = encoder.encode("<p>river</p>", [encoder.image_token_id] * (rows * columns))
        ids = torch.tensor([ids])
        kinds = (ids == encoder.image_token_id).long()
        positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grids)
        made = page_positions(len(encoder.before), rows, columns, ids.shape[1])
        assert torch.equal(made[1:], positions[:, 0]) and torch.equal(made[0], torch.arange(ids.shape[1]))
        with torch.no_grad(), contextlib.suppress(IndexError):  # without blocks the merged rows may be too many
            tower(torch.zeros(4 * rows * columns, patch), grid_thw=grids)
        ready, wanted = geometry(grids), {}
        for function, found in caught.items():
            wanted |= dict(zip(GEOMETRY[function], found if isinstance(found, tuple) else [found]))
        for name in [name for name in wanted if name.endswith("seqlens")]:
            wanted[name.replace("cu_", "max_").removesuffix("s")] = wanted[name].diff().max()
        assert not [key for key in ready if torch.is_floating_point(torch.as_tensor(ready[key]))], "would be rounded"
        if "image_interp_bits" in ready:
            ready["image_interp_bits"] = ready["image_interp_bits"].view(torch.float32)
        assert ready.keys() == wanted.keys() and len(caught) >= 3
        assert all((torch.as_tensor(ready[key]) == wanted[key]).all() for key in ready)
