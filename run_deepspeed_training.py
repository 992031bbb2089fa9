"""Start the training under the `deepspeed` launcher, stop it cleanly, and tell the truth about how it ended.

    python run_deepspeed_training.py --dry_run    # says what it has checked, shows the command, starts nothing
    python run_deepspeed_training.py --demo       # a tiny model, no network, no GPU
    python run_deepspeed_training.py --num_gpus 4 --num_samples 5000 --learning_rate 1e-5
    python run_deepspeed_training.py --num_gpus 8 --num_nodes 2 --node_rank 0 --no_ssh --master_addr 10.0.0.1

The last is for two machines: the other one gets the same with --node_rank 1; under srun, neither needs the last four.
Flags that are not listed by --help, and all after `--`, go to the training script untouched. One Ctrl-C (or SIGTERM,
SIGHUP, SIGUSR1, or a file SAVE_AND_STOP in the output folder) lets the training save its state and exit with 85; a
second Ctrl-C ends everything at once. The launcher loses exit codes and leaves ranks behind (deepspeed 0.19.8): so
HOLO1_RUN_ID marks every process of a run, and in the folder HOLO1_STATUS_DIR each rank says how it is: `beat-<RANK>`
once a second, `rank-<RANK>` with its exit code as its last act, `smaller` where memory ran out and less might do.

Sections: Command line, Checks, The script's own check, Port, Run, Beats, Main.
"""

import argparse
import ast
import contextlib
import importlib.util
import json
import os
import queue
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

from training.errors import MEANINGS, ON_CPU, OUT_OF_MEMORY_CODE, agreed, can_be_asked, refuse_other_systems

DEFAULT_PORT = 29500
NO_GPU = 1000  # the number of no GPU: the launcher shows hidden GPUs to the ranks again, by the numbers we give it
# A terminal that closes sends two, and a warning is no more than that. Windows has neither, and answers --help, too.
SOFT = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name))
SIGNALS = (signal.SIGINT, signal.SIGTERM, *SOFT)
GRACE_S = 10  # the other ranks' time when one has failed, and the launcher's when all have left their code
ORPHAN_GRACE_S = 4.5  # all ranks' time when the launcher was killed: after 5 s none may be left,
SAVING_S = 600  # but for one that saves: a save is not cut before this time
SILENT_S = 10  # a beat comes once a second; a rank that writes none for so long has been stopped or starved
# Where no progress is expected: a process that was stopped is given up after the first; one call in C that keeps the
# interpreter's lock, while weights come from a slow network disk, may take longer.
STOPPED_S, STARVED_S = 60, 600
QUIET_S = 3  # a hang is believed so long after its limit: who has written no beat since is the one that is stopped
STACKS_S = 2  # the time of ranks to write their stacks
BLOCK = 4096  # bytes that a disk gives to a file at least
MOST_SMALLER = 6  # starts again with less at once
CHECK_S = 60  # the script's check of its settings takes some seconds; longer on a cold network disk
STAGES = ("loading", "reading pages", "training", "saving", "finishing", "judging", "publishing")
OWN_CODES = (2, *range(80, 87))  # whose rank knows why it failed; a 1 may be what another's end has caused


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # a closed terminal must not keep us from stopping the ranks
        print(f"[run_deepspeed_training] {text}", file=sys.stderr, flush=True)


# -----------------------------------------------------------------------------
# Command line


