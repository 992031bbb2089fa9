"""A forked start is as good as a fresh one: what the script sees, how it ends, and that nobody stays behind."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import warm
from conftest import MAIN, PROGRAMS, run_script, start_plain, start_torchrun

SCRIPT = str(PROGRAMS / "tells_how_it_was_started.py")


@pytest.mark.slow
def test_a_script_sees_what_it_would_see_by_hand_and_ends_as_it_would(tmp_path):
    given = {"PLANNED": "here", "PYTHONUNBUFFERED": "1"}
    forked = start_plain(["3", "--flag"], tmp_path, script=SCRIPT, env=given)
    by_hand = start_plain(["3", "--flag"], tmp_path, script=SCRIPT, env=given, cold=True)
    assert (forked.returncode, by_hand.returncode, forked.stderr) == (3, 3, by_hand.stderr)
    seen, wanted = json.loads(forked.stdout), json.loads(by_hand.stdout)
    assert seen.pop("chance") != wanted.pop("chance")
    assert seen["environment"]["PLANNED"] == "here" and seen == wanted


@pytest.mark.slow
def test_an_exception_and_a_signal_end_a_forked_script_as_a_fresh_one(tmp_path):
    failed = start_plain(["raises"], tmp_path, script=SCRIPT)
    assert failed.returncode == 1 and failed.stderr.rstrip().endswith("ValueError: as asked")
    with (tmp_path / "said").open("wb") as said:
        process = warm.fork(SCRIPT, ["waits"], tmp_path, warm.usual_environment(), said.fileno(), said.fileno())
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM
    with pytest.raises(subprocess.TimeoutExpired):
        start_plain(["waits"], tmp_path, script=SCRIPT, timeout=1)


@pytest.mark.slow
def test_ranks_see_what_torchrun_tells_them(tmp_path):
    def told(cold: bool) -> list[dict]:
        done = start_torchrun(["0"], tmp_path, script=SCRIPT, cold=cold)
        assert done.returncode == 0, done.stderr
        seen = [json.loads((tmp_path / f"seen-{rank}").read_text())["environment"] for rank in (0, 1)]
        known = ("PORT", "RUN_ID", "ERROR_FILE", "NCCL", "KMP")  # another one in each run, or for GPUs
        return [{name: one[name] for name in one if not any(word in name for word in known)} for one in seen]

    forked, by_hand = told(False), told(True)
    for one, other in zip(forked, by_hand):
        assert {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)} == set()


def test_what_an_import_reads_begins_cold(monkeypatch):
    monkeypatch.setattr(warm, "neutral", lambda: warm.Warm(None, usual, None))
    monkeypatch.setattr(warm, "training", lambda accelerator: accelerator)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.delenv("COLD", raising=False)
    usual = warm.usual_environment()
    assert warm.warm_for(usual | {"RANK": "1", "HOLO1_STATUS_DIR": "x", "PATH": "/"}) == ""
    assert warm.warm_for(usual | {"DS_ACCELERATOR": "cpu"}) == "cpu"
    assert warm.warm_for(usual | {"HF_ENDPOINT": "http://127.0.0.1:1"}).environment == usual
    assert warm.warm_for(usual | {"TORCH_LOGS": "all"}) is None
    assert warm.warm_for({name: value for name, value in usual.items() if name != "OMP_NUM_THREADS"}) is None
    monkeypatch.setenv("COLD", "1")
    assert warm.warm_for(usual) is None


@pytest.mark.slow
def test_nobody_is_left_when_the_tests_are_killed(tmp_path):
    done = run_script(str(PROGRAMS / "leaves_a_fork_behind.py"), cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    until, place = time.monotonic() + 20, Path("/proc") / done.stdout.strip()
    while place.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert done.stdout.strip().isdigit() and not place.exists()


@pytest.mark.slow
def test_loading_starts_no_thread(tmp_path):
    """Which no fork would have. The training's own warm process says so on stderr."""
    assert start_plain(["--unknown"], tmp_path, script=MAIN).returncode == 2
    complaint = warm.neutral().complaint
    complaint.seek(0)
    assert "started threads" not in complaint.read().decode()


def test_a_process_that_has_ended_unheard_can_be_signalled():
    """Its parent has waited for it, and has yet to tell so: nobody has that number any more."""
    gone = subprocess.Popen(["true"])
    assert gone.wait() == 0
    hearing, telling = os.pipe()
    os.write(telling, json.dumps({"pid": gone.pid}).encode() + b"\n")
    process = warm.Forked(hearing, None)
    process.send_signal(signal.SIGTERM)
    end = json.dumps({"returncode": 7, "cpu_seconds": 0.5}).encode() + b"\n"
    late = threading.Timer(0.2, os.write, (telling, end))
    late.start()
    process.kill_all()
    late.join()
    os.close(telling)
    assert (process.returncode, process.cpu_seconds) == (7, 0.5)
