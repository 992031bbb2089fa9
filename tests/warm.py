"""Trainings that begin warm: the real script, as `__main__`, in a process forked from one that has loaded torch.

    rank = fork(script, flags, cwd, environment, stdout, stderr)    # None: these must start cold
    rank.wait(60)

Ten seconds of CPU for imports become a tenth of one. What differs from a start by hand: the environment is taken on
after the imports, so whatever an import reads of it must be the same as here (`AT_RUN_TIME` lists what may differ, and
anything else begins cold, which is always right), sets of strings have the same order in all ranks, and /proc shows
the command line of tests/programs/warm_ranks.py. COLD=1 in the environment starts everything as a user does.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

PROGRAM = Path(__file__).parent / "programs" / "warm_ranks.py"

# Read when a training runs, never when something is imported: by torch, accelerate and the launchers; by us; by tests.
AT_RUN_TIME = set("RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT GROUP_RANK ROLE_RANK".split())
AT_RUN_TIME |= set("GROUP_WORLD_SIZE ROLE_WORLD_SIZE ROLE_NAME PATH PYTHONUNBUFFERED".split())
AT_RUN_TIME |= {"PYTORCH_NVML_BASED_CUDA_CHECK"}  # which accelerate sets in the middle of a test
AT_RUN_TIME |= set("PLAYWRIGHT_BROWSERS_PATH PYTEST_CURRENT_TEST".split())
AT_RUN_TIME |= set("PLANNED UNRENDERED OUT_OF_MEMORY IN_THE_COPY PLAIN_STEPS FAILING_RANKS FAULT TRAINED".split())
AT_RUN_TIME |= set("HOW AT_RANK AT_STEP OTHERS MASTERS OVERFLOW KEPT STEPS".split())
OURS = ("HOLO1_", "TORCHELASTIC_", "FAULT_")  # prefixes of such names

# Loaded by all; nothing of it reads what huggingface_hub and DeepSpeed read.
NEUTRAL = "numpy torch torchvision pyarrow pandas PIL.Image scipy.ndimage skimage.metrics".split()
# By those that ask the same Hub as this process, or none.
OTHERS = [f"transformers.models.qwen2_5_vl.{room}_qwen2_5_vl" for room in ("modeling", "processing")]
OTHERS += ["transformers.models.qwen2_vl.image_processing_qwen2_vl", "torchvision.transforms.v2"]
TRAINING = [*OTHERS, *"holo1_dom_finetune accelerate peft deepspeed matplotlib.pyplot".split()]
# What they read of the environment when they are imported.
OF_THE_HUB = ("HF_", "HUGGING", "TRANSFORMERS_", "TOKENIZERS_", "DS_", "ACCELERATE_", "HOME", "XDG_CACHE_HOME")
OF_THE_HUB += tuple(form(f"{kind}_proxy") for kind in ("no", "http", "https", "all") for form in (str.lower, str.upper))


def differ(one: dict[str, str], other: dict[str, str]) -> set[str]:
    """Names of variables that an import may have read and that are not the same in both."""
    names = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    return {name for name in names if name not in AT_RUN_TIME and not name.startswith(OURS)}


class Forked:
    """A process that a warm one has forked; as much of subprocess.Popen as tests need. `cpu_seconds` of a process that
    has ended are its own and its children's."""

    def __init__(self, pipe: int, complaint):
        self.pipe, self.complaint, self.told = pipe, complaint, b""
        self.returncode: int | None = None
        self.cpu_seconds = 0.0
        self.pid: int = self.hear(None)["pid"]

    def hear(self, seconds: float | None) -> dict | None:
        """What the warm process tells next; None after so many seconds."""
        until = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self.told:
            left = None if until is None else max(until - time.monotonic(), 0)
            if not select.select([self.pipe], [], [], left)[0]:
                return None
            more = os.read(self.pipe, 4096)
            if not more:
                self.complaint.seek(0)
                raise RuntimeError(f"the warm process has ended: {self.complaint.read().decode()[-3000:]}")
            self.told += more
        line, _, self.told = self.told.partition(b"\n")
        return json.loads(line)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            end = self.hear(timeout)
            if end is None:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self.returncode, self.cpu_seconds = end["returncode"], end["cpu_seconds"]
            os.close(self.pipe)
        return self.returncode

    def send_signal(self, number: int) -> None:
        self.signal_by(os.kill, number)

    def kill_all(self) -> None:
        """The process and its data workers, which share its session."""
        self.signal_by(os.killpg, signal.SIGKILL)
        self.wait()

    def signal_by(self, send: Callable[[int, int], None], number: int) -> None:
        """Its parent has waited for it, and its number is gone, a moment before the parent tells of its end."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                send(self.pid, number)


class Warm:
    """This process's end of a warm one."""

    def __init__(self, control: socket.socket, environment: dict[str, str], complaint):
        self.control, self.environment, self.complaint = control, environment, complaint

    def ask(self, descriptors: list[int], **request: object) -> Forked:
        reading, writing = os.pipe()
        socket.send_fds(self.control, [json.dumps(request).encode()], [*descriptors, writing])
        os.close(writing)
        return Forked(reading, self.complaint)

    def with_modules(self, modules: list[str], environment: dict[str, str]) -> "Warm":
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self.ask([its.fileno()], environment=environment, modules=modules)
        atexit.register(ours.close)
        return Warm(ours, environment, self.complaint)