def read_command_line(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The wrapper's own settings, and what the training script gets: only what was typed."""
    about = "Train under the deepspeed launcher. Any other flag goes to the training script untouched."
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("--num_gpus", type=int, default=1, help="GPUs (processes on a machine without), default 1")
    parser.add_argument("--master_port", type=int, help=f"rendezvous port, default {DEFAULT_PORT} or the next free")
    parser.add_argument("--config", default="ds_z3.json", help="DeepSpeed configuration, default %(default)s")
    parser.add_argument("--script", default="holo1_dom_finetune.py", help="training script, default %(default)s")
    parser.add_argument("--hub_repo", help="Hub repository, default holo1_ui2dom")
    parser.add_argument("--push_to_hub", action="store_true", help="push after training, default off")
    parser.add_argument("--private_repo", action="store_true", help="make the repository private, default off")
    parser.add_argument("--num_samples", type=int, help="training pages, default 1000")
    parser.add_argument(
        "--dry_run", action="store_true", help="check, say what was checked, print the command, start nothing"
    )
    again = "when GPU memory runs out, start again from the last checkpoint with less at once, default on"
    parser.add_argument("--retry_smaller", action="store_true", default=True, help=again)
    parser.add_argument("--no_retry_smaller", action="store_false", dest="retry_smaller", help="leave it at exit 83")
    several = parser.add_argument_group("several machines", "Start the wrapper on each, with one and the same port.")
    several.add_argument("--num_nodes", type=int, help="machines, each with --num_gpus; default 1, or as srun says")
    several.add_argument("--node_rank", type=int, help="which of them this one is, from 0; on 0 the ranks meet")
    several.add_argument("--no_ssh", action="store_true", help="always: over ssh ranks cannot be watched or stopped")
    several.add_argument("--master_addr", help="name or address of machine 0, on every machine the same")
    several.add_argument("--hostfile", help="DeepSpeed's list of machines, in place of --num_nodes; slots do not count")
    end = argv.index("--") if "--" in argv else len(argv)
    args, others = parser.parse_known_args(argv[:end])
    typed = [f"--{name}" for name in ("push_to_hub", "private_repo") if getattr(args, name)]
    for name in ("hub_repo", "num_samples"):
        typed += [] if getattr(args, name) is None else [f"--{name}", str(getattr(args, name))]
    return args, typed + others + argv[end + 1 :]


def build_command(args: argparse.Namespace, gpus: list[str], passed_on: list[str], hostfile: str) -> list[str]:
    # This interpreter starts the launcher, and the launcher the ranks: right in a venv that nobody activated.
    # Its own lines would stand around every error of ours, and `Run.verdict` says what they mean; whatever ends the
    # launcher itself is raised, and seen at any level (deepspeed 0.19.8).
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"]
    which = ["--num_gpus", str(args.num_gpus)]
    if "CUDA_VISIBLE_DEVICES" in os.environ:  # --num_gpus ignores it and takes the first GPUs; --include obeys
        chosen = gpus or [str(NO_GPU + rank) for rank in range(args.num_gpus)]
        ours = ",".join(chosen[: args.num_gpus])  # of other machines' GPUs, only the number counts here
        hosts = ["localhost"] if args.num_nodes == 1 else [f"node{number}" for number in range(args.num_nodes)]
        which = ["--include", "@".join(f"{host}:{ours}" for host in hosts)]
    launcher += which
    if args.num_nodes > 1:
        launcher += ["--hostfile", hostfile, "--no_ssh", "--node_rank", str(args.node_rank)]
        launcher += ["--master_addr", args.master_addr]
    return [*launcher, "--master_port", str(args.master_port), args.script, "--deepspeed", args.config, *passed_on]


# -----------------------------------------------------------------------------
# Checks


def usable_gpus() -> list[str]:
    """The numbers of the GPUs that CUDA_VISIBLE_DEVICES leaves (all when it is not set); none: train on the CPU."""
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=8).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    gpus = re.findall(r"^GPU (\d+):.*UUID: (GPU-[^)]+)", answer, re.MULTILINE)
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(number for number, _ in gpus)).split(",")
    return [number for name in wanted for number, uid in gpus if name.strip() in (number, uid)]


def ask_slurm(args: argparse.Namespace) -> list[str]:
    """Fills in what was not typed, where srun has started us on several machines; returns what is wrong with that."""
    env, nodes = os.environ, os.environ.get("SLURM_STEP_NUM_NODES")  # not set in the batch script, which runs once
    if args.num_nodes is None and nodes is None and (job := env.get("SLURM_JOB_NUM_NODES", "1")) != "1":
        say(f"of the {job} machines of this SLURM job only this one trains; for all, start the wrapper with srun")
    if args.num_nodes == 1 or nodes in (None, "1"):
        return []
    told = {"num_nodes": int(nodes), "node_rank": int(env["SLURM_NODEID"])}
    told["master_addr"] = re.sub(r"\[(\w+).*?\]", r"\1", env["SLURM_STEP_NODELIST"]).split(",")[0]  # of node[01-03,07]
    vars(args).update({name: value for name, value in told.items() if getattr(args, name) is None}, no_ssh=True)
    say("srun: --no_ssh " + " ".join(f"--{name} {getattr(args, name)}" for name in told))
    tasks = env.get("SLURM_STEP_NUM_TASKS", nodes)
    wrong = f"srun: {tasks} tasks on {nodes} machines; start one on each, with --ntasks-per-node=1"
    return [wrong] if tasks != nodes else []


