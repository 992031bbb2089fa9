"""Measures training steps of this project beside other ways to train the same pages from the same weights.

    python benchmarks/step_speed.py --base_model ./holo1_3b_shapes --weights --pages pages_like_real \\
        --steps 8 --out benchmarks/results/h200_3b.json --extra_ours='--micro_batch 8'
    python benchmarks/step_speed.py --table benchmarks/results/h200_3b.json

The base may be of any family whose shapes `make_shapes.py` writes.

Ways: `ours` is `run_deepspeed_training.py` as a user starts it; `plain`, `trl` and `llamafactory` are in rivals.py,
each also as `plain-nockpt` and so on, without activation checkpointing. Every way is a process of its own with a limit,
ended by SIGKILL once its last step is logged, and its result is written before the next way begins; with `--total_s`
the ways share what is left of it. SIGTERM, SIGINT and SIGHUP end the way that runs, too, and what it has measured is
written. All seconds are the clock of this process, from one step's line to the next; ours goes first, since the others
take its cleaned pages and its order.

Sections: Command line, Pages, Ways, Reading, Results, Main.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import json
import multiprocessing
import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

HELD_OUT = 2  # pages that ours writes after training, which is never reached here
FIRST_MEASURED = 3  # step; before it, kernels are compiled and memory pools grow
OUTPUT = "holo1_dom_finetune_output"
PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "trl", "liger_kernel", "flash-linear-attention")
LLAMAFACTORY_PACKAGES = ("llamafactory", "transformers", "accelerate", "datasets", "liger-kernel", "flash-attn")
MARK = "STEP_SPEED_RUN"  # in the environment of everything that is started here
PLAN = r"peak: ([\d.]+) GiB measured, ([\d.]+) planned"  # said by ours once all is trained
PLAN_WAIT_S = 30
BETWEEN_S = 40  # kept back of --total_s for each way: it waits for the plan, is ended, and the pages' costs are counted
LEAST_S = 30  # less than that is not worth the start of a way
ENDED_BY = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# -----------------------------------------------------------------------------
# Command line


def read_command_line(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--base_model", type=Path, help="folder with weights, or made by make_shapes.py")
    parser.add_argument("--weights", action="store_true", help="write random weights into it, if it has none")
    parser.add_argument("--pages", type=Path, help="imagefolder, with at least pages_per_step x steps + 2 pages")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pages_per_step", type=int, default=8, help="over all GPUs")
    parser.add_argument(
        "--rows_per_step", type=int, help="of llamafactory, over all GPUs; default: one for each 4 pages"
    )
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--ways", default="ours,plain,trl", help="by commas; ours always goes first")
    parser.add_argument(
        "--extra_ours", default="", help="more flags of holo1_dom_finetune.py: --extra_ours='--fuse no'"
    )
    parser.add_argument("--llamafactory_site", type=Path, help="folder of packages that go first in its way")
    parser.add_argument("--max_pixels", type=int, help="of every way; default: the training's own")
    parser.add_argument("--max_html_tokens", type=int, default=4096)
    parser.add_argument("--limit_s", type=float, default=300, help="time limit of each way, start-up included")
    parser.add_argument(
        "--total_s", type=float, help="time limit of all ways and what lies between them; default: none"
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="folder for pages and logs, whose pages the others take when ours does not run; default: a temporary one",
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--table", type=Path, nargs="+", help="print the tables of result files, run nothing")
    args = parser.parse_args(argv)
    if args.table:
        return args
    for name in ("base_model", "pages", "out"):
        if getattr(args, name) is None:
            parser.error(f"--{name} is needed")
    args.ways = sorted(args.ways.split(","), key=lambda way: way != "ours")
    if unknown := [way for way in args.ways if way not in WAYS]:
        parser.error(f"--ways {', '.join(unknown)}: there are {', '.join(WAYS)}")
    if args.pages_per_step % args.gpus:
        parser.error(f"--pages_per_step {args.pages_per_step} cannot be shared out evenly to {args.gpus} GPUs")
    args.rows_per_step = args.rows_per_step or max(args.gpus, args.pages_per_step // 4)
    if args.rows_per_step % args.gpus or args.rows_per_step > args.pages_per_step:
        parser.error(f"--rows_per_step {args.rows_per_step}: a multiple of {args.gpus}, up to {args.pages_per_step}")
    needed = args.pages_per_step * args.steps + HELD_OUT
    with (args.pages / "metadata.jsonl").open(encoding="utf-8") as lines:
        found = sum(1 for line in lines if line.strip())
    if found < needed:
        parser.error(f"--pages {args.pages} has {found} pages, {needed} are needed: fewer --steps, or more pages")
    args.base_model, args.pages, args.out = (path.resolve() for path in (args.base_model, args.pages, args.out))
    if not args.weights and not list(args.base_model.glob("*.safetensors")):
        parser.error(f"--base_model {args.base_model} has no weights; --weights writes random ones")
    args.work = (args.work or Path(tempfile.mkdtemp(prefix="step_speed-"))).resolve()
    if "ours" in args.ways and (args.work / OUTPUT).exists():  # its order would be taken for that of this run
        parser.error(f"--work {args.work} has an earlier run of ours; give a new folder")
    args.work.mkdir(parents=True, exist_ok=True)
    return args


# -----------------------------------------------------------------------------
# Pages


def page_settings(args: argparse.Namespace):
    from training import settings as training_settings

    names = {"base_model": str(args.base_model), "dataset": str(args.pages), "eval_pages": HELD_OUT}
    names |= {"num_samples": args.pages_per_step * args.steps, "max_html_tokens": args.max_html_tokens}
    if args.max_pixels:
        names["max_pixels"] = args.max_pixels
    return training_settings.PageSettings(**names)


class Pages:
    """The training pages as ours has prepared them, in the order in which it trained them where that is known."""

    def __init__(self, args: argparse.Namespace):
        import holo1_dom_finetune as training
        from training.collecting import load_pages_from_disk

        settings, output = page_settings(args), args.work / OUTPUT
        processor = training.load_processor(args.base_model, settings)
        config = training.load_config(Path(args.base_model), settings)
        encoder = training.PageEncoder(processor, settings.prompt, training.family_of(config))
        self.arrow = output / "pages" / "train.arrow"
        if not self.arrow.is_file():  # ours was not asked for, or ended early
            training.prepare_pages(settings, SimpleNamespace(output_dir=str(output), seed=42), encoder, processor)
        table, _ = load_pages_from_disk(output)
        counted = table.select_columns(["name", "html_tokens", "image_tokens"])
        self.names = list(counted["name"])
        self.sizes = [(page["html_tokens"], page["image_tokens"]) for page in counted]
        self.question = encoder.question_tokens
        self.tokens = [self.question + html + image for html, image in self.sizes]
        wanted = args.pages_per_step * args.steps
        if len(self.names) < wanted:
            raise SystemExit(f"{len(self.names)} of {wanted} pages are left: {output / 'dropped_pages.jsonl'} says why")
        steps = read_order(output / "page_order.jsonl", self.names, args.pages_per_step, args.steps)
        self.order_known = steps is not None
        every = range(0, wanted, args.pages_per_step)
        self.steps = steps or [list(range(start, start + args.pages_per_step)) for start in every]

    def flops(self, base: Path) -> list[float]:
        """Useful operations of each step: products and attention forward and backward, nothing recomputed."""
        from transformers import AutoConfig

        from families import family_of, page_costs

        config = AutoConfig.from_pretrained(base)
        counted = ({"html_tokens": html, "image_tokens": image} for html, image in self.sizes)
        costs = page_costs.flops_of_pages(family_of(config).shape(config), counted, self.question)
        return [sum(costs[page] for page in step) for step in self.steps]

    def summary(self) -> dict:
        count = len(self.sizes)
        html, image = (sum(column) / count for column in zip(*self.sizes))
        return {"count": count, "mean_html_tokens": html, "mean_image_tokens": image, "order_of_ours": self.order_known}


def read_order(file: Path, names: list[str], pages_per_step: int, steps: int) -> list[list[int]] | None:
    """The pages of each step as ours wrote them down; None where it did not, or where they do not fit."""
    if not file.is_file():
        return None
    place = {name: number for number, name in enumerate(names)}
    order = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["step"] in order:  # a second epoch, or a second run in the same folder
            break
        order[row["step"]] = [place.get(name) for name in row["pages"]]
    found = [order.get(step, []) for step in range(1, steps + 1)]
    whole = all(len(set(pages) - {None}) == len(pages) == pages_per_step for pages in found)
    return found if whole else None


# -----------------------------------------------------------------------------
# Ways

WAYS = {
    "ours": "run_deepspeed_training.py with ds_z3.json, and the flags under `command`",
    "plain": "HF Trainer, ZeRO-3, 1 page per micro-batch, SDPA, activation checkpointing; linear attention by "
    "flash-linear-attention where that is installed",
    "plain-nockpt": "plain without activation checkpointing",
    "trl": "TRL's SFTTrainer as documented for vision-language models, same ZeRO-3 JSON, 1 page per micro-batch",
    "trl-nockpt": "trl without activation checkpointing",
    "llamafactory": "LLaMA-Factory with neat_packing, same ZeRO-3 JSON, all weights trained, rows as the notes say, "
    "activation checkpointing as it has it by default",
    "llamafactory-nockpt": "llamafactory without activation checkpointing",
    "llamafactory-liger": "llamafactory with Liger's kernels, its own switch, off by default",
}
NEWLINE_NOTE = "supervises one token more per page, the newline that the chat template puts after the end of the turn"
TRL_NOTES = (
    "takes the mean of page means (Qwen2.5-VL declares accepts_loss_kwargs False); the loss here is re-weighted by "
    "tokens, logged_loss is its own",
    NEWLINE_NOTE,
)
LLAMAFACTORY_NOTES = (
    "takes the mean of the rows' means; the loss here is re-weighted by tokens, logged_loss is its own",
    NEWLINE_NOTE,
)
ROWS = r"rows: (.+)"  # said by rivals.py once its pages are packed


def our_command(args: argparse.Namespace) -> list[str]:
    settings = page_settings(args)
    flags = {name: getattr(settings, name) for name in ("base_model", "num_samples", "eval_pages")}
    flags["dataset"] = settings.dataset[0]
    flags |= {"max_html_tokens": settings.max_html_tokens, "max_pixels": settings.max_pixels}
    flags |= {"gradient_accumulation_steps": args.pages_per_step // args.gpus}  # x 1 page; ours regroups them
    flags |= {"num_train_epochs": 1, "save_strategy": "no", "report_to": "none", "output_dir": OUTPUT}
    typed = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    wrapper = str(HERE.parent / "run_deepspeed_training.py")
    return [sys.executable, wrapper, "--num_gpus", str(args.gpus), *typed, *shlex.split(args.extra_ours)]


def rival_command(way: str, args: argparse.Namespace, pages: Pages) -> list[str]:
    import use_model_from_hub as use
    from training import settings as training_settings

    settings, same = page_settings(args), ("learning_rate", "lr_scheduler_type", "warmup_steps")
    job = {
        "way": way.split("-")[0],
        "checkpointing": not way.endswith("-nockpt"),
        "liger": way.endswith("-liger"),
        "base_model": str(args.base_model),
        "arrow": str(pages.arrow),
        "order": [page for step in pages.steps for page in step],
        "tokens": [pages.tokens[page] for step in pages.steps for page in step],
        "pages_per_step": args.pages_per_step,
        "rows_per_step": args.rows_per_step,
        "prompt": settings.prompt,
        "min_pixels": use.Recipe.min_pixels,
        "max_pixels": settings.max_pixels,
        "training": {name: training_settings.TRAINING_DEFAULTS[name] for name in same},
        "output_dir": str(args.work / way),
    }
    file = args.work / f"{way}.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    # An address, not --standalone: that names this machine, and a container without DNS does not know its own name.
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(args.gpus)]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    return [sys.executable, *launcher, str(HERE / "rivals.py"), str(file)]


def environment_of(way: str, args: argparse.Namespace, env: dict[str, str]) -> dict[str, str]:
    if not way.startswith("llamafactory") or not args.llamafactory_site:
        return env
    folders = [str(args.llamafactory_site.resolve()), *filter(None, [env.get("PYTHONPATH")])]
    return env | {"PYTHONPATH": os.pathsep.join(folders)}


def notes_of(way: str, args: argparse.Namespace) -> list[str]:
    """What is known to differ from ours, and with what it ran."""
    if way.startswith("trl"):
        return [*TRL_NOTES, f"Liger: {liger_obstacle()}"]
    if not way.startswith("llamafactory"):
        return []
    log = args.work / f"{way}.log"
    rows = re.search(ROWS, log.read_text(encoding="utf-8")) if log.is_file() else None
    first = [str(args.llamafactory_site)] if args.llamafactory_site else []
    with_versions = []
    for name in LLAMAFACTORY_PACKAGES:
        if found := next(iter(importlib.metadata.distributions(name=name, path=[*first, *sys.path])), None):
            with_versions.append(f"{name} {found.version}")
    return [*LLAMAFACTORY_NOTES, *([f"rows: {rows[1]}"] if rows else []), ", ".join(with_versions)]


def patch_with_liger() -> None:
    importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_qwen2_5_vl()  # no requirement of ours


@functools.lru_cache(maxsize=1)
def liger_obstacle() -> str:
    """Why Liger's kernels are left off, in a process of its own: a call that works would patch the model's classes."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as another:
        try:
            another.submit(patch_with_liger).result(timeout=120)
        except Exception as error:  # whatever stands in its way is what the table tells
            why = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
            return f"off, it cannot patch Qwen2.5-VL here: {why[:200]}"
    return "off, although it could patch Qwen2.5-VL here"


