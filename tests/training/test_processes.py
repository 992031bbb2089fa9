"""Three real processes that talk over gloo: two on one machine, one on another, as far as they can tell."""

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import call_in_processes, free_port

from training import processes
from training.errors import DataError, DiskError, PipelineError, SettingsError

CPU = torch.device("cpu")
RANKS, MACHINES = range(3), (0, 0, 1)


def told(work) -> list:
    """What came of `work`: its result, or its error's class and message."""
    try:
        return ["result", work()]
    except Exception as error:
        return [type(error).__name__, str(error)]


def fail(error: Exception):
    raise error


def what_a_rank_finds(folder: Path) -> dict:
    rank, machine = processes.rank(), MACHINES[processes.rank()]
    worked = []

    def prepare(name: str) -> str:
        worked.append(name)
        (folder / name).touch()
        return name

    def prepare_on(machines: tuple[int, ...], name: str) -> str:
        """Fails on other machines than these."""
        if machine not in machines:
            raise DataError(f"not on machine {machine}")
        return prepare(f"{name} of {machine}")

    own, shared = (lambda name: name.endswith(f"of {machine}")), (lambda name: (folder / name).exists())
    found = {
        "gathered": processes.gather({"rank": rank}),
        "least": processes.least([float(rank), -float(rank)]),
        "same": [processes.same_everywhere("a"), processes.same_everywhere(str(rank))],
        "agreed": [processes.agree(rank == 2), processes.agree(False)],
        "agreed after a failure": [processes.together(rank == 1), processes.together(False)],
        "on main": told(lambda: processes.on_main(lambda: prepare("main's"))),
        "on main, refused": told(lambda: processes.on_main(lambda: fail(SettingsError("--x 0: at least 1")))),
        "on main, a bug": told(lambda: processes.on_main(lambda: fail(KeyError("x")))),
        "on each machine": told(lambda: processes.on_each_machine(lambda: prepare_on((0, 1), "own"), own)),
        "on a shared disk": told(lambda: processes.on_each_machine(lambda: prepare_on((0, 1), "shared"), shared)),
        "on one in vain": told(lambda: processes.on_each_machine(lambda: prepare_on((0,), "vain"), own)),
        "port": processes.agreed_port(),
        "all arrive": processes.all_ranks_arrive(20),
    }
    if rank != 2:
        found["one is gone"] = processes.all_ranks_arrive(1)
    return found | {"worked": worked}


