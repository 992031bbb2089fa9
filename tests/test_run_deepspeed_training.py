"""The wrapper, driven for real: the true launcher, two ranks, true signals, and a look at who is left in /proc.

    python -m pytest tests/test_run_deepspeed_training.py               # what needs no launcher
    python -m pytest tests/test_run_deepspeed_training.py -m slow       # starts and kills ranks, some minutes

Sections: Command line, Checks, Several machines, Ends, Signals, Kills, Two machines.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROGRAMS, free_port, loaded_for_help

import run_deepspeed_training as wrapper

ROOT = Path(wrapper.__file__).resolve().parent
LAUNCHER = [sys.executable, "-m", "deepspeed.launcher.runner"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of its own with a script and a configuration, on a machine without a GPU and with every port free."""
    (tmp_path / "train.py").write_text("")
    (tmp_path / "zero.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", *[name for name in os.environ if name.startswith("SLURM_")]):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(wrapper, "port_trouble", lambda port: "")
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi, unless the test puts one there
    return tmp_path


def dry_run(capsys, *flags: str) -> list[str]:
    assert wrapper.main(["--dry_run", "--script", "train.py", "--config", "zero.json", *flags]) == 0
    return shlex.split(capsys.readouterr().out)


def refused(capsys, *flags: str) -> str:
    assert wrapper.main(["--script", "train.py", "--config", "zero.json", *flags]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


# -----------------------------------------------------------------------------
# Command line


def test_without_flags_the_training_script_gets_its_configuration_and_nothing_else(here, capsys):
    assert dry_run(capsys) == [
        *LAUNCHER,
        *["--num_gpus", "1", "--master_port", "29500", "train.py", "--deepspeed", "zero.json"],
    ]


def test_typed_settings_are_passed_on(here, capsys):
    typed = ["--hub_repo", "me/x", "--push_to_hub", "--private_repo", "--num_samples", "7"]
    front = [*LAUNCHER, *["--num_gpus", "2", "--master_port", "4000", "train.py", "--deepspeed", "zero.json"]]
    passed = ["--push_to_hub", "--private_repo", "--hub_repo", "me/x", "--num_samples", "7"]
    assert dry_run(capsys, "--num_gpus", "2", "--master_port=4000", *typed) == [*front, *passed]


def test_other_flags_go_through_untouched_and_in_order(here, capsys):
    others = ["--learning_rate", "1e-5", "--lora", "--demo", "--num", "3", "--note=two words; $HOME", "-x", "-1", ""]
    assert dry_run(capsys, *others[:5], "--num_gpus", "2", *others[5:])[-len(others) :] == others


def test_everything_after_two_dashes_belongs_to_the_training_script(here, capsys):
    command = dry_run(capsys, "--lora", "--", "--num_gpus", "9", "--help")
    front = [*LAUNCHER, *["--num_gpus", "1", "--master_port", "29500", "train.py", "--deepspeed", "zero.json"]]
    assert command == [*front, "--lora", "--num_gpus", "9", "--help"]


def test_defaults_are_found_beside_the_wrapper_from_any_folder(here, capsys):
    assert wrapper.main(["--dry_run"]) == 0
    command = shlex.split(capsys.readouterr().out)
    assert command[-3:] == [str(ROOT / "holo1_dom_finetune.py"), "--deepspeed", str(ROOT / "ds_z3.json")]


def test_help_answers_at_once_and_loads_no_torch():
    said, loaded, seconds = loaded_for_help(wrapper.__file__, ROOT)
    assert seconds < 3
    assert not [name for name in loaded if name.split(".")[0] in ("torch", "deepspeed")]
    shown = "--num_gpus --master_port --config --script --hub_repo --push_to_hub --private_repo --num_samples --dry_run"
    shown += " --num_nodes --node_rank --no_ssh --master_addr --hostfile"
    assert [flag for flag in shown.split() if flag not in said] == []
    assert [word for word in ["29500", "ds_z3.json", "holo1_dom_finetune.py", "1000"] if word not in said] == []


# -----------------------------------------------------------------------------
# Checks


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--num_gpus 0", "--num_gpus 0: give 1 or more"),
        ("--num_gpus -3", "--num_gpus -3: give 1 or more"),
        ("--num_samples 0", "--num_samples 0: give 1 or more"),
        ("--master_port 0", "--master_port 0: give a number from 1 to 65535"),
        ("--master_port 65536", "--master_port 65536: give a number from 1 to 65535"),
        ("--script gone.py", "--script gone.py: no such file, neither here nor beside this wrapper; correct the path"),
        ("--config no.json", "--config no.json: no such file, neither here nor beside this wrapper; correct the path"),
        ("--deepspeed x.json", "--deepspeed: this wrapper passes it itself; give --config FILE"),
        ("--lora --deepspeed=x.json", "--deepspeed: this wrapper passes it itself; give --config FILE"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_refused_with_its_value_and_the_remedy(here, capsys, flags, expected):
    assert expected + "\n" in refused(capsys, *flags.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{\n  "bf16": }', "line 2 column 11"),
        (b"", "line 1 column 1"),
        (b"\xff\xfe\xfd", "not readable as JSON"),
        (b"[1]", "must hold a JSON object, {...}; start from ds_z3.json"),
    ],
)
def test_a_broken_configuration_is_refused_with_the_place(here, capsys, text, expected):
    (here / "zero.json").write_bytes(text)
    error = refused(capsys)
    assert error.startswith("--config zero.json: ") and expected in error


def test_a_word_where_a_number_belongs_is_refused():
    done = subprocess.run([sys.executable, wrapper.__file__, "--num_gpus", "four"], capture_output=True, text=True)
    assert done.returncode == 2 and "four" in done.stderr


def test_all_problems_are_named_at_once(here, capsys, monkeypatch):
    monkeypatch.setattr(wrapper.importlib.util, "find_spec", lambda name: None)
    flags = [
        "--num_gpus",
        "0",
        "--num_samples",
        "-1",
        "--master_port",
        "70000",
        "--script",
        "a.py",
        "--config",
        "b.json",
        "--deepspeed",
        "c",
    ]
    problems = refused(capsys, *flags).splitlines()
    starts = ["--num_gpus", "--num_samples", "--master_port", "--script", "--config", "--deepspeed:", "deepspeed"]
    assert [problem.split()[0] for problem in problems] == starts
    assert problems[-1].endswith(f"{sys.executable} -m pip install deepspeed")


def test_dry_run_refuses_what_a_real_run_would(here, capsys):
    assert wrapper.main(["--dry_run", "--script", "gone.py"]) == 2


def test_a_busy_default_port_moves_on_and_says_so(here, capsys, monkeypatch):
    monkeypatch.setattr(wrapper, "port_trouble", lambda port: "busy" if port < 29502 else "")
    assert wrapper.main(["--dry_run", "--script", "train.py", "--config", "zero.json"]) == 0
    said = capsys.readouterr()
    assert "--master_port 29502 " in said.out and "port 29500 is busy: taking 29502" in said.err


@pytest.mark.parametrize("address", ["0.0.0.0", "127.0.0.1", "::"])
def test_a_busy_port_that_was_typed_is_refused(tmp_path, address):
    (tmp_path / "train.py").write_text("")
    (tmp_path / "zero.json").write_text("{}")
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as server:
        port = str(server.getsockname()[1])
        flags = ["--script", "train.py", "--config", "zero.json", "--master_port", port, "--dry_run"]
        command = [sys.executable, wrapper.__file__, *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=10)
    assert done.returncode == 2
    assert f"--master_port {port}: Address already in use; give another, or none for the next free one" in done.stderr


def four_gpus(here: Path) -> None:
    shutil.copy(PROGRAMS / "four_gpus.sh", here / "nvidia-smi")


@pytest.mark.parametrize(
    ("visible", "wanted", "expected"),
    [
        (None, 4, "--num_gpus 4"),
        ("2,3", 2, "--include localhost:2,3"),
        ("3,1,0", 2, "--include localhost:3,1"),
        ("GPU-22-ab", 1, "--include localhost:2"),
        ("", 2, "--include localhost:1000,1001"),  # hidden, and hidden they stay
        ("-1", 1, "--include localhost:1000"),
        (None, 5, "--num_gpus 5: only 4 can be used here (CUDA_VISIBLE_DEVICES: not set); ask for at most 4"),
        ("0,9", 2, "--num_gpus 2: only 1 can be used here (CUDA_VISIBLE_DEVICES: 0,9); ask for at most 1"),
    ],
)
def test_the_gpus_are_those_that_are_visible(here, capsys, monkeypatch, visible, wanted, expected):
    four_gpus(here)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if "only" in expected:
        assert refused(capsys, "--num_gpus", str(wanted)) == expected + "\n"
    else:
        front = [*LAUNCHER, *expected.split(), "--master_port", "29500"]
        assert dry_run(capsys, "--num_gpus", str(wanted)) == [*front, "train.py", "--deepspeed", "zero.json"]


def test_a_machine_without_a_gpu_trains_on_its_cpu_and_says_so(here, capsys):
    assert wrapper.main(["--dry_run", "--script", "train.py", "--config", "zero.json", "--num_gpus", "2"]) == 0
    assert "no GPU can be used here: 2 processes on the CPU, with gloo" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# Several machines

HOSTFILE = "HOSTFILE_WRITTEN_AT_THE_START"
SECOND_OF_TWO = ["--num_nodes", "2", "--node_rank", "1", "--no_ssh", "--master_addr", "10.0.0.1"]
SRUN = {"STEP_NUM_NODES": "4", "STEP_NUM_TASKS": "4", "NODEID": "2", "STEP_NODELIST": "node[01-03,07]"}
SRUN |= {"JOB_NUM_NODES": "8", "NNODES": "4", "JOB_NODELIST": "node[00-07]", "LAUNCH_NODE_IPADDR": "10.9.9.9"}


def by_srun(monkeypatch, **variables: str) -> None:
    for name, text in (SRUN | variables).items():
        monkeypatch.setenv(f"SLURM_{name}", text)


def expected_command(rank: int, address: str, port: int = 29500, gpus: str = "--num_gpus 1") -> list[str]:
    flags = f"{gpus} --hostfile {HOSTFILE} --no_ssh --node_rank {rank} --master_addr {address} --master_port {port}"
    return [*LAUNCHER, *flags.split(), "train.py", "--deepspeed", "zero.json"]


def test_each_machine_gets_the_launchers_own_flags(here, capsys):
    assert dry_run(capsys, *SECOND_OF_TWO) == expected_command(1, "10.0.0.1")
    flags = ["--num_gpus", "8", "--master_port", "4000"]
    assert dry_run(capsys, *SECOND_OF_TWO, *flags) == expected_command(1, "10.0.0.1", 4000, "--num_gpus 8")


def test_one_machine_that_is_called_so_is_started_as_ever(here, capsys, monkeypatch):
    by_srun(monkeypatch)
    expected = dry_run(capsys, "--num_nodes", "1")
    assert expected == [*LAUNCHER, *"--num_gpus 1 --master_port 29500 train.py --deepspeed zero.json".split()]
    flags = "--num_nodes 1 --node_rank 0 --no_ssh --master_addr 10.0.0.1".split()
    assert dry_run(capsys, *flags) == expected


def test_each_machine_takes_its_own_visible_gpus(here, capsys, monkeypatch):
    four_gpus(here)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    expected = expected_command(1, "10.0.0.1", gpus="--include node0:3,1@node1:3,1")
    assert dry_run(capsys, *SECOND_OF_TWO, "--num_gpus", "2") == expected
    assert "--num_gpus 3: only 2 can be used here" in refused(capsys, *SECOND_OF_TWO, "--num_gpus", "3")


def test_a_hostfile_tells_how_many_machines_there_are(here, capsys):
    (here / "hosts").write_text("# two\n\n  a.example slots=8\nfe80::1   slots=4 # old\n")
    flags = "--hostfile hosts --no_ssh --master_addr a.example".split()
    assert dry_run(capsys, *flags, "--node_rank", "1") == expected_command(1, "a.example")
    assert "--node_rank 2: give a number from 0 to 1" in refused(capsys, *flags, "--node_rank", "2")
    assert dry_run(capsys, "--hostfile", "hosts", "--num_nodes", "1")[3:5] == ["--num_gpus", "1"]


ALONE = "--node_rank, --no_ssh, --master_addr: for several machines only; tell how many, --num_nodes"
LINES = "give a file of lines like: node1 slots=8"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--num_nodes 0", "--num_nodes 0: give 1 or more"),
        ("--node_rank 1", ALONE),
        ("--no_ssh", ALONE),
        ("--master_addr a", ALONE),
        ("--num_nodes 1 --node_rank 1", "--node_rank 1: give a number from 0 to 0, one less than --num_nodes"),
        ("TWO --node_rank 2", "--node_rank 2: give a number from 0 to 1, one less than --num_nodes"),
        ("TWO --node_rank -1", "--node_rank -1: give a number from 0 to 1, one less than --num_nodes"),
        ("TWO --node_rank 0 --hostfile one", "--num_nodes 2: --hostfile one names 1; correct one of them"),
        ("--hostfile gone", f"--hostfile gone: [Errno 2] No such file or directory: 'gone'; {LINES}"),
        ("--hostfile bad", f"--hostfile bad: bad line 'b 4'; {LINES}"),
        ("--hostfile twice", f"--hostfile twice: 2 lines name 1 different machines; {LINES}"),
        ("--hostfile empty", f"--hostfile empty: 0 lines name 0 different machines; {LINES}"),
    ],
)
def test_machines_that_do_not_fit_are_refused_with_the_remedy(here, capsys, flags, expected):
    texts = {"bad": "# here\nb 4", "twice": "a slots=1\na slots=2", "empty": "# a slots=1\n", "one": "a slots=1"}
    for name, text in texts.items():
        (here / name).write_text(text)
    flags = flags.replace("TWO", "--num_nodes 2 --no_ssh --master_addr a")
    assert refused(capsys, *flags.split()) == expected + "\n"


