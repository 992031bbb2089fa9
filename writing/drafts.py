"""Drafts from what stands there already: HTML repeats itself, so what followed the same tokens before may follow again.

    guessed = drafts(history, places, starts, count)            # (S, count), for one step of writing

Prompt lookup (Saxena 2023) within the answer, on the GPU, so that nobody waits for it. A wrong draft costs nothing but
its row of a step that reads all weights anyway, and a right one is a token for nothing: the tokens are the same.

Worth it, by benchmarks/drafts_write.py on 43 real pages of at most 4,096 tokens (all tokens by all steps): 1.38 tokens
a step with one draft, 1.66 with 3, 1.79 with 7 and 1.85 with 15. The latest match is better than the first one (1.68
with 7 drafts), a short one better than none (1.61 where two tokens have to match), and the question adds nothing.
"""

from __future__ import annotations

import torch

LONGEST = 8  # tokens that are compared; with 7 drafts 1 gives 1.71 tokens a step, 2 1.77, 4, 8 and 16 give 1.79


def drafts(history: torch.Tensor, places: torch.Tensor, starts: torch.Tensor, count: int) -> torch.Tensor:
    """`count` tokens (S, count) that may come after the one at `places` (S,) of `history` (S, C), where answers begin
    at `starts` (S,), `LONGEST` or more: those that came after the longest match of the last tokens, the latest one
    among equals, or any where there is none."""
    # Each operation costs a captured step some 2 microseconds, whatever it works on: all tokens of all windows are
    # compared at once. Window w (W = C - LONGEST of them) ends at place w + LONGEST - 1; something stands behind each.
    place = torch.arange(history.shape[1], device=history.device)
    windows, behind = history[:, :-1].unfold(1, LONGEST, 1), history[:, LONGEST:]
    first = places[:, None] - (LONGEST - 1)  # (S, 1), the window of the last tokens
    last = history.gather(1, (first + place[:LONGEST]).clamp_(min=0))  # (S, LONGEST)
    # From where on a window is equal: behind its last token that differs, or where the answer begins, which is before
    # all of it where all of it is equal: then later ones seem to be longer.
    equal_from = torch.where(windows != last[:, None], place[1:].unfold(0, LONGEST, 1), starts[:, None, None]).amax(-1)
    matched = (place[LONGEST:] - equal_from).masked_fill_(place[:-LONGEST] >= first, -1)  # (S, W)
    best = torch.add(place[:-LONGEST], matched, alpha=len(place)).argmax(-1, keepdim=True)  # (S, 1)
    # Beyond the last token the guess goes on with itself: what repeats has its own length as period.
    period = (first - best).clamp_(min=1)
    return behind.gather(1, best + place[:count] % period)
