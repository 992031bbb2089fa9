"""What is measured of a written page: one table of metrics, read by scores, means, console, report, card and choice.

    compare(page_of(first, reference_html), page_of(second, written_html))["likeness"]
    names(), entry("ssim").label, is_better(0.8, than=0.7)

A new metric is a function of `Compared` and one line of `METRICS`. The scores are those of Design2Code (Si et al.,
NAACL 2025), TreeBLEU (Gui et al., WebCode2M, 2025) and SSIM (Wang et al., 2004); CLIP's where its weights are at hand.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
from PIL import Image

from scoring.blocks import Block, Page
from scoring.clip import Clip
from scoring.matching import Matching, matching_by_place, matching_of
from scoring.validity import looping, validity

SSIM_SHRINK = 2  # both sides of the pictures, before SSIM: a quarter of the time, and small type still counts
MISPLACED, MISCOLOURED, MISSED = 0.9, 0.8, 0.5  # below these a page carries the cause's name

# -----------------------------------------------------------------------------
# What a metric sees


@dataclass(frozen=True, eq=False)
class Compared:
    """Two rendered pages as metrics see them. What several metrics need is computed once, when the first one asks."""

    reference: Page
    prediction: Page
    clip: Clip | None = None

    @cached_property
    def matching(self) -> Matching:
        """Which text block stands for which: most of the time that scores take."""
        return matching_of(self.reference.blocks, self.prediction.blocks)

    @cached_property
    def matching_of_texts(self) -> Matching:
        """The same for every text that is seen, in whatever element."""
        return matching_by_place(self.reference.texts, self.prediction.texts)

    @cached_property
    def of_blocks(self) -> tuple[float, float, float, float]:
        """Design2Code's block, text, position and color; without any match all are 0. Of a copy all are 1, too, where
        its own definition sees no text, or pairs equal ones crosswise."""
        return (1.0, 1.0, 1.0, 1.0) if self.is_copy_of_unclear_texts else block_scores(self.matching)

    @cached_property
    def is_copy_of_unclear_texts(self) -> bool:
        """Whether both show the same texts in the same picture, and Design2Code's definition cannot tell which text is
        which. Of no other copy, or the self-proof of a page against itself would prove nothing."""
        one, two = self.reference, self.prediction
        known = [block.text for block in one.blocks]
        if not one.texts or (known and len({*known}) == len(known)):
            return False
        return (one.texts, one.blocks) == (two.texts, two.blocks) and np.array_equal(one.image, two.image)

    @cached_property
    def clip_cosine(self) -> float | None:
        """None without CLIP."""
        return self.clip(self.reference, self.prediction) if self.clip else None


# -----------------------------------------------------------------------------
# The metrics


def block_scores(matching: Matching) -> tuple[float, float, float, float]:
    """(matched texts' share of the area of all texts; of the matched ones: how alike they read, stand, are coloured),
    by Design2Code's definition."""
    pairs = matching.matched
    if not pairs:
        return 0.0, 0.0, 0.0, 0.0
    areas = sum(one.area + two.area for one, two in pairs)
    offsets = [max(abs(a - b) for a, b in zip(one.center, two.center)) for one, two in pairs]
    four = (
        areas / (areas + sum(block.area for block in (*matching.missing, *matching.invented))),
        sum(matching.similarities) / len(pairs),
        sum(1 - offset for offset in offsets) / len(pairs),
        sum(color_likeness([(two.color, one.color) for one, two in pairs])) / len(pairs),
    )
    return tuple(map(float, four))


def color_likeness(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[float]:
    """1 - CIEDE2000 / 100 (Sharma et al., 2005) of pairs of colours (red, green, blue; 0 to 255), at least 0."""
    from skimage.color import deltaE_ciede2000, rgb2lab  # half a second, and scipy with it

    one, two = (rgb2lab(np.array(colors, dtype=float).reshape(-1, 1, 3) / 255) for colors in zip(*pairs))
    return np.maximum(0.0, 1 - deltaE_ciede2000(one, two) / 100).ravel().tolist()


def overall(pair: Compared) -> float:
    """Design2Code's own score: the mean of its four, and of CLIP where that is known."""
    four = sum(pair.of_blocks) / 4
    return four if pair.clip_cosine is None else (4 * four + pair.clip_cosine) / 5


def likeness(pair: Compared) -> float:
    """The matched share, by area, of all texts that are seen, each counted by how alike it reads, times how alike it
    stands and is coloured: 1 for a copy, and less where any text reads otherwise. This project's own: by Design2Code's
    scores a wholly different page still reaches 0.6 in `text` and `color`, and texts outside its 19 tags do not count.
    Of pages without any text SSIM, since there is nothing else to compare."""
    if not pair.reference.texts and not pair.prediction.texts:
        return ssim(pair.reference.image, pair.prediction.image)
    matching = pair.matching_of_texts
    if not matching.matched:
        return 0.0
    colors = color_likeness([(two.color, one.color) for one, two in matching.matched])
    alike, areas = 0.0, 0.0
    for (one, two), similarity, color in zip(matching.matched, matching.similarities, colors):
        offset = max(abs(a - b) for a, b in zip(one.center, two.center))
        alike += (one.area + two.area) * similarity * (1 - offset + color) / 2
        areas += one.area + two.area
    return alike / (areas + sum(block.area for block in (*matching.missing, *matching.invented)))


def share_of_words(page: Page) -> float | None:
    """Which share of the words that are seen Design2Code's definition sees, too; None for a page without words."""
    every = Counter(word for text in page.texts for word in text.text.lower().split())
    theirs = Counter(word for block in page.blocks for word in block.text.split())
    return (every & theirs).total() / every.total() if every else None


def tree_bleu(pair: Compared) -> float:
    """The share of the reference's elements, with its children's names in order, that the written page has, too."""
    wanted = pair.reference.subtrees
    return len(wanted & pair.prediction.subtrees) / max(1, len(wanted))


def ssim(one: np.ndarray, two: np.ndarray) -> float:
    """Structural similarity of two pictures (H, W, 3) uint8: of their common part in grey, times that part's share of
    what both cover."""
    from skimage.metrics import structural_similarity

    height, width = (min(sizes) for sizes in zip(one.shape[:2], two.shape[:2]))
    covered = one.shape[0] * one.shape[1] + two.shape[0] * two.shape[1] - height * width
    small = [Image.fromarray(part[:height, :width]).convert("L").reduce(SSIM_SHRINK) for part in (one, two)]
    grey = [np.asarray(picture, dtype=np.float32) for picture in small]
    if min(grey[0].shape) < 7:  # smaller than SSIM's window
        return 0.0
    return max(0.0, float(structural_similarity(*grey, data_range=255))) * height * width / covered


# -----------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Metric:
    """A score of two pages from 0 to 1; the best of them for a page against itself, which `scoring.proof` checks.

    `function` returns None where it cannot be measured; then the page has no such score. A page that cannot be rendered
    gets the worst one.
    """

    name: str  # in JSON and results
    label: str  # for people
    function: Callable[[Compared], float | None]
    better: Literal["higher", "lower"] = "higher"
    needs_clip: bool = False  # measured only where CLIP's weights are at hand
    needs_text: bool = False  # the worst for a page without any text
    falls: tuple[str, str] | None = None  # cases of the proof: worse in the second than in the first
    meaning: str = ""  # in one line, for whoever meets the number on a card or in a report

    @property
    def best(self) -> float:
        """Of a page against itself."""
        return 1.0 if self.better == "higher" else 0.0

    @property
    def worst(self) -> float:
        """Of a page that could not be rendered."""
        return 1.0 - self.best

    def is_better(self, new: float, than: float) -> bool:
        """Equal is not better."""
        return new > than if self.better == "higher" else new < than


METRICS: tuple[Metric, ...] = (
    Metric(
        "block",
        "block",
        lambda pair: pair.of_blocks[0],
        needs_text=True,
        falls=("2 removed", "6 removed"),
        meaning="Design2Code: how much of the text, by area, stands in blocks that both pages have",
    ),
    Metric(
        "text",
        "text",
        lambda pair: pair.of_blocks[1],
        needs_text=True,
        falls=("3 shortened", "9 shortened"),
        meaning="Design2Code: how alike those blocks read, letter by letter",
    ),
    Metric(
        "position",
        "position",
        lambda pair: pair.of_blocks[2],
        needs_text=True,
        falls=("3 moved", "6 moved"),
        meaning="Design2Code: how near to their places those blocks stand",
    ),
    Metric(
        "color",
        "color",
        lambda pair: pair.of_blocks[3],
        needs_text=True,
        falls=("3 recoloured", "9 recoloured"),
        meaning="Design2Code: how alike the colours of those blocks are",
    ),
    Metric(
        "overall",
        "overall",
        overall,
        meaning="Design2Code: the mean of block, text, position and color, and of CLIP where it is measured",
    ),
    Metric(
        "likeness",
        "likeness",
        likeness,
        needs_text=True,
        meaning="how much of all text that is seen, by area, reads, stands and is coloured as in the screenshot's page",
    ),
    Metric(
        "tree_bleu",
        "TreeBLEU",
        tree_bleu,
        falls=("2 removed", "another page"),
        meaning="the share of the page's elements that are written with the same children in the same order",
    ),
    Metric(
        "ssim",
        "SSIM",
        lambda pair: ssim(pair.reference.image, pair.prediction.image),
        falls=("3 moved", "6 moved"),
        meaning="structural similarity of the two screenshots, in grey",
    ),
    Metric(
        "clip",
        "CLIP",
        lambda pair: pair.clip_cosine,
        needs_clip=True,
        meaning="how alike CLIP finds the two screenshots, their texts painted over",
    ),
)
CHOOSING = "likeness"  # by this metric the best weights are kept, and the report's worst pages come first


def names() -> tuple[str, ...]:
    """Of every metric, in the table's order. Asked for at each use: who keeps them would not see a metric added."""
    return tuple(metric.name for metric in METRICS)


def entry(name: str) -> Metric:
    """Raises KeyError for a name that is not in the table."""
    return {metric.name: metric for metric in METRICS}[name]


def choosing_first() -> tuple[Metric, ...]:
    """The table with the metric that chooses in front, for who reads only the first."""
    return tuple(sorted(METRICS, key=lambda metric: metric.name != CHOOSING))


def worst_words(scores: Iterable[str]) -> str:
    """What a failed page counts as in these metrics: "0" where that is the worst of all of them."""
    values = {entry(name).worst if name in names() else 0.0 for name in scores}
    return f"{values.pop():g}" if len(values) == 1 else "the worst"


def is_better(new: float, than: float) -> bool:
    """By the metric that chooses."""
    return entry(CHOOSING).is_better(new, than)


# -----------------------------------------------------------------------------
# A page's scores


@dataclass(frozen=True)
class PageScore:
    """`score["ssim"]` is one of `values`, which has each metric that was measured, in the table's order."""

    values: Mapping[str, float]
    valid: bool = False
    blocks_reference: int = 0
    blocks_prediction: int = 0
    texts_reference: int = 0
    texts_prediction: int = 0
    words_in_blocks: float | None = None  # share of the reference's words that are in its blocks
    failure: str | None = None  # why a page could not be rendered; all scores are the worst then
    reference_failed: bool = False  # then the page says nothing of the model, and is in no mean
    causes: tuple[str, ...] = ()
    matched: tuple[tuple[Block, Block], ...] = field(default=(), repr=False)  # (reference, prediction)
    missing: tuple[Block, ...] = field(default=(), repr=False)  # of the reference only
    invented: tuple[Block, ...] = field(default=(), repr=False)  # of the prediction only

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def as_json(self) -> dict[str, Any]:
        """Without the blocks."""
        apart = ("values", "matched", "missing", "invented")
        return {**self.values} | {
            item.name: getattr(self, item.name) for item in fields(self) if item.name not in apart
        }


def check_table() -> None:
    """Raises ValueError for a table that would lose scores in silence: names that stand for something else in a page's
    row or in the means, names that come twice, and a metric that chooses and is not there."""
    found = names()
    taken = {item.name for item in fields(PageScore)} | {"page", "n", "failures", "failed", "exact", "truncated"}
    twice = {name for name in found if found.count(name) > 1}
    if problems := sorted(twice | (taken & {*found})):
        raise ValueError(f"metrics named {', '.join(problems)}: the name is taken; give each another one")
    if CHOOSING not in found:
        raise ValueError(f"CHOOSING is {CHOOSING!r}, which is not in the table; it has {', '.join(found)}")


def measure(metric: Metric, pair: Compared) -> float | None:
    """The metric as a number of Python's; None where it cannot be measured. ValueError, with its name, for NaN."""
    value = metric.function(pair)
    if value is None:
        return None
    if not math.isfinite(value):
        raise ValueError(f"the metric {metric.name} gives {value}: it must be a number, or None where there is none")
    return float(value)


def compare(reference: Page, prediction: Page, clip: Clip | None = None) -> PageScore:
    """Every metric of the table for a page and its reference. A page that failed raises nothing: it is the worst."""
    checked = validity(prediction.html)
    causes = ["cut off"] if prediction.html.strip() and not checked.closed else []
    causes += ["looping"] if looping(prediction.html) else []
    failure = prediction.failure and f"the written page: {prediction.failure}"
    failure = (reference.failure and f"the reference: {reference.failure}") or failure
    sizes: dict[str, Any] = {"blocks_reference": len(reference.blocks), "blocks_prediction": len(prediction.blocks)}
    sizes |= {"texts_reference": len(reference.texts), "texts_prediction": len(prediction.texts)}
    sizes |= {"words_in_blocks": share_of_words(reference), "reference_failed": reference.failure is not None}
    if failure:
        worst = {metric.name: metric.worst for metric in METRICS if clip or not metric.needs_clip}
        lists = {"missing": reference.texts, "invented": prediction.texts}
        return PageScore(worst, checked.valid, failure=failure, causes=("not rendered", *causes), **sizes, **lists)
    pair = Compared(reference, prediction, clip)
    measured = ((metric.name, measure(metric, pair)) for metric in METRICS)
    values = {name: value for name, value in measured if value is not None}
    lists = {name: getattr(pair.matching_of_texts, name) for name in ("matched", "missing", "invented")}
    return PageScore(values, checked.valid, causes=(*causes, *causes_of(pair)), **sizes, **lists)


def causes_of(pair: Compared) -> list[str]:
    """What is most wrong with how a page looks, in a word or two each."""
    wanted, written, matching = pair.reference.texts, pair.prediction.texts, pair.matching_of_texts
    _, _, position, color = block_scores(matching)
    causes = ["no text to compare"] if not wanted else []
    causes += ["blank"] if wanted and not written else []
    causes += ["misplaced"] if matching.matched and position < MISPLACED else []
    causes += ["miscoloured"] if matching.matched and color < MISCOLOURED else []
    causes += ["texts missing"] if written and len(matching.missing) > MISSED * len(wanted) else []
    return causes
