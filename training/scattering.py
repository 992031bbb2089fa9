"""Gradients of several processes under ZeRO-3: each averaged and scattered as it lies there, a layer's by one call.

    scattering.begin(optimizer, worth_a_call)       # (all ranks) DeepSpeed's of stage 3, before its first backward pass

DeepSpeed (0.19.8) copies each gradient into a bucket, joins those of a full one by shards, divides them, and adds what
has arrived to what it keeps: three passes over all gradients more than they need, and much Python for each. Here a
large one is sent right from where autograd has left it, in the first micro-batch of a step right to where it is kept,
some by one call, and small ones are sent as one when the backward pass has ended. Like zero3.py this room knows
DeepSpeed's private names.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from training.errors import PipelineError
from training.processes import same_everywhere, say

if TYPE_CHECKING:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

# What DeepSpeed's optimizer says where it averages gradients over one group of all processes, in their own type, and
# does nothing else with them. A user's JSON may ask for most of these.
USUAL = {
    "offload_optimizer": False,
    "model_parallel_group": None,
    "sequence_parallel_size": 1,
    "autoep_folding_tp_group": None,
    "zero_hpz_partition_size": 1,
    "all2all_process_group": None,  # zero_quantized_gradients
    "reduce_scatter": True,
    "postscale_gradients": True,
    "gradient_predivide_factor": 1.0,
    "use_muon": False,
    "zenflow": False,
    "enable_sanity_checks": False,  # of the order, for each of its buckets
}

REMEDY = "--fast False sends gradients by DeepSpeed's buckets; please report which model this is"


def obstacle(optimizer: DeepSpeedZeroOptimizer_Stage3) -> str:
    """Why no gradient can go this way; "" where nothing speaks against it."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    if type(optimizer) is not DeepSpeedZeroOptimizer_Stage3:
        return f"{type(optimizer).__name__} has a way of its own"
    found = [f"{name} is {value}" for name in USUAL if (value := getattr(optimizer, name)) != USUAL[name]]
    if {*optimizer.ipg_buckets} != {optimizer.communication_data_type}:
        found.append(f"gradients travel as {[*optimizer.ipg_buckets]}")
    return ", ".join(found)


def fits(optimizer: DeepSpeedZeroOptimizer_Stage3, parameter: torch.Tensor, group: dist.ProcessGroup) -> bool:
    """Whether each rank of `group` keeps the same share of a gradient without padding, and that travels in its own
    type."""
    return (
        parameter.partition_numel() * dist.get_world_size(group) == parameter.ds_numel
        and parameter.dtype == optimizer.communication_data_type
        and optimizer._get_param_partition_group(parameter) == group
        and getattr(parameter, "ds_zero_placement_family", "replicated") == "replicated"  # no expert of some ranks
    )


def begin(optimizer: DeepSpeedZeroOptimizer_Stage3, worth_a_call: int) -> Scattering | None:
    """(all ranks) Gradients of at least `worth_a_call` numbers go by themselves from now on; None, and a line that says
    so, where all stay with DeepSpeed's buckets."""
    why = obstacle(optimizer)
    if not why:
        learning = [parameter for group in optimizer.fp16_groups for parameter in group if parameter.requires_grad]
        group = optimizer._get_param_partition_group(learning[0])  # that of zero.Init, another than dp_process_group
        fit = {parameter.ds_id: parameter.ds_numel for parameter in learning if fits(optimizer, parameter, group)}
        large = {number for number, numel in fit.items() if numel >= worth_a_call}
        rest = sum(parameter.ds_numel for parameter in learning if parameter.ds_id not in large)
        # Then what is not large fills no bucket, and leaves when a backward pass has ended: see `Scattering`.
        if fit and 2 * rest <= optimizer.reduce_bucket_size:
            return Scattering(optimizer, group, {number: number in large for number in fit})
        why = f"{rest:,} numbers are of small ones, of no multiple of {dist.get_world_size(group)}, or travel otherwise"
    say(f"gradients: by DeepSpeed's own buckets, which takes longer: {why}")
    return None


# Large gradients that go by one call have at least this share of a bucket, for 3B a layer's. By one call each, 345 in a
# backward pass, Python took 0.1 ms for each, and a GPU gave its processors away and took them back as often.
BUCKET_SHARE = 1 / 3


