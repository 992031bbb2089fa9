"""Worker processes that make pages, each with a browser and a tokenizer of its own.

    with Workers(most_at_once(), PageMaker(settings, seconds_per_render=30)) as workers:
        for made in workers.make(Task(number, source) for number, source in enumerate(sources)): ...

The parent only hands out sources and takes answers, so that cores add up: threads around the browsers of one process
would share one interpreter. Answers come as they are ready. Who dies is replaced, and its page tried once more.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import re
import signal
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from making.drops import PageDropped
from making.local_files import LocalFiles, inline_files
from making.one_page import encode, make_page
from making.page_settings import Settings, token_counter
from making.sources import Source, read_html
from scoring.renders import Renderer, end_family

MARK = "PAGE_MAKER"
SECONDS_PER_PAGE = 900.0  # after which a worker is taken for hanging: no page needs as many renders of 30 s
MOST_FAILED_STARTS = 3  # of workers, one after another


@dataclass(frozen=True)
class Task:
    """A page to make: its place in the source, and the source digest under which an earlier run has made it."""

    number: int
    source: Source
    earlier: str | None = None


@dataclass(frozen=True)
class Made:
    """What became of a task: the page's line (None: as in an earlier run), with a reason where it was dropped; the file
    of its screenshot; the browser's version."""

    task: Task
    row: dict[str, Any] | None
    picture: bytes | None = None
    browser: str = ""


class Maker(Protocol):
    """What a worker process does; it is pickled on its way there."""

    def open(self) -> None: ...

    def make(self, task: Task) -> Made: ...

    def close(self) -> None: ...


def picture_name(page: str) -> str:
    """A page's name as a file's, without its suffix: safe on every system, and another for every page."""
    parts = [re.sub(r"[^\w.-]", "_", part, flags=re.A).lstrip(".")[:100] or "_" for part in page.split("/")]
    name = "/".join(parts)
    return name if name == page else f"{name}-{hashlib.sha256(page.encode()).hexdigest()[:8]}"


@dataclass
class PageMaker:
    """Makes real pages."""

    settings: Settings
    seconds_per_render: float
    renderer: Renderer | None = field(default=None, init=False)
    count: Callable[[str], int] = field(default=len, init=False)

    def open(self) -> None:
        self.renderer = Renderer(1, self.seconds_per_render)
        self.count = token_counter(self.settings.tokenizer)

    def close(self) -> None:
        self.renderer.close()

    def make(self, task: Task) -> Made:
        source, files = task.source, LocalFiles(task.source.root, self.renderer)
        row: dict[str, Any] = {"page": source.name, "source": ""}
        try:
            page = read_html(source, self.renderer)
            where = source.path.resolve().parent if source.path else None
            width = self.settings.width_of(source.name)
            html = inline_files(page, where, files, self.settings.scripts == "run", width)
            row["source"] = hashlib.sha256(html.encode("utf-8", "replace")).hexdigest()
            if files.notes:
                row["notes"] = dict(files.notes)
            if row["source"] == task.earlier:
                return Made(task, None)
            record, image = make_page(source.name, html, self.settings, self.renderer, self.count)
        except PageDropped as error:
            return Made(task, row | {"reason": error.reason, "detail": str(error)})
        suffix, picture = encode(image)
        row = {"file_name": picture_name(source.name) + suffix, **record, **row}
        return Made(task, row, picture, self.renderer.version)


# -----------------------------------------------------------------------------
# In the worker


