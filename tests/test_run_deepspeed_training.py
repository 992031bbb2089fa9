"""The wrapper without its launcher: what it reads, refuses and shows, and what its last line says of a run that ended.

The runs themselves are in test_run_deepspeed_training_launched.py.

Sections: Command line, Checks, The script's own check, Port, Several machines, Last line, Out of memory.
"""

import json
import os
import queue
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PROGRAMS, loaded_for_help

import run_deepspeed_training as wrapper
from training import memory_fit, run_record

ROOT = Path(wrapper.__file__).resolve().parent
LAUNCHER = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"]


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
    shown += " --num_nodes --node_rank --no_ssh --master_addr --hostfile --retry_smaller --no_retry_smaller"
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
    starts = ["--num_gpus", "--num_samples", "--script", "--config", "--deepspeed:", "deepspeed", "--master_port"]
    assert [problem.split()[0] for problem in problems] == starts
    assert problems[-2].endswith(f"{sys.executable} -m pip install deepspeed")


def test_dry_run_refuses_what_a_real_run_would(here, capsys):
    assert wrapper.main(["--dry_run", "--script", "gone.py"]) == 2


def test_a_busy_default_port_moves_on_and_says_so(here, capsys, monkeypatch):
    monkeypatch.setattr(wrapper, "port_trouble", lambda port: "busy" if port < 29502 else "")
    assert wrapper.main(["--dry_run", "--script", "train.py", "--config", "zero.json"]) == 0
    said = capsys.readouterr()
    assert "--master_port 29502 " in said.out and "port 29500 is busy: taking 29502" in said.err


def test_no_port_is_looked_for_where_something_else_is_refused(here, capsys, monkeypatch):
    monkeypatch.setattr(wrapper, "port_trouble", lambda port: "busy" if port < 29502 else "")
    assert wrapper.main(["--dry_run", "--script", "gone.py", "--config", "zero.json"]) == 2
    assert "29500" not in capsys.readouterr().err


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
# The script's own check


def checked(here, capsys, *flags: str) -> tuple[int, str, str]:
    """A dry run of a script that knows --check_settings: exit code, stdout, stderr."""
    shutil.copy(PROGRAMS / "checks_settings.py", here / "train.py")
    code = wrapper.main(["--dry_run", "--script", "train.py", "--config", "zero.json", *flags])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_script_s_own_settings_are_checked_for_as_many_ranks_as_there_will_be(here, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "99")  # a cluster's own
    code, out, err = checked(here, capsys, *SECOND_OF_TWO, "--num_gpus", "3", "--learning_rate", "1e-5")
    assert (code, shlex.split(out)[-3:]) == (0, ["zero.json", "--learning_rate", "1e-5"])
    told = "checked for 6 ranks, 3 here: --check_settings --deepspeed zero.json --learning_rate 1e-5\n"
    assert told in err


def test_the_script_s_problems_are_told_beside_the_wrapper_s_and_none_twice(here, capsys):
    code, out, err = checked(here, capsys, "--num_gpus", "0", "--num_samples", "0", "--learning_rat", "1", "--gone")
    assert (code, out) == (2, "")
    assert err.splitlines()[1:] == [
        "--num_gpus 0: give 1 or more",
        "--num_samples 0: give 1 or more",
        "--learning_rat: unknown; did you mean --learning_rate?",
        "--gone: unknown; did you mean --learning_rate?",
    ]


def test_a_configuration_that_cannot_be_read_does_not_hide_the_script_s_problems(here, capsys):
    (here / "zero.json").write_text("{")
    code, _, err = checked(here, capsys, "--learning_rat", "1")
    lines = err.splitlines()
    assert (code, lines[0]) == (2, "checked for 1 ranks, 1 here: --check_settings --learning_rat 1")
    assert [line.split()[0] for line in lines[1:]] == ["--config", "--learning_rat:"]


def test_a_check_that_fails_itself_is_told_apart_from_bad_settings(here, capsys):
    code, _, err = checked(here, capsys, "--crash")
    assert code == 2 and "RuntimeError: the check is broken" in err
    assert err.endswith("train.py --check_settings ended with 1: the check itself has failed\n")


def test_questions_for_help_go_to_the_script_unchecked(here, capsys):
    code, out, err = checked(here, capsys, "--", "--help", "--gone")
    assert code == 0 and out.endswith("--help --gone\n") and "checked for" not in err


