"""How fast pages are prepared, by how many workers, in how much memory, and what a kill costs.

    python benchmarks/preparation_speed.py --tokenizer TOKENIZER_FOLDER --out benchmarks/results/preparation_speed.json
    python benchmarks/preparation_speed.py --tokenizer TOKENIZER_FOLDER --pages ../shared/pages --workers 1,2 --many 0

Rows are invented, in parquet, with the screenshot sizes and html lengths of real pages (make_pages_like_real.py), no
two alike; --pages takes those of an imagefolder instead, each with a number of its own. --many rows are small (200 x
150 pixels), for memory. Every preparation is a process of its own, by the training's own code: load_pages over a
PagePool. `workers 1` is the way without workers: this one process reads, cleans, decodes, counts and writes.
"""

import argparse
import io
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
TEMPLATES = 43  # as many as there are sizes
SHARD_ROWS = 2_500
SMALL = [200, 150, 120]  # width, height, html tokens

# -----------------------------------------------------------------------------
# Rows


def numbered(png: bytes, number: int) -> bytes:
    """The same picture in a file of its own: a tEXt chunk with the number, before the last chunk."""
    content = b"tEXt" + b"Comment\0%d" % number
    chunk = (len(content) - 4).to_bytes(4, "big") + content + zlib.crc32(content).to_bytes(4, "big")
    return png[:-12] + chunk + png[-12:]


