"""Pairs are rendered and scored by a process of their own while others are still being written.

    ahead = Ahead(folder)                    # of a Progress, where scores and pictures are kept
    ahead.add(pair)
    facts = ahead.finish(lambda: None)       # of the browser, once all are scored; None where that came to nothing

A GPU that writes leaves all cores but one idle; in a thread, comparing would hold up Python's own. What came to nothing
is scored by whoever looks into the folder next, and says why.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from scoring.blocks import job_for, page_of
from scoring.clip import Clip, find_clip
from scoring.many_pages import Pair, Progress, browser_facts
from scoring.metrics import compare
from scoring.proof import prove
from scoring.renders import Renderer

END = "\n"  # the line after the last pair: without it whoever began this is gone
PAGES_AT_ONCE = max(2, min(8, len(os.sched_getaffinity(0)) // 2))  # browsers; each has threads of its own
SILENCE_S = 90  # without a page that is scored, of which each may take 15 s of its own work

# -----------------------------------------------------------------------------
# Here


class Ahead:
    """Scores pairs into `folder` meanwhile. Nothing is raised: what goes wrong shows in `finish`."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.scores = folder.resolve() / "scores.jsonl"
        # CLIP, where there is one, on the CPU: the GPU's memory is counted by whoever writes.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "scoring.ahead", str(folder.resolve())]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        root = Path(__file__).resolve().parents[1]
        self.process = subprocess.Popen(command, cwd=root, env=environment, **pipes)
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        # A process that is still beginning reads nothing, and a full pipe would hold up the writing.
        threading.Thread(target=self._send, daemon=True).start()

    def _send(self) -> None:
        try:
            while (line := self.lines.get()) != END:
                self.process.stdin.write(line)
                self.process.stdin.flush()
            self.process.stdin.write(END)
            self.process.stdin.close()
        except OSError:  # it has ended; `finish` finds that out
            pass

    def add(self, pair: Pair) -> None:
        """One more; what is there already, or under way, is not scored again."""
        self.lines.put(json.dumps(asdict(pair)) + "\n")

    def finish(self, scored: Callable[[], None]) -> dict[str, str] | None:
        """Waits until all are scored, calling `scored` whenever some are; what that raises ends the process."""
        self.lines.put(END)
        size, changed = 0, time.monotonic()
        try:
            while self.process.poll() is None and time.monotonic() - changed < SILENCE_S:
                time.sleep(0.02)
                if self.scores.is_file() and (now := self.scores.stat().st_size) != size:
                    size, changed = now, time.monotonic()
                    scored()
            if self.process.poll() != 0:
                return None
            return json.loads(self.process.stdout.read())
        except ValueError:  # it has said something else
            return None
        finally:
            self.close()

    def close(self) -> None:
        """Ends the process; its browsers end with it."""
        self.lines.put(END)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()


# -----------------------------------------------------------------------------
# In the process


def asked() -> Iterator[Pair]:
    """Pairs from stdin, up to the line that ends them; ends this process where that never comes."""
    for line in sys.stdin:
        if line == END:
            return
        yield Pair(**json.loads(line))
    os._exit(1)


def score_one(pair: Pair, renderer: Renderer, clip: Clip | None, progress: Progress, lock: threading.Lock) -> None:
    """One pair, kept. Browsers work side by side, and Python one at a time."""
    htmls = (pair.reference, pair.prediction or "")
    renders = [renderer.render(job_for(html, pair.width, pair.height)) for html in htmls]
    with lock:
        pages = [page_of(render, html) for render, html in zip(renders, htmls)]
        progress.keep(pair.key, compare(*pages, clip), [page.image for page in pages])


def main() -> None:
    clip, why_not = find_clip()
    progress = Progress(Path(sys.argv[1]), pictures=True, clip=clip and clip.name)
    lock, known, under_way = threading.Lock(), {*progress.rows}, []
    with Renderer(PAGES_AT_ONCE) as renderer, ThreadPoolExecutor(PAGES_AT_ONCE) as pool:
        prove(renderer, clip=clip)
        for pair in asked():
            if pair.key not in known:
                known.add(pair.key)
                under_way.append(pool.submit(score_one, pair, renderer, clip, progress, lock))
        for future in under_way:
            future.result()
        print(json.dumps(browser_facts(renderer, clip, why_not)))


if __name__ == "__main__":
    main()
