"""All that is known of DeepSpeed's insides.

    zero3.bucket_size(deepspeed), zero3.may_be_whole(deepspeed, config)     # what its JSON leaves open
    zero3.tune_zero(deepspeed["zero_optimization"], way)                    # fills that in
    zero3.set_leaves(model, fast_layers.LEAVES)                             # before DeepSpeed takes the model
    zero3.lean_steps(engine)                                                # after that, before the first step

A room about torch: whoever has to answer --help without it imports this inside a function.
"""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Iterator
from datetime import timedelta

from training import memory_plan
from training.errors import PipelineError

# -----------------------------------------------------------------------------
# Configuration

THRESHOLD = "stage3_param_persistence_threshold"
REDUCED_AT_ONCE = 200_000_000  # weights: transformers' own choice, 4 M for 3B, sends each gradient by itself


def bucket_size(deepspeed: dict | None) -> int:
    """Weights in one of DeepSpeed's buckets; `auto` is left to us (`tune_zero`)."""
    asked = (deepspeed or {}).get("zero_optimization", {}).get("reduce_bucket_size", "auto")
    return REDUCED_AT_ONCE if asked == "auto" else int(asked)


def may_be_whole(deepspeed: dict | None, config) -> tuple[bool, ...]:
    """Whether weights may be gathered once per step, or by layers: both where the threshold is left to us."""
    asked = (deepspeed or {}).get("zero_optimization", {}).get(THRESHOLD, "auto")
    largest = config.get_text_config().vocab_size * config.get_text_config().hidden_size
    return (True, False) if asked == "auto" else (int(asked) >= largest,)


def tune_zero(zero: dict, way: memory_plan.Way) -> None:
    """What DeepSpeed's configuration leaves to us ("auto", or nothing), by measurement (benchmarks/README.md)."""
    wanted = {"reduce_bucket_size": REDUCED_AT_ONCE}
    if way.whole:
        wanted |= {THRESHOLD: 10**11, "stage3_max_live_parameters": 10**11}
    elif zero.get("stage") == 3:
        wanted["stage3_prefetch_bucket_size"] = REDUCED_AT_ONCE // 2  # a layer of 3B has 77 M: fetched one ahead
    for name, value in wanted.items():
        if zero.get(name, "auto") == "auto":
            zero[name] = value


# -----------------------------------------------------------------------------
# Loading: which processes and which models ZeRO-3 takes


def is_on() -> bool:
    """Whether this process trains under ZeRO-3; known once TrainingArguments are made."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


def begin_on_cpu(timeout_seconds: float) -> dict:
    """(all ranks) Begin the process group of DeepSpeed on a machine without a GPU; what TrainingArguments must know."""
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

    kept = integration._hf_deepspeed_config_weak_ref
    integration._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = kept


def check_sharded(model) -> None:
    """Raises PipelineError where a model was loaded whole although ZeRO-3 is on."""
    if not all(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise PipelineError("ZeRO-3 is on, yet the weights were not sharded while loading")


def forget_renamings(model) -> None:
    """After loading under ZeRO-3: else saving reverses renamings that never happened (transformers 5.23)."""
    model._weight_conversions = None


# -----------------------------------------------------------------------------
# Whole weights, and torch's own functions


def sharded_from_birth() -> contextlib.AbstractContextManager:
    """(all ranks) Modules made inside are sharded at once where ZeRO-3 is on."""
    if not is_on():
        return contextlib.nullcontext()
    import deepspeed
    from transformers.integrations.deepspeed import deepspeed_config

    return deepspeed.zero.Init(config_dict_or_path=deepspeed_config())


def gathered(parameters: list, writer: int | None = None) -> contextlib.AbstractContextManager:
    """(all ranks) Whole parameters inside, whether ZeRO-3 has sharded them or not.

    What rank `writer` makes of them is what every rank has afterwards; without a writer they are only read.
    """
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=writer)
    return contextlib.nullcontext()


@contextlib.contextmanager
def plain_linear() -> Iterator[None]:
    """DeepSpeed 0.19.8 puts a linear function of its own into torch, for good, whose bias rounds on its own in bf16.
    Inside, torch's is back: written pages and logits are exactly those of a user who loads the final folder."""
    import torch

    kept = torch.nn.functional.linear
    torch.nn.functional.linear = torch._C._nn.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = kept


# -----------------------------------------------------------------------------
# Steps


