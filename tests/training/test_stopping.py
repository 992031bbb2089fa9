"""How a run is asked to stop: by real signals to a real process."""

import multiprocessing
import os
import signal

import pytest

from training.stopping import StopRequest

LATER = 3.0  # seconds, more than between the two signals of a scheduler that signals wrapper and ranks


def signal_twice(number: int, seconds_between: float) -> None:
    """Ends with 0 where the second one did not end it, 1 where the flag was not set."""
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        if stop.signal != number:
            os._exit(1)
        stop.first -= seconds_between
        os.kill(os.getpid(), number)
    os._exit(0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("seconds_between", "ends"), [(0.0, False), (LATER, True)])
def test_the_first_signal_sets_a_flag_and_only_a_later_one_ends_at_once(number, seconds_between, ends):
    process = multiprocessing.get_context("spawn").Process(target=signal_twice, args=(number, seconds_between))
    process.start()
    process.join(timeout=60)
    # Ctrl-C, too, ends it as the system does: a KeyboardInterrupt could be caught on its way.
    assert process.exitcode == (-number if ends else 0)


def test_signals_mean_what_they_meant_before_once_nobody_trains():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGTERM) == stop.note and not stop.signal
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
