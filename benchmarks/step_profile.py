"""Where the time of a training step goes on a GPU: what it computes, and what it waits for.

    python benchmarks/step_profile.py --base_model ./holo1_3b_shapes --dataset ./pages_like_real --num_samples 56 \\
        --eval_pages 2 --micro_batch 4 --out benchmarks/results/h100_3b_profile.json

Takes the training's own flags. Everything up to step 4 is the real run's, under the real launcher; then two steps go by
under torch's profiler, and the run ends. On the stream that computes, `busy_ms` is the time in which a kernel runs.
Where none does, `idle_until_the_cpu_launched_ms` is the time until kernels that the CPU launched only after the one
before them had ended, `idle_otherwise_ms` the rest, such as waiting for copies. `first_uses_ms` is the CPU's time
between two calls where the second is the first in these steps for a kernel of cuBLAS, which is loaded then.
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
FIRST, STEPS = 3, 2  # steps before those that are profiled, and how many these are
ON_GPU, BY_CPU = ("kernel", "gpu_memcpy", "gpu_memset"), ("cuda_runtime", "cuda_driver")
LAUNCHED_US = 3  # a kernel that was launched less than this before the one before it had ended was waited for
LOADED_US = 1_000  # between two calls: less is no loading
KINDS = {  # by a part of a kernel's name; the first that is found counts
    "nvjet|splitK|gemvx|gemm": "products",
    "flash|fmha": "attention, flash kernels",
    "see_window": "attention in windows",
    "kOptimizerStatic8bit": "bitsandbytes' step in 8 bits",
    "adamw_kernel|step_kernel": "AdamW, by our kernels",
    "multi_tensor_apply": "multi_tensor_apply: torch's AdamW, norms",
    "CatArray": "tensors joined",
    "CUDAFunctor_add": "sums",
    "Memcpy DtoD": "copies on the GPU",
}


def kind_of(name: str) -> str:
    """What a kernel does, or its own name without what differs from call to call."""
    found = next((kind for part, kind in KINDS.items() if re.search(part, name, re.IGNORECASE)), None)
    return found or re.sub(r"_?\d+$", "", re.split(r"[(<]", name.removeprefix("void "))[0]).strip()[:60]


def analyse(events: Iterable[dict]) -> dict:
    """Of the events of torch's trace (in us): milliseconds by what the GPU did, and of what it waited for."""
    events = [event for event in events if event.get("ph") == "X"]
    on_gpu = sorted((event for event in events if event.get("cat") in ON_GPU), key=lambda event: event["ts"])
    calls = sorted((event for event in events if event.get("cat") in BY_CPU), key=lambda event: event["ts"])
    launches = {call["args"].get("correlation"): call for call in calls}
    # The stream with the most kernels is the one that computes; the others copy.
    streams = collections.Counter(event["args"]["stream"] for event in on_gpu)
    computing = [event for event in on_gpu if event["args"]["stream"] == streams.most_common(1)[0][0]]
    end, sums, kinds = computing[0]["ts"], collections.Counter(), collections.Counter()
    for event in computing:
        if event["ts"] > end:
            launch = launches.get(event["args"].get("correlation"))
            late = launch is not None and launch["ts"] > end - LAUNCHED_US
            sums["late" if late else "other"] += event["ts"] - end
        sums["busy"] += max(0, event["ts"] + event["dur"] - max(end, event["ts"]))
        end = max(end, event["ts"] + event["dur"])
        kinds[kind_of(event["name"])] += event["dur"]
    waits = [call["dur"] for call in calls if call["name"] == "cudaDeviceSynchronize"]
    return {
        "span_ms": in_ms(end - computing[0]["ts"]),
        "busy_ms": in_ms(sums["busy"]),
        "idle_until_the_cpu_launched_ms": in_ms(sums["late"]),
        "idle_otherwise_ms": in_ms(sums["other"]),
        "first_uses_ms": in_ms(first_uses(calls, {event["args"].get("correlation"): event for event in on_gpu})),
        "device_synchronisations_ms": [in_ms(wait) for wait in waits],
        "kernels_ms": {kind: in_ms(spent) for kind, spent in kinds.most_common(24)},
    }


def in_ms(us: float) -> float:
    return round(us / 1_000, 1)


def first_uses(calls: list[dict], kernels: dict[int, dict]) -> float:
    """Microseconds in which the CPU called nothing before it launched a kernel of cuBLAS for the first time."""
    seen, end, spent = set(), None, 0.0
    for number, call in enumerate(calls):
        kernel = kernels.get(call["args"].get("correlation"))
        if kernel and kernel["name"].startswith("Memset") and number + 1 < len(calls):  # which cuBLAS sets for its next
            kernel = kernels.get(calls[number + 1]["args"].get("correlation"), kernel)
        name = kernel["name"] if kernel else call["name"]
        if end is not None and call["ts"] - end > LOADED_US and "nvjet" in name and name not in seen:
            spent += call["ts"] - end
        seen.add(name)
        end = max(end or 0, call["ts"] + call["dur"])
    return spent


def inside(argv: list[str], out: Path) -> None:
    """(one process) The training's main, which ends once the steps that are profiled are done."""
    import torch

    import holo1_dom_finetune as training

    step, done, running = training.PageTrainer.training_step, [0], []

    def watched(self, *given, **options):
        accumulated = self.args.gradient_accumulation_steps
        if done[0] == FIRST * accumulated:
            torch.cuda.synchronize()
            running.append(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]))
            running[0].start()
        if done[0] == (FIRST + STEPS) * accumulated:
            torch.cuda.synchronize()
            running[0].stop()
            with tempfile.TemporaryDirectory() as folder:
                trace = Path(folder, "trace.json")
                running[0].export_chrome_trace(str(trace))
                events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
            result = {
                "gpu": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "steps": STEPS,
                **analyse(events),
            }
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            training.say(json.dumps(result))
            training.report_end(0)
            training.leave(0)
        done[0] += 1
        return step(self, *given, **options)

    training.PageTrainer.training_step = watched
    training.leave(training.main(argv))


def main() -> int:
    if "STEP_PROFILE_OUT" in os.environ:
        inside(sys.argv[1:], Path(os.environ["STEP_PROFILE_OUT"]))
    argv = sys.argv[1:]
    if "--out" not in argv or {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0 if {"-h", "--help"} & set(argv) else 2
    import torch

    if not torch.cuda.is_available():
        print("step_profile.py needs a GPU: a CPU launches nothing that it could wait for", file=sys.stderr)
        return 2
    place = argv.index("--out")
    out = Path(argv[place + 1]).resolve()
    del argv[place : place + 2]
    out.parent.mkdir(parents=True, exist_ok=True)
    wrapper = [sys.executable, str(ROOT / "run_deepspeed_training.py"), "--script", __file__, "--num_gpus", "1", *argv]
    wrapper += ["--save_strategy", "no", "--report_to", "none"]
    return subprocess.run(wrapper, env={**os.environ, "STEP_PROFILE_OUT": str(out)}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