class Scattering:
    """The gradients of one optimizer of DeepSpeed's stage 3. `own` says, by ds_id, of all that do not go DeepSpeed's
    way whether they are large.

    Numbers are DeepSpeed's but for rounding. It divides them by the ranks in their own type, sums, and adds the sum to
    what it keeps. NCCL's average leaves to NCCL how each is scaled in its own type, and since calls are cut differently
    numbers may be summed in another order of ranks; over gloo all is as DeepSpeed does it.

    Order: all ranks have to send the same gradients one after the other. A layer is one of ZeRO's leaf modules, whose
    gradients DeepSpeed takes in the order of its groups when the whole layer has done; layers, and weights outside of
    any, follow from one another, or in torch's order of forward calls, whatever a rank recomputes. DeepSpeed relies on
    the same, within a bucket not on the order; the first backward pass is compared here. Small ones, which come two or
    more at once, are sorted.

    Memory: the computing stream waits before memory of a gradient goes back to torch, which gives it to nobody else
    than that stream; so Python waits for no GPU. Besides the bucket that DeepSpeed has allocated stand at most another
    one, `reduce_bucket_size` numbers, of large gradients that wait or are under way, and those of small ones, half a
    bucket at most, twice: as they are and joined. So plans have room for all (memory_plan.BUCKETS), but for what a
    single gradient has more than a bucket, which stands there in any way. The last ones travel beside the next forward
    pass, and go back in the middle of it, when layers keep less than they will. The average of a large one lies in
    itself, or where it is kept.
    """

    def __init__(self, optimizer: DeepSpeedZeroOptimizer_Stage3, group: dist.ProcessGroup, own: dict[int, bool]):
        from deepspeed.utils import get_z3_leaf_modules

        self.optimizer, self.group, self.own, self.limit = optimizer, group, own, optimizer.reduce_bucket_size
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        # torch 2.14's name; only NCCL is known to average without a pass of its own.
        self.call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        self.averages = dist.get_backend(group) == "nccl"
        self.operation = dist.ReduceOp.AVG if self.averages else dist.ReduceOp.SUM
        self.stream = optimizer.reduce_and_partition_stream  # None on a CPU
        self.small: dict[int, torch.Tensor] = {}
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []  # large ones, and where they are kept, for one call
        self.under_way: deque[tuple[int, list[torch.Tensor], torch.cuda.Event]] = deque()
        self.waiting_numbers = self.numbers = 0  # of those that wait, and of those under way besides
        self.ended = False  # the backward pass that they are of
        self.order: list[int] | None = []  # of the first backward pass; None once it has been compared
        self.sent: set[int] = set()  # large ones of this backward pass
        self.theirs = optimizer.reduce_independent_p_g_buckets_and_remove_grads
        self.their_end, self.step = optimizer.independent_gradient_partition_epilogue, optimizer.step
        optimizer.reduce_independent_p_g_buckets_and_remove_grads = self.take
        optimizer.independent_gradient_partition_epilogue = self.end
        optimizer.step = self.settled_step
        if layers := get_z3_leaf_modules(optimizer.module):
            layers[len(layers) // 2].register_forward_hook(lambda *unused: self.let_go())

    def take(self, parameter: torch.Tensor) -> None:
        """(all ranks) Stands for reduce_independent_p_g_buckets_and_remove_grads."""
        large = self.own.get(parameter.ds_id)
        if large is None or not getattr(parameter, "ds_grad_is_ready", True):
            self.theirs(parameter)
        elif large:
            gradient, parameter.grad = parameter.grad.reshape(-1), None
            if self.order is not None:
                self.order.append(parameter.ds_id)
            if parameter.ds_id in self.sent:  # the first part would be overwritten in a step's first micro-batch
                raise PipelineError(f"a weight's gradient has come twice in one backward pass. {REMEDY}")
            self.sent.add(parameter.ds_id)
            self.ended, size = False, len(gradient)
            if self.waiting_numbers + size > self.limit:
                self.send_large()
            self.make_room(self.limit - self.waiting_numbers - size)
            self.waiting.append((gradient, self.kept(parameter.ds_id)))
            self.waiting_numbers += size
            if self.waiting_numbers >= BUCKET_SHARE * self.limit:
                self.send_large()
        else:
            self.small[parameter.ds_id] = parameter

    def kept(self, number: int) -> torch.Tensor:
        """(numbers of the shard,), looked up anew each time: DeepSpeed may make these tensors again."""
        return self.optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[number]

    def send_large(self) -> None:
        """(all ranks) Those that wait, by one call."""
        waiting, self.waiting, self.waiting_numbers = self.waiting, [], 0
        if not waiting:
            return
        gradients, kept = map(list, zip(*waiting))
        if self.optimizer.micro_step_id == 0 and all(place.dtype == gradient.dtype for gradient, place in waiting):
            self.send(gradients, kept)
        else:
            shares = [gradient.view(self.world, -1)[self.rank] for gradient in gradients]
            self.send(gradients, shares, lambda: self.keep(kept, shares))

    def send(
        self,
        gradients: Sequence[torch.Tensor],
        shares: Sequence[torch.Tensor],
        arrived: Callable[[], None] | None = None,
    ) -> None:
        """(all ranks) Average each of `gradients` (N,), which are used up, into this rank's one of `shares`
        (N / ranks,), which may lie in it; then do what is to be done when they have `arrived`, beside what computes."""
        if not self.averages:
            torch._foreach_div_(gradients, self.world)
        # Nothing here may fail: the group would put calls together for good.
        with dist.distributed_c10d._coalescing_manager(group=self.group, async_ops=True) as work:
            for share, gradient in zip(shares, gradients):
                self.call(share, gradient, op=self.operation, group=self.group)
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            work.wait()  # on a GPU, DeepSpeed's stream does, not Python
            if arrived:
                arrived()
            if self.stream is not None:
                event = torch.cuda.Event()
                event.record()
                numbers = sum(map(len, gradients))
                self.under_way.append((numbers, gradients, event))
                self.numbers += numbers

    def keep(self, kept: Sequence[torch.Tensor], shares: Sequence[torch.Tensor]) -> None:
        if self.optimizer.micro_step_id == 0:
            torch._foreach_copy_(kept, shares)
        else:
            torch._foreach_add_(kept, shares)

    def make_room(self, numbers: int) -> None:
        """Let the oldest gradients go until at most so many numbers are under way."""
        if self.numbers <= numbers or not self.under_way:
            return
        computing = torch.cuda.current_stream(self.stream.device)
        while self.under_way and self.numbers > numbers:
            size, _, event = self.under_way.popleft()
            computing.wait_event(event)
            self.numbers -= size

    def end(self) -> None:
        """(all ranks) Stands for independent_gradient_partition_epilogue, after each backward pass."""
        self.send_large()
        self.send_small()
        self.their_end()
        self.ended = True
        self.sent.clear()
        if self.order is not None:
            self.compare_orders()

    def compare_orders(self) -> None:
        """(all ranks) After the first backward pass. Raises `PipelineError`."""
        order, self.order = self.order, None
        if not same_everywhere(sha256(str(order).encode()).hexdigest()):
            raise PipelineError(f"processes have computed gradients in different orders, and mixed them up. {REMEDY}")

    def send_small(self) -> None:
        """(all ranks) All as one, joined so that each rank's shares are neighbours."""
        numbers = sorted(number for number, parameter in self.small.items() if parameter.grad is not None)
        if numbers:
            gradients = [self.small[number].grad.reshape(self.world, -1) for number in numbers]
            joined = torch.cat(gradients, dim=1)  # (ranks, numbers of all shards of one)
            for number in numbers:
                self.small[number].grad = None
            kept, share = [self.kept(number) for number in numbers], joined[self.rank]
            shares = share.split([gradient.shape[1] for gradient in gradients])
            self.send([joined.view(-1)], [share], lambda: self.keep(kept, shares))
            if self.order is not None:
                self.order += numbers
        self.small.clear()

    def let_go(self) -> None:
        """What was under way when the last backward pass ended; not what is in one that computes the layer anew."""
        if self.ended:
            self.make_room(0)
            self.ended = False

    def settled_step(self, *given: object) -> None:
        """What steps reads gradients: these have arrived, and been added."""
        self.make_room(0)
        self.step(*given)
