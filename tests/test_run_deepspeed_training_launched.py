"""The wrapper, driven for real: the true launcher, two ranks, true signals, and a look at who is left in /proc.

    python -m pytest tests/test_run_deepspeed_training_launched.py -m slow       # starts and kills ranks, some minutes

Sections: Ends, Signals, Kills, Hangs, Port, Out of memory, Two machines.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROGRAMS, free_port

import run_deepspeed_training as wrapper

CANARY = "hf_canary_in_the_environment"

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

    def __init__(
        self,
        folder: Path,
        does: list,
        num_ranks: int = 2,
        more: tuple[str, ...] = (),
        first_rank: int = 0,
        port: bool = True,
        name: str = "",
    ):
        self.folder, self.ranks = folder, range(first_rank, first_rank + num_ranks)
        self.log_file = folder / f"log-{first_rank}{name}"
        (folder / "zero.json").write_text("{}")
        flags = ["--script", str(PROGRAMS / "rank.py"), "--config", "zero.json", "--num_gpus", str(num_ranks), *more]
        if "--master_port" not in more and port:  # another run beside this one may take the next free one
            flags += ["--master_port", str(free_port())]
        (folder / "tmp").mkdir(exist_ok=True)
        env = {key: text for key, text in os.environ.items() if not key.startswith(("OMP_NUM_THREADS", "SLURM_"))}
        env["PATH"] = os.defpath  # a virtual environment that nobody activated
        env |= {"RANK_DOES": json.dumps(does), "TMPDIR": str(folder / "tmp"), "HF_TOKEN": CANARY}
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

    def left_behind(self) -> list[str]:
        return [file.name for file in (self.folder / "tmp").iterdir() if file.name.startswith("holo1-")]

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
def test_the_first_rank_s_own_code_comes_back(start):
    """0 and 85 do so, too: see two wrappers that start at once, and signals."""
    run = start("leaves", [82, 83])
    assert run.end() == 82, run.log()
    assert "exit 82: loss or gradients not finite" in run.log()
    assert alive(run.wait_until_ready().run_id) == []


@pytest.mark.slow
@pytest.mark.parametrize(("visible", "shown"), [(None, "0,1"), ("", "1000,1001")])
def test_ranks_run_on_the_same_interpreter_with_what_a_cpu_needs(start, monkeypatch, visible, shown):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)  # on a machine with GPUs, they would be hidden
    names = "DS_ACCELERATOR LOCAL_SIZE WORLD_SIZE LOCAL_RANK OMP_NUM_THREADS CUDA_VISIBLE_DEVICES"
    run = start("writes", names.split())
    assert run.end() == 0, run.log()
    assert alive(run.wait_until_ready().run_id) == [], "each rank had started a helper in a session of its own"
    where = Path((run.folder / "where").read_text())
    assert where.parent == run.folder / "tmp" and not where.exists() and run.left_behind() == []
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
    assert run.end(30) == 0, run.log()  # all have said that they are done
    assert "killing what still runs: ranks [1]" in run.log()


@pytest.mark.slow
def test_what_all_ranks_have_left_decides_whatever_becomes_of_the_launcher(start):
    run = start("leaves_when_told").wait_until_ready()
    os.kill(run.pid_of("deepspeed.launcher.launch"), signal.SIGTERM)  # it sleeps, and gets this when they have ended
    os.kill(run.pid_of("deepspeed.launcher.runner"), signal.SIGSTOP)  # which cannot end in time
    (run.folder / "go").touch()
    assert run.end(30) == 0, run.log()
    assert "exit 0: done" in run.log() and "killed" not in run.log()
    assert alive(run.run_id) == []


# -----------------------------------------------------------------------------
# Signals


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_ranks_at_once_and_their_85_comes_back(start, number):
    # The second rank leaves first: the launcher would now end the main rank, which still saves.
    run = start("saves", main_seconds=4, undo=True)
    run.wait_until_ready()
    sent = time.time()
    run.process.send_signal(number)
    assert run.end(20) == 85, run.log()
    received = [(run.folder / f"stopped-{rank}").read_text().split() for rank in range(2)]
    assert [int(name) for name, _ in received] == [number, number]
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
    run = start("saves", seconds=2, undo=True).wait_until_ready()
    sent = time.time()
    run.process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    run.process.send_signal(signal.SIGHUP)
    assert run.end(20) == 85, run.log()
    received = [(run.folder / f"stopped-{rank}").read_text().split() for rank in range(2)]
    assert [int(name) for name, _ in received] == [signal.SIGTERM, signal.SIGTERM], "as which it is passed on"
    assert max(float(when) for _, when in received) - sent < 1
    assert alive(run.run_id) == []


@pytest.mark.slow
def test_slurm_s_warning_to_everyone_and_its_sigterm_later_cut_no_save(start):
    run = start("saves", seconds=4).wait_until_ready()
    modules = ["deepspeed.launcher.runner", "deepspeed.launcher.launch"]
    for pid in [*map(run.pid_of, modules), *run.pids, run.process.pid]:
        os.kill(pid, signal.SIGUSR1)
    time.sleep(2.5)
    run.process.terminate()
    assert run.end(20) == 85, run.log()
    assert "SIGUSR1 passed on" in run.log() and "SIGTERM: still waiting until ranks [0, 1] have saved" in run.log()
    assert alive(run.run_id) == []


@pytest.mark.slow
def test_who_asks_the_launcher_to_stop_asks_all_ranks_to_save(start):
    run = start("saves", seconds=6).wait_until_ready()
    os.kill(run.pid_of("deepspeed.launcher.runner"), signal.SIGTERM)
    assert run.end(20) == 85, run.log()


@pytest.mark.slow
def test_the_last_line_of_a_stop_while_judging_claims_nothing_that_is_not_so(start):
    run = start("stops_in", "judging", None).wait_until_ready()
    run.process.terminate()
    assert run.end(20) == 128 + signal.SIGTERM, run.log()
    assert f"stopped by SIGTERM while judging: what was saved before is in {run.folder}" in run.log()
    assert "not saved" not in run.log()


@pytest.mark.slow
def test_a_signal_before_the_ranks_run_ends_at_once(start):
    run = start("waits")
    eventually(lambda: "deepspeed.launcher" in run.log(), 20)
    time.sleep(0.5)
    run.process.send_signal(signal.SIGTERM)
    assert run.end(8) == 128 + signal.SIGTERM, run.log()
    assert "stopped by SIGTERM at the start: nothing had been trained" in run.log()
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
def test_a_killed_main_rank_is_named_and_all_end_within_fifteen_seconds(start):
    """Another one: see the test after this."""
    run = start("waits", deaf=True).wait_until_ready()
    os.kill(run.pids[0], signal.SIGKILL)
    assert run.end(15) == 1, run.log()
    assert "ranks [0] have failed" in run.log()
    died = "ranks [0] died first and left no exit code: killed, or ended before their last act"
    assert f"exit 1: {died}; ranks [1] were ended by us\n" in run.log()
    assert alive(run.run_id) == []


@pytest.mark.slow
def test_a_rank_that_gloo_takes_down_with_a_killed_one_does_not_hide_it(start):
    run = start("reduces").wait_until_ready()
    os.kill(run.pids[1], signal.SIGKILL)
    assert run.end(15) == 1, run.log()
    assert "exit 1: ranks [1] died first and left no exit code" in run.log()
    assert alive(run.run_id) == []


@pytest.mark.slow
def test_no_rank_outlives_a_killed_wrapper_by_five_seconds(start):
    run = start("waits", deaf=True, helper=True).wait_until_ready()
    commands = alive(run.run_id)
    assert len(commands) == 6  # the launcher's two, the ranks, their helpers
    assert CANARY not in "".join(commands) + run.log()
    run.process.kill()
    eventually(lambda: not alive(run.run_id), 5)
    eventually(lambda: not run.left_behind(), 5)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "code"), [("launch", 0), ("runner", 0), ("runner", 85)])  # launch, 85: see below
def test_a_killed_launcher_is_never_a_success_and_leaves_nobody(start, module, code):
    run = start("saves", code=code) if code else start("waits", deaf=True)
    run.wait_until_ready()
    os.kill(run.pid_of(f"deepspeed.launcher.{module}"), signal.SIGKILL)
    eventually(lambda: not alive(run.run_id), 6)
    assert run.end(5) == (code or 1), run.log()
    assert "the launcher was killed" in run.log()


@pytest.mark.slow
def test_a_save_is_not_cut_when_the_launcher_is_killed(start):
    run = start("stops_in", "saving", 85, 9).wait_until_ready()
    os.kill(run.pid_of("deepspeed.launcher.launch"), signal.SIGKILL)
    assert run.end(20) == 85, run.log()
    assert f"state saved in {run.folder}" in run.log() and "the launcher was killed" in run.log()
    assert alive(run.run_id) == []


# -----------------------------------------------------------------------------
# Hangs


@pytest.mark.slow
@pytest.mark.parametrize("stops", [False, True])
def test_a_rank_that_hangs_is_named_with_its_stack_and_all_is_ended(start, stops):
    run = start("hangs", stops, 3).wait_until_ready()
    if not stops:
        run.process.terminate()  # which a rank that hangs does not hear
    assert run.end(20) == 84, run.log()
    last = run.log().splitlines()[-1]
    assert "exit 84: a rank hangs: rank 1, stage training, step 3, " in last and "pages page 3-1" in last
    assert ("without a sign of life: stopped" in last) == stops
    stacks = [run.folder / f"stacks-{rank}" for rank in range(2)]
    assert last.endswith(f"stacks: {stacks[0]}, {stacks[1]}")
    assert all('rank.py", line' in file.read_text() and "in hangs" in file.read_text() for file in stacks)
    assert alive(run.run_id) == []


@pytest.mark.slow
def test_a_rank_that_still_imports_is_no_hang(start):
    run = start("imports_for_long", 1, 13)
    assert run.end() == 0, run.log()


# -----------------------------------------------------------------------------
# Port


@pytest.mark.slow
def test_two_wrappers_that_start_at_once_take_different_ports_and_both_train(start):
    both = [start("leaves", [0, 0], meeting=True, started_as={"port": False, "name": name}) for name in "ab"]
    assert [run.end() for run in both] == [0, 0], both[0].log() + both[1].log()
    ports = {run.log().split("--master_port ")[1].split()[0] for run in both}
    assert len(ports) == 2
    assert all("exit 0: done" in run.log() for run in both)
    assert both[0].left_behind() == []


@pytest.mark.slow
def test_a_port_that_somebody_takes_while_ranks_import_is_told_with_the_remedy(start):
    port = free_port()
    run = start("leaves", [0, 0], meeting=True, started_as={"more": ("--master_port", str(port))})
    eventually(lambda: "deepspeed.launcher" in run.log(), 20)
    with socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True):
        assert run.end(60) == 2, run.log()
    said = (
        f"exit 2: the ranks could not meet: --master_port {port}: Address already in use, another process has taken it"
    )
    assert said in run.log() and "give another" in run.log()


# -----------------------------------------------------------------------------
# Out of memory


@pytest.mark.slow
def test_a_run_out_of_memory_starts_again_with_less_until_it_fits(start):
    run = start("runs_out_of_memory", started_as={"more": ("--micro_batch", "4")})
    assert run.end(120) == 0, run.log()  # three launches
    starts = [line.split() for line in (run.folder / "starts-1").read_text().splitlines()]
    front = ["--deepspeed", "zero.json", "--micro_batch", "4"]
    assert [words[2:] for words in starts] == [
        front,
        [*front, "--micro_batch", "2"],
        [*front, "--micro_batch", "1", "--resume"],
    ]
    assert len({words[0] for words in starts}) == 3 and len({words[1] for words in starts}) == 1
    assert "GPU memory ran out: starting again with --micro_batch 1 --resume" in run.log()
    assert run.left_behind() == []


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
def test_two_machines_train_together(start_two):
    names = "WORLD_SIZE LOCAL_RANK MASTER_ADDR CROSS_RANK CUDA_VISIBLE_DEVICES"
    nodes = start_two("writes", names.split())
    assert [node.end() for node in nodes] == [0, 0], nodes[0].log() + nodes[1].log()
    seen = [(nodes[0].folder / f"seen-{rank}").read_text().removeprefix(f"{sys.executable} ") for rank in range(2)]
    assert [words.partition(" --")[0] for words in seen] == [f"2 0 127.0.0.1 {rank} 0" for rank in range(2)]
    for rank, node in enumerate(nodes):
        assert f"machine {rank} of 2 x 1 ranks, which meet at 127.0.0.1" in node.log()
        assert alive(node.wait_until_ready().run_id) == []


@pytest.mark.slow
@pytest.mark.parametrize(("failing", "left", "code"), [(0, 81, 81), (1, None, 1)], ids=["81", "killed"])
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
