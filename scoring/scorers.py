"""Pairs of pages scored by processes of their own, each with its browsers, while this one does something else.

    with Scorers(scorers_for(len(pairs))) as scorers:
        scorers.expect(pair)                            # whose prediction is None yet: its reference is rendered
        scorers.give(pair, pictures=folder)             # at any time; a process begins with it at once
        for key, score in scorers.scored(): ...         # as they come

Scoring is as much Python as it is browsers, so threads would share one interpreter, and take it from an engine that
writes meanwhile. A process is this file as a program of its own: forked from one that has begun CUDA it would not be
safe, and what multiprocessing starts imports the main module, hence torch. It ends with its parent, however that ends.

Sections: What is scored, In the process, In the parent.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image

from scoring.bar import beside_bars
from scoring.blocks import Page, halves_of, job_for, joined, page_of
from scoring.clip import Clip
from scoring.machine import most_at_once
from scoring.metrics import PageScore, compare
from scoring.proof import ScorerError, prove
from scoring.renders import Job, Render, Renderer, decoded, end_family, find_chromium

BROWSERS = 2  # of each process: reference and written page side by side, or the halves of one page
TASKS_EACH = 2  # of each process at once: one is compared while the next one is rendered
MOST_SCORERS = 8  # some 0.8 GB each; 16 cores, of which the writing and the data need some
MOST_KEPT = 8  # references of each process that are rendered before their pairs come, some 20 MB of a long page
WORTH_PAGES = 8  # fewer are scored here before processes and browsers have started
MOST_FAILED_STARTS = 3  # of processes, one after another
NICER = 5  # than what writes meanwhile, whose few steps of Python come first
DIED_TWICE = "the process that scored it died twice (out of memory?)"
MARK = "PAGE_SCORER"
PROOF = "the proof"  # in place of a pair's key

# -----------------------------------------------------------------------------
# What is scored


@dataclass(frozen=True)
class Pair:
    """A page's name, its reference, what was written (None: nothing was), and the browser's window in CSS pixels."""

    name: str
    reference: str
    prediction: str | None
    width: int = 1280
    height: int = 720

    @property
    def key(self) -> str:
        """By what is rendered and not by the name: equal pages are scored once, and a changed one again."""
        content = json.dumps([self.reference, self.prediction, self.width, self.height])
        return hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()

    @property
    def jobs(self) -> tuple[Job, Job]:
        """What has to be rendered: the reference, and what was written."""
        htmls = (self.reference, self.prediction or "")
        return tuple(job_for(html, self.width, self.height) for html in htmls)

    @property
    def wanted(self) -> tuple[str, int, int]:
        """What a reference known beforehand is found by."""
        return self.reference, self.width, self.height


Scored = tuple[PageScore, np.ndarray | None, np.ndarray | None]  # with the two pictures (H, W, 3) uint8


def pages_of(pair: Pair, renders: Iterator[Render], reference: Page | None = None) -> tuple[Page, Page]:
    """Reference and written page, by the next two of `renders`, those of `pair.jobs`; by the next one where the
    `reference` is known."""
    reference = reference or page_of(next(renders), pair.reference)
    written = page_of(next(renders), pair.prediction or "")
    return reference, Page(None, failure="there is none") if pair.prediction is None else written


def score_pair(pair: Pair, renders: Iterator[Render], clip: Clip | None = None) -> Scored:
    """By the next two of `renders`, those of `pair.jobs`. The pictures are None where there is none."""
    wanted, written = pages_of(pair, renders)
    return compare(wanted, written, clip), wanted.image, written.image


def score_pairs(pairs: Iterable[Pair], renderer: Renderer, clip: Clip | None = None) -> Iterator[tuple[Pair, Scored]]:
    """Each with what `score_pair` finds, in order, by this process. Holds a few pages at a time, and no more."""
    waiting: deque[Pair] = deque()

    def jobs() -> Iterator[Job]:  # read ahead of the renders that come back
        for pair in pairs:
            waiting.append(pair)
            yield from pair.jobs

    renders = renderer.map(jobs())
    for render in renders:
        pair = waiting.popleft()
        yield pair, score_pair(pair, chain([render], renders), clip)


def keep_pictures(folder: Path, key: str, images: Iterable[np.ndarray | None]) -> None:
    """Those of the reference and of what was written, (H, W, 3) uint8, as wide as the report shows them."""
    for name, image in zip(("reference", "written"), images):
        if image is not None:
            picture = Image.fromarray(image)
            picture = picture.reduce(2) if picture.width > 1280 else picture
            picture.save(folder / f"{key}-{name}.png", compress_level=1)


# -----------------------------------------------------------------------------
# In the process


@dataclass(frozen=True)
class Order:
    """What a process is told: a pair, or None for the proof, and the folder for its pictures, None for none. Of a pair
    that is yet `to_come` the reference alone is rendered, and kept until the pair comes."""

    key: str
    pair: Pair | None = None
    pictures: Path | None = None
    to_come: bool = False


class Halves:
    """A page that both browsers render, each half of its steps: half as long, where they have nothing else to do.

    Each half has a clock of its own. So what both together took longer for than a page may take at its first try, and
    what failed, is rendered once more as a whole: whether a page fails must not depend on what browsers were idle.
    """

    def __init__(self, renderer: Renderer, job: Job):
        self.renderer, self.job = renderer, job
        self.halves = [renderer.begin(half) for half in halves_of(job)]

    def result(self) -> Render:
        """As of a `Future`."""
        one, two = (half.result() for half in self.halves)
        if one.failure or two.failure or one.seconds + two.seconds > self.renderer.first_try_s:
            return self.renderer.begin(self.job).result()
        return joined(one, two)


References = dict[tuple[str, int, int], Page | None]  # by `Pair.wanted`; None: begun


def jobs_of(order: Order, references: References) -> tuple[Job, ...]:
    """What has to be rendered now: reference and what was written, or one of them."""
    if order.pair is None:
        return ()
    if order.to_come:
        references[order.pair.wanted] = None
        return order.pair.jobs[:1]
    return order.pair.jobs[order.pair.wanted in references :]


def begin(order: Order, renderer: Renderer, references: References) -> list[Future[Render] | Halves]:
    """The renders of `jobs_of`, to come. The last pages are waited for: a single one is then rendered by halves."""
    jobs = jobs_of(order, references)
    if len(jobs) == 1 and not order.to_come and not renderer.begun:
        return [Halves(renderer, jobs[0])]
    return [renderer.begin(job) for job in jobs]


def listen(pipe: Connection, orders: queue.SimpleQueue, renderer: Renderer, references: References) -> None:
    """(a thread of its own) Begins to render what comes, and ends the process, with its browsers, when its parent has
    gone or has closed the pipe, whatever is being compared."""
    try:
        while True:
            order = pipe.recv()
            orders.put((order, begin(order, renderer, references)))
    except (EOFError, OSError):
        renderer.close()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        renderer.close()
        os._exit(1)


def follow(
    order: Order, begun: list[Future[Render] | Halves], renderer: Renderer, references: References, writers: Executor
) -> PageScore | None:
    """The score of a pair, whose pictures are kept; None for a proof that holds, which raises `ScorerError` else, and
    for a reference."""
    pair = order.pair
    if pair is None:
        prove(renderer)
        return None
    renders = (decoded(render.result()) for render in begun)
    if order.to_come:
        references[pair.wanted] = page_of(next(renders), pair.reference)
        return None
    reference = references.pop(pair.wanted, None)
    if reference is None and len(begun) == 1:  # it has failed, or an equal pair came first
        renders = chain([renderer.render(pair.jobs[0])], renders)
    pages = pages_of(pair, renders, reference)
    one, two = (page.image for page in pages)
    kept = [
        writers.submit(keep_pictures, order.pictures, order.key, images)
        for images in ([[one, None], [None, two]] if order.pictures else [])
    ]
    score = compare(*pages)
    for picture in kept:
        picture.result()
    return score


def be_a_scorer(number: int, seconds_per_page: float, chromium: str | None) -> None:
    """What this file does as a program: `number` is the descriptor of its end of a pipe."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(each, lambda *_: None)  # not SIG_IGN, which the browsers would inherit; it ends with its parent
    os.nice(NICER)
    pipe, orders, references, writers = Connection(number), queue.SimpleQueue(), {}, ThreadPoolExecutor(2)
    renderer = Renderer(BROWSERS, seconds_per_page, chromium)
    for _ in range(BROWSERS):  # which start while the first page is still written
        renderer.begin(Job(""))
    threading.Thread(target=listen, args=(pipe, orders, renderer, references), daemon=True).start()
    with contextlib.suppress(BrokenPipeError):  # the parent has gone, which the thread sees, too
        pipe.send(None)
    for slow in ("scipy.optimize", "skimage.color", "skimage.metrics"):  # half a second, of some page's else
        importlib.import_module(slow)
    while True:
        order, begun = orders.get()
        try:
            answer = follow(order, begun, renderer, references, writers)
        except Exception as error:  # raised in the parent
            answer = error
            error.add_note("in a process that scores:\n" + traceback.format_exc())
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:
                answer = RuntimeError(f"a process that scores has failed: {error!r}\n{traceback.format_exc()}")
        with contextlib.suppress(BrokenPipeError):
            pipe.send((order.key, answer, renderer.version))


