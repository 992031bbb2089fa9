"""What goes wrong, and the exit code that says so."""

import torch

from training.errors import (
    DataError,
    NotFiniteError,
    SettingsError,
    StoppedError,
    UploadError,
    exit_code,
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
        StoppedError("x"): 85,
        UploadError("x"): 86,
        KeyError("x"): 1,
    }
    assert {exit_code(error): code for error, code in errors.items()} == {code: code for code in errors.values()}
