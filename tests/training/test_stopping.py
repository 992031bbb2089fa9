"""How a run is asked to stop: by real signals to a real process, by a file, by a terminal that closes."""

import hashlib
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from training import stopping
from training.stopping import FILE, SIGNALS, StopRequest


def within(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def process_of(work, *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    return process


def signal_twice(number: int, seconds_between: float) -> None:
    """Ends with 0 where the second one did not end it, 1 where the flag was not set."""
    stopping.AGAIN_S = 1.0
    with StopRequest() as stop:
        stop.at_the_end_of_a_step()
        os.kill(os.getpid(), number)
        if stop.signal != number or not stop.wanted or not within(lambda: stop.asked):
            os._exit(1)
        time.sleep(seconds_between)
        os.kill(os.getpid(), number)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)  # a second or more in C
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("seconds_between", "ends"), [(0.0, False), (1.5, True)])
def test_the_first_signal_sets_a_flag_and_only_a_later_one_ends_at_once(number, seconds_between, ends):
    process = process_of(signal_twice, number, seconds_between)
    process.join(timeout=60)
    # A terminal that closes sends SIGHUP twice, and SLURM's warning is no more than that.
    assert process.exitcode == (128 + number if ends and number in (signal.SIGTERM, signal.SIGINT) else 0)


@pytest.fixture
def ends(monkeypatch):
    """The codes with which the process would have been ended; played, or the tests would end, too."""
    codes = []
    monkeypatch.setattr(stopping, "end", codes.append)
    monkeypatch.setattr(stopping, "AGAIN_S", 0.0)
    monkeypatch.setattr(stopping, "LOOK_S", 0.05)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever starts tests under nohup has it ignored
    yield codes
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("first", [FILE, signal.SIGUSR1, signal.SIGHUP])
def test_after_a_file_a_warning_or_a_closed_terminal_the_first_sigterm_is_no_second_one(first, ends, tmp_path):
    """SLURM's at the time limit, say, while a long step still has to end."""
    with StopRequest() as stop:
        stop.terminals = []
        stop.at_the_end_of_a_step()
        stop.looks_into(tmp_path)
        (tmp_path / FILE).touch() if first == FILE else os.kill(os.getpid(), first)
        assert within(lambda: stop.asked)
        for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        assert within(lambda: stop.first is not None) and ends == []
        assert stop.wanted and stop.name == (first if first == FILE else signal.Signals(first).name)
        os.kill(os.getpid(), signal.SIGINT)
        assert within(lambda: ends == [128 + signal.SIGINT])


def stuck_in_c(ready: Path, code: int) -> None:
    with StopRequest() as stop:
        if code:
            stop.at_once(code, "the model is on disk")
        ready.touch()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes, without the interpreter's lock


@pytest.mark.slow
@pytest.mark.parametrize(("code", "words"), [(0, stopping.NOTHING_TRAINED), (85, "the model is on disk")])
def test_a_run_that_does_not_train_ends_at_once_also_while_stuck_in_c(code, words, tmp_path, capfd):
    process = process_of(stuck_in_c, tmp_path / "ready", code)
    assert within((tmp_path / "ready").exists, 60)
    os.kill(process.pid, signal.SIGUSR1)
    process.join(timeout=20)
    assert process.exitcode == (code or 128 + signal.SIGUSR1)
    assert f"rank 0: stopped by SIGUSR1: {words}" in capfd.readouterr().err


def asked_while_it_moves_a_folder(folder: Path) -> None:
    with StopRequest() as stop:
        stop.at_once(85, "")
        with stop.held_off():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.0)
            (folder / "moved").touch()
        time.sleep(60)


@pytest.mark.slow
def test_what_must_not_be_broken_off_is_finished_first(tmp_path):
    process = process_of(asked_while_it_moves_a_folder, tmp_path)
    process.join(timeout=40)
    assert process.exitcode == 85 and (tmp_path / "moved").exists()


def on_a_terminal(path: str, told: bool, ready: Path, done: Path) -> None:
    os.setsid()
    # A session's first one is the one whose end it is told of; ranks are in the launcher's session, and are not told.
    terminal = os.open(path, os.O_RDWR | (0 if told else os.O_NOCTTY))
    for file in (0, 1, 2):
        os.dup2(terminal, file)
    with StopRequest() as stop:
        stop.at_the_end_of_a_step()
        ready.touch()
        if within(lambda: stop.wanted and stop.asked):
            time.sleep(0.2)
            print("a line of the step that is saved", flush=True)
            print("and what a library says there", file=sys.stderr, flush=True)
            done.write_text(stop.name)
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_does_not_keep_the_state_from_being_saved(number, tmp_path):
    terminal, other = os.openpty()
    ready, done = tmp_path / "ready", tmp_path / "done"
    process = process_of(on_a_terminal, os.ttyname(other), number == signal.SIGHUP, ready, done)
    assert within(ready.exists, 60)
    os.close(other)
    os.close(terminal)
    if number == signal.SIGTERM:
        os.kill(process.pid, number)
    process.join(timeout=40)
    assert done.exists() and done.read_text() == signal.Signals(number).name


def test_a_file_in_the_output_folder_is_a_request_and_goes_once_it_is_honoured(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "LOOK_S", 0.05)
    with StopRequest() as stop:
        stop.at_the_end_of_a_step()
        stop.looks_into(tmp_path)
        time.sleep(0.2)
        assert not stop.wanted
        (tmp_path / FILE).touch()
        assert within(lambda: stop.wanted) and stop.name == FILE
        assert (tmp_path / FILE).exists(), "other ranks look for it, too"
        stop.honoured()
        assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_rank_that_loads_stops_as_another_has_by_a_signal(number, ends, tmp_path, monkeypatch):
    """It would be waited for in vain, or take for a failure what was a request."""
    monkeypatch.setenv("HOLO1_STATUS_DIR", str(tmp_path))
    (tmp_path / "rank-1").write_text(str(128 + number))
    with StopRequest() as stop:
        assert within(lambda: 128 + signal.SIGTERM in ends) and stop.name == "a signal to rank 1"
    ends.clear()
    with StopRequest() as stop:
        stop.at_the_end_of_a_step()  # it was ended at once by a second signal, and the others may still save
        time.sleep(0.3)
        assert not stop.asked and ends == []


def test_a_file_lies_until_every_rank_that_loads_has_looked(ends, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "LOOK_S", 0.5)
    file = tmp_path / FILE
    file.touch()
    with StopRequest() as stop:
        stop.looks_into(tmp_path)
        assert within(lambda: stop.asked) and file.exists()
        time.sleep(0.5)  # until the next look of another one
        assert file.exists()
        assert within(lambda: ends == [128 + signal.SIGTERM]) and not file.exists()
        stop.at_the_end_of_a_step()  # or it would end once more


def test_nohups_sighup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            stop.at_the_end_of_a_step()
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
            assert not stop.wanted
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_to_a_forked_process_is_no_request():
    """As Ctrl-C in a terminal reaches data workers, whose pipe is the rank's."""
    with StopRequest() as stop:
        stop.at_the_end_of_a_step()
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7, "the rank needs it to save"
        time.sleep(0.2)
        assert not stop.wanted


def test_signals_mean_what_they_meant_before_once_the_run_has_ended():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGTERM) == stop.note and not stop.signal
    assert [signal.getsignal(number) for number in SIGNALS] == before
