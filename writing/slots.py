"""Slots of a static cache: each holds one answer that is being written, and is filled again as soon as that ends.

    cache = Cache(model.config, slots=8, capacity=5_504, dtype=torch.bfloat16, device="cuda")
    state = State(slots=8, capacity=5_504, device="cuda", chances=0)

Everything has a fixed place in memory, as a captured step needs it. Shapes: S slots, C places of one, V the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def bytes_of_slot(config: PretrainedConfig, capacity: int, dtype: torch.dtype) -> int:
    """Of keys and values of `capacity` tokens, and of what a step works out for one row: logits in both precisions."""
    text = config.get_text_config()
    width = text.hidden_size // text.num_attention_heads
    kept = 2 * text.num_hidden_layers * text.num_key_value_heads * width * capacity * dtype.itemsize
    return kept + 3 * text.vocab_size * 4


class Cache:
    """Keys and values (layers, 2, S, heads of keys, C, D)."""

    def __init__(
        self, config: PretrainedConfig, slots: int, capacity: int, dtype: torch.dtype, device: torch.device | str
    ):
        text = config.get_text_config()
        width = text.hidden_size // text.num_attention_heads
        shape = (text.num_hidden_layers, 2, slots, text.num_key_value_heads, capacity, width)
        self.states = torch.zeros(shape, dtype=dtype, device=device)

    def layer(self, number: int, slots: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, (S, heads of keys, C, D) each; of the first `slots` alone."""
        keys, values = self.states[number, :, :slots]
        return keys, values


class State:
    """What a step reads and writes of each slot besides the cache, all (S, ...) on the device.

    `history` (S, C) holds question and answer, `places` the place of its last token, whose state is not in the cache
    yet, `shifts` what mRoPE adds to a place, `starts` where the answer begins, `live` 1 for a slot that writes and 0
    for one that stands still, `chances` (S, most tokens) the numbers of those that are drawn.
    """

    def __init__(self, slots: int, capacity: int, device: torch.device | str, chances: int):
        self.history = torch.zeros(slots, capacity, dtype=torch.long, device=device)
        self.places, self.shifts, self.starts, self.live = torch.zeros(4, slots, dtype=torch.long, device=device)
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

    def stop(self, slot: int) -> None:
        """A slot that stands still looks at one place and writes over it."""
        self.live[slot] = 0
        self.places[slot] = 0
