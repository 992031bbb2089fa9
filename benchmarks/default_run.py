"""How long a whole default run takes on one GPU: data, loading, training, evaluation with the render, part by part.

    python benchmarks/random_weights.py ./holo1_3b_shapes
    python benchmarks/make_pages_like_real.py --base_model ./holo1_3b_shapes --pages 1040 --out pages_like_real
    python benchmarks/default_run.py --base_model ./holo1_3b_shapes --dataset ./pages_like_real \\
        --out benchmarks/results/h100_3b_default_write.json --evaluation benchmarks/results/h100_3b_eval_write.json

The run is `run_deepspeed_training.py` as a user starts it, with all defaults but for `--save_strategy no`: a checkpoint
of 53 GB at the last step is as slow as the disk is. All other flags are the training's own. A part lasts from one of
its log's lines to the next, by the clock of this process.

Weights that were random write, after one epoch, whatever they write: loops, mostly, which are cut. So the evaluation of
this run says little of one's own; beside it stands, from the file `--evaluation`, what `evaluation_speed.py
--real_lengths` took for pages of real lengths.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from step_speed import FIRST_MEASURED, OUTPUT, gpu_name, read_step, told_outside, versions  # noqa: E402

# A part, and the line with which it ends; the lines come in this order.
PARTS = {
    "start: checks, launcher, imports": r"quantisation: ",
    "data: pages read, cleaned, counted": r"[\d,]+ training and [\d,]+ held-out pages? in",
    "loading": r".* M parameters in",
    "rehearsal": r"rehearsal: loss",
    "proof that the longest batch fits, first step": r"step 1/",
    "training: the other steps": r"step (\d+)/\1 ",
    "saving": r"saved: ",
    "evaluation: writing, rendering, scoring": r"after: ",
    "report, card, end": r"$",
}
END = "report, card, end"


def seconds_of_parts(lines: Iterable[tuple[float, str]], start: float, end: float) -> dict[str, float]:
    """Seconds of each of PARTS from (time, line) of a log; one whose line never came is left out, and its seconds are
    those of the next."""
    found, before, waiting = {}, start, [*PARTS]
    for moment, line in lines:
        for name in waiting[:-1]:
            if re.match(PARTS[name], line):
                found[name], before = moment - before, moment
                waiting = waiting[waiting.index(name) + 1 :]
                break
    return {**found, END: end - before}


def run(command: list[str], work: Path) -> tuple[list[tuple[float, str]], float, float, int]:
    """(time and text of each line, when it started, when it ended, its exit code); the log is shown and kept."""
    start, lines = time.monotonic(), []
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=work, **options) as process, (work / "log").open("w", encoding="utf-8") as log:
        for line in process.stdout:
            lines.append((time.monotonic(), line.rstrip("\n")))
            log.write(f"{lines[-1][0] - start:8.2f}  {line}")
            print(line, end="", flush=True)
    return lines, start, time.monotonic(), process.returncode


def training_of(steps: list[dict]) -> dict[str, float]:
    """Means over the steps from the third on, as the run's own lines have them."""
    measured = [step for step in steps if step["step"] >= FIRST_MEASURED] or steps
    names = [name for name in ("logged_pages_per_second", "logged_mfu", "data_wait_share") if name in measured[0]]
    means = {name: sum(step[name] for step in measured) / len(measured) for name in names}
    return {"steps": len(steps), **means, "peak_gib": max(step["peak_gib"] for step in steps)}


def evaluation_of(work: Path) -> dict[str, object]:
    """What results.json says of the pages that were written."""
    found = json.loads((work / OUTPUT / "evaluation" / "results.json").read_text(encoding="utf-8"))
    names = ("n", "tokens", "mean_tokens", "mean_reference_tokens", "tokens_per_second", "looping", "truncated")
    return {name: found["after"][name] for name in names} | {"rendered": bool(found["rendering"])}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--base_model", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, help="result of evaluation_speed.py --real_lengths")
    parser.add_argument("--work", type=Path, help="empty folder for what the run writes; default: a temporary one")
    parser.add_argument("--out", type=Path, required=True)
    args, more = parser.parse_known_args()
    work = (args.work or Path(tempfile.mkdtemp(prefix="default_run-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        parser.error(f"--work {work} is not empty: what lies there may be taken for this run's")
    flags = ["--base_model", str(args.base_model.resolve()), "--dataset", str(args.dataset.resolve())]
    flags += ["--save_strategy", "no", *more]
    lines, start, end, code = run([sys.executable, str(HERE.parent / "run_deepspeed_training.py"), *flags], work)
    parts = seconds_of_parts(lines, start, end)
    steps = [step for _, line in lines if (step := read_step(line))]
    results = {
        "command": shlex.join([*told_outside(), "python", "benchmarks/default_run.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "gpu": gpu_name(),
        "versions": versions(),
        "exit_code": code,
        "seconds": end - start,
        "parts_seconds": parts,
    }
    if code == 0:
        training = sum(parts.get(name, 0.0) for name in PARTS if "step" in name)
        results |= {"training": training_of(steps), "evaluation": evaluation_of(work)}
        results |= share("evaluation_of_this_run", parts["evaluation: writing, rendering, scoring"], training)
        if args.evaluation:
            own = json.loads(args.evaluation.read_text(encoding="utf-8"))
            results |= {"evaluation_of_real_lengths": own}
            results |= share("evaluation_of_real_lengths", own["seconds"], training)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))
    return code


def share(name: str, seconds: float, training: float) -> dict[str, float]:
    """Of the training, whose seconds include the proof before the first step."""
    return {f"{name}_share_of_training": seconds / training}


if __name__ == "__main__":
    sys.exit(main())
