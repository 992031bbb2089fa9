"""Pages checked by several processes, in the order of their rows, with the result of a single one.

    with PagePool(job, count_tokens, most_workers=cores()) as pool:
        (lane,) = pool.lanes([rows], [1.0])
        for checked in lane: ...                # Checked, each row once, in order

This process checks by itself until it is known that workers would save time; they take a second to start. A worker is
this file as a program of its own: forked from a process that has begun CUDA it would not be safe, and what
multiprocessing starts imports the main module, hence torch. It ends with its parent, however that ends. Rows are held
in memory as far as workers are ahead, so memory does not grow with the number of pages.

Sections: Checks, Pool, Worker.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from training.dataset import BadPage
from training.page_checks import CountTokens, Marks, WantedPages, check_page, marks_of
from training.processes import say

Row = tuple[str, Any, Any]  # name, the screenshot's file or the BadPage that says why there is none, html

CHUNK_ROWS, CHUNK_BYTES = 8, 4 * 2**20  # of one task: an answer costs a fifth of a millisecond, a page ten
TASKS_EACH = 2  # of a worker at once: one that is checked, one that waits
ALONE_S = 1.0  # of checks, after which this process knows how long the rest would take
WORTH_S = 10.0  # that the rest has to take for workers to be worth their start
NAMED_TWICE = "the worker that checked it was killed twice (out of memory?)"

# -----------------------------------------------------------------------------
# Checks


@dataclass(frozen=True)
class Checked:
    """What became of one row: a page with its marks, or why it is dropped."""

    name: str
    page: dict[str, Any] | None = None
    marks: Marks | None = None
    bad: BadPage | None = None


@dataclass(frozen=True)
class Job:
    """What workers are told: the settings that check_page reads, and how html is counted there; both are pickled.
    `count_tokens` None: no worker can count as this process does, which then checks alone."""

    settings: Any
    count_tokens: CountTokens | None = None


class TokenizerCount:
    """CountTokens by a tokenizer as JSON, for processes that shall not load transformers; image tokens are 0. Special
    tokens in html are plain text, as in PageEncoder.tokens."""

    def __init__(self, tokenizer: str, lead: str):
        self.tokenizer, self.lead = tokenizer, lead
        self.loaded: Any = None

    def __call__(self, html: str, width: int, height: int) -> tuple[int, int]:
        if self.loaded is None:
            import tokenizers

            self.loaded = tokenizers.Tokenizer.from_str(self.tokenizer)
            self.loaded.no_truncation()
            self.loaded.no_padding()
            self.loaded.encode_special_tokens = True
        return len(self.loaded.encode(self.lead + html, add_special_tokens=False).ids), 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"loaded": None}


def job_of(settings: WantedPages, count_tokens: CountTokens | None) -> Job:
    """A job that workers can read without the room of the settings."""
    wanted = {name: getattr(settings, name) for name in WantedPages.__annotations__}
    return Job(SimpleNamespace(**wanted), count_tokens)


def check_row(row: Row, settings: Any, count_tokens: CountTokens) -> Checked:
    """One row, in whatever process."""
    try:
        page = check_page(*row, settings, count_tokens)
        return Checked(row[0], page, marks_of(page))
    except BadPage as bad:  # some of pillow's words name a place in memory, another one each time
        return Checked(row[0], bad=BadPage(bad.reason, re.sub(r" <[^<>]* at 0x[0-9a-f]+>", "", str(bad))))


def cores() -> int:
    """Cores that this process may use, by its affinity and its cgroup's quota (version 2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


# -----------------------------------------------------------------------------
# Pool


@dataclass(eq=False)
class Task:
    """Some rows of a lane, and in the end what became of them; `again` after a worker died of one of them."""

    rows: list[Row]
    done: list[Checked] | None = None
    again: bool = False