def test_a_script_that_knows_no_check_is_not_asked_and_that_is_said(here, capsys):
    (here / "train.py").write_text("raise SystemExit('started')  # it would train")
    assert wrapper.main(["--dry_run", "--script", "train.py", "--config", "zero.json", "--gone"]) == 0
    said = "train.py knows no --check_settings: its own settings are not checked before it starts"
    assert said in capsys.readouterr().err


def test_a_script_that_takes_its_settings_from_ours_knows_the_check_where_they_do(here):
    (here / "train.py").write_text("from training.settings import parse")
    assert not wrapper.knows_its_check(here / "train.py")
    (here / "training").mkdir()
    (here / "training" / "settings.py").write_text('parser.add_argument("--check_settings")')
    assert wrapper.knows_its_check(here / "train.py")
    (here / "train.py").write_text("import training")
    assert not wrapper.knows_its_check(here / "train.py")


# -----------------------------------------------------------------------------
# Port


def test_a_port_that_another_run_has_chosen_is_not_taken_though_nobody_listens_there(tmp_path, monkeypatch):
    monkeypatch.setattr(wrapper.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(wrapper, "bind_trouble", lambda port: "")
    args, _ = wrapper.read_command_line(["--num_nodes", "1"])
    (tmp_path / f"holo1-port-{os.getuid()}-{wrapper.DEFAULT_PORT}").write_text("")  # of a wrapper that was killed
    assert wrapper.port_problems(args) == [] and args.master_port == wrapper.DEFAULT_PORT
    said = f"--master_port {args.master_port}: another run of yours has it; give another, or none for the next free one"
    assert wrapper.port_problems(args) == [said]
    args.master_port = None
    assert wrapper.port_problems(args) == [] and args.master_port == wrapper.DEFAULT_PORT + 1
    wrapper.release_ports()
    assert [*tmp_path.iterdir()] == []


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
    assert dry_run(capsys, "--hostfile", "hosts", "--num_nodes", "1")[5:7] == ["--num_gpus", "1"]


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
    starts = ["--num_gpus", "--hostfile", "--node_rank", "--num_nodes", "--script", "--master_port"]
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
    assert refused(capsys, *first).endswith("\n--master_port 29500: busy; give every machine another\n")
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
    assert dry_run(capsys)[5:9] == ["--num_gpus", "1", "--master_port", "29500"]


def test_more_than_one_wrapper_on_a_machine_is_refused(here, capsys, monkeypatch):
    by_srun(monkeypatch, STEP_NUM_TASKS="32")
    assert "\nsrun: 32 tasks on 4 machines; start one on each, with --ntasks-per-node=1\n" in refused(capsys)


def test_a_batch_script_without_srun_trains_on_its_one_machine_and_says_so(here, capsys, monkeypatch):
    for name in ("JOB_NUM_NODES", "NNODES", "JOB_NODELIST"):
        monkeypatch.setenv(f"SLURM_{name}", SRUN[name])
    monkeypatch.setenv("SLURM_NODEID", "0")
    assert wrapper.main(["--dry_run", "--script", "train.py", "--config", "zero.json"]) == 0
    said = capsys.readouterr()
    assert shlex.split(said.out)[5:9] == ["--num_gpus", "1", "--master_port", "29500"]
    assert "of the 8 machines of this SLURM job only this one trains" in said.err


# -----------------------------------------------------------------------------
# Last line


@pytest.fixture
def ended(tmp_path, monkeypatch):
    """A run of two ranks by what it has left: no process, but the files that ranks write. The launcher is
    played: a code of its own, that it can have at any time, is all that counts here."""
    monkeypatch.setattr(wrapper.tempfile, "tempdir", str(tmp_path))

    def make(codes: dict[int, int], stage: str = "", launcher: int = 1, **known) -> wrapper.Run:
        run = wrapper.Run(2, 0, queue.SimpleQueue())
        run.launcher = SimpleNamespace(returncode=launcher)
        run.pids = {0: 10**8, 1: 10**8 + 1}
        for rank, code in codes.items():
            (Path(run.status_dir) / f"rank-{rank}").write_text(str(code))
        for rank in range(2 if stage else 0):
            beat = {"stage": stage, "step": 7, "since": time.time(), "limit_s": 5, "output_dir": "/out"}
            (Path(run.status_dir) / f"beat-{rank}").write_text(json.dumps(beat))
        vars(run).update(known)
        return run

    return make


@pytest.mark.parametrize("launcher", [0, 1, 137])
@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((85, 0), 85), ((86, 0), 86), ((1, 83), 83), ((1, 0), 1)])
def test_when_all_ranks_have_left_their_codes_these_decide(ended, codes, expected, launcher):
    run = ended(dict(enumerate(codes)), launcher=launcher)
    assert run.verdict() == (expected, wrapper.MEANINGS[expected])


