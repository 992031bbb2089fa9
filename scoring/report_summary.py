"""The numbers of a report over many pages: means, tiles, distributions, before and after, groups, missed texts, losses.

    mean_of(rows, "likeness").with_failures, histogram(rows, "likeness").bins[9].count
    curve_of([(1, 2.5), (2, 1.25)], "loss per supervised token").line

Sections: Summary, Distribution, Comparison, Groups, Curve.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scoring import metrics
from scoring.report_values import (
    CHOSE,
    CONTENTS,
    FLAGS,
    NOTHING_ELSE,
    Box,
    PageResult,
    Row,
    cut,
    is_number,
    label,
    number,
    percent,
    plural,
    worst,
)

# -----------------------------------------------------------------------------
# Summary


@dataclass(frozen=True)
class Mean:
    """`measured` pages have this score without having failed; None where there is nothing to take a mean of."""

    with_failures: float | None
    without: float | None
    measured: int


def mean_of(rows: Sequence[Row], score: str) -> Mean:
    """The mean with each failure as the worst, and the mean of the rendered pages alone."""
    values = [row.values[score] for row in rows if row.failure is None and score in row.values]
    failures = sum(row.failure is not None for row in rows)
    total = math.fsum(values)
    everything = (total + failures * worst(score)) / (len(values) + failures) if len(values) + failures else None
    return Mean(everything, total / len(values) if values else None, len(values))


def share_of(rows: Sequence[Row], flag: str) -> tuple[int, int]:
    """(pages that have the flag, pages for which it is known); a failed page without the flag counts as known."""
    known = [row.flags.get(flag, False) for row in rows if flag in row.flags or row.failure is not None]
    return sum(known), len(known)


def scores_of(rows: Sequence[Row]) -> list[str]:
    """Metrics that a page has, the one that chooses first, then in the table's order; then other numbers that look like
    scores: in 0..1, not all whole."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.values.items():
            found.setdefault(name, []).append(value)
        if row.failure is not None:
            found.setdefault(metrics.CHOOSING, [])
    table = [metric.name for metric in metrics.choosing_first()]
    others = [name for name in found if name not in table and all(0 <= value <= 1 for value in found[name])]
    return [name for name in table if name in found] + [name for name in others if any(v % 1 for v in found[name])]


@dataclass(frozen=True)
class Tile:
    """A large number at the top."""

    name: str
    value: str
    note: str


def tiles_of(rows: Sequence[Row], control: Mapping[str, float]) -> list[Tile]:
    """Pages, the mean of the metric that chooses, and before training, and of the control, failures, and each flag's
    share, where any page has the flag."""
    failures = sum(row.failure is not None for row in rows)
    tiles = [Tile("pages", f"{len(rows):,}", ""), Tile("failures", f"{failures:,}", percent(failures, len(rows)))]
    choosing = mean_of(rows, metrics.CHOOSING).with_failures
    if choosing is not None:
        note = f"failures as {worst(metrics.CHOOSING):g}"
        tiles.insert(1, Tile(label(metrics.CHOOSING), number(choosing), note))
    for name, (value, note) in control.items():
        tiles.insert(len(tiles) - 1, Tile(f"{label(name)}, shuffled", number(value), note))
    for flag in FLAGS:
        have, known = share_of(rows, flag)
        if known and any(flag in row.flags for row in rows):
            tiles.append(Tile(flag, percent(have, known), f"{have:,} of {known:,}"))
    return tiles


def counted(rows: Sequence[Row]) -> list[Row]:
    """The pages that numbers are taken over: the best of several weights is too good by chance on those that chose, and
    a reference that cannot be rendered says nothing of what was written."""
    return [row for row in rows if not row.chooses and not row.left_out]


