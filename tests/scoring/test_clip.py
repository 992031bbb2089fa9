"""CLIP: what it sees of a page, and what becomes of the scores with it."""

import numpy as np
import pytest

from scoring.blocks import job_for, page_of
from scoring.clip import Clip, find_clip
from scoring.proof import prove
from scoring.statistics import means


def test_clip_does_not_see_texts_but_what_is_around_them(renderer, tiny_clip):
    import torch
    from transformers import CLIPImageProcessor, CLIPModel

    clip = Clip(tiny_clip)
    page = "<!DOCTYPE html><html><body style='background:#fff'><p>{}</p><div style='{}'></div></body></html>"
    shape = "width:600px;height:400px;background:#c33"
    pages = [page.format(*parts) for parts in (("One", shape), ("Two", shape), ("One", ""))]
    one, two, empty = map(page_of, renderer.map(map(job_for, pages)), pages)
    assert clip(one, one) == pytest.approx(1, abs=1e-6)
    assert clip(one, empty) < clip(one, two)
    assert np.asarray(clip.without_texts(one)).shape == (720, 720, 3)
    inked, left = empty.image.min(axis=2) < 200, np.asarray(clip.without_texts(empty)).min(axis=2) < 200
    assert inked.sum() > 50 and left.sum() <= inked.sum() / 5, "the text is painted over"
    with torch.no_grad():  # the library's own way, on the same pictures
        processor, model = CLIPImageProcessor.from_pretrained(tiny_clip), CLIPModel.from_pretrained(tiny_clip).eval()
        inputs = processor(images=[clip.without_texts(page) for page in (one, empty)], return_tensors="pt")
        features = model.get_image_features(**inputs)
        features = features if torch.is_tensor(features) else features.pooler_output
    wanted = torch.nn.functional.cosine_similarity(*features, dim=0)
    assert clip(one, empty) == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.slow
def test_clip_is_a_fifth_of_the_mean_and_its_absence_is_said(recorded, tiny_clip):
    assert "hf download nobody/nothing" in find_clip("nobody/nothing")[1]
    clip = Clip(tiny_clip)
    found = prove(recorded, clip=clip)["6 moved"]
    four = [found[name] for name in ("block", "text", "position", "color")]
    assert (
        found["overall"] == pytest.approx((sum(four) + found["clip"]) / 5) and found.as_json()["clip"] == found["clip"]
    )
    assert "clip" not in prove(recorded)["6 moved"].as_json()
    rows = [found.as_json() | {"page": "a"}, prove(recorded, clip=clip)["not rendered"].as_json()]
    assert means(rows)["clip"] == pytest.approx(found["clip"] / 2)
