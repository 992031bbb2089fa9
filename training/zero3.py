"""All that is known of DeepSpeed's insides.

    zero3.bucket_size(deepspeed), zero3.may_be_whole(deepspeed, config)     # what its JSON leaves open
    zero3.tune_zero(deepspeed["zero_optimization"], way)                    # fills that in
    zero3.set_leaves(model, fast_layers.architecture_of(model).leaves)      # before DeepSpeed takes the model
    zero3.lean_steps(engine)                                                # after that, before the first step

Whatever touches a private name of DeepSpeed, or stands in for one of its functions, stands here, or in split_masters.py
what is about masters, in scattering.py what is about gradients of several processes, and names the version that it was
read in: 0.19.8. DeepSpeed itself is imported inside the functions, since the plain path does without it.
Sections: Configuration, Loading, Whole weights, Steps.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from training import memory_plan, scattering
from training.errors import PipelineError

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from transformers import PretrainedConfig

# -----------------------------------------------------------------------------
# Configuration: what the JSON leaves to us, `deepspeed` being the whole of it, `zero` its block zero_optimization

# Weights of fewer numbers are not fetched and released, but stay gathered from the start.
THRESHOLD = "stage3_param_persistence_threshold"
# Weights in one reduction, 0.4 GB: transformers' own choice, 4 M for 3B, sends each gradient by itself.
REDUCED_AT_ONCE = 200_000_000
UNUSED = 1_000_000


def bucket_size(deepspeed: dict | None) -> int:
    """Weights in one of DeepSpeed's buckets; `auto` is left to us (`tune_zero`), and so are those of no DeepSpeed."""
    asked = (deepspeed or {}).get("zero_optimization", {}).get("reduce_bucket_size", "auto")
    return REDUCED_AT_ONCE if asked == "auto" else int(asked)


def may_be_whole(deepspeed: dict | None, config: PretrainedConfig) -> tuple[bool, ...]:
    """Whether weights may be gathered once per step, or by layers: both where the threshold is left to us."""
    asked = (deepspeed or {}).get("zero_optimization", {}).get(THRESHOLD, "auto")
    largest = config.get_text_config().vocab_size * config.get_text_config().hidden_size
    return (True, False) if asked == "auto" else (int(asked) >= largest,)


def tune_zero(zero: dict, way: memory_plan.Way) -> None:
    """Fill in what `zero` leaves to us ("auto", or nothing), by measurement (benchmarks/README.md); changes `zero`.

    What the user has typed stays. Has to be done before the Trainer makes DeepSpeed's engine.
    """
    # One process reduces nothing (`Keeping`), but DeepSpeed would allocate the bucket.
    unused = way.processes == 1 and not way.offload
    wanted = {"reduce_bucket_size": UNUSED if unused else REDUCED_AT_ONCE}
    if way.whole:
        # More than any model has: everything stays gathered, and `lean_steps` says when.
        wanted |= {THRESHOLD: 10**11, "stage3_max_live_parameters": 10**11}
    elif zero.get("stage") == 3:
        # A layer of 3B has 77 M: fetched one ahead.
        wanted["stage3_prefetch_bucket_size"] = REDUCED_AT_ONCE // 2
    for name, value in wanted.items():
        if zero.get(name, "auto") == "auto":
            zero[name] = value


# -----------------------------------------------------------------------------
# Loading: which processes and which models ZeRO-3 takes


def is_on() -> bool:
    """Whether this process trains under ZeRO-3; known once TrainingArguments are made."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


def begin_alone() -> None:
    """(one process) Started plainly, without any launcher: DeepSpeed would ask MPI who this is."""
    # Port 0 is a free one, which the system gives to the one process: no other can take it in between.
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update({name: os.environ.get(name, value) for name, value in alone.items()})


def begin_on_cpu(timeout_seconds: float) -> dict:
    """(all ranks) Begin the process group of DeepSpeed on a machine without a GPU.

    Returns what TrainingArguments must be told besides. A collective waits for `timeout_seconds` at most.
    """
    from accelerate import PartialState

    # accelerate 1.15 gives DeepSpeed no backend on a CPU and then counts one process, whatever the launcher said.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    # DeepSpeed would compile a sum in shared memory that only inference uses, and leave 66 MiB of /dev/shm behind.
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    PartialState(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    return {"accelerator_config": {"use_configured_state": True}}


@contextlib.contextmanager
def without_zero3() -> Iterator[None]:
    """Models made inside are whole, although the process trains under ZeRO-3."""
    from transformers.integrations import deepspeed as integration

    # transformers 5.23 asks this reference whether to shard, and has no public way to say no for one model.
    kept = integration._hf_deepspeed_config_weak_ref
    integration._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = kept


def trust_own_classes() -> None:
    """Before a checkpoint is read with weights_only: DeepSpeed's own small classes that its shards hold."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler, LossScalerBase
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals(
        [DynamicLossScaler, LossScaler, LossScalerBase, ZeroStageEnum, fragment_address]
    )


