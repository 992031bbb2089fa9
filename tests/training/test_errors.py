"""What goes wrong, and the exit code that says so."""

import json
import re

import pytest
import torch
from conftest import PROGRAMS, ROOT, run_script

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


# -----------------------------------------------------------------------------
# Other systems

COMMANDS = ["run_deepspeed_training.py --dry_run", "holo1_dom_finetune.py --demo", "holo1_dom_finetune.py"]
COMMANDS += ["holo1_dom_finetune.py --demo --check_settings", "make_pages.py . --out pages"]
COMMANDS += ["page_scores.py README.md README.md"]


def on(system: str, command: str):
    name, *flags = command.split()
    return run_script(str(PROGRAMS / "on_another_system.py"), system, str(ROOT / name), *flags, cwd=ROOT, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(("system", "words"), [("win32", "Windows, .*WSL2"), ("darwin", "macOS, .*Linux container")])
def test_every_command_refuses_other_systems_in_one_line_before_it_asks_for_what_they_lack(system, words):
    """Played: this interpreter is Linux' own, without the modules, signals and calls that the other system lacks."""
    for command in COMMANDS:
        done = on(system, command)
        assert (done.returncode, done.stdout) == (2, ""), command + done.stderr
        assert re.fullmatch(f"error: this system is {words}.*\n", done.stderr), command


@pytest.mark.slow
@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_help_is_answered_on_other_systems_and_a_model_may_be_used_there(system):
    commands = {"run_deepspeed_training.py", "make_pages.py", "page_scores.py", "use_model_from_hub.py"}
    # On Windows transformers imports what this interpreter lacks, and no import of ours: that cannot be played here.
    for command in sorted(commands | ({"holo1_dom_finetune.py"} if system == "darwin" else set())):
        done = on(system, f"{command} --help")
        assert done.returncode == 0 and "usage: " in done.stdout, command + done.stderr
    used = on(system, "use_model_from_hub.py --image gone.png")
    assert used.returncode != 0 and "gone.png" in used.stderr and "Traceback" not in used.stderr
