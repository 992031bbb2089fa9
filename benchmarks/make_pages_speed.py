"""Measures make_pages.py: pages a second on so many cores, and whether its memory stays the same however many pages.

    python benchmarks/make_pages_speed.py --workers 1,2 --out benchmarks/results/make_pages_speed.json
    python benchmarks/make_pages_speed.py --workers 2,16 --memory_pages 20000
    python benchmarks/make_pages_speed.py --workers 1,2 --source ../shared/pages

The real main is started as its users do, each time into an empty folder, on as many cores as workers. Pages are
invented, in the sizes of real ones (make_pages_like_real.py), or those of --source; each run makes so many a worker,
and its seconds count from the command to its end. Memory is measured over small pages, which are many in a short time:
what grows with their number would show, whatever their size.
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import make_pages_like_real
import psutil

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "make_pages.py"
SMALL = ["--widths", "200", "--height", "100"]
SECONDS_BETWEEN = 0.25
MIB = 2**20

# -----------------------------------------------------------------------------
# Pages


def write_real_sizes(folder: Path, count: int) -> Path:
    """HTML files with invented content and as many tokens (of four characters) as real ones."""
    folder.mkdir(parents=True)
    sizes = json.loads(make_pages_like_real.SIZES.read_text())["width_height_html_tokens"]
    for number, (_, _, tokens) in enumerate(make_pages_like_real.draw(sizes, count, seed=0)):
        html = make_pages_like_real.make_html(random.Random(number), tokens, lambda text: -(-len(text) // 4))
        (folder / f"{number:06d}.html").write_text(html)
    return folder


def write_small(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:06d}.html").write_text(f"<!DOCTYPE html><title>{number}</title><p>Page {number}</p>")
    return folder


# -----------------------------------------------------------------------------
# A run


@dataclass
class Measured:
    """One run of make_pages.py."""

    workers: int
    pages: int = 0
    seconds: float = 0.0
    parent_peak_mib: float = 0.0
    worker_peak_mib: float = 0.0  # the largest Python process of a worker, without its browser
    parent_mib_at: dict[int, float] = field(default_factory=dict)  # by pages done
    workers_mib_at: dict[int, float] = field(default_factory=dict)  # all with their browsers, shared memory shared out
    line: str = ""

    @property
    def pages_per_second(self) -> float:
        return self.pages / self.seconds


class Progress:
    """How many pages a run has done: lines that were added to a folder's files."""

    def __init__(self, out: Path) -> None:
        self.out, self.places, self.pages = out, {"metadata.jsonl": 0, "dropped.jsonl": 0}, 0

    def read(self) -> int:
        for name, place in self.places.items():
            if (self.out / name).is_file():
                with open(self.out / name, "rb") as lines:
                    lines.seek(place)
                    new = lines.read()
                self.pages += new.count(b"\n")
                self.places[name] += len(new)
        return self.pages


def measure(source: Path | str, out: Path, workers: int, flags: list[str], marks: tuple[int, ...] = ()) -> Measured:
    """Starts it on as many cores as workers; memory is noted once `marks` pages are done, and at its end."""
    cores = sorted(os.sched_getaffinity(0))[:workers]
    command = [sys.executable, str(SCRIPT), str(source), "--out", str(out), "--pages_at_once", str(workers), *flags]
    measured, start = Measured(workers), time.monotonic()
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    process.cpu_affinity(cores)  # before it starts others
    progress, waiting, last = Progress(out), list(marks), (0, 0.0)
    while process.poll() is None:
        time.sleep(SECONDS_BETWEEN)
        try:
            own, python, all_of_them = memory(process, bool(waiting) and progress.read() >= waiting[0])
        except psutil.NoSuchProcess:
            continue
        if not own:  # it has ended, and nobody has asked how
            continue
        measured.parent_peak_mib = max(measured.parent_peak_mib, own)
        measured.worker_peak_mib = max(measured.worker_peak_mib, python)
        last = (progress.pages, own)
        if all_of_them:
            waiting.pop(0)
            measured.parent_mib_at[progress.pages] = own
            measured.workers_mib_at[progress.pages] = all_of_them
    measured.seconds = time.monotonic() - start
    if marks:
        measured.parent_mib_at[last[0]] = last[1]
    output = process.stdout.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}: {output}")
    summary = json.loads((out / "summary.json").read_text())
    measured.pages, measured.line = summary["asked"], summary["line"]
    return measured


