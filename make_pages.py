"""Turns any HTML into a dataset of (screenshot, HTML) pairs that the training script takes as it is.

    python make_pages.py site/ --out pages                                  # every .html and .htm under a folder
    python make_pages.py list.txt --out pages --scripts run                 # files that a text file names, one a line
    python make_pages.py site/ --out pages --widths 1280,390 --tokenizer holo1_dom_finetune_final --max_html_tokens 8192
    python make_pages.py SALT-NLP/Design2Code-hf --out pages --num_samples 50           # a dataset, rendered anew
    python holo1_dom_finetune.py --dataset pages

A target holds what its screenshot shows: local style sheets inlined, no scripts, pictures and icon fonts as grey boxes,
what is invisible or unused dropped where the new render is the same to the pixel. Chromium renders through
scoring/renders.py, without a network. A folder that is begun is carried on; dropped.jsonl names each dropped page and
why.

Sections: Settings, Sources, Local files, Style sheets, Reductions, One page, The folder, Command line.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import os
import re
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from making.browser_steps import step
from making.drops import REASONS, PageDropped
from making.local_files import MAX_SVG_CHARACTERS, LocalFiles, inline_files
from making.page_settings import Settings, SettingsError, check_settings, token_counter
from making.reductions import Draft, compose, draft_of, learn, questions, reductions
from making.sources import Source, find_pages, read_html
from making.style_sheets import (
    GREY,
)
from scoring.renders import SHOT, BrowserMissing, Job, Render, Renderer

# -----------------------------------------------------------------------------
# Settings

SECONDS_PER_RENDER = 30.0
CHANCE = 0.0011  # of the pixels: what two renders of one page were seen to differ by
MAX_RENDERS, MAX_CUTS = 16, 4  # renders to find out which reductions stay; attempts to meet a token limit


# -----------------------------------------------------------------------------
# Sources


# -----------------------------------------------------------------------------
# Local files


# -----------------------------------------------------------------------------
# Style sheets


# -----------------------------------------------------------------------------
# Reductions: each is an item of a set, so that a set of them can be tried, halved, and tried again


# -----------------------------------------------------------------------------
# One page


@dataclass
class Trials:
    """Renders a candidate and holds it against the page as it was; `left` renders may still be made."""

    renderer: Renderer
    window: tuple[int, int]
    image: Any  # (H, W, 3) uint8
    left: int = MAX_RENDERS
    made: int = 0

    def same(self, html: str) -> bool:
        """To the pixel. Where so few differ that it may be chance, the candidate is rendered once more."""
        for _ in range(2):
            if self.left <= 0:
                return False
            self.left -= 1
            self.made += 1
            differing = share_of_differing(rendered(self.renderer, Job(html, *self.window)).image, self.image)
            if differing == 0 or differing > 2 * CHANCE:
                return differing == 0
        return False

    def reproduces(self, html: str) -> bool:
        """Whether it renders as it did before, but for what chance explains."""
        self.made += 2
        renders = (rendered(self.renderer, Job(html, *self.window)) for _ in range(2))
        return any(share_of_differing(render.image, self.image) <= limit for render, limit in zip(renders, (0, CHANCE)))


def rendered(renderer: Renderer, job: Job) -> Render:
    """PageDropped where that fails; a page whose candidates do not render is none to learn from, either."""
    render = renderer.render(job)
    if render.failure:
        raise PageDropped("render", render.failure)
    return render


def share_of_differing(one: Any, other: Any) -> float:
    """Of two pictures' pixels; 1 where their sizes differ."""
    if one.shape != other.shape:
        return 1.0
    return float((one != other).any(axis=-1).mean())


