"""Adam's moments in 8 bits (Dettmers et al. 2022, "8-bit optimizers via block-wise quantization"), by bitsandbytes.

    problems += eight_bit.problems(optim, deepspeed)   # what of it is not possible, before anything is loaded
    eight_bit.is_asked(training["optim"])              # --optim adamw_8bit, and others in 8 bits
    eight_bit.begin(args.optim, args.device, zero3.flat_tensors(engine))    # (all ranks) before step one

bitsandbytes keeps the moments, in its own format. On a GPU a kernel of ours (kernels/adamw_8bit_kernel.py) takes the
steps on them, where it proves to take those of bitsandbytes: checkpoints of either way go on by the other.
It changes what is learned, if little, and is therefore never chosen by itself. No torch here before `begin`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from training.errors import SettingsError
from training.processes import say, say_from_here

if TYPE_CHECKING:
    import torch

NAMES = ("adamw_8bit", "adamw_bnb_8bit")  # one and the same: transformers 5.23 has both
BLOCKWISE = (*NAMES, "ademamix_8bit", "lion_8bit", "rmsprop_bnb_8bit")  # what bitsandbytes does in the same way
BLOCK = 256  # numbers of one scale (bitsandbytes 0.50)
# Of a moment of a number: a byte, and its part of a scale in fp32 for each block; in fp32 it takes 4.
MOMENT_BYTES = 1 + 4 / BLOCK
SHORTEST = 4096  # numbers of a tensor; the moments of shorter ones stay in fp32 there
# bitsandbytes 0.50 gives the length of a tensor to its CUDA kernels in 32 bits, and does not look whether it fits.
MOST_NUMBERS = 2**31


def name_of(optim: Any) -> str:
    """The name as it was typed, of an OptimizerNames or a text."""
    return str(getattr(optim, "value", optim))


def is_asked(optim: Any) -> bool:
    """Whether this --optim keeps moments in 8 bits, of AdamW or another."""
    return name_of(optim) in BLOCKWISE


def problems(optim: Any, deepspeed: dict | None) -> list[str]:
    """What of an 8-bit or paged --optim is not possible, with its remedy."""
    name, zero = name_of(optim), (deepspeed or {}).get("zero_optimization", {})
    if name.startswith("paged_"):
        instead = NAMES[0] if "8bit" in name else "adamw_torch_fused"
        return [
            f"--optim {name}: a checkpoint would bring its moments back unpaged (bitsandbytes 0.50), and a run that "
            f"fitted would not when it goes on; give {instead}"
        ]
    if name in BLOCKWISE and (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        return [
            f"--optim {name}: the DeepSpeed JSON moves the optimizer (zero_optimization.offload_optimizer) to the CPU, "
            'where 8 bits save nothing and take longer; give ds_z3.json, or its "device": "none", or leave --optim out'
        ]
    return []


def begin(optim: Any, device: torch.device, tensors: Sequence[tuple[Sequence[torch.Tensor], torch.Tensor]]) -> None:
    """(all ranks) Before step one, once DeepSpeed's engine is made; nothing where no moments in 8 bits were asked for.

    `tensors` are what the optimizer steps on, each with the parameters that lie in it (`zero3.flat_tensors`). Those of
    norms and biases alone keep moments in fp32: they are few, and blocks would mix numbers of several of them.
    Raises `SettingsError` where bitsandbytes cannot take such a step on `device`, or not with tensors so long.
    """
    name = name_of(optim)
    if name not in BLOCKWISE or not tensors:
        return
    import bitsandbytes

    try_step(name, device)
    longest = max(tensor.numel() for _, tensor in tensors)
    if longest >= MOST_NUMBERS:
        raise SettingsError(
            f"--optim {name}: one tensor has {longest:,} numbers, and bitsandbytes takes fewer than "
            f"{MOST_NUMBERS:,}; give zero_optimization.stage 3 with a sub_group_size of at most 1e9, or more GPUs"
        )
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    small = [tensor for parameters, tensor in tensors if all(dimensions(p) == 1 for p in parameters)]
    manager.override_config(small, "optim_bits", 32)
    # transformers 5.23 keeps those of embeddings in fp32, too, where they are no part of a longer tensor.
    kept = {id(tensor) for tensor in small} | {id(getattr(*which[:2])) for which in manager.module_weight_config_triple}
    numbers = [(tensor.numel(), tensor.numel() >= SHORTEST and id(tensor) not in kept) for _, tensor in tensors]
    quicken(name, device)
    eight, all_ = sum(count for count, narrow in numbers if narrow), sum(count for count, _ in numbers)
    say(f"optimizer: moments in 8 bits for {eight:,} of {all_:,} numbers in each process, in 32 bits for the others")


def dimensions(parameter: torch.Tensor) -> int:
    """Of the whole parameter: what ZeRO-3 leaves of it may be empty, or flat."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def quicken(name: str, device: torch.device) -> None:
    """Have AdamW's steps on a GPU taken by our kernel, in place of bitsandbytes' function, where it proves right.

    A rank decides for itself: both ways take the same step.
    """
    if name not in NAMES or device.type != "cuda":
        return
    from bitsandbytes import functional

    theirs = getattr(functional.optimizer_update_8bit_blockwise, "theirs", functional.optimizer_update_8bit_blockwise)
    functional.optimizer_update_8bit_blockwise = theirs

    def proof() -> str:
        from kernels import adamw_8bit_kernel  # needs triton

        return adamw_8bit_kernel.why_not(theirs, device)

    reason = reason_of(proof)
    if reason:
        say_from_here(f"optimizer: our kernel of AdamW's step in 8 bits {reason}; bitsandbytes takes the steps, slower")
        return
    from kernels import adamw_8bit_kernel

    functional.optimizer_update_8bit_blockwise = adamw_8bit_kernel.stand_in(theirs, device.type)
    say("optimizer: steps in 8 bits by a kernel of our own, which has taken bitsandbytes' own steps on this GPU")