def test_all_that_is_wrong_with_several_machines_is_named_at_once(here, capsys):
    flags = "--num_gpus 0 --num_nodes 2 --node_rank 5 --hostfile gone --master_port 0 --script gone.py".split()
    problems = refused(capsys, *flags).splitlines()
    starts = ["--num_gpus", "--hostfile", "--node_rank", "--num_nodes", "--master_port", "--script"]
    assert [problem.split()[0] for problem in problems] == starts


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ("--num_nodes 2", "--no_ssh, --node_rank, --master_addr"),
        ("--hostfile hosts --master_addr a", "--no_ssh, --node_rank"),
        ("--num_nodes 2 --no_ssh --master_addr a", "--node_rank"),
        ("--num_nodes 2 --no_ssh --node_rank 0", "--master_addr"),
        ("--num_nodes 2 --node_rank 0 --master_addr a", "--no_ssh"),
    ],
)
def test_several_machines_are_never_started_over_ssh_and_what_misses_is_named(here, capsys, flags, missing):
    (here / "hosts").write_text("a slots=1\nb slots=1\n")
    error = refused(capsys, *flags.split())
    assert error.startswith(f"--num_nodes 2: {missing} missing; start this on each, with --no_ssh (ranks started over ")
    assert error.endswith("its --node_rank from 0, and the --master_addr of machine 0\n")


