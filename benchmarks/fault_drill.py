"""Break real trainings again and again, and print each figure of reliability beside its target.

    python benchmarks/fault_drill.py --kills 4 --trials 1 --wrapper_trials 0      # a look, a minute or two
    python benchmarks/fault_drill.py --kills 100 --out benchmarks/results/fault_drill

A tiny Qwen2.5-VL is trained on a CPU for four epochs, a checkpoint every 2 steps, on one rank and on two (DDP and
ZeRO-3 in turn). It is killed by SIGKILL at random instants, one rank or all, and resumed until it has ended; its
weights and the pages of every step must then be those of a run that nobody has killed. Smaller drills follow, one for
each fault. Ranks are forked from a process that has loaded torch (tests/warm.py); where the wrapper is the one that is
drilled, everything is started as a user does. OUT.json and OUT.md keep the table; exits with 1 where a figure misses.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
import warm
from conftest import ON_CPU, PROGRAMS, make_base, make_pages, small_run, weights
from fault_runs import End, members, run_with_fault

from training.checkpoints import checkpoints_in, fault_of, newest_whole, step_of

ROOT = Path(__file__).resolve().parents[1]
PAGES, PER_STEP, EPOCHS = 16, 4, 4
STEPS = PAGES // PER_STEP * EPOCHS
WAYS = {"1 rank": ("plain", 1), "2 ranks, DDP": ("DDP", 2), "2 ranks, ZeRO-3": ("ZeRO-3", 2)}
FINAL, OUTPUT = "holo1_dom_finetune_final", "holo1_dom_finetune_output"


@dataclass
class Row:
    """A figure: `good` of `trials` as the target asks; `worst_s`: the longest that was waited for."""

    fault: str
    target: str
    trials: int = 0
    good: int = 0
    worst_s: float = 0.0
    misses: list[str] = field(default_factory=list)

    def count(self, good: bool, seconds: float = 0.0, why: str = "") -> None:
        self.trials += 1
        self.good += good
        self.worst_s = max(self.worst_s, seconds)
        if not good:
            self.misses.append(why)
            print(f"    MISSED: {why}", flush=True)

    def cells(self) -> list[str]:
        return [self.fault, f"{self.good} of {self.trials}", f"{self.worst_s:.1f} s" * bool(self.worst_s), self.target]


@dataclass
class Drill:
    """What all drills share."""

    base: Path
    pages: Path
    work: Path
    rng: random.Random
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def place(self) -> Path:
        folder = self.work / str(next(self.numbers))
        folder.mkdir()
        return folder

    def flags(self, ranks: int, **changes: object) -> list[str]:
        step = {"num_samples": PAGES, "gradient_accumulation_steps": PER_STEP // ranks, "num_train_epochs": EPOCHS}
        step |= {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "learning_rate": 1e-3}
        return small_run(self.base, self.pages, **(step | changes))

    def run(self, way: str, place: Path, *flags: str, **options: object) -> End:
        kind, ranks = WAYS[way]
        # Nothing is rendered: a browser is no part of this.
        env = {"TRAINED": str(place / "trained"), "PATH": "/nowhere", "PLAYWRIGHT_BROWSERS_PATH": str(self.work)}
        options["env"] = env | options.pop("env", {})
        return run_with_fault(kind, [*self.flags(ranks), *flags], place, ranks=ranks, **options)


def trained_pages(place: Path) -> dict[tuple[str, int], list[list[str]]]:
    """(rank's file, step) to the pages of each time that it was trained."""
    found: dict[tuple[str, int], list[list[str]]] = {}
    for file in sorted((place / "trained").iterdir()):
        for line in file.read_text().splitlines():
            if line.endswith("}"):  # a kill may cut a line
                row = json.loads(line)
                found.setdefault((file.name, row["step"]), []).append(row["pages"])
    return found


def difference(place: Path, reference: Path) -> str:
    """How a run differs from one that nobody has touched; "" when it does not."""
    pages, wanted = trained_pages(place), trained_pages(reference)
    if pages.keys() != wanted.keys():
        return f"steps that only one of both has: {sorted(pages.keys() ^ wanted.keys())[:4]}"
    for where, times in pages.items():
        if any(each != wanted[where][0] for each in times):
            return f"{where} trained on {times}, not on {wanted[where][0]}"
    ours, theirs = weights(place / FINAL), weights(reference / FINAL)
    if ours.keys() != theirs.keys():
        return "the final folders have different tensors"
    worst = max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)
    return f"weights apart by up to {worst:.2e}" if worst > 0 else ""


