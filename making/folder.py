"""The dataset on disk, and what became of each page that was asked for.

    folder = Folder(Path("pages"), settings.digest())
    report = write_pages(sources, settings, folder, renderer)
    folder.finish(report, report.summary())

In it: the screenshots, metadata.jsonl and dropped.jsonl with a line for each page, and summary.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from making.drops import REASONS, PageDropped
from making.local_files import LocalFiles, inline_files
from making.one_page import encode, make_page
from making.page_settings import Settings, token_counter
from making.sources import Source, read_html
from scoring.renders import Renderer
from training.errors import SettingsError

RETRIED = ("render", "changing", "duplicate")  # another run may see them otherwise


@dataclass
class Report:
    """What became of the pages that were asked for."""

    asked: int = 0
    reused: int = 0
    written: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False

    def __str__(self) -> str:
        counts = Counter(row["reason"] for row in self.dropped)
        parts = [
            f"{self.asked:,} asked",
            *(f"{counts[reason]:,} {words}" for reason, words in REASONS.items() if counts[reason]),
        ]
        parts.append(f"{len(self.written):,} written")
        unit = "tokens" if self.written and all("tokens" in row for row in self.written) else "characters"
        before, after = (sum(row[unit][place] for row in self.written) for place in (0, 2))
        share = f" ({after / before - 1:+.0%})".replace("%", " %") if before else ""
        ending = "; interrupted, the same command goes on" if self.interrupted else ""
        return f"{', '.join(parts)}; {before:,} -> {after:,} {unit}{share}{ending}"

    def summary(self) -> dict[str, Any]:
        """What summary.json holds; sums over the written pages of [source, normalised, target]."""
        notes = Counter()
        for row in (*self.written, *self.dropped):
            notes.update(row.get("notes", {}))
        sums = {
            unit: [sum(row[unit][place] for row in self.written) for place in range(3)]
            for unit in ("characters", "tokens")
            if self.written and all(unit in row for row in self.written)
        }
        return {
            "line": str(self),
            "asked": self.asked,
            "written": len(self.written),
            "taken from an earlier run": self.reused,
            "dropped": dict(Counter(row["reason"] for row in self.dropped)),
            "[source, without scripts and pictures, target]": sums,
            "cut": sum(bool(row["cut"]) for row in self.written),
            "pictures": sum(row["pictures"] for row in self.written),
            "pages with a reduction kept back": sum(bool(row["kept_back"]) for row in self.written),
            "renders per page": round(sum(row["renders"] for row in self.written) / max(1, len(self.written)), 2),
            "could not be had": dict(notes),
        }


class Folder:
    """The dataset on disk. Each page is there as soon as it is made; what an earlier run made is found again."""

    def __init__(self, place: Path, digest: str) -> None:
        self.place, self.digest = place, digest
        self.pages, foreign = self._read("metadata.jsonl")
        self.drops, _ = self._read("dropped.jsonl")
        if foreign:
            raise SettingsError(f"--out {place} holds a dataset that make_pages.py did not write: name another folder")
        place.mkdir(parents=True, exist_ok=True)
        self.files_before = {row["file_name"] for row in self.pages.values()}
        for rows in (self.pages, self.drops):
            for page in [page for page, row in rows.items() if row["settings"] != digest]:
                del rows[page]
        self.write(list(self.pages.values()), list(self.drops.values()))

    def _read(self, name: str) -> tuple[dict[str, dict[str, Any]], bool]:
        """({page: its last line}, whether a line is none of ours)."""
        rows, foreign = {}, False
        if (self.place / name).is_file():
            for line in (self.place / name).read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # the line at which an earlier run was killed
                    continue
                if not isinstance(row, dict) or not {"page", "settings", "source"} <= row.keys():
                    foreign = True
                else:
                    rows[row["page"]] = row
        return rows, foreign

    def known(self, page: str, source: str) -> dict[str, Any] | None:
        """What an earlier run made of the page, if neither its source nor the settings have changed."""
        row = self.pages.get(page)
        if row and row["source"] == source and (self.place / row["file_name"]).is_file():
            return row
        row = self.drops.get(page)
        return row if row and row["source"] == source and row["reason"] not in RETRIED else None

    def add(self, row: dict[str, Any], picture: bytes | None) -> None:
        """Writes one page: its screenshot first, then its line in one piece."""
        if picture is not None:
            replace_file(self.place / row["file_name"], picture)
        line = json.dumps(row, ensure_ascii=False) + "\n"
        with open(self.place / ("dropped.jsonl" if "reason" in row else "metadata.jsonl"), "ab", buffering=0) as file:
            file.write(line.encode("utf-8", "replace"))

    def write(self, written: Sequence[dict[str, Any]], dropped: Sequence[dict[str, Any]]) -> None:
        for name, rows in (("metadata.jsonl", written), ("dropped.jsonl", dropped)):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            replace_file(self.place / name, lines.encode("utf-8", "replace"))

    def finish(self, report: Report, summary: Mapping[str, Any]) -> None:
        """Puts the lines in the order of the source, and drops pictures that no line names any more."""
        written, dropped = report.written, report.dropped
        if report.interrupted:
            seen = {row["page"] for row in (*written, *dropped)}
            written = [*written, *(row for page, row in self.pages.items() if page not in seen)]
            dropped = [*dropped, *(row for page, row in self.drops.items() if page not in seen)]
        self.write(written, dropped)
        for name in self.files_before - {row["file_name"] for row in written}:
            (self.place / name).unlink(missing_ok=True)
        replace_file(self.place / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())


def replace_file(file: Path, content: bytes) -> None:
    """Writes it whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_bytes(content)
    os.replace(part, file)


