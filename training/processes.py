"""The processes of a run: who this one is, what it says, and everything that all of them do together.

    say("one line, by the main process")
    base = on_main(lambda: fetch_base(settings))        # one works, everyone gets the result or its error
    if agree(stop.wanted): ...                          # true everywhere when it is true anywhere

(all ranks) marks what every process must call, in the same order, or the others wait for ever. Every collective of this
project stands here, but for those inside DeepSpeed's own groups (zero3). Torch is imported on use: --help and the
checks read this room, too.

Sections: Who, Talk, Together, After a failure.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Container
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from scoring.bar import beside_bars, on_terminal
from training.errors import HINTS, MEANINGS, PipelineError, StoppedError, exit_code

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

# -----------------------------------------------------------------------------
# Who


def rank() -> int:
    """This process's number in the whole run; 0 is the main process."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Processes of the whole run, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Processes of this machine: torchrun and the deepspeed launcher name them differently."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def is_main() -> bool:
    """Whether this is rank 0, which writes files and speaks."""
    return rank() == 0


def several() -> bool:
    """Whether there is anybody to talk to: several processes, whose process group has begun."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and world_size() > 1


# -----------------------------------------------------------------------------
# Talk


def say(message: str) -> None:
    """(main process only) One line on stdout."""
    if is_main():
        print_line(message)


def here(folder: Path) -> str:
    """A folder as it is typed in the current one: ./name for what lies in it."""
    return str(folder) if folder.is_absolute() or folder.parts[:1] == ("..",) else f"./{folder}"


def say_from_here(message: str) -> None:
    """One line on stdout that names this process."""
    print_line(f"rank {rank()}: {message}")


CONSOLE_COLUMNS = 100


def in_columns(text: str) -> str:
    """`text` in lines that a terminal shows whole, the later ones indented; a path is never broken."""
    options = {"subsequent_indent": "  ", "break_on_hyphens": False, "break_long_words": False}
    return textwrap.fill(text, CONSOLE_COLUMNS, **options)


# What others say on every run and nobody can act on, by its logger: who says it, and why it does not matter here.
SAID_IN_VAIN = {
    # The Trainer of transformers 5.23 gives accelerate 1.15 a 1, whatever the steps; DeepSpeed's value is right.
    "accelerate.accelerator": "Gradient accumulation steps mismatch",
    # While training, no generation config is used (load_model); the final folder has the base's own.
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens",
    # Of a page while its tokens are counted; one over --max_html_tokens is dropped then, and that is told.
    "transformers.tokenization_utils_base": "Token indices sequence length is longer than",
    # bitsandbytes, imported by peft: it looks for a kernel of 4-bit products on a CPU, where nothing is quantised.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}
# deepspeed 0.19.8 calls collectives by names that torch 2.14 has replaced; they still work.
DEPRECATED = r"`torch\.distributed\.\w+` (is deprecated|is a private function)"


HUB_TRIES_AGAIN = "huggingface_hub.utils._http"  # its logger: two lines for each of six tries (2.4)
told_of_hub: list[str] = []  # once is enough


def tells_once(record: logging.LogRecord) -> bool:
    """A filter for HUB_TRIES_AGAIN: the first try that fails is told in our words, with what can be done; no other."""
    message = record.getMessage()
    if "thrown while requesting" not in message:
        return not message.startswith("Retrying in")
    first, record.args = not told_of_hub, ()
    why = message.partition(" thrown while")[0].strip("'\"")
    record.msg = (
        f"the Hub does not answer ({why}): trying again for some seconds. Without a network, HF_HUB_OFFLINE=1 takes "
        "what is in the cache, and a folder needs none"
    )
    told_of_hub.append(why)
    return first


def matters(record: logging.LogRecord) -> bool:
    """A filter for the loggers of SAID_IN_VAIN: everything else that they say is heard. Some begin with the rank."""
    return SAID_IN_VAIN.get(record.name, "\0") not in record.getMessage()


def hush_libraries() -> None:
    """Before they are imported: no more of what is said on every run and means nothing, and no bars of theirs where
    they would be carriage returns in a file."""
    warnings.filterwarnings("ignore", DEPRECATED, FutureWarning)
    for name in SAID_IN_VAIN:
        logging.getLogger(name).addFilter(matters)
    logging.getLogger(HUB_TRIES_AGAIN).addFilter(tells_once)
    if not on_terminal():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")


NOBODY_READS = (errno.EIO, errno.EPIPE)  # a terminal whose window was closed, a pipe whose reader has gone


def print_line(line: str) -> None:
    """On stdout. One that nobody reads any more ends no run: what comes later goes nowhere, whoever says it."""
    try:
        with beside_bars():
            print(line, flush=True)
    except OSError as error:
        if error.errno not in NOBODY_READS:
            raise
        lead_nowhere(sys.stdout.fileno())
        tell(f"rank {rank()}: stdout is closed ({error}); what would be said there from now on is lost")


def lead_nowhere(*files: int) -> None:
    """What is written to these file descriptors from now on is thrown away, and no error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for file in files:
        os.dup2(nowhere, file)
    os.close(nowhere)


