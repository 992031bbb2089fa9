"""How long the scorer takes: a page of many texts against a changed copy, and many pages; and how much memory.

    python benchmarks/scorer_speed.py --blocks 100                             # one pair, part by part
    python benchmarks/scorer_speed.py --pages FOLDER --out benchmarks/results/scorer_speed.json

FOLDER holds */page.html; each page is scored against its successor and against itself, in turn. Prints seconds, and
peak memory of this process, its workers and their browsers together.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


class PeakMemory:
    """The most that this process and all it has started have held at once, GiB, looked up once a second."""

    def __enter__(self):
        self.peak, self.done = 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        import psutil

        me = psutil.Process()
        while not self.done.wait(1.0):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss  # shared pages counted once
                except psutil.Error:
                    continue
            self.peak = max(self.peak, total / 2**30)

    def __exit__(self, *unused) -> None:
        self.done.set()
        self.thread.join()


def page_of_texts(count: int, seed: int, changed: float) -> str:
    """A page of `count` short texts, of which a share is changed."""
    words = (
        "account archive basket careers contact delivery events gallery help invoices news offers orders press".split()
    )
    rng, change = random.Random(seed), random.Random(seed + 1)
    lines = []
    for number in range(count):
        text = " ".join(rng.choice(words) for _ in range(rng.randint(1, 8)))
        if change.random() < changed:
            text = " ".join(change.choice(words) for _ in range(4))
        lines.append(f"<{'h2' if number % 10 == 0 else 'p'}>{number} {text}</{'h2' if number % 10 == 0 else 'p'}>")
    return f"<!DOCTYPE html>\n<html><head><title>t</title></head><body>{''.join(lines)}</body></html>"


def one_pair(blocks: int, renderer) -> dict[str, float]:
    from scoring.blocks import job_for, page_of
    from scoring.metrics import compare
    from scoring.proof import score

    reference, prediction = page_of_texts(blocks, 1, 0.0), page_of_texts(blocks, 1, 0.3)
    score(reference, prediction, renderer)  # the browser starts
    start = time.monotonic()
    renders = list(renderer.map([job_for(reference), job_for(prediction)]))
    rendered = time.monotonic()
    pages = list(map(page_of, renders, (reference, prediction)))
    read = time.monotonic()
    found = compare(*pages)
    end = time.monotonic()
    parts = {"rendering": rendered - start, "reading": read - rendered, "matching and scores": end - read}
    return {"blocks": found.blocks_reference, **parts, "seconds": end - start, "overall": found["overall"]}


def many_pages(folder: Path, renderer) -> dict[str, float]:
    from scoring.many_pages import Pair, Progress, read, run_pairs

    files = sorted(folder.glob("*/page.html"))
    texts = [read(file) for file in files]
    pairs = [
        Pair(file.parent.name, texts[n], texts[n if n % 2 else (n + 1) % len(files)]) for n, file in enumerate(files)
    ]
    start = time.monotonic()
    with PeakMemory() as memory:
        rows = run_pairs(pairs, renderer, Progress(None, pictures=False))
    seconds = time.monotonic() - start
    failures = sum(row["failure"] is not None for row in rows)
    return {"pages": len(rows), "failures": failures, "seconds": seconds, "peak_gib": memory.peak}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--blocks", type=int, default=100)
    parser.add_argument("--pages", type=Path, help="folder with */page.html")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    from scoring.renders import Renderer

    with Renderer() as renderer:
        found = {"one pair": one_pair(args.blocks, renderer)}
        print(json.dumps(found["one pair"], indent=1))
        if args.pages:
            found["many pages"] = many_pages(args.pages, renderer)
            found["many pages"]["minutes for 484"] = (
                found["many pages"]["seconds"] / found["many pages"]["pages"] * 484 / 60
            )
            print(json.dumps(found["many pages"], indent=1))
        found["where"] = {"cores": os.cpu_count(), "python": sys.version.split()[0], **renderer.facts}
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
