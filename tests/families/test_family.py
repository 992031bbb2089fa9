"""Families: what each says of its architecture is what the true processor and the true modules do."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import (
    PROGRAMS,
    TINY,
    make_qwen3_5_base,
    make_qwen3_5_processor,
    make_qwen3_vl_base,
    output,
    run_script,
    small_run,
    start_plain,
    weights,
)

import use_model_from_hub as use
from families import FAMILIES, FamilyError, family_of, trains_fast
from families.page_costs import parameters
from training.prompt_and_mask import IGNORED, PageEncoder, check_same_question
from training.settings import PageSettings

LIMIT = 1_003_520  # the default --max_pixels


def make_model(name: str):
    """A tiny model of the true architecture on no device, and its processor."""
    from transformers import AutoModelForImageTextToText

    processor, config = TINY[name][0](), TINY[name][1]
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config(processor.tokenizer)), processor


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def made(request):
    model, processor = make_model(request.param)
    return family_of(request.param), model, processor


def screenshot(width: int, height: int):
    from PIL import Image

    return Image.new("RGB", (width, height), "pink")


def test_every_family_is_found_by_its_model_type_and_by_a_configuration(made):
    family, model, _ = made
    assert family_of(model.config) is family
    assert family.model_type == model.config.model_type


def test_an_unknown_architecture_is_refused_by_name_with_what_to_do():
    with pytest.raises(FamilyError, match=r"a llama; .*qwen2_5_vl.*write families/llama\.py as"):
        family_of("llama")


@pytest.mark.parametrize(("name", "dense"), [("qwen3_vl_moe", "qwen3_vl"), ("qwen3_5_moe", "qwen3_5")])
def test_a_mixture_of_experts_is_refused_with_the_dense_one_that_trains(name, dense):
    with pytest.raises(FamilyError, match=rf"^a {name}, a mixture of experts.* give a dense .*\({dense}\)"):
        family_of(name)


@pytest.mark.parametrize("size", [(1280, 784), (2000, 500), (900, 1115), (5000, 3000), (64, 64), (333, 77)])
def test_image_tokens_are_counted_as_the_processor_makes_them(made, size):
    family, model, processor = made
    family.limit_pixels(processor, 3_136, LIMIT)
    (picture,) = family.pictures(processor, [screenshot(*size)])
    assert processor.image_token_id in picture.ids
    assert family.image_tokens(processor, *size) == len(picture.ids) <= family.most_image_tokens(model.config, LIMIT)


@pytest.mark.parametrize(("name", "tokens"), [("qwen2_5_vl", 1_280), ("qwen3_vl", 980), ("qwen3_5", 980)])
def test_the_most_image_tokens_are_reached_and_never_exceeded(name, tokens):
    family, (model, processor) = family_of(name), make_model(name)
    family.limit_pixels(processor, 3_136, LIMIT)
    assert family.most_image_tokens(model.config, LIMIT) == tokens
    (picture,) = family.pictures(processor, [screenshot(1120, 896)])
    assert family.image_tokens(processor, 1120, 896) == len(picture.ids) == tokens
    assert len(picture.inputs["pixel_values"]) == tokens * family.shape(model.config).per_token
    assert max(family.image_tokens(processor, width, 4_000) for width in range(500, 6_000, 37)) <= tokens


def test_joined_pictures_are_what_the_processor_makes_of_all_together(made):
    family, _, processor = made
    screenshots = [screenshot(84, 112), screenshot(200, 140)]
    joined = family.join(family.pictures(processor, screenshots))
    together = processor.image_processor(images=[[picture] for picture in screenshots], return_tensors="pt")
    assert joined.keys() == set(together)
    assert all(torch.equal(joined[name], together[name]) for name in joined)


def test_the_model_takes_token_types_where_the_family_says_so(made):
    family, _, processor = made
    assert family.token_types == ("mm_token_type_ids" in processor.model_input_names)


def test_the_vision_tower_is_everything_but_the_language_model_and_the_head(made):
    family, model, _ = made
    inside = {parameter for part in family.vision_modules(model) for parameter in part.parameters()}
    language = {*model.get_decoder().parameters(), *model.lm_head.parameters()}
    assert inside == {*model.parameters()} - language


def test_a_vision_tower_of_another_name_is_an_error(made):
    from dataclasses import replace

    family, model, _ = made
    with pytest.raises(FamilyError, match=r"has no model\.eyes: correct families/"):
        replace(family, vision=("model.eyes",)).vision_modules(model)


def test_adapters_go_into_the_language_models_own_projections(made):
    family, model, _ = made
    adapted = {module for name, module in model.named_modules() if re.fullmatch(family.adapters, name)}
    text = model.config.get_text_config()
    # Query, key, value and output, or what is mixed, its gate and output; the MLP's three.
    linear = getattr(text, "layer_types", []).count("linear_attention")
    assert len(adapted) == 7 * text.num_hidden_layers - linear
    assert adapted <= {*model.get_decoder().modules()}


def test_a_model_that_thinks_is_asked_for_its_answer_alone():
    processor = make_qwen3_5_processor()
    encoder = PageEncoder(processor, "write this page", family_of("qwen3_5"))
    after = "<|vision_end|>write this page<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert processor.tokenizer.decode(encoder.after) == after
    labels = encoder.encode("<p>page</p>", [])[1]
    seen = [token for token in labels if token != IGNORED]
    assert processor.tokenizer.decode(seen) == "<p>page</p><|im_end|>"
    check_same_question(encoder, processor, [screenshot(90, 60)], "write this page")


def test_costs_count_every_weight_that_multiplies(made):
    """All but norms, biases, embeddings: those of linear layers and of the convolution that reads the patches."""
    family, model, _ = made
    language, head, tower, merger = parameters(family.shape(model.config))
    counted = {"language": 0, "head": 0, "tower": 0, "merger": 0}
    seen = {module for part in family.vision_modules(model) for module in part.modules()}
    for name, module in model.named_modules():
        # Four numbers a channel: no convolution of Qwen3.5's language layers.
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d):
            merging = "merger" if re.search("merger|connector", name) else "tower" if module in seen else "language"
            counted["head" if name == "lm_head" else merging] += module.weight.numel()
    assert counted == {"language": language, "head": head, "tower": tower, "merger": merger}


def test_only_the_families_with_a_fast_path_take_it(made):
    family, model, _ = made
    assert trains_fast(model.config, PageSettings()) == family.fast
    assert not trains_fast(model.config, PageSettings(fast=False))


def test_families_need_no_torch(tmp_path):
    done = run_script(str(PROGRAMS / "imports_no_torch.py"), *FAMILIES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("make_base", [make_qwen3_vl_base, make_qwen3_5_base])
def test_another_family_is_trained_saved_and_loaded_again(make_base, pages_folder, tmp_path):
    """The true architecture, two layers deep, through the real main: the fast path, from its base to its pages."""
    base = make_base(tmp_path / "base")
    rates = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0, "num_train_epochs": 3}
    done = start_plain(small_run(base, pages_folder, gradient_accumulation_steps=2, **rates), tmp_path)
    assert done.returncode == 0, output(done)
    assert "fast path: pages packed" in done.stdout
    assert ("linear attention by" in done.stdout) == (make_base is make_qwen3_5_base)
    losses = [float(line.split("loss ")[1].split()[0]) for line in done.stdout.splitlines() if line.startswith("step ")]
    assert losses[-1] < losses[0] - 0.1, losses
    final = tmp_path / "holo1_dom_finetune_final"
    built_on = {make_qwen3_vl_base: "Qwen3-VL", make_qwen3_5_base: "Qwen3.5"}[make_base]
    assert json.loads((final / "dom_recipe.json").read_text())["base_built_on"] == built_on
    before, after = weights(base), weights(final)
    assert {key: (value.shape, value.dtype) for key, value in after.items()} == {
        key: (value.shape, value.dtype) for key, value in before.items()
    }
    changed = [key for key, value in after.items() if not torch.equal(value, before[key])]
    assert any("visual" in key for key in changed) and any("language_model" in key for key in changed)
    loaded = subprocess.run(
        [sys.executable, str(PROGRAMS / "loads_anywhere.py")], cwd=tmp_path, capture_output=True, text=True
    )
    assert loaded.returncode == 0, loaded.stderr
    model, processor = use.load_model(str(final), use.Recipe(max_pixels=280 * 280))
    (page,) = use.write_pages(model, processor, [screenshot(200, 140)], use.Recipe(max_html_tokens=4))
    assert page.tokens <= 4
