"""What triton tries on a machine is tried once, in a process of its own: real ones, which note that they were run."""

import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PROGRAMS, call_in_processes

from kernels import gated_delta, trials


def try_there(folder: str) -> None:
    trials.once_aside("these", "notes_its_call", f"{folder}/noted", ["one", 2])


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(PROGRAMS))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("RANK", "0")


def test_processes_that_come_together_try_once_and_later_ones_not_again(tmp_path):
    call_in_processes(try_there, [[str(tmp_path)]] * 2, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try_there(str(tmp_path))
    assert (tmp_path / "noted").read_text() == "tried "
    for other in (["one", 3], ["one"]):
        assert not trials.mark_of("notes_its_call", other).exists()


def test_what_libraries_find_out_is_kept_unless_the_environment_says_otherwise(monkeypatch):
    for name in trials.KEPT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "0")
    trials.keep_on_disk()
    found = {name: os.environ.pop(name) for name in trials.KEPT}
    assert found == trials.KEPT | {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0"}
    assert str(Path.home()) in found["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"], "what is loaded as code is nobody else's"


def test_what_fails_is_said_and_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FAILS", "1")
    for _ in range(2):
        with pytest.warns(UserWarning) as said:
            try_there(str(tmp_path))
        words = [str(warning.message) for warning in said]
        assert words[0].startswith("these: the shapes of its kernels are tried, once on this machine")
        assert words[1].endswith("in a process of its own ended with 1: no such shape")
    monkeypatch.setattr(trials, "SECONDS", 0.1)
    monkeypatch.delenv("FAILS")
    with pytest.warns(UserWarning, match="was not done in"):
        try_there(str(tmp_path))


def test_norms_of_heads_are_tried_once_for_all_batches():
    def kernel(*keys):
        return SimpleNamespace(keys=list(keys))

    library = SimpleNamespace(l2norm_fwd_kernel=kernel("D", "NB"), l2norm_bwd_kernel=kernel("D", "NB", "other"))
    gated_delta.try_once(library)
    assert library.l2norm_fwd_kernel.keys == ["D"]
    assert library.l2norm_bwd_kernel.keys == ["D", "NB", "other"], "another version's is left alone"


def test_the_process_that_tries_says_what_is_missing():
    """The real one, which needs the library and a GPU: here it ends, and says why."""
    if gated_delta.missing() == "":
        pytest.skip("flash-linear-attention is installed")
    told = '{"shape": [1, 1, 8, 8, 4], "dtype": "bfloat16", "device": 0}'
    assert trials.run_aside("kernels.gated_delta", told).startswith("ended with 1: ")