CONVERTED = "checkpoint.converted"  # beside the checkpoints; lives while a run goes on with other processes


def convert(checkpoint: Path, place: Path) -> Path:
    """(one process) A checkpoint of ZeRO's shards for any number of processes: `place`/`checkpoint-N`, by DeepSpeed's
    universal checkpoint (Lian et al. 2024). Takes 12 bytes a parameter. Raises what DeepSpeed raises."""
    from deepspeed.checkpoint import ds_to_universal

    trust_own_classes()
    shutil.rmtree(place, ignore_errors=True)
    folder, tag = place / checkpoint.name, (checkpoint / "latest").read_text().strip()
    folder.mkdir(parents=True)
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(checkpoint / tag),
            output_folder=str(folder / tag),
            # In this process: its pool would read pickles without our promise to read none.
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    for file in (path for path in checkpoint.iterdir() if path.is_file()):
        shutil.copyfile(file, folder / file.name)
    return folder


def expect_converted(config: dict) -> None:
    """Before the engine is made: its checkpoint is a universal one; changes DeepSpeed's `config`."""
    config.setdefault("checkpoint", {})["load_universal"] = True


def count_steps_apart(engine: DeepSpeedEngine) -> None:
    """After a converted checkpoint is loaded: DeepSpeed 0.19.8 gives all of its groups one and the same tensor that
    counts the steps, so that AdamW adds one to it for each group, and corrects the moments for steps never taken. And
    it leaves that in the CPU's memory, where torch's fused step on a GPU refuses it ("all tensors on the same device");
    torch's own loading puts it beside the masters then, in fp32, and so does this."""
    inner = engine.optimizer.optimizer
    beside = any(group.get("fused") or group.get("capturable") for group in inner.param_groups)
    for tensor, state in inner.state.items():
        if torch.is_tensor(count := state.get("step")):
            state["step"] = count.to(tensor.device, torch.float32, copy=True) if beside else count.clone()


def flat_tensors(model: DeepSpeedEngine | torch.nn.Module) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
    """What the optimizer steps on, each with the parameters that lie in it: under ZeRO this rank's shards of many, in
    fp32, one after the other (deepspeed 0.19.8), elsewhere each trained parameter by itself. Once masters are split
    (split_masters.py) these tensors are as long as before, but hold no numbers."""
    optimizer = getattr(model, "optimizer", None)
    if (tensors := getattr(optimizer, "fp32_partitioned_groups_flat", None)) is not None:  # stage 3
        return list(zip(optimizer.fp16_groups, tensors))
    if (tensors := getattr(optimizer, "single_partition_of_fp32_groups", None)) is not None:  # stages 1 and 2
        return list(zip(optimizer.bit16_groups, tensors))
    return [([parameter], parameter) for parameter in model.parameters() if parameter.requires_grad]


def check_sharded(model: torch.nn.Module) -> None:
    """Raises `PipelineError` where a model was loaded whole although ZeRO-3 is on: TrainingArguments came too late."""
    if not all(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise PipelineError("ZeRO-3 is on, yet the weights were not sharded while loading")


def forget_renamings(model: torch.nn.Module) -> None:
    """After loading under ZeRO-3: else saving reverses renamings that never happened (transformers 5.23)."""
    # Its ZeRO-3 loader leaves all that might have been renamed here. Keys would come out as model.model.embed_tokens,
    # which transformers reads again without a murmur, and nobody else does.
    model._weight_conversions = None


# -----------------------------------------------------------------------------
# Whole weights, and torch's own linear function


def sharded_from_birth() -> contextlib.AbstractContextManager:
    """(all ranks) Modules made inside are sharded at once where ZeRO-3 is on, and whole elsewhere."""
    if not is_on():
        return contextlib.nullcontext()
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config

    return deepspeed.zero.Init(config_dict_or_path=deepspeed_config())


def gathered(parameters: Sequence[torch.Tensor], writer: int | None = None) -> contextlib.AbstractContextManager:
    """(all ranks) Whole parameters inside, whether ZeRO-3 has sharded them or not.

    What rank `writer` makes of them is what every rank has afterwards; without a writer they are only read.
    """
    # Asked of the tensors, not of the process: what was made in `without_zero3` is whole in a sharded run.
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        settle()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=writer)
    return contextlib.nullcontext()


