"""Several answers to each screenshot, of which the one is kept whose render is most like it (writing/best_of.py).

writer = BestOf(writer, 4)                      # itself a writer: one answer for each request
for request, chosen in writer.write(requests): chosen.html, chosen.sample, chosen.scores
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from scoring.renders import Renderer
from use_model_from_hub import Request, Written


@dataclass
class Chosen(Written):
    """The best of several answers, which of them it is, and the scores of all, None where no answer came."""

    sample: int = 0
    scores: tuple[float | None, ...] = ()


class BestOf:
    """Writes `count` answers by another writer, and keeps one; a renderer is open while it writes."""

    def __init__(self, writer: Any, count: int):
        self.writer, self.count = writer, count

    def write(
        self, requests: Iterable[Request], shown: Callable[[Request, str], None] | None = None
    ) -> Iterator[tuple[Request, Any]]:
        """Each request with its `Chosen`, as soon as all its answers are there; where a server has given none, with
        what it gave for the last one. Nothing is `shown`: which answer it will be is not known before."""
        choose = importlib.import_module("writing.best_of").choose
        many = (replace(request, sample=sample) for request in requests for sample in range(self.count))
        waiting: dict[int, dict[int, Any]] = {}
        with Renderer() as renderer:
            for request, answer in self.writer.write(many):
                came = waiting.setdefault(request.place, {})
                came[request.sample] = answer
                if len(came) < self.count:
                    continue
                del waiting[request.place]
                pages = {sample: page for sample, page in sorted(came.items()) if isinstance(page, Written)}
                if not pages:
                    yield request, answer
                    continue
                choice = choose(request.open(), [page.html for page in pages.values()], renderer)
                scores = dict(zip(pages, choice.scores))
                sample = list(pages)[choice.index]
                every = tuple(scores.get(number) for number in range(self.count))
                yield replace(request, sample=0), Chosen(**vars(pages[sample]), sample=sample, scores=every)
