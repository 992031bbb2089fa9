"""Room for what a run will write: sizes by arithmetic, a disk that is too small by a real one's free space."""

import shutil

import pytest
from conftest import output, small_run, start_plain

from training.base_model import BaseTensor
from training.disk_space import (
    checkpoint_bytes,
    checkpoints_at_once,
    final_bytes,
    room_words,
    shortage,
    still_to_write,
    trained_numbers,
    weights_at_once,
)
from training.settings import PageSettings


def test_a_checkpoint_of_3b_under_zero_3_takes_what_was_measured():
    """3.75 B parameters: 7.5 GB in bf16, 45 GB of fp32 weights and moments."""
    parameters = 3_750_000_000
    size = checkpoint_bytes(parameters, parameters, weight_bytes=2, sharded=True, adapters=False)
    assert size == pytest.approx(52.5e9)
    adapters = checkpoint_bytes(parameters, 30_000_000, weight_bytes=4, sharded=False, adapters=True)
    assert adapters == 30_000_000 * 12


@pytest.mark.parametrize(
    ("strategy", "save_steps", "steps", "limit", "expected"),
    [
        ("no", 500, 1000, 2, 0),
        ("steps", 500, 100, 2, 1),
        ("steps", 10, 100, 2, 3),
        ("steps", 10, 100, None, 10),
        ("steps", 0.1, 100, None, 10),
        ("epoch", 500, 100, 2, 3),
    ],
)
def test_the_checkpoints_that_lie_there_at_once(strategy, save_steps, steps, limit, expected):
    assert checkpoints_at_once(strategy, save_steps, steps, 25, limit) == expected


@pytest.mark.parametrize(
    ("at_once", "there", "expected"), [(3, 0, 3), (3, 1, 2), (3, 2, 1), (3, 9, 1), (1, 5, 1), (0, 2, 0)]
)
def test_a_run_that_goes_on_needs_room_for_one_more(at_once, there, expected):
    assert still_to_write(at_once, there) == expected


@pytest.mark.parametrize(
    ("judged", "kept", "one_disk", "expected"),
    [
        (False, False, True, (0, 1)),
        (True, False, True, (2, 0)),
        (True, True, True, (1, 0)),
        (True, False, False, (2, 2)),
        (True, True, False, (1, 2)),
    ],
)
def test_the_best_weights_lie_in_the_output_folder_and_are_written_beside_themselves(judged, kept, one_disk, expected):
    assert weights_at_once(judged, kept, one_disk) == expected


@pytest.mark.slow
def test_a_run_that_cannot_fit_is_refused_before_anything_loads(tiny_base, pages_folder, tmp_path):
    """A million checkpoints of 1.4 MB, none of which may go."""
    steps = {"max_steps": 1_000_000, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1_000_000}
    done = start_plain(small_run(tiny_base, pages_folder, **steps), tmp_path)
    assert done.returncode == 81, output(done)
    assert "GB free, and this run may write" in done.stderr and "--save_total_limit 1" in done.stderr
    assert "parameters in" not in done.stdout, "the model was loaded first"


def test_a_disk_that_is_too_small_is_named_with_both_sizes(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert shortage([(tmp_path / "not" / "there", free // 4), (tmp_path, free // 4)]) == ""
    wrong = shortage([(tmp_path / "not" / "there", free), (tmp_path, free)])
    assert (
        f"{free / 1e9:.1f} GB free" in wrong and f"{2 * free / 1e9:.1f} GB" in wrong and "--save_total_limit" in wrong
    )


def test_what_a_run_writes_stands_beside_what_is_free(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    told = room_words([(tmp_path / "not" / "there", 70_000_000), (tmp_path, 10_000_000)], "no checkpoint")
    begins, ends = "disk: this run writes up to 0.08 GB at once; ", " GB are free (no checkpoint)"
    assert told.startswith(begins) and told.endswith(ends)
    assert abs(float(told[len(begins) : -len(ends)].replace(",", "")) - free / 1e9) < 1


def test_only_what_is_trained_has_moments(tmp_path):
    tensors = {
        "v": BaseTensor("model.visual.blocks.0.weight", (4, 4), "BF16", None),
        "q": BaseTensor("model.language_model.layers.0.self_attn.q_proj.weight", (8, 4), "F32", None),
        "e": BaseTensor("model.language_model.embed_tokens.weight", (10, 4), "BF16", None),
    }
    vision = ("model.visual",)
    assert final_bytes(tensors) == 32 + 128 + 80
    assert trained_numbers(tensors, PageSettings(), vision) == 16 + 32 + 40
    assert trained_numbers(tensors, PageSettings(freeze_vision=True), vision) == 32 + 40
    assert trained_numbers(tensors, PageSettings(lora=True, lora_rank=2), vision) == 2 * (8 + 4)
