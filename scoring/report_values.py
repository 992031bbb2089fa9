"""What a page was, what the model wrote of it, and how values read: what every room of the report needs.

    page = PageResult("login", {"valid": True}, None, None, "<p>Hi", "<p>Hello</p>", [], [], [], "out of time")
    row_of(page, number=1).value("likeness"), number(0.5), plural(2, "page")

Sections: What is shown, Text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from scoring import metrics

# -----------------------------------------------------------------------------
# What is shown

FLAGS = ("valid", "truncated", "looping", "exact")
CHOSE = "chose the weights"


@dataclass(frozen=True)
class Box:
    """A text block, in shares (0..1) of its page's width and height."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Before:
    """The same page as the model wrote it before training. The picture as in `PageResult`."""

    written: np.ndarray | Path | None
    html: str
    scores: Mapping[str, float | None]  # metrics of the table
    failure: str | None = None


@dataclass(frozen=True)
class PageResult:
    """One page as it was and as the model wrote it. Pictures are (H, W, 3) uint8 or the path of a picture file."""

    name: str
    scores: dict[str, float | bool | None]  # metrics of the table, FLAGS, and others; None is not measured
    reference: np.ndarray | Path | None
    written: np.ndarray | Path | None  # None when it could not be rendered
    html: str
    reference_html: str
    matched: list[tuple[Box, Box]]  # (in the reference, in the written page)
    missing: list[Box]  # in the reference only
    invented: list[Box]  # in the written page only
    failure: str | None = None  # why there is no render; then every metric is the worst
    causes: tuple[str, ...] = ()
    chooses: bool = False  # it chose the weights that wrote it: shown, and left out of every mean
    reference_failed: bool = False  # which says nothing of what was written: shown, and left out of every mean
    before: Before | None = None  # None where the base wrote nothing
    width: int | None = None  # of the screenshot, pixels
    source: str = ""  # the dataset or the folder it is of, where there are several


@dataclass(frozen=True)
class Row:
    """What is kept of a page once its card is on disk: its numbers, and where the card lies, in bytes."""

    number: int
    name: str
    values: dict[str, float]
    flags: dict[str, bool]
    failure: str | None
    causes: tuple[str, ...]
    chooses: bool = False
    left_out: bool = False
    before: Mapping[str, float] = field(default_factory=dict)  # before training; the worst where that failed
    length: int = 0  # of the reference's HTML: tokens where they are known, else characters
    in_tokens: bool = False
    width: int | None = None
    source: str = ""
    holds: tuple[str, ...] = ()  # of CONTENTS
    start: int = 0
    peek: int = 0  # where its three pictures begin, for the first screen
    end: int = 0

    def value(self, score: str) -> float | None:
        """The worst for a page that failed; None where it was not measured."""
        return worst(score) if self.failure is not None else self.values.get(score)


def is_flag(value: Any) -> bool:
    """Yes or no, Python's or numpy's."""
    return isinstance(value, bool | np.bool_)


def is_number(value: Any) -> bool:
    """A finite number that is no flag."""
    return isinstance(value, int | float | np.number) and not is_flag(value) and math.isfinite(value)


def worst(score: str) -> float:
    """What a failed page gets."""
    return metrics.entry(score).worst if score in metrics.names() else 0.0


def in_range(value: float) -> float:
    """SSIM may lie below 0, and a sum of floats a hair above 1."""
    return min(1.0, max(0.0, float(value)))


def row_of(page: PageResult, number: int) -> Row:
    """The page's numbers; `number` counts from 1 in the order in which pages came."""
    numbers = {name: value for name, value in page.scores.items() if is_number(value)}
    values = {name: in_range(value) if name in metrics.names() else float(value) for name, value in numbers.items()}
    flags = {name: bool(value) for name, value in page.scores.items() if is_flag(value)}
    failure = None if page.failure is None else page.failure[: MAX_REASON + 1]
    tokens = page.scores.get("reference_tokens")
    return Row(
        number,
        page.name,
        values,
        flags,
        failure,
        page.causes,
        page.chooses,
        page.reference_failed,
        before=before_of(page),
        length=int(tokens) if is_number(tokens) else len(page.reference_html),
        in_tokens=is_number(tokens),
        width=page.width,
        source=page.source,
        holds=contents_of(page.reference_html),
    )


def before_of(page: PageResult) -> dict[str, float]:
    """The metrics of the table before training: the worst of each where the page then failed, {} where none was."""
    if page.before is None:
        return {}
    if page.before.failure is not None:
        return {name: worst(name) for name in page.scores if name in metrics.names()}
    known = {name: value for name, value in page.before.scores.items() if is_number(value)}
    return {name: in_range(value) for name, value in known.items() if name in metrics.names()}


# What a page may hold that makes it another kind of page, by its tags.
CONTENTS = {
    "a form": re.compile(r"<(?:input|select|textarea)\b", re.IGNORECASE),
    "a table": re.compile(r"<table\b", re.IGNORECASE),
    "a picture": re.compile(r"<(?:img|svg|picture|canvas|video)\b", re.IGNORECASE),
}
NOTHING_ELSE = "none of these"


def contents_of(html: str) -> tuple[str, ...]:
    """Which of CONTENTS a page holds, or NOTHING_ELSE."""
    return tuple(name for name, tag in CONTENTS.items() if tag.search(html)) or (NOTHING_ELSE,)


# -----------------------------------------------------------------------------
# Text

MAX_HTML, MAX_REASON, MAX_LABEL, MAX_TITLE = 200_000, 2_000, 200, 300  # characters
# Control characters become their pictures, so that a reader sees what the model wrote and no parser stumbles.
UNPRINTABLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {0x7F: 0x2421}
UNPRINTABLE |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF], 0xFFFD)


def printable(value: Any) -> Any:
    """What the templates show, which they escape: markup of theirs as it is, anything else as text that can be read."""
    if callable(value) and not isinstance(value, jinja2.Undefined):  # a dict's `items`, say, for an entry of that name
        raise TypeError(f"a template shows {value!r}")
    return value if isinstance(value, Markup) else str(value).translate(UNPRINTABLE)


def cut(text: Any, limit: int = MAX_LABEL) -> str:
    """At most `limit` characters; what is cut ends in an ellipsis. Escaping is the templates'."""
    text = str(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def page_name(name: str) -> str:
    """Something to click on in any case."""
    return cut(name if name.strip() else "(no name)")


def label(name: str) -> str:
    """A score's label, marked where lower is better."""
    if name not in metrics.names():
        return cut(name.replace("_", " "))
    metric = metrics.entry(name)
    return metric.label if metric.better == "higher" else f"{metric.label} ↓"


def plural(count: int, noun: str) -> str:
    """ "1 page", "1,200 pages", "2 processes"."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}" + ("" if count == 1 else ending)


def number(value: Any, digits: int = 3, sign: str = "") -> str:
    """A value for reading: numbers in plain digits, a real minus, an en dash where there is none."""
    if value is None or (isinstance(value, float | np.floating) and not math.isfinite(value)):
        return "–"
    if is_flag(value):
        return "yes" if value else "no"
    if not is_number(value):
        return cut(value)
    text = f"{value:{sign},}" if isinstance(value, int | np.integer) else f"{value:{sign},.{digits}f}"
    return text.replace("-", "−")


def p_value(value: Any) -> str:
    """Below what 10,000 draws can tell, no digits."""
    return "< 0.001" if is_number(value) and value < 0.001 else number(value)


def percent(part: int, whole: int) -> str:
    """With a tenth, as on the console; a dash of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "–"