def test_the_port_of_several_machines_never_moves_and_is_bound_on_the_first_only(here, capsys, monkeypatch):
    monkeypatch.setattr(wrapper, "port_trouble", lambda port: "busy" if port < 29502 else "")
    assert dry_run(capsys, *SECOND_OF_TWO) == expected_command(1, "10.0.0.1")
    first = [*SECOND_OF_TWO[:3], "0", *SECOND_OF_TWO[4:]]
    assert refused(capsys, *first) == "--master_port 29500: busy; give every machine another\n"
    assert dry_run(capsys, *first, "--master_port", "29502") == expected_command(0, "10.0.0.1", 29502)
    assert "--master_port 0: give a number" in refused(capsys, *SECOND_OF_TWO, "--master_port", "0")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[01-03,07]", "node01"),
        ("node[7,9],other[1-2]", "node7"),
        ("gpu-a.example,gpu-b", "gpu-a.example"),
        ("rack[2-3]n[04,06-08]-ib", "rack2n04-ib"),
    ],
)
def test_srun_tells_everything(here, capsys, monkeypatch, nodes, first):
    by_srun(monkeypatch, STEP_NODELIST=nodes)
    assert wrapper.main(["--dry_run", "--script", "train.py", "--config", "zero.json"]) == 0
    said = capsys.readouterr()
    assert shlex.split(said.out) == expected_command(2, first)
    assert f"srun: --no_ssh --num_nodes 4 --node_rank 2 --master_addr {first}" in said.err