# -----------------------------------------------------------------------------
# Kills


class Killer:
    """Waits for its instant, kills, and waits for the others to end by themselves."""

    def __init__(self, drill: Drill, log: Path, seconds: float):
        self.log, rng = log, drill.rng
        # Half of the instants anywhere in a run, half of them among its steps, where checkpoints are written.
        self.after_s = rng.uniform(0, 0.9 * seconds)
        self.steps, self.then_s = (rng.randint(1, 6), rng.uniform(0, 0.4)) if rng.random() < 0.5 else (0, 0.0)
        self.whom = rng.choice(["one", "all"])
        self.rng, self.killed, self.begun, self.struck = rng, False, time.monotonic(), 0.0

    def steps_said(self) -> int:
        return sum(line.startswith("step ") for line in self.log.read_text(errors="replace").splitlines())

    def __call__(self, processes: list[warm.Forked]) -> None:
        begun, until = self.steps_said(), time.monotonic() + (60 if self.steps else self.after_s)
        while time.monotonic() < until and (not self.steps or self.steps_said() - begun < self.steps):
            if all(process.poll() is not None for process in processes):
                return
            time.sleep(0.01)
        time.sleep(self.then_s)
        victims = processes if self.whom == "all" else [self.rng.choice(processes)]
        for process in victims:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                self.killed, self.struck = True, time.monotonic()


def kill_and_resume(drill: Drill, way: str, kills: int, rows: dict[str, Row]) -> None:
    """So many kills, over as many trainings as that takes; each training is compared once it has ended."""
    reference = drill.place()
    whole = drill.run(way, reference)
    if whole.codes != [0] * WAYS[way][1]:
        raise SystemExit(f"{way}: the run without a fault ended with {whole.codes}:\n{whole.said[-3000:]}")
    print(f"{way}: {STEPS} steps in {whole.seconds:.1f} s, {whole.cpu_seconds:.1f} s of CPU", flush=True)
    left = kills
    while left > 0:
        place, resumes, in_this = drill.place(), [], 0
        while True:
            killer = Killer(drill, place / "said.log", whole.seconds)
            (place / "said.log").touch()
            # The last of a training's kills is followed by a run to the end.
            end = drill.run(way, place, *resumes, act=killer if left and in_this < 12 else None)
            resumes = ["--resume"]
            if not killer.killed:
                break
            left, in_this = left - 1, in_this + 1
            if WAYS[way][1] > 1 and killer.whom == "one":
                took = end.seconds - (killer.struck - killer.begun)
                good = took <= 15 and not {None, 0} & {*end.codes} and not end.left
                rows["death"].count(good, took, f"{way}: {end.codes} after {took:.1f} s, left {end.left}")
            # Begun before the first checkpoint it begins again by itself; before the folder was there, --resume has
            # nothing that it could go on with.
            if not (place / OUTPUT / "run.json").exists():
                resumes = []
        good = end.codes == [0] * WAYS[way][1]
        apart = difference(place, reference) if good else f"ended with {end.codes}: {end.said[-600:]}"
        for _ in range(in_this):
            rows["kill"].count(not apart, why=f"{way}: {apart}")
        print(f"  {way}: {in_this} kills, {apart or 'the same pages and weights'}", flush=True)
        shutil.rmtree(place)


# -----------------------------------------------------------------------------
# One fault each


def newest_quietly(place: Path) -> Path | None:
    with contextlib.redirect_stdout(io.StringIO()):  # it names each that it passes over
        return newest_whole(place / OUTPUT)


def resumable(place: Path, at_least: int = 2) -> bool:
    newest = newest_quietly(place)
    return newest is not None and (step_of(newest) or 0) >= at_least


