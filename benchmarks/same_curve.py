"""Do two ways of training learn the same? Each from the same weights, their losses step by step, in one picture.

    python benchmarks/same_curve.py --base_model demo/tiny_holo1 --pages demo/pages --out results/same_curve_tiny
    python benchmarks/same_curve.py --base_model ./holo1_3b_shapes --pages ./pages_like_real --pages_per_step 4 \\
        --steps 60 --ways ours,ours-seed2,ours-8bit,ours-fp8 --total_s 540 --out results/same_curve_8bit

The first of `--ways` is the one beside which the others are held. What it differs by from itself where the pages of
each step come in another order (`-order2`) is what rounding alone does. With another seed (`-seed2`) all pages come in
another order, so a single step says nothing, but the end of both curves does: what changes arithmetic on purpose has to
end as near. Writes OUT.json after each way, and OUT.png; what stands there is not run again (--again: it is), so a call
that --total_s has ended goes on where it was. The base needs weights (benchmarks/random_weights.py makes some).
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from step_speed import Way, environment, gpu_name, versions

ROOT = Path(__file__).resolve().parents[1]
ORDER2, SEED2 = "pages of each step in another order", "another seed"
# A way by its name: (what stands in the picture, flags of the training).
WAYS: dict[str, tuple[str, list[str]]] = {
    "ours": ("ours", []),
    "ours-order2": (f"ours, {ORDER2}", []),
    "ours-seed2": (f"ours, {SEED2}", ["--data_seed", "4242"]),
    "ours-8bit": ("ours, moments in 8 bits", ["--optim", "adamw_8bit"]),
    "ours-fp8": ("ours, products in fp8", ["--fp8", "True"]),
    "ours-fp8-8bit": ("ours, products in fp8, moments in 8 bits", ["--fp8", "True", "--optim", "adamw_8bit"]),
    "plain": ("plain", ["--fast", "False"]),
    "plain-order2": (f"plain, {ORDER2}", ["--fast", "False"]),
}
LAST = 6  # the end of a curve: the mean of its last sixth
NONE = 5e-5  # where a logarithmic scale shows no difference at all
START_S = 30  # a way that has less left is not begun


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--base_model", type=Path, required=True, help="folder with weights")
    parser.add_argument("--pages", type=Path, required=True, help="folder with metadata.jsonl and pictures")
    parser.add_argument("--out", type=Path, required=True, help="results without their ending")
    parser.add_argument("--ways", default="plain,ours,plain-order2", help=f"by commas, of {', '.join(WAYS)}")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each way")
    parser.add_argument("--pages_per_step", type=int, default=8, help="pages in each of them")
    parser.add_argument("--gpus", type=int, default=1, help="ways that run at the same time, each on a GPU of its own")
    parser.add_argument("--learning_rate", default="1e-5", help="as for --learning_rate of the training")
    parser.add_argument("--master_port", type=int, default=29600, help="of the first way; the others take the next")
    parser.add_argument("--max_html_tokens", type=int, default=4096, help="longer pages are left out")
    parser.add_argument("--total_s", type=float, default=36_000, help="seconds for all ways together")
    parser.add_argument("--extra", default="", help="more flags of the training, for every way")
    parser.add_argument("--again", action="store_true", help="run also what stands in OUT.json")
    args = parser.parse_args(argv)
    args.ways = args.ways.split(",")
    if unknown := [way for way in args.ways if way not in WAYS]:
        parser.error(f"--ways {','.join(unknown)}: give some of {', '.join(WAYS)}")
    if len(set(args.ways)) < len(args.ways) or len(args.ways) < 2:
        parser.error(f"--ways {','.join(args.ways)}: give two or more, each once")
    return args


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What all curves of a file have in common."""
    names = ("steps", "pages_per_step", "learning_rate", "max_html_tokens", "extra")
    common = {"base_model": args.base_model.name, "pages": args.pages.name, "gpu": gpu_name() or "CPU"}
    return common | {name: vars(args)[name] for name in names} | {"versions": versions()}


def command_of(way: str, args: argparse.Namespace, number: int, place: Path) -> list[str]:
    script = ROOT / ("benchmarks/other_order.py" if way.endswith("-order2") else "holo1_dom_finetune.py")
    flags = {"base_model": args.base_model.resolve(), "dataset": args.pages.resolve(), "eval_pages": 2}
    flags |= {"num_samples": args.pages_per_step * args.steps, "max_steps": args.steps, "num_train_epochs": 1000}
    flags |= {"gradient_accumulation_steps": args.pages_per_step, "learning_rate": args.learning_rate}
    flags |= {"max_html_tokens": args.max_html_tokens, "save_strategy": "no", "report_to": "none"}
    # Prepared once for all, but for those that run at the same time.
    flags |= {"pages_dir": place / f"pages-{number % args.gpus}"}
    typed = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    wrapper = [sys.executable, str(ROOT / "run_deepspeed_training.py"), "--script", str(script)]
    wrapper += ["--master_port", str(args.master_port + number)]
    return [*wrapper, *typed, *WAYS[way][1], *shlex.split(args.extra)]