def environment(gpus: int, gpu: bool) -> dict[str, str]:
    env = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env |= {"PYTHONUNBUFFERED": "1", "DS_BUILD_OPS": "0"}
    # The same for all, as our wrapper sets it: torchrun would take 1, and pictures are resized on these threads.
    env["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // gpus))
    if not gpu:
        env["DS_ACCELERATOR"] = "cpu"
    return env | dict(os.environ)


# -----------------------------------------------------------------------------
# Reading

OUR_FIGURES = {
    "step": r"\bstep (\d+)/\d+",
    "loss": r"\bloss (\S+)",
    "logged_pages_per_second": r"([\d.,]+) pages/s",
    "logged_mfu": r"\bMFU ([\d.,]+) ?%",
    "data_wait_share": r"\bwait ([\d.,]+) ?%",
    "peak_gib": r"([\d.,]+) GiB",
}


def read_step(line: str) -> dict[str, float] | None:
    """The figures of one step's log line, of ours or of rivals.py; None for any other line."""
    if line.startswith("STEP {"):
        return json.loads(line[5:])
    found = {name: re.search(pattern, line) for name, pattern in OUR_FIGURES.items()}
    if not found["step"] or not found["loss"]:
        return None
    figures = {name: float(match[1].replace(",", "")) for name, match in found.items() if match}
    for name in ("logged_mfu", "data_wait_share"):
        if name in figures:
            figures[name] /= 100
    return figures | {"step": int(figures["step"])}


class Ended(BaseException):
    """A signal has come that asks this process to end. No Exception: nothing that goes on after one is to catch it."""


def end_by_signal(number: int, frame: object) -> None:
    for other in ENDED_BY:  # what is cleared up is not broken off by a second one
        signal.signal(other, signal.SIG_IGN)
    raise Ended(signal.Signals(number).name)


class Way:
    """One process tree: started, read line by line, and ended."""

    def __init__(self, command: list[str], log: Path, cwd: Path, env: dict[str, str]):
        self.id, self.log, self.arrived = uuid.uuid4().hex, log, queue.SimpleQueue()
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        env = {**env, MARK: self.id}
        self.process = subprocess.Popen(command, cwd=cwd, env=env, text=True, start_new_session=True, **options)
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        with self.log.open("w", encoding="utf-8") as log:
            for line in self.process.stdout:
                self.arrived.put((time.monotonic(), line))
                log.write(line)
                log.flush()
        self.arrived.put(None)

    def steps(self, wanted: int, limit_s: float) -> tuple[list[dict], str]:
        """Figures of each step, and how it ended. The seconds between two lines are measured here."""
        found = []
        try:
            return found, self.read_steps(found, wanted, time.monotonic() + limit_s) or f"time limit of {limit_s:.0f} s"
        except Ended as ended:
            return found, str(ended)

    def read_steps(self, found: list[dict], wanted: int, deadline: float) -> str | None:
        """Adds each step's figures to `found`; how it ended, None where `deadline` (monotonic) came first."""
        before = None
        while len(found) < wanted:
            try:
                arrived = self.arrived.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if arrived is None:
                return f"exit code {self.process.wait()}"
            if figures := read_step(arrived[1]):
                if before is not None:
                    figures["seconds"] = arrived[0] - before
                before = arrived[0]
                found.append(figures)
                print(
                    f"  step {figures['step']}: loss {figures['loss']:.4f}, {figures.get('seconds', 0):.2f} s",
                    flush=True,
                )
        return "all steps"

    def wait_for(self, pattern: str, limit_s: float) -> re.Match | None:
        """The first line from here on in which `pattern` stands; None where none comes in time."""
        deadline = time.monotonic() + limit_s
        while True:
            try:
                arrived = self.arrived.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if arrived is None:
                return None
            if found := re.search(pattern, arrived[1]):
                return found

    def end(self, grace_s: float) -> None:
        """SIGKILL; after `grace_s`, in which our wrapper's own watchdog clears up, also whatever is left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        start = time.monotonic()
        while (left := self.members()) and time.monotonic() - start < grace_s + 20:
            for pid in left if time.monotonic() - start > grace_s else []:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def members(self) -> list[int]:
        found, mark = [], f"{MARK}={self.id}".encode()
        for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    found.append(pid)
        return found


# -----------------------------------------------------------------------------
# Results


def summarise(steps: list[dict], ending: str, pages_per_step: int, gpus: int, flops: list[float], peak: float | None):
    """One way's row. Rates are means over steps 3..N by the wall clock; with fewer steps, over what there is."""
    row = {"ended": ending, "steps_seen": len(steps)}
    if not steps:
        return row
    first = min(FIRST_MEASURED, len(steps))
    measured = [step for step in steps if step["step"] >= first and "seconds" in step]  # the first line has none
    seconds = sum(step["seconds"] for step in measured)
    row |= {
        "first_step_loss": steps[0]["loss"],
        "last_step_loss": steps[-1]["loss"],
        "measured_steps": [first, steps[-1]["step"]],
        "pages_per_second": len(measured) * pages_per_step / seconds if measured else None,
        "seconds_per_step": seconds / len(measured) if measured else None,
        "mfu": None,
        "peak_gib": max((step["peak_gib"] for step in steps if "peak_gib" in step), default=None),
        "data_wait_share": None,
    }
    if peak and measured and max(step["step"] for step in measured) <= len(flops):
        row["mfu"] = sum(flops[step["step"] - 1] for step in measured) / seconds / gpus / peak / 1e12
    if measured and all("data_wait_share" in step for step in measured):
        row["data_wait_share"] = sum(step["data_wait_share"] * step["seconds"] for step in measured) / seconds
    return row | {"seconds": [round(step.get("seconds", 0.0), 4) for step in steps], "steps": steps}


def gpu_name() -> str | None:
    """By nvidia-smi: asking torch would take memory of the GPU that is measured."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()[0].strip()
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return None


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def table(results: dict) -> str:
    """The results as Markdown."""

    def cell(row: dict, name: str, form: str, factor: float = 1) -> str:
        return form.format(factor * row[name]) if row.get(name) is not None else "–"

    lines = [
        "| way | pages/s | MFU | s/step | data wait | peak GiB per GPU | first-step loss | measured | ended |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way, row in results["ways"].items():
        cells = [
            way,
            cell(row, "pages_per_second", "{:.2f}"),
            cell(row, "mfu", "{:.1f} %", 100),
            cell(row, "seconds_per_step", "{:.2f}"),
            cell(row, "data_wait_share", "{:.1f} %", 100),
            cell(row, "peak_gib", "{:.1f}"),
            cell(row, "first_step_loss", "{:.4f}"),
            "steps {}–{}".format(*row["measured_steps"]) if "measured_steps" in row else "–",
            row["ended"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    device = f"{results['gpus']} x {results['gpu'] or 'CPU process'}"
    head = f"{results['base_model']}, {device}, {results['pages_per_step']} pages per step, {results['date']}"
    head += "" if results["first_step_comparable"] else "; the first-step losses are NOT comparable (order unknown)"
    notes = [f"- {way}: {note}" for way, row in results["ways"].items() for note in row.get("notes", [])]
    return "\n".join([head, "", *lines, *([""] if notes else []), *notes])


def shown(command: list[str], args: argparse.Namespace) -> str:
    """The command without the folders of one machine."""
    text = shlex.join(command).replace(sys.executable, "python", 1).replace(f"{HERE.parent}/", "")
    for folder in (args.base_model, args.pages, args.work):
        text = text.replace(str(folder), folder.name)
    return text


def told_outside() -> list[str]:
    """What torch was told outside the command about its memory and about what travels between GPUs, all of it inherited
    by every way."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_NCCL_HIGH_PRIORITY")
    return [f"{name}={os.environ[name]}" for name in names if name in os.environ]


