"""The HF Trainer with an exact token mean and a line a step: what a step's line tells is counted and said here.

class PageTrainer(MeteredTrainer): ...
trainer.meter.reset()                                # before step one
trainer.batches = Batches(treatment, plan)           # where each batch is treated by its own size
"""

from __future__ import annotations

import math
import time

import torch
from transformers import Trainer

from training.errors import NotFiniteError
from training.processes import total
from training.progress import Meter, on_device, say_step
from training.treatment import Batches

# The step is left out on every rank together, before the optimizer: one poisoned update ruins all weights for good.
NOT_FINITE = "the {} not finite at step {}, which was left out; lower --learning_rate"


class MeteredTrainer(Trainer):
    """The HF Trainer of packed or padded pages, whose loss is the mean over all supervised tokens of a step."""

    def __init__(self, **options):
        super().__init__(**options)
        self.meter = Meter()
        # How each batch is treated by its own size, which `Fit` knows before step one; None: all as they are.
        self.batches: Batches | None = None
        # Qwen2.5-VL declares False, and the Trainer would average micro-batch means: an 8-token page as heavy as a
        # 4,000-token one. Its forward does take num_items_in_batch, so the loss is the mean over all supervised tokens.
        self.model_accepts_loss_kwargs = True

    def get_batch_samples(self, *arguments) -> tuple[list[dict], torch.Tensor | None]:
        """The micro-batches of a step; the time that the step waited for them is the meter's."""
        start = time.monotonic()
        batches = super().get_batch_samples(*arguments)
        self.meter.waited += time.monotonic() - start
        return batches

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor | None:
        """(all ranks) Supervised tokens of the whole optimizer step over all ranks, a scalar.

        The loss is divided by them, so that 1 x 8, 2 x 4 and 8 x 1 pages give the same gradient."""
        if not (batch_samples and self.data_collator.packed):
            return super()._get_num_items_in_batch(batch_samples, device)
        count = sum(len(batch["targets"]) for batch in batch_samples)
        # Through the CPU's memory: on the GPUs the sum would come behind all weights that a step has asked for, which
        # go by the same group, and the first layer behind the sum.
        if self.args.average_tokens_across_devices:  # else each rank's own: then compute_loss does not multiply either
            count = total(count)
        # The Trainer's own copies the number to the GPU in a way that waits for the step before.
        return on_device([count], device, torch.float32)[0]

    def floating_point_ops(self, inputs: dict) -> int:
        """Nothing: `page_flops` counts. The Trainer's own count walks through all modules at every micro-batch."""
        return 0

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, object]:
        """The Trainer's own, once the batch is counted and layers are told what to keep; (all ranks) of a step's last
        micro-batch, what its line tells starts on its way."""
        self.meter.count(inputs, self.data_collator.encoder.image_token_id)
        if self.batches is not None:
            self.meter.planned_gib = max(self.meter.planned_gib, self.batches.treat(inputs))
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.meter.add(result[0] if return_outputs else result)
        if self.accelerator.sync_gradients:  # the last micro-batch of a step
            self.meter.send(self.args.device)
        return result

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | float | None = None) -> float | None:
        """The Trainer's own, as a number before the optimizer's step: after it, asking would be a wait for that."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return norm.item() if isinstance(norm, torch.Tensor) else norm

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: float | None,
        model: torch.nn.Module,
        trial: object,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """(all ranks) The Trainer's own, with the loss that the meter knows: `tr_loss` comes behind the optimizer's
        step, and a GPU whose Python waits for that has nothing to do after it."""
        steps = self.state.global_step - self._globalstep_last_logged
        if self.control.should_log and steps:
            logs = self.meter.read(self.args)
            loss = logs.pop("loss")
            own = {} if grad_norm is None else {"grad_norm": grad_norm}
            own["learning_rate"] = self._get_learning_rate() if learning_rate is None else learning_rate
            self._total_loss_scalar += loss
            self._globalstep_last_logged = self.state.global_step
            tr_loss.zero_()
            self.log({"loss": loss / steps} | own | logs, start_time)
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
        )

    def log(self, logs: dict, start_time: float | None = None) -> None:
        """(all ranks) One line a step. Raises `NotFiniteError` for a loss that is no number."""
        if "loss" in logs:
            # The mean over all ranks, so that all of them see it and stop together. DeepSpeed reports a norm of 1.0 for
            # gradients that are all NaN: the loss is the better witness.
            if not math.isfinite(logs["loss"]):
                raise NotFiniteError(NOT_FINITE.format(f"loss is {logs['loss']},", self.state.global_step))
            say_step(logs, self.state)
        super().log(logs, start_time)