def be_a_rank(rank: int, port: int, folder: str) -> None:
    places = {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_RANK": (0, 1, 0)[rank], "LOCAL_WORLD_SIZE": (2, 2, 1)[rank]}
    places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in places.items()})
    torch.distributed.init_process_group("gloo")
    processes.emergency_group()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(what_a_rank_finds(Path(folder))))
    os._exit(0)  # the group of a rank that has not come cannot be left in order


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of the three ranks has found."""
    folder, port = tmp_path_factory.mktemp("ranks"), free_port()
    call_in_processes(be_a_rank, [[rank, port, folder] for rank in RANKS], folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in RANKS]


@pytest.mark.slow
def test_all_ranks_hear_the_same(found):
    assert [rank["gathered"] for rank in found] == [[{"rank": 0}, {"rank": 1}, {"rank": 2}]] * 3
    assert [rank["least"] for rank in found] == [[0.0, -2.0]] * 3
    assert [rank["same"] for rank in found] == [[True, False]] * 3
    assert [rank["agreed"] for rank in found] == [[True, False]] * 3
    assert [rank["agreed after a failure"] for rank in found] == [[True, False]] * 3
    assert len({rank["port"] for rank in found}) == 1


@pytest.mark.slow
def test_the_main_process_works_and_everyone_gets_its_result_or_its_error(found):
    assert [rank["on main"] for rank in found] == [["result", "main's"]] * 3
    assert [rank["on main, refused"] for rank in found] == [["SettingsError", "--x 0: at least 1"]] * 3
    others = ["PipelineError", "the main process failed: KeyError('x')"]
    assert [rank["on main, a bug"] for rank in found] == [["KeyError", "'x'"], others, others]


@pytest.mark.slow
def test_a_machine_that_sees_nothing_of_what_was_prepared_prepares_it(found):
    assert [rank["on each machine"] for rank in found] == [["result", f"own of {machine}"] for machine in MACHINES]
    assert [rank["on a shared disk"] for rank in found] == [["result", "shared of 0"]] * 3
    assert [rank["on one in vain"] for rank in found] == [["DataError", "not on machine 1"]] * 3
    assert [rank["worked"] for rank in found] == [["main's", "own of 0", "shared of 0", "vain of 0"], [], ["own of 1"]]


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_noticed(found):
    assert [rank["all arrive"] for rank in found] == [True] * 3
    assert [rank.get("one is gone") for rank in found] == [False, False, None]


def test_a_process_alone_asks_nobody(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert processes.is_main() and not processes.several() and processes.local_world_size() == 1
    assert processes.gather(3) == [3] and processes.least([3.0]) == [3.0] and processes.same_everywhere("a")
    assert processes.agree(True) and processes.together(True) and processes.all_ranks_arrive()
    assert processes.on_main(lambda: 4) == 4 and processes.on_each_machine(lambda: 5, lambda result: False) == 5
    with pytest.raises(PipelineError, match="mend"):
        processes.on_main(lambda: fail(PipelineError("mend it")))
    with pytest.raises(KeyError):
        processes.on_main(lambda: fail(KeyError("a bug")))


def test_the_deepspeed_launchers_name_of_a_machines_size_is_read(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert processes.local_world_size() == 4


def test_a_rank_finds_out_how_another_has_failed(tmp_path, monkeypatch, capfd):
    """As its collective only tells that the other is gone."""
    monkeypatch.setenv("RANK", "1")
    gone = RuntimeError("Connection closed by peer")
    monkeypatch.delenv("HOLO1_STATUS_DIR", raising=False)
    assert processes.code_of_another(range(80, 85)) is None and processes.say_failure(gone) == 1
    monkeypatch.setenv("HOLO1_STATUS_DIR", str(tmp_path))
    (tmp_path / "rank-0").write_text("8")  # half written, or another failure
    assert processes.say_failure(gone) == 1
    (tmp_path / "rank-0").write_text("83")
    assert processes.code_of_another(range(80, 85)) == (0, 83)
    capfd.readouterr()
    assert processes.say_failure(gone) == 83 and "rank 0 had ended before: 83, out of memory" in capfd.readouterr().err
    assert processes.say_failure(DataError("no page can be read")) == 80, "what it knows of itself goes before"
    processes.report_end(83)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"rank-0": "83", "rank-1": "83"}
    (tmp_path / "rank-0").unlink()
    assert processes.code_of_another(range(80, 85)) is None, "its own does not count"


def test_a_note_needs_no_space_where_one_lies_already(tmp_path, monkeypatch, capfd):
    """The wrapper lays them there before the start; a full disk's own error, from the device for that."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("HOLO1_STATUS_DIR", str(tmp_path))
    monkeypatch.setattr(processes, "_said_full", [])
    for code in (83, 1):
        (tmp_path / "rank-0").write_text(" " * 4096)
        (tmp_path / ".rank-0.0").symlink_to("/dev/full")
        processes.report_end(code)
        assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"rank-0": str(code)}
    (tmp_path / "beat-0").symlink_to("/dev/full")  # where not even that is possible, nothing stale is believed
    (tmp_path / ".beat-0.0").symlink_to("/dev/full")
    processes.leave_note("beat-0", "{}")
    assert [file.name for file in tmp_path.iterdir()] == ["rank-0"]
    monkeypatch.setenv("HOLO1_STATUS_DIR", str(tmp_path / "gone"))
    processes.report_end(83)  # with its wrapper
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "No space left on device" in said and str(tmp_path) in said


def test_only_the_main_process_speaks(monkeypatch, capsys):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        processes.say(f"hello from {rank}")
        processes.say_from_here("here")
    assert capsys.readouterr().out == "hello from 0\nrank 0: here\nrank 1: here\n"


def test_a_log_on_a_full_disk_does_not_hide_the_code(monkeypatch):
    with contextlib.suppress(OSError), open("/dev/full", "w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        codes = [processes.say_failure(DiskError("no space for a checkpoint")), processes.say_failure(MemoryError())]
        monkeypatch.undo()
    assert codes == [81, 83]


def closed_terminal() -> int:
    terminal, other = os.openpty()
    os.close(terminal)
    return other


def closed_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("closed", [closed_terminal, closed_pipe])
def test_what_is_said_to_nobody_ends_no_run(closed, monkeypatch, capfd):
    """As in the second between a terminal's end and the signal, or where the signal is ignored."""
    monkeypatch.setenv("RANK", "0")
    with open(closed(), "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        for _ in range(3):
            processes.say("a step's line")
            processes.say_from_here("training failed")
        print("what a library says", flush=True)
        monkeypatch.undo()
    assert capfd.readouterr().err.count("rank 0: stdout is closed") == 1


def test_a_log_that_cannot_be_written_for_another_reason_is_not_passed_over(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with contextlib.suppress(OSError), open("/dev/full", "w") as log:
        monkeypatch.setattr(sys, "stdout", log)
        with pytest.raises(OSError, match="No space left"):
            processes.say("a step's line")