@contextlib.contextmanager
def plain_linear() -> Iterator[None]:
    """DeepSpeed 0.19.8 puts a linear function of its own into torch, for good, whose bias rounds on its own in bf16.
    Inside, torch's is back: written pages and logits are exactly those of a user who loads the final folder."""
    kept = torch.nn.functional.linear
    torch.nn.functional.linear = torch._C._nn.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = kept


# -----------------------------------------------------------------------------
# Steps


def set_leaves(model: torch.nn.Module, classes: Sequence[str]) -> None:
    """Let ZeRO-3 fetch a whole layer, one of `classes`, at once: before DeepSpeed's engine is made."""
    # Hooks on each of a layer's dozen parts cost more than their arithmetic. The price: a layer is whole at once.
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, classes)


def lean_steps(engine: DeepSpeedEngine) -> None:
    """(all ranks) Take from a step under ZeRO-3 what a GPU only waits for, or copies to no end.

    `engine` is DeepSpeed 0.19.8's; some methods of it and of its optimizer are replaced, on these instances alone:

    - `engine.train`: everywhere, it walks through all modules to say again that they train;
    - `optimizer.get_grad_norm_direct`: but where the optimizer is offloaded, it widens each gradient to fp64
      (`gradient_norm`);
    - `optimizer.reduce_independent_p_g_buckets_and_remove_grads`: on one process, it reduces gradients that nobody else
      has (`Keeping`); on several, it copies each once more than it has to, and joins them (scattering.py);
    - `optimizer.step` and the hooks of all modules: where all weights may stay whole, they are fetched and released for
      each module; gathered once per step instead, on one process never (`stay_gathered`); with them those of the
      engine's methods that read weights between steps (`READERS`);
    - `synchronize` of the stream that reduces: on several GPUs, Python waits for it after each backward pass, and not
      the step alone (`wait_in_order`).
    """
    optimizer = engine.optimizer
    # Tensor parallelism reduces over a second group, of which nothing below knows.
    if optimizer.model_parallel_group is not None:
        return
    train = engine.train
    engine.train = lambda mode=True: engine if engine.training == mode else train(mode)
    alone = optimizer.partition_count == 1
    if not optimizer.offload_optimizer:
        optimizer.get_grad_norm_direct = types.MethodType(gradient_norm, optimizer)
        if alone:
            Keeping(optimizer)
        else:
            scattering.begin(optimizer, WORTH_A_CALL)
            if optimizer.reduce_and_partition_stream is not None:  # None on a CPU
                wait_in_order(optimizer)
    if all(parameter.ds_persist for parameter in engine.module.parameters()):
        stay_gathered(engine.module, optimizer)
        for name in () if alone else READERS:
            setattr(engine, name, settled(getattr(engine, name)))


def gradient_norm(
    self, gradients: Sequence[torch.Tensor], params: Sequence[torch.Tensor], norm_type: float = 2.0
) -> torch.Tensor:
    """(all ranks) 2-norm of a group's gradients over all ranks and their shards, a scalar in fp32; -1 for what is not
    finite, which is DeepSpeed's own sign. Stands for get_grad_norm_direct of its stage 3 optimizer (0.19.8)."""
    assert norm_type == 2.0, norm_type
    # Each norm in fp32 by one kernel for all; only their squares, few numbers, are summed in fp64.
    norms = torch._foreach_norm(list(gradients), 2.0, dtype=torch.float32)
    square = torch.stack(norms).double().square().sum()
    dist.all_reduce(square, group=self._get_param_partition_group(params[0]))
    norm = square.sqrt().float()
    return torch.where(norm.isfinite(), norm, -1.0)


# Numbers of gradients that are kept by one call: a layer's at most, which are all there when the first of them comes.
KEPT_AT_ONCE = 2**25


