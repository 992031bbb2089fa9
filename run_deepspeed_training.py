"""Start the training under the `deepspeed` launcher, stop it cleanly, and tell the truth about how it ended.

    python run_deepspeed_training.py --dry_run    # checks everything, shows the command, starts nothing
    python run_deepspeed_training.py --demo       # a tiny model, no network, no GPU
    python run_deepspeed_training.py --num_gpus 4 --num_samples 5000 --learning_rate 1e-5
    python run_deepspeed_training.py --num_gpus 8 --num_nodes 2 --node_rank 0 --no_ssh --master_addr 10.0.0.1

The last is for two machines: the other one gets the same with --node_rank 1; under srun, neither needs the last four.
Flags that are not listed by --help, and all after `--`, go to the training script untouched. One Ctrl-C (or SIGTERM)
lets the training save its state and exit with 85; a second one ends everything at once. The launcher loses exit codes
and leaves ranks behind (deepspeed 0.19.8): so HOLO1_RUN_ID marks every process of a run, and each rank's last act is
to write its exit code to `rank-<RANK>` in the folder HOLO1_STATUS_DIR.

Sections: Command line, Checks, Run, Main.
"""

import argparse
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

from training.errors import MEANINGS

DEFAULT_PORT = 29500
NO_GPU = 1000  # the number of no GPU: the launcher shows hidden GPUs to the ranks again, by the numbers we give it
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S, ORPHAN_GRACE_S = 10, 2  # the other ranks' time when one has failed; all ranks' when the launcher was killed


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
    parser.add_argument("--dry_run", action="store_true", help="check everything, print the command, start nothing")
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
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(args.num_gpus)]
    if "CUDA_VISIBLE_DEVICES" in os.environ:  # --num_gpus ignores it and takes the first GPUs; --include obeys
        chosen = gpus or [str(NO_GPU + rank) for rank in range(args.num_gpus)]
        ours = ",".join(chosen[: args.num_gpus])  # of other machines' GPUs, only the number counts here
        hosts = ["localhost"] if args.num_nodes == 1 else [f"node{number}" for number in range(args.num_nodes)]
        launcher[3:] = ["--include", "@".join(f"{host}:{ours}" for host in hosts)]
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


def port_trouble(port: int) -> str:
    """Why the rendezvous cannot listen there, on IPv4 and IPv6; empty when it can."""
    both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
    try:
        socket.create_server(("", port), **both).close()
    except OSError as error:
        return os.strerror(error.errno)
    return ""


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
    """All that would stop this run, each with its remedy; --script, --config and --master_port are resolved here."""
    problems = []
    for name in ("num_gpus", "num_nodes", "num_samples"):
        if (value := getattr(args, name)) is not None and value < 1:
            problems.append(f"--{name} {value}: give 1 or more")
    problems += machine_problems(args)
    if gpus and args.num_gpus > len(gpus):
        which = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        only = f"only {len(gpus)} can be used here (CUDA_VISIBLE_DEVICES: {which})"
        problems.append(f"--num_gpus {args.num_gpus}: {only}; ask for at most {len(gpus)}")
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
# Run


