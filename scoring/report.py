"""Shows what the model wrote: one HTML file with every page's screenshot, renders, difference, scores and text.

    from scoring.report import write_report
    from scoring.report_values import PageResult
    page = PageResult("login", {"valid": True}, None, None, "<p>Hi", "<p>Hello</p>", [], [], [], "out of time")
    write_report(Path("evaluation/report.html"), "Evaluation", [page], {"model": "demo"})

The file needs no network, no server and, to be read, no JavaScript. Names, HTML and texts are a model's output and
count as hostile: all are escaped, and a content security policy lets only the report's own script run. The HTML is in
report.html and report_card.html, the look in report.css, the behaviour in report.js; pages come first, then numbers,
then every page, and last what it was made with.

Sections: Card, Report.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from scoring import metrics
from scoring.machine import most_at_once
from scoring.report_pictures import KINDS, MANY_PAGES, Detail, Figure, detail_for, figures_of
from scoring.report_summary import (
    MissedTexts,
    comparison_view,
    counted,
    curve_of,
    groups_of,
    histogram,
    legend_of,
    picks_of,
    scores_of,
    summary,
)
from scoring.report_values import (
    CHOSE,
    FLAGS,
    MAX_HTML,
    MAX_REASON,
    PageResult,
    Row,
    cut,
    in_range,
    is_flag,
    is_number,
    label,
    number,
    p_value,
    page_name,
    plural,
    printable,
    row_of,
    worst,
)

MOST_AT_ONCE = 8  # pages whose cards are made beside each other; the pictures of each may be 60 MB

# -----------------------------------------------------------------------------
# Card


@dataclass(frozen=True)
class ScoreShown:
    """A score on a card."""

    name: str
    text: str
    share: float | None  # of the bar; None without one
    before: str = ""  # the same before training


def scores_shown(page: PageResult, before: Mapping[str, float]) -> tuple[list[ScoreShown], list[tuple[str, Any]]]:
    """Each score as a number with a bar, and (name, value) of what is no score. A failed page has the worst of each."""
    failed, table = page.failure is not None, [metric.name for metric in metrics.choosing_first()]
    known = [name for name in table if name in page.scores or (failed and name == metrics.CHOOSING)]
    scores, others = [], []
    for name in known + [name for name in page.scores if name not in (*table, *FLAGS)]:
        value = worst(name) if failed and name in table else page.scores.get(name)
        share = isinstance(value, float | np.floating) and 0 <= value <= 1  # not a count, even of 1
        if is_number(value) and (name in table or share):
            then = number(before[name], 2) if name in before else ""
            scores.append(ScoreShown(name, number(value, 2), in_range(value), then))
        elif name in table:
            scores.append(ScoreShown(name, number(value), None))
        else:
            others.append((name, value))
    return scores, others


def labels_of(page: PageResult) -> list[tuple[str, str]]:
    """(kind, text) of causes, and of the flags that say something: each once, though both may share a name; and whether
    the page chose the weights."""
    flags = {name: bool(value) for name, value in page.scores.items() if is_flag(value)}
    good = [name for name in ("valid", "exact") if flags.get(name)]
    bad = ["failed"] if page.failure is not None else []
    bad += ["not valid"] if flags.get("valid") is False else []
    causes = dict.fromkeys(str(cause) for cause in page.causes)
    said = {*causes} | ({"truncated"} if "cut off" in causes else set())
    bad += [name for name in ("truncated", "looping") if flags.get(name) and name not in said]
    groups = (("cause", causes), ("bad", bad), ("good", good), ("chooses", [CHOSE] * page.chooses))
    return [(kind, cut(text)) for kind, texts in groups for text in texts]


@dataclass(frozen=True)
class Source:
    """A page's HTML, cut, and what is said of its size."""

    html: str
    size: str


def source_of(html: str, limit: int = MAX_HTML) -> Source:
    """The first `limit` characters, and how many there are."""
    size = plural(len(html), "character") if html else "empty"
    more = f", the first {limit:,} are shown" if len(html) > limit else ""
    return Source(cut(html, limit), size + more)


@dataclass(frozen=True)
class Card:
    """What report_card.html shows of a page."""

    number: int
    name: str
    values: str  # each score, as JSON: what sorting and filters need
    failure: str | None
    chooses: bool
    tall: int  # of the tallest picture, pixels
    labels: list[tuple[str, str]]
    scores: list[ScoreShown]
    others: list[tuple[str, Any]]
    figures: list[Figure]
    has_boxes: bool
    html: Source
    reference_html: Source
    before_html: Source | None


def card(page: PageResult, row: Row, detail: Detail = MANY_PAGES) -> tuple[str, str]:
    """One page as an <article>, and its pictures without boxes, for the first screen."""
    figures, tall = figures_of(page, row, detail)
    scores, others = scores_shown(page, row.before)
    values = {score: row.value(score) for score in (metrics.names() if row.failure is not None else row.values)}
    view = Card(
        number=row.number,
        name=page_name(page.name),
        values=json.dumps(values),
        failure=None if row.failure is None else cut(row.failure, MAX_REASON),
        chooses=row.chooses,
        tall=tall,
        labels=labels_of(page),
        scores=scores,
        others=others,
        figures=figures,
        has_boxes=bool(page.matched or page.missing or page.invented),
        html=source_of(page.html),
        reference_html=source_of(page.reference_html),
        before_html=source_of(page.before.html, detail.before_html) if page.before else None,
    )
    module = templates().get_template("report_card.html").module
    return module.card(view), module.peek(figures[:-1])


# -----------------------------------------------------------------------------
# Report