class Keeping:
    """Adds gradients to those of the step, on one process; DeepSpeed sends each through a bucket and an average over
    one process. Many by one call: for a call Python takes longer than a GPU for the gradients of a layer's norms.

    Stands for reduce_independent_p_g_buckets_and_remove_grads of DeepSpeed's stage 3 optimizer (0.19.8).
    """

    def __init__(self, optimizer: DeepSpeedZeroOptimizer_Stage3):
        self.optimizer, self.waiting, self.numbers = optimizer, [], 0
        self.epilogue = optimizer.independent_gradient_partition_epilogue
        optimizer.reduce_independent_p_g_buckets_and_remove_grads = self.keep
        optimizer.independent_gradient_partition_epilogue = self.end

    def keep(self, parameter: torch.Tensor) -> None:
        """Take the gradient of a parameter, whose place is free from then on."""
        self.waiting.append((parameter, parameter.grad))
        self.numbers += parameter.ds_numel
        parameter.grad = None
        if self.numbers >= KEPT_AT_ONCE:
            self.keep_all()

    @torch.no_grad()
    def keep_all(self) -> None:
        """Those that have come so far."""
        waiting, self.waiting, self.numbers = self.waiting, [], 0
        if not waiting:
            return
        gradients = [gradient.reshape(-1) for _, gradient in waiting]
        # A private name of its class, hence the long one: by a parameter's number, (numbers of the shard,), the
        # gradient's own and padding. Looked up anew each time: DeepSpeed may make these tensors again.
        there = self.optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        kept = [there[p.ds_id].narrow(0, 0, len(gradient)) for (p, _), gradient in zip(waiting, gradients)]
        if self.optimizer.micro_step_id == 0:
            torch._foreach_copy_(kept, gradients)
        else:
            torch._foreach_add_(kept, gradients)

    def end(self) -> None:
        """DeepSpeed's own end of a backward pass, when all are kept."""
        self.keep_all()
        self.epilogue()