def picture_name(page: str) -> str:
    """A page's name as a file's, without its suffix: safe on every system, and another for every page."""
    parts = [re.sub(r"[^\w.-]", "_", part, flags=re.A).lstrip(".")[:100] or "_" for part in page.split("/")]
    name = "/".join(parts)
    return name if name == page else f"{name}-{hashlib.sha256(page.encode()).hexdigest()[:8]}"


def worked_on(
    source: Source, settings: Settings, folder: Folder, renderer: Renderer, count: Callable[[str], int]
) -> tuple[dict[str, Any], bytes | None, bool]:
    """(the page's line, its screenshot if it is new, whether an earlier run made it)."""
    files = LocalFiles(source.root, renderer)
    row: dict[str, Any] = {"page": source.name, "source": "", "settings": folder.digest}
    try:
        page = read_html(source, renderer)
        where = source.path.resolve().parent if source.path else None
        html = inline_files(page, where, files, settings.scripts == "run", settings.width_of(source.name))
        row["source"] = hashlib.sha256(html.encode("utf-8", "replace")).hexdigest()
        if files.notes:
            row["notes"] = dict(files.notes)
        if known := folder.known(source.name, row["source"]):
            return known, None, True
        record, image = make_page(source.name, html, settings, renderer, count)
    except PageDropped as error:
        return row | {"reason": error.reason, "detail": str(error)}, None, False
    suffix, picture = encode(image)
    return {"file_name": picture_name(source.name) + suffix, **record, **row}, picture, False


def write_pages(
    sources: Iterable[Source], settings: Settings, folder: Folder, renderer: Renderer, pages_at_once: int = 2
) -> Report:
    """Makes every page; Ctrl-C leaves a folder that is valid and can be gone on with."""
    from tqdm import tqdm

    count, report, seen = token_counter(settings.tokenizer), Report(), set()
    pool, waiting = ThreadPoolExecutor(pages_at_once), deque()
    bar = tqdm(desc="pages", unit="page", mininterval=0.5, total=len(sources) if hasattr(sources, "__len__") else None)

    def take(future: Future) -> None:
        row, picture, reused = future.result()
        if "reason" not in row:
            target = hashlib.sha256(row["text"].encode("utf-8", "replace")).digest()
            if target in seen:
                kept = {key: row[key] for key in ("page", "source", "settings")}
                row, picture, reused = (
                    kept | {"reason": "duplicate", "detail": "the target of an earlier page"},
                    None,
                    False,
                )
            seen.add(target)
        if not reused:
            folder.add(row, picture)
        report.reused += reused
        (report.dropped if "reason" in row else report.written).append(row)
        report.asked += 1
        bar.update()

    try:
        for source in sources:
            waiting.append(pool.submit(worked_on, source, settings, folder, renderer, count))
            if len(waiting) > 2 * pages_at_once:
                take(waiting.popleft())
        while waiting:
            take(waiting.popleft())
    except KeyboardInterrupt:
        report.interrupted = True
    finally:
        pool.shutdown(wait=not report.interrupted, cancel_futures=True)
        bar.close()
    return report