def memory(process: psutil.Process, everyone: bool) -> tuple[float, float, float]:
    """(resident MiB of the parent, of the largest worker's Python, of all workers with browsers where asked, or 0)."""
    own, python, together = process.memory_info().rss, 0, 0
    for child in process.children(recursive=everyone):
        try:
            python = max(python, child.memory_info().rss if "spawn_main" in " ".join(child.cmdline()) else 0)
            together += child.memory_full_info().pss if everyone else 0
        except psutil.Error:  # ended since
            continue
    return own / MIB, python / MIB, together / MIB


# -----------------------------------------------------------------------------
# Results


def table(runs: list[Measured], of_memory: Measured | None) -> str:
    lines = ["| workers = cores | pages | seconds | pages/s | times the first | parent, MiB | a worker's Python, MiB |"]
    lines.append("|---|---|---|---|---|---|---|")
    for run in runs:
        ratio = run.pages_per_second / runs[0].pages_per_second
        cells = [run.workers, f"{run.pages:,}", f"{run.seconds:.1f}", f"{run.pages_per_second:.2f}", f"{ratio:.2f}"]
        cells += [f"{run.parent_peak_mib:.0f}", f"{run.worker_peak_mib:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if of_memory:
        lines += ["", f"{of_memory.pages:,} small pages, {of_memory.workers} workers, {of_memory.seconds:.0f} s:"]
        lines += [f"parent {mib:.1f} MiB after {pages:,} pages" for pages, mib in of_memory.parent_mib_at.items()]
        lines.append(f"parent {of_memory.parent_peak_mib:.1f} MiB at most")
        for pages, mib in of_memory.workers_mib_at.items():
            lines.append(f"workers with browsers {mib / of_memory.workers:.0f} MiB each after {pages:,} pages")
    return "\n".join(lines)


def processor() -> str:
    """Its name, where /proc tells."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,2", help="numbers with commas between; each is a run")
    parser.add_argument("--pages_per_worker", type=int, default=40, help="of each run for speed; 0 for none")
    parser.add_argument("--source", help="real pages, as make_pages.py takes them, instead of invented ones")
    parser.add_argument("--memory_pages", type=int, default=0, help="small pages of the run for memory; 0 for none")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    numbers = [int(number) for number in args.workers.split(",")]
    if max(numbers) > len(os.sched_getaffinity(0)):
        parser.error(f"--workers {args.workers}: only {len(os.sched_getaffinity(0))} cores here")
    place, runs, of_memory = Path(tempfile.mkdtemp(prefix="make_pages_speed-")), [], None
    try:
        most = args.pages_per_worker * max(numbers)
        source = args.source or (most and write_real_sizes(place / "real_sizes", most))
        for number in numbers if most else []:
            flags = ["--num_samples", str(args.pages_per_worker * number)]
            runs.append(measure(source, place / f"out-{number}", number, flags))
            print(f"{number} workers: {runs[-1].pages_per_second:.2f} pages/s; {runs[-1].line}", flush=True)
        if count := args.memory_pages:
            marks = tuple(mark for mark in (1_000, count // 4, count // 2, count * 3 // 4, count - count // 50))
            small = write_small(place / "small", count)
            of_memory = measure(small, place / "out-small", max(numbers), SMALL, marks)
            print(f"{of_memory.pages_per_second:.1f} small pages/s; {of_memory.line}", flush=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    facts: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    facts["pages"] = "of --source" if args.source else "invented, in the sizes of real ones"
    print(f"\n{facts['processor']}, {facts['cores']} cores\n\n{table(runs, of_memory) if runs or of_memory else ''}")
    if args.out:
        content = facts | {"runs": [vars(run) for run in runs], "memory": of_memory and vars(of_memory)}
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
