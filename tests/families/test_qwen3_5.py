"""Qwen3.5's fast path is the model's own way, faster: packed pages, linear attention included."""

import copy
import io
import random

import pytest
import torch
from conftest import make_qwen3_5_config, make_qwen3_5_processor, page_html

import holo1_dom_finetune as pipeline
from families import chunked_loss, family_of
from training import fast_layers
from training.prompt_and_mask import PageEncoder


@pytest.fixture(scope="module")
def processor():
    return make_qwen3_5_processor()


@pytest.fixture(scope="module")
def model(processor):
    from transformers import Qwen3_5ForConditionalGeneration

    torch.manual_seed(0)
    made = Qwen3_5ForConditionalGeneration(make_qwen3_5_config(processor.tokenizer)).float()
    for name, parameter in made.named_parameters():  # norms begin at 0, and gates where states last a token or two
        if parameter.dim() == 1 and "norm" in name:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.3)
        elif name.endswith("dt_bias"):
            torch.nn.init.constant_(parameter, -4.0)
    return made


def pages(count: int, seed: int = 0) -> list[dict]:
    from PIL import Image

    rng, made = random.Random(seed), []
    for number in range(count):
        file = io.BytesIO()
        noise = rng.randbytes(3)
        Image.new("RGB", (rng.randint(30, 300), rng.randint(30, 300)), tuple(noise)).save(file, "PNG")
        made.append({"name": str(number), "screenshot": file.getvalue(), "html": page_html(rng)})
    return made


def collate(processor, made, packed=False):
    encoder = PageEncoder(processor, "write this page", family_of("qwen3_5"))
    config = make_qwen3_5_config(processor.tokenizer)
    batch = pipeline.PageCollator(processor, encoder, made, 4, config=config, packed=packed)(made)
    assert batch.pop("flops") > 0 and batch.pop("pages")
    return batch


def fast_twin(model, fuse: bool = False):
    twin = copy.deepcopy(model)
    fast_layers.align_vision_mlp(twin)
    fast_layers.install(twin, fuse)
    return twin


def gradients(model, batch, shapes) -> dict:
    model.zero_grad()
    mean = model(**batch).loss
    mean.backward()
    found = {name: fast_layers.narrowed(part.grad.clone(), shapes[name]) for name, part in model.named_parameters()}
    return {"loss": mean.detach(), **found}


def worst(first: dict, second: dict) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def test_packed_pages_give_the_models_own_loss_and_gradients(processor, model, monkeypatch):
    """Everything together: both kinds of attention, norms, gates, positions in a part of a head, chunks of the loss."""
    monkeypatch.setattr(chunked_loss, "LOSS_ROWS", 50)
    made, shapes = pages(5), {name: part.shape for name, part in model.named_parameters()}
    plain, twin = gradients(model, collate(processor, made), shapes), fast_twin(model)
    fast = gradients(twin, collate(processor, made, packed=True), shapes)
    assert worst(plain, fast) <= 1e-5
    # Some are as small as that: of its own size each differs by less, too.
    assert all((fast[name] - part).norm() <= 1e-4 * part.norm() for name, part in plain.items())
