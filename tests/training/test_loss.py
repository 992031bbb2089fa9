"""The loss by the model's own way, in little memory."""

import io
import random

import pytest
import torch
from conftest import make_config, make_processor, page_html
from PIL import Image

import holo1_dom_finetune as pipeline
from families import family_of
from training import loss
from training.prompt_and_mask import PageEncoder


def test_the_plain_loss_is_the_models_own_without_all_of_its_logits(monkeypatch):
    """Before training a model's own loss must not take more memory than training does."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    processor = make_processor()
    model = Qwen2_5_VLForConditionalGeneration(make_config(processor.tokenizer)).float().eval()
    encoder = PageEncoder(processor, "write", family_of("qwen2_5_vl"))
    file = io.BytesIO()
    Image.new("RGB", (90, 60), "navy").save(file, "PNG")
    pages = [{"name": str(n), "screenshot": file.getvalue(), "html": page_html(random.Random(n))} for n in (1, 2)]
    collate = pipeline.PageCollator(processor, encoder, pages, 2)
    with torch.no_grad():
        wanted = model(**collate(pages)).loss
    rows, batches = [], [collate([page]) for page in pages]
    model.lm_head.register_forward_hook(lambda module, given, logits: rows.append(logits.shape[:2]))
    monkeypatch.setattr(loss, "LOSS_ROWS", 7)
    assert loss.plain_loss(model, batches).item() == pytest.approx(wanted.item(), abs=1e-5)
    assert rows == [(1, int((batch["labels"] != -100).sum())) for batch in batches]
