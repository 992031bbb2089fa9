"""Many pages: pairs out of folders, scored in order, kept on disk on the way, and shown in one report.

    pairs = pairs_of(Path("references"), Path("predictions"), width=1280)
    with Renderer() as renderer:
        rows = run_pairs(pairs, renderer, progress := Progress(Path("scores.partial"), pictures=True))
    write_pages_report(Path("report.html"), "What was written", pairs, progress, facts={})

What was scored is kept on the way, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scoring.bar import progress_bar
from scoring.blocks import Block, Page
from scoring.clip import Clip
from scoring.metrics import Compared, PageScore, likeness, names
from scoring.renders import Renderer
from scoring.report import write_report
from scoring.report_values import Before, Box, PageResult
from scoring.scorers import Pair, Scorers, keep_pictures, score_pairs, scorers_for


def window_of(width: int, height: int) -> tuple[int, int]:
    """The browser's window for a screenshot: as wide, and no higher."""
    return min(2560, max(160, width)), min(720, max(64, height))


def pairs_of(references: Path, predictions: Path | None, width: int, written: str = "written.html") -> list[Pair]:
    """Pairs of two folders, by equal file names, or of what a training has left: page-*/reference.html and `written`
    beside it, in a window for screenshot.png."""

    def window(place: Path) -> tuple[int, int]:
        screenshot = place.with_name("screenshot.png")
        if predictions is not None or not screenshot.is_file():
            return width, 720
        with Image.open(screenshot) as picture:
            return window_of(*picture.size)

    if predictions is None:
        files = [
            (place.parent.name, place, place.with_name(written))
            for place in sorted(references.glob("page-*/reference.html"))
        ]
    else:
        files = [
            (str(place.relative_to(references).with_suffix("")), place, predictions / place.relative_to(references))
            for place in sorted(references.rglob("*.html"))
        ]
    return [
        Pair(name, read(wanted), read(file) if file.is_file() else None, *window(wanted))
        for name, wanted, file in files
    ]


def read(file: Path) -> str:
    """A page as a browser would take it: UTF-8, and what is none replaced."""
    return file.read_text(encoding="utf-8-sig", errors="replace")