def losses(way: str, args: argparse.Namespace, number: int, place: Path, deadline: float) -> tuple[list[float], str]:
    """The loss of each step and "", or what there is and why it is not all; `deadline` is monotonic."""
    if (left := deadline - time.monotonic()) < START_S:
        return [], f"not begun: {max(0, left):.0f} s are left of --total_s {args.total_s:.0f}"
    folder = place / way
    folder.mkdir()
    env = environment(args.gpus, gpu_name() is not None)
    if args.gpus > 1:
        env["CUDA_VISIBLE_DEVICES"] = str(number % args.gpus)
    print(f"{way}:", flush=True)
    running = Way(command_of(way, args, number, place), place / f"{way}.log", folder, env)
    try:
        steps, ending = running.steps(args.steps, left)
    finally:
        running.end(grace_s=5)  # what comes after the last step is not asked
    found = [step["loss"] for step in steps]
    if len(found) == args.steps:
        return found, ""
    return found, f"{ending} after {len(found)} steps\n{running.log.read_text(encoding='utf-8')[-2000:]}"


def end_of(curve: list[float]) -> float:
    last = curve[-max(1, len(curve) // LAST) :]
    return sum(last) / len(last)


def compare(curves: dict[str, list[float]], first: str) -> dict[str, dict[str, float]]:
    """Of each other way, beside the `first`: the largest difference of a step, the mean one, and that of the ends."""
    found = {}
    for way in [way for way in curves if way != first]:
        apart = [abs(one - other) for one, other in zip(curves[way], curves[first], strict=True)]
        end = end_of(curves[way]) - end_of(curves[first])
        found[way] = {"worst": max(apart), "mean": sum(apart) / len(apart), "end": end}
    return found


def draw(curves: dict[str, list[float]], first: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, figsize=(8, 7), dpi=120, layout="constrained", height_ratios=(2, 1))
    for number, (way, values) in enumerate(curves.items()):
        steps, label = range(1, len(values) + 1), WAYS[way][0]
        # The first is broad and pale, and the others are broken, so that all are seen where they lie on each other.
        colour = "0.8" if way == first else f"C{number - 1}"
        style = {"color": colour, "linestyle": ("-", "--", ":", "-.")[number % 4], "label": label}
        above.plot(steps, values, linewidth=7 if way == first else 1.8, **style)
        if way != first:
            apart = [abs(one - other) for one, other in zip(values, curves[first])]
            faint = 0.4 if "seed2" in way else 1.0  # other pages in each step: its single steps are not comparable
            below.plot(steps, [max(one, NONE) for one in apart], linewidth=1.5, alpha=faint, **style)
    above.set(ylabel="loss per supervised token", title="The same weights and pages")
    above.legend(frameon=False)
    below.set(xlabel="optimizer step", ylabel="difference", yscale="log")
    below.set_title(f"beside {WAYS[first][0]} ({NONE:.5f}: all printed digits agree)", fontsize="medium")
    figure.savefig(path)
    pyplot.close(figure)


def read_earlier(path: Path, settings: dict[str, Any], again: bool) -> dict[str, Any]:
    """What an earlier call has written, to be gone on with; raises SystemExit where that was with other settings."""
    if again or not path.exists():
        return {"settings": settings, "losses": {}, "seconds": {}}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    held = earlier.get("settings", {})
    if differ := [name for name in settings if held.get(name) != settings[name]]:
        words = ", ".join(f"{name} {held.get(name)}, here {settings[name]}" for name in differ)
        raise SystemExit(f"{path} holds curves of other settings ({words}): give another --out, or --again")
    return earlier


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    file = args.out.with_name(args.out.name + ".json")
    facts = read_earlier(file, settings_of(args), args.again)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    to_do = [way for way in args.ways if way not in facts["losses"]]
    if done := [way for way in args.ways if way in facts["losses"]]:
        print(f"there already, and not run again: {', '.join(done)}", flush=True)
    place, wrong = Path(tempfile.mkdtemp(prefix="same_curve-")), {}
    deadline = time.monotonic() + args.total_s

    def run(number: int, way: str) -> None:
        start = time.monotonic()
        found, why = losses(way, args, number, place, deadline)
        if why:
            wrong[way] = why
            return print(f"{way}: {why}", flush=True)
        facts["losses"][way], facts["seconds"][way] = found, round(time.monotonic() - start, 1)
        file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    try:
        with ThreadPoolExecutor(args.gpus) as pool:
            for done in [pool.submit(run, number, way) for number, way in enumerate(to_do)]:
                done.result()
    finally:
        shutil.rmtree(place, ignore_errors=True)
    first, curves = args.ways[0], {way: facts["losses"][way] for way in args.ways if way in facts["losses"]}
    if first in curves and len(curves) > 1:
        facts["beside"] = {first: compare(curves, first)}
        file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        draw(curves, first, args.out.with_name(args.out.name + ".png"))
        for way, apart in facts["beside"][first].items():
            print(
                f"{way} beside {first}: a step differs by at most {apart['worst']:.4f}, the end by {apart['end']:+.4f}"
            )
    if wrong:
        print(f"missing: {', '.join(wrong)}; the same command goes on with them", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