def make_templates(folder: Path | None, small: bool) -> list[tuple[bytes, str]]:
    """(PNG, html) of some pages: those of `folder`, or invented ones."""
    if folder is not None and not small:
        rows = map(json.loads, (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
        return [((folder / row["file_name"]).read_bytes(), row["text"]) for row in rows]
    import make_pages_like_real as like_real

    sizes = json.loads(like_real.SIZES.read_text())["width_height_html_tokens"]
    templates = []
    for number, (width, height, tokens) in enumerate([SMALL] * 8 if small else sizes):
        rng, file = random.Random(number), io.BytesIO()
        like_real.make_picture(rng, width, height).save(file, "PNG", compress_level=6)
        # About 3.4 characters a token, by Qwen's tokenizer: made without one, it takes no time to fit.
        templates.append((file.getvalue(), like_real.make_html(rng, int(tokens * 3.4), len)))
    return templates


def varied(html: str, number: int) -> str:
    """A page of other words, as long; where it has none of ours, with its number as one."""
    from make_pages_like_real import WORDS

    others = dict(zip(WORDS, random.Random(number).sample(WORDS, len(WORDS))))
    html = re.sub(r"[a-z]{5,8}", lambda word: others.get(word[0], word[0]), html)
    return re.sub("(<body[^>]*>)", rf"\1<p>page {number}</p>", html, count=1)


def write_shard(task: tuple[Path, list[tuple[bytes, str]], int, int]) -> None:
    """One parquet file of rows `first` to `last`."""
    import pyarrow
    import pyarrow.parquet

    path, templates, first, last = task
    images, texts = [], []
    for number in range(first, last):
        png, html = templates[number % len(templates)]
        images.append({"bytes": numbered(png, number), "path": None})
        texts.append(varied(html, number))
    table = pyarrow.table({"image": images, "text": texts})
    pyarrow.parquet.write_table(table, path, compression="none", row_group_size=100)


def write_rows(folder: Path, templates: list[tuple[bytes, str]], rows: int, processes: int) -> Path:
    """A dataset of `rows` rows, by several processes."""
    folder.mkdir(parents=True)
    starts = range(0, rows, SHARD_ROWS)
    tasks = [(folder / f"{n:05d}.parquet", templates, n, min(n + SHARD_ROWS, rows)) for n in starts]
    with get_context("spawn").Pool(min(processes, len(tasks))) as pool:
        pool.map(write_shard, tasks)
    return folder


# -----------------------------------------------------------------------------
# One preparation, in a process of its own


def anonymous_mb() -> float:
    """Of this process, without the files that it has mapped: those the system takes back whenever it likes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6


class Memory(threading.Thread):
    """The highest resident memory of this process and, together, of its workers, in MB; looked at twice a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.parent_mb = self.workers_mb = self.parent_anonymous_mb = 0.0

    def run(self) -> None:
        import psutil

        me = psutil.Process()
        while True:
            self.parent_mb = max(self.parent_mb, me.memory_info().rss / 1e6)
            self.parent_anonymous_mb = max(self.parent_anonymous_mb, anonymous_mb())
            total = 0
            for child in me.children():
                try:
                    total += child.memory_info().rss
                except psutil.Error:  # it has ended
                    continue
            self.workers_mb = max(self.workers_mb, total / 1e6)
            time.sleep(0.5)


def prepare(args: argparse.Namespace) -> None:
    """Prepares the pages of one dataset and prints what it took, as JSON."""
    from transformers import AutoTokenizer

    from training import page_workers
    from training.collecting import load_pages

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    settings = SimpleNamespace(
        dataset=[str(args.dataset)],
        **dict.fromkeys(("dataset_config", "dataset_split", "dataset_revision", "image_column", "html_column")),
        num_samples=args.rows - 2,
        eval_pages=2,
        max_html_tokens=8192,
        max_bad_share=0.02,
        clean="comments,scripts,tracking,base64",
    )
    backend = page_workers.TokenizerCount(tokenizer.backend_tokenizer.to_str(), "")

    def count(html: str, width: int, height: int) -> tuple[int, int]:
        return len(tokenizer(html, add_special_tokens=False, split_special_tokens=True)["input_ids"]), 1280

    count("<p>once</p>", 1, 1)
    memory = Memory()
    memory.start()
    pool = page_workers.PagePool(page_workers.job_of(settings, backend), count, args.one, lambda width, height: 1280)
    checked, tenths = 0, []  # tenths: MB after each tenth of the rows

    def counted(lane: page_workers.Lane, known=page_workers.Lane.__next__) -> page_workers.Checked:
        nonlocal checked
        row = known(lane)
        checked += 1
        if checked % (args.rows // 10) == 0:
            tenths.append(round(anonymous_mb()))
        return row

    page_workers.Lane.__next__ = counted
    start, cpu = time.monotonic(), time.process_time()
    report = load_pages(settings, args.work / "out", count, 0, pool, args.work / "prepared")
    seconds, cpu = time.monotonic() - start, time.process_time() - cpu
    stored = sum(file.stat().st_size for file in (args.work / "out" / "pages").glob("*.arrow"))
    done = {"workers": args.one, "rows": args.rows, "rows_checked": checked, "seconds": round(seconds, 2)}
    done |= {"report": str(report), "pages_per_s": round(checked / seconds, 1), "bytes_per_page": stored // report.kept}
    done["parent_cpu_s"] = round(cpu, 2)  # what remains with one process however many workers there are
    done |= {"anonymous_mb_after_each_tenth": tenths}
    done |= {"parent_mb": round(memory.parent_mb), "parent_anonymous_mb": round(memory.parent_anonymous_mb)}
    print(json.dumps(done | {"workers_mb": round(memory.workers_mb)}))


def start(args: argparse.Namespace, workers: int, dataset: Path, rows: int, work: Path) -> subprocess.Popen:
    command = [sys.executable, __file__, "--tokenizer", str(args.tokenizer), "--one", str(workers), "--rows", str(rows)]
    command += ["--dataset", str(dataset), "--work", str(work)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def measure(args: argparse.Namespace, workers: int, dataset: Path, rows: int, work: Path) -> dict:
    """What `prepare` prints, of a process of its own."""
    with start(args, workers, dataset, rows, work) as process:
        out = process.communicate()[0]
    if process.returncode:
        sys.exit(f"preparing {rows} rows by {workers} workers ended with {process.returncode}: {out}")
    found = json.loads(out.splitlines()[-1])
    print(json.dumps(found), flush=True)
    return found


def kill_in_the_middle(args: argparse.Namespace, workers: int, dataset: Path, rows: int, work: Path) -> dict:
    """SIGKILL once half of the rows are sealed, then the same again."""
    import psutil

    seal = work / "prepared" / "held_out_2" / "sealed.json"
    process = start(args, workers, dataset, rows, work)
    while process.poll() is None and not (seal.exists() and sealed_rows(seal) >= rows // 2):
        time.sleep(0.02)
    children = psutil.Process(process.pid).children() if process.poll() is None else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    sealed = sealed_rows(seal)
    _, left = psutil.wait_procs(children, timeout=10)
    again = measure(args, workers, dataset, rows, work)
    return {"sealed_when_killed": sealed, "workers_left_behind": len(left), "again": again}


def sealed_rows(seal: Path) -> int:
    return sum(part["read"] for part in json.loads(seal.read_text())["state"]["parts"])


# -----------------------------------------------------------------------------
# Main


def rows_of(templates: list[tuple[bytes, str]]) -> dict:
    """What a row is like, on average."""
    count = len(templates)
    characters, size = sum(len(html) for _, html in templates), sum(len(png) for png, _ in templates)
    return {"png_bytes": size // count, "html_characters": characters // count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a Qwen2.5-VL tokenizer")
    parser.add_argument("--pages", type=Path, help="imagefolder whose pages are taken instead of invented ones")
    parser.add_argument("--rows", type=int, default=12_000, help="for the speed; N workers read 1,500 x N")
    parser.add_argument("--workers", default="1,2,4,8,16", help="numbers of workers, by commas")
    parser.add_argument("--many", default="10000,100000", help="numbers of small rows for the memory, by commas; or 0")
    parser.add_argument("--out", type=Path, help="the JSON")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dataset", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, default=None, help="folder for rows and pages (default: a temporary one)")
    args = parser.parse_args()
    if args.one is not None:
        return prepare(args)

    from training.page_workers import cores

    numbers, many = ([int(part) for part in text.split(",") if int(part)] for text in (args.workers, args.many))
    place = Path(tempfile.mkdtemp(dir=args.work))
    result: dict = {"cores": cores(), "machine": platform.processor() or platform.machine(), "python": sys.version[:6]}
    try:
        templates = make_templates(args.pages, small=False)
        result["rows"] = rows_of(templates)
        dataset = write_rows(place / "rows", templates, args.rows, cores())
        result["speed"] = [measure(args, n, dataset, min(args.rows, 1_500 * n), place / f"speed-{n}") for n in numbers]
        first = result["speed"][0]["pages_per_s"]
        result["times_as_fast"] = {one["workers"]: round(one["pages_per_s"] / first, 2) for one in result["speed"]}
        templates, result["memory"] = make_templates(None, small=True), []
        for rows in many:
            dataset = write_rows(place / f"many-{rows}", templates, rows, cores())
            work = place / f"memory-{rows}"
            result["memory"].append(measure(args, max(numbers), dataset, rows, work))
            if rows == many[0]:
                result["killed"] = kill_in_the_middle(args, max(numbers), dataset, rows, place / "killed")
            shutil.rmtree(dataset)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(json.dumps({name: result[name] for name in ("cores", "rows", "times_as_fast")}))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + os.linesep, encoding="utf-8")


if __name__ == "__main__":
    main()