class Progress:
    """Scores and pictures of a run, on disk until it ends: an interrupted one goes on where it was.

    What was scored by another table of metrics, without pictures or by another CLIP than asked, is scored again.
    """

    def __init__(self, folder: Path | None, pictures: bool, clip: str | None = None):
        """`folder` None: nothing is kept on disk. `clip` is the name of CLIP's weights."""
        self.folder, self.pictures, self.clip, self.rows = folder, pictures, clip, {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "scores.jsonl"
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            try:
                row = json.loads(line)
            except ValueError:  # the end of an interrupted run
                continue
            asked = {"clip": clip, "metrics": [*names()]}
            if row["pictures"] >= pictures and {name: row.get(name) for name in asked} == asked:
                self.rows[row["key"]] = row["score"]

    def keep(self, key: str, score: PageScore, images: Sequence[np.ndarray | None]) -> None:
        """`images` are those of the reference and of what was written; () where they are kept already."""
        self.rows[key] = asdict(score)
        if self.folder is None:
            return
        if self.pictures:
            keep_pictures(self.folder, key, images)
        with (self.folder / "scores.jsonl").open("a", encoding="utf-8") as file:
            asked = {"pictures": self.pictures, "clip": self.clip, "metrics": names()}
            file.write(json.dumps({"key": key, **asked, "score": self.rows[key]}) + "\n")

    def picture(self, key: str, name: str) -> Path | None:
        """The kept one of "reference" or "written"."""
        file = self.folder / f"{key}-{name}.png" if self.folder else None
        return file if file and file.is_file() else None

    def forget(self) -> None:
        """Once the run is over and its results are written."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def run_pairs(
    pairs: Sequence[Pair],
    renderer: Renderer,
    progress: Progress,
    clip: Clip | None = None,
    scorers: Scorers | None = None,
) -> list[dict[str, Any]]:
    """Scores of all pairs, in order, each with its `page`; a bar on a terminal, lines elsewhere.

    Of many pages by several processes where there are cores for them, or by these `scorers`, which may have begun; but
    not with a `clip`, which each would have to load. Kept as they come.
    """
    left = {pair.key: pair for pair in pairs if pair.key not in progress.rows}
    count = 0 if clip or scorers else scorers_for(len(left))
    with (
        progress_bar("pages scored", len(pairs), len(pairs) - len(left)) as bar,
        # A single one would do what this process does.
        Scorers(count, renderer.seconds_per_page, renderer.chromium) if count > 1 else nullcontext(scorers) as others,
    ):
        for pair in left.values() if others else ():
            others.give(pair, progress.folder if progress.pictures else None)
        for key, score in others.scored() if others else ():
            progress.keep(key, score, ())
            bar.update(left.pop(key, None) is not None)
        for pair, (score, *images) in score_pairs(left.values(), renderer, clip):
            progress.keep(pair.key, score, images)
            bar.update()
        if others:
            renderer.version = renderer.version or others.version
    return [{"page": pair.name, **score_of(progress.rows[pair.key]).as_json()} for pair in pairs]


def score_of(row: Mapping[str, Any]) -> PageScore:
    """A score back from its JSON."""

    def block(value: Mapping[str, Any]) -> Block:
        return Block(**{**value, "color": tuple(value["color"])})

    lists = {name: tuple(map(block, row[name])) for name in ("missing", "invented")}
    lists["matched"] = tuple((block(one), block(two)) for one, two in row["matched"])
    return PageScore(**{**row, **lists, "causes": tuple(row["causes"])})


def box(block: Block) -> Box:
    """As the report draws it."""
    return Box(block.x, block.y, block.width, block.height, block.text)


def before_of(pair: Pair, progress: Progress) -> Before | None:
    """What was written before training, as the report shows it; None where nothing was."""
    if pair.prediction is None:
        return None
    score = score_of(progress.rows[pair.key])
    return Before(progress.picture(pair.key, "written"), pair.prediction, score.values, score.failure)


def page_result(
    pair: Pair, progress: Progress, more: Mapping[str, Any], before: Before | None = None, source: str = ""
) -> PageResult:
    """A scored pair as the report shows it; its pictures stay on disk until they are drawn."""
    score = score_of(progress.rows[pair.key])
    return PageResult(
        name=pair.name,
        scores={**score.values, "valid": score.valid, **{name: more[name] for name in more if name != "chooses"}},
        reference=progress.picture(pair.key, "reference"),
        written=progress.picture(pair.key, "written"),
        html=pair.prediction or "",
        reference_html=pair.reference,
        matched=[(box(one), box(two)) for one, two in score.matched],
        missing=[box(block) for block in score.missing],
        invented=[box(block) for block in score.invented],
        failure=score.failure,
        causes=score.causes,
        chooses=bool(more.get("chooses")),
        reference_failed=score.reference_failed,
        before=before,
        width=pair.width,
        source=source,
    )


SHUFFLED_PAGES = 40  # at most: wholly different texts are the slowest to match


def shuffled_likeness(
    pairs: Sequence[Pair], progress: Progress, more: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[float, str]]:
    """The control of the report, by the score's name: the mean likeness of each answer against another page's
    reference, as if the screenshots had been shuffled, and a note; {} where fewer than two pages can be compared.

    By the texts that are kept of both, so that nothing is rendered again. An answer that could not be rendered is the
    worst, as elsewhere. Pages that chose the weights, or whose reference has failed or has no text, are left out.
    """
    scores = [score_of(progress.rows[pair.key]) for pair in pairs if not more.get(pair.name, {}).get("chooses")]
    scores = [score for score in scores if not score.reference_failed and score.texts_reference]
    scores = scores[:: max(1, -(-len(scores) // SHUFFLED_PAGES))]
    if len(scores) < 2:
        return {}
    found = []
    for score, other in zip(scores, scores[1:] + scores[:1]):
        wanted = tuple(block for block, _ in other.matched) + other.missing
        written = tuple(block for _, block in score.matched) + score.invented
        failed = score.failure is not None
        found.append(0.0 if failed else likeness(Compared(Page(None, texts=wanted), Page(None, texts=written))))
    return {"likeness": (sum(found) / len(found), f"against another page, {len(found):,} pages")}


def sources_of(pairs: Sequence[Pair]) -> list[str]:
    """The dataset or folder of each page, by its name ("websight/train 7"); "" for all where that tells nothing."""
    found = [pair.name.rpartition("/")[0] for pair in pairs]
    return found if 1 < len({*found}) <= max(2, len(found) // 2) else [""] * len(found)


def write_pages_report(
    file: Path,
    title: str,
    pairs: Sequence[Pair],
    progress: Progress,
    facts: Mapping[str, str],
    more: Mapping[str, Mapping[str, Any]] | None = None,
    comparison: Mapping[str, Any] | None = None,
    before: tuple[Sequence[Pair], Progress] | None = None,
    training: Mapping[str, Sequence[tuple[int, float]]] | None = None,
) -> None:
    """The report of pairs that `run_pairs` has scored under this progress. `more` has further scores of a page by its
    name, such as `truncated`; they stand beside the others, but for `chooses`: the page chose the weights, and is shown
    but counted in no mean. `before` is the same pages, in the same order, as written before training. `comparison` and
    `training` as in `scoring.report.write_report`."""
    more, sources = more or {}, sources_of(pairs)
    earlier, kept = before or ([None] * len(pairs), progress)
    results = (
        page_result(pair, progress, more.get(pair.name, {}), then and before_of(then, kept), source)
        for pair, then, source in zip(pairs, earlier, sources, strict=True)
    )
    control = shuffled_likeness(pairs, progress, more)
    write_report(file, title, results, facts, comparison, training, control, count=len(pairs))


def browser_facts(renderer: Renderer, clip: Clip | None, why_not: str) -> dict[str, str]:
    """What scores depend on, besides the pages."""
    facts = renderer.facts
    fonts = facts.get("fonts") or []
    return {
        "browser": f"{facts.get('chromium')}{'' if facts.get('sandbox') else ', without its sandbox (as root)'}",
        "fonts": f"{len(fonts)}: {', '.join(fonts[:12])}{', ...' if len(fonts) > 12 else ''}",
        "CLIP": clip.name if clip else f"not scored, {why_not}",
    }
