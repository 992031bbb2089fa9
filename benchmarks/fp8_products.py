"""Products in fp8 beside those in bf16: bare, with their casts, and in a whole layer; forward and both gradients.

    python benchmarks/fp8_products.py                                       # the layers of 3B, 14,336 tokens at once
    python benchmarks/fp8_products.py --shape 7b --rows 28672 --out benchmarks/results/h100_fp8_products.json

Needs a GPU of compute capability 9.0 or more, and some 80 seconds, most of which torch.compile takes. Times are medians
in ms; `x` is how many times as fast as bf16; errors are of the norm, against fp32 (products) or against bf16 (layer).
Bare are torch._scaled_mm's own, a scale for the tensor or one for each row, summed up by tensor cores alone (quick) or
by fp32 as well. "ours" are kernels/fp8.py with everything that it takes to begin with bf16 and end with it, but for the
weights' own cast, which is told by itself.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if TYPE_CHECKING:
    import torch

    from kernels.fp8 import Weights

# Hidden, of all queries, of all keys (and as many values), of the MLP, and of one head.
SHAPES = {"3b": (2048, 2048, 256, 11008, 128), "7b": (3584, 3584, 512, 18944, 128)}
PARTS = ("forward", "both")  # of a layer, which runs forward, or forward and backward
MASSIVE = 1000.0  # how many times as large as others a token's activations may be in an MLP (Sun et al. 2024)


def timed(run: Callable[[], object], runs: int = 9) -> float:
    """Median ms of `run`, after two that compile and warm up."""
    import torch

    for _ in range(2):
        run()
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return round(statistics.median(times), 4)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of the norm of what is wanted, in parts of 1."""
    return round(((found.float() - wanted.float()).norm() / wanted.float().norm()).item(), 5)


def tried(run: Callable[[], object]) -> float | str:
    """`timed`, or what torch says against it: not every torch takes every way on every GPU."""
    try:
        return timed(run)
    except RuntimeError as failed:
        return f"fails: {str(failed).splitlines()[0][:120]}"


# -----------------------------------------------------------------------------
# Products


def bare(rows: int, width: int, depth: int) -> dict[str, float | str]:
    """Times of one product (rows, depth) x (depth, width), with operands that are there already."""
    import torch

    def one(*size: int) -> torch.Tensor:
        return torch.ones(size, device="cuda")

    left, right = (torch.randn(size, depth, device="cuda").bfloat16() for size in (rows, width))
    told = {"bf16": timed(lambda: left @ right.T)}
    left, right = (part.to(torch.float8_e4m3fn) for part in (left, right))
    for name, scales in {"tensor": (one(), one()), "row": (one(rows, 1), one(1, width))}.items():
        for quick in (True, False):
            options = {"scale_a": scales[0], "scale_b": scales[1], "out_dtype": torch.bfloat16}
            run = functools.partial(torch._scaled_mm, left, right.T, **options, use_fast_accum=quick)
            told[f"{name}{', quick' if quick else ''}"] = tried(run)
    return told


def gradient_like(rows: int, width: int) -> torch.Tensor:
    """A gradient (rows, width) as training has them: tokens differ in it by orders of magnitude."""
    import torch

    tokens = torch.randn(rows, 1, device="cuda").mul(2).exp()
    return (torch.randn(rows, width, device="cuda") * tokens * 1e-6).bfloat16()


