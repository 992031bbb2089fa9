"""Linear attention by flash-linear-attention beside the torch way: how far apart, how fast, in how much memory.

    pip install flash-linear-attention==0.6.0
    python benchmarks/linear_attention.py                                   # the shapes of Qwen3.5 at 0.8, 4 and 27 B
    python benchmarks/linear_attention.py --pages 2800 2800 2800 --out benchmarks/results/h100_linear_attention.json

Needs a GPU. One layer's convolution and gated delta rule between its products, outputs and gradients, for pages packed
into one row, in bf16: what a training proves before its first step (kernels/gated_delta.py), with numbers. Where
flash-linear-attention is not there or fails, that is told, and the torch way is measured alone.
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
HEADS = {"0.8B, 2B": 16, "4B, 9B": 32, "27B": 48}  # of values; all have 16 of keys, 128 wide


def timed(run: Callable[[], object], runs: int = 5) -> tuple[float, float]:
    """(median ms, GiB at the peak beyond what was there before) of `run`, after one that compiles."""
    import torch

    run()
    times, there = [], torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), (torch.cuda.max_memory_allocated() - there) / 2**30


def measure(heads: int, pages: tuple[int, ...], device: str = "cuda") -> dict:
    """Errors of each output and gradient, by its norm, and the cost of both ways, forward and backward; where
    flash-linear-attention does not run, why, and the torch way's cost alone."""
    import torch

    from kernels.gated_delta import FLA, PAGES, DeltaShape, difference, obstacle, outcome, trial_of

    shape = DeltaShape(16, heads, 128, 128, 4)
    trial, ways, told = trial_of(shape, torch.bfloat16, device, pages), (FLA, PAGES), {}
    try:
        if why := obstacle(device, half=True):
            raise RuntimeError(why)
        wanted, found = (outcome(way, shape, *trial) for way in (PAGES, FLA))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as the proof takes it, whatever a compiler raises
        told, ways = {"failed": f"{FLA}: {error}"}, (PAGES,)
    else:
        errors = {name: ((found[name] - part).norm() / part.norm()).item() for name, part in wanted.items()}
        told = {"errors": errors, "agrees": not difference(wanted, found)}
        del wanted, found
    for way in ways:
        ms, gib = timed(lambda way=way: outcome(way, shape, *trial))
        told[way] = {"ms": round(ms, 2), "gib": round(gib, 2)}
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, nargs="+", default=[2800, 3400, 1900, 700], help="tokens of each page")
    parser.add_argument(
        "--sizes", nargs="+", choices=HEADS, default=list(HEADS), help="of Qwen3.5; each is compiled anew"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import importlib.metadata as installed

    import torch

    if not torch.cuda.is_available():
        sys.exit("there is no GPU, which this needs")
    found = {it.name for it in installed.distributions()}
    names = [name for name in ("torch", "triton", "fla-core", "transformers") if name in found]
    versions = {name: installed.version(name) for name in names}
    results = {"gpu": torch.cuda.get_device_name(), **versions, "pages": args.pages}
    for title in args.sizes:
        results[title] = measure(HEADS[title], tuple(args.pages))
        print(title, json.dumps(results[title]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