def machine_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags for several machines; --num_nodes is resolved here."""
    problems, hosts, rank = ask_slurm(args), {}, args.node_rank
    if args.hostfile is not None:
        try:
            lines = [line.strip() for line in Path(args.hostfile).read_text().splitlines()]
            lines = [line for line in lines if line and not line.startswith("#")]
            hosts = {line.split()[0] for line in lines}
            if bad := [line for line in lines if not re.match(r"\S+\s+slots=\d", line)]:
                raise ValueError(f"bad line {bad[0]!r}")
            if not hosts or len(hosts) < len(lines):
                raise ValueError(f"{len(lines)} lines name {len(hosts)} different machines")
        except (OSError, ValueError) as error:
            problems.append(f"--hostfile {args.hostfile}: {error}; give a file of lines like: node1 slots=8")
    elif args.num_nodes is None and (args.no_ssh or args.master_addr or rank is not None):
        problems.append("--node_rank, --no_ssh, --master_addr: for several machines only; tell how many, --num_nodes")
    nodes = len(hosts) if args.num_nodes is None else args.num_nodes
    if hosts and nodes > len(hosts):
        problems.append(f"--num_nodes {nodes}: --hostfile {args.hostfile} names {len(hosts)}; correct one of them")
    if rank is not None and nodes > 0 and not 0 <= rank < nodes:
        problems.append(f"--node_rank {rank}: give a number from 0 to {nodes - 1}, one less than --num_nodes")
    needed = {"--no_ssh": args.no_ssh or None, "--node_rank": rank, "--master_addr": args.master_addr or None}
    if nodes > 1 and (missing := [flag for flag, value in needed.items() if value is None]):
        how = "start this on each, with --no_ssh (ranks started over ssh can be neither watched nor stopped)"
        how += ", its --node_rank from 0, and the --master_addr of machine 0"
        problems.append(f"--num_nodes {nodes}: {', '.join(missing)} missing; {how}")
    args.num_nodes = max(1, nodes)
    return problems


def find_problems(args: argparse.Namespace, gpus: list[str], passed_on: list[str]) -> list[str]:
    """All that would stop this run but its port, each with its remedy; --script and --config are resolved here."""
    problems = []
    for name in ("num_gpus", "num_nodes", "num_samples"):
        if (value := getattr(args, name)) is not None and value < 1:
            problems.append(f"--{name} {value}: give 1 or more")
    problems += machine_problems(args)
    if gpus and args.num_gpus > len(gpus):
        which = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        only = f"only {len(gpus)} can be used here (CUDA_VISIBLE_DEVICES: {which})"
        problems.append(f"--num_gpus {args.num_gpus}: {only}; ask for at most {len(gpus)}")
    for name in ("script", "config"):  # relative to the current folder, else to this file's
        path = Path(getattr(args, name))
        found = [place for place in (path, Path(__file__).resolve().parent / path) if place.is_file()]
        setattr(args, name, str((found or [path])[0]))
        if not found:
            problems.append(f"--{name} {path}: no such file, neither here nor beside this wrapper; correct the path")
        elif name == "config":
            try:
                if not isinstance(json.loads(found[0].read_bytes()), dict):
                    problems.append(f"--config {path}: must hold a JSON object, {{...}}; start from ds_z3.json")
            except (OSError, ValueError) as error:  # its text has the line and the column
                problems.append(f"--config {path}: not readable as JSON, correct it: {error}")
    if any(word.split("=")[0] == "--deepspeed" for word in passed_on):
        problems.append("--deepspeed: this wrapper passes it itself; give --config FILE")
    if importlib.util.find_spec("deepspeed") is None:
        problems.append(f"deepspeed is not installed: {shlex.quote(sys.executable)} -m pip install deepspeed")
    return problems


# -----------------------------------------------------------------------------
# The script's own check


def knows_its_check(script: Path) -> bool:
    """Whether the script can be asked to check its settings. A foreign one might take no notice of the flag and train,
    so this is read, not tried: the flag must stand in its text or, where it imports that, in its training/settings.py.
    """
    texts = [script.read_text(encoding="utf-8", errors="replace")]
    with contextlib.suppress(SyntaxError, ValueError, OSError):
        nodes = [node for node in ast.walk(ast.parse(texts[0])) if isinstance(node, ast.ImportFrom)]
        if any(node.module == "training.settings" for node in nodes):
            texts.append((script.resolve().parent / "training" / "settings.py").read_text(encoding="utf-8"))
    return any(re.search(r"--check_settings\b|[\"']check_settings[\"']|^\s+check_settings:", t, re.M) for t in texts)


def script_problems(args: argparse.Namespace, passed_on: list[str], known: list[str], gpus: list[str]) -> list[str]:
    """What the script's own check says against the passed-on flags; `known` are the problems that were found before."""
    flags = {problem.split()[0].rstrip(":") for problem in known}
    if "--script" in flags or {"--help", "-h", "--help_training"} & {*passed_on}:
        return []
    if not knows_its_check(Path(args.script)):
        if not known:
            say(f"{args.script} knows no --check_settings: its own settings are not checked before it starts")
        return []
    apart = ("RANK", "LOCAL_RANK", "HOLO1_STATUS_DIR", "HOLO1_RUN_ID")
    env = {key: text for key, text in os.environ.items() if key not in apart}
    ranks = max(1, args.num_gpus)
    env |= {} if gpus else {"DS_ACCELERATOR": "cpu"}
    env |= {"WORLD_SIZE": str(ranks * args.num_nodes), "LOCAL_WORLD_SIZE": str(ranks)}
    env["HOLO1_WRAPPER_FLAGS"] = " ".join(f"--{name}" for name in vars(args))  # for its "did you mean"
    config = [] if "--config" in flags else ["--deepspeed", args.config]
    command = [sys.executable, args.script, "--check_settings", *config, *passed_on]
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=CHECK_S
        )
    except subprocess.TimeoutExpired:
        say(f"{args.script} --check_settings has not answered for {CHECK_S} s: starting without its check")
        return []
    if done.stdout.strip():
        print(done.stdout.rstrip(), file=sys.stderr)
    if done.returncode == 0:
        slow = any(line.startswith(ON_CPU) for line in done.stdout.splitlines())
        return slow_problems(passed_on, args.dry_run) if slow else []
    told = [line for line in done.stderr.splitlines() if line.strip()]
    told = [line for line in told if line.split()[0].rstrip(":") not in flags]  # told already
    if done.returncode != 2 or not (told or known):
        told.append(f"{args.script} --check_settings ended with {done.returncode}: the check itself has failed")
    return told


def slow_problems(passed_on: list[str], dry_run: bool) -> list[str]:
    """The script has said that this takes a CPU for ever: on a terminal whoever sits there is asked, since its ranks
    have no keyboard. Adds --yes to `passed_on`, by which they know that it was said; returns a no as a problem."""
    asked = "--yes" not in passed_on and can_be_asked() and not dry_run
    if asked and not agreed():
        return ["not started: take a GPU, a smaller --base_model, or --yes"]
    if "--yes" not in passed_on and not dry_run:
        passed_on.append("--yes")
    return []