def chose_words(rows: Sequence[Row]) -> str:
    """A sentence on the pages that chose the weights; "" where none did."""
    choosing = len(rows) - len(counted(rows))
    if not choosing:
        return ""
    verb = "it is shown below, and left" if choosing == 1 else "they are shown below, and left"
    return f"{choosing:,} of {plural(len(rows), 'page')} {CHOSE}: {verb} out of tiles, means and distributions."


def before_mean(rows: Sequence[Row], score: str) -> float | None:
    """The mean before training over the pages that have one; None where no page was then written."""
    known = [row.before[score] for row in rows if score in row.before]
    return math.fsum(known) / len(known) if known else None


def summary(rows: Sequence[Row], scores: Sequence[str], control: Mapping[str, Any]) -> dict[str, Any]:
    """Counts, means of `scores` with and without failures, causes, and the failures by name, as report.html calls them.

    Causes and failures lead to pages, so that they are those of all pages; numbers leave out those that chose.
    """
    compared = counted(rows)
    causes = Counter(cause for row in rows for cause in set(map(str, row.causes)))
    return {
        "chose": chose_words(rows),
        "tiles": tiles_of(compared, control),
        "means": {name: mean_of(compared, name) for name in scores},
        "befores": {name: before_mean(compared, name) for name in scores},
        "headline": headline(compared, control),
        "failures_as": f"failures as {metrics.worst_words(scores)}",
        "causes": [(cut(cause), count) for cause, count in causes.most_common(40)],
        "failed": [row for row in rows if row.failure is not None],
        "failed_and_chose": sum(row.failure is not None and row.chooses for row in rows),
        "worst": f"{worst(metrics.CHOOSING):g}",
    }


def headline(rows: Sequence[Row], control: Mapping[str, Any]) -> str:
    """The result in a sentence, of the metric that chooses; "" where it was not measured."""
    now, then = mean_of(rows, metrics.CHOOSING).with_failures, before_mean(rows, metrics.CHOOSING)
    if now is None:
        return ""
    name = label(metrics.CHOOSING)
    known = f"{plural(len(rows), 'page')}: mean {name} {number(now)}"
    known += f", {number(then)} before training" if then is not None else ""
    shuffled = control.get(metrics.CHOOSING)
    return (
        known
        + (f", {number(shuffled[0])} against another page" if shuffled else "")
        + f" ({metrics.entry(metrics.CHOOSING).best:g} is a copy)."
    )


MEANINGS = {
    "valid": "whole, well-formed HTML that was not cut off",
    "truncated": "the model was stopped at the most tokens that it may write",
    "looping": "it wrote the same over and over",
    "exact": "the same HTML as the reference's, but for white space",
    "shuffled": "the control: each answer scored against another page. A model that does not look scores as high there",
    "failure": "the written page could not be rendered; it counts as the worst",
}