def measure_product(rows: int, widths: tuple[int, ...], depth: int, massive: bool) -> dict:
    """One product of a layer, whose weights (some of `widths` x `depth`) take the same rows: forward and gradients."""
    import torch

    from kernels import fp8

    width = sum(widths)
    hidden = torch.randn(rows, depth, device="cuda")
    if massive:
        hidden[:: rows // 4] *= MASSIVE
    hidden, gradient = hidden.bfloat16(), gradient_like(rows, width)
    weights = [(torch.randn(one, depth, device="cuda") * 0.02).bfloat16() for one in widths]
    whole = torch.cat(weights)
    sides = {"forward": (rows, width, depth), "for input": (rows, depth, width), "for weight": (width, depth, rows)}
    told: dict = {"bare": {name: bare(*sizes) for name, sizes in sides.items()}}
    held = fp8.Weights(weights)
    most = held.rows.scales.amax()
    told["weights' cast ms"] = timed(lambda: fp8.Weights(weights))
    told["weights' transpose ms"] = timed(lambda: fp8.transposed(held.rows.values, [held.rows.scales], most))
    torch.backends.cuda.matmul.allow_tf32 = False
    wanted = {
        "forward": hidden.float() @ whole.float().T,
        "for input": gradient.float() @ whole.float(),
        "for weight": gradient.float().T @ hidden.float(),
    }
    rounded = {"forward": hidden @ whole.T, "for input": gradient @ whole, "for weight": gradient.T @ hidden}
    told["errors of bf16"] = {name: error(part, wanted[name]) for name, part in rounded.items()}
    del rounded
    for kind, name in ((fp8.E4M3, "e4m3"), (fp8.E5M2, "e5m2")):
        for quick in (True, False):
            told[f"ours, {name}{', quick' if quick else ''}"] = ours(hidden, gradient, held, kind, quick, wanted)
    return told


def ours(
    hidden: torch.Tensor, gradient: torch.Tensor, weights: Weights, kind: torch.dtype, quick: bool, wanted: dict
) -> dict[str, dict[str, float]]:
    """Times and errors with all casts; the weights are in fp8, transposed each time. Forward is the same
    whatever `kind` gradients have."""
    import torch

    from kernels import fp8

    def for_input() -> torch.Tensor:
        return weights.for_input(fp8.cast(gradient, kind), quick)

    def for_weight() -> torch.Tensor:
        return fp8.for_weight(fp8.cast(gradient, kind), fp8.cast(hidden), quick)

    def forward() -> list[torch.Tensor]:
        return weights.forward(fp8.cast(hidden), [None] * len(weights.sizes), quick)

    runs = {"forward": lambda: torch.cat(forward(), 1), "for input": for_input, "for weight": for_weight}
    errors = {name: error(run(), wanted[name]) for name, run in runs.items()}
    return {name: {"ms": timed(run), "error": errors[name]} for name, run in (runs | {"forward": forward}).items()}


# -----------------------------------------------------------------------------
# Casts


def measure_casts(rows: int, hidden: int, inner: int) -> dict:
    """Each kernel by itself, with what it moves in a second; and what a scale for the tensor, and torch alone, take."""
    import torch

    from kernels import fp8

    def rate(ms: float, moved: float) -> dict[str, float]:
        return {"ms": ms, "GB/s": round(moved / ms / 1e6)}

    narrow, told = torch.randn(rows, hidden, device="cuda").bfloat16(), {}
    gate, up, outer = (torch.randn(rows, inner, device="cuda").bfloat16() for _ in range(3))
    small, large = narrow.numel(), gate.numel()
    told["cast, narrow"] = rate(timed(lambda: fp8.cast(narrow)), 3 * small)
    told["cast, wide"] = rate(timed(lambda: fp8.cast(gate)), 3 * large)
    norm = torch.ones(hidden, device="cuda").bfloat16()
    told["norm, narrow"] = rate(timed(lambda: fp8.norm_cast(narrow, norm, 1e-6)), 3 * small)
    told["swiglu"] = rate(timed(lambda: fp8.swiglu_cast(gate, up)), 5 * large)
    told["swiglu backward"] = rate(timed(lambda: fp8.swiglu_backward_cast(gate, up, outer)), 9 * large)
    first, second = fp8.cast(gate), fp8.cast(outer)
    most, used = (first.scales * second.scales).amax(), fp8.TILE
    for tile in ((128, 64, 4), (128, 128, 8), (128, 128, 4), (64, 64, 4), (64, 128, 4), (256, 64, 8)):
        fp8.TILE = tile
        told[f"transpose by {tile}"] = rate(timed(lambda: fp8.transposed(first.values)), 2 * large)
        scaled = timed(lambda: fp8.transposed(second.values, [first.scales, second.scales], most))
        told[f"transpose by {tile}, scaled"] = rate(scaled, 2 * large)
    fp8.TILE = used
    told["largest of a tensor, wide"] = rate(timed(lambda: torch.linalg.vector_norm(gate, float("inf"))), 2 * large)
    told["cast and transpose by torch, wide"] = timed(functools.partial(by_torch, gate))
    return told


def by_torch(states: torch.Tensor) -> torch.Tensor:
    """`states` (S, K) cast and transposed by torch's own functions, as naive casts are."""
    import torch

    return (states / 2).to(torch.float8_e4m3fn).T.contiguous()


# -----------------------------------------------------------------------------
# A whole layer


def layer_of(shape: tuple[int, ...]) -> torch.nn.Module:
    """A layer of the language model with random weights, its element-wise parts fused, as training has it."""
    import torch
    from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl, modeling_qwen2_5_vl

    from families.elementwise import Elementwise

    hidden, queries, keys, inner, head = shape
    config = configuration_qwen2_5_vl.Qwen2_5_VLTextConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=queries // head,
        num_key_value_heads=keys // head,
        num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    layer = modeling_qwen2_5_vl.Qwen2_5_VLDecoderLayer(config, 0)
    fused = Elementwise(fuse=True)
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02, mean=float("norm" in name))
    for part in layer.children():
        part.fused = fused
    return layer.to("cuda", torch.bfloat16)


