"""Several answers to each screenshot, of which the one is kept whose render is most like it (writing/best_of.py).

writer = BestOf(writer, 4)                      # itself a writer: one answer for each request
for request, chosen in writer.write(requests): chosen.html, chosen.sample, chosen.scores

What is rendered and compared is so beside the writing, which goes on meanwhile: a GPU waits for no browser, unless
browsers fall far behind it.
"""

from __future__ import annotations

import importlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

from scoring.renders import Renderer
from use_model_from_hub import Failed, Request, UseError, Written

CHOOSERS = 2  # pages that are compared at once: while one is looked at in Python, the next one is rendered
MOST_BROWSERS = 8  # some 300 MB each
MOST_BEHIND = 16  # pages that wait to be chosen from at most, or to be told; only the former are lost to who kills it


@dataclass
class Chosen(Written):
    """The best of several answers, which of them it is, and the scores of all, None where no answer came."""

    sample: int = 0
    scores: tuple[float | None, ...] = ()


class BestOf:
    """Writes `count` answers by another writer, and keeps one; browsers are open while it writes.

    `kept` is called with each request and its `Chosen` as soon as that is known, in a thread of its own: the one that
    iterates gets it with the next answers, for which it may have to wait for minutes. What it raises is raised there.
    """

    def __init__(self, writer: Any, count: int, kept: Callable[[Request, Chosen], None] | None = None):
        self.writer, self.count, self.kept, self.ended = writer, count, kept, Event()

    def write(
        self, requests: Iterable[Request], shown: Callable[[Request, str], None] | None = None
    ) -> Iterator[tuple[Request, Any]]:
        """Each request with its `Chosen`, in the order in which their last answers came; where none could be had, with
        the last `Failed`. Nothing is `shown`: which answer it will be is not known before."""
        many = (replace(request, sample=sample) for request in requests for sample in range(self.count))
        waiting: dict[int, dict[int, Any]] = {}
        choices: deque[Future[tuple[Request, Any]]] = deque()
        self.ended.clear()
        browsers = max(2, min(MOST_BROWSERS, (os.cpu_count() or 1) // 2))
        with Renderer(browsers) as renderer, ThreadPoolExecutor(CHOOSERS) as pool:
            try:
                for request, answer in self.writer.write(many):
                    came = waiting.setdefault(request.place, {})
                    came[request.sample] = answer
                    if len(came) == self.count:
                        del waiting[request.place]
                        choices.append(pool.submit(self.chosen, request, came, renderer))
                    while choices and (choices[0].done() or len(choices) > MOST_BEHIND):
                        yield choices.popleft().result()
                while choices:
                    yield choices.popleft().result()
            finally:
                self.ended.set()
                pool.shutdown(wait=False, cancel_futures=True)
                renderer.close()  # first: those who wait for a render end then

    def chosen(self, request: Request, came: dict[int, Any], renderer: Renderer) -> tuple[Request, Any]:
        """(a thread of its own) The request with the best of the answers that `came`, by their samples' numbers."""
        choose = importlib.import_module("writing.best_of").choose
        pages = {sample: page for sample, page in sorted(came.items()) if isinstance(page, Written)}
        if not pages:
            return request, came[request.sample]
        try:
            choice = choose(request.open(), [page.html for page in pages.values()], renderer)
        except UseError as error:  # of a screenshot that is no more
            return request, Failed(error)
        scores = dict(zip(pages, choice.scores))
        sample = list(pages)[choice.index]
        every = tuple(scores.get(number) for number in range(self.count))
        request, best = replace(request, sample=0), Chosen(**vars(pages[sample]), sample=sample, scores=every)
        if self.kept is not None and not self.ended.is_set():  # a renderer that is closed finds every page a failure
            self.kept(request, best)
        return request, best
