"""AdamW's step by torch's fused kernel, by bitsandbytes in 8 bits and by our own kernel in 8 bits: ms, bytes a second.

    python benchmarks/optimizer_speed.py                                    # 1e9 numbers, or as many as fit
    python benchmarks/optimizer_speed.py --numbers 3e8 --out benchmarks/results/h100_optimizer.json

Needs a GPU. One flat tensor of fp32 weights and gradients, as ZeRO-3 has them, after three steps, so that moments are
spread over their codes as in a training; and for our kernel the same with gradients and weights in bf16 and a rest of
16 bits for each. Times are medians in ms; `GB/s` counts what a step has to read and write, not what a kernel does.
`proof` is what a training finds before its first step: nothing, where our kernel takes bitsandbytes' own steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BETAS, LR, EPS, DECAY = (0.9, 0.999), 1e-5, 1e-8, 0.01
MOST = 28  # bytes a number of what torch's step takes, with room for its own: weight, gradient, two moments, and some


def timed(step: Callable[[int], object], runs: int) -> float:
    """Median ms of `step`, which is given its number from 1, after three."""
    import torch

    times = []
    for number in range(1, runs + 4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step(number)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times[3:]), 4)


def by_torch(count: int) -> Callable[[int], object]:
    import torch

    weights = torch.nn.Parameter(torch.randn(count, device="cuda"))
    weights.grad = torch.randn_like(weights)
    optimizer = torch.optim.AdamW([weights], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
    return lambda number: optimizer.step()


def in_8_bits(count: int, ours: bool) -> Callable[[int], object]:
    """bitsandbytes' function on its own states, or our kernel in its place."""
    import torch
    from bitsandbytes import functional

    from kernels import adamw_8bit_kernel

    weights, gradients = torch.randn(count, device="cuda"), torch.randn(count, device="cuda")
    codes, maps, scales = moments(count)
    theirs = functional.optimizer_update_8bit_blockwise
    update = adamw_8bit_kernel.stand_in(theirs, "cuda") if ours else theirs

    def step(number: int) -> None:
        update("adam", gradients, weights, *codes, *BETAS, 0.0, 0.0, EPS, number, LR, *maps, *scales, DECAY)

    return step


def split_in_8_bits(count: int) -> Callable[[int], object]:
    """Our kernel with bf16 gradients, and fp32 weights as bf16 and a rest."""
    import torch

    from kernels.adamw_8bit_kernel import Moments, Rule, step

    weights, gradients = (torch.randn(count, device="cuda").bfloat16() for _ in range(2))
    rests, scale = torch.zeros_like(weights, dtype=torch.int16), torch.ones((), device="cuda")
    codes, maps, scales = moments(count)
    state = Moments(*codes, *maps, *scales)
    return lambda number: step(gradients, weights, state, Rule(LR, BETAS, EPS, DECAY), number, scale, rests)


def moments(count: int) -> tuple[list, list, list]:
    """bitsandbytes' codes, maps and scales for `count` numbers before their first step, of both moments each."""
    import torch
    from bitsandbytes.functional import create_dynamic_map

    codes = [torch.zeros(count, dtype=torch.uint8, device="cuda") for _ in range(2)]
    maps = [create_dynamic_map(signed).cuda() for signed in (True, False)]
    return codes, maps, [torch.zeros(-(-count // 256), device="cuda") for _ in range(2)]


# Of each way: what makes its step, and the bytes of a number that it has to move.
WAYS: dict[str, tuple[Callable[[int], Callable[[int], object]], float]] = {
    "torch, fused, fp32 moments": (by_torch, 28),
    "bitsandbytes, 8 bits": (lambda count: in_8_bits(count, ours=False), 16 + 1 / 16),
    "ours, 8 bits": (lambda count: in_8_bits(count, ours=True), 16 + 1 / 16),
    "ours, 8 bits, bf16 weights with rests": (split_in_8_bits, 14 + 1 / 16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=float, default=1e9, help="weights; fewer, where fewer fit")
    parser.add_argument("--runs", type=int, default=11, help="steps of which the median is told")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("there is no GPU, whose memory this measures")
    import bitsandbytes
    import triton
    from bitsandbytes.functional import optimizer_update_8bit_blockwise

    from kernels import adamw_8bit_kernel

    count = int(min(args.numbers, torch.cuda.mem_get_info()[0] // MOST, 2**31 - 1))
    results: dict = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    results |= {"bitsandbytes": bitsandbytes.__version__, "numbers": count, "runs": args.runs}
    results["proof"] = adamw_8bit_kernel.why_not(optimizer_update_8bit_blockwise, torch.device("cuda"))
    print(f"proof: {results['proof'] or 'our kernel takes the steps of bitsandbytes'}", flush=True)
    for name, (make, moved) in WAYS.items():
        try:
            ms = timed(make(count), args.runs)
            results[name] = {"ms": ms, "GB/s": round(moved * count / ms / 1e6)}
        except Exception as failed:  # a compiler may raise anything, and the other ways stand by themselves
            results[name] = {"failed": str(failed)[:500]}
        torch.cuda.empty_cache()
        print(f"{name}: {json.dumps(results[name])}", flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