# -----------------------------------------------------------------------------
# Port

port_locks: dict[str, int] = {}  # the lock files that are ours, path -> descriptor


def lock_port(port: int) -> bool:
    """Whether no other wrapper of this user has chosen the port; it is ours, then, until `release_ports`, or until this
    process and its watchdog end. Between a look at a port and the ranks' use of it lie the seconds that imports take.
    """
    import fcntl  # nowhere but on POSIX, and --help is answered anywhere

    path = os.path.join(tempfile.gettempdir(), f"holo1-port-{os.getuid()}-{port}")
    while True:
        try:
            lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            say(f"no lock file for port {port}, another run may take it, too: {error}")
            return True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                port_locks[path] = lock
                return True
        os.close(lock)  # its owner has removed it since we opened it


def release_ports() -> None:
    while port_locks:
        path, lock = port_locks.popitem()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.close(lock)


def bind_trouble(port: int) -> str:
    """Why the rendezvous cannot listen there, on IPv4 and IPv6; empty when it can."""
    both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
    try:
        socket.create_server(("", port), **both).close()
    except OSError as error:
        return os.strerror(error.errno)
    return ""


def port_trouble(port: int) -> str:
    """Why this run cannot have the port; empty when it can, and then it is locked for it."""
    if not lock_port(port):
        return "another run of yours has it"
    if trouble := bind_trouble(port):
        release_ports()
    return trouble


def port_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with --master_port, which is resolved here."""
    problems = []
    if args.master_port is None and args.num_nodes > 1:
        args.master_port = DEFAULT_PORT  # the other machines could not know of another one
    if (port := args.master_port) is None:
        args.master_port = next(port for port in range(DEFAULT_PORT, 65536) if not port_trouble(port))
        if args.master_port != DEFAULT_PORT:
            say(f"port {DEFAULT_PORT} is busy: taking {args.master_port}")
    elif not 1 <= port <= 65535:
        problems.append(f"--master_port {port}: give a number from 1 to 65535")
    elif not args.node_rank and (trouble := port_trouble(port)):  # the ranks meet on machine 0
        other = "another, or none for the next free one" if args.num_nodes == 1 else "every machine another"
        problems.append(f"--master_port {port}: {trouble}; give {other}")
    return problems


# -----------------------------------------------------------------------------
# Run


def state_of(pid: int) -> tuple[str, int]:
    """A process's state by one letter, T where it was stopped, and its parent; nothing where it has ended."""
    with contextlib.suppress(OSError):
        state, parent, *_ = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return state, int(parent)
    return "", 0