def set_leaves(model, classes: list[str]) -> None:
    """Let ZeRO-3 fetch a whole layer at once; hooks on each of its dozen parts cost more than their arithmetic."""
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, classes)


def lean_steps(engine) -> None:
    """Take from a step under DeepSpeed 0.19.8's ZeRO-3 what a GPU only waits for, or copies to no end.

    Everywhere: walking through all modules to say again that they train, and a widening to fp64 of each gradient for
    its norm. On one process also the reduction of gradients that nobody else has. Where all weights may stay whole:
    fetching and releasing them for each module, as they are gathered once per step, on one process never.
    """
    optimizer = engine.optimizer
    if optimizer.model_parallel_group is not None:
        return
    train = engine.train
    engine.train = lambda mode=True: engine if engine.training == mode else train(mode)
    alone = optimizer.partition_count == 1
    if not optimizer.offload_optimizer:
        optimizer.get_grad_norm_direct = types.MethodType(gradient_norm, optimizer)
        if alone:
            optimizer.reduce_independent_p_g_buckets_and_remove_grads = types.MethodType(keep_gradient, optimizer)
    if all(parameter.ds_persist for parameter in engine.module.parameters()):
        stay_gathered(engine.module, optimizer)


def gradient_norm(self, gradients, params, norm_type: float = 2.0):
    """(all ranks) 2-norm of a group's gradients over all ranks and their shards; -1 for what is not finite."""
    import torch
    import torch.distributed as dist

    assert norm_type == 2.0, norm_type
    norms = torch._foreach_norm(list(gradients), 2.0, dtype=torch.float32)
    square = torch.stack(norms).double().square().sum()
    dist.all_reduce(square, group=self._get_param_partition_group(params[0]))
    norm = square.sqrt().float()
    return torch.where(norm.isfinite(), norm, -1.0)


def keep_gradient(self, parameter) -> None:
    """Add a gradient to those of the step; DeepSpeed sends it through a bucket and an average over one process."""
    kept = self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[parameter.ds_id]
    gradient = parameter.grad.reshape(-1)
    kept = kept.narrow(0, 0, len(gradient))
    if self.micro_step_id == 0:
        kept.copy_(gradient)
    else:
        kept.add_(gradient)
    parameter.grad = None


WORTH_A_CALL = 1_000_000  # weights; 2 MB travel in some 10 us by NVLink, about what a call to NCCL takes by itself


def stay_gathered(model, optimizer) -> None:
    """Gather all weights before a step's first layer, and release them after it.

    On one process they lie where their shards do, and are up to date as soon as those are.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    offload, parameters = optimizer.parameter_offload, list(model.parameters())
    step, release, alone = optimizer.step, optimizer._partition_all_parameters, optimizer.partition_count == 1

    def gather_missing(module, inputs) -> None:  # after a checkpoint, too
        missing = [parameter for parameter in parameters if parameter.ds_status != ZeroParamStatus.AVAILABLE]
        large = [parameter for parameter in missing if parameter.ds_numel >= WORTH_A_CALL]
        small = [parameter for parameter in missing if parameter.ds_numel < WORTH_A_CALL]
        if large:
            large[0].all_gather(large)  # each by a call of its own, right to where it belongs
        if small:
            small[0].all_gather_coalesced(small).wait()  # by one call, and copied from there

    def release_what_is_no_view() -> None:
        if any(p.numel() != p.ds_numel or p.data_ptr() != p.ds_tensor.data_ptr() for p in parameters):
            release()

    def release_all() -> None:
        for parameter in parameters:
            if parameter.ds_status == ZeroParamStatus.AVAILABLE:
                parameter.data = parameter.data.new_empty(0)
                parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE

    def lean_step(closure=None) -> None:
        # for checkpoints DeepSpeed still does it its own way
        optimizer._partition_all_parameters = release_what_is_no_view if alone else release_all
        try:
            step(closure)
        finally:
            optimizer._partition_all_parameters = release

    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    model.register_forward_pre_hook(gather_missing)
    optimizer.step = lean_step
    if not alone:
        optimizer.persistent_parameters = []  # nor gathered by DeepSpeed, one by one, before anybody needs them


def step_was_applied(engine) -> bool:
    """False after a step that DeepSpeed 0.19.8 left out, on all ranks: the norm of its gradients was no number."""
    return engine.was_step_applied()
