"""A language model's layers with activations kept, recomputed and offloaded: equal to the bit, how fast, how large.

    python benchmarks/offload_equal.py --out benchmarks/results/h100_3b_offload.json      # the 36 layers of Holo1-3B
    python benchmarks/offload_equal.py --shape qwen3.5-4b --pages 2800 2800
    python benchmarks/offload_equal.py --tiny --pages 50 40                               # without a GPU: equality only

Random weights and states, pages packed into one row, forward and backward through the fast path, without tower and
head. Equality is asked of torch's deterministic algorithms, since the backward pass of its flash attention adds up in
whichever order blocks finish; whether two runs with all activations kept are equal is told as `repeats`. Times are
those of the usual algorithms. Prints a line of JSON for each way.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

GIB = 2**30


def make_model(shape: str, tiny: bool, layers: int | None, device: torch.device) -> PreTrainedModel:
    """Of random weights, in bf16 on a GPU, with `layers` layers (None: all) and next to no tower, on the fast path."""
    import torch
    from make_shapes import make_config
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from families.elementwise import can_fuse
    from training.fast_layers import install

    config = make_config(shape, AutoTokenizer.from_pretrained(ROOT / "demo" / "tiny_holo1"), tiny)
    text, config.vision_config.depth = config.text_config, 1
    text.num_hidden_layers = layers or text.num_hidden_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    install(model, fuse=not can_fuse())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def step_of(model: PreTrainedModel, pages: list[int], device: torch.device) -> Callable[[], torch.cuda.Event | None]:
    """Forward and backward of packed `pages` (tokens of each); returns the moment between the two on a GPU."""
    import torch

    core, width = model.model.language_model, model.config.get_text_config().hidden_size
    bounds = torch.tensor([sum(pages[:number]) for number in range(len(pages) + 1)], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(page) for page in pages]).expand(4, 1, -1).to(device)
    states = torch.randn(1, sum(pages), width, dtype=model.dtype, device=device).requires_grad_()
    outer = torch.randn_like(states) / width
    options = {"position_ids": positions, "attention_mask": states.new_empty((1, 1, 1, 1)), "use_cache": False}
    options |= {"page_bounds": bounds, "longest_page": max(pages)}

    def step() -> torch.cuda.Event | None:
        core.zero_grad(set_to_none=False)  # as under ZeRO-3, whose gradients have a place of their own
        done = core(inputs_embeds=states * 1, **options).last_hidden_state
        between = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if between:
            between.record()
        done.backward(outer)
        return between

    return step


def gradients(model: PreTrainedModel, step: Callable[[], object]) -> dict[str, torch.Tensor]:
    """Of each weight, by torch's deterministic algorithms."""
    import torch

    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        step()
    finally:
        torch.use_deterministic_algorithms(False)
    return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


def timed(step: Callable[[], torch.cuda.Event], device: torch.device, runs: int) -> dict:
    """Milliseconds, of which forward, and GiB at the peak beyond weights and their gradients."""
    import torch

    if device.type != "cuda":
        return {}
    step()
    torch.cuda.synchronize()
    there = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    whole, forward = [], []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        between = step()
        end.record()
        torch.cuda.synchronize()
        forward.append(start.elapsed_time(between))
        whole.append(start.elapsed_time(end))
    peak = torch.cuda.max_memory_allocated() - there
    told = {"ms": statistics.median(whole), "forward_ms": statistics.median(forward), "peak_gib": peak / GIB}
    return {name: round(value, 2) for name, value in told.items()}


def measure(
    model: PreTrainedModel, step: Callable[[], object], ways: dict[str, tuple], args: argparse.Namespace
) -> dict:
    """Of each of `ways`, (layers recomputed, layers offloaded), what it costs and whether its gradients are those of
    the first."""
    import torch

    from training.activation_offload import Offload
    from training.memory_plan import layer_ways

    layers, wanted, results = list(model.model.language_model.layers), None, {}
    for title, (again, away) in ways.items():
        treated = layer_ways(len(layers), again, away)
        for layer, way in zip(layers, treated):
            layer.gradient_checkpointing = way == "recomputed"
        offload = Offload(layers, [way == "offloaded" for way in treated], args.device)
        told = {}
        try:
            found = gradients(model, step)
            if wanted is None:
                wanted, found = found, gradients(model, step)
            same = [torch.equal(wanted[name], found[name]) for name in wanted]
            told["repeats" if not results else "equal"] = all(same) and found.keys() == wanted.keys()
            del found
            told |= timed(step, args.device, args.runs)
        except torch.OutOfMemoryError:
            told["failed"] = "out of memory"
        offload.stop()
        results[title] = told | {"pinned_gib": round(offload.pinned_gib, 2)}
        print(json.dumps({"way": title, **results[title]}), flush=True)
        model.zero_grad()
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def main() -> None:
    from make_shapes import SHAPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="3b")
    parser.add_argument("--tiny", action="store_true", help="the same architecture in small")
    parser.add_argument("--layers", type=int, help="of the language model (default: all)")
    parser.add_argument("--pages", type=int, nargs="+", default=[6100, 5600, 4700, 4600], help="tokens of each page")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.25, 0.5, 1.0], help="offloaded")
    parser.add_argument("--runs", type=int, default=3, help="timed, of each way")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    # Before torch is loaded: cuBLAS is deterministic with a workspace of its own alone.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import torch
    import transformers

    from training.activation_offload import link_rate, pinnable_gib

    args.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else "cpu"
    results = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
    results |= {"shape": args.shape, "pages": args.pages}
    if args.device.type == "cuda":
        results |= {"link_gb_s": round(link_rate(args.device), 1), "pinnable_gib": round(pinnable_gib(), 1)}
    model = make_model(args.shape, args.tiny, args.layers, args.device)
    results["layers"] = count = len(model.model.language_model.layers)
    print(json.dumps(results), flush=True)
    ways = {"kept": (0, 0), "recomputed": (count, 0)}
    ways |= {f"offloaded {share:.3g}": (0, max(1, round(count * share))) for share in args.shares}
    ways["a third each"] = (count // 3, count // 3)
    results["ways"] = measure(model, step_of(model, args.pages, args.device), ways, args)
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
