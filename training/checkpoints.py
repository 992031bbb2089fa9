"""What a training leaves in its output folder while it runs, and what another one finds there."""

from __future__ import annotations

import time
from pathlib import Path

from training.processes import on_main, say


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint: the Trainer writes trainer_state.json last."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def keep_earlier_checkpoints(output_dir: Path, resumes: bool) -> None:
    """(all ranks) A new training neither goes on from the checkpoints of an earlier one, nor counts or deletes them."""

    def move() -> None:
        earlier = sorted(output_dir.glob("checkpoint-*"))
        if earlier and not resumes:
            place = output_dir / f"earlier-{time.strftime('%Y%m%d-%H%M%S')}"
            place.mkdir()
            for checkpoint in earlier:
                checkpoint.rename(place / checkpoint.name)
            say(f"{len(earlier)} checkpoints of an earlier run now lie in {place}; --resume would go on from them")

    on_main(move)
