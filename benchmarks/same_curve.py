"""Does the fast path learn what the plain one learns? Twenty steps of each from the same weights, in one picture.

    python benchmarks/same_curve.py --base_model demo/tiny_holo1 --pages demo/pages --out results/same_curve_tiny

What two plain runs differ by, which take the pages of each step in another order, is what rounding alone does: the fast
path must lie within it. Writes OUT.json and OUT.png. The base needs weights (benchmarks/random_weights.py makes some).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "fast": ["--fast", "True"],
    "plain": ["--fast", "False"],
    "plain, other order within each step": ["--fast", "False"],
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--base_model", type=Path, required=True, help="folder with weights")
    parser.add_argument("--pages", type=Path, required=True, help="folder with metadata.jsonl and pictures")
    parser.add_argument("--out", type=Path, required=True, help="results without their ending")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each way")
    parser.add_argument("--pages_per_step", type=int, default=8, help="pages in each of them")
    parser.add_argument("--gpus", type=int, default=1, help="ways that run at the same time, each on a GPU of its own")
    parser.add_argument("--learning_rate", default="1e-5", help="as for --learning_rate of the training")
    parser.add_argument("--master_port", type=int, default=29600, help="of the first way; the others take the next")
    parser.add_argument("--max_html_tokens", type=int, default=4096, help="longer pages are left out")
    return parser.parse_args(argv)


def losses(way: str, args: argparse.Namespace, folder: Path, number: int) -> list[float]:
    """The loss of each step; raises SystemExit with the end of the log when the training fails."""
    folder.mkdir()
    script = ROOT / "holo1_dom_finetune.py"
    if "other order" in way:
        script = ROOT / "benchmarks" / "other_order.py"
    flags = {"base_model": args.base_model.resolve(), "dataset": args.pages.resolve(), "eval_pages": 2}
    flags |= {"num_samples": args.pages_per_step * args.steps, "max_steps": args.steps, "num_train_epochs": 1000}
    flags |= {"gradient_accumulation_steps": args.pages_per_step, "learning_rate": args.learning_rate}
    flags |= {"max_html_tokens": args.max_html_tokens, "save_strategy": "no", "report_to": "none"}
    typed = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    wrapper = [sys.executable, str(ROOT / "run_deepspeed_training.py"), "--script", str(script)]
    wrapper += ["--master_port", str(args.master_port + number)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if args.gpus > 1:
        environment["CUDA_VISIBLE_DEVICES"] = str(number % args.gpus)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([*wrapper, *typed, *WAYS[way]], cwd=folder, env=environment, **pipes) as run:
        found, lines = [], []
        for line in run.stdout:
            lines.append(line)
            if match := re.match(r"step \d+/\d+ +loss ([\d.]+)", line):
                found.append(float(match[1]))
                print(f"{way}: step {len(found)}, loss {found[-1]:.4f}", flush=True)
            if len(found) == args.steps:
                run.terminate()  # what comes after the last step is not asked
                break
        run.stdout.read()
    if len(found) < args.steps:
        raise SystemExit(f"{way} ended after {len(found)} steps:\n{''.join(lines[-20:])}")
    return found


def draw(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, figsize=(8, 7), dpi=120, layout="constrained", height_ratios=(2, 1))
    for (name, values), style in zip(curves.items(), ("-", "--", ":")):
        above.plot(range(1, len(values) + 1), values, style, label=name, linewidth=2)
    above.set(ylabel="loss per supervised token", title="The same weights and pages, trained both ways")
    above.legend(frameon=False)
    for name in list(curves)[::2]:
        below.plot(
            range(1, len(curves["plain"]) + 1),
            [abs(one - other) for one, other in zip(curves[name], curves["plain"])],
            label=f"|{name} - plain|",
        )
    below.set(xlabel="optimizer step", ylabel="difference")
    below.legend(frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    place = Path(tempfile.mkdtemp(prefix="same_curve-"))
    try:
        with ThreadPoolExecutor(args.gpus) as pool:
            runs = {way: pool.submit(losses, way, args, place / str(n), n) for n, way in enumerate(WAYS)}
            curves = {way: run.result() for way, run in runs.items()}
    finally:
        shutil.rmtree(place, ignore_errors=True)
    fast, plain, turned = curves.values()
    worst = {
        "fast": max(abs(a - b) for a, b in zip(fast, plain)),
        "rounding": max(abs(a - b) for a, b in zip(turned, plain)),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "base_model": args.base_model.name,
        "pages_per_step": args.pages_per_step,
        "worst": worst,
        "losses": curves,
    }
    args.out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    draw(curves, args.out.with_suffix(".png"))
    print(f"largest difference to the plain run: fast {worst['fast']:.4f}, another order {worst['rounding']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
