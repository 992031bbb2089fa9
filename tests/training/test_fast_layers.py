"""The fast path put into a model: which models take it, and vision MLPs that are wider and the same."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import Tiny

from families import FAMILIES, family_of, trains_fast
from training import fast_layers
from training.base_model import BaseTensor
from training.final_folder import final_tensors
from training.settings import PageSettings


@pytest.fixture(scope="module", params=[name for name in FAMILIES if family_of(name).fast])
def tiny(request):
    return Tiny(request.param)


@pytest.fixture
def model(tiny):
    return tiny.model()


def test_the_widened_vision_mlp_is_the_same_function_and_saves_the_same_shapes(tiny, model):
    twin = copy.deepcopy(model)
    assert fast_layers.align_vision_mlp(twin) == 64, "60 in the base"
    batch = tiny.collate(tiny.pages(3))
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, twin(**batch).logits, atol=1e-6)
    plan = {name: BaseTensor(name, tuple(p.shape), "F32", None) for name, p in model.named_parameters()}
    saved = {key: tensor for key, _, tensor in final_tensors(twin, plan)}
    for name, parameter in model.named_parameters():
        assert torch.equal(saved[name], parameter), name
    assert next(twin.model.visual.blocks[0].mlp.children()).weight.shape == (64, 32)
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
    assert not replace(family_of(model.config), architecture=None).fast
