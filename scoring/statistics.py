"""Of the scores of many pages: means, shares, and whether two runs over the same pages differ.

    means(scores)["overall"], shares(scores)["valid"]
    paired_comparison(before, after)["p"]

A page that could not be rendered has the worst score of each metric, and the number of such pages stands beside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from scoring import metrics

FEW = 10  # pages: the interval of fewer is too narrow (percentile bootstrap), and p cannot be small


def summarise(pages: Sequence[Mapping[str, Any]]) -> dict[str, float | int | None]:
    """{"n", and the share of pages that are "valid", "truncated", "looping", "exact"}; None without pages."""
    shares = ("valid", "truncated", "looping", "exact")
    return {"n": len(pages)} | {
        name: sum(map(bool, (page[name] for page in pages))) / len(pages) if pages else None for name in shares
    }


def paired_comparison(before: Sequence[float], after: Sequence[float], draws: int = 10_000, seed: int = 0) -> dict:
    """Two scores of each page: means, their difference with its 95 % bootstrap interval (Efron 1979, percentiles), and
    `p` by a sign-flip permutation test (Fisher 1935), two-sided: how often chance alone would differ as much.

    The same pages in the same order. Raises ValueError where their numbers differ, or for none.
    """
    one, two = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if one.shape != two.shape or not len(one):
        raise ValueError(f"{len(one)} scores before and {len(two)} after: there must be as many, and at least one")
    difference, random = two - one, np.random.default_rng(seed)
    means = difference[random.integers(0, len(difference), (draws, len(difference)))].mean(axis=1)
    flipped = (difference * random.choice((-1.0, 1.0), (draws, len(difference)))).mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    as_far = np.abs(flipped) >= abs(difference.mean()) - 1e-12
    return {
        "n": len(difference),
        "before": float(one.mean()),
        "after": float(two.mean()),
        "difference": float(difference.mean()),
        "low": float(low),
        "high": float(high),
        "p": float((as_far.sum() + 1) / (draws + 1)),
    }


def means(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """n, failures, and the mean of each metric: failures as the worst, and (`..._without_failures`) without them.

    `scores` are `PageScore.as_json` of each page, with its name as `page`. A mean of nothing is None. Pages whose
    reference could not be rendered say nothing of a model: they are named, and counted nowhere else.
    """
    unusable = [row.get("page") for row in scores if row.get("reference_failed")]
    scores = [row for row in scores if not row.get("reference_failed")]
    failed = [row for row in scores if row.get("failure")]
    found: dict[str, Any] = {"n": len(scores), "failures": len(failed), "failed": [row.get("page") for row in failed]}
    found["references_failed"] = unusable
    known = (row.get("words_in_blocks") for row in scores)
    found["words_in_blocks"] = mean_of(share for share in known if share is not None)
    rendered = [row for row in scores if not row.get("failure")]
    for metric in metrics.METRICS:
        if metric.needs_clip and not any(metric.name in row for row in scores):
            continue
        found[metric.name] = mean_of(row[metric.name] for row in scores if metric.name in row)
        alone = mean_of(row[metric.name] for row in rendered if metric.name in row)
        found[f"{metric.name}_without_failures"] = alone
    return found


def mean_of(values: Iterable[float]) -> float | None:
    """None of nothing."""
    known = list(values)
    return sum(known) / len(known) if known else None


def scores_line(found: Mapping[str, Any], suffix: str = "") -> str:
    """`means` for the console: each metric that was measured by its label, in the table's order."""
    known = [(metric.label, found[metric.name + suffix]) for metric in metrics.METRICS if metric.name in found]
    return ", ".join(f"{label} {'-' if value is None else f'{value:.3f}'}" for label, value in known)


def left_out_words(found: Mapping[str, Any]) -> str:
    """Of `means`: which pages were left out, and the share of words that Design2Code's scores count; "" for neither."""
    words = ""
    if names := found["references_failed"]:
        more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
        words = f"; left out, since the reference itself cannot be rendered: {', '.join(map(str, names[:5]))}{more}"
    share = found.get("words_in_blocks")
    if share is not None and share < 1:
        words += f"; block, text, position and color count {100 * share:.0f} % of the words that are seen, likeness all"
    return words


def shares(scores: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the pages: `valid`, and each cause that a page has."""
    scores = [row for row in scores if not row.get("reference_failed")]
    causes = Counter(cause for row in scores for cause in row["causes"])
    counts = {"valid": sum(row["valid"] for row in scores), **causes}
    return {name: count / max(1, len(scores)) for name, count in counts.items()}
