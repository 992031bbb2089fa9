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


def test_what_libraries_find_out_is_kept_unless_the_environment_says_otherwise(tmp_path, monkeypatch):
    names = {
        "TRITON_CACHE_AUTOTUNING": "1",
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0",
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(tmp_path / "cache" / "flash_attention_cute_dsl_cache"),
    }
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "0")
    trials.keep_on_disk()
    assert {name: os.environ.pop(name) for name in names} == names
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert trials.kept() == {"TRITON_CACHE_AUTOTUNING": "1"}, "what cannot be written is not asked for"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(tmp_path / ".cache") in trials.kept()["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"]


def test_the_mark_lies_beside_tritons_own_files(tmp_path, monkeypatch):
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    for name, value in (("TRITON_HOME", str(tmp_path / "scratch")), ("TRITON_CACHE_DIR", str(tmp_path / "own"))):
        monkeypatch.setenv(name, value)
        assert trials.mark_of("x", []).parent == Path(knobs.cache.dir)


def test_what_fails_is_said_each_time_and_not_run_again(tmp_path, monkeypatch):
    """For the same; it would fail again, for each process, at each start."""
    monkeypatch.setenv("FAILS", "1")
    with pytest.warns(UserWarning) as said:
        try_there(str(tmp_path))
    words = [str(warning.message) for warning in said]
    assert words[0].startswith("these: the shapes of its kernels are tried, once on this machine")
    mark = trials.mark_of("notes_its_call", ["one", 2])
    ended = "in a process of its own ended with 1: no such shape"
    assert words[1].endswith(f"{ended}; remove {mark} to try again")
    monkeypatch.delenv("FAILS")
    with pytest.warns(UserWarning) as again:
        try_there(str(tmp_path))
    assert [str(warning.message) for warning in again] == words[1:]
    assert not (tmp_path / "noted").exists() and mark.read_text() in ended
    mark.unlink()
    monkeypatch.setattr(trials, "SECONDS", 0.1)
    with pytest.warns(UserWarning, match="was not done in"):
        try_there(str(tmp_path))


def test_where_no_mark_can_be_left_that_is_said_and_nothing_else_happens(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="these: its kernels are tried by each process itself .*Not a directory"):
        try_there(str(tmp_path))
    assert not (tmp_path / "noted").exists()


def test_modules_of_the_folder_where_a_run_was_started_are_not_taken(tmp_path, monkeypatch):
    (tmp_path / "notes_its_call.py").write_text("raise SystemExit('another one')")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try_there(str(tmp_path))
    assert (tmp_path / "noted").read_text() == "tried "


def test_norms_of_heads_are_tried_once_for_all_batches():
    def kernel(*keys):
        return SimpleNamespace(keys=list(keys))

    library = SimpleNamespace(l2norm_fwd_kernel=kernel("D", "NB"), l2norm_bwd_kernel=kernel("D", "NB", "other"))
    gated_delta.try_once(library)
    assert library.l2norm_fwd_kernel.keys == ["D"]
    assert library.l2norm_bwd_kernel.keys == ["D", "NB", "other"], "another version's is left alone"


def test_another_version_whose_norms_are_elsewhere_is_used_all_the_same(monkeypatch):
    parts = SimpleNamespace(causal_conv1d=None, chunk_gated_delta_rule=None)

    def found(name):
        if name.endswith("l2norm"):
            raise ModuleNotFoundError(name, name=name)
        return parts

    monkeypatch.setattr(gated_delta.importlib, "import_module", found)
    assert gated_delta.missing.__wrapped__() == ""


def test_the_process_that_tries_says_what_is_missing():
    """The real one, which needs the library and a GPU: here it ends, and says why."""
    if gated_delta.missing() == "":
        pytest.skip("flash-linear-attention is installed")
    told = '{"shape": [1, 1, 8, 8, 4], "dtype": "bfloat16", "device": 0}'
    assert trials.run_aside("kernels.gated_delta", told).startswith("ended with 1: ")