def test_what_is_typed_wins_over_srun(here, capsys, monkeypatch):
    by_srun(monkeypatch)
    flags = ["--master_addr", "10.0.0.7", "--node_rank", "0"]
    assert dry_run(capsys, *flags) == expected_command(0, "10.0.0.7")
    error = refused(capsys, "--num_nodes", "2")  # it does not fit the number that srun gave this machine
    assert error.endswith("\n--node_rank 2: give a number from 0 to 1, one less than --num_nodes\n")


def test_srun_on_one_machine_changes_nothing(here, capsys, monkeypatch):
    by_srun(monkeypatch, STEP_NUM_NODES="1", STEP_NUM_TASKS="1", NODEID="0", STEP_NODELIST="node05")
    assert dry_run(capsys)[3:7] == ["--num_gpus", "1", "--master_port", "29500"]


def test_more_than_one_wrapper_on_a_machine_is_refused(here, capsys, monkeypatch):
    by_srun(monkeypatch, STEP_NUM_TASKS="32")
    assert "\nsrun: 32 tasks on 4 machines; start one on each, with --ntasks-per-node=1\n" in refused(capsys)


def test_a_batch_script_without_srun_trains_on_its_one_machine_and_says_so(here, capsys, monkeypatch):
    for name in ("JOB_NUM_NODES", "NNODES", "JOB_NODELIST"):
        monkeypatch.setenv(f"SLURM_{name}", SRUN[name])
    monkeypatch.setenv("SLURM_NODEID", "0")
    assert wrapper.main(["--dry_run", "--script", "train.py", "--config", "zero.json"]) == 0
    said = capsys.readouterr()
    assert shlex.split(said.out)[3:7] == ["--num_gpus", "1", "--master_port", "29500"]
    assert "of the 8 machines of this SLURM job only this one trains" in said.err


