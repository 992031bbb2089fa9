"""Collate: tolerant of full memory and broken pictures, never of a missing one."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_processor, page_html

import holo1_dom_finetune as pipeline
import use_model_from_hub as use
from families import family_of
from training.errors import DataError
from training.prompt_and_mask import IGNORED, PageEncoder

QWEN = family_of("qwen2_5_vl")


def png(width: int, height: int, colour: str) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture
def pages():
    import random

    colours = ["red", "green", "blue", "gold", "pink", "white", "black", "gray", "navy"]
    return [
        {"name": f"page {n}", "screenshot": png(56 + 28 * n, 84, c), "html": page_html(random.Random(n))}
        for n, c in enumerate(colours)
    ]


def make_collate(processor, pages, chunk=4, notes=None):
    return pipeline.PageCollator(processor, PageEncoder(processor, "write", QWEN), pages, chunk, notes)


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def with_image_processor(processor, image_processor):
    known = {name: getattr(processor, name) for name in ("tokenizer", "image_token_id")}
    return SimpleNamespace(image_processor=image_processor, **known)


def limited(collate, limit: int, error: Exception):
    """Let the real image processor work, but fail as a full memory does above `limit` screenshots at once."""
    real, sizes = collate.processor.image_processor, []

    class Limited:
        merge_size = real.merge_size

        def __call__(self, images, **options):
            sizes.append(len(images))
            if len(images) > limit:
                raise error
            return real(images=images, **options)

    collate.processor = with_image_processor(collate.processor, Limited())
    return sizes


def test_a_batch_holds_every_page_and_every_picture(processor, pages):
    batch = make_collate(processor, pages)(pages[:3])
    grids = batch["image_grid_thw"]
    assert grids.tolist() == [[1, 6, 4], [1, 6, 6], [1, 6, 8]]
    assert batch["pixel_values"].shape == (int(grids.prod(dim=1).sum()), 1176)
    image_id = processor.image_token_id
    assert (batch["input_ids"] == image_id).sum(dim=1).tolist() == [6, 9, 12]
    assert torch.equal(batch["mm_token_type_ids"], (batch["input_ids"] == image_id).long())
    lengths = batch["attention_mask"].sum(dim=1)
    for row, page in enumerate(pages[:3]):
        answer = batch["labels"][row][batch["labels"][row] != IGNORED].tolist()
        assert processor.tokenizer.decode(answer) == page["html"] + "<|im_end|>"
        assert (batch["labels"][row, lengths[row] :] == IGNORED).all()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_full_memory_halves_the_chunk_and_changes_nothing(processor, pages, error, limit):
    clean = make_collate(processor, pages, chunk=8)(pages)
    collate = make_collate(processor, pages, chunk=8)
    sizes = limited(collate, limit, error)
    assert same(collate(pages), clean)
    assert max(sizes) == 8 and min(sizes) <= limit, "the first try was too large, a later one was not"


def test_memory_that_never_suffices_ends_with_the_error(processor, pages):
    collate = make_collate(processor, pages, chunk=2)
    sizes = limited(collate, 0, MemoryError("full"))
    with pytest.raises(MemoryError, match="full"):
        collate(pages[:2])
    assert sizes == [2] + [1] * 9


def test_a_page_too_large_for_memory_is_replaced(processor, pages, tmp_path):
    notes = tmp_path / "notes.jsonl"
    collate = make_collate(processor, pages, chunk=1, notes=notes)
    real, failures = collate.processor.image_processor, [MemoryError(), MemoryError()]

    class FailsTwice:
        merge_size = real.merge_size

        def __call__(self, images, **options):
            if failures:
                raise failures.pop()
            return real(images=images, **options)

    collate.processor = with_image_processor(collate.processor, FailsTwice())
    assert collate(pages[:1])["image_grid_thw"].shape[0] == 1
    assert [json.loads(line)["reason"] for line in notes.read_text().splitlines()] == ["out of memory even alone"] * 2


def test_the_chunk_grows_again_after_success(processor, pages):
    collate = make_collate(processor, pages, chunk=8)
    collate.chunk = 1
    collate(pages)
    assert collate.chunk == 8


def test_other_errors_are_not_swallowed(processor, pages):
    collate = make_collate(processor, pages)
    limited(collate, 0, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        collate(pages[:2])


@pytest.mark.parametrize("broken", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", png(56, 56, "red")[:60], b"<html>"])
def test_a_broken_picture_is_replaced_and_noted(processor, pages, broken, tmp_path):
    notes = tmp_path / "notes.jsonl"
    bad = {"name": "bad one", "screenshot": broken, "html": "<p>never seen</p>"}
    batch = make_collate(processor, pages, notes=notes)([pages[0], bad])
    assert batch["input_ids"].shape[0] == batch["image_grid_thw"].shape[0] == 2
    note = json.loads(notes.read_text())
    assert note["page"] == "bad one" and note["replaced_by"] in {page["name"] for page in pages}
    assert "never seen" not in processor.tokenizer.decode(batch["input_ids"][1])


def test_a_dataset_of_broken_pictures_ends_with_an_error(processor):
    bad = [{"name": f"bad {n}", "screenshot": b"", "html": "<p></p>"} for n in range(3)]
    with pytest.raises(DataError, match="no page of the dataset can be read"):
        make_collate(processor, bad)(bad[:1])


def test_picture_formats_and_transparency():
    from PIL import Image

    for kind in ("PNG", "JPEG", "WEBP"):
        file = io.BytesIO()
        Image.new("RGB", (60, 40), "blue").save(file, kind)
        assert use.open_screenshot(file.getvalue()).size == (60, 40)
    file = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(file, "PNG")
    assert use.open_screenshot(file.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    file = io.BytesIO()
    Image.new("L", (5000, 5000)).save(file, "PNG")
    with pytest.raises(ValueError, match="more than 20,000,000"):
        use.open_screenshot(file.getvalue())


def test_a_batch_names_the_pages_that_are_trained_on(processor, pages):
    """A replacement's own name; they travel through what moves a batch to a GPU, and the meter takes them out."""
    from accelerate.utils import send_to_device
    from conftest import make_config

    from training.heartbeat import heart
    from training.progress import Meter

    collate = make_collate(processor, pages)
    collate.config = make_config(processor.tokenizer)
    batch = collate([pages[2], {"name": "bad one", "screenshot": b"", "html": "<p></p>"}])
    moved = send_to_device(batch, "cpu")
    assert moved["pages"][0] == "page 2" and moved["pages"][1] in {page["name"] for page in pages}
    Meter().count(moved, collate.encoder.image_token_id)
    assert heart.pages == batch["pages"] and heart.micro_batch == 2 and not {"pages", "flops"} & moved.keys()
