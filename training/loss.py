"""The loss by the model's own way, beside which the fast path's (families/chunked_loss.py) is held.

plain_loss(model, pages)        # the mean over the supervised tokens of some pages
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from families.page_costs import LOSS_ROWS
from training.prompt_and_mask import IGNORED


@torch.no_grad()
def plain_loss(model: torch.nn.Module, pages: Iterable[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Mean cross-entropy of all supervised tokens of `pages`, a collated batch of one page each, by the model's own
    forward pass: a scalar in fp32.

    Its own loss would hold the logits of all tokens at once in fp32, 3 GB a page of 3B's vocabulary: more than training
    needs, so that a run which fits a small GPU would end here.
    """
    total, count = torch.zeros((), device=model.device), 0
    for page in pages:
        labels = page["labels"][0, 1:].to(model.device)
        places = (labels != IGNORED).nonzero()[:, 0]
        inputs = {name: value.to(model.device) for name, value in page.items() if name != "labels"}
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        logits = model(**inputs, logits_to_keep=places).logits[0]
        for start in range(0, len(places), LOSS_ROWS):
            rows = slice(start, start + LOSS_ROWS)
            total += torch.nn.functional.cross_entropy(logits[rows].float(), labels[places[rows]], reduction="sum")
        count += len(places)
    return total / count
