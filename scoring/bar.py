"""How far a long piece of work has come: a bar on a terminal, now and then a line in a file or a pipe.

    with progress_bar("pages", total=1000) as bar:
        bar.update()
    with beside_bars():             # what is printed inside stands above the bars of this process
        print("a line")

A bar redraws itself by carriage returns, which a file keeps as one line of thousands of characters. Both write to
stderr; tqdm is imported when a bar is drawn.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

EVERY_S = 30.0  # between two lines in a file: two a minute tell that it is alive, and an hour's are still read
_drawn: list[tqdm] = []  # the bars that stand on the terminal now


def on_terminal() -> bool:
    """Whether stderr is a terminal that can draw a line anew."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Lines:
    """A bar's twin for a file: the same `total`, `n` and `update`, told in lines."""

    def __init__(self, what: str, total: int | None, initial: int = 0, unit: str = "page"):
        self.what, self.total, self.n, self.initial, self.unit = what, total, initial, initial, unit
        self.start = self.told = monotonic()
        self.last = -1  # how many were done when a line was told last

    def update(self, count: int = 1) -> None:
        """`count` more are done."""
        self.n += count
        if monotonic() - self.told >= EVERY_S:
            self.tell()

    def tell(self) -> None:
        """One line: how many of how many, how fast (per second, or seconds each), the time left."""
        self.told, self.last = monotonic(), self.n
        seconds, done = self.told - self.start, self.n - self.initial
        words = f"{self.what}: {self.n:,}" + (f" of {self.total:,}" if self.total is not None else "")
        words += f" in {timedelta(seconds=round(seconds))}"
        if done and seconds >= 1:
            rate = done / seconds
            words += f", {rate:,.2f} {self.unit}s/s" if rate >= 1 else f", {seconds / done:,.1f} s/{self.unit}"
            if self.total is not None and self.n < self.total:
                words += f", {timedelta(seconds=round((self.total - self.n) / rate))} left"
        print(words, file=sys.stderr, flush=True)

    def close(self) -> None:
        """The last line, unless all has been told already, or there was nothing to do."""
        if self.total != 0 and not self.n == self.last == self.total:
            self.tell()

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def progress_bar(what: str, total: int | None, initial: int = 0, unit: str = "page") -> Iterator[tqdm | Lines]:
    """A bar on stderr for `what`, `initial` of `total` being done (None: nobody knows how many there are)."""
    if not on_terminal():
        with Lines(what, total, initial, unit) as lines:
            yield lines
        return
    bar = draw(what, total, initial, unit)
    try:
        yield bar
    finally:
        erase(bar)


def draw(what: str, total: int | None, initial: int = 0, unit: str = "page") -> tqdm:
    """A bar on the terminal until `erase`."""
    from tqdm import tqdm

    bar = tqdm(desc=what, total=total, initial=initial, unit=unit, mininterval=0.5, dynamic_ncols=True)
    _drawn.append(bar)
    return bar


def erase(bar: tqdm) -> None:
    """The bar's last state stays on the terminal, and nothing draws it any more."""
    bar.close()
    if bar in _drawn:
        _drawn.remove(bar)


@contextlib.contextmanager
def beside_bars() -> Iterator[None]:
    """What is printed inside stands above the bars, which are drawn anew below it."""
    if not _drawn:
        yield
        return
    from tqdm import tqdm

    with tqdm.external_write_mode():
        yield
