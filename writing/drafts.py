"""Drafts from what stands there already: HTML repeats itself, so what followed the same tokens before may follow again.

    guessed = drafts(history, places, starts, count)            # (S, count), for one step of writing

Prompt lookup (Saxena 2023) within the answer, on the GPU, so that nobody waits for it. A wrong draft costs nothing but
its row of a step that reads all weights anyway, and a right one is a token for nothing: the tokens are the same.
"""

from __future__ import annotations

import torch

LONGEST = 8  # tokens of an earlier place that are held against the last ones


def drafts(history: torch.Tensor, places: torch.Tensor, starts: torch.Tensor, count: int) -> torch.Tensor:
    """`count` tokens (S, count) that may come after the one at `places` (S,) of `history` (S, C), where answers begin
    at `starts` (S,): those that came after the longest match of the last tokens, the latest one among equals."""
    slots, capacity = history.shape
    device = history.device
    place = torch.arange(capacity, device=device)
    # matched[i]: how many tokens up to i equal those up to `places`, as far as the answer goes back.
    running = (place < places[:, None]) & (place >= starts[:, None])
    matched = torch.zeros(slots, capacity, dtype=torch.long, device=device)
    for back in range(LONGEST):
        last = history.gather(1, (places - back).clamp(min=0)[:, None])
        shifted = history if back == 0 else torch.roll(history, back, dims=1)
        reaches = (place - back >= starts[:, None]) & (places - back >= starts)[:, None]
        running = running & reaches & (shifted == last)
        matched += running
    best = (matched * capacity + place).argmax(-1)  # (S,)
    # Beyond the last token the guess goes on with itself: what repeats has its own length as period.
    period = (places - best).clamp(min=1)
    step = torch.arange(count, device=device) % period[:, None]
    return history.gather(1, (best[:, None] + 1 + step).clamp(max=capacity - 1))