@pytest.mark.parametrize(("left", "expected"), [(0, 1), (85, 1), (1, 1), (81, 81)])
def test_a_rank_without_its_code_is_a_failure(ended, left, expected):
    code, why = ended({0: left}, launcher=0, failed_first=[1]).verdict()
    assert code == expected
    assert "ranks [1] died first and left no exit code" in why


TERM = int(signal.SIGTERM)


@pytest.mark.parametrize(
    ("codes", "stage", "expected"),
    [
        ((85, 85), "", "stopped by a signal, state saved"),
        ((85, 85), "training", "stopped by a signal, state saved in /out, --resume goes on"),
        ((85, 85), "loading", "stopped by a signal while loading: nothing had been trained"),
        ((85, 85), "reading pages", "stopped by a signal while reading pages: nothing had been trained"),
        ((85, 85), "judging", "stopped by a signal while judging: what was trained is saved in /out"),
        ((85, 85), "publishing", "stopped by a signal while publishing: what was trained is saved in /out"),
        ((), "", "stopped by SIGTERM, state not saved"),
        ((), "loading", "stopped by SIGTERM while loading: nothing had been trained"),
        (
            (),
            "training",
            "stopped by SIGTERM, state not saved; --resume goes on from the last whole checkpoint in /out",
        ),
        ((), "saving", "stopped by SIGTERM while saving, state not saved; --resume goes on from the last whole"),
        ((), "finishing", "stopped by SIGTERM while saving, state not saved; --resume goes on from the last whole"),
        ((), "judging", "stopped by SIGTERM while judging: what was saved before is in /out"),
    ],
)
def test_the_last_line_after_a_stop_says_what_is_on_disk(ended, codes, stage, expected):
    run = ended(dict(enumerate(codes)), stage, signal=signal.SIGTERM)
    code, why = run.verdict()
    assert (code, why[: len(expected)]) == (85 if codes else 128 + TERM, expected)


@pytest.mark.parametrize(("codes", "missing"), [({0: 143, 1: 143}, []), ({0: 143}, [1]), ({1: 138}, [0])])
@pytest.mark.parametrize("stage", ["loading", "reading pages"])
def test_a_stop_before_training_that_the_wrapper_was_not_told_of_is_no_failure(ended, codes, missing, stage):
    """By SAVE_AND_STOP, or a signal to a rank alone."""
    for asked in ("SAVE_AND_STOP", ""):
        run = ended(codes, stage, failed_first=[*codes][:1], ended_by_us=missing)
        beat = Path(run.status_dir) / "beat-0"
        beat.write_text(json.dumps(json.loads(beat.read_text()) | {"asked": asked}))
        code, why = run.verdict()
        name = asked or signal.Signals(code - 128).name
        expected = [f"stopped by {name} while {stage}: nothing had been trained"]
        expected += [f"ranks {missing} were ended by us"] * bool(missing)
        assert (code, why) == (min(codes.values()), "; ".join(expected))


@pytest.mark.parametrize(
    ("codes", "stage", "first"),
    [({0: 143}, "loading", [1]), ({0: 143, 1: 1}, "loading", [1]), ({0: 143}, "training", [])],
)
def test_a_death_before_training_is_not_taken_for_a_stop(ended, codes, stage, first):
    assert "nothing had been trained" not in ended(codes, stage, failed_first=first).verdict()[1]


@pytest.mark.parametrize(
    ("number", "to_a_rank_that_beats"),
    [(signal.SIGHUP, signal.SIGHUP), (signal.SIGUSR1, signal.SIGUSR1), (signal.SIGINT, signal.SIGINT)],
)
def test_a_rank_gets_the_signal_itself_and_none_where_it_was_asked_before(
    ended, monkeypatch, number, to_a_rank_that_beats
):
    """As SIGTERM, a warning would be the first of two for a rank, and what was asked before by a file the second."""
    sent = []
    monkeypatch.setattr(wrapper.os, "kill", lambda pid, number: sent.append((pid, number)))
    for asked, expected in [("", to_a_rank_that_beats), ("SAVE_AND_STOP", None)]:
        run = ended({}, "training")
        beat = Path(run.status_dir) / "beat-1"
        beat.write_text(json.dumps(json.loads(beat.read_text()) | {"asked": asked}))
        (Path(run.status_dir) / "beat-0").unlink()  # of a script that knows nothing of this
        run.arrived.put(number)
        assert not run.take_signal(run.pids)
        alone = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        wanted = [(run.pids[0], alone), (run.pids[1], expected)]
        assert sent == [(pid, which) for pid, which in wanted if which]
        sent.clear()


