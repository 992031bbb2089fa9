"""The loss of supervised tokens, whose logits never exist all at once.

    supervised_loss(hidden, weight, targets)        # (L, H), (V, H), (L,): the sum of L cross-entropies

Only the states that predict a supervised token come here (packing.pack's `supervised_places`).
"""

from __future__ import annotations

from collections.abc import Callable

from training.memory_plan import LOSS_ROWS


def cross_entropy(logits, targets):
    """Sum of the losses of `logits` (L, V) against `targets` (L,), and its gradient in the logits' own precision."""
    import torch

    wide = logits.float()
    high = wide.amax(dim=-1, keepdim=True)
    exponents = (wide - high).exp()
    total = exponents.sum(dim=-1, keepdim=True)
    loss = (total.log() + high - wide.gather(1, targets[:, None])).sum()
    hits = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    return loss, (exponents / total - hits.float()).to(logits.dtype)


def supervised_loss(hidden, weight, targets, cross_entropy: Callable = cross_entropy):
    """Sum of the cross-entropies of `hidden` (L, H) times `weight` (V, H) against `targets` (L,).

    Logits exist for `LOSS_ROWS` rows at a time and are worked out once: the gradients are taken in the forward pass.
    """
    import torch

    class SupervisedLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight):
            kind = hidden.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
            for_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            for_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
            loss = hidden.new_zeros((), dtype=torch.float32)
            with torch.autocast(kind, enabled=False):
                head = weight.to(dtype)
                for start in range(0, len(hidden), LOSS_ROWS):
                    rows = hidden[start : start + LOSS_ROWS].to(dtype)
                    part, gradient = cross_entropy(rows @ head.T, targets[start : start + LOSS_ROWS])
                    loss += part
                    if for_hidden is not None:
                        for_hidden[start : start + LOSS_ROWS] = gradient @ head
                    if for_weight is not None:
                        for_weight += gradient.T @ rows
            ctx.gradients = for_hidden, for_weight
            return loss

        @staticmethod
        def backward(ctx, factor):
            gradients = [None if part is None else part.mul_(factor.to(part.dtype)) for part in ctx.gradients]
            del ctx.gradients
            return tuple(gradients)

    return SupervisedLoss.apply(hidden, weight)
