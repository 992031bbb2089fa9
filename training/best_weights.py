"""The best weights of a run by the metric that chooses, kept beside the checkpoints until the end decides.

    best = BestWeights(output_dir, patience=3, resumed_at=None)
    stop = best.consider(100, result, rows, save)       # (all ranks) at each evaluation during training
    if best.beats(result_of_the_end): best.become_final(final_folder)

The weights lie in output_dir/best, what a resumed run must know of them in output_dir/best.json.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import use_model_from_hub as use
from scoring import metrics
from training.checkpoints import flush
from training.errors import DiskError, is_disk_full
from training.processes import on_main, say

REMEMBERED = ("step", "score", "scores", "result", "rows")  # by best.json


def link_or_copy(source: str, target: str) -> None:
    """A second name of the same file, which takes no space, or where that cannot be, as on another disk, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        flush(Path(target))


class BestWeights:
    """`step` and `score` of the best evaluation so far (None: there was none), what it wrote and what that scored, and
    the `scores` of all evaluations as (step, score). `best.json` is what a resumed run knows of it, which goes on at
    step `resumed_at` (None: a new run)."""

    def __init__(self, output_dir: Path, patience: int, resumed_at: int | None):
        self.folder, self.notes, self.patience = output_dir / "best", output_dir / "best.json", patience
        self.step: int | None = None
        self.score = 0.0
        self.scores: list[tuple[int, float]] = []
        self.result: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        # Read by the main process for all: a machine that does not see the folder would else call other collectives.
        for name, value in (on_main(self.recall) if resumed_at is not None else {}).items():
            setattr(self, name, value)
        # The steps after the checkpoint are trained and judged once more: counted twice, patience would run out early.
        # The kept weights stay, whatever their step: they were trained, and their score was measured.
        self.scores = [(step, score) for step, score in self.scores if step <= (resumed_at or 0)]

    @property
    def evaluations_since(self) -> int:
        """How many evaluations of this training have come since its own best one."""
        best, since = None, 0
        for _, score in self.scores:
            leads = best is None or metrics.is_better(score, best)
            best, since = (score, 0) if leads else (best, since + 1)
        return since

    def recall(self) -> dict[str, Any]:
        """(main process only) What best.json says; nothing, and a word of it, where an older version wrote it."""
        try:
            known = json.loads(self.notes.read_text(encoding="utf-8"))
            return {name: known[name] for name in REMEMBERED}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError) as error:
            say(f"{self.notes} is not of this version or torn ({error!r}): the best weights are chosen from now on")
            return {}

    def remember(self) -> None:
        """(main process only) Written aside and renamed: a run killed meanwhile keeps what it knew."""
        partial = self.notes.with_suffix(".partial")
        partial.write_text(json.dumps({name: getattr(self, name) for name in REMEMBERED}) + "\n", encoding="utf-8")
        partial.replace(self.notes)

    @property
    def label(self) -> str:
        """The label of its evaluation among the results: "step 100"."""
        return f"step {self.step}"

    def leads(self, result: Mapping[str, Any]) -> bool:
        """Whether a result is better than the best so far, over the pages that choose."""
        score = result.get("choosing", {}).get(metrics.CHOOSING)
        return score is not None and (self.step is None or metrics.is_better(score, self.score))

    def consider(
        self, step: int, result: dict[str, Any], rows: Sequence[dict[str, Any]], save: Callable[[Path], None]
    ) -> bool:
        """(all ranks) Keep the weights of `step` by `save` if they lead. True when patience has run out."""
        if "choosing" not in result:  # nothing was rendered
            return False
        score = result["choosing"][metrics.CHOOSING]
        self.scores.append((step, score))
        if self.leads(result):
            self.step, self.score, self.result, self.rows = step, score, result, list(rows)
            save(self.folder)
        on_main(self.remember)
        say(f"best so far: {metrics.CHOOSING} {self.score:.3f} at step {self.step}, kept in output_dir/best")
        return 0 < self.patience <= self.evaluations_since

    def beats(self, last: Mapping[str, Any]) -> bool:
        """Whether the kept weights are there and better than those of the end."""
        score = last.get("choosing", {}).get(metrics.CHOOSING)
        kept = self.step is not None and (self.folder / use.RECIPE_FILE).is_file()
        return kept and score is not None and metrics.is_better(self.score, score)

    def become_final(self, final: Path) -> None:
        """(main process only) Put the kept weights in the final folder's place. Raises `DiskError` where the disk is
        full, with the weights of the end still there."""
        chosen = final.with_name(f"{final.name}.chosen")
        shutil.rmtree(chosen, ignore_errors=True)
        try:
            shutil.copytree(self.folder, chosen, copy_function=link_or_copy)
        except Exception as error:
            shutil.rmtree(chosen, ignore_errors=True)
            if is_disk_full(error):
                raise DiskError(
                    f"no space for the best weights beside {final} ({error}); nothing half-written is left: {final} "
                    f"has the weights of the end, {self.folder} the better ones; free some space, then --resume"
                ) from error
            raise
        last = final.with_name(f"{final.name}.last")
        shutil.rmtree(last, ignore_errors=True)
        final.rename(last)  # at no moment is there neither
        chosen.rename(final)
        shutil.rmtree(last)

    def forget(self) -> None:
        """(main process only) The run has ended: its final folder has the weights."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.notes.unlink(missing_ok=True)