@pytest.mark.parametrize("before", [signal.SIGUSR1, signal.SIGHUP])
def test_a_sigterm_after_a_warning_or_a_closed_terminal_is_the_first_of_two(ended, before):
    run = ended({}, "training")
    for number in (before, before, signal.SIGTERM, signal.SIGUSR1):
        run.arrived.put(number)
        assert not run.take_signal(run.pids)
    run.arrived.put(signal.SIGTERM)
    assert run.take_signal(run.pids) and run.signal == signal.SIGTERM


def test_silence_while_the_wrapper_slept_itself_is_no_hang(ended):
    """A machine that was suspended, or a clock that was set: whoever looks again gives everybody a new start."""
    run = ended({}, "training")
    living, now = {0: 1, 1: 1}, time.time()
    for rank in range(2):
        file = Path(run.status_dir) / f"beat-{rank}"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"since": now - 3600}))
        os.utime(file, (now - 3600, now - 3600))
    assert run.hanging(living, {}) == []
    run.looked, run.counts_from = time.time(), 0.0  # as if it had looked all along
    assert [rank for *_, rank in run.hanging(living, {})] == [0, 1]
    assert run.hanging(living, {0: 0, 1: 0}) == [] and run.hanging({}, {}) == []


@pytest.mark.parametrize(
    ("code", "stage", "expected"),
    [
        (85, "saving", True),
        (85, "training", False),
        (81, "saving", False),
        (1, "saving", False),
        (81, "finishing", True),
    ],
)
def test_who_saves_is_waited_for_but_not_who_waits_for_one_that_has_failed(ended, code, stage, expected):
    """A rank that saves is stuck, over NCCL, in a collective that the other will never call; one that only finishes an
    earlier checkpoint needs nobody."""
    run = ended({1: code}, stage, deadline=time.monotonic(), failed_first=[1] if code != 85 else [])
    assert run.still_saving({0: run.pids[0]}, run.codes()) == expected
    run.deadline -= wrapper.SAVING_S + 1
    assert not run.still_saving({0: run.pids[0]}, run.codes())


def test_a_rank_that_writes_no_beats_while_it_loads_hangs_only_where_it_was_stopped(ended):
    """One call in C that keeps the interpreter's lock, on a slow network disk say, may take minutes."""
    run, now = ended({}, "loading"), time.time()
    with subprocess.Popen(["sleep", "300"]) as process:
        living = {0: process.pid}
        beat = Path(run.status_dir) / "beat-0"
        beat.write_text(json.dumps(json.loads(beat.read_text()) | {"limit_s": None}))

        def hangs(silent_s: float) -> bool:
            os.utime(beat, (now - silent_s, now - silent_s))
            run.looked, run.counts_from = time.time(), 0.0  # as if it had looked all along
            return bool(run.hanging(living, {}))

        try:
            assert (hangs(300), hangs(900)) == (False, True)
            process.send_signal(signal.SIGSTOP)
            end = time.monotonic() + 20
            while not hangs(300) and time.monotonic() < end:
                time.sleep(0.02)
            assert (hangs(300), hangs(30)) == (True, False)
        finally:
            process.kill()


def test_notes_that_were_laid_for_ranks_say_nothing_yet(ended):
    run = ended({}, "training", ranks=range(2, 4))
    run.prepare(num_nodes=1)
    laid = {file.name for file in Path(run.status_dir).iterdir() if file.stat().st_size >= 4096}
    assert laid == {"rank-2", "rank-3", "beat-2", "beat-3", "smaller"}
    assert (run.codes(), sorted(run.beats()), run.smaller()) == ({}, [0, 1], {})