# The environment of the tests before the first of them has begun, where somebody has noted it: a test may have changed
# it when the first warm process is asked for, and every later start would differ, and be cold.
beginning: dict[str, str] = {}


def usual_environment() -> dict[str, str]:
    """Of every script that a test starts: this process's, without the network."""
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@cache
def neutral() -> Warm:
    """Started once for this process, on first use; ends with it."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    complaint, environment = tempfile.TemporaryFile(), beginning or usual_environment()  # noqa: SIM115 (for as long as it lives)
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": complaint}
    command = [sys.executable, str(PROGRAM), str(its.fileno()), *NEUTRAL]
    with its:
        process = subprocess.Popen(
            command, env=environment, pass_fds=[its.fileno()], start_new_session=True, cwd="/", **pipes
        )
    atexit.register(process.wait, 10)
    atexit.register(ours.close)  # before that
    return Warm(ours, environment, complaint)


@cache
def training(accelerator: str) -> Warm:
    """DeepSpeed chooses its accelerator while it is imported, by DS_ACCELERATOR, and keeps to it."""
    chosen = {"DS_ACCELERATOR": accelerator} if accelerator else {}
    kept = {name: value for name, value in neutral().environment.items() if name != "DS_ACCELERATOR"}
    return neutral().with_modules(TRAINING, kept | chosen)


@cache
def bare() -> Warm:
    """With transformers alone, and nothing of ours."""
    return neutral().with_modules(OTHERS, neutral().environment)


def warm_for(environment: dict[str, str], ours: bool = True) -> Warm | None:
    """What a process with this environment can be forked from; None where it has to start cold. `ours`: whether it may
    find modules of this project loaded."""
    # Whoever has a GPU has it initialised by the imports, and no fork can use it then.
    if os.environ.get("COLD") or Path("/dev/nvidiactl").exists():
        return None
    apart = differ(environment, neutral().environment)
    if not ours:
        return None if apart else bare()
    if not apart - {"DS_ACCELERATOR"}:
        return training(environment.get("DS_ACCELERATOR", ""))
    return neutral() if all(name.startswith(OF_THE_HUB) for name in apart) else None


def fork(
    script: str, flags: list[str], cwd: Path, environment: dict[str, str], stdout: int, stderr: int, ours: bool = True
) -> Forked | None:
    """`python script *flags`, with these file descriptors; None where it has to be started cold (see `warm_for`)."""
    warm = warm_for(environment, ours)
    if warm is None:
        return None
    facts = {"script": script, "arguments": flags, "folder": str(cwd), "environment": environment}
    return warm.ask([stdout, stderr], **facts)


def fork_ranks(processes: int, *start: object, environment: dict[str, str], **pipes: int) -> list[Forked]:
    """As torchrun starts them on one machine; whoever calls this keeps the place where they meet: see `meeting`."""
    shared = {"LOCAL_WORLD_SIZE": processes, "WORLD_SIZE": processes, "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1}
    shared |= {"ROLE_NAME": "default", "ROLE_WORLD_SIZE": processes, "TORCHELASTIC_RESTART_COUNT": 0}
    shared |= {"TORCHELASTIC_MAX_RESTARTS": 0, "TORCHELASTIC_RUN_ID": "none"}
    shared |= {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT"}
    ranks = []
    for rank in range(processes):
        own = shared | {"RANK": rank, "LOCAL_RANK": rank, "ROLE_RANK": rank}
        ranks.append(fork(*start, environment | {name: str(value) for name, value in own.items()}, **pipes))
    return ranks


def meeting(processes: int):
    """(the store, the variables that tell ranks of it): torchrun keeps it outside the ranks, on a port of its own."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, processes, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return store, place


def wait_as_torchrun(ranks: list[Forked], timeout: float, patience: float = 30) -> int:
    """0 when all have ended with 0; the first other end ends all, by SIGTERM and after `patience` s SIGKILL, and is 1.
    What happens after `timeout` s is what subprocess.run does: TimeoutExpired, and nobody left."""
    until = time.monotonic() + timeout
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.returncode for rank in ranks):
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("ranks", timeout)
            time.sleep(0.05)
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        until = time.monotonic() + patience
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill_all()
    return int(any(rank.returncode for rank in ranks))


def run(
    script: str,
    flags: list[str],
    cwd: Path,
    environment: dict[str, str],
    timeout: float,
    processes: int | None = None,
    ours: bool = True,
) -> subprocess.CompletedProcess | None:
    """What a script says and how it ends, plainly or with so many ranks as under torchrun; None: it must start cold."""
    if warm_for(environment, ours) is None:
        return None
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as complained:
        pipes = {"stdout": said.fileno(), "stderr": complained.fileno()}
        if processes is None:
            process = fork(script, flags, cwd, environment, ours=ours, **pipes)
            try:
                code = process.wait(timeout)
            finally:
                process.kill_all()
        else:
            store, place = meeting(processes)
            ranks = fork_ranks(processes, script, flags, cwd, environment=environment | place, **pipes)
            code = wait_as_torchrun(ranks, timeout)
            del store
        texts = [file.seek(0) or file.read().decode(errors="replace") for file in (said, complained)]
    return subprocess.CompletedProcess([script, *flags], code, *texts)