# -----------------------------------------------------------------------------
# Ends


def eventually(condition, seconds: float):
    """Waits until it is true, and returns how long that took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it never came true"
        time.sleep(0.02)
    return time.monotonic() - start


def alive(run_id: str) -> list[str]:
    """The command lines of the living processes that carry this run's mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"HOLO1_RUN_ID={run_id}".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            pass  # it has ended
    return found


class Started:
    """The wrapper, in a folder of its own, with tests/programs/rank.py for a training script."""

    def __init__(self, folder: Path, does: list, num_ranks: int = 2, more: tuple[str, ...] = (), first_rank: int = 0):
        self.folder, self.ranks = folder, range(first_rank, first_rank + num_ranks)
        self.log_file = folder / f"log-{first_rank}"
        (folder / "zero.json").write_text("{}")
        flags = ["--script", str(PROGRAMS / "rank.py"), "--config", "zero.json", "--num_gpus", str(num_ranks), *more]
        if "--master_port" not in more:  # another run beside this one may be about to take the next free one
            flags += ["--master_port", str(free_port())]
        env = {key: text for key, text in os.environ.items() if not key.startswith(("OMP_NUM_THREADS", "SLURM_"))}
        env["PATH"] = os.defpath  # a virtual environment that nobody activated
        env["RANK_DOES"] = json.dumps(does)
        with self.log_file.open("w") as log:
            command = [sys.executable, wrapper.__file__, *flags]
            # A shell's background job ignores SIGINT, nohup SIGHUP, and the wrapper respects what was ignored.
            default = lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)]  # noqa: E731
            self.process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, preexec_fn=default)  # noqa: PLW1509

    def wait_until_ready(self) -> "Started":
        files = [self.folder / f"ready-{rank}" for rank in self.ranks]
        eventually(lambda: all(file.exists() for file in files), 60)
        self.pids = [int(file.read_text().split()[0]) for file in files]
        self.run_id = files[0].read_text().split()[1]
        time.sleep(0.5)  # the wrapper looks ten times a second
        return self

    def end(self, seconds: float = 60) -> int:
        return self.process.wait(timeout=seconds)

    def log(self) -> str:
        return self.log_file.read_text()

    def pid_of(self, module: str) -> int:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if self.run_id.encode() in (folder / "environ").read_bytes() and module.encode() in words:
                    return int(folder.name)
            except OSError:
                pass
        raise AssertionError(f"{module} does not run")

    def clean_up(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path):
    started = []

    def start_one(function: str, *arguments, started_as: dict | None = None, **options) -> Started:
        started.append(Started(tmp_path, [function, *arguments, options], **(started_as or {})))
        return started[-1]

    yield start_one
    for one in started:
        one.clean_up()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codes", "expected", "meaning"),
    [
        ([0, 0], 0, "exit 0: done"),
        ([80, 80], 80, "exit 80: data"),
        ([85, 85], 85, "exit 85: stopped by a signal, state saved"),
        ([86, 0], 86, "exit 86: trained and saved, but not uploaded"),
        ([1, 1], 1, "exit 1: a bug"),
        ([1, 83], 83, "exit 83: out of memory"),
        ([82, 83], 82, "exit 82: loss or gradients not finite"),
    ],
)  # fmt: skip
def test_the_training_s_own_code_comes_back(start, codes, expected, meaning):
    run = start("leaves", codes, meeting=expected == 0)
    assert (run.end(), meaning in run.log()) == (expected, True), run.log()
    assert alive(run.wait_until_ready().run_id) == []