def add_result(results: dict, file: Path, way: str, row: dict) -> None:
    results["ways"][way] = row
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


# -----------------------------------------------------------------------------
# Main


def limit_of(way: str, args: argparse.Namespace, started: float) -> float:
    """Seconds that `way` may take: --limit_s, or its share of what is left of --total_s since `started`."""
    if args.total_s is None:
        return args.limit_s
    to_come = len(args.ways) - args.ways.index(way)
    left = args.total_s - (time.monotonic() - started)
    return min(args.limit_s, left / to_come - BETWEEN_S)


def run_way(
    way: str, command: list[str], args: argparse.Namespace, env: dict, gpu: str | None, limit_s: float
) -> tuple:
    """(figures of each step, how it ended, more of its row: the end of its log where it did not end well, and how near
    the plan came to the peak)."""
    print(f"{way}: {shlex.join(command)}", flush=True)
    running = Way(command, args.work / f"{way}.log", args.work, env)
    try:
        steps, ending = running.steps(args.steps, limit_s)
        whole = ending == "all steps"
        # A CPU has no plan.
        plan = running.wait_for(PLAN, PLAN_WAIT_S) if whole and gpu and way == "ours" else None
    finally:
        running.end(grace_s=5 if way == "ours" else 0)
    if not whole:
        tail = running.log.read_text(encoding="utf-8")[-3000:]
        print(f"  ended by {ending}:\n{tail}", flush=True)
        return steps, ending, {"log_tail": tail}
    return steps, ending, planned_beside_measured(plan) if plan else {}


