"""Small pages in a folder, for the tests of the rooms that read, check and collect them."""

import io
import json
import os
import random
import signal
import struct
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

from training.collecting import load_pages, load_pages_from_disk
from training.page_workers import PagePool

WORDS = "river stone amber cloud maple ember lake north garden silver piano coral meadow lantern harbour".split()


def picture(number: int, kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    noise = random.Random(number).randbytes(size[0] * size[1] * 3)
    Image.frombytes("RGB", size, noise).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def page_html(number: int, words: int = 30) -> str:
    text = " ".join(random.Random(number).choices(WORDS, k=words))
    return f"<!DOCTYPE html>\n<html><body><h1>Page</h1><p>{text}</p></body></html>"


def write_folder(folder: Path, pages: list[tuple[str, bytes | None, object]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, data, html in pages:
        if data is not None:
            (folder / name).write_bytes(data)
        lines.append(json.dumps({"file_name": name, "text": html}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def good_pages(count: int) -> list[tuple[str, bytes, str]]:
    kinds = [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")]
    return [(f"p{n:03d}.{kinds[n % 3][1]}", picture(n, kinds[n % 3][0]), page_html(n)) for n in range(count)]


def count_tokens(html: str, width: int, height: int) -> tuple[int, int]:
    return len(html.split()), width * height // 100


def slow_count(html: str, width: int, height: int) -> tuple[int, int]:
    time.sleep(0.01)
    return count_tokens(html, width, height)


def deadly_count(html: str, width: int, height: int) -> tuple[int, int]:
    """Kills whoever counts a page that says so; of one that names a file, only the first time."""
    words = html.split()
    if "deadly" in words:
        os.kill(os.getpid(), signal.SIGKILL)
    for word in words:
        if word.startswith("once:") and not Path(word.removeprefix("once:")).exists():
            Path(word.removeprefix("once:")).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return count_tokens(html, width, height)


def signalled_count(html: str, width: int, height: int) -> tuple[int, int]:
    """For a worker: whoever stops a whole group of processes signals it, too."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    return count_tokens(html, width, height)


def wanted(dataset, **changes) -> SimpleNamespace:
    """What load_pages is asked for."""
    settings = {
        "dataset": str(dataset) if isinstance(dataset, Path) else dataset,
        "dataset_config": None,
        "dataset_split": None,
        "dataset_revision": None,
    }
    settings |= {
        "image_column": None,
        "html_column": None,
        "num_samples": 100,
        "eval_pages": 4,
        "max_html_tokens": 1000,
    }
    settings |= {"max_bad_share": 0.02, "clean": "comments,scripts,tracking,base64"} | changes
    return SimpleNamespace(**settings)


def load(dataset, output: Path, seed: int = 0, pool: PagePool | None = None, place: Path | None = None, **changes):
    report = load_pages(wanted(dataset, **changes), output, count_tokens, seed, pool, place)
    return (*load_pages_from_disk(output), report)


def dropped(output: Path) -> dict[str, str]:
    lines = (output / "dropped_pages.jsonl").read_text().splitlines()
    return {row["name"]: row["reason"] for row in map(json.loads, lines)}


def png(
    width: int, height: int, depth: int, colour: int, data: bytes, transparent: bytes = b"", exif: bytes = b""
) -> bytes:
    """A PNG of any kind: `depth` bits a sample, `colour` 0 grey, 2 RGB, 4 grey with alpha, 6 RGBA; `data` the rows,
    each after a zero; `transparent` the chunk tRNS."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), (b"eXIf", exif)]
    chunks += [(b"tRNS", transparent), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    written = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        if content or kind == b"IEND":
            check = struct.pack(">I", zlib.crc32(kind + content))
            written += struct.pack(">I", len(content)) + kind + content + check
    return written


def header_bomb(width: int = 20_000, height: int = 20_000) -> bytes:
    return png(width, height, 8, 2, bytes(1000))