def drill_fault(drill: Drill, row: Row, way: str, fault: str, wanted: Callable[[End, Path], bool], *flags: str) -> None:
    place = drill.place()
    # What one rank knows, full memory or a full disk, the others hear of in the wrapper's folder.
    end = drill.run(way, place, *flags, fault=fault, wrapped=fault.startswith(("full", "oom")))
    good = wanted(end, place) and not end.left
    row.count(good, end.seconds, f"{way}, {fault}: {end.codes}, left {end.left}: {end.said[-800:]}")
    shutil.rmtree(place)


def all_end_with(code: int) -> Callable[[End, Path], bool]:
    return lambda end, place: set(end.codes) == {code} and resumable(place)


def saved_at(step: int) -> Callable[[End, Path], bool]:
    """All stop together, at the end of this step."""

    def found(end: End, place: Path) -> bool:
        return set(end.codes) == {85} and step_of(newest_quietly(place)) == step

    return found


def hang_is_told(end: End, place: Path) -> bool:
    stacks = list((place / OUTPUT / "stacks").glob("rank-*.txt"))
    return all_end_with(84)(end, place) and len(stacks) == len(end.codes) and "pages: " in end.said


def disk_is_told(end: End, place: Path) -> bool:
    return all_end_with(81)(end, place) and not list((place / OUTPUT).glob("*.partial"))


def small_drills(drill: Drill, trials: int, rows: dict[str, Row]) -> None:
    for way in [way for way in WAYS for _ in range(trials)]:
        ranks = WAYS[way][1]
        step, struck = drill.rng.randint(3, 8), drill.rng.randrange(ranks)
        where = f"@{struck}:{step}"
        for kind in ("term", "int", "hup", "usr1"):
            drill_fault(drill, rows["signal"], way, kind + where, saved_at(step))
        drill_fault(drill, rows["nan"], way, "nan" + where, all_end_with(82))
        drill_fault(drill, rows["disk"], way, f"full@0:{step + step % 2}", disk_is_told)
        drill_fault(drill, rows["hang"], way, "hang" + where, hang_is_told, "--hang_timeout", "5")
        drill_fault(drill, rows["memory"], way, "oomhost" + where, lambda end, place: set(end.codes) == {83})


