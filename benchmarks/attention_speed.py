"""Kernels of attention beside each other, at the shapes of a step: ms, errors against fp32, and the proof's verdict.

    pip install "flash-attn-4[cu13]==4.0.0b36"                  # measured where it is installed
    pip install dew-flash-attn-cu13==0.3.6 "jax[cuda13]"        # flash-attention 3, prebuilt, for JAX alone
    python benchmarks/attention_speed.py --out benchmarks/results/h100_attention.json
    python benchmarks/attention_speed.py --kernels torch flash-attention --shapes language

Needs a GPU and bf16. What kernels/attention.py may choose from takes one micro-batch of four pages: the language
model's heads of 3B, windows and whole pictures of its vision tower, whole pictures of Qwen3-VL's. Times are medians,
forward alone and with the backward pass; errors are of the first segments, values and gradients, by their norm.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

from kernels import attention  # noqa: E402

FLASH_3 = "flash-attention 3 (dew-flash-attn, through JAX)"
CUDNN = "cuDNN, by torch's private function"


class Shape(NamedTuple):
    """Heads of queries and of keys, their width, the places of each segment."""

    heads: int
    fewer: int
    width: int
    causal: bool
    lengths: tuple[int, ...]

    def operations(self) -> float:
        """Of the forward pass: two products, of which a causal mask needs half."""
        places = sum(length**2 for length in self.lengths)
        return 4 * places * self.heads * self.width / (2 if self.causal else 1)


# Four pages of 3,545 tokens with pictures of 5,000 patches: what the 3B trains on at once.
SHAPES = {
    "language": Shape(16, 2, 128, True, (3545,) * 4),
    "windows": Shape(16, 16, 80, False, (64,) * 312),
    "whole pictures": Shape(16, 16, 80, False, (5000,) * 4),
    "whole pictures of Qwen3-VL 4B": Shape(16, 16, 64, False, (5000,) * 4),
}


def draw(shape: Shape, lengths: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[list, torch.Tensor]:
    """[query, key, value, gradient of the result], each (S, heads, D), and the bounds of `lengths`."""
    source = torch.Generator(device).manual_seed(0)
    sizes = [(sum(lengths), count, shape.width) for count in (shape.heads, shape.fewer, shape.fewer, shape.heads)]
    given = [torch.randn(size, generator=source, device=device, dtype=dtype) for size in sizes]
    return given, torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def outcome(kernel: str, shape: Shape, given: list[torch.Tensor], bounds: torch.Tensor) -> list[torch.Tensor]:
    """What `kernel` makes of `given`, and the gradients of queries, keys and values."""
    parts = [part.detach().requires_grad_() for part in given[:3]]
    longest = max(shape.lengths)  # a bound; asking the GPU would make it wait
    done = attention.KERNELS[kernel](*parts, bounds, longest, shape.width**-0.5, shape.causal)
    return [done.detach(), *torch.autograd.grad(done, parts, given[3])]


def errors_of(kernel: str, shape: Shape, device: str) -> dict[str, float]:
    """Distances from SDPA in fp32, by the norm: of the first segment, of windows the first eight."""
    few = shape.lengths[: 8 if shape.lengths[0] <= attention.WINDOW else 1]
    given, bounds = draw(shape, few, device, torch.bfloat16)
    wanted = outcome(attention.SEGMENTS, shape, [part.float() for part in given], bounds)
    found = outcome(kernel, shape, given, bounds)
    names = ("values", "to queries", "to keys", "to values")
    pairs = zip(names, found, wanted, strict=True)
    return {name: float(f"{((a.float() - b).norm() / b.norm()).item():.2g}") for name, a, b in pairs}


def timed(run: Callable[[], object], repeats: int = 5, runs: int = 5) -> float:
    """Median over `repeats` of the mean ms of `runs` on the GPU, after two that compile and warm up."""
    times = []
    for _ in range(2):
        run()
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        # The GPU begins when Python has asked for all, as in a training, where it is ahead: some 15 ms.
        torch.cuda._sleep(30_000_000)
        start.record()
        for _ in range(runs):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / runs)
    return statistics.median(times)


def cost(kernel: str, shape: Shape, device: str) -> dict[str, float]:
    """ms of the forward pass, and with the backward pass, of all segments."""
    given, bounds = draw(shape, shape.lengths, device, torch.bfloat16)
    if kernel == FLASH_3:
        return cost_in_jax(shape, given, bounds)
    attend, longest = attention.KERNELS[kernel], max(shape.lengths)
    with torch.no_grad():
        forward = timed(lambda: attend(*given[:3], bounds, longest, shape.width**-0.5, shape.causal))
    return {"forward_ms": forward, "both_ms": timed(lambda: outcome(kernel, shape, given, bounds))}


# -----------------------------------------------------------------------------
# cuDNN: torch 2.11 has it for segments, but asks for it nowhere; torch 2.14 does where no mask is needed


class Cudnn(torch.autograd.Function):
    """Segments by the function that stands behind `scaled_dot_product_attention` on Hopper."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object) -> torch.Tensor:
        bounds, longest, scale, causal = rest
        # A plan is made for each longest segment and number of segments, in milliseconds; the longest is a bound alone.
        longest = -(-longest // 512) * 512
        both = (bounds, bounds, longest, longest)
        given = (query, key, value, None, *both, True, 0.0, causal, False)
        done, sums, *_, seed, offset, _ = torch.ops.aten._cudnn_attention_forward(*given, scale=scale)
        ctx.save_for_backward(query, key, value, done, sums, seed, offset, bounds)
        ctx.options = longest, scale, causal
        return done

    @staticmethod
    def backward(ctx, outer: torch.Tensor) -> tuple:
        *kept, bounds = ctx.saved_tensors
        longest, scale, causal = ctx.options
        given = (outer.contiguous(), *kept, None, bounds, bounds, longest, longest, 0.0, causal)
        return *torch.ops.aten._cudnn_attention_backward(*given, scale=scale), *[None] * 4


# -----------------------------------------------------------------------------
# flash-attention 3: no wheel of it for torch is on PyPI, but its kernels, built for JAX, are


def in_jax(longest: int, scale: float, causal: bool, bounds: object) -> Callable:
    """(query, key, value) to the result, all of JAX."""
    from dew_flash_attn import flash_mha_varlen

    return lambda *parts: flash_mha_varlen(*parts, bounds, longest, scale, causal)


def to_jax(tensor: torch.Tensor) -> object:
    """The same memory, for JAX; what torch has still to write is waited for."""
    import jax

    torch.cuda.synchronize()
    return jax.dlpack.from_dlpack(tensor.detach().contiguous())


class ThroughJax(torch.autograd.Function):
    """flash-attention 3 for the proof and for errors, which ask for torch's tensors and gradients."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object) -> torch.Tensor:
        import jax

        bounds, longest, scale, causal = rest
        attend = in_jax(longest, scale, causal, to_jax(bounds))
        done, ctx.pull = jax.vjp(attend, *(to_jax(part) for part in (query, key, value)))
        return torch.from_dlpack(done.block_until_ready())

    @staticmethod
    def backward(ctx, outer: torch.Tensor) -> tuple:
        import jax

        found = jax.block_until_ready(ctx.pull(to_jax(outer)))
        return *(torch.from_dlpack(part) for part in found), *[None] * 4


def cost_in_jax(shape: Shape, given: list[torch.Tensor], bounds: torch.Tensor, runs: int = 20) -> dict[str, float]:
    """As `cost`: the mean of `runs`, which are asked for without waiting, so that the GPU has no pause."""
    import jax

    attend = in_jax(max(shape.lengths), shape.width**-0.5, shape.causal, to_jax(bounds))
    given = [to_jax(part) for part in given]

    def both(*given: object) -> object:
        done, pull = jax.vjp(attend, *given[:3])
        return done, pull(given[3])

    found = {}
    for name, function, inputs in (("forward_ms", attend, given[:3]), ("both_ms", both, given)):
        run = jax.jit(function)
        jax.block_until_ready(run(*inputs))
        start = time.perf_counter()
        for _ in range(runs):
            done = run(*inputs)
        jax.block_until_ready(done)
        found[name] = (time.perf_counter() - start) / runs * 1000
    return found


def rivals() -> list[str]:
    """The kernels at hand on this GPU, torch's first; last those whose failing might end the process: what was measured
    before is kept."""
    names = [attention.VARLEN]
    names += [attention.WINDOWS] if importlib.util.find_spec("triton") else []
    names += [attention.FLASH] if attention.importable("flash_attn") else []
    hopper = torch.cuda.get_device_capability()[0] == 9
    newer = hopper or torch.cuda.get_device_capability()[0] == 10
    names += [attention.FLASH_4] if newer and attention.importable("flash_attn.cute") else []
    if newer:
        attention.KERNELS[CUDNN] = Cudnn.apply
        names.append(CUDNN)
    if hopper and all(map(importlib.util.find_spec, ("dew_flash_attn", "jax"))):
        # JAX would take three quarters of the GPU's memory at its first word.
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        attention.KERNELS[FLASH_3] = ThroughJax.apply
        names.append(FLASH_3)
    return names


def measure(kernel: str, shape: Shape, device: str = "cuda") -> dict:
    """Times, TFLOP/s of forward and backward pass (two products and five), errors and the proof's verdict; or why it
    failed. Empty where the kernel is for windows and `shape` has none."""
    windows = max(shape.lengths) <= attention.WINDOW and not shape.causal
    if kernel == attention.WINDOWS and not windows:
        return {}
    shapes, lengths = (shape.heads, shape.fewer, shape.width), attention.WINDOWED if windows else attention.PAGES
    try:
        found = {name: round(ms, 3) for name, ms in cost(kernel, shape, device).items()}
        found["tflops"] = round(3.5 * shape.operations() / found["both_ms"] / 1e9, 1)
        found["errors"] = errors_of(kernel, shape, device)
        if kernel != attention.VARLEN:
            proof = (kernel, attention.VARLEN, shapes, torch.bfloat16, shape.causal, device, lengths)
            found["agrees"] = attention.agrees(*proof)
    except Exception as error:  # a beta may raise anything, and the others are to be measured all the same
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--kernels", nargs="+", default=[""], help="beginnings of names; all that are at hand otherwise"
    )
    parser.add_argument("--out", type=Path, help="results as JSON, written after each kernel")
    args = parser.parse_args()
    if not torch.cuda.is_available() or not torch.cuda.is_bf16_supported():
        sys.exit("there is no GPU with bf16, which this needs")
    wanted = ("torch", "triton", "flash-attn", "flash-attn-4", "nvidia-cutlass-dsl", "dew-flash-attn-cu13", "jax")
    found = {it.name: it.version for it in importlib.metadata.distributions()}
    versions = {name: found[name] for name in wanted if name in found}
    shapes = {name: SHAPES[name]._asdict() for name in args.shapes}
    results = {"gpu": torch.cuda.get_device_name(), "versions": versions, "shapes": shapes, "kernels": {}}
    for kernel in rivals():
        for name in args.shapes if kernel.startswith(tuple(args.kernels)) else ():
            start = time.perf_counter()
            told = measure(kernel, SHAPES[name])
            if not told:
                continue
            results["kernels"].setdefault(name, {})[kernel] = told
            print(f"{name}, {kernel}: {json.dumps(told)} ({time.perf_counter() - start:.0f} s)", flush=True)
            if args.out:
                args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