def parent_of(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return 0


class Run:
    """One start of the launcher: its processes, how they end, and what that means."""

    def __init__(self, num_ranks: int, first_rank: int = 0):
        self.ranks = range(first_rank, first_rank + num_ranks)  # of this machine
        self.num_ranks, self.id, self.status_dir = num_ranks, uuid.uuid4().hex, tempfile.mkdtemp(prefix="holo1-run-")
        self.pids: dict[int, int] = {}  # rank -> process id
        self.asleep: list[int] = []  # the part of the launcher that watches over the ranks, while we do
        self.signal, self.forced, self.orphaned = 0, False, False
        self.arrived: queue.SimpleQueue[int] = queue.SimpleQueue()

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

    def start_watchdog(self) -> None:
        """A process that clears up when its pipe ends: at the wrapper's end, even by SIGKILL."""
        reading, self.pipe = os.pipe()  # the launcher inherits neither end
        if os.fork():
            return os.close(reading)
        os.setsid()
        os.close(self.pipe)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        os.read(reading, 1)
        self.kill_all()
        shutil.rmtree(self.status_dir, ignore_errors=True)
        os._exit(0)

    def living(self) -> dict[int, int]:
        """The ranks that run, rank -> process id."""
        if len(self.pids) < self.num_ranks:
            everyone = self.members()
            for pid, rank in everyone.items():
                if rank is not None and everyone.get(parent_of(pid), 0) is None:  # a rank's helpers share its RANK
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

    def watch(self) -> None:
        """Returns when every rank has ended, or must be ended."""
        deadline = float("inf")
        while True:
            living, codes = self.living(), self.codes()  # in this order: who has ended has written before
            ended = self.launcher.poll() is not None or bool(living and self.asleep and not self.members(self.asleep))
            failed = [rank for rank in {*self.pids, *codes} if codes.get(rank, rank not in living) not in (0, 85)]
            if ended and not living:
                return
            if time.monotonic() > deadline:
                return say(f"killing what still runs: ranks {[*living]}")
            if len(self.pids) == self.num_ranks and not living:
                self.send(signal.SIGCONT, self.asleep)  # its turn to end
            if deadline == float("inf") and (ended or failed or len(codes) == self.num_ranks):
                deadline = time.monotonic() + (ORPHAN_GRACE_S if ended else GRACE_S)
                self.orphaned = ended
                if ended:
                    say(f"the launcher was killed: ranks {[*living]} get {ORPHAN_GRACE_S} s to stop")
                    self.send(signal.SIGTERM, living.values())
                elif failed and living:
                    say(f"ranks {failed} have failed: ranks {[*living]} get {GRACE_S} s to end")
            with contextlib.suppress(queue.Empty):
                number = self.arrived.get(timeout=0.1)
                name = signal.Signals(number).name
                if self.signal and number == signal.SIGHUP:
                    continue  # a terminal that closes sends two
                self.forced = bool(self.signal) or len(self.pids) < self.num_ranks  # nothing to save before all run
                self.signal = self.signal or number
                if self.forced:
                    return say(f"{name}: ending everything at once")
                self.send(signal.SIGTERM if number == signal.SIGHUP else number, living.values())
                say(f"{name} passed on: waiting until ranks {[*living]} have saved; once more kills them")

    def verdict(self) -> tuple[int, str]:
        """The exit code to believe, and why. Of several, 80-86 goes before 2 before any other; a tie, to the lowest."""
        codes, launcher = self.codes(), self.launcher.returncode
        missing = [rank for rank in self.ranks if rank not in codes]
        # 85 comes last among its equals: another's code says why the rest had to stop.
        order = [(not 80 <= code <= 86, code != 2, code == 85, rank, code) for rank, code in codes.items() if code]
        code = min(order)[-1] if order else launcher if 0 < launcher < 128 else int(bool(missing or launcher))
        why = [f"ranks {missing} left no exit code: killed, or ended before their last act"] if missing else []
        if not codes and launcher == 0:
            why = ["no rank left the proof that it finished: its exit code in the folder HOLO1_STATUS_DIR"]
        if self.orphaned:
            code, why = code or 1, ["the launcher was killed", *why]
        if self.signal and code and (not 80 <= code <= 86 or (missing and self.forced)):
            code, why = 128 + self.signal, [f"stopped by {signal.Signals(self.signal).name}, state not saved", *why]
        return code, "; ".join(
            why if code == 1 and why else [MEANINGS.get(code, f"the script's own code {code}"), *why]
        )


# -----------------------------------------------------------------------------
# Main


def main(argv: list[str] | None = None) -> int:
    args, passed_on = read_command_line(sys.argv[1:] if argv is None else argv)
    gpus = usable_gpus()
    if problems := find_problems(args, gpus, passed_on):
        print(*problems, sep="\n", file=sys.stderr)
        return 2
    hostfile = "HOSTFILE_WRITTEN_AT_THE_START"
    if not args.dry_run:
        run = Run(args.num_gpus, args.num_gpus * (args.node_rank or 0))
        run.start_watchdog()
        hostfile = os.path.join(run.status_dir, "hostfile")  # the launcher counts its lines, and calls nobody in it
        Path(hostfile).write_text("".join(f"node{number} slots={2 * NO_GPU}\n" for number in range(args.num_nodes)))
    command = build_command(args, gpus, passed_on, hostfile)
    if args.num_nodes > 1:
        say(f"machine {args.node_rank} of {args.num_nodes} x {args.num_gpus} ranks, which meet at {args.master_addr}")
    if not gpus:
        say(f"no GPU can be used here: {args.num_gpus} processes on the CPU, with gloo")
    print(shlex.join(command), flush=True)
    if args.dry_run:
        return 0
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup has ignored SIGHUP: so do we
            signal.signal(number, lambda number, frame: run.arrived.put(number))
    try:  # a session of its own: Ctrl-C in the terminal reaches the ranks through us, once
        env = run.environment(gpus)
        run.launcher = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
        run.watch()
    finally:
        run.kill_all()
    run.launcher.wait()
    code, why = run.verdict()
    say(f"exit {code}: {why}" + ("; or another machine failed: see there" if code == 1 and args.num_nodes > 1 else ""))
    return code


if __name__ == "__main__":
    sys.exit(main())
