"""The language model's products in fp8: put there, proved on the run's own pages, cast anew after each step.

    begin(trainer, loss_of_pages, keep=True)        # (all ranks) before the first step, once DeepSpeed has the model

Off by default: what is learned differs by the rounding of fp8, which benchmarks/same_curve.py shows beside what another
order of pages does. Nothing falls back in silence: what does not agree with bf16 is refused before step one.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from scoring.report_values import plural
from training.errors import SettingsError
from training.processes import gather, say

if TYPE_CHECKING:
    from transformers import Trainer

    from families.fp8_parts import Fp8

# Rounding to e4m3 puts one product off by 3.7 % of its norm (kernels/fp8.py), and the gradient of a weight by some 6 to
# 14 % after four layers of it; after 24 narrow ones that have learned, by 10 % in all and by 37 % in the worst weight,
# of which most points elsewhere: along the gradient in bf16 no weight's was off by more than 22 %. A scale is a power
# of two: the least that can be wrong with one is half the gradient.
WEIGHT_LIMIT = 0.4  # along any one weight's gradient, of its length
WHOLE_LIMIT = 0.25  # of the norm of all of them
LOSS_LIMIT = 0.02  # of the loss, as between the fast path and the plain one
SAMPLE = 2**18  # numbers of a gradient that are compared: its norm is then known to some 0.2 %


@dataclass(frozen=True)
class Agreement:
    """How far fp8 is from bf16 on one rank's pages: the losses, and of the norm the gradients of all weights together,
    of the median product's weight and of the worst one's, by its name; and how far along its gradient the one is that
    is furthest, `along`, by its name."""

    loss: float
    loss_bf16: float
    whole: float
    median: float
    worst: float
    where: str
    along: float
    where_along: str

    @property
    def holds(self) -> bool:
        """Whether training may begin; what is no number is below no limit."""
        close = abs(self.loss - self.loss_bf16) <= LOSS_LIMIT * abs(self.loss_bf16)
        return close and self.whole <= WHOLE_LIMIT and self.along <= WEIGHT_LIMIT

    @property
    def words(self) -> str:
        """In one line."""
        return (
            f"loss {self.loss:.4f}, {self.loss_bf16:.4f} in bf16; gradients off by {self.whole:.1%} of their norm, "
            f"{self.median:.1%} in the median weight, {self.worst:.1%} in {self.where}; along them by up to "
            f"{self.along:.1%}, in {self.where_along}"
        )


class WeightsChange(TrainerCallback):
    """Has weights cast anew after each step, and before the first: a checkpoint may have brought others."""

    def __init__(self, way: Fp8):
        self.way = way

    def on_step_begin(self, *unused: object, **also_unused: object) -> None:
        """(any rank) What was kept since the proof may be of other weights."""
        self.way.forget()

    def on_optimizer_step(self, *unused: object, **also_unused: object) -> None:
        """(any rank) At once, so that an evaluation that follows has their memory."""
        self.way.forget()


def begin(trainer: Trainer, loss_of: Callable[[], torch.Tensor], keep: bool) -> None:
    """(all ranks) Let the layers of the language model multiply in fp8, if that agrees with bf16 on the pages whose
    loss `loss_of` gives, the same pages each time; `keep` the cast weights until a step has changed them.

    Raises `SettingsError` where the kernels do not run here, or are too far off on any rank.
    """
    from families.fp8_parts import Fp8, put_into_fp8

    start, layers, way = time.monotonic(), trainer.model.get_submodule("model.language_model"), Fp8(keep=keep)
    trainer.model.train()
    wanted = gradients(trainer, loss_of())
    put_into_fp8(layers, way)
    failure = ""
    try:
        found = gradients(trainer, loss_of())
    except torch.OutOfMemoryError:
        raise
    # Kernels that are compiled here, or a torch without such products, may raise anything; on every rank, then.
    except Exception as error:
        failure = f"it fails here: {str(error)[:200]}"
    products = {name: part for name, part in layers.named_modules() if isinstance(part, torch.nn.Linear)}
    ours = {f"model.language_model.{name}.weight" for name, part in products.items() if part in way.used}
    told = gather(failure or (compare(wanted, found, ours) if ours else "none of this model's layers can"))
    if failures := [each for each in told if isinstance(each, str)]:
        raise SettingsError(f"--fp8: {failures[0]}; leave it out to train in bf16")
    worst = next((each for each in told if not each.holds), max(told, key=lambda each: each.whole))
    if not worst.holds:
        raise SettingsError(
            f"--fp8 does not agree with bf16 on held-out pages: {worst.words}. Of the loss {LOSS_LIMIT:.0%}, of all "
            f"gradients {WHOLE_LIMIT:.0%} and along one {WEIGHT_LIMIT:.0%} are rounding. Leave it out to train in bf16"
        )
    kept = "weights cast once per step" if keep else "weights cast for each layer"
    left = len(products) - len(ours)
    stay = f", {left} more as they were" if left else ""
    say(f"fp8: {plural(len(ours), 'product')} of the language model{stay}, {kept}; {time.monotonic() - start:.1f} s")
    say(f"fp8: {worst.words}")
    trainer.add_callback(WeightsChange(way))


def gradients(trainer: Trainer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """(all ranks) What `loss` gives each parameter that learns, by name, up to SAMPLE of its numbers, in fp32, and the
    loss itself as ""; the parameters are given zeros, which change nothing when DeepSpeed adds them to the first
    step's."""
    found = {"": loss.detach().float()}

    def note(name: str, gradient: torch.Tensor) -> torch.Tensor:
        flat = gradient.detach().flatten()
        part = flat[:: math.ceil(len(flat) / SAMPLE)].float()
        # Each stands for as many as are left out.
        found[name] = part * math.sqrt(len(flat) / len(part))
        return torch.zeros_like(gradient)

    learning = [(name, part) for name, part in trainer.model.named_parameters() if part.requires_grad]
    hooks = [part.register_hook(lambda gradient, name=name: note(name, gradient)) for name, part in learning]
    try:
        trainer.accelerator.gradient_state._set_sync_gradients(False)
        trainer.accelerator.backward(loss)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def compare(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor], ours: set[str]) -> Agreement:
    """`found` in fp8 beside `wanted` in bf16; `ours` are the weights whose products are in fp8."""
    off, size, along = {}, {}, {}
    for name in wanted.keys() - {""}:
        difference = found[name] - wanted[name]
        off[name], size[name] = difference.norm().item(), wanted[name].norm().item()
        along[name] = abs(torch.dot(difference, wanted[name]).item())

    def furthest(shares: dict[str, float]) -> tuple[float, str]:
        name = max(shares, key=lambda name: shares[name] if shares[name] == shares[name] else math.inf)
        return shares[name], name.removeprefix("model.language_model.").removesuffix(".weight")

    each = {name: off[name] / size[name] if size[name] else float(off[name] > 0) for name in ours & off.keys()}
    lengths = {name: along[name] / size[name] ** 2 if size[name] else each[name] for name in each}
    whole = math.hypot(*off.values()) / math.hypot(*size.values())
    loss, loss_bf16, median = found[""].item(), wanted[""].item(), statistics.median(each.values())
    return Agreement(loss, loss_bf16, whole, median, *furthest(each), *furthest(lengths))