def legend_of(rows: Sequence[Row], scores: Sequence[str], control: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, what it means) of every measure that the report shows and that has a meaning."""
    known = [(label(name), metrics.entry(name).meaning) for name in scores if name in metrics.names()]
    shown = [flag for flag in FLAGS if any(flag in row.flags for row in rows)]
    shown += ["shuffled"] if control else []
    shown += ["failure"] if any(row.failure is not None for row in rows) else []
    return [(name, meaning) for name, meaning in known if meaning] + [(name, MEANINGS[name]) for name in shown]


@dataclass(frozen=True)
class Pick:
    """A page of the first screen."""

    title: str
    row: Row


def picks_of(rows: Sequence[Row]) -> list[Pick]:
    """Of `worst_first` rows: one from the middle, the worst, the best, of those that were rendered where there are any;
    not the most flattering example, and none twice."""
    usable = [row for row in counted(rows) if row.value(metrics.CHOOSING) is not None] or list(rows)
    usable = [row for row in usable if row.failure is None] or usable
    if len(usable) < 3:
        return [Pick(title, row) for title, row in zip(("The worst", "The best")[2 - len(usable) :], usable)]
    middle = usable[(len(usable) - 1) // 2]
    return [Pick("One from the middle", middle), Pick("The worst", usable[0]), Pick("The best", usable[-1])]


# -----------------------------------------------------------------------------
# Distribution

BINS = 10


def bin_of(value: float) -> int:
    """0..9 for 0..1; the last bin takes 1.0 too. The script has the same line."""
    return min(BINS - 1, int(value * BINS))


def edges(index: int) -> str:
    """The bounds of a bin: "0.3 to 0.4"."""
    return f"{index / BINS:.1f} to {(index + 1) / BINS:.1f}"


@dataclass(frozen=True)
class Bin:
    """A bar of a histogram, in percent of its picture."""

    x: float
    height: float
    count: int
    text: str


@dataclass(frozen=True)
class Histogram:
    """The distribution of a score; `text` says it to who does not see it."""

    name: str
    text: str
    mean: float | None  # failures as the worst
    bins: Sequence[Bin]
    failed: Bin | None


def histogram(rows: Sequence[Row], score: str) -> Histogram:
    """How many pages lie in each tenth of a score; failures stand apart at the foot of the worst bar."""
    counts = Counter(bin_of(value) for value in (row.value(score) for row in rows) if value is not None)
    most = max(counts.values())

    def bar(index: int, count: int) -> Bin:
        text = f"{label(score)} {edges(index)}: {plural(count, 'page')}"
        return Bin(10 * index + 0.6, 100 * count / most, count, text)

    failed = sum(row.failure is not None for row in rows)
    whole = ", ".join(f"{edges(index)}: {counts[index]}" for index in range(BINS) if counts[index])
    return Histogram(
        name=score,
        text=f"{label(score)} {whole}",
        mean=mean_of(rows, score).with_failures,
        bins=[bar(index, counts[index]) for index in range(BINS)],
        failed=bar(bin_of(worst(score)), failed) if failed else None,
    )


# -----------------------------------------------------------------------------
# Comparison


@dataclass(frozen=True)
class Interval:
    """A difference as a dot with its interval; x and y in pixels."""

    label: str
    y: int
    low: str
    middle: str
    high: str


@dataclass(frozen=True)
class Intervals:
    """The picture of all differences, in pixels; `zero` is where no difference lies."""

    width: int
    height: int
    zero: int
    ticks: Sequence[tuple[str, str]]  # (x, value)
    lines: Sequence[Interval]


def intervals(found: Mapping[str, Mapping[str, Any]]) -> Intervals | None:
    """Each difference with its interval, all on one scale around 0; None where nothing can be drawn."""
    known = [
        (name, [float(entry[key]) for key in ("low", "difference", "high")])
        for name, entry in found.items()
        if all(is_number(entry.get(key)) for key in ("low", "difference", "high"))
    ]
    if not known:
        return None
    reach = max(abs(value) for _, values in known for value in values) or 1.0
    left, middle, half, tall = 96, 226, 120, 26

    def x(value: float) -> str:
        return f"{middle + half * value / reach:.1f}"

    lines = [
        Interval(cut(label(name), 15), 14 + tall * index, *map(x, values)) for index, (name, values) in enumerate(known)
    ]
    ticks = [(x(value), number(value, 2, "+")) for value in (-reach, reach)] + [(str(middle), "0")]
    return Intervals(left + 2 * half + 44, tall * len(known) + 6, middle, ticks, lines)


def comparison_view(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """`comparison` has "metrics" {name: {before, after, difference, low, high, p}}, "decoding" [{...}], "n", and
    "apart", False where the pages that are compared chose the weights, too."""
    found, decoding = comparison.get("metrics") or {}, comparison.get("decoding") or []
    found = dict(sorted(found.items(), key=lambda item: item[0] != metrics.CHOOSING))
    keys = ("before", "after", "difference", "low", "high", "p")
    columns = list(dict.fromkeys(name for entry in decoding for name in entry))

    def cell(name: str, value: Any) -> str:  # a setting as it was set, a score as scores are written
        return f"{value:g}" if is_number(value) and name not in ("before", "after", "difference") else number(value)

    pages = f"{plural(comparison['n'], 'page')}, each written by both models." if is_number(comparison.get("n")) else ""
    return {
        "pages": pages,
        "apart": comparison.get("apart", True),
        "metrics": [(name, {key: entry.get(key) for key in keys}) for name, entry in found.items()],
        "intervals": intervals(found),
        "columns": columns,
        "decoding": [[cell(name, entry.get(name)) for name in columns] for entry in decoding],
    }


# -----------------------------------------------------------------------------
# Groups

MOST_GROUPS = 8  # of one kind


@dataclass(frozen=True)
class Group:
    """Pages that have something in common."""

    name: str
    pages: int
    now: float | None  # the mean of the metric that chooses, failures as the worst
    before: float | None
    failures: int


def group_of(name: str, rows: Sequence[Row]) -> Group:
    """Its numbers."""
    failures = sum(row.failure is not None for row in rows)
    now, then = mean_of(rows, metrics.CHOOSING).with_failures, before_mean(rows, metrics.CHOOSING)
    return Group(name, len(rows), now, then, failures)


def ranges_of(values: Sequence[int], unit: str, parts: int = 3) -> list[tuple[str, int, int]]:
    """(name, least, most) of ranges with about as many values each; fewer where many values are equal."""
    known = sorted(values)
    ends = sorted({known[len(known) * part // parts - 1] for part in range(1, parts + 1) if len(known) >= part})
    starts = [known[0], *(end + 1 for end in ends[:-1])]
    names = [f"{low:,} to {high:,} {unit}" if low < high else f"{low:,} {unit}" for low, high in zip(starts, ends)]
    return list(zip(names, starts, ends))


def by_number(rows: Sequence[Row], value: str, unit: str) -> list[Group]:
    """By a row's number: each value of up to three, else ranges."""
    found = sorted({getattr(row, value) for row in rows})
    ranges = [(f"{one:,} {unit}", one, one) for one in found]
    if len(found) > 3:
        ranges = ranges_of([getattr(row, value) for row in rows], unit)
    return [group_of(name, [row for row in rows if low <= getattr(row, value) <= high]) for name, low, high in ranges]


