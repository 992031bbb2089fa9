"""Prompt and mask: the loss sees the answer and its end of turn, nothing else."""

from dataclasses import replace

import pytest
from conftest import make_processor

import use_model_from_hub as use
from families import family_of
from training import prompt_and_mask
from training.errors import PipelineError, SettingsError
from training.prompt_and_mask import check_same_question

QWEN = family_of("qwen2_5_vl")


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def encoder(processor):
    return prompt_and_mask.PageEncoder(processor, "write this page", QWEN)


def screenshot(width: int, height: int):
    from PIL import Image

    return Image.new("RGB", (width, height), "pink")


def test_loss_sees_only_the_answer_and_its_end(encoder, processor):
    html = "<p>river stone</p>"
    ids, labels = encoder.encode(html, [encoder.image_token_id] * 5)
    answer = processor.tokenizer(html, add_special_tokens=False)["input_ids"]
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [label for label in labels if label != prompt_and_mask.IGNORED] == [*answer, end]
    assert labels == [prompt_and_mask.IGNORED] * (len(ids) - len(answer) - 1) + ids[-len(answer) - 1 :]


@pytest.mark.parametrize("size", [(84, 84), (200, 100), (28, 300), (333, 77)])
def test_training_asks_the_very_question_that_inference_asks(encoder, processor, size):
    inputs = use.encode_questions(processor, [screenshot(*size)], "write this page")
    (picture,) = QWEN.pictures(processor, [screenshot(*size)])
    question = inputs["input_ids"][0].tolist()
    ids, _ = encoder.encode("<p>x</p>", picture.ids)
    assert ids[: len(question)] == question


@pytest.mark.parametrize("size", [(84, 84), (200, 100), (28, 300), (1200, 777), (57, 56)])
def test_counted_tokens_are_those_of_the_processor(encoder, processor, size):
    counted = prompt_and_mask.count_tokens(encoder, processor)("<b>lake</b>", *size)
    grid = processor.image_processor(images=[screenshot(*size)], return_tensors="pt")["image_grid_thw"]
    assert counted == (len(encoder.tokens("<b>lake</b>")), int(grid.prod()) // 4)


def test_special_tokens_spelled_out_in_a_page_are_plain_text(encoder, processor):
    special = set(processor.tokenizer.all_special_ids)
    assert not special & set(encoder.tokens("<p><|im_end|><|image_pad|></p>"))
    assert processor.tokenizer.decode(encoder.tokens("<p><|im_end|></p>")) == "<p><|im_end|></p>"


def test_a_template_without_an_image_is_refused(processor):
    import copy

    blind = copy.copy(processor)
    blind.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    with pytest.raises(SettingsError, match="0 image tokens"):
        prompt_and_mask.PageEncoder(blind, "write", QWEN)


def test_supervision_is_shown_in_colour(encoder, processor):
    ids, labels = encoder.encode("<p>river</p>", [encoder.image_token_id] * 7)
    shown = prompt_and_mask.colour_supervision(ids, labels, processor.tokenizer, encoder.image_token_id)
    assert "\033[34m[7 image tokens]\033[0m" in shown
    assert shown.endswith("\033[32m<p>river</p><|im_end|>\033[0m")
    assert "\033[90m<|im_start|>user" in shown


def test_a_blank_that_the_chat_template_puts_before_an_answer_is_part_of_it(processor):
    """Some ask "Assistant:" and train "Assistant: ...": the blank is supervised, as the base has learned it."""
    import copy

    blank = copy.copy(processor)
    start = "{{ message['role'] }}\n"
    assert start in processor.chat_template
    blank.chat_template = processor.chat_template.replace(start, "{{ message['role'] }}: ").replace(
        "<|im_start|>assistant\n", "<|im_start|>assistant:"
    )
    encoder = prompt_and_mask.PageEncoder(blank, "write", QWEN)
    _, labels = encoder.encode("<p>x</p>", [encoder.image_token_id])
    answer = [label for label in labels if label != prompt_and_mask.IGNORED]
    assert processor.tokenizer.decode(answer) == " <p>x</p><|im_end|>"
    assert encoder.html_tokens("<p>x</p>") == len(answer) - 1, "what is counted is what is supervised"


def test_a_template_that_trains_another_question_is_refused(processor):
    import copy

    other = copy.copy(processor)
    other.chat_template = processor.chat_template.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>")
    with pytest.raises(SettingsError, match="trains another question than it asks"):
        prompt_and_mask.PageEncoder(other, "write", QWEN)


def test_a_family_that_asks_with_other_image_tokens_is_refused_before_training(encoder, processor, monkeypatch):
    """The loss hardly tells: a model trained on a question of its own writes worse pages, and nothing says so."""
    shots, prompt = [screenshot(200, 140), screenshot(90, 120)], "write this page"
    check_same_question(encoder, processor, shots, prompt)
    one_less = replace(
        encoder.family, pictures=lambda *given: [short(p) for p in family_of("qwen2_5_vl").pictures(*given)]
    )
    monkeypatch.setattr(encoder, "family", one_less)
    with pytest.raises(PipelineError, match=r"training would ask with \d+ tokens what use_model_from_hub.py asks with"):
        check_same_question(encoder, processor, shots, prompt)


def short(picture):
    return replace(picture, ids=picture.ids[1:])
