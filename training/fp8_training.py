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
from training.errors import PipelineError, SettingsError, is_out_of_memory
from training.processes import gather, say, together

if TYPE_CHECKING:
    from transformers import Trainer

    from families.fp8_parts import Fp8

# A part of a layer by itself is off by its own rounding, of whatever depth and width the model is: by 3.7 % of the
# norm a product, by 7 % an MLP, and along the gradient of a weight by 1 %. The least that can be wrong with a scale,
# which is a power of two, is half of it all.
PART_LIMIT = 0.15
# Through a whole model rounding adds up, with layers and width: in 3B's shapes, 36 layers 2,048 wide, random weights
# put all gradients together off by 41 % of their norm and the worst weight's by 61 %, of which most points elsewhere;
# along the gradient in bf16 none was off by more than 28 %. What parts by themselves do not show, a gradient that is
# not passed on or comes twice, makes one of no length or twice as long.
WEIGHT_LIMIT = 0.6  # along any one weight's gradient, of its length
WHOLE_LIMIT = 0.8  # of the norm of all of them
LOSS_LIMIT = 0.05  # of the loss; there it was off by 0.2 %
SAMPLE = 2**18  # numbers of a gradient that are compared: its norm is then known to some 0.2 %


@dataclass(frozen=True)
class Agreement:
    """How far fp8 is from bf16 on one rank's pages: the `part` of a layer that by itself is off most (Beside), by its
    name; the losses, and of the norm the gradients of all weights together, of the median product's weight and of the
    worst one's, by its name; and how far along its gradient the one is that is furthest, `along`, by its name."""

    part: float
    where_part: str
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
        small = self.part <= PART_LIMIT and self.whole <= WHOLE_LIMIT and self.along <= WEIGHT_LIMIT
        return close and small

    @property
    def words(self) -> str:
        """In one line."""
        return (
            f"parts of layers off by up to {self.part:.1%}, {self.where_part}; all together loss {self.loss:.4f}, "
            f"{self.loss_bf16:.4f} in bf16; gradients off by {self.whole:.1%} of their norm, {self.median:.1%} in the "
            f"median weight, {self.worst:.1%} in {self.where}; along them by up to {self.along:.1%}, in "
            f"{self.where_along}"
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
    from families.fp8_parts import Beside, Fp8, put_into_fp8

    start, layers, way = time.monotonic(), trainer.model.get_submodule("model.language_model"), Fp8(keep=keep)
    names = {part: name for name, part in layers.named_modules() if isinstance(part, torch.nn.Linear)}
    beside, cause = Beside(way, names), None
    trainer.model.train()
    try:
        put_into_fp8(layers, beside)
        wanted = gradients(trainer, loss_of())
        put_into_fp8(layers, way)
        found = gradients(trainer, loss_of())
    except PipelineError:  # says itself what is wrong, and leaving fp8 out is no remedy
        raise
    # Kernels that are compiled here, or a torch without such products, may raise anything; on every rank, then.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        cause = error
    try:
        together(cause is not None)
    except RuntimeError as error:  # others wait for us inside a collective, where nobody can call them back
        raise cause or error from error
    ours = {f"model.language_model.{name}.weight" for part, name in names.items() if part in way.used}
    if cause is not None:
        compared = f"it fails here: {str(cause)[:200]}"
    else:
        compared = compare(wanted, found, ours, beside.errors) if ours else "none of this model's layers can"
    told = gather(compared)
    if failures := [each for each in told if isinstance(each, str)]:
        raise SettingsError(f"--fp8: {failures[0]}; leave it out to train in bf16")
    worst = next((each for each in told if not each.holds), max(told, key=lambda each: each.part))
    if not worst.holds:
        raise SettingsError(
            f"--fp8 does not agree with bf16 on held-out pages: {worst.words}. Of a part {PART_LIMIT:.0%}, of the loss "
            f"{LOSS_LIMIT:.0%}, of all gradients {WHOLE_LIMIT:.0%} and along one {WEIGHT_LIMIT:.0%} are rounding. "
            "Leave it out to train in bf16"
        )
    kept = "weights cast once per step" if keep else "weights cast for each layer"
    left = len(names) - len(ours)
    stay = f", {left} more as they were" if left else ""
    say(
        f"fp8 (e4m3): {plural(len(ours), 'product')} of the language model, forward and for both gradients{stay}, "
        f"{kept}; all else as without, and MFU against bf16's peak; {time.monotonic() - start:.1f} s"
    )
    say(f"fp8: {worst.words}")
    trainer.add_callback(WeightsChange(way))


def gradients(trainer: Trainer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """(all ranks) What `loss` gives each parameter that learns, by name, up to SAMPLE of its numbers, in fp32, and the
    loss itself as ""; the parameters are given zeros, which change nothing when DeepSpeed adds them to the first
    step's."""
    found = {"": loss.detach().float()}

    def note(name: str, gradient: torch.Tensor) -> torch.Tensor:
        flat = gradient.detach().flatten()
        # By an odd number: by 16 of 2,048 columns only each 16th would ever be seen.
        part = flat[:: math.ceil(len(flat) / SAMPLE) | 1].float()
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


def compare(
    wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor], ours: set[str], parts: dict[str, torch.Tensor]
) -> Agreement:
    """`found` in fp8 beside `wanted` in bf16; `ours` are the weights whose products are in fp8, `parts` the errors of
    `fp8_parts.Beside`."""
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
    errors = {
        f"{what} of {name}": error
        for name, told in parts.items()
        for what, error in zip(("forward", "gradient for the input", "gradients", "along a gradient"), told.tolist())
    }
    whole = math.hypot(*off.values()) / math.hypot(*size.values())
    loss, loss_bf16, median = found[""].item(), wanted[""].item(), statistics.median(each.values())
    return Agreement(*furthest(errors), loss, loss_bf16, whole, median, *furthest(each), *furthest(lengths))