class Lane:
    """The rows of one dataset, checked, in order: an iterator of `Checked`. What ends the reading is raised only where
    a process alone would have come to it."""

    def __init__(self, pool: PagePool, rows: Iterator[Row], share: float):
        self.pool, self.rows, self.share = pool, rows, share
        self.tasks: deque[Task] = deque()
        self.ready: deque[Checked] = deque()
        self.ended, self.error = False, None

    def __iter__(self) -> Iterator[Checked]:
        return self

    def __next__(self) -> Checked:
        while not self.ready:
            if not self.tasks and not self.pool.workers and not self.ended:
                return self.pool.check_here(next(self.rows))
            self.pool.feed()
            if self.tasks and self.tasks[0].done is not None:
                self.ready.extend(self.tasks.popleft().done)
            elif self.tasks:
                self.pool.work()
            elif self.error is not None:
                raise self.error
            elif self.ended:
                raise StopIteration
        return self.ready.popleft()

    def read(self) -> Task | None:
        """The next rows as a task; None at the end."""
        rows, size = [], 0
        try:
            while len(rows) < CHUNK_ROWS and size < CHUNK_BYTES and not self.ended:
                if (row := next(self.rows, None)) is None:
                    self.ended = True
                else:
                    rows.append(row)
                    size += sum(len(part) for part in row[1:] if isinstance(part, bytes | str))
        except Exception as error:  # raised again in __next__, behind the rows that were read before it
            self.ended, self.error = True, error
        return Task(rows) if rows else None


@dataclass
class Worker:
    """One process, and what it was given."""

    process: subprocess.Popen
    pipe: Connection
    tasks: deque[Task] = field(default_factory=deque)
    started: bool = False  # it has told that it can work


class PagePool:
    """The workers of one reading. `remaining` are the pages that are still wanted, by which the start is decided."""

    def __init__(self, job: Job, count_tokens: CountTokens, most_workers: int, image_tokens: Any = None):
        self.job, self.count_tokens, self.image_tokens = job, count_tokens, image_tokens
        self.most = most_workers if most_workers > 1 and job.count_tokens is not None else 0
        self.workers: list[Worker] = []
        self.every: list[Lane] = []
        self.again: deque[Task] = deque()  # for which a worker has died
        self.remaining, self.here, self.here_s = 0, 0, 0.0

    def __enter__(self) -> PagePool:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def lanes(self, rows: Sequence[Iterator[Row]], shares: Sequence[float]) -> list[Lane]:
        """A lane for each dataset; those of an earlier reading are forgotten."""
        self.close()
        self.every = [Lane(self, iter(each), share) for each, share in zip(rows, shares, strict=True)]
        self.here, self.here_s = 0, 0.0
        return self.every

    def check_here(self, row: Row) -> Checked:
        """By this process; starts the workers once the rest would take it long."""
        start = time.monotonic()
        checked = check_row(row, self.job.settings, self.count_tokens)
        self.here, self.here_s = self.here + 1, self.here_s + time.monotonic() - start
        if self.most and self.here_s > ALONE_S and self.remaining * self.here_s / self.here > WORTH_S:
            say(f"pages: {self.most} workers check them")
            self.start(self.most)
        return checked

    def start(self, count: int) -> None:
        """So many more workers, side by side."""
        new = [self.start_one() for _ in range(count)]
        self.workers += new
        for worker in new:
            with contextlib.suppress(OSError):  # it has died already: found in `work`
                worker.pipe.send(self.job)

    def start_one(self) -> Worker:
        ours, theirs = Pipe()
        # A worker has one core. Ours is found wherever this process has found it, a test's own modules, too.
        apart = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        apart["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, sys.path)])
        command = [sys.executable, "-m", "training.page_workers", str(theirs.fileno())]
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=os.environ | apart, stdin=subprocess.DEVNULL
        )
        theirs.close()
        return Worker(process, ours)

    def feed(self) -> None:
        """Gives every worker what it can take, of the lane that is furthest behind its share; no lane gets ahead by
        more than its share of what all workers hold twice."""
        for worker in self.workers:
            while len(worker.tasks) < TASKS_EACH and not any(task.again for task in worker.tasks):
                if self.again and not worker.tasks:
                    self.give(worker, self.again.popleft())
                    break
                task = self.next_task()
                if task is None:
                    break
                self.give(worker, task)

    def next_task(self) -> Task | None:
        most = 2 * TASKS_EACH * max(1, len(self.workers))
        open_lanes = [lane for lane in self.every if not lane.ended and len(lane.tasks) < max(2.0, most * lane.share)]
        for lane in sorted(open_lanes, key=lambda lane: len(lane.tasks) / lane.share):
            if (task := lane.read()) is not None:
                lane.tasks.append(task)
                return task
        return None

    def give(self, worker: Worker, task: Task) -> None:
        worker.tasks.append(task)
        # A broken screenshot is its own answer, and needs no worker.
        rows = [row for row in task.rows if not isinstance(row[1], BadPage)]
        with contextlib.suppress(OSError):  # it has died: found in `work`, with its tasks
            worker.pipe.send(rows)

    def work(self) -> None:
        """Waits until a worker has answered, or has died."""
        by_pipe = {worker.pipe: worker for worker in self.workers}
        if not by_pipe:
            return self.finish_here()
        for pipe in wait(list(by_pipe)):
            worker = by_pipe[pipe]
            try:
                self.take(worker, pipe.recv())
            except (EOFError, OSError):
                self.bury(worker)

    def take(self, worker: Worker, answer: Any) -> None:
        if answer == "ready":
            worker.started = True
            return
        if isinstance(answer, BaseException):
            raise answer
        task, answers = worker.tasks.popleft(), iter(answer)
        task.done = []
        for name, screenshot, _ in task.rows:
            if isinstance(screenshot, BadPage):
                task.done.append(Checked(name, bad=screenshot))
                continue
            page, marks, bad = next(answers)
            if page is not None and page["screenshot"] is None:
                page["screenshot"] = screenshot
            if page is not None and self.image_tokens is not None:
                page["image_tokens"] = self.image_tokens(page["width"], page["height"])
            task.done.append(Checked(name, page, marks, None if bad is None else BadPage(*bad)))

    def bury(self, worker: Worker) -> None:
        """A worker has died. Its rows are tried once more, each alone; one of which a worker dies again is named."""
        self.workers.remove(worker)
        worker.pipe.close()
        code = worker.process.wait()
        if not worker.started:
            say(f"pages: a worker cannot start (exit code {code}); this process checks them alone")
            self.most = 0
        for task in worker.tasks:
            if task.again:
                task.done = [Checked(task.rows[0][0], bad=BadPage("unreadable", NAMED_TWICE))]
            else:
                self.split(task)
        if self.most:
            self.start(1)

    def split(self, task: Task) -> None:
        """The task's rows as tasks of one row each, in its place."""
        lane = next(lane for lane in self.every if task in lane.tasks)
        singles = [Task([row], again=True) for row in task.rows]
        place = lane.tasks.index(task)
        lane.tasks.remove(task)
        for number, single in enumerate(singles):
            lane.tasks.insert(place + number, single)
        self.again.extend(singles)

    def finish_here(self) -> None:
        """What was read for workers that are no more."""
        for lane in self.every:
            for task in lane.tasks:
                if task.done is None:
                    task.done = [check_row(row, self.job.settings, self.count_tokens) for row in task.rows]
        self.again.clear()

    def close(self) -> None:
        """Ends the workers."""
        for worker in self.workers:
            worker.pipe.close()
        for worker in self.workers:
            try:
                worker.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        self.workers, self.every = [], []
        self.again.clear()