def planned_beside_measured(plan: re.Match) -> dict[str, object]:
    """Of the run's own line: GiB of the fullest batch as planned, and of the peak; and both in a note."""
    measured, planned = (float(size) for size in plan.groups())
    note = f"{planned:.1f} GiB planned for the fullest batch, {measured:.1f} measured ({planned / measured - 1:+.1%})"
    return {"planned_gib": planned, "heaviest_gib": measured, "notes": [note]}


def main() -> None:
    args, started = read_command_line(), time.monotonic()
    if args.table:
        return print("\n\n".join(table(json.loads(file.read_text(encoding="utf-8"))) for file in args.table))
    for number in ENDED_BY:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup's
            signal.signal(number, end_by_signal)
    if args.weights and not list(args.base_model.glob("*.safetensors")):
        command = [sys.executable, str(HERE / "random_weights.py"), str(args.base_model)]
        subprocess.run(command, check=True, timeout=args.total_s)

    from families import page_costs

    gpu = gpu_name()
    env, peak = environment(args.gpus, gpu is not None), page_costs.peak_tflops(gpu) if gpu else None
    results = {
        "command": shlex.join([*told_outside(), "python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "gpu": gpu,
        "gpus": args.gpus,
        "peak_tflops": peak,
        "versions": versions(),
        "base_model": args.base_model.name,
        "pages_per_step": args.pages_per_step,
        "first_step_comparable": False,
        "ways": {},
    }
    pages = None
    for way in args.ways:
        command = our_command(args) if way == "ours" else rival_command(way, args, pages or Pages(args))
        if (limit_s := limit_of(way, args, started)) < LEAST_S and args.total_s is not None:
            add_result(results, args.out, way, {"ended": f"not begun: {args.total_s:.0f} s of all ways are spent"})
            continue
        steps, ending, more = run_way(way, command, args, environment_of(way, args, env), gpu, limit_s)
        pages = pages or Pages(args)
        results |= {"pages": pages.summary(), "first_step_comparable": pages.order_known}
        row = {"what": WAYS[way], "command": shown(command, args)}
        row |= summarise(steps, ending, args.pages_per_step, args.gpus, pages.flops(args.base_model), peak)
        if notes := notes_of(way, args):
            row["notes"] = notes
        add_result(results, args.out, way, row | more)
        if ending in signal.Signals.__members__:
            raise SystemExit(f"ended by {ending}; what was measured: {args.out}")
    print(f"\n{table(results)}\n\nresults: {args.out}; logs: {args.work}")


if __name__ == "__main__":
    main()
