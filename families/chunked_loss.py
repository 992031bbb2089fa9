"""The loss of supervised tokens, whose logits never exist all at once.

    supervised_loss(hidden, weight, targets)        # (L, H), (V, H), (L,): the sum of L cross-entropies

Only the states that predict a supervised token come here (training.packing.pack's `supervised_places`).

Shapes: L supervised tokens of all pages of a pack, H the width of a state, V the words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from families.page_costs import LOSS_ROWS

Entropy = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # as `cross_entropy` below


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the losses of `logits` (L, V) against `targets` (L,), in nats and fp32, and its gradient (L, V) in the
    logits' own precision."""
    wide = logits.float()
    # (L, 1), taken off so that no exponential overflows.
    high = wide.amax(dim=-1, keepdim=True)
    exponents = (wide - high).exp()
    total = exponents.sum(dim=-1, keepdim=True)
    loss = (total.log() + high - wide.gather(1, targets[:, None])).sum()
    # Compared, not scattered: fused into one pass, a one-hot of L x V is never written.
    hits = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    return loss, (exponents / total - hits.float()).to(logits.dtype)


def supervised_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, entropy: Entropy = cross_entropy
) -> torch.Tensor:
    """Sum of the cross-entropies of `hidden` (L, H) times `weight` (V, H) against `targets` (L,): a scalar in fp32.

    `entropy` is `cross_entropy` or a fused twin of it. Logits exist for `LOSS_ROWS` rows at a time and are computed
    once: the gradients are taken in the forward pass (as in Liger Kernel, Hsu et al. 2024), and wait there to be
    multiplied by the gradient of the loss.
    """
    return SupervisedLoss.apply(hidden, weight, targets, entropy)


class SupervisedLoss(torch.autograd.Function):
    """`supervised_loss` for autograd. Whoever calls it without gradients pays for none: what needs no gradient gets
    none, so a frozen head costs no product of its own."""

    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, entropy: Entropy
    ) -> torch.Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        # Each row of the states gets its gradient once; the head's is a sum over all chunks, so it begins with zeros.
        for_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        # Converted once, here; autocast would convert the head for every chunk again.
        with torch.autocast(kind, enabled=False):
            head = weight.to(dtype)
            for start in range(0, len(hidden), LOSS_ROWS):
                rows = hidden[start : start + LOSS_ROWS].to(dtype)
                part, gradient = entropy(rows @ head.T, targets[start : start + LOSS_ROWS])
                loss += part
                if for_hidden is not None:
                    for_hidden[start : start + LOSS_ROWS] = gradient @ head
                if for_weight is not None:
                    # In the weight's own precision: under bf16 each chunk is rounded as it is added. Inside the product
                    # where both have one: apart it would stand in memory beside the sum, 0.6 GB of 3B, at the peak.
                    if for_weight.dtype == gradient.dtype:
                        for_weight.addmm_(gradient.T, rows)
                    else:
                        for_weight += gradient.T @ rows
                del gradient  # as large as logits, and else there until the next chunk has made its own
        # Not by save_for_backward: they are neither inputs nor outputs, and are let go of as soon as they are used.
        ctx.gradients = for_hidden, for_weight
        return loss

    @staticmethod
    def backward(ctx, factor: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        gradients = [None if part is None else part.mul_(factor.to(part.dtype)) for part in ctx.gradients]
        # They were multiplied in place, so a second backward pass would be wrong: it fails instead.
        del ctx.gradients
        return *gradients, None, None