def by_source(rows: Sequence[Row]) -> list[Group]:
    """By dataset or folder, the largest first; the small ones together."""
    counts = Counter(row.source for row in rows)
    largest = [name for name, _ in counts.most_common(MOST_GROUPS if len(counts) <= MOST_GROUPS else MOST_GROUPS - 1)]
    groups = [group_of(cut(name or "(top folder)"), [row for row in rows if row.source == name]) for name in largest]
    others = [row for row in rows if row.source not in largest]
    return groups + ([group_of(f"{len(counts) - len(largest):,} others", others)] if others else [])


def groups_of(rows: Sequence[Row]) -> list[tuple[str, list[Group]]]:
    """(what groups them, groups): by length of the HTML, width of the screenshot, what a page holds, and source. What
    is alike in all pages does not group them."""
    rows = [row for row in counted(rows) if row.value(metrics.CHOOSING) is not None]
    if not rows:
        return []
    unit = "tokens" if all(row.in_tokens for row in rows) else "characters"
    same_unit = [row for row in rows if row.in_tokens == (unit == "tokens")]
    holds = [(name, [row for row in rows if name in row.holds]) for name in (*CONTENTS, NOTHING_ELSE)]
    found = {
        "length of the HTML": by_number(same_unit, "length", unit),
        "width of the screenshot": by_number([row for row in rows if row.width is not None], "width", "px"),
        "what the page holds": [group_of(name, members) for name, members in holds if members],
        "source": by_source(rows),
    }
    return [(name, groups) for name, groups in found.items() if len(groups) > 1]


@dataclass(frozen=True)
class MissedText:
    """A text of wanted pages: on how many it stands, on how many of those the written page lacks it."""

    text: str
    missed: int
    wanted: int