def tell(message: str) -> None:
    """(any rank, any thread) One line on stderr, past Python's buffer, whose lock a stuck main thread may hold."""
    try:
        os.write(2, f"{message}\n".encode())
    except OSError as error:
        if error.errno in NOBODY_READS:
            lead_nowhere(2)


_said_full: list[str] = []  # folders


def leave_note(name: str, text: str) -> None:
    """(any rank, any thread) A file for the wrapper, whole or not there; nothing where there is no wrapper. On a full
    disk it goes into the one that the wrapper has laid there, whose block is there, too."""
    if not (folder := os.environ.get("HOLO1_STATUS_DIR")):
        return
    partial, place = Path(folder) / f".{name}.{rank()}", Path(folder) / name
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(place)
    except OSError as error:
        if not Path(folder).is_dir():  # the wrapper has gone, and its folder with it
            return
        if folder not in _said_full:
            _said_full.append(folder)
            tell(f"rank {rank()}: {folder}: {error}; the wrapper may not learn how this rank is: free some space there")
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        write_over(place, text)


def take_note_back(name: str) -> None:
    """(any rank) What the wrapper was told is true no longer."""
    if folder := os.environ.get("HOLO1_STATUS_DIR"):
        with contextlib.suppress(OSError):
            Path(folder, name).unlink(missing_ok=True)


def write_over(place: Path, text: str) -> None:
    """In place. Where that fails, too, it goes: half of it, or what it said before, would be believed."""
    try:
        with place.open("r+b") as file:
            file.write(text.encode())
            file.truncate()
    except OSError:
        with contextlib.suppress(OSError):
            place.unlink(missing_ok=True)


def report_end(code: int) -> None:
    """(any rank) Leave this rank's exit code where the wrapper looks for it; the launcher in between loses it."""
    leave_note(f"rank-{rank()}", str(code))


def code_of_another(codes: Container[int]) -> tuple[int, int] | None:
    """(rank, exit code) of another rank that has ended with one of `codes`, where there is a wrapper; else None."""
    folder = os.environ.get("HOLO1_STATUS_DIR")
    for file in sorted(Path(folder).glob("rank-*")) if folder else ():
        with contextlib.suppress(ValueError, OSError):  # a rank of another way to write; the folder has gone
            number, code = int(file.name.removeprefix("rank-")), int(file.read_text())
            if number != rank() and code in codes:
                return number, code
    return None


def say_failure(error: Exception) -> int:
    """(any rank) What ended this rank, on stderr, and its exit code: that of another rank which has failed before,
    where this one only finds that it is gone."""
    code = exit_code(error)
    if isinstance(error, StoppedError):
        if is_main():
            tell(str(error))
        return code
    if code == 1 and not isinstance(error, PipelineError) and (found := code_of_another(range(80, 85))):
        number, code = found
        tell(f"error (rank {rank()}): {error}\nrank {number} had ended before: {code}, {MEANINGS[code]}")
        return code
    # A log on the disk that is full takes no word more: the code says what the words cannot.
    with contextlib.suppress(OSError):
        # A bug shows where it is, and out of memory where it was asked for; what the user can mend needs no traceback.
        if code in (1, 83) and not isinstance(error, PipelineError):
            traceback.print_exc()
        print(f"error (rank {rank()}): {error}{HINTS.get(code, '')}", file=sys.stderr, flush=True)
    return code


# -----------------------------------------------------------------------------
# Together


def gather(value: Result) -> list[Result]:
    """(all ranks) Every process's value, in the order of their ranks; pickled, so for small things."""
    if not several():
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def least(values: list[float]) -> list[float]:
    """(all ranks) The smallest of each value that any rank has."""
    return [min(each) for each in zip(*gather(values))]


def same_everywhere(value: str) -> bool:
    """(all ranks) Whether every process has the same text; keep it short, a hash of what is compared."""
    return len(set(gather(value))) == 1


def add_up(numbers: torch.Tensor, group: Any = None) -> None:
    """(all ranks) Put the sum over all processes (of `group`) into `numbers`, on the device of the process group."""
    if several():
        import torch.distributed as dist

        dist.all_reduce(numbers, group=group)


def take_largest(numbers: torch.Tensor, group: Any = None) -> None:
    """(all ranks) Put the largest of each number that any process has into `numbers`."""
    if several():
        import torch.distributed as dist

        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)


