"""What a training leaves in its output folder while it runs, and what another one finds there."""

from __future__ import annotations

import time
from pathlib import Path

from training.processes import on_main, say


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint: the Trainer writes trainer_state.json last."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def keep_earlier_results(output_dir: Path, resumes: bool) -> None:
    """(all ranks) A new training neither goes on from the checkpoints of an earlier one, nor counts or deletes them,
    and its pages are not scored together with those that an earlier one has written: both move to a dated folder."""

    def move() -> None:
        checkpoints = sorted(output_dir.glob("checkpoint-*"))
        earlier = [*checkpoints, *(path for path in [output_dir / "evaluation"] if path.is_dir())]
        if not earlier or resumes:
            return
        place = output_dir / f"earlier-{time.strftime('%Y%m%d-%H%M%S')}"
        place.mkdir()
        for path in earlier:
            path.rename(place / path.name)
        going_on = "; --resume would go on from them" if checkpoints else ""
        say(f"{len(checkpoints)} checkpoints and the evaluation of an earlier run now lie in {place}{going_on}")

    on_main(move)
