"""Held-out pages: written by the model, rendered, scored, kept, and told in a line.

    with rendering.beside("after", pages) as scoring:                       # scored while others are written
        rows = write_held_out(model, processor, pages, decoding, 8, *scoring)  # (all ranks)
    parts = parts_of(len(pages), weights_are_chosen=False)
    result = render_and_score(rendering, "after", rows, pages, parts)       # without a browser by the texts alone
    say(announce("after", result))

A row is what was written of one page: {"place", "html", "raw", "tokens", "cut_off", "seconds"}, a page what was wanted:
{"name", "screenshot", "html", "html_tokens"}.

Sections: Writing, Scoring, Rendering, Keeping, Telling.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

import use_model_from_hub as use
from scoring import metrics
from scoring.clip import Clip, find_clip
from scoring.many_pages import Pair, Progress, browser_facts, run_pairs, window_of, write_pages_report
from scoring.proof import ScorerError, prove
from scoring.renders import BrowserMissing, Renderer, fonts_here
from scoring.report_values import plural
from scoring.scorers import Scorers, scorers_for
from scoring.statistics import left_out_words, means, scores_line, summarise
from scoring.validity import looping, same_html, validity
from training import zero3
from training.errors import OUT_OF_MEMORY_CODE, PipelineError, StoppedError, exit_code
from training.heartbeat import heart
from training.processes import gather, in_columns, is_main, rank, say, world_size
from training.stopping import stop
from writing.writer import writer as make_writer

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

Row = dict[str, Any]

# -----------------------------------------------------------------------------
# Writing


def nothing(*unused: Row) -> None:
    """What is done when writing has begun, and with a page that is written, where nobody waits for it."""


def write_held_out(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pages: Dataset,
    decoding: use.Recipe,
    batch: int,
    finished: Callable[[Row], None] = nothing,
    begun: Callable[[], None] = nothing,
) -> list[Row]:
    """(all ranks) Each rank writes its share of the held-out pages, and calls `begun` once tokens are written, and
    `finished` with each page that is; every rank gets all of them, in order.

    `batch` pages at once, fewer where memory runs out. Raises what writing raised, on every rank, also where only
    another rank's pages failed: a rank that went on alone would wait for it for ever. Raises `StoppedError` everywhere
    where any rank was asked to stop while a training waits for this.
    """
    # Pages of like length together: a batch is written until its longest page ends.
    order = longest_first(pages)
    start, failure, rows = time.monotonic(), None, []
    try:
        rows = write_share(model, processor, pages, decoding, batch, order[rank() :: world_size()], finished, begun)
    except Exception as error:  # told to the others first, and raised below
        failure = error
    told = None if failure is None else (exit_code(failure), f"{type(failure).__name__}: {failure}")
    with heart.waiting():
        shares = gather((rows, time.monotonic() - start, told, stop.wanted))
    if failure is not None:
        raise failure
    for number, (_, _, told, _) in enumerate(shares):
        if told is not None:
            raise failure_of_another(number, *told)
    if any(stops for *_, stops in shares):
        raise StoppedError("stopped while held-out pages were judged")
    slowest = max(seconds for _, seconds, *_ in shares)
    rows = sorted((row for rows, *_ in shares for row in rows), key=lambda row: row["place"])
    return [{**row, "seconds": slowest} for row in rows]


def longest_first(pages: Dataset) -> list[int]:
    """The indices of the pages by the length of their HTML."""
    return sorted(range(len(pages)), key=lambda place: -len(pages[place]["html"]))


def failure_of_another(number: int, code: int, words: str) -> Exception:
    """What this rank raises because rank `number` has failed with `words`: an exception with the same exit code."""
    message = f"rank {number} could not write its held-out pages: {words}"
    if code == OUT_OF_MEMORY_CODE:
        return torch.OutOfMemoryError(message)
    error = PipelineError(message)
    error.code = code
    return error


def write_share(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pages: Dataset,
    decoding: use.Recipe,
    batch: int,
    mine: Sequence[int],
    finished: Callable[[Row], None],
    begun: Callable[[], None],
) -> list[Row]:
    """Write the pages at the indices `mine`, by what use_model_from_hub.py writes with: `batch` at once, fewer where
    memory runs out. A part of them where this rank is asked to stop: `write_held_out` tells the others."""
    looks = itertools.count()

    def meanwhile() -> None:
        go_on()
        if next(looks) == 1:  # the first one is before screenshots are read
            begun()

    writer = make_writer(model, processor, decoding, batch, len(mine), tell_once, meanwhile)
    requests = (use.Request(place, partial(screenshot_of, pages, place)) for place in mine)
    rows: list[Row] = []
    answers = contextlib.closing(writer.write(requests))
    with zero3.plain_linear(), contextlib.suppress(StoppedError), answers as pages_written:
        for request, page in pages_written:
            rows.append({"place": request.place, **asdict(page)})
            finished(rows[-1])
            if len(rows) % batch == 0 or len(rows) == len(mine):
                say(f"  {len(rows)} of {plural(len(mine), 'page')} written")
    return rows


def go_on() -> None:
    """Inside of long work: it goes on. Raises `StoppedError` where this rank is asked to stop."""
    heart.mark()
    if stop.wanted:
        raise StoppedError("stopped while held-out pages were judged")


def screenshot_of(pages: Dataset, place: int) -> Image:
    """The screenshot of a held-out page, decoded."""
    return use.open_screenshot(pages[place]["screenshot"])


@functools.cache
def tell_once(message: str) -> None:
    """What is told of writing is the same at each evaluation."""
    say(message)


# -----------------------------------------------------------------------------
# Scoring


@dataclass(frozen=True)
class Parts:
    """Held-out pages, by index, that choose the best weights, and those that compare them with the base.

    The best of several scores is too good by chance, so that an interval over the very pages which chose it would
    promise too much. `choosing` is empty where no weights are chosen.
    """

    choosing: tuple[int, ...]
    comparing: tuple[int, ...]

    @property
    def apart(self) -> bool:
        """Whether no page both chooses and compares."""
        return not set(self.choosing) & set(self.comparing)


def parts_of(count: int, weights_are_chosen: bool) -> Parts:
    """Every second page chooses, the others compare; a single page has to do both, which the results say."""
    everything = tuple(range(count))
    if not weights_are_chosen:
        return Parts((), everything)
    return Parts(everything[::2], everything[1::2]) if count > 1 else Parts(everything, everything)


def score_held_out(
    rows: Sequence[Row],
    pages: Sequence[Mapping[str, Any]],
    scores: Sequence[Mapping[str, Any]] | None = None,
    parts: Parts | None = None,
    texts: Sequence[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Shares and means over the pages that compare, each page's own outcome under "pages", and under "choosing" the
    metric that chooses the best weights, over the pages that do. `scores` are those of `Rendering.score`, `texts` those
    of `text_scores` where they are known."""
    # Where nothing is rendered nothing chooses, and every page compares.
    parts = parts if parts and scores is not None else parts_of(len(rows), weights_are_chosen=False)
    scored = texts or [text_scores(row, page) for row, page in zip(rows, pages)]
    for page, score in zip(scored, scores or ()):
        page |= {name: value for name, value in score.items() if name not in ("page", "valid")}
    for place in parts.choosing if parts.apart else ():
        scored[place]["chooses"] = True
    result = summary(rows, pages, scored, parts.comparing)
    # All of them: the seconds are those of writing every page, whichever part it belongs to.
    result["tokens_per_second"] = sum(row["tokens"] for row in rows) / max(row["seconds"] for row in rows)
    if scores is not None:
        # `n` stays that of all these pages: shares of exact and valid ones need no render.
        result |= {**means([scores[place] for place in parts.comparing]), "n": result["n"]}
        if parts.choosing and (found := means([scores[place] for place in parts.choosing]))["n"]:
            result["choosing"] = {"n": found["n"], metrics.CHOOSING: found[metrics.CHOOSING], "apart": parts.apart}
    return {**result, "pages": scored}