def shortest(draft: Draft, trials: Trials, rematch: Callable[[list[int]], list[int]]) -> tuple[str, int]:
    """The page with every reduction that leaves each pixel as it is, and how many were kept back.

    All at once first. Where that shows, elements and everything else apart, for an element that must stay has rules
    that must, too; then kinds, then halves of a kind while renders are left. `rematch` says which selectors match once
    the elements of these numbers are gone.
    """
    kinds = reductions(draft)
    everything = set(itertools.chain(*kinds))
    html = compose(draft, everything)
    if trials.same(html):
        return html, 0
    elements = [item for item in everything if item[0] == "element"]
    dropped, best, after = set(), "", draft.matched
    draft.matched = dict(zip(after, rematch([])))
    waiting = [group for group in (list(everything - set(elements)), elements) if group]
    while waiting and trials.left > 1:
        group = waiting.pop(0)
        html = compose(draft, dropped | set(group))
        if trials.same(html):
            dropped |= set(group)
            best = html
        elif len({kind for kind, _ in group}) > 1:
            waiting += [kind for kind in kinds if kind[0][0] != "element"]
        elif len(group) > 1:
            waiting += [group[: len(group) // 2], group[len(group) // 2 :]]
            waiting.sort(key=len, reverse=True)  # the larger, the more there is to gain
    if gone := sorted(number for kind, number in dropped if kind == "element"):
        draft.matched = dict(zip(after, rematch(gone)))
        html = compose(draft, dropped)
        best = html if trials.same(html) else best
    return best or compose(draft, ()), len(everything - dropped)


def drawn(
    html: str, settings: Settings, window: tuple[int, int], limit: int, renderer: Renderer
) -> tuple[str, Any, dict[str, Any]]:
    """(target, its screenshot, facts) of a self-contained page, cut at `limit` px."""
    steps = (
        step(
            "normalise",
            scripts=settings.scripts == "run",
            grey=GREY,
            most_tried=200,
            most_svg_characters=MAX_SVG_CHARACTERS,
        ),
        step("cut", limit=limit),
        step("extract"),
    )
    pictures, cut, extract = rendered(
        renderer, Job(html, *window, steps=steps, scripts=settings.scripts == "run")
    ).values
    if not extract["text"]:
        raise PageDropped("without text", "no text in its body")
    draft = draft_of(extract)
    normalised, asked = compose(draft, ()), questions(draft)
    image, answer = rendered(renderer, Job(normalised, *window, steps=(SHOT, step("analyse", **asked)))).values
    if (image == image[0, 0]).all():
        raise PageDropped("blank", "every pixel has the same colour")
    learn(draft, asked, answer)
    trials = Trials(renderer, window, image)

    def rematch(gone: list[int]) -> list[int]:
        asked_again = step("analyse", **asked | {"gone": gone})
        return rendered(renderer, Job(normalised, *window, steps=(asked_again,))).values[0]["after"]

    target, kept_back = shortest(draft, trials, rematch)
    if target == compose(draft, ()) and not trials.reproduces(target):
        raise PageDropped("changing", f"more than {CHANCE:.2%} of its pixels differ between renders")
    facts = {"pictures": pictures, "cut": cut, "kept_back": kept_back, "renders": 2 + trials.made}
    return target, image[: settings.max_height], facts | {"normalised": normalised}


def make_page(
    name: str, html: str, settings: Settings, renderer: Renderer, count: Callable[[str], int]
) -> tuple[dict[str, Any], Any]:
    """(the page's record without its file's name, the screenshot); PageDropped.

    A target over the limit is cut higher up, until it fits.
    """
    width, limit = settings.width_of(name), settings.max_height
    limits = ((settings.max_html_tokens, count), (settings.max_html_characters, len))
    for attempt in range(MAX_CUTS + 1):
        target, image, facts = drawn(html, settings, (width, settings.height), limit, renderer)
        over = [(most, length) for most, length in limits if most is not None and length(target) > most]
        if not over:
            break
        most, length = over[0]
        fixed = sum(length(css) for css in re.findall(r"<style>.*?</style>", target, re.S))
        limit = int(min(limit, image.shape[0]) * 0.95 * (most - fixed) / max(1, length(target) - fixed))
        if attempt == MAX_CUTS or limit < 50:
            raise PageDropped("too long", f"{length(target):,} with a style sheet of {fixed:,}, {most:,} allowed")
    if image.shape[0] * image.shape[1] > 20_000_000:
        raise PageDropped("too long", f"{image.shape[1]:,} x {image.shape[0]:,} pixels")
    normalised = facts.pop("normalised")
    lengths = {"characters": len, "tokens": count} if settings.tokenizer else {"characters": len}
    sizes = {unit: [length(text) for text in (html, normalised, target)] for unit, length in lengths.items()}
    record = {"text": target, "width": image.shape[1], "height": image.shape[0], "viewport": width}
    return record | facts | sizes, image


def encode(image: Any) -> tuple[str, bytes]:
    """(suffix, file) of the smaller of a lossless WebP and a PNG."""
    from PIL import Image

    files, picture = {}, Image.fromarray(image)
    for suffix, options in {
        ".png": {"compress_level": 6},
        ".webp": {"lossless": True, "quality": 30, "method": 3},
    }.items():
        if suffix == ".webp" and max(picture.size) > 16_383:
            continue
        file = io.BytesIO()
        picture.save(file, suffix[1:].upper(), **options)
        files[suffix] = file.getvalue()
    return min(files.items(), key=lambda item: len(item[1]))


# -----------------------------------------------------------------------------
# The folder

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
    files = LocalFiles(source.root)
    row: dict[str, Any] = {"page": source.name, "source": "", "settings": folder.digest}
    try:
        html = read_html(source)
        where = source.path.resolve().parent if source.path else None
        html = inline_files(html, where, files, settings.scripts == "run")
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


# -----------------------------------------------------------------------------
# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", metavar="SOURCE", help="folder of HTML files, list of them (.txt), or dataset")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the dataset goes")
    parser.add_argument(
        "--scripts", choices=("drop", "run"), default=defaults.scripts, help="run: once, without a network"
    )
    parser.add_argument(
        "--widths", default=",".join(map(str, defaults.widths)), help="viewports, px; dealt out by name"
    )
    parser.add_argument("--height", type=int, default=defaults.height, help="px of the viewport, of every width")
    parser.add_argument("--max_height", type=int, default=defaults.max_height, help="px; longer pages are cut")
    parser.add_argument("--max_html_tokens", type=int, help="longer pages are cut; needs --tokenizer")
    parser.add_argument("--max_html_characters", type=int, help="longer pages are cut")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="with tokenizer.json; lengths are then told in tokens")
    parser.add_argument("--num_samples", type=int, help="pages to take from SOURCE at most; default: all")
    parser.add_argument("--html_column", default="text", help="of a dataset")
    parser.add_argument("--dataset_config", help="of a dataset on the Hub")
    parser.add_argument("--dataset_split", default="train", help="of a dataset")
    parser.add_argument("--pages_at_once", type=int, default=2, help="browsers; one needs a core and 0.4 GB")
    return parser.parse_args(argv)


def settings_from(args: argparse.Namespace) -> Settings:
    """SettingsError where the arguments cannot work."""
    try:
        widths = tuple(int(width) for width in args.widths.split(","))
    except ValueError:
        raise SettingsError(f"--widths {args.widths}: whole numbers with commas between, such as 1280,390") from None
    for name in ("pages_at_once", "num_samples"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise SettingsError(f"--{name} {value}: at least 1")
    limits = {name: getattr(args, name) for name in ("height", "max_height", "max_html_tokens", "max_html_characters")}
    settings = Settings(args.scripts, widths, tokenizer=args.tokenizer, **limits)
    check_settings(settings)
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        settings = settings_from(args)
        pages = find_pages(args.source, args.html_column, args.dataset_config, args.dataset_split)
        pages = itertools.islice(pages, args.num_samples)
        first = list(itertools.islice(pages, 1))  # before anything is written: there may be no such source
        pages = first + list(pages) if Path(args.source).expanduser().exists() else itertools.chain(first, pages)
        with Renderer(args.pages_at_once, SECONDS_PER_RENDER) as renderer:
            folder = Folder(args.out, settings.digest())
            report = write_pages(pages, settings, folder, renderer, args.pages_at_once)
            facts = {"settings": asdict(settings), "source": args.source, "browser": renderer.facts}
    except (SettingsError, BrowserMissing) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    summary = report.summary()
    folder.finish(report, summary | facts)
    for note, number in summary["could not be had"].items():
        print(f"{number:,} {note}", file=sys.stderr)
    print(report)
    if report.interrupted:
        return 85
    if not report.written:
        print(f"error: no page left: {args.out / 'dropped.jsonl'} says why", file=sys.stderr)
        return 80
    return 0


if __name__ == "__main__":
    sys.exit(main())