@pytest.mark.slow
@pytest.mark.parametrize(("visible", "shown"), [(None, "0,1"), ("", "1000,1001")])
def test_ranks_run_on_the_same_interpreter_with_what_a_cpu_needs(start, monkeypatch, visible, shown):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)  # on a machine with GPUs, they would be hidden
    names = "DS_ACCELERATOR LOCAL_SIZE WORLD_SIZE LOCAL_RANK OMP_NUM_THREADS CUDA_VISIBLE_DEVICES"
    run = start("writes", names.split())
    assert run.end() == 0, run.log()
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [(run.folder / f"seen-{rank}").read_text() for rank in range(2)] == [
        f"{sys.executable} cpu 2 2 {rank} {threads} {shown} --local_rank={rank} --deepspeed zero.json"
        for rank in range(2)
    ]


@pytest.mark.slow
def test_a_script_that_leaves_no_proof_is_not_believed(start):
    run = start("exits", 0)
    assert run.end() == 1
    assert "no rank left the proof that it finished" in run.log()


@pytest.mark.slow
def test_the_code_of_a_script_that_does_not_know_the_contract_comes_back(start):
    run = start("exits", 7, started_as={"num_ranks": 1})
    assert run.end() == 7, run.log()


@pytest.mark.slow
def test_the_main_rank_may_go_on_long_after_the_others_are_done(start):
    run = start("leaves_late", 13)
    assert run.end() == 0, run.log()


