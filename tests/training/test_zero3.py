"""What is known of DeepSpeed's insides holds for the version that is installed."""

import re

import pytest
import torch
from conftest import GATHERED, PROGRAMS, output, small_run, start_zero_3, weights

from training import zero3


def test_pages_are_written_with_torchs_own_linear_function(monkeypatch):
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    with zero3.plain_linear():
        assert torch.nn.functional.linear is torch._C._nn.linear
    assert torch.nn.functional.linear is zero3_linear_wrap


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_lean_steps_learn_what_deepspeeds_own_do(processes, exact_base, pages_folder, tmp_path):
    """On one process whose weights stay gathered they are never released; two hold only their shards between steps."""
    flags = small_run(exact_base, pages_folder, max_steps=4, learning_rate=1e-2, max_grad_norm=0.1)
    final, released, whole = {}, {}, {}
    for plain in (True, False):
        place = tmp_path / str(plain)
        place.mkdir()
        options = {
            "config": GATHERED,
            "script": str(PROGRAMS / "lean_steps.py"),
            "env": {"PLAIN_STEPS": str(int(plain))},
        }
        done = start_zero_3(flags, place, processes=processes, **options)
        assert done.returncode == 0, output(done)
        final[plain] = weights(place / "holo1_dom_finetune_final")
        released[plain], whole[plain] = re.search(r"^released (\d+) times, whole \[(.*)\]$", done.stdout, re.M).groups()
    assert max((final[True][name] - final[False][name]).abs().max() for name in final[True]) <= 1e-6
    assert int(released[True]) - int(released[False]) == 4, released  # one for each step
    assert set(whole[True].split(", ")) != {"0"} and len(whole[True].split(", ")) == 4
    assert whole[False] == (whole[True] if processes == 1 else "0, 0, 0, 0"), whole