class MissedTexts:
    """Counts, page by page, which texts of the wanted pages have no partner in the written ones. A page that was not
    rendered lacks all of them for another reason, and one that chose the weights is in no number."""

    def __init__(self) -> None:
        self.missed: Counter[str] = Counter()
        self.wanted: Counter[str] = Counter()

    def add(self, page: PageResult) -> None:
        """Each text counts once a page."""
        if page.failure is not None or page.chooses or page.reference_failed:
            return
        missing = self.texts(page.missing)
        self.missed.update(missing)
        self.wanted.update(missing | self.texts(box for box, _ in page.matched))

    @staticmethod
    def texts(boxes: Iterable[Box]) -> set[str]:
        """Those with a letter or a digit: a lone separator says nothing of what is missed."""
        found = (cut(" ".join(box.text.split()), 120) for box in boxes)
        return {text for text in found if any(map(str.isalnum, text))}

    def most(self, count: int = 12) -> list[MissedText]:
        """On most pages first, then those that are always missed, then longer ones, which say more."""

        def key(text: str) -> tuple:
            return -self.missed[text], -self.missed[text] / self.wanted[text], -len(text), text

        first = sorted(self.missed, key=key)[:count]
        return [MissedText(text, self.missed[text], self.wanted[text]) for text in first]


# -----------------------------------------------------------------------------
# Curve

CURVE_WIDTH, CURVE_HEIGHT, CURVE_POINTS = 560, 200, 400  # pixels; more points than pixels show nothing


@dataclass(frozen=True)
class Curve:
    """A line over the steps of a training, in pixels; `text` says it to who does not see it."""

    title: str
    text: str
    points: str  # every step, pale; "" where only the means are shown
    line: str  # the running mean, or the values where there are few
    dots: Sequence[tuple[str, str, str]]  # (x, y, what it is), where there are few
    ticks: Sequence[tuple[str, str]]  # (y, value)
    steps: Sequence[tuple[str, str, str]]  # (x, step, its anchor)


def curve_of(points: Sequence[tuple[float, float]], title: str, smooth: bool = True) -> Curve | None:
    """The curve of (step, value) in order; None for fewer than two that are finite."""
    points = [(float(step), float(value)) for step, value in points if is_number(step) and is_number(value)]
    if len(points) < 2:
        return None
    mean, means = points[0][1], []
    for _, value in points:
        mean += (value - mean) * 0.1
        means.append(mean)
    every = max(1, -(-len(points) // CURVE_POINTS))
    kept = sorted({*range(0, len(points), every), len(points) - 1})
    values, (first, last) = [value for _, value in points], (points[0][0], points[-1][0])
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5

    def x(step: float) -> str:
        return f"{48 + (CURVE_WIDTH - 60) * (step - first) / ((last - first) or 1):.1f}"

    def y(value: float) -> str:
        return f"{10 + (CURVE_HEIGHT - 40) * (high - value) / (high - low):.1f}"

    raw = " ".join(f"{x(points[place][0])},{y(points[place][1])}" for place in kept)
    mean_line = " ".join(f"{x(points[place][0])},{y(means[place])}" for place in kept)
    few = len(points) <= 40 and not smooth
    text = f"{title}: {number(values[0])} at step {first:,.0f}, {number(values[-1])} at step {last:,.0f}"
    return Curve(
        title=title,
        text=f"{text}; lowest {number(min(values))}, highest {number(max(values))}",
        points=raw if smooth else "",
        line=mean_line if smooth else raw,
        dots=[(x(step), y(value), f"step {step:,.0f}: {number(value)}") for step, value in points] if few else [],
        ticks=[(y(value), number(value, 2)) for value in (high, (high + low) / 2, low)],
        steps=[(x(first), f"step {first:,.0f}", "start"), (x(last), f"step {last:,.0f}", "end")],
    )