def wait_in_order(optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    """The step is computed behind what the stream that reduces was given. In `synchronize` of that stream, asked for
    after each backward pass, Python waits for all but the newest bucket, and what computes for none.

    DeepSpeed (0.19.8) lets Python wait there until the last gradients have travelled, those of the embedding, which are
    many. The GPU then waits for them, and for Python to launch the next micro-batch's first layers, though nothing but
    that stream and the step touches what it keeps. Gradients of older buckets are waited for here as well: until they
    have travelled torch gives their memory to nobody, and a plan that fills it knows of none.
    Where gradients leave for the CPU's memory, who reads them there has to wait.
    """
    stream, events, step = optimizer.reduce_and_partition_stream, optimizer.param_reduce_events, optimizer.step

    def wait() -> None:
        while len(events) > 1:
            events.popleft().synchronize()

    def step_behind(closure: Callable | None = None) -> None:
        torch.cuda.current_stream(stream.device).wait_stream(stream)
        step(closure)

    # Of these instances alone.
    stream.synchronize, optimizer.step = wait, step_behind


# Weights; 2 MB travel in some 10 us by NVLink, about what a call to NCCL takes by itself.
WORTH_A_CALL = 1_000_000


# Weights that come by one call, at least, of one layer or several, and calls that are on their way while layers are at
# work. Python takes some 0.1 ms for a call: asked for all at once they would keep a GPU waiting when a step begins, and
# too few may come too late for a tower's short layers. And a call takes processors of the GPU from what computes.
GATHERED_AT_ONCE = 100_000_000
CALLS_AHEAD = 3


class Gathering:
    """Gathers the weights of `model`, on all ranks in the same order: those of no layer first, then of one layer or
    several together, the first of which waits for them, so that the others travel while it is at work.

    When a step has changed them all are asked for (`ask_for_all`): until Python has begun the next forward pass a GPU
    has nothing to compute, and in that one calls would take processors from what computes, and Python's time where it
    has least. What is missing at the beginning of a forward pass otherwise, of a first one or because somebody has
    released it, comes some layers before its turn. After the forward pass, failed or not, all are there: memory for all
    is taken before any is asked for, so that a rank that runs out of it later still sends what others wait for.

    DeepSpeed's own gathering of many (`all_gather`, 0.19.8) ends in a wait of Python for the whole GPU.
    """

    def __init__(self, model: torch.nn.Module):
        from deepspeed.utils import get_z3_leaf_modules

        self.parameters, self.owner = list(model.parameters()), {}
        self.first: dict[torch.nn.Module | None, torch.nn.Module | None] = {}  # of the layers that come with one
        self.called: set[torch.nn.Module] = set()  # of these, in this forward pass
        # By that first one, None for those of no layer: on their way, and not asked for yet.
        self.coming: dict[torch.nn.Module | None, tuple[list[torch.Tensor], dist.Work]] = {}
        self.later: dict[torch.nn.Module | None, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # with their place
        for layer in get_z3_leaf_modules(model):
            self.owner |= dict.fromkeys(layer.parameters(), layer)
            layer.register_forward_pre_hook(lambda layer, inputs: self.wait_for(layer))
        model.register_forward_pre_hook(self.begin)
        model.register_forward_hook(self.end, always_call=True)
        GATHERINGS.add(self)

    def begin(self, model: torch.nn.Module, inputs: tuple) -> None:
        """(all ranks) Looked for at each forward pass but those for which a step has asked."""
        if not self.coming:
            self.make_places()
            self.ask(CALLS_AHEAD)
        self.wait_for(None)

    def ask_for_all(self) -> None:
        """(all ranks) Behind a step. Until the next forward pass, or `finish`, they are on their way."""
        self.make_places()
        self.ask(len(self.later))

    def make_places(self) -> None:
        """(all ranks) For what is missing; small weights are there at once."""
        missing = missing_of(self.parameters)
        small = [parameter for parameter in missing if parameter.ds_numel < WORTH_A_CALL]
        large = [parameter for parameter in missing if parameter.ds_numel >= WORTH_A_CALL]
        if small:
            small[0].all_gather_coalesced(small).wait()  # by one call, and copied from there
        # What a user's JSON may ask for: shards in fewer bits, or whole ones on each machine. DeepSpeed knows how.
        if odd := [p for p in large if p.ds_secondary_tensor is not None or hasattr(p.ds_tensor, "ds_quant_scale")]:
            odd[0].all_gather(odd)
        later, self.first, first, size = {}, {}, None, 0
        self.called.clear()
        for parameter in sorted(missing_of(large), key=lambda parameter: parameter in self.owner):
            shard, owner = parameter.ds_tensor, self.owner.get(parameter)
            numbers = dist.get_world_size(parameter.ds_process_group) * shard.numel()
            whole = torch.empty(numbers, dtype=shard.dtype, device=parameter.device)
            if owner not in self.first:
                if first is None or size >= GATHERED_AT_ONCE:
                    first, size = owner, 0
                self.first[owner] = first
            size += numbers
            later.setdefault(self.first[owner], []).append((parameter, whole))
        self.later = later  # all of it or, where memory has run out, nothing

    def ask(self, most: int) -> None:
        """(all ranks) Let weights come, until so many calls are on their way."""
        while self.later and len(self.coming) < most:
            first = next(iter(self.later))
            places = self.later.pop(first)
            self.coming[first] = [parameter for parameter, _ in places], self.gather(places)

    def gather(self, places: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dist.Work:
        """(all ranks) Parameters by one call, each right to its place (numbers,): no weights stand there before they
        are waited for."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        group = places[0][0].ds_process_group
        call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.14's name
        # Before the calls are put together: an error among these would leave the group putting calls together for good.
        pairs = [(whole, parameter.ds_tensor.to(whole.device)) for parameter, whole in places]
        with dist.distributed_c10d._coalescing_manager(group=group, async_ops=True) as work:
            for whole, shard in pairs:
                call(whole, shard, group=group)
        for parameter, whole in places:
            parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.INFLIGHT
        return work

    def wait_for(self, layer: torch.nn.Module | None) -> None:
        """(all ranks) Of one layer, or of none: the GPU's stream waits, not Python; then others are asked for."""
        if layer is not None:
            self.called.add(layer)
        first = self.first.get(layer)
        while first in self.later:  # before its turn
            self.ask(len(self.coming) + 1)
        if first in self.coming:
            self.wait(first)
            self.ask(CALLS_AHEAD)

    def wait(self, first: torch.nn.Module | None) -> None:
        """For what comes with this layer."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        parameters, work = self.coming.pop(first)
        work.wait()
        for parameter in parameters:
            parameter.ds_status = ZeroParamStatus.AVAILABLE

    def end(self, model: torch.nn.Module, inputs: tuple, outputs: object) -> None:
        """(all ranks) After an error, who saves weights finds none on its way. Raises `PipelineError` where there was
        none and some layers have not waited for theirs: they have computed with whatever stood there."""
        late = self.first.keys() - self.called - {None}
        self.finish()
        self.first = {}
        if late and outputs is not None:
            raise PipelineError(f"{len(late)} layers were not called as modules, and did not wait for their weights")

    def finish(self) -> None:
        """(all ranks) All that is on its way, or is to be asked for."""
        self.ask(len(self.coming) + len(self.later))
        for first in [*self.coming]:
            self.wait(first)


GATHERINGS: weakref.WeakSet[Gathering] = weakref.WeakSet()


# What of DeepSpeed's engine reads or releases weights between steps.
READERS = ("save_checkpoint", "save_16bit_model", "_zero3_consolidated_16bit_state_dict")


def settled(work: Callable) -> Callable:
    """`work`, before which `settle`."""

    @functools.wraps(work)
    def after(*given, **named):
        settle()
        return work(*given, **named)

    return after


def settle() -> None:
    """(all ranks) Before weights are read, moved or released elsewhere than in a forward pass: none is on its way."""
    for gathering in GATHERINGS:
        gathering.finish()


def missing_of(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Those of which a process has only its shards."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    return [parameter for parameter in parameters if parameter.ds_status != ZeroParamStatus.AVAILABLE]


def release_whole(model: torch.nn.Module) -> None:
    """(all ranks) Of several processes that keep all weights whole between steps (`stay_gathered`), before something
    else takes their memory; the next forward pass gathers them again."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    settle()
    parameters = list(model.parameters())
    # Elsewhere DeepSpeed keeps some small ones whole, and relies on it; on one process a shard is the whole.
    if not all(getattr(parameter, "ds_persist", False) for parameter in parameters):
        return
    for parameter in parameters:
        if parameter.ds_status == ZeroParamStatus.AVAILABLE and parameter.ds_tensor.numel() < parameter.ds_numel:
            release(parameter)


def release(parameter: torch.Tensor) -> None:
    """A gathered parameter: its shard stays. All that is left of DeepSpeed's own release, which also asks several
    registers about each, twice."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parameter.data = parameter.data.new_empty(0)
    parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE


def stay_gathered(model: torch.nn.Module, optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
    """Gather all weights for the first forward pass and behind each step, which releases what was gathered before.

    On one process they lie where their shards do, and are up to date as soon as those are. Stands for the hooks with
    which DeepSpeed's DeepSpeedZeRoOffload fetches and releases module by module, and for the release of all weights at
    the end of its optimizer's step (0.19.8).
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    offload, parameters = optimizer.parameter_offload, list(model.parameters())
    step, theirs, alone = optimizer.step, optimizer._partition_all_parameters, optimizer.partition_count == 1

    def gather_missing(module: torch.nn.Module, inputs: tuple) -> None:
        if missing := missing_of(parameters):
            missing[0].all_gather_coalesced(missing).wait()  # without a copy: a shard is the whole

    def release_what_is_no_view() -> None:
        if any(p.numel() != p.ds_numel or p.data_ptr() != p.ds_tensor.data_ptr() for p in parameters):
            theirs()

    def release_changed() -> None:
        for parameter in parameters:  # no step changes frozen ones, nearly all where adapters are trained
            if parameter.requires_grad and parameter.ds_status == ZeroParamStatus.AVAILABLE:
                release(parameter)

    def lean_step(closure: Callable | None = None) -> None:
        if gathering:
            gathering.finish()  # of a step after which no forward pass came
        # For checkpoints DeepSpeed still does it its own way.
        optimizer._partition_all_parameters = release_what_is_no_view if alone else release_changed
        try:
            step(closure)
        finally:
            optimizer._partition_all_parameters = theirs
        if gathering:
            gathering.ask_for_all()

    # A backward pass needs no hook of its own then: what the forward pass has gathered stays until the step.
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    optimizer.step, gathering = lean_step, None
    if alone:
        model.register_forward_pre_hook(gather_missing)
    else:
        gathering = Gathering(model)
        optimizer._partition_all_parameters = theirs = settled(theirs)
        # Nor gathered by DeepSpeed, one by one, before anybody needs them.
        optimizer.persistent_parameters = []


def step_was_applied(engine: DeepSpeedEngine) -> bool:
    """False after a step that DeepSpeed 0.19.8 left out, on all ranks: the norm of its gradients was no number."""
    # Its reported norm is no help: for a step whose gradients are all NaN it may be 1.0 under bf16.
    return engine.was_step_applied()
