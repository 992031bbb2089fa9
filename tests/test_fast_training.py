"""Fast training changes nothing: each part equals the model's own way."""

import random

import pytest
import torch
from conftest import make_config, make_processor, page_html

import fast_training
import holo1_dom_finetune as pipeline


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


def collate(processor, made, geometry=None):
    encoder = pipeline.PageEncoder(processor, "write this page")
    return pipeline.PageCollator(processor, encoder, made, 4, geometry=geometry)(made)


def gradients(model, batch) -> dict:
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return {"logits": output.logits.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}


def test_segments_and_ready_made_geometry_give_the_models_own_gradients(processor, model):
    made = pages(5)
    plain = gradients(model, collate(processor, made))
    assert fast_training.use_segment_attention(model)
    fast = gradients(model, collate(processor, made, fast_training.image_geometry(model.config)))
    real = collate(processor, made)["attention_mask"].bool()
    assert torch.allclose(plain.pop("logits")[real], fast.pop("logits")[real], atol=1e-5)
    worst = {name: (plain[name] - fast[name]).abs().max().item() for name in plain}
    assert max(worst.values()) <= 1e-5, worst


def test_positions_equal_the_models_own_for_200_sizes(processor, model):
    encoder, rng = pipeline.PageEncoder(processor, "write this page"), random.Random(1)
    geometry = fast_training.image_geometry(model.config)
    for _ in range(200):
        rows, columns = rng.randint(2, 40), rng.randint(2, 40)
        grids = torch.tensor([[1, 2 * rows, 2 * columns]])
        ids, _ = encoder.encode("<p>river</p>", rows * columns)
        ids = torch.tensor([ids])
        kinds = (ids == encoder.image_token_id).long()
        own, _ = model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grids)
        made = fast_training.page_positions(len(encoder.before), rows, columns, ids.shape[1])
        assert torch.equal(made[1:], own[:, 0]) and torch.equal(made[0], torch.arange(ids.shape[1]))
        ready = geometry(grids)
        assert sorted(ready["image_window_index"].tolist()) == list(range(rows * columns))
        assert ready["image_cu_window_seqlens"][-1] == ready["image_cu_seqlens"][-1] == 4 * rows * columns


def test_a_segment_sees_nothing_of_its_neighbours():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 12, 8)
    bounds = [0, 3, 8, 12]
    before = fast_training.equal_segments_together(query, key, value, 0.3, bounds)
    changed = [tensor.clone() for tensor in (query, key, value)]
    for tensor in changed:
        tensor[:, 3:8] += 1
    after = fast_training.equal_segments_together(*changed, 0.3, bounds)
    assert torch.equal(before[:3], after[:3]) and torch.equal(before[8:], after[8:])
    assert not torch.allclose(before[3:8], after[3:8])


def test_other_architectures_are_left_alone(model):
    model.config.vision_config.model_type = "qwen3_vl_vision"
    assert not fast_training.use_segment_attention(model)
    assert fast_training.image_geometry(model.config) is None
