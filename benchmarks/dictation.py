"""An engine whose model writes given pages, whatever its weights prefer: all of the work of writing, real text.

    engine = dictating(Engine, lambda request: ids_of_its_page)(model, processor, recipe)

Random weights never end an answer, loop, and make drafts come true as no page does. Here the logits of each step are
worked out as ever, and then the page's own next token gets the highest one: what is written, when it ends, how often a
draft is right and what watches for endings are those of real pages, and the speed is that of writing them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import use_model_from_hub as use
from writing import engine as room
from writing.step import Step


class Dictated(Step):
    """A step after which the dictated token is the likeliest: `state.dictation` (S, places) holds them by place, but
    for an engine to which nothing is dictated."""

    def forward(self, history: torch.Tensor, places: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        logits = super().forward(history, places, *more)
        if not hasattr(self.state, "dictation"):
            return logits
        after = (places[:, None] + 1 + self.following).clamp(max=self.state.dictation.shape[1] - 1)
        wanted = self.state.dictation[: self.slots].gather(1, after).flatten()
        return logits.scatter_(1, wanted[:, None], float("inf"))


class Dictating:
    """Before an engine's class: `ids_of(request)` are the tokens of an answer, which its end token follows."""

    ids_of: Callable[[use.Request], Sequence[int]]

    def allocate(self, count: int) -> None:
        super().allocate(count)
        shape = self.count, self.capacity + room.MOST_NEW
        self.state.dictation = torch.zeros(shape, dtype=torch.long, device=self.model.device)

    def begin(self, number: int, question, *more) -> None:
        super().begin(number, question, *more)
        ids = [*self.ids_of(question.request), min(self.stops)][: self.recipe.max_html_tokens]
        first = len(question.ids)
        row = torch.tensor(ids, device=self.model.device)
        self.state.dictation[number, first : first + len(ids)] = row

    def move(self, source: int, target: int) -> None:
        super().move(source, target)
        self.state.dictation[target] = self.state.dictation[source]


def dictating(engine: type, ids_of: Callable[[use.Request], Sequence[int]]) -> type:
    """`engine`, a class of writing/engine.py's kind, that writes what `ids_of` gives for each request."""
    room.Step = Dictated
    return type("DictatingEngine", (Dictating, engine), {"ids_of": staticmethod(ids_of)})