@cache
def part(name: str) -> str:
    """A file of this folder: the report's look or its behaviour."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def policy() -> str:
    """The content security policy: pictures from data URIs, the report's style, and the one script by its hash."""
    digest = base64.b64encode(hashlib.sha256(part("report.js").encode("utf-8")).digest()).decode("ascii")
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}';"
        " base-uri 'none'; form-action 'none'"
    )


@cache
def templates() -> jinja2.Environment:
    """The report's HTML: every value is made printable and escaped, whatever a template forgets."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["choosing"] = metrics.CHOOSING
    environment.filters |= {"cut": cut, "label": label, "page_name": page_name}
    environment.filters |= {"number": number, "p_value": p_value, "plural": plural}
    return environment


def carded(pages: Iterable[PageResult], detail: Detail) -> Iterator[tuple[PageResult, Row, tuple[str, str]]]:
    """Each page with its row and what `card` makes of it, in their order. Some are made beside each other: encoding
    their pictures, a second or two a page, leaves Python's lock."""
    at_once, under_way = min(MOST_AT_ONCE, most_at_once()), deque()

    def made(page: PageResult, number: int) -> tuple[PageResult, Row, tuple[str, str]]:
        row = row_of(page, number)
        return page, row, card(page, row, detail)

    with ThreadPoolExecutor(at_once) as pool:
        for number, page in enumerate(pages, 1):
            under_way.append(pool.submit(made, page, number))
            del page  # which its turn keeps
            if len(under_way) == at_once:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def worst_first(rows: Sequence[Row]) -> list[Row]:
    """By the first score there is, which is the metric that chooses: failures, then the worst, then pages without it.
    Not by `overall`: a wholly different page may reach 0.6 there by a few lucky matches."""
    score = next(iter(scores_of(rows)), metrics.CHOOSING)

    def key(row: Row) -> tuple:
        value = row.value(score)
        distance = 0.0 if value is None else abs(value - worst(score))
        return value is None, distance, row.failure is None, row.name, row.number

    return sorted(rows, key=key)


def pieces_of(
    title: str,
    facts: Mapping[str, Any],
    rows: Sequence[Row],
    more: Mapping[str, Any],
    card_of: Callable[[Row], Markup],
    peek_of: Callable[[Row], Markup],
) -> Iterator[str]:
    """The report's HTML, piece by piece: with hundreds of pages it is too large to be held at once. `more` has
    "comparison", "training", "control" as in `write_report`, and "missed"."""
    scores, compared, control = scores_of(rows), counted(rows), more["control"] or {}
    measured = [score for score in scores if any(row.value(score) is not None for row in compared)]
    training = more["training"] or {}
    curves = [
        curve_of(training.get("losses") or (), "Training loss per supervised token"),
        curve_of(training.get("evaluations") or (), f"Mean {label(metrics.CHOOSING)} of the held-out pages", False),
    ]
    return (
        templates()
        .get_template("report.html")
        .generate(
            policy=policy(),
            style=Markup(part("report.css")),
            script=Markup(part("report.js")),
            title=cut(title),
            facts=[(cut(name), cut(value, MAX_REASON)) for name, value in facts.items()],
            rows=rows,
            picks=picks_of(rows),
            peek_of=peek_of,
            comparison=comparison_view(more["comparison"]) if more["comparison"] else None,
            curves=[curve for curve in curves if curve],
            groups=groups_of(rows),
            missed=more["missed"],
            legend=legend_of(rows, scores, control),
            histograms=[histogram(compared, score) for score in measured],
            scores=[{"name": name, "worst": f"{worst(name):g}"} for name in scores],
            kinds=KINDS,
            card_of=card_of,
            **summary(rows, measured, control),
        )
    )


def write_report(
    path: Path,
    title: str,
    pages: Iterable[PageResult],
    facts: Mapping[str, Any],
    comparison: Mapping[str, Any] | None = None,
    training: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    control: Mapping[str, tuple[float, str]] | None = None,
    count: int | None = None,
) -> None:
    """Writes the report to `path`, whole or not at all. Pages are taken as they are needed: MOST_AT_ONCE are held.

    `facts` is a small table at the end; `comparison` is what `comparison_view` takes; `training` has "losses" and
    "evaluations" as (step, value); `control` has, of a score's name, what it is against another page's reference, and
    a note on it. `count` is how many pages come, where `len(pages)` does not say: few are shown in larger pictures.
    A page that failed has the worst scores; one that chose the weights is shown, and is in no tile, mean or
    distribution. A picture that cannot be read is said on its card. What `pages` raises goes through, and the old file
    stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    detail = detail_for(len(pages) if isinstance(pages, Sized) else count)
    rows: list[Row] = []
    missed = MissedTexts()
    with tempfile.TemporaryFile(dir=path.parent) as cards:  # the worst comes first, and is known last
        for page, row, texts in carded(pages, detail):
            start = cards.tell()
            whole, peek = (text.encode("utf-8", "replace") for text in texts)
            cards.write(whole + peek)
            rows.append(replace(row, start=start, peek=start + len(whole), end=cards.tell()))
            missed.add(page)
            del page, row  # before the next one is made: a page's pictures are many megabytes

        def kept(start: int, end: int) -> Markup:
            cards.seek(start)
            return Markup(cards.read(end - start).decode("utf-8"))  # escaped when it was made

        more = {"comparison": comparison, "training": training, "control": control, "missed": missed.most()}
        readers = (lambda row: kept(row.start, row.peek)), (lambda row: kept(row.peek, row.end))
        try:
            with unfinished.open("wb") as file:
                for piece in pieces_of(title, facts, worst_first(rows), more, *readers):
                    file.write(piece.encode("utf-8", "replace"))
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
