"""A bar on a terminal, lines in a file."""

import fcntl
import io
import os
import select
import struct
import sys
import termios

from scoring import bar


def on_a_terminal(monkeypatch, kind: str = "xterm"):
    """stdout and stderr are a terminal from now on; what is returned reads what stands on it so far."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    both = open(theirs, "w", buffering=1)  # noqa: SIM115 (its descriptor goes with the test's frame)
    monkeypatch.setattr(sys, "stderr", both)
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setenv("TERM", kind)

    def read() -> str:
        said = b""
        # A kernel's worker passes it on, in pieces: on a busy machine the last one comes a while after the first.
        while select.select([ours], [], [], 0.5)[0]:
            said += os.read(ours, 100_000)
        return said.decode()

    return read


def count_to(number: int) -> None:
    with bar.progress_bar("pages", number) as progress:
        for _ in range(number):
            progress.update()


def test_a_file_gets_a_line_at_the_end_and_no_carriage_return(monkeypatch):
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    count_to(1500)
    assert file.getvalue() == "pages: 1,500 of 1,500 in 0:00:00\n"


def test_a_file_is_told_nothing_twice_and_nothing_of_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    monkeypatch.setattr(bar, "EVERY_S", 0.0)
    count_to(1)
    count_to(0)
    assert file.getvalue() == "pages: 1 of 1 in 0:00:00\n"


def test_a_file_is_told_now_and_then_how_fast_and_how_long_still(monkeypatch):
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    seconds = iter([0.0, 10.0, 31.0, 31.0, 90.0, 90.0, 100.0])
    monkeypatch.setattr(bar, "monotonic", lambda: next(seconds))
    with bar.progress_bar("pages", None, initial=10) as progress:
        progress.total = 90  # known once the first page has come
        for _ in range(3):
            progress.update(20)
    assert file.getvalue().splitlines() == [
        "pages: 50 of 90 in 0:00:31, 1.29 pages/s, 0:00:31 left",
        "pages: 70 of 90 in 0:01:30, 1.5 s/page, 0:00:30 left",
        "pages: 70 of 90 in 0:01:40, 1.7 s/page, 0:00:33 left",
    ]


def test_a_terminal_has_a_bar_and_what_is_said_meanwhile_stands_above_it(monkeypatch):
    terminal = on_a_terminal(monkeypatch)
    with bar.progress_bar("pages", 3) as progress:
        progress.update()
        with bar.beside_bars():
            print("a line")
    said = terminal()
    assert "pages:   0%|" in said and "1/3" in said and "\r" in said
    above = said.index("a line\r\n")
    assert said[:above].endswith("\r") and "pages:" in said[above:], "the bar was taken away before, and drawn again"


def test_a_terminal_that_cannot_draw_has_lines(monkeypatch):
    terminal = on_a_terminal(monkeypatch, "dumb")
    count_to(2)
    assert terminal() == "pages: 2 of 2 in 0:00:00\r\n"  # \r\n is the terminal's own line end


def test_without_a_bar_a_line_is_printed_as_ever(monkeypatch):
    terminal = on_a_terminal(monkeypatch)
    with bar.beside_bars():
        print("alone")
    assert terminal() == "alone\r\n"