def tear(drill: Drill, row: Row) -> None:
    """Every file of a checkpoint in turn: a byte flipped, cut in half, removed; found and passed over each time."""
    for way in WAYS:
        place = drill.place()
        drill.run(way, place, "--max_steps", "4")
        newest, older = checkpoints_in(place / OUTPUT)
        for path in sorted(path for path in newest.rglob("*") if path.is_file()):
            content = path.read_bytes()
            if not content:
                continue
            middle = len(content) // 2
            torn = {"flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]}
            for how, bad in (torn | {"cut": content[:middle], "empty": b""}).items():
                path.write_bytes(bad)
                row.count(bool(fault_of(newest)), why=f"{way}: {path.name} {how} is not found")
            path.unlink()
            row.count(newest_quietly(place) == older, why=f"{way}: {path.name} lost, not passed over")
            path.write_bytes(content)
        row.count(newest_quietly(place) == newest, why=f"{way}: whole, and passed over")
        shutil.rmtree(place)


# -----------------------------------------------------------------------------
# The wrapper, with the real launcher


def under_wrapper(drill: Drill, number: int) -> tuple[int, float, list[int]]:
    """Signalled in the middle of training: (its code, seconds until all are gone, who is left after five)."""
    place = drill.place()
    wrapper = [sys.executable, str(ROOT / "run_deepspeed_training.py"), "--num_gpus", "2"]
    wrapper += ["--script", str(PROGRAMS / "faults.py")]
    environment = warm.usual_environment() | ON_CPU | {"PLAYWRIGHT_BROWSERS_PATH": str(drill.work), "DRILL": str(place)}
    log = place / "said.log"
    with log.open("wb") as stream:
        pipes = {"stdout": stream, "stderr": stream, "env": environment, "start_new_session": True}
        process = subprocess.Popen([*wrapper, *drill.flags(2, max_steps=400)], cwd=place, **pipes)
        until = time.monotonic() + 180
        while "\nstep 3/" not in log.read_text(errors="replace") and time.monotonic() < until:
            time.sleep(0.05)
        start = time.monotonic()
        process.send_signal(number)
        code = process.wait(120)
    while (alive := members(f"DRILL={place}\0", [])) and time.monotonic() - start < (5 if code < 0 else 60):
        time.sleep(0.05)
    seconds = time.monotonic() - start
    good_code = code if code < 0 or resumable(place) else 1
    return good_code, seconds, alive


def wrapper_drills(drill: Drill, trials: int, rows: dict[str, Row]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        for _ in range(trials):
            code, seconds, left = under_wrapper(drill, number)
            rows["wrapper"].count(code == 85 and not left, seconds, f"{number}: {code}, left {left}")
    for _ in range(trials):
        code, seconds, left = under_wrapper(drill, signal.SIGKILL)
        rows["orphans"].count(code == -signal.SIGKILL and not left, seconds, f"left after 5 s: {left}")


# -----------------------------------------------------------------------------
# The table

ROWS = {
    "kill": Row("SIGKILL at a random instant, resumed", "all resumed; pages and weights as without a kill"),
    "death": Row("a rank dies", "the others end within 15 s, none with 0, nobody is left"),
    "signal": Row("SIGTERM, SIGINT, SIGHUP, SIGUSR1 to one rank", "all save the same step, 85"),
    "nan": Row("gradients not finite on one rank", "82, not one poisoned update"),
    "memory": Row("memory runs out on one rank", "83"),
    "disk": Row("disk full while saving", "81, the earlier checkpoint untouched, nothing half-written"),
    "hang": Row("a rank hangs (--hang_timeout 5)", "84, stacks of all ranks"),
    "tear": Row("a torn checkpoint: each file flipped, cut, empty, lost", "all found and passed over"),
    "wrapper": Row("SIGTERM or Ctrl-C to the wrapper", "85, nobody is left"),
    "orphans": Row("SIGKILL of the wrapper", "no rank alive after 5 s"),
}
ELSEWHERE = {
    "memory runs out in the collate": "tests/test_collate.py",
    "broken pages": "tests/training/test_dataset.py",
    "the Hub refuses or fails": "tests/training/test_publishing.py, tests/test_push.py",
    "bad configuration": "tests/test_run_deepspeed_training.py, tests/training/test_settings.py",
    "foreign checkpoint": "tests/training/test_run_record.py",
}


def table(rows: dict[str, Row], seconds: float) -> str:
    lines = ["| fault | as wanted | longest | what is wanted |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row.cells())} |" for row in rows.values() if row.trials]
    lines += [f"| {fault} | see {where} | | |" for fault, where in ELSEWHERE.items()]
    return "\n".join([*lines, "", f"{seconds / 60:.0f} minutes on {platform.processor() or platform.machine()}"])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs, half of them with one rank")
    parser.add_argument("--trials", type=int, default=2, help="of each other fault, on one rank, DDP and ZeRO-3")
    parser.add_argument("--wrapper_trials", type=int, default=2, help="of each signal to the wrapper, started cold")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--out", type=Path, help="results without their ending")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, start, rows = parse(argv), time.monotonic(), ROWS
    with tempfile.TemporaryDirectory(prefix="fault_drill_") as work:
        place = Path(work)
        base, pages = make_base(place / "base", dtype=torch.float32), make_pages(place / "pages", PAGES + 2)
        drill = Drill(base, pages, place, random.Random(args.seed))
        shares = {"1 rank": args.kills // 2, "2 ranks, DDP": args.kills // 4}
        shares["2 ranks, ZeRO-3"] = args.kills - sum(shares.values())
        for way, kills in shares.items():
            if kills:
                kill_and_resume(drill, way, kills, rows)
        if args.trials:
            tear(drill, rows["tear"])
            small_drills(drill, args.trials, rows)
        wrapper_drills(drill, args.wrapper_trials, rows)
    seconds = time.monotonic() - start
    print(told := table(rows, seconds))
    if args.out:
        args.out.with_suffix(".md").write_text(told + "\n")
        facts = {"seconds": seconds, "seed": args.seed, "rows": {name: vars(row) for name, row in rows.items()}}
        args.out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    return int(any(row.good < row.trials for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
