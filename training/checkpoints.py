"""What a training leaves in its output folder while it runs, and what another one finds there."""

from __future__ import annotations

import os
import time
from pathlib import Path

from training.processes import on_main, say

RESTARTED = "HOLO1_RESTARTED"  # in the environment of a training that has restarted itself before step one


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint: the Trainer writes trainer_state.json last."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def keep_earlier_results(output_dir: Path, resumes: bool) -> None:
    """(all ranks) A new training neither goes on from the checkpoints of an earlier one, nor counts or deletes them,
    and its pages are not scored together with those that an earlier one has written: both move to a dated folder.

    Not where the same training has restarted itself (RESTARTED): what lies there is its own.
    """
    resumes = os.environ.pop(RESTARTED, None) is not None or resumes  # read once: a later training is a new one

    def move() -> None:
        checkpoints = sorted(output_dir.glob("checkpoint-*"))
        evaluation = [path for path in [output_dir / "evaluation"] if path.is_dir()]
        if resumes or not (checkpoints or evaluation):
            return
        place = _new_folder(output_dir / f"earlier-{time.strftime('%Y%m%d-%H%M%S')}")
        for path in [*checkpoints, *evaluation]:
            path.rename(place / path.name)
        number = f"{len(checkpoints)} checkpoint{'s' if len(checkpoints) > 1 else ''}"
        moved = " and ".join([number] * bool(checkpoints) + ["the evaluation"] * bool(evaluation))
        going_on = "; --resume would go on from them" if checkpoints else ""
        say(f"moved to {place}: {moved} of an earlier run{going_on}")

    on_main(move)


def _new_folder(wanted: Path) -> Path:
    """Made by that name, or by the first free one of wanted-2, wanted-3, ...: two trainings may begin in one second."""
    place, number = wanted, 1
    while True:
        try:
            place.mkdir()
            return place
        except FileExistsError:
            number += 1
            place = wanted.with_name(f"{wanted.name}-{number}")
