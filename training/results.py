"""What a run has reached: results.json, the report that shows every page, and the last words on the console.

    results = Results(folder, decoding, pages, rendering)
    results.add("before", result, rows)
    results.write("after", facts)               # (main process only) results.json and report.html

Each entry of `results.by_label` is what `evaluation.score_held_out` returns; "after" is the final folder's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import use_model_from_hub as use
from scoring import metrics
from scoring.report_values import plural
from scoring.statistics import FEW, paired_comparison
from training.evaluation import Rendering, Row, keep_outputs
from training.processes import in_columns, say

if TYPE_CHECKING:
    from datasets import Dataset


class Results:
    """What every evaluation of a run has found, by its label: "before", "step 100", "after"."""

    def __init__(self, folder: Path, decoding: use.Recipe, pages: Dataset, rendering: Rendering):
        self.folder, self.decoding, self.pages, self.rendering = folder, decoding, pages, rendering
        self.by_label: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, list[Row]] = {}
        self.final = "after"  # the label under which the final folder's weights were judged
        self.run: Mapping[str, Any] = {}  # what the card tells of the training, so that all of it is found here, too
        self.losses: list[tuple[int, float]] = []  # (step, loss) of the training, for the report

    def add(self, label: str, result: dict[str, Any], rows: list[Row]) -> None:
        """Keeps an evaluation's result and what was written, in place of an earlier one of that label."""
        self.by_label[label], self.rows[label] = result, rows

    def choose(self, label: str) -> None:
        """The weights of `label` are final: "after" becomes theirs, and what the end had reached stays as "last"."""
        self.final = label
        self.add("last", self.by_label["after"], self.rows["after"])
        self.add("after", self.by_label[label], self.rows[label])

    def write(self, facts: Mapping[str, str]) -> None:
        """(main process only) results.json, each page's folder, and report.html where pages were rendered."""
        after, before = self.by_label["after"], self.by_label.get("before")
        comparison = compare_results(before, after) if before else None
        content = {"decoding": asdict(self.decoding), "rendering": self.rendering.facts, "final": self.final}
        content |= {"run": self.run, "comparison": comparison, **self.by_label}
        keep_outputs(self.rows["after"], self.pages, self.folder, "written")
        (self.folder / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if metrics.CHOOSING in after and self.rendering.facts:
            names = ("truncated", "looping", "exact", "chooses", "tokens", "reference_tokens")
            more = {page["page"]: {name: page[name] for name in names if name in page} for page in after["pages"]}
            shown = {**facts, "decoding": decoding_words(self.decoding), **self.rendering.facts}
            penalty = self.decoding.repetition_penalty
            earlier = (f"before {penalty}", self.rows["before"]) if "before" in self.rows else None
            label, training = f"{self.final} {penalty}", {"losses": self.losses, "evaluations": self.evaluations()}
            self.rendering.write_report(
                label, self.rows["after"], self.pages, shown, more, comparison, earlier, training
            )
        self.rendering.forget()
        after["comparison"] = comparison

    def evaluations(self) -> list[tuple[int, float]]:
        """(step, mean of the metric that chooses, over the pages that compare) of each evaluation, the base's as step
        0 and the end's as the last step of `losses`."""
        steps = {label: int(label.removeprefix("step ")) for label in self.by_label if label.startswith("step ")}
        steps |= {"before": 0} if "before" in self.by_label else {}
        steps |= {("last" if "last" in self.by_label else "after"): self.losses[-1][0]} if self.losses else {}
        found = {step: self.by_label[label].get(metrics.CHOOSING) for label, step in steps.items()}
        return sorted((step, value) for step, value in found.items() if value is not None)

    def say_difference(self) -> None:
        """(main process only) What training has changed, where the base was judged, too."""
        if "before" not in self.by_label:
            return
        before, after = self.by_label["before"], self.by_label["after"]
        told = (
            f"before training {100 * before['exact']:.1f} % of {plural(before['n'], 'held-out page')} were exact; "
            f"after it {100 * after['exact']:.1f} % are exact and {100 * after['valid']:.1f} % valid; "
            f"with the screenshots shuffled {100 * (after['shuffled_exact'] or 0):.1f} % are exact"
        )
        say(in_columns(told))
        if found := after["comparison"]["metrics"].get(metrics.CHOOSING):
            interval = f"(95 % {found['low']:+.3f} to {found['high']:+.3f}, p = {found['p']:.4f})"
            told = (
                f"{metrics.entry(metrics.CHOOSING).label} of the rendered pages: {found['before']:.3f} before, "
                f"{found['after']:.3f} after; difference {found['difference']:+.3f} "
                + (interval if found["n"] > 1 else "on one page, which gives no interval")
                + (f"; {found['n']} pages are too few for it to mean much" if 1 < found["n"] < FEW else "")
            )
            say(in_columns(told))


def decoding_words(decoding: use.Recipe) -> str:
    """How the held-out pages were written, in a few words for the report."""
    return f"greedy, repetition penalty {decoding.repetition_penalty}, at most {decoding.max_html_tokens:,} tokens"


def compare_results(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Base against tuned on the same pages under the same decoding, page by page, and the means under others.

    Over the pages that did not choose the weights and whose reference could be rendered. "apart" is False where there
    was but one page for both. Nothing is compared where no page is left.
    """
    unusable = {page["page"] for run in (before, after) for page in run["pages"] if page.get("reference_failed")}
    runs = [
        [page for page in run["pages"] if not page.get("chooses") and page["page"] not in unusable]
        for run in (before, after)
    ]
    every = [{*page} for pages in runs for page in pages]
    known = set.intersection(*every) if every else set()  # a metric may have left a page out, or all could not be had
    names = [name for name in (*metrics.names(), "exact", "valid") if name in known]
    differences = {
        name: paired_comparison(*([float(page[name]) for page in pages] for pages in runs)) for name in names
    }
    grids = [run.get("decoding", {}) for run in (before, after)]
    grid = [
        {"repetition_penalty": float(penalty), "before": grids[0][penalty], "after": grids[1][penalty]}
        for penalty in grids[0]
        if penalty in grids[1]
    ]
    apart = after.get("choosing", {}).get("apart", True)
    return {"metrics": differences, "confidence": 0.95, "decoding": grid, "n": len(runs[1]), "apart": apart}