def agree(flag: bool) -> bool:
    """(all ranks) True everywhere when it is true anywhere. Called at every step: alone it costs nothing, and among
    several no GPU is waited for."""
    return bool(largest(flag))


def largest(number: float) -> float:
    """(all ranks) The largest that any of them has, through the CPU's memory: no GPU is waited for."""
    return _through_cpu(number, take_largest)


def total(number: float) -> float:
    """(all ranks) The sum of all, through the CPU's memory: no GPU is waited for."""
    return _through_cpu(number, add_up)


def _through_cpu(number: float, put_together: Callable[[torch.Tensor, Any], None]) -> float:
    if not several():
        return number
    import torch

    numbers = torch.tensor(float(number), dtype=torch.float64)
    put_together(numbers, cpu_group())
    return numbers.item()


_cpu_group: list = []  # at most one


def cpu_group() -> Any:
    """(all ranks, the first time) The group that talks through the CPU's memory; None for the usual one, where that
    does, or for a process alone."""
    import torch.distributed as dist

    if several() and not _cpu_group and dist.get_backend() != "gloo":
        _cpu_group.append(dist.new_group(backend="gloo"))
    return _cpu_group[0] if _cpu_group else None


def on_main(work: Callable[[], Result]) -> Result:
    """(all ranks) Run `work` on the main process and hand its result, or its error, to every rank.

    A `PipelineError` is raised everywhere as it is; of another one the others raise a `PipelineError` that tells of it.
    """
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except PipelineError as error:
            outcome[1] = error
        except Exception as error:  # the other ranks must hear of any failure, or they wait for hours
            told = PipelineError(f"the main process failed: {error!r}")
            told.code = exit_code(error)
            _broadcast([None, told])
            raise
    _broadcast(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _broadcast(outcome: list, group: Any = None) -> None:
    if several():
        import torch.distributed as dist

        dist.broadcast_object_list(outcome, src=0, group=group)


def on_each_machine(work: Callable[[], Result], there: Callable[[Result], bool]) -> Result:
    """(all ranks) `work` on the main process, and again on every machine that does not see what it left: `there`.

    Its result must be the same wherever it is done; returns this machine's own.
    """
    outcome: list[Any] = [on_main(work), None]
    if not several():
        return outcome[0]
    if local_rank() == 0 and not there(outcome[0]):
        say_from_here("this machine sees nothing of what rank 0 has prepared and prepares it, too")
        try:
            outcome[0] = work()
        except PipelineError as error:
            outcome[1] = error
    outcomes = gather(outcome)
    for _, error in outcomes:
        if error is not None:
            raise error
    return outcomes[rank() - local_rank()][0]


# -----------------------------------------------------------------------------
# After a failure: over gloo, whatever training used, since NCCL may be stuck in the collective that failed

_emergency_group: list = []  # at most one; made before anything can have failed
_apart: list[str] = []  # why some rank did not come once: nobody is waited for again, or ranks would meet out of turn


def emergency_group() -> Any:
    """(all ranks, the first time) A gloo group of its own; None for a process alone."""
    if not _emergency_group and several():
        import torch.distributed as dist

        _emergency_group.append(dist.new_group(backend="gloo", timeout=timedelta(seconds=60)))
    return _emergency_group[0] if _emergency_group else None


def all_ranks_arrive(seconds: float = 20.0) -> bool:
    """(any rank) Whether every rank comes here in time: after a failure, some may hang or be gone."""
    try:
        meet(seconds)
    except RuntimeError as error:
        say_from_here(f"not every rank can take part in an emergency checkpoint ({error})")
        return False
    return True


def meet(seconds: float) -> None:
    """(all ranks) Every rank is here; RuntimeError where one does not come in time, or has not come before."""
    if not several():
        return
    import torch.distributed as dist

    if _apart:
        raise RuntimeError(_apart[0])
    try:
        dist.monitored_barrier(emergency_group(), timeout=timedelta(seconds=seconds))
    except RuntimeError as error:
        _apart.append(str(error))
        raise


def together(number: int, seconds: float = 60.0) -> int:
    """(all ranks) The largest number that any rank has, after what may have failed somewhere: a flag, or an exit code.
    Raises RuntimeError where a rank does not come in time."""
    if not several():
        return number
    import torch

    meet(seconds)
    votes = torch.tensor(float(number))
    take_largest(votes, emergency_group())
    return int(votes)


def agreed_port() -> int:
    """(all ranks) A port that is free where rank 0 runs."""
    chosen = [0]
    if is_main():
        with socket.socket() as probe:
            probe.bind(("", 0))
            chosen = [probe.getsockname()[1]]
    _broadcast(chosen, emergency_group())
    return chosen[0]
