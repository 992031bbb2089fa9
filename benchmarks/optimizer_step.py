"""AdamW's step on split masters beside DeepSpeed's way: whether they agree to the bit, how fast, in how much memory.

    python benchmarks/optimizer_step.py --out benchmarks/results/h100_optimizer_step.json

Needs a GPU. One group of ZeRO-3 on one process, of `--numbers` weights in bf16 with random masters, moments and
gradients. `deepspeed` is what DeepSpeed 0.19.8 does with it: gradients flattened, copied to fp32, scaled, torch's fused
AdamW, masters copied to bf16. `ours` is kernels/adamw_kernel.py, `torch` the same by torch's functions, which is what a
GPU gets on which the kernel does not prove right. GB/s counts the 26 bytes that a weight's step cannot do without.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from linear_attention import timed  # noqa: E402

if TYPE_CHECKING:
    import torch

LEAST_BYTES = 26  # gradient 2, weight 2 + 2, rest 2 + 2, moments 8 + 8
SCALE, PIECES = 0.37, 8  # of the gradients; tensors of a group


def deepspeed_step(
    optimizer: torch.optim.Optimizer, weights: torch.Tensor, gradients: torch.Tensor, scale: torch.Tensor
) -> None:
    """DeepSpeed's stage 3, group by group: _prepare_fp32_grad_for_sub_group, unscale_and_clip_grads, _optimizer_step,
    _reassign_or_swap_out_partitioned_parameters (0.19.8)."""
    import torch

    flat = optimizer.param_groups[0]["params"][0]
    flat.grad = torch._utils._flatten_dense_tensors(gradients.chunk(PIECES)).float()
    flat.grad.mul_(scale)
    optimizer.step()
    weights.copy_(flat.data)
    flat.grad = None


def measure(numbers: int, device: str = "cuda", steps: int = 3) -> dict:
    """After `steps` steps of both: the share of masters and of weights that are the same to the bit, and the largest
    difference; then ms, GB/s and GiB at the peak beyond what stays, of a step."""
    import torch

    from kernels import adamw_kernel
    from kernels.masters import Rule, Shard, join, split, step_by_torch

    draw, rule = torch.Generator(device).manual_seed(0), Rule(1e-5, (0.9, 0.999), 1e-8, 0.01)
    masters = torch.randn(numbers, generator=draw, device=device) * 0.02
    gradients = torch.randn(numbers, generator=draw, device=device).bfloat16()
    shard = Shard(
        masters.bfloat16(),
        torch.empty_like(masters, dtype=torch.int16),
        torch.zeros_like(masters),
        torch.zeros_like(masters),
    )
    split(masters, *shard[:2])
    weights, flat = shard.weights.clone(), torch.nn.Parameter(join(*shard[:2]))
    optimizer = torch.optim.AdamW([flat], **rule._asdict(), fused=True)
    del masters
    scale, count = torch.full((), SCALE, device=device), torch.zeros((), device=device)

    def ours(way=adamw_kernel.step) -> None:
        count.add_(1)
        way(gradients, shard, rule, scale, count)

    ways = {"deepspeed": lambda: deepspeed_step(optimizer, weights, gradients, scale), "ours": ours}
    for _ in range(steps):
        for way in ways.values():
            way()
    found = join(*shard[:2])
    told = {
        "masters_equal": (found.view(torch.int32) == flat.data.view(torch.int32)).double().mean().item(),
        "weights_equal": (shard.weights == weights).double().mean().item(),
        "largest_difference": (found - flat.data).abs().max().item(),
    }
    del found
    for name, way in (ways | {"torch": lambda: ours(step_by_torch)}).items():
        ms, gib = timed(way)
        told[name] = {"ms": round(ms, 3), "gb_s": round(LEAST_BYTES * numbers / ms / 1e6), "gib": round(gib, 3)}
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, default=1_000_000_000, help="weights of a group")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import torch
    import triton

    if not torch.cuda.is_available():
        sys.exit("there is no GPU, which this needs")
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    results = {"gpu": torch.cuda.get_device_name(), **versions, "numbers": args.numbers, **measure(args.numbers)}
    print(json.dumps(results, indent=2))
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