@pytest.mark.slow
def test_a_rank_that_cannot_end_after_its_last_act_is_ended(start):
    run = start("cannot_end")
    assert run.end(30) == 1
    assert "killing what still runs: ranks [1]" in run.log()


@pytest.mark.slow
def test_helpers_of_ranks_are_not_left_behind(start):
    run = start("leaves_a_helper")
    assert run.end() == 0
    assert alive(run.wait_until_ready().run_id) == []


# -----------------------------------------------------------------------------
# Signals


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_all_ranks_at_once_and_their_85_comes_back(start, number):
    # The second rank leaves first: the launcher would now end the main rank, which still saves.
    run = start("saves", main_seconds=4, undo=True)
    run.wait_until_ready()
    sent = time.time()
    run.process.send_signal(number)
    assert run.end(20) == 85, run.log()
    received = [(run.folder / f"stopped-{rank}").read_text().split() for rank in range(2)]
    expected = signal.SIGTERM if number == signal.SIGHUP else number
    assert [int(name) for name, _ in received] == [expected, expected]
    assert max(float(when) for _, when in received) - sent < 1
    assert "exit 85: stopped by a signal, state saved" in run.log()
    assert alive(run.run_id) == []


@pytest.mark.slow
def test_a_rank_that_was_stopped_alone_does_not_cut_short_the_others(start):
    run = start("saves", main_seconds=4, either=True)
    run.wait_until_ready()
    os.kill(run.pids[1], signal.SIGTERM)
    assert run.end(20) == 85, run.log()
    assert (run.folder / "stopped-0").read_text() == "0 0"  # nobody has signalled the main rank


@pytest.mark.slow
def test_a_second_ctrl_c_ends_everything_within_five_seconds(start):
    run = start("saves", seconds=300).wait_until_ready()
    run.process.send_signal(signal.SIGINT)
    eventually(lambda: all((run.folder / f"stopped-{rank}").exists() for rank in range(2)), 5)
    run.process.send_signal(signal.SIGINT)
    assert run.end(5) == 128 + signal.SIGINT
    assert alive(run.run_id) == []


@pytest.mark.slow
def test_the_two_hangups_of_a_closing_terminal_count_once(start):
    run = start("saves", seconds=2).wait_until_ready()
    run.process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    run.process.send_signal(signal.SIGHUP)
    assert run.end(20) == 85, run.log()


@pytest.mark.slow
def test_a_signal_before_the_ranks_run_ends_at_once(start):
    run = start("waits")
    eventually(lambda: "deepspeed.launcher" in run.log(), 20)
    time.sleep(0.5)
    run.process.send_signal(signal.SIGTERM)
    assert run.end(8) == 128 + signal.SIGTERM, run.log()
    assert not (run.folder / "ready-0").exists()


@pytest.mark.slow
def test_a_script_without_handlers_ends_with_the_signal_s_code(start):
    run = start("waits").wait_until_ready()
    run.process.send_signal(signal.SIGTERM)
    assert run.end(15) == 128 + signal.SIGTERM, run.log()
    assert "stopped by SIGTERM, state not saved" in run.log()


# -----------------------------------------------------------------------------
# Kills


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_and_all_end_within_fifteen_seconds(start, rank):
    run = start("waits", deaf=True).wait_until_ready()
    os.kill(run.pids[rank], signal.SIGKILL)
    assert run.end(15) == 1, run.log()
    assert f"ranks [{rank}] have failed" in run.log()
    assert alive(run.run_id) == []