def reason_of(proof: Callable[[], str]) -> str:
    """What a proof of our kernel says, or how it fails: there is another way. Raises torch.OutOfMemoryError, which says
    nothing of the kernel."""
    import torch

    try:
        return proof()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler may raise anything
        if "out of memory" in str(error).lower():  # Triton's own words, when it loads a kernel
            raise torch.OutOfMemoryError(str(error)) from error
        return f"fails: {type(error).__name__}: {str(error)[:200]}"


def step_on_rests(device: torch.device) -> ModuleType | None:
    """The kernel's module where steps on `device` are taken by it (`quicken`) and it has proved right on split masters,
    too; else None: bitsandbytes, which knows of none, steps on joined ones."""
    from bitsandbytes import functional

    if device.type != "cuda" or not hasattr(functional.optimizer_update_8bit_blockwise, "theirs"):
        return None
    from kernels import adamw_8bit_kernel

    if reason := reason_of(lambda: adamw_8bit_kernel.why_not_on_rests(device)):
        say_from_here(f"optimizer: our kernel of AdamW's step in 8 bits {reason}; masters are joined for each step")
        return None
    return adamw_8bit_kernel


def try_step(name: str, device: torch.device) -> None:
    """One real step on `device`; raises `SettingsError` where bitsandbytes lacks its library there, or errs."""
    import bitsandbytes
    import torch

    weights = torch.nn.Parameter(torch.ones(2 * SHORTEST, device=device))
    weights.grad = torch.ones_like(weights)
    try:
        optimizer = bitsandbytes.optim.AdamW([weights], lr=0.5, weight_decay=0.0, optim_bits=8)
        optimizer.step()
        moved = (1.0 - weights.detach()).sub(0.5).abs().max().item()  # Adam's first step is as long as the rate
    except torch.OutOfMemoryError:  # says nothing of bitsandbytes
        raise
    except Exception as error:  # a missing library is a RuntimeError there, another an AttributeError: all end here
        moved = f"{type(error).__name__}: {error}"
    if not (isinstance(moved, float) and moved < 0.01):
        raise SettingsError(
            f"--optim {name}: bitsandbytes {bitsandbytes.__version__} cannot take a step in 8 bits on {device} "
            f"({moved}); install one for CUDA {torch.version.cuda}, or leave --optim out"
        )
