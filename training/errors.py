"""What goes wrong, and the exit code that says so. Standard library only: the wrapper reads it, too.

    raise SettingsError("--num_samples 0: give 1 or more")      # ends the run with 2
    MEANINGS[82]                                                # what the wrapper says of a run that ended with 82
    refuse_other_systems()                                      # a command's first act, once --help has been answered

A class of ours is a failure that the user can mend; every other exception is a bug, but for full memory and full disks.
"""

import errno
import re
import sys

# Each code and what it means, once; README_DeepSpeed.md's table is held against it by a test.
MEANINGS = {
    0: "done",
    1: "a bug",
    2: "settings that cannot work",
    80: "data",
    81: "disk",
    82: "loss or gradients not finite",
    83: "out of memory",
    84: "a rank hangs",
    85: "stopped by a signal, state saved",
    86: "trained and saved, but not uploaded",
}


OUT_OF_MEMORY_CODE = 83
HINTS = {  # behind the message of a failure that no class of ours names
    81: "\nThe disk is full: free some space, or give another --output_dir.",
    83: "\nOut of memory: smaller --micro_batch, --max_pixels or --max_html_tokens, more GPUs, or "
    "--deepspeed ds_z3_offload.json.",
}


OTHER_SYSTEMS = {  # by the beginning of sys.platform: its name, and where the same commands work
    "win": ("Windows", "install WSL2 (wsl --install, in a terminal of an administrator) and start it inside"),
    "cygwin": ("Windows", "install WSL2 (wsl --install, in a terminal of an administrator) and start it inside"),
    "darwin": ("macOS", "start it in a Linux container (Docker, Podman) or on a Linux machine"),
}


def refuse_other_systems() -> None:
    """Ends the process with 2 anywhere but on Linux, before it asks for a signal, a lock or a /proc that is not there.

    --help comes before it: what a command can do is of use on any system.
    """
    if sys.platform.startswith("linux"):
        return
    found = [told for start, told in OTHER_SYSTEMS.items() if sys.platform.startswith(start)]
    name, remedy = found[0] if found else (sys.platform, "start it on a Linux machine")
    print(f"error: this system is {name}, and this command works on Linux alone: {remedy}", file=sys.stderr)
    sys.exit(SettingsError.code)


ON_CPU = "on a CPU:"  # how a line begins that the wrapper asks about, where it finds it in the script's own check


def can_be_asked() -> bool:
    """Whether somebody sits at a terminal and sees a question; a stream that was closed at the start is None."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def agreed() -> bool:
    """Asks on the terminal whether to train all the same; nothing typed, and a closed terminal, are a no."""
    print("train all the same? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


class PipelineError(Exception):
    """What the user can mend; the class says the exit code, the message the value and the remedy."""

    code = 1


class SettingsError(PipelineError):
    """Settings that cannot work."""

    code = 2


class DataError(PipelineError):
    """Data that cannot be trained on."""

    code = 80


class DiskError(PipelineError):
    """A disk that is full, or too small for what a run will write."""

    code = 81


class NotFiniteError(PipelineError):
    """A loss, a gradient or a weight that is no number."""

    code = 82


class HangError(PipelineError):
    """A rank makes no progress."""

    code = 84


class StoppedError(PipelineError):
    """A signal has ended the training; its state is saved."""

    code = 85


class UploadError(PipelineError):
    """Trained and saved, but not uploaded."""

    code = 86


# What allocators say when they fail; pillow and numpy raise MemoryError, torch on a CPU a plain RuntimeError.
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, the machine's or a GPU's. Torch's own error is known by its name: no torch here."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(text in str(error).lower() for text in OUT_OF_MEMORY)


# What others say of a disk that is full, of a quota that is used up and of a file that may grow no further: safetensors
# and pyarrow the system's number or words, torch's zip writer only that it could not write.
DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_FULL = re.compile(r"no space left on device|quota exceeded|file too large|\bos error (28|122|27)\b", re.IGNORECASE)
TORCH_COULD_NOT_WRITE = re.compile(r"PytorchStreamWriter failed|inline_container.*unexpected pos")


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a disk or a quota is full, or why another error came about: cause and context are looked at, too."""
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
            return True
        text = str(error)
        if isinstance(error, RuntimeError) and TORCH_COULD_NOT_WRITE.search(text):
            return True
        writes = isinstance(error, (OSError, RuntimeError)) or type(error).__name__ == "SafetensorError"
        if writes and DISK_FULL.search(text):
            return True
        error = error.__cause__ or error.__context__
    return False


def exit_code(error: BaseException) -> int:
    """The exit code of a failure: its class says it, or what it is about; 1 is a bug."""
    if isinstance(error, PipelineError):
        return error.code
    if is_out_of_memory(error):
        return OUT_OF_MEMORY_CODE
    if is_disk_full(error):
        return 81
    return 1