@pytest.mark.slow
def test_a_rank_that_gloo_takes_down_with_a_killed_one_does_not_hide_it(start):
    run = start("reduces").wait_until_ready()
    os.kill(run.pids[1], signal.SIGKILL)
    assert run.end(15) == 1, run.log()
    assert "ranks [1] left no exit code" in run.log()
    assert alive(run.run_id) == []


@pytest.mark.slow
def test_no_rank_outlives_a_killed_wrapper_by_five_seconds(start):
    run = start("waits", deaf=True, helper=True).wait_until_ready()
    assert len(alive(run.run_id)) == 6  # the launcher's two, the ranks, their helpers
    run.process.kill()
    eventually(lambda: not alive(run.run_id), 5)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["deepspeed.launcher.launch", "deepspeed.launcher.runner"])
@pytest.mark.parametrize("code", [0, 85])
def test_a_killed_launcher_is_never_a_success_and_leaves_nobody(start, module, code):
    run = start("saves", code=code) if code else start("waits", deaf=True)
    run.wait_until_ready()
    os.kill(run.pid_of(module), signal.SIGKILL)
    eventually(lambda: not alive(run.run_id), 5)
    assert run.end(5) == (code or 1), run.log()
    assert "the launcher was killed" in run.log()


@pytest.mark.slow
def test_nothing_is_left_in_the_temporary_folder(start):
    run = start("writes_where_codes_go")
    assert run.end() == 0
    eventually(lambda: not Path((run.folder / "where").read_text()).exists(), 5)


# -----------------------------------------------------------------------------
# Two machines

# Both on this one, at the loopback address, each with a wrapper and one rank of its own.


@pytest.fixture
def start_two(start):
    def start_both(*does, **options) -> list[Started]:
        port = str(free_port())
        flags = ["--num_nodes", "2", "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port, "--node_rank"]
        ways = [{"num_ranks": 1, "more": (*flags, str(node)), "first_rank": node} for node in range(2)]
        return [start(*does, **options, started_as=way) for way in ways]

    return start_both


@pytest.mark.slow
@pytest.mark.parametrize("visible", [None, ""])
def test_two_machines_train_together(start_two, monkeypatch, visible):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    names = "WORLD_SIZE LOCAL_RANK MASTER_ADDR CROSS_RANK CUDA_VISIBLE_DEVICES"
    nodes = start_two("writes", names.split())
    assert [node.end() for node in nodes] == [0, 0], nodes[0].log() + nodes[1].log()
    shown = "0" if visible is None else "1000"
    seen = [(nodes[0].folder / f"seen-{rank}").read_text().removeprefix(f"{sys.executable} ") for rank in range(2)]
    assert [words.partition(" --")[0] for words in seen] == [f"2 0 127.0.0.1 {rank} {shown}" for rank in range(2)]
    for rank, node in enumerate(nodes):
        assert f"machine {rank} of 2 x 1 ranks, which meet at 127.0.0.1" in node.log()
        assert alive(node.wait_until_ready().run_id) == []


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(("left", "code"), [(81, 81), (None, 1)], ids=["81", "killed"])
def test_a_machine_that_fails_takes_the_other_down(start_two, failing, left, code):
    nodes = start_two("fails", failing, left)
    for node in nodes:
        node.wait_until_ready()
    expected = [code if rank == failing else 1 for rank in range(2)]
    assert [node.end(20) for node in nodes] == expected, nodes[0].log() + nodes[1].log()
    assert "or another machine failed: see there" in nodes[1 - failing].log()
    assert [alive(node.run_id) for node in nodes] == [[], []]


@pytest.mark.slow
def test_a_signal_on_one_machine_lets_both_save(start_two):
    nodes = start_two("agrees_to_save")
    for node in nodes:
        node.wait_until_ready()
    nodes[1].process.send_signal(signal.SIGTERM)
    assert [node.end(20) for node in nodes] == [85, 85], nodes[0].log() + nodes[1].log()
    assert [alive(node.run_id) for node in nodes] == [[], []]