def measure_layer(rows: int, shape: tuple[int, ...]) -> dict:
    """A layer forward, and forward and backward, on four pages: in bf16, and in fp8 in several ways."""
    import torch

    from families import fast_parts, fp8_parts
    from kernels import fp8

    layer, page = layer_of(shape), rows // 4
    hidden = torch.randn(1, rows, shape[0], device="cuda").bfloat16().requires_grad_()
    bounds = torch.arange(5, dtype=torch.int32, device="cuda") * page
    angles = torch.rand(1, rows, shape[4] // 2, device="cuda") * 6
    angles = tuple(torch.cat((part, part), -1).bfloat16() for part in (angles.cos(), angles.sin()))
    outer = gradient_like(rows, shape[0])[None]

    def forward() -> torch.Tensor:
        return fast_parts.language_block(layer, hidden, angles, bounds, page)

    def both() -> dict[str, torch.Tensor]:
        named = {"hidden": hidden, **dict(layer.named_parameters())}
        done = forward()
        found = torch.autograd.grad(done, list(named.values()), outer)
        return {"forward": done.detach() - hidden.detach(), **dict(zip(named, found))}

    wanted, told = both(), {"bf16": {"forward ms": timed(forward), "both ms": timed(both)}}
    quick = {"keep": True, "quick_input": True}
    ways = {
        "e4m3": fp8_parts.Fp8(keep=True),
        "e4m3, quick for input": fp8_parts.Fp8(**quick),
        "e4m3, quick": fp8_parts.Fp8(**quick, quick_weight=True),
        "e5m2, quick": fp8_parts.Fp8(fp8.E5M2, **quick, quick_weight=True),
        "e4m3, quick, weights cast each time": fp8_parts.Fp8(quick_input=True, quick_weight=True),
    }
    for name, way in ways.items():
        fp8_parts.put_into_fp8(layer, way)
        found = both()
        told[name] = {"forward ms": timed(forward), "both ms": timed(both)}
        told[name] |= {f"x {part}": round(told["bf16"][f"{part} ms"] / told[name][f"{part} ms"], 3) for part in PARTS}
        told[name]["errors"] = {name: error(part, wanted[name]) for name, part in found.items()}
        print(f"layer, {name}: {json.dumps(told[name])}", flush=True)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--rows", type=int, default=14_336, help="tokens that go through at once")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import torch
    import triton

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        sys.exit("there is no GPU that multiplies in fp8 (compute capability 8.9 or more), which this needs")
    hidden, queries, keys, inner, _ = shape = SHAPES[args.shape]
    results: dict = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    results |= {"shape": args.shape, "rows": args.rows, "products": {}}
    products = {
        "qkv": ((queries, keys, keys), hidden, False),
        "o": ((hidden,), queries, False),
        "gate, up": ((inner, inner), hidden, False),
        "down": ((hidden,), inner, True),
    }
    steps: dict[str, Callable[[], dict]] = {"casts": lambda: measure_casts(args.rows, hidden, inner)}
    steps["layer"] = lambda: measure_layer(args.rows, shape)
    for name, asked in products.items():
        steps[name] = functools.partial(measure_product, args.rows, *asked)
    for name, step in steps.items():
        place = results["products"] if name in products else results
        try:
            place[name] = step()
        except RuntimeError as failed:  # the other measurements stand by themselves
            place[name] = {"failed": str(failed)[:500]}
        torch.cuda.empty_cache()
        print(f"{name}: {json.dumps(place[name])}", flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