def text_scores(row: Row, page: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a page without rendering it."""
    found = validity(row["html"])
    return {
        "page": page["name"],
        "valid": found.valid and not row["cut_off"] and not row.get("looped"),
        "reason": "cut off" if row["cut_off"] else "cut where it began to loop" if row.get("looped") else found.reason,
        "truncated": row["cut_off"],
        "looping": looping(row["raw"]),
        "exact": same_html(row["html"], page["html"]),
        "tokens": row["tokens"],
        "reference_tokens": page["html_tokens"],
    }


def summary(
    rows: Sequence[Row], pages: Sequence[Mapping[str, Any]], scored: Sequence[dict], part: Sequence[int]
) -> dict[str, Any]:
    """Shares over the pages of `part`. `shuffled_exact` compares each answer with the next page's reference, as if the
    screenshots had been shuffled: a model that does not look at them scores as high there. Greedy answers depend on the
    screenshot alone, so the same answers serve."""
    rows, pages, scored = ([values[place] for place in part] for values in (rows, pages, scored))
    turned = [page["html"] for page in pages[1:] + pages[:1]]
    shuffled = sum(same_html(row["html"], html) for row, html in zip(rows, turned)) / len(rows)
    tokens = sum(row["tokens"] for row in rows)
    return summarise(scored) | {
        "shuffled_exact": shuffled if len(rows) > 1 else None,
        "tokens": tokens,
        "mean_tokens": tokens / len(rows),
        "mean_reference_tokens": sum(page["html_tokens"] for page in pages) / len(rows),
    }


# -----------------------------------------------------------------------------
# Rendering


def pairs_of(rows: Sequence[Row], pages: Dataset) -> list[Pair]:
    """Each page beside what was written of it."""
    return [pair_of(row, page) for row, page in zip(rows, pages)]


def pair_of(row: Row, page: Mapping[str, Any]) -> Pair:
    """In a window for its screenshot, whose size is known: to decode it would hold up the writing."""
    return Pair(page["name"], page["html"], row["html"], *window_of(page["width"], page["height"]))


class MarkedProgress(Progress):
    """Each page that is rendered and scored is progress of this rank, too, and a place to stop."""

    def keep(self, *arguments: Any) -> None:
        super().keep(*arguments)
        go_on()


class Rendering:
    """(main process only) Renders what was written and scores how it looks; says, once, where that is impossible."""

    def __init__(self, folder: Path):
        self.folder, self.obstacle = folder, ""  # why pages cannot be rendered here
        self.facts: dict[str, str] = {}  # of the browser, once it has rendered
        self.proved = False  # by the scorer, of itself, in this run
        self.scorers: Scorers | None = None  # at work since tokens are written
        self.texts: dict[int, dict[str, Any]] = {}  # `text_scores` by place, of what was written last
        self.ending: threading.Thread | None = None  # those of before

    @cached_property
    def clip(self) -> tuple[Clip | None, str]:
        """CLIP or None, and why."""
        return find_clip()

    def progress(self, label: str) -> Progress:
        """What is kept on disk, until `forget`, of the pages rendered under `label`."""
        clip, _ = self.clip
        return MarkedProgress(
            self.folder / f"rendered_{label.replace(' ', '_')}", pictures=True, clip=clip and clip.name
        )

    @contextlib.contextmanager
    def beside(self, label: str, pages: Dataset) -> Iterator[tuple[Callable[[Row], None], Callable[[], None]]]:
        """(all ranks) What takes the pages that are written inside, one by one, and what is called once tokens are
        written: pages are rendered and scored by processes beside the writing, and `score` has only the last ones to
        wait for.

        Does nothing on other ranks, for a few pages, and with CLIP, which each process would have to load.
        """
        self.close()
        self.texts = {}
        if self.ending is not None:
            self.ending.join()
        finished = begun = nothing
        with contextlib.ExitStack() as unless_written:
            unless_written.callback(self.close)
            if is_main() and not self.obstacle and (count := scorers_for(len(pages))) and self.clip[0] is None:
                begun = partial(self.begin, count, pages)
                try:
                    finished = partial(self.give, begun, self.progress(label), pages)
                except OSError as error:
                    self.give_up(error)
            yield finished, begun
            unless_written.pop_all()

    def begin(self, count: int, pages: Dataset) -> None:
        """Starts so many processes, which render the references first. Not before the GPU writes: cores open its
        screenshots until then, and some fifty processes that start would take them."""
        if self.scorers is not None or self.obstacle:
            return
        try:
            self.scorers = Scorers(count)
            if not self.proved:
                self.scorers.prove()
            # The longest are written to the end, after which nobody should wait for more than they need.
            for place in longest_first(pages):
                self.scorers.expect(pair_of({"html": None}, pages[place]))
        except (BrowserMissing, OSError) as error:
            self.give_up(error)

    def give(self, begun: Callable[[], None], progress: Progress, pages: Dataset, row: Row) -> None:
        """A page that is written, unless an interrupted run has scored it; what is scored meanwhile is kept."""
        begun()  # where all were written before it could be told
        page = pages[row["place"]]
        pair = pair_of(row, page)
        if self.scorers is not None and pair.key not in progress.rows:
            self.scorers.give(pair, progress.folder)
        # Now, while a GPU writes on: after the last page someone waits for it.
        self.texts[row["place"]] = text_scores(row, page)
        holds = self.scorers is not None and (self.proved or self.scorers.proof is True)
        try:
            for key, score in self.scorers.told() if holds else ():
                progress.keep(key, score, ())
        except OSError as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Nothing can be rendered here, in this run."""
        self.close()
        self.obstacle = str(error)
        say(f"pages are not rendered, so there are no scores of how they look: {error}")

    def close(self) -> None:
        """Ends the processes that score, which takes some tenths of a second: nobody waits for that."""
        if self.scorers is not None:
            self.ending = threading.Thread(target=self.scorers.close)
            self.ending.start()
            self.scorers = None

    def score(self, label: str, rows: Sequence[Row], pages: Dataset) -> list[dict[str, Any]] | None:
        """The scores of each page; None where nothing can be rendered."""
        if self.obstacle:
            return None
        try:
            with contextlib.closing(self), Renderer() as renderer:
                clip, why_not = self.clip
                # Once a run, before its first score. Nothing is kept of what was scored meanwhile until it holds.
                if not self.proved and not (self.scorers and self.scorers.proved()):
                    prove(renderer, clip=clip)
                self.proved = True
                fonts_here()  # asked for while others work
                scores = run_pairs(pairs_of(rows, pages), renderer, self.progress(label), clip, self.scorers)
                if renderer.version or not self.facts:  # else all had been scored by an interrupted run
                    self.facts = browser_facts(renderer, clip, why_not)
        except (BrowserMissing, ScorerError, OSError) as error:
            self.give_up(error)
            return None
        return scores

    def write_report(
        self,
        label: str,
        rows: Sequence[Row],
        pages: Dataset,
        facts: Mapping[str, str],
        more: Mapping[str, Mapping[str, Any]],
        comparison: Mapping[str, Any] | None,
        before: tuple[str, Sequence[Row]] | None = None,
        training: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    ) -> None:
        """report.html of the pages under `label`, beside those written `before`, (label, rows)."""
        pairs, progress = self.rendered(label, rows, pages)
        earlier = self.rendered(*before, pages) if before else None
        file = self.folder / "report.html"
        title = "What the model wrote"
        write_pages_report(file, title, pairs, progress, facts, more, comparison, earlier, training)

    def rendered(self, label: str, rows: Sequence[Row], pages: Dataset) -> tuple[list[Pair], Progress]:
        """What was rendered under `label`; what an interruption has lost is rendered again."""
        pairs, progress = pairs_of(rows, pages), self.progress(label)
        if any(pair.key not in progress.rows for pair in pairs):
            with Renderer() as renderer:
                run_pairs(pairs, renderer, progress, self.clip[0])
        return pairs, progress

    def forget(self) -> None:
        """Removes what every `progress` has kept, once the results are written."""
        for folder in self.folder.glob("rendered_*"):
            shutil.rmtree(folder, ignore_errors=True)


def render_and_score(
    rendering: Rendering, label: str, rows: Sequence[Row], pages: Dataset, parts: Parts
) -> dict[str, Any]:
    """(main process only) What `score_held_out` returns, with the scores of a rendering."""
    pages_known = list(pages)
    # Those that are missing while others render the last pages.
    texts = [rendering.texts.pop(row["place"], None) or text_scores(row, page) for row, page in zip(rows, pages_known)]
    return score_held_out(rows, pages_known, rendering.score(label, rows, pages), parts, texts)


# -----------------------------------------------------------------------------
# Keeping


def keep_outputs(rows: Sequence[Row], pages: Dataset, folder: Path, name: str) -> None:
    """(main process only) One folder per page: what was shown, what was wanted, what was written. Folders of more pages
    than there are now, left by the run that this one resumes, go: `page_scores.py FOLDER` would score them, too."""
    for place in folder.glob("page-*"):
        number = place.name.removeprefix("page-")
        if number.isdecimal() and int(number) > len(pages):
            shutil.rmtree(place)
    for number, (row, page) in enumerate(zip(rows, pages), start=1):
        place = folder / f"page-{number:04d}"
        place.mkdir(parents=True, exist_ok=True)
        use.open_screenshot(page["screenshot"]).save(place / "screenshot.png")
        (place / "reference.html").write_text(page["html"], encoding="utf-8")
        (place / f"{name}.html").write_text(row["html"], encoding="utf-8")
        if row["raw"] != row["html"]:
            (place / f"{name}.raw.txt").write_text(row["raw"], encoding="utf-8")


# -----------------------------------------------------------------------------
# Telling


def announce(label: str, result: Mapping[str, Any]) -> str:
    """A result for the console, in lines that a terminal shows whole; metrics by the table of scoring.metrics."""

    def share(name: str) -> str:
        return "-" if result[name] is None else f"{100 * result[name]:.1f} %"

    choosing = result.get("choosing")
    others = f" ({choosing['n']} others choose the weights)" if choosing and choosing["apart"] else ""
    told = (
        f"{label}: {plural(result['n'], 'held-out page')}{others}: exact {share('exact')}, valid {share('valid')}, "
        f"truncated {share('truncated')}, looping {share('looping')}, exact with the screenshots shuffled "
        f"{share('shuffled_exact')}; {result['mean_tokens']:.0f} tokens a page (references "
        f"{result['mean_reference_tokens']:.0f}), {result['tokens_per_second']:,.0f} tokens/s" + rendered_words(result)
    )
    return in_columns(told)


def rendered_words(result: Mapping[str, Any]) -> str:
    """The end of `announce`: failures and the mean of each metric; "" where nothing was rendered."""
    if "failures" not in result:
        return ""
    return (
        f"; rendered, {plural(result['failures'], 'failure')} counted as the worst: {scores_line(result)}"
        f"{left_out_words(result)}"
    )