class Run:
    """One start of the launcher: its processes, how they end, and what that means."""

    def __init__(self, num_ranks: int, first_rank: int, arrived: queue.SimpleQueue[int]):
        self.ranks = range(first_rank, first_rank + num_ranks)  # of this machine
        self.num_ranks, self.id, self.status_dir = num_ranks, uuid.uuid4().hex, tempfile.mkdtemp(prefix="holo1-run-")
        self.pids: dict[int, int] = {}  # rank -> process id
        self.asleep: list[int] = []  # the part of the launcher that watches over the ranks, while we do
        self.arrived, self.signal, self.forced, self.orphaned = arrived, 0, False, False
        self.deadline = float("inf")  # by when all must have ended, once there is a reason for it
        self.failed_first: list[int] = []
        self.ended_by_us: list[int] = []
        self.hung, self.hang = -1, ""  # the rank that hangs, and what is known of it
        self.looked = self.counts_from = 0.0  # our last look at the beats; silence before the latter is not theirs

    def environment(self, gpus: list[str]) -> dict[str, str]:
        # RANK tells a rank from the launcher, so a cluster's own must go. The launcher itself sets the visible GPUs.
        env = {key: text for key, text in os.environ.items() if key not in ("RANK", "CUDA_VISIBLE_DEVICES")}
        # DeepSpeed's Adam is built by `ninja`, which lies beside the interpreter: off PATH in an unactivated venv.
        env["PATH"] = os.path.dirname(sys.executable) + os.pathsep + env.get("PATH", os.defpath)
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.num_ranks)))
        if not gpus:  # without LOCAL_SIZE the launcher takes the NUMA nodes for its devices
            env = {"DS_ACCELERATOR": "cpu", **env, "LOCAL_SIZE": str(NO_GPU + self.num_ranks)}
        elif "GPU-" in os.environ.get("CUDA_VISIBLE_DEVICES", ""):
            env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # the order of nvidia-smi's numbers
        return env | {"HOLO1_RUN_ID": self.id, "HOLO1_STATUS_DIR": self.status_dir}

    def members(self, pids: list[int] | None = None) -> dict[int, int | None]:
        """Living processes of this run (of `pids`, or of all): process id -> rank, None for the launcher's own two."""
        found, mark = {}, f"HOLO1_RUN_ID={self.id}".encode()
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()] if pids is None else pids:
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if mark in words:
                    found[pid] = next((int(word[5:]) for word in words if word.startswith(b"RANK=")), None)
        return found

    def send(self, number: int, pids: Iterable[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill_all(self) -> None:
        for _ in range(50):  # the unkillable (stuck in the kernel) are given up after 5 s
            if not (left := self.members()):
                return
            self.send(signal.SIGKILL, left)
            time.sleep(0.1)

    def prepare(self, num_nodes: int) -> str:
        """Lays the launcher's list of machines, and for every rank the files into which it can write on a full disk,
        too: each has a block. Returns why that cannot be."""
        laid = {f"{kind}-{rank}": " " * BLOCK for rank in self.ranks for kind in ("beat", "rank")}
        laid |= {"smaller": " " * BLOCK}
        # The launcher counts the lines, and calls nobody in it.
        laid |= {"hostfile": "".join(f"node{number} slots={2 * NO_GPU}\n" for number in range(num_nodes))}
        try:
            for name, text in laid.items():
                Path(self.status_dir, name).write_text(text)
        except OSError as error:
            return f"{self.status_dir}: {error}; free some space there, or set TMPDIR to a folder that has some"
        return ""

    def start_watchdog(self) -> None:
        """A process that clears up when its pipe ends without a word: at the wrapper's end by SIGKILL, say."""
        reading, self.pipe = os.pipe()  # the launcher inherits neither end
        self.watchdog = os.fork()
        if self.watchdog:
            return os.close(reading)
        os.setsid()
        os.close(self.pipe)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if not os.read(reading, 1):
            self.kill_all()
            shutil.rmtree(self.status_dir, ignore_errors=True)
            release_ports()
        os._exit(0)

    def clear_up(self) -> None:
        """Nothing of this run is left: no process, no watchdog, no folder."""
        self.kill_all()
        with contextlib.suppress(BrokenPipeError):  # somebody has killed it
            os.write(self.pipe, b".")
        os.close(self.pipe)
        os.waitpid(self.watchdog, 0)
        shutil.rmtree(self.status_dir, ignore_errors=True)

    def living(self) -> dict[int, int]:
        """The ranks that run, rank -> process id."""
        if len(self.pids) < self.num_ranks:
            everyone = self.members()
            for pid, rank in everyone.items():
                if rank is not None and everyone.get(state_of(pid)[1], 0) is None:  # a rank's helpers share its RANK
                    self.pids[rank] = pid
            if len(self.pids) == self.num_ranks:  # asleep, the launcher cannot kill ranks that still save
                self.asleep = [pid for pid, rank in everyone.items() if rank is None and pid != self.launcher.pid]
                self.send(signal.SIGSTOP, self.asleep)
        alive = self.members(list(self.pids.values()))
        return {rank: pid for rank, pid in self.pids.items() if pid in alive}

    def codes(self) -> dict[int, int]:
        found = {}
        for file in Path(self.status_dir).glob("rank-*"):
            with contextlib.suppress(ValueError, OSError):  # half written
                found[int(file.name[5:])] = int(file.read_text())
        return found

    def smaller(self) -> dict[str, object]:
        """What a rank whose memory ran out asks of a new start; empty where there is nothing smaller."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((Path(self.status_dir) / "smaller").read_text())
        return {}

    def watch(self) -> None:
        """Returns when every rank has ended, or must be ended."""
        while True:
            living, codes = self.living(), self.codes()  # in this order: who has ended has written before
            gone = self.launcher.poll() is not None or bool(living and self.asleep and not self.members(self.asleep))
            if gone and not living:
                return
            if not self.failed_first and (hanging := self.hanging(living, codes)):
                return self.end_hang(hanging, living)
            if time.monotonic() > self.deadline and not self.still_saving(living, codes):
                self.ended_by_us = [*living]
                return say(f"killing what still runs: ranks {[*living]}") if living else None
            if len(self.pids) == self.num_ranks and not living:
                self.send(signal.SIGCONT, self.asleep)  # its turn to end
            if self.deadline == float("inf"):
                self.note_an_end(living, codes, gone)
            if self.take_signal(living):
                self.ended_by_us = [*living]
                return

    def note_an_end(self, living: dict[int, int], codes: dict[int, int], gone: bool) -> None:
        """Sets the time by which all must have ended, once there is a reason for it."""
        if len(codes) == self.num_ranks:
            self.deadline = time.monotonic() + GRACE_S
        elif self.failed(living, codes):
            time.sleep(0.1)  # a rank may die and take another down between our looks at processes and codes
            living, codes = self.living(), self.codes()
            if not (failed := self.failed(living, codes)):
                return  # its code was half written
            # A rank that says why comes first, then one that was killed; a bare 1 may be what the other's end has done.
            order = {rank: 0 if codes.get(rank) in OWN_CODES else 2 if rank in codes else 1 for rank in failed}
            self.failed_first = sorted(rank for rank in failed if order[rank] == min(order.values()))
            self.deadline = time.monotonic() + GRACE_S
            if living:
                stopped = all(codes.get(rank, 0) - 128 in SIGNALS for rank in self.failed_first)
                ended = "ended" if stopped else "failed"
                say(f"ranks {self.failed_first} have {ended}: ranks {[*living]} get {GRACE_S} s to end")
        elif gone and (asked := -(self.launcher.returncode or 0)) in SIGNALS and not self.signal:
            self.arrived.put(asked)  # who asks the launcher to stop asks us: schedulers signal everyone at once
        elif gone and not self.signal:  # after a signal ranks save, and need no launcher for it
            self.orphaned, self.deadline = True, time.monotonic() + ORPHAN_GRACE_S
            say(f"the launcher was killed: ranks {[*living]} get {ORPHAN_GRACE_S} s to stop, or longer if they save")
            self.ask(signal.SIGTERM, living)

    def failed(self, living: dict[int, int], codes: dict[int, int]) -> list[int]:
        return [rank for rank in {*self.pids, *codes} if codes.get(rank, rank not in living) not in (0, 85)]

    def still_saving(self, living: dict[int, int], codes: dict[int, int]) -> bool:
        """Whether someone is to be waited for, whose save would be cut. Not for ever, not after a rank's death, and
        once one has failed only for those that finish what was saved before it: a save needs all."""
        died = [rank for rank in self.failed_first if rank not in codes]
        beats = {} if died or time.monotonic() > self.deadline + SAVING_S else self.beats()
        stages = ("finishing",) if self.failed_first else ("saving", "finishing")
        saving = [rank for rank, beat in beats.items() if beat.get("stage") in stages]
        return any(rank in living and rank not in codes for rank in saving)

    def ask(self, number: int, living: dict[int, int]) -> None:
        """Lets ranks save and stop: by the signal itself, so that a warning is one to them, too; by SIGTERM those of a
        script that may not know it. Who has been asked before would take it for a second one."""
        beats = self.beats()
        for rank, pid in living.items():
            if not beats.get(rank, {}).get("asked"):
                self.send(signal.SIGTERM if number in SOFT and rank not in beats else number, [pid])

    def take_signal(self, living: dict[int, int]) -> bool:
        """Passes on the signal that has arrived within a tenth of a second; whether it ends everything at once."""
        try:
            number = self.arrived.get(timeout=0.1)
        except queue.Empty:
            return False
        name, before = signal.Signals(number).name, self.signal
        if before and number in SOFT:
            return False
        self.forced = before not in (0, *SOFT) or len(self.pids) < self.num_ranks  # nothing to save before
        self.signal = number if before in SOFT else before or number
        if self.forced:
            say(f"{name}: ending everything at once")
        elif before:  # SLURM warns by SIGUSR1, and sends SIGTERM when the time is up: half a minute to go on saving
            say(f"{name}: still waiting until ranks {[*living]} have saved; once more kills them")
        else:
            if not self.orphaned:  # a second one would end them
                self.ask(number, living)
            elif not self.failed_first:
                self.deadline = float("inf")
            say(f"{name} passed on: waiting until ranks {[*living]} have saved; once more kills them")
        return self.forced

    def verdict(self) -> tuple[int, str]:
        """The exit code to believe, and why. When every rank has left its code, these decide, whatever became of the
        launcher. Of several, 80-86 goes before 2 before any other; a tie, to the lowest."""
        codes, launcher = self.codes(), self.launcher.returncode
        if self.hang:
            codes.setdefault(self.hung, 84)
        missing = [rank for rank in self.ranks if rank not in codes]
        # 85 comes last among its equals: another's code says why the rest had to stop.
        order = [(not 80 <= code <= 86, code != 2, code == 85, rank, code) for rank, code in codes.items() if code]
        code = min(order)[-1] if order else 0
        if missing and code in (0, 85):  # what a missing rank should have saved is not saved
            code = launcher if not codes and 0 < launcher < 128 else 1
        if self.signal and code and (not 80 <= code <= 86 or (missing and self.forced)):
            return 128 + self.signal, "; ".join([self.unsaved(), *self.causes(missing)])
        if name := self.stopped_early(codes, missing):
            ours = [f"ranks {missing} were ended by us"] if missing else []
            return code, "; ".join([f"stopped by {name} while {self.place()[0]}: nothing had been trained", *ours])
        why = [] if code == 84 and self.hang else self.causes(missing)
        if code == 85:
            why = [self.saved(), *why]
        elif code != 1 or not missing:
            why = [MEANINGS.get(code, f"the script's own code {code}") + (f": {self.hang}" if code == 84 else ""), *why]
        return code, "; ".join(why)

    def stopped_early(self, codes: dict[int, int], missing: list[int]) -> str:
        """What has stopped all ranks before there was anything to save, where we were not told of it; else empty."""
        told = self.signal or self.orphaned or {*missing} - {*self.ended_by_us}
        numbers = [code - 128 for code in codes.values()]
        if told or not numbers or not all(number in SIGNALS for number in numbers) or self.place()[0] not in STAGES[:2]:
            return ""
        asked = [beat.get("asked") for beat in self.beats().values()]
        return "SAVE_AND_STOP" if "SAVE_AND_STOP" in asked else signal.Signals(min(numbers)).name

    def causes(self, missing: list[int]) -> list[str]:
        """Who failed first, whom we have ended, and who else is without a code."""
        why = ["the launcher was killed"] if self.orphaned else []
        if missing == [*self.ranks] and self.launcher.returncode == 0:
            return [*why, "no rank left the proof that it finished: its exit code in the folder HOLO1_STATUS_DIR"]
        died = [rank for rank in self.failed_first if rank in missing]
        if died:
            why.append(f"ranks {died} died first and left no exit code: killed, or ended before their last act")
        elif self.failed_first and len(self.failed_first) < self.num_ranks:
            why.append(f"ranks {self.failed_first} failed first")
        if ours := [rank for rank in missing if rank in self.ended_by_us]:
            why.append(f"ranks {ours} were ended by us")
        if others := [rank for rank in missing if rank not in {*died, *ours}]:
            why.append(f"ranks {others} left no exit code: killed, or ended before their last act")
        return why

    # -------------------------------------------------------------------------
    # Beats

    def beats(self) -> dict[int, dict]:
        """What the ranks last said of themselves, and when: rank -> stage, step, since, limit_s, ..., written."""
        found = {}
        for file in Path(self.status_dir).glob("beat-*"):
            with contextlib.suppress(ValueError, OSError):  # a name that is about to become one
                found[int(file.name[5:])] = json.loads(file.read_text()) | {"written": file.stat().st_mtime}
        return found

    def hanging(self, living: dict[int, int], codes: dict[int, int]) -> list[tuple[bool, float, int]]:
        """The ranks that hang, the likeliest cause first: one that writes no beats, then who has been waiting longest.
        A rank without beats is still importing, and one that has left its code has done its work."""
        now = time.time()
        if not 0 <= now - self.looked < SILENT_S / 2:  # we slept, too (a machine suspended), or the clock was set
            self.counts_from = now
        self.looked, found, silent_too = now, [], []
        for rank, beat in self.beats().items():
            if rank in living and rank not in codes:
                since, limit_s = max(beat.get("since", now), self.counts_from), beat.get("limit_s")
                silent_s = now - max(beat["written"], self.counts_from)
                entry = (silent_s <= QUIET_S, since, rank)
                late = limit_s is not None and now - since > limit_s + QUIET_S
                if limit_s is None:
                    limit_s = STOPPED_S if state_of(living[rank])[0] == "T" else STARVED_S
                if late or silent_s > max(limit_s, SILENT_S):
                    found.append(entry)
                elif silent_s > SILENT_S:
                    silent_too.append(entry)  # the others may wait for it, under a shorter limit than its own
        return sorted([*found, *silent_too]) if found else []

    def end_hang(self, hanging: list[tuple[bool, float, int]], living: dict[int, int]) -> None:
        """Lets all ranks write their stacks, and keeps what is to be said of the one that hangs."""
        now, beats = time.time(), self.beats()
        beating, since, self.hung = hanging[0]
        beat = beats[self.hung]
        known = [f"stage {beat.get('stage')}", f"step {beat.get('step')}", f"{now - since:.0f} s without progress"]
        known += [] if beating else [f"{now - beat['written']:.0f} s without a sign of life: stopped, or starved"]
        if pages := beat.get("pages"):
            known.append("pages " + ", ".join(map(str, pages)))
        self.hang, self.ended_by_us = f"rank {self.hung}, " + ", ".join(known), [*living]
        others = f"; ranks {sorted(rank for *_, rank in hanging[1:])} wait, too" if hanging[1:] else ""
        say(f"a rank hangs: {self.hang}{others}; ranks {[*living]} write their stacks and are ended")
        files = [Path(beat["stacks"]) for _, beat in sorted(beats.items()) if beat.get("stacks")]
        before = {file: file.stat().st_size for file in files if file.is_file()}  # they may hold those of earlier runs
        asked = [pid for rank, pid in living.items() if rank in beats]  # without a handler the signal kills
        self.send(signal.SIGUSR2, asked)
        self.send(signal.SIGCONT, asked)  # a stopped process writes its own, too
        time.sleep(STACKS_S)
        files = [str(file) for file in files if file.is_file() and file.stat().st_size > before.get(file, 0)]
        self.hang += "; stacks: " + (", ".join(files) or "none were written")

    def place(self) -> tuple[str, str]:
        """The stage of the rank that has come furthest, and the output folder; empty where no rank has said them."""
        beats = self.beats().values()
        folder = next((beat["output_dir"] for beat in beats if beat.get("output_dir")), "")
        stages = [beat["stage"] for beat in beats if beat.get("stage") in STAGES]
        return max(stages, key=STAGES.index, default=""), folder

    def saved(self) -> str:
        """What code 85 means, by what the ranks said when they were stopped."""
        stage, folder = self.place()
        if stage in STAGES[:2]:
            return f"stopped by a signal while {stage}: nothing had been trained"
        where = f" in {folder}" if folder else ""
        if stage in ("judging", "publishing"):
            return f"stopped by a signal while {stage}: what was trained is saved{where}"
        return MEANINGS[85] + (f"{where}, --resume goes on" if folder else "")

    def unsaved(self) -> str:
        """What is to be said of ranks that a signal has ended before they left 85."""
        name, (stage, folder) = signal.Signals(self.signal).name, self.place()
        if stage in STAGES[:2] or len(self.pids) < self.num_ranks:
            return f"stopped by {name} {f'while {stage}' if stage else 'at the start'}: nothing had been trained"
        where = f" in {folder}" if folder else ""
        if stage in ("judging", "publishing"):
            return f"stopped by {name} while {stage}: what was saved before is{where or ' there'}"
        hint = f"; --resume goes on from the last whole checkpoint{where}, if there is one" if folder else ""
        return f"stopped by {name}{' while saving' if stage in ('saving', 'finishing') else ''}, state not saved{hint}"


# -----------------------------------------------------------------------------
# Main


def start(
    args: argparse.Namespace, gpus: list[str], passed_on: list[str], arrived: queue.SimpleQueue[int]
) -> tuple[int, dict[str, object]]:
    """One run from its start to its last line. Returns the exit code, and what a start with less memory should ask for
    (empty where there is nothing to ask, or nobody to be asked)."""
    run = Run(args.num_gpus, args.num_gpus * (args.node_rank or 0), arrived)
    run.start_watchdog()
    try:
        if trouble := run.prepare(args.num_nodes):
            say(f"exit 81: {MEANINGS[81]}: {trouble}")
            return 81, {}
        command = build_command(args, gpus, passed_on, os.path.join(run.status_dir, "hostfile"))
        with contextlib.suppress(OSError):  # a terminal that was closed since a first start
            print(shlex.join(command), flush=True)
        env = run.environment(gpus)  # a session of its own: Ctrl-C in the terminal reaches the ranks through us, once
        run.launcher = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
        run.watch()
        run.kill_all()
        run.launcher.wait()
        code, why = run.verdict()
        met = run.place()[0] not in ("", *STAGES[:2])
        if code == 1 and not met and not args.node_rank and (trouble := bind_trouble(args.master_port)):
            code = 2
            why = f"the ranks could not meet: --master_port {args.master_port}: {trouble}, another process has taken "
            why += "it since the start; give another, or start again without for the next free one"
        elsewhere = "; or another machine failed: see there" if code == 1 and args.num_nodes > 1 else ""
        say(f"exit {code}: {why}{elsewhere}")
        return code, {} if run.signal or code != OUT_OF_MEMORY_CODE else run.smaller()
    finally:
        run.clear_up()


def without(words: list[str], flag: str) -> list[str]:
    """A command line without a flag and its value, in both of argparse's spellings."""
    kept, skip = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        found = name.startswith("--") and name.replace("-", "_") == flag.replace("-", "_")
        if not (found or skip):
            kept.append(word)
        skip = found and not equals
    return kept


def train(args: argparse.Namespace, gpus: list[str], passed_on: list[str]) -> int:
    """Starts, and starts again with less at once where memory runs out. Returns the last start's exit code."""
    arrived: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup has ignored SIGHUP: so do we
            signal.signal(number, lambda number, frame: arrived.put(number))
    code, smaller = start(args, gpus, passed_on, arrived)
    for _ in range(MOST_SMALLER):
        if not smaller or not args.retry_smaller:
            break
        if not arrived.empty():
            say(f"{signal.Signals(arrived.get()).name}: not starting again")
            break
        more, given = ["--micro_batch", str(smaller["micro_batch"])], len(passed_on)
        # A share is told in the environment, which other machines do not have.
        share = smaller.get("filled_share") if args.num_nodes == 1 else None
        more += ["--fill_memory", "False"] if share is None and {"filled_share", "fill_memory"} & {*smaller} else []
        if smaller.get("resume"):  # from the newest checkpoint: the script takes no other beside it
            passed_on = without(passed_on, "--resume_from_checkpoint")
            more += [] if "--resume" in passed_on else ["--resume"]
        instead = " in place of --resume_from_checkpoint" if len(passed_on) < given else ""
        if args.num_nodes > 1:  # the other machines' wrappers may not know, and all must ask for the same
            say(f"less at once may do: start again on every machine, with {shlex.join(more)}{instead}")
            break
        os.environ["HOLO1_ADDED_WORDS"] = str(len(more))  # ours: a run that its user resumes later goes without them
        filling = ""
        if share is not None:
            os.environ["HOLO1_FILLED_SHARE"] = str(share)
            filling = f", batches filling {share:.0%} of the memory planned for"
        say(f"GPU memory ran out: starting again with {shlex.join(more)}{instead}{filling}")
        code, smaller = start(args, gpus, [*passed_on, *more], arrived)
    return code


def main(argv: list[str] | None = None) -> int:
    args, passed_on = read_command_line(sys.argv[1:] if argv is None else argv)
    refuse_other_systems()
    gpus = usable_gpus()
    problems = find_problems(args, gpus, passed_on)
    problems += script_problems(args, passed_on, problems, gpus)
    try:
        tempfile.gettempdir()  # one in which it has written a few bytes
    except FileNotFoundError as error:
        say(f"exit 81: {MEANINGS[81]}: {error}; free some space, or set TMPDIR to a folder that has some")
        return 81
    try:
        if not problems or args.master_port is not None:  # a free one is looked for where the run can begin
            problems += port_problems(args)
        if problems:
            print(*problems, sep="\n", file=sys.stderr)
            return 2
        if args.num_nodes > 1:
            ranks = f"{args.num_nodes} x {args.num_gpus} ranks"
            say(f"machine {args.node_rank} of {ranks}, which meet at {args.master_addr}")
        if not gpus:
            count = f"{args.num_gpus} process{'es' if args.num_gpus > 1 else ''}"
            say(f"no GPU can be used here: {count} on the CPU, with gloo")
        if args.dry_run:
            print(shlex.join(build_command(args, gpus, passed_on, "HOSTFILE_WRITTEN_AT_THE_START")), flush=True)
            return 0
        return train(args, gpus, passed_on)
    finally:
        release_ports()


if __name__ == "__main__":
    sys.exit(main())