# -----------------------------------------------------------------------------
# In the parent


def scorers_for(pages: int) -> int:
    """Processes for so many pages: two cores and two browsers' memory each; 0 where they are not worth their start."""
    return max(1, min(MOST_SCORERS, most_at_once() // BROWSERS, pages // 2)) if pages >= WORTH_PAGES else 0


@dataclass(eq=False)
class Scorer:
    """One process, and what it was given: orders, with how often a process has died of each."""

    process: subprocess.Popen
    pipe: Connection
    mark: str  # NAME=value in the environment of everything that it starts
    tasks: dict[str, tuple[Order, int]] = field(default_factory=dict)  # by the key
    started: bool = False  # it has told that it can work
    references: set[tuple[str, int, int]] = field(default_factory=set)  # that it was told to keep

    @property
    def load(self) -> tuple[bool, int]:
        """The least of all is given the next order. What a process may die of is with nothing else there."""
        return any(deaths for _, deaths in self.tasks.values()), len(self.tasks)


class Scorers:
    """`count` processes; a context manager, which leaves none behind. Not for several threads.

    Who dies is replaced, and its pages are tried once more, each alone; a page of which a process dies again has failed
    and is named. Where processes cannot even start, that is told, and `scored` leaves their pages out.
    """

    def __init__(self, count: int, seconds_per_page: float = 15.0, chromium: str | None = None):
        """Raises `BrowserMissing`."""
        self.options = (str(seconds_per_page), find_chromium(chromium) or "")
        self.given: set[str] = set()
        self.waiting: deque[tuple[Order, int]] = deque()
        self.to_come: dict[tuple[str, int, int], Order] = {}  # references that nobody has begun
        self.done: deque[tuple[str, PageScore | Exception | None]] = deque()
        self.proof: Exception | bool = False  # whether it holds; what it has raised
        self.version, self.failed_starts = "", 0
        self.scorers: list[Scorer] = []
        with contextlib.ExitStack() as unless_all_start:
            unless_all_start.callback(self.close)
            for _ in range(count):
                self.start()
            unless_all_start.pop_all()

    def __enter__(self) -> Scorers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """One more process."""
        ours, theirs = Pipe()
        mark = uuid.uuid4().hex
        # Each has its own core; ours is found wherever this process has found it, a test's own modules, too.
        paths = [str(Path(__file__).resolve().parents[1]), *filter(None, sys.path)]
        apart = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), MARK: mark}
        command = [sys.executable, "-m", "scoring.scorers", str(theirs.fileno()), *self.options]
        try:
            # A session of its own: what a terminal or a launcher sends to the group is the parent's to follow.
            process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env=os.environ | apart,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            theirs.close()
        self.scorers.append(Scorer(process, ours, f"{MARK}={mark}"))

    def prove(self) -> None:
        """One process proves the scorer first, by scoring/proof.py; `proved` tells."""
        self.order(Order(PROOF))

    def give(self, pair: Pair, pictures: Path | None = None) -> None:
        """A pair to score, and the folder for its pictures, if they are wanted; an equal one is scored once."""
        self.order(Order(pair.key, pair, pictures))

    def expect(self, pair: Pair) -> None:
        """A pair that will be given once its prediction is known: until then a process that has nothing else to do
        renders its reference, and keeps that. Of more than `MOST_KEPT` for each process the first ones."""
        known = {*self.to_come}.union(*(scorer.references for scorer in self.scorers))
        if pair.wanted not in known and len(known) < MOST_KEPT * len(self.scorers):
            self.to_come[pair.wanted] = Order(f"reference of {pair.key}", pair, to_come=True)
            self.look(0)

    def order(self, order: Order) -> None:
        if order.key not in self.given:
            self.given.add(order.key)
            self.to_come.pop(order.pair and order.pair.wanted, None)
            self.waiting.append((order, 0))
            self.look(0)

    def proved(self) -> bool:
        """Waits for the proof; False where no process could try. Raises what it has raised, `ScorerError` as a rule."""
        while self.proof is False and self.scorers and PROOF in self.given:
            self.look()
        if isinstance(self.proof, Exception):
            raise self.proof
        return self.proof

    def scored(self) -> Iterator[tuple[str, PageScore]]:
        """(key, score) of all that was given and not yet told, as they come. Raises what a process has raised."""
        self.to_come.clear()
        while True:
            yield from self.told()
            orders = [order for scorer in self.scorers for order, _ in scorer.tasks.values() if not order.to_come]
            if not self.scorers or not (self.waiting or orders):
                return
            self.look()

    def told(self) -> Iterator[tuple[str, PageScore]]:
        """Of `scored` what is there already, for which nobody waits."""
        while self.done:
            key, answer = self.done.popleft()
            if isinstance(answer, Exception):
                raise answer
            yield key, answer

    def look(self, seconds: float | None = None) -> None:
        """Takes what has been answered, waiting so long for it (None: for ever), and hands out what waits."""
        self.hand_out()
        by_pipe = {scorer.pipe: scorer for scorer in self.scorers}
        for pipe in wait(list(by_pipe), seconds):
            try:
                self.take(by_pipe[pipe], pipe.recv())
            except (EOFError, OSError):
                self.bury(by_pipe[pipe])
        self.hand_out()

    def hand_out(self) -> None:
        while self.waiting and self.scorers:
            order, deaths = self.waiting[0]
            scorer = self.scorer_for(order)
            wary, count = scorer.load
            if count >= (1 if deaths or wary else TASKS_EACH):
                return
            self.hand(scorer, *self.waiting.popleft())
        while self.to_come and self.scorers:
            scorer = min(self.scorers, key=lambda scorer: scorer.load)
            if scorer.load >= (False, TASKS_EACH):
                return
            self.hand(scorer, self.to_come.pop(next(iter(self.to_come))), 0)

    def scorer_for(self, order: Order) -> Scorer:
        """Who has the reference of a pair, unless there is much else to do; else who has the least to do."""
        for scorer in self.scorers:
            if order.pair and order.pair.wanted in scorer.references and scorer.load < (False, TASKS_EACH):
                return scorer
        return min(self.scorers, key=lambda scorer: scorer.load)

    def hand(self, scorer: Scorer, order: Order, deaths: int) -> None:
        """To this process, which has died of it `deaths` times."""
        scorer.tasks[order.key] = order, deaths
        if order.to_come:
            scorer.references.add(order.pair.wanted)
        elif order.pair:
            scorer.references.discard(order.pair.wanted)
        with contextlib.suppress(OSError):  # it has died: found in `look`, with its tasks
            scorer.pipe.send(order)

    def take(self, scorer: Scorer, answer: tuple[str, PageScore | Exception | None, str] | None) -> None:
        """An answer; None: it has started."""
        scorer.started, self.failed_starts = True, 0
        if answer is None:
            return
        key, found, version = answer
        order, _ = scorer.tasks.pop(key)
        self.version = version or self.version
        if key == PROOF:
            self.proof = True if found is None else found
        elif not order.to_come:  # what a reference has raised is raised again when its pair comes
            self.done.append((key, found))

    def bury(self, scorer: Scorer) -> None:
        """A process has died. What it was given is tried once more."""
        self.scorers.remove(scorer)
        scorer.pipe.close()
        code = self.end(scorer, time.monotonic() + 5)
        for order, deaths in scorer.tasks.values():
            if order.to_come:
                continue
            if not deaths or not scorer.started:  # else it is not the page's fault
                self.waiting.appendleft((order, deaths + scorer.started))
            elif order.pair is None:
                self.proof = ScorerError(f"the proof of the scorer: {DIED_TWICE}")
            else:
                failed = Page(None, failure=DIED_TWICE, html=order.pair.prediction or "")
                self.done.append((order.key, compare(Page(None, html=order.pair.reference), failed)))
        self.failed_starts += not scorer.started
        if self.failed_starts < MOST_FAILED_STARTS:
            self.start()
        elif not self.scorers:
            with beside_bars():
                told = f"processes that score pages cannot start (the last one ended with {code}): one does it alone"
                print(told, file=sys.stderr, flush=True)

    def end(self, scorer: Scorer, until: float) -> int:
        """Ends a process, by force after this moment, with all that it has started. Its exit code."""
        try:
            code = scorer.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            end_family(scorer.process.pid, scorer.mark)
            return scorer.process.wait()
        if code:
            end_family(None, scorer.mark)
        return code

    def close(self) -> None:
        """Ends every process, also those that are at work."""
        for scorer in self.scorers:
            scorer.pipe.close()
        until = time.monotonic() + 10
        for scorer in self.scorers:
            self.end(scorer, until)
        self.scorers.clear()


if __name__ == "__main__":
    be_a_scorer(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3] or None)