def serve(connection: Connection, maker: Maker) -> None:
    """(worker process) Make what is asked until the parent is gone; what goes wrong in here is raised over there."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal, and Slurm, send them to all: the parent decides
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the browser would inherit
    try:
        maker.open()
        connection.send(None)
        while True:
            connection.send(maker.make(connection.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except Exception as error:
        import traceback

        error.add_note("in a worker:\n" + "".join(traceback.format_exception(error)))
        with contextlib.suppress(OSError):
            connection.send(error)
    finally:
        with contextlib.suppress(Exception):
            maker.close()


# -----------------------------------------------------------------------------
# In the parent


class Worker:
    """A worker process, and what it is doing."""

    def __init__(self, maker: Maker) -> None:
        context, self.mark = multiprocessing.get_context("spawn"), uuid.uuid4().hex  # no threads or locks of ours
        self.connection, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, maker), daemon=True)
        resource_tracker.ensure_running()  # a helper of the whole run, which has no mark
        os.environ[MARK] = self.mark  # in the environment of everything that it starts, from its first moment
        try:
            self.process.start()
        finally:
            del os.environ[MARK]
        there.close()  # or its end would never be noticed
        self.task: Task | None = None
        self.ready, self.since = False, time.monotonic()

    def give(self, task: Task) -> None:
        self.task, self.since = task, time.monotonic()
        with contextlib.suppress(OSError):  # it has died: so the answer will say
            self.connection.send(task)

    def end(self) -> str:
        """Kills it with all that it started; how it had ended before, in words."""
        code = self.process.exitcode
        end_family(self.process.pid if code is None else None, f"{MARK}={self.mark}")
        self.process.join()
        self.connection.close()
        return "" if code is None else f"ended by signal {-code}" if code < 0 else f"ended with {code}"


class Workers:
    """`most` worker processes, started as they are needed; a context manager, which leaves no process behind."""

    def __init__(self, most: int, maker: Maker, seconds_per_page: float = SECONDS_PER_PAGE) -> None:
        self.most, self.maker, self.seconds_per_page = most, maker, seconds_per_page
        self.workers: list[Worker] = []
        self.failed_starts = 0

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *unused: object) -> None:
        idle = [worker for worker in self.workers if worker.ready and worker.task is None]
        for worker in idle:
            worker.connection.close()  # so it closes its browser, and goes
        patience = time.monotonic() + 10
        for worker in idle:
            worker.process.join(max(0.0, patience - time.monotonic()))
        for worker in self.workers:
            worker.end()
        self.workers.clear()

    def make(self, tasks: Iterable[Task]) -> Iterator[Made]:
        """What becomes of each task, as it is ready. `tasks` are read as workers come free.

        A page whose worker dies is tried once more, then dropped. Raises what a worker raises, and RuntimeError where
        workers die before they have begun.
        """
        coming, again, died = iter(tasks), deque[Task](), dict[int, str]()
        while True:
            self._hand_out(again, coming)
            if not any(worker.task for worker in self.workers) and not again:
                return
            for worker in self._answering():
                try:
                    answer = worker.connection.recv()
                except (EOFError, OSError):
                    answer, task = self._buried(worker), worker.task
                    if task is None:
                        continue
                    if task.number not in died:
                        died[task.number] = answer
                        again.append(task)
                        continue
                    answer = lost(task, f"its worker {died[task.number]}, then {answer}")
                if isinstance(answer, BaseException):
                    raise answer
                worker.ready, self.failed_starts = True, 0
                if answer is not None:
                    died.pop(answer.task.number, None)
                    worker.task = None
                    self._hand_out(again, coming)  # it works while the caller writes
                    yield answer

    def _hand_out(self, again: deque[Task], coming: Iterator[Task]) -> None:
        """A task for everyone who has none, as long as there are any."""
        while True:
            free = next((worker for worker in self.workers if worker.task is None), None)
            if free is None and len(self.workers) >= self.most:
                return
            task = again.popleft() if again else next(coming, None)
            if task is None:
                return
            if free is None:
                self.workers.append(free := Worker(self.maker))
            free.give(task)

    def _answering(self) -> list[Worker]:
        """Workers that have answered or died; those whose time is up are killed, and so among them."""
        late = time.monotonic() - self.seconds_per_page
        for worker in self.workers:
            if worker.task is not None and worker.since < late:
                end_family(worker.process.pid, f"{MARK}={worker.mark}")
        connections = {worker.connection: worker for worker in self.workers}
        return [connections[one] for one in wait(list(connections), timeout=1.0)]

    def _buried(self, worker: Worker) -> str:
        """How it died, in words; RuntimeError where workers do not even begin."""
        self.workers.remove(worker)
        worker.process.join(5)
        words, took = worker.end() or "was killed", time.monotonic() - worker.since
        if took > self.seconds_per_page:
            words = f"took over {self.seconds_per_page:.0f} s"
        self.failed_starts += not worker.ready
        if self.failed_starts >= MOST_FAILED_STARTS:
            raise RuntimeError(f"{self.failed_starts} workers have died before they began; the last one {words}")
        return words


def lost(task: Task, detail: str) -> Made:
    """What became of a page that ends its workers; another run tries it again."""
    return Made(task, {"page": task.source.name, "source": "", "reason": "died", "detail": detail})
