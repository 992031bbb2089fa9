"""fp32 masters under ZeRO-3 kept as the bf16 shards and 16-bit rests: 2 bytes a parameter less, and a leaner step.

    split_masters.are_planned(settings, training, deepspeed)    # whether a run will have them, for the memory plan
    split_masters.begin(engine, planned)    # (all ranks) once DeepSpeed's engine is made and has read its checkpoint

DeepSpeed 0.19.8 holds each master beside its upper half, the bf16 weight (kernels/masters.py). Its own step goes on
here, group by group, with its norm, its check and its clip; replaced, on this one optimizer, is what it does with a
group of masters. With torch's AdamW the step is taken on the shards as they are, in one pass that needs no fp32 copy of
gradients; so it is with moments in 8 bits where our kernel has proved right (eight_bit.step_on_rests), else a group's
masters are joined for bitsandbytes' step, and split again. Checkpoints are DeepSpeed's own, in and out: masters are
joined for them. Like zero3.py this room knows DeepSpeed's private names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from kernels import masters
from training import eight_bit
from training.errors import is_out_of_memory
from training.processes import say, say_from_here

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    from training.settings import PageSettings

GIB = 2**30
TORCHS = ("adamw_torch", "adamw_torch_fused")  # of --optim: torch.optim.AdamW, told how to go over its tensors
FP32_GROUPS = "fp32_flat_groups"  # in what DeepSpeed saves
# One number for all masters of a group, seen as so many: whoever reads them gets no numbers, and whoever writes them an
# error of torch's, that they share one place. The tensor itself stays, since moments are found by it.
NOTHING = float("nan")


def are_planned(settings: PageSettings, training: Mapping[str, Any], deepspeed: Mapping[str, Any] | None) -> bool:
    """Whether these settings train with split masters, as far as can be known before anything is loaded: AdamW under
    ZeRO-3 in bf16, of all weights, with nothing moved to the CPU."""
    zero = (deepspeed or {}).get("zero_optimization", {})
    moved = any((zero.get(f"offload_{name}") or {}).get("device", "none") != "none" for name in ("optimizer", "param"))
    whole = not settings.lora and settings.quantize != "4bit" and "optimizer" not in (deepspeed or {})
    known = eight_bit.name_of(training.get("optim")) in (*TORCHS, *eight_bit.NAMES)
    return bool(zero.get("stage") == 3 and not moved and training.get("bf16") and whole and known)


def obstacle(optimizer: DeepSpeedZeroOptimizer_Stage3) -> str:
    """What keeps these masters whole all the same; "" where nothing does."""
    inner = optimizer.optimizer
    for wide, half in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat):
        if (wide.dtype, half.dtype) != (torch.float32, torch.bfloat16) or wide.device != half.device:
            return f"weights are {half.dtype} on {half.device}, masters {wide.dtype} on {wide.device}"
    known = type(inner) is torch.optim.AdamW or type(inner).__module__ == "bitsandbytes.optim.adamw"
    if not known or any(group.get("amsgrad") or group.get("maximize") for group in inner.param_groups):
        return f"{type(inner).__module__}.{type(inner).__name__} takes another step than AdamW"
    return "tensor parallelism has a norm of its own" if optimizer.model_parallel_group is not None else ""


def begin(engine: DeepSpeedEngine, planned: bool) -> SplitMasters | None:
    """(all ranks) Split the masters of `engine`, DeepSpeed's of stage 3, where that is `planned`; None where they stay
    whole, which is said where it was not planned so."""
    if not planned:
        return None
    if why := obstacle(engine.optimizer):
        say(f"masters: whole, in fp32, which takes more memory than was planned: {why}")
        return None
    split = SplitMasters(engine.optimizer)
    numbers = sum(map(len, split.rests))
    say(f"masters: bf16 weights and 16-bit rests, {2 * numbers / GIB:.1f} GiB less for {numbers:,} of each process")
    return split


class SplitMasters:
    """The masters of one optimizer of DeepSpeed's stage 3: `rests` of each of its groups (None: its masters are joined
    for now), and in the step under way the number by which gradients are multiplied, `scale`, a scalar on the GPU."""

    def __init__(self, optimizer: DeepSpeedZeroOptimizer_Stage3):
        self.optimizer = optimizer
        self.groups = range(len(optimizer.fp16_groups))
        self.rests: list[torch.Tensor | None] = [None for _ in self.groups]
        self.scale: torch.Tensor | None = None
        device = self.parts(0)[1].device
        self.adamw = step_on(device)
        for number in self.groups:
            self.split(number)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what the masters took: 4 GB each, else cut into pieces for what is small
        for number in self.groups:
            self.make_moments(number)
        self.state_dict, self.load_state_dict = optimizer.state_dict, optimizer.load_state_dict
        self.restore, self.prepare = optimizer._restore_from_bit16_weights, optimizer._prepare_sub_group
        optimizer.state_dict, optimizer.load_state_dict = self.saved, self.load
        optimizer._restore_from_bit16_weights = self.forget_rests
        if type(optimizer.optimizer) is torch.optim.AdamW:
            optimizer._prepare_sub_group = self.check_gradients
            optimizer.unscale_and_clip_grads = self.note_scale
            optimizer._optimizer_step = self.step
            optimizer._reassign_or_swap_out_partitioned_parameters = self.unflatten
            optimizer._release_sub_group = self.let_gradients_go
        else:
            self.unscale, self.step_joined = optimizer.unscale_and_clip_grads, optimizer._optimizer_step
            self.in_8_bits = eight_bit.step_on_rests(device)
            optimizer._prepare_sub_group = self.prepare_8_bits
            optimizer.unscale_and_clip_grads = self.scale_8_bits
            optimizer._optimizer_step = self.step_8_bits
            optimizer._reassign_or_swap_out_partitioned_parameters = self.split_again

    # Masters

    def parts(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a group: the tensor of its masters, by which its moments are found, and its weights (N,)."""
        return self.optimizer.fp32_partitioned_groups_flat[number], self.optimizer.fp16_partitioned_groups_flat[number]

    def split(self, number: int) -> None:
        """Keep of a group's masters, which are joined, only what their weights do not hold; those become the masters
        rounded."""
        tensor, weights = self.parts(number)
        rests = torch.empty_like(weights, dtype=torch.int16)
        masters.split(tensor.data, weights.data, rests)
        self.rests[number] = rests
        tensor.data = tensor.new_full((), NOTHING).expand(len(weights))

    def join(self, number: int) -> None:
        """Put a group's masters where DeepSpeed looks for them."""
        tensor, weights = self.parts(number)
        if self.rests[number] is not None:
            tensor.data = masters.join(weights.data, self.rests[number])
            self.rests[number] = None

    # Moments

    def group_of(self, number: int) -> dict[str, Any]:
        """The optimizer's settings for a group."""
        return self.optimizer.optimizer.param_groups[self.optimizer.sub_group_to_group_id[number]]

    def make_moments(self, number: int) -> None:
        """Zeros, unless a checkpoint has brought them. Not in the first step, where torch and bitsandbytes make theirs:
        the proof before it, whether the longest batch fits, has to be made beside them."""
        tensor, weights = self.parts(number)
        inner, group = self.optimizer.optimizer, self.group_of(number)
        if inner.state[tensor]:
            return
        if type(inner) is torch.optim.AdamW:
            there = weights.device if group["fused"] or group["capturable"] else "cpu"
            made = {name: torch.zeros_like(weights, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
            inner.state[tensor] = {"step": torch.zeros((), dtype=torch.float32, device=there), **made}
            return
        kept, group["params"] = group["params"], [tensor]  # as DeepSpeed has it for a group's step
        inner.init_state(group, tensor, self.optimizer.sub_group_to_group_id[number], 0)
        group["params"] = kept

    # AdamW's step: what DeepSpeed calls for each group, in this order

    def check_gradients(self, number: int, timers: set[str]) -> None:
        """In place of their fp32 copy. Raises ValueError where there are not as many as weights."""
        there = sum(part.numel() for part in self.optimizer.averaged_gradients[number])
        if there != len(weights := self.parts(number)[1]):
            raise ValueError(f"group {number}: {there} gradients for {len(weights)} weights")

    def note_scale(self, number: int, norm: torch.Tensor) -> None:
        """By what a group's gradients are multiplied: nobody waits for the GPU to know `norm`, of all gradients."""
        self.keep_norm(number, norm)
        optimizer = self.optimizer
        scale = norm.new_full((), optimizer.loss_scale, dtype=torch.float32)
        if optimizer.clip_grad > 0.0:
            scale *= ((norm / optimizer.loss_scale + 1e-6) / optimizer.clip_grad).clamp(min=1.0)
        self.scale = 1.0 / scale

    def keep_norm(self, number: int, norm: torch.Tensor) -> None:
        """The norm that the engine reports, as a number before the first group's step: DeepSpeed has just waited for
        it, and who asks the GPU later waits for the whole step."""
        if number == 0:
            self.optimizer._global_grad_norm = norm.item() / self.optimizer.loss_scale

    def step(self, number: int) -> None:
        """AdamW's step of a group, its state kept as torch keeps it."""
        tensor, weights = self.parts(number)
        inner = self.optimizer.optimizer
        group, state = self.group_of(number), inner.state[tensor]
        state["step"] += 1
        rule = masters.Rule(float(group["lr"]), group["betas"], group["eps"], group["weight_decay"])
        shard = masters.Shard(weights.data, self.rests[number], state["exp_avg"], state["exp_avg_sq"])
        start = 0
        for gradients in neighbours(self.optimizer.averaged_gradients[number]):
            part = masters.Shard(*(each[start : start + len(gradients)] for each in shard))
            self.adamw(gradients, part, rule, self.scale, state["step"])
            start += len(gradients)
        inner._opt_called = True  # torch's schedules would warn that they come before any step

    def let_gradients_go(self, number: int, timers: set[str]) -> None:
        """They lie in a buffer that the next step fills again."""
        self.optimizer.averaged_gradients[number] = None

    # The same with moments in 8 bits: by our kernel, or on joined masters by bitsandbytes

    def prepare_8_bits(self, number: int, timers: set[str]) -> None:
        """A group's masters are joined, and its gradients copied in fp32, unless our kernel takes them as they are:
        activations take nothing any more. The first step makes the moments, as bitsandbytes has them."""
        if self.takes_8_bits(number):
            return self.check_gradients(number, timers)
        self.join(number)
        self.prepare(number, timers)

    def takes_8_bits(self, number: int) -> bool:
        """Whether our kernel steps on a group: not where its moments are in fp32, as those of norms alone are, or not
        made yet; nor where its gradients lie apart, since blocks of 256 go over their ends."""
        tensor, weights = self.parts(number)
        codes = self.optimizer.optimizer.state[tensor].get("state1")
        if self.in_8_bits is None or codes is None or codes.dtype != torch.uint8:
            return False
        gradients = neighbours(self.optimizer.averaged_gradients[number])
        return len(gradients) == 1 and self.in_8_bits.read_by_fours(gradients[0], weights, self.rests[number], codes)

    def scale_8_bits(self, number: int, norm: torch.Tensor) -> None:
        if self.rests[number] is not None:
            return self.note_scale(number, norm)
        self.keep_norm(number, norm)
        self.unscale(number, norm)

    def step_8_bits(self, number: int) -> None:
        if self.rests[number] is None:
            return self.step_in_order(number)
        tensor, weights = self.parts(number)
        group, state = self.group_of(number), self.optimizer.optimizer.state[tensor]
        state["step"] += 1
        (gradients,) = neighbours(self.optimizer.averaged_gradients[number])
        names = ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")
        moments = self.in_8_bits.Moments(*(state[name] for name in names))
        rule = self.in_8_bits.Rule(float(group["lr"]), group["betas"][:2], group["eps"], group["weight_decay"])
        self.in_8_bits.step(gradients, weights.data, moments, rule, state["step"], self.scale, self.rests[number])

    def step_in_order(self, number: int) -> None:
        """bitsandbytes' step of a group whose masters are joined, as those of norms alone are in every step. It is put
        behind all else in the GPU's stream: bitsandbytes (0.50) itself waits for the GPU after each tensor, and who
        waits there launches no next step meanwhile."""
        inner, group, (tensor, _) = self.optimizer.optimizer, self.group_of(number), self.parts(number)
        if not inner.initialized:  # the first one looks for what was overridden
            return self.step_joined(number)
        kept, group["params"] = group["params"], [tensor]  # as DeepSpeed has it for a group's step
        with torch.no_grad():
            inner.update_step(group, tensor, self.optimizer.sub_group_to_group_id[number], 0)
        group["params"] = kept

    def split_again(self, number: int) -> None:
        """In place of the copy to bf16."""
        if self.rests[number] is None:
            self.split(number)
        else:
            self.optimizer.averaged_gradients[number] = None  # they lie in a buffer that the next step fills again
        self.unflatten(number)

    def unflatten(self, number: int) -> None:
        """Parameters' shards as views of their group's weights, as DeepSpeed makes them anew after each step; they are
        that already, unless somebody has moved the weights meanwhile."""
        weights, shards = self.parts(number)[1], self.optimizer.fp16_partitioned_groups[number]
        place = weights.data_ptr()
        for shard in shards:
            if shard.data_ptr() != place:
                return self.optimizer._unflatten_partitioned_parameters(number)
            place += shard.nbytes

    # Checkpoints

    def saved(self) -> dict[str, Any]:
        """DeepSpeed's own state, with masters joined aside: whatever becomes of it, nothing has changed here."""
        state = self.state_dict()
        state[FP32_GROUPS] = [self.copy_of(number) for number in self.groups]
        aside = sum(one.nbytes for one in state[FP32_GROUPS] if one.device != self.parts(0)[1].device)
        if aside:
            say_from_here(
                f"masters: {aside / GIB:.1f} GiB of them joined on the CPU, since the GPU has no room for more"
            )
        return state

    def copy_of(self, number: int) -> torch.Tensor:
        """A group's masters as DeepSpeed would have them: on its device, or in the CPU's memory where all groups, which
        are there at once until they are written, would fill that."""
        tensor, weights = self.parts(number)
        if self.rests[number] is None:
            return tensor
        joined = joined_aside(weights.data, self.rests[number])
        joined.requires_grad_(tensor.requires_grad)
        vars(joined).update(vars(tensor))  # DeepSpeed's names of it
        return joined

    def load(self, *state: Any, **options: Any) -> None:
        """(all ranks) DeepSpeed's own loading, into joined masters; failed or not, they are split after it."""
        try:
            for number in self.groups:
                self.join(number)
            self.load_state_dict(*state, **options)
        finally:
            for number in self.groups:
                if self.rests[number] is None:
                    self.split(number)

    def forget_rests(self) -> None:
        """Masters become what the weights are, once these alone were loaded."""
        if all(rest is not None for rest in self.rests):
            for rest in self.rests:
                rest.zero_()
        else:
            self.restore()


# Bytes of a GPU that a save leaves free, for collectives and for what the allocator cannot use: a guess.
SPARED = 2 * GIB
AT_ONCE = 2**24  # numbers that are copied to the CPU and joined there


def room_on(device: torch.device) -> float:
    """Bytes of a GPU that a save may take: asked, and not tried until it is full, since others need some, too. Without
    end on a CPU."""
    if device.type != "cuda":
        return math.inf
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - held  # torch's own cache
    return min(free, torch.cuda.get_per_process_memory_fraction(device) * total - held) - SPARED


def joined_aside(weights: torch.Tensor, rests: torch.Tensor) -> torch.Tensor:
    """masters.join on their device where that has room; else in the CPU's memory, part by part: that takes nothing of
    a GPU's, and little more than the result."""
    if room_on(weights.device) >= 4 * len(weights):
        try:
            return masters.join(weights, rests)
        except RuntimeError as error:  # the room may be in pieces
            if not is_out_of_memory(error) or not weights.is_cuda:
                raise
    joined = torch.empty(len(weights), dtype=torch.float32)
    for start in range(0, len(weights), AT_ONCE):
        place = slice(start, start + AT_ONCE)
        joined[place] = masters.join(weights[place].cpu(), rests[place].cpu())
    return joined


def step_on(device: torch.device) -> Callable[..., None]:
    """What takes AdamW's step there, as masters.step_by_torch does it."""
    if device.type != "cuda":
        return masters.step_by_torch
    try:
        from kernels import adamw_kernel
    except ImportError as error:
        say_from_here(f"masters: triton is missing ({error}), so torch's functions take the steps, slower")
        return masters.step_by_torch
    return adamw_kernel.step


def neighbours(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Flat tensors as one where they lie one after the other in one piece of memory, as DeepSpeed's gradients do; else
    as they are."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        same = part.dtype == first.dtype and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and part.is_contiguous() and part.data_ptr() == end):
            return [part.reshape(-1) for part in parts]
        end += part.nbytes
    return [first.as_strided((sum(part.numel() for part in parts),), (1,))]
