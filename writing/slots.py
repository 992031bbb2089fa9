"""Slots of a static cache: each holds one answer that is being written, and is filled again as soon as that ends.

    cache = Cache(layers, slots=8, capacity=5_504, dtype=torch.bfloat16, device="cuda")
    state = State(slots=8, capacity=5_504, device="cuda", chances=0)

Everything has a fixed place in memory, as a captured step needs it. Shapes: S slots, C places of one, V the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from families.slot_layers import Layer


def bytes_of_slot(layers: Sequence[Layer], vocabulary: int, capacity: int, dtype: torch.dtype, chances: int) -> int:
    """Of what the layers keep of `capacity` tokens, of what a step knows of a slot and what it works out for its row:
    logits in both precisions."""
    kept = [part for layer in layers for part in layer.mixer.keeps(capacity, dtype)]
    cache = sum(math.prod(shape) * precision.itemsize for shape, precision in kept)
    return cache + 8 * capacity + 4 * chances + 3 * vocabulary * 4


class Cache:
    """What the layers keep of S slots: of each layer in `states` the parts that its mixer names, (S, ...) each."""

    def __init__(
        self, layers: Sequence[Layer], slots: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ):
        self.states = [
            tuple(
                torch.zeros(slots, *shape, dtype=kind, device=device)
                for shape, kind in layer.mixer.keeps(capacity, dtype)
            )
            for layer in layers
        ]

    def layer(self, number: int, slots: int) -> tuple[torch.Tensor, ...]:
        """The parts of a layer, of the first `slots` alone."""
        return tuple(part[:slots] for part in self.states[number])

    def move(self, source: int, target: int) -> None:
        """All that is kept of a slot to another one."""
        for parts in self.states:
            for part in parts:
                part[target] = part[source]


class State:
    """What a step reads and writes of each slot besides the cache, all (S, ...) on the device.

    `history` (S, C) holds question and answer, `places` the place of its last token, whose state is not in the cache
    yet, `shifts` what mRoPE adds to a place, `starts` where the answer begins, `live` 1 for a slot that writes and 0
    for one that stands still, `chances` (S, most tokens) the numbers of those that are drawn.
    """

    def __init__(self, slots: int, capacity: int, device: torch.device | str, chances: int):
        self.history = torch.zeros(slots, capacity, dtype=torch.long, device=device)
        # Each from a multiple of 16 bytes on: others are taken by kernels that nothing has proved.
        self.places, self.shifts, self.starts, self.live = (
            torch.zeros(slots, dtype=torch.long, device=device) for _ in range(4)
        )
        self.chances = torch.zeros(slots, chances, device=device)

    def parts(self) -> list[torch.Tensor]:
        return [self.history, self.places, self.shifts, self.starts, self.live, self.chances]

    def fill(self, slot: int, ids: list[int], start: int, shift: int, chances: torch.Tensor | None) -> None:
        """A question, and what is written of its answer, `ids`; the answer begins at `start`."""
        # The rest holds a token that stands in the row already: stock processors look at all of it.
        row = torch.full((self.history.shape[1],), ids[0])
        row[: len(ids)] = torch.tensor(ids)
        self.history[slot] = row.to(self.history.device, non_blocking=True)
        numbers = torch.tensor([len(ids) - 1, shift, start, 1]).to(self.history.device, non_blocking=True)
        self.places[slot], self.shifts[slot], self.starts[slot], self.live[slot] = numbers.unbind()
        if chances is not None:
            self.chances[slot] = chances.to(self.chances.device, non_blocking=True)

    def stop(self, slot: int | slice) -> None:
        """A slot that stands still looks at one place and writes over it; at its first position, since what mRoPE takes
        off a place would lead before that."""
        for part in (self.live, self.places, self.shifts):
            part[slot] = 0
