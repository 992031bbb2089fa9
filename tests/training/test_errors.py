"""What goes wrong, and the exit code that says so."""

import json

import pytest
import torch
from conftest import PROGRAMS, run_script

from training.errors import (
    DataError,
    HangError,
    NotFiniteError,
    SettingsError,
    StoppedError,
    UploadError,
    exit_code,
    is_disk_full,
    is_out_of_memory,
)


def test_memory_errors_are_told_from_other_errors():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_exit_codes_are_those_of_the_design():
    errors = {
        SettingsError("x"): 2,
        DataError("x"): 80,
        OSError(28, "No space left on device"): 81,
        NotFiniteError("x"): 82,
        MemoryError(): 83,
        HangError("x"): 84,
        StoppedError("x"): 85,
        UploadError("x"): 86,
        KeyError("x"): 1,
    }
    assert {exit_code(error): code for error, code in errors.items()} == {code: code for code in errors.values()}


@pytest.mark.slow
def test_each_librarys_word_for_a_disk_that_takes_no_more_is_81(tmp_path):
    done = run_script(str(PROGRAMS / "writes_files.py"), str(tmp_path), cwd=tmp_path)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        ["torch", "RuntimeError", 81],
        ["safetensors", "SafetensorError", 81],
        ["pyarrow", "OSError", 81],
        ["python", "OSError", 81],
    ], done.stderr


def test_a_full_disk_is_known_as_the_cause_of_another_error():
    full, other = OSError(28, "No space left on device"), RuntimeError("the checkpoint could not be written")
    other.__cause__ = full
    assert is_disk_full(other) and exit_code(other) == 81
    other.__cause__, other.__context__ = None, full
    assert is_disk_full(other)
    full.__context__ = other  # no exception of Python's own is its own cause, but nobody should wait here for ever
    assert not is_disk_full(RuntimeError("shape mismatch"))
    damaged = "[enforce fail at inline_container.cc:145] . PytorchStreamReader failed reading zip archive"
    assert exit_code(RuntimeError(damaged)) == 1, "reading a damaged file needs no space"