# -----------------------------------------------------------------------------
# Worker


def listen(pipe: Connection, tasks: queue.SimpleQueue) -> None:
    """(a thread of its own) Reads ahead, so that neither side waits for the other to read; ends the process with its
    parent, whatever it is checking."""
    try:
        while True:
            tasks.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)
    except Exception:  # a job that cannot be read here
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def answer_for(row: Row, job: Job) -> tuple[dict[str, Any] | None, Marks | None, tuple[str, str] | None]:
    """(page, marks, bad) of a row; the screenshot stays where it is."""
    checked = check_row(row, job.settings, job.count_tokens)
    if checked.bad is not None:
        return None, None, (checked.bad.reason, str(checked.bad))
    page = checked.page
    if page["screenshot"] is row[1]:
        page = page | {"screenshot": None}
    return page, checked.marks, None


def be_a_worker(number: int) -> None:
    """What this file does as a program: `number` is the descriptor of its end of a pipe."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)  # they reach whole groups; it ends with its parent, and not before
    pipe, tasks = Connection(number), queue.SimpleQueue()
    threading.Thread(target=listen, args=(pipe, tasks), daemon=True).start()
    job = tasks.get()
    pipe.send("ready")
    while True:
        rows = tasks.get()
        try:
            pipe.send([answer_for(row, job) for row in rows])
        except BrokenPipeError:
            os._exit(0)
        except Exception as error:  # a bug, or memory that ran out: raised in the parent
            traceback.print_exc()
            with contextlib.suppress(Exception):
                pickle.loads(pickle.dumps(error))
                pipe.send(error)
                continue
            pipe.send(RuntimeError(f"a worker failed: {error!r}"))


if __name__ == "__main__":
    be_a_worker(int(sys.argv[1]))