@pytest.mark.parametrize(("left", "said"), [(0, "No usable temporary directory"), (100, "/holo1-run-")])
def test_a_temporary_folder_without_space_is_said_before_the_start(here, left, said):
    """No file may grow beyond that, as on a full disk; the number of the error is another one (EFBIG)."""
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (left, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    command = [sys.executable, wrapper.__file__, "--script", "train.py", "--config", "zero.json"]
    env = {**os.environ, "TMPDIR": str(here)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, preexec_fn=full, timeout=20)
    assert done.returncode == 81, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "exit 81: disk: " in last and said in last and "set TMPDIR" in last
    assert not [file.name for file in here.iterdir() if file.name.startswith("holo1-run-")]


# -----------------------------------------------------------------------------
# Out of memory


@pytest.fixture
def starts(monkeypatch):
    """The flags of each start of a run whose memory never does. The run itself is played: real ones are slow, and a
    signal that comes between two of them cannot be timed. `at_start` is called in each."""
    made, at_start = [], []
    handlers = {number: signal.getsignal(number) for number in wrapper.SIGNALS}

    def start(args, gpus, passed_on, arrived):
        made.append(passed_on)
        for call in at_start:
            call()
        return 83, {"micro_batch": 1, "resume": True}

    monkeypatch.setattr(wrapper, "start", start)
    monkeypatch.setattr(os, "environ", {**os.environ})  # what it leaves there for a start goes when the test ends
    yield made, at_start
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_memory_that_never_does_is_tried_six_times_more(starts):
    args, passed_on = wrapper.read_command_line(["--num_nodes", "1", "--resume"])
    assert wrapper.train(args, [], passed_on) == 83
    assert starts[0] == [["--resume"]] + 6 * [["--resume", "--micro_batch", "1"]]


@pytest.mark.parametrize("typed", ["--resume_from_checkpoint out/checkpoint-4", "--resume-from-checkpoint=x --lora"])
def test_a_new_start_goes_on_from_the_newest_checkpoint_not_from_the_one_that_was_given(starts, capsys, typed):
    """The script takes one of the two flags; the one that was given is older, or has been replaced."""
    args, passed_on = wrapper.read_command_line(["--num_nodes", "1", "--lr", "1", *typed.split()])
    assert wrapper.train(args, [], passed_on) == 83
    kept = [word for word in passed_on if word in ("--lr", "1", "--lora")]
    assert starts[0] == [passed_on] + 6 * [[*kept, "--micro_batch", "1", "--resume"]]
    assert "again with --micro_batch 1 --resume in place of --resume_from_checkpoint" in capsys.readouterr().err


def test_what_filled_the_memory_is_asked_to_fill_less_and_then_not_to(starts, monkeypatch, capsys):
    """At every start: the second one has not run before its memory ran out, and remembers nothing. Of what is added,
    the script is told how many words it is, and the share, which has no flag."""
    less, off = {"filled_share": 0.9}, {"fill_memory": False}
    asked, found = iter([(4, less), (4, off), (4, off), (2, off)]), []

    def start(args, gpus, passed_on, arrived, real=wrapper.start):
        real(args, gpus, passed_on, arrived)
        found.append([os.environ.get(name) for name in (memory_fit.FILLED, run_record.ADDED)])
        size, fill = next(asked, (None, None))
        return (0, {}) if size is None else (83, {"micro_batch": size, "resume": False} | fill)

    monkeypatch.setattr(wrapper, "start", start)
    args, passed_on = wrapper.read_command_line(["--num_nodes", "1"])
    assert wrapper.train(args, [], passed_on) == 0
    again = [["--micro_batch", str(size), "--fill_memory", "False"] for size in (4, 4, 2)]
    assert starts[0] == [[], ["--micro_batch", "4"], *again]
    assert found == [[None, None], ["0.9", "2"], *[["0.9", "4"]] * 3]
    assert "starting again with --micro_batch 4, batches filling 90% of the memory" in capsys.readouterr().err


def test_memory_that_ran_out_is_left_at_that_where_it_was_asked(starts):
    args, passed_on = wrapper.read_command_line(["--num_nodes", "1", "--no_retry_smaller"])
    assert wrapper.train(args, [], passed_on) == 83
    assert starts[0] == [[]]


def test_a_signal_between_two_starts_ends_it(starts, capsys):
    starts[1].append(lambda: os.kill(os.getpid(), signal.SIGTERM))
    args, passed_on = wrapper.read_command_line(["--num_nodes", "1"])
    assert wrapper.train(args, [], passed_on) == 83
    assert len(starts[0]) == 1 and "SIGTERM: not starting again" in capsys.readouterr().err


@pytest.mark.parametrize("filled", [{}, {"filled_share": 0.9}], ids=str)
def test_on_several_machines_the_start_again_is_the_user_s(filled, starts, monkeypatch, capsys):
    """With flags alone: a share of the memory has none."""
    start = wrapper.start
    monkeypatch.setattr(wrapper, "start", lambda *given: (83, start(*given)[1] | filled))
    args, passed_on = wrapper.read_command_line(SECOND_OF_TWO)
    assert wrapper.train(args, [], passed_on) == 83
    assert len(starts[0]) == 1
    more = "--micro_batch 1 --fill_memory False --resume" if filled else "--micro_batch 1 --resume"
    assert f"start again on every machine, with {more}" in capsys.readouterr().err
