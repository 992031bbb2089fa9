"""Checkpoints that are whole or not there, and what else a training leaves in its output folder for the next one.

    checkpoints = Checkpoints(output_dir, limit, record)
    with checkpoints.staged(): ...              # (all ranks) the Trainer writes into checkpoints.staging
    checkpoints.settle()                        # (all ranks) the last one is in its place, or its failure is raised
    folder = newest_whole(output_dir)           # (all ranks) the newest that its manifest vouches for, or None

A checkpoint is written aside. While training goes on, a thread flushes its files to the disk, hashes them, writes the
manifest and renames the folder; only then do older ones go. So `checkpoint-N` is there whole or not at all, at whatever
instant the power fails. What the manifest does not vouch for, byte by byte, is never read.

Sections: Manifest, Writing, Finding, Earlier results.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from training.errors import MEANINGS, DiskError, PipelineError, SettingsError, exit_code, is_disk_full
from training.processes import gather, is_main, local_rank, on_main, say, say_from_here, together

RESTARTED = "HOLO1_RESTARTED"  # in the environment of a training that has restarted itself before step one
MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest
STUCK_S, WRITES_S = 20.0, 7200.0  # for one that has failed to wait for others, and for others that still write
STAGING = "checkpoint.partial"  # a name that nobody takes for a checkpoint

# -----------------------------------------------------------------------------
# Manifest: the size and the SHA-256 of every file, and of itself


def step_of(folder: Path) -> int | None:
    """N of `checkpoint-N`; None for a folder of any other name, such as checkpoint-best."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found[1]) if found else None


def files_in(folder: Path) -> dict[str, Path]:
    """Every file below `folder` but its manifest, by its path in it."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}
    found.pop(MANIFEST, None)
    return found


def file_hash(path: Path, flush: bool = False) -> str:
    """SHA-256 of a file's bytes, in hex; `flush`: once they are on the disk."""
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(files: Mapping[str, Path], flush: bool = False) -> dict[str, dict[str, Any]]:
    """{"bytes", "sha256"} of each file; four at once, since hashing lets the other threads run."""
    with ThreadPoolExecutor(4) as pool:
        sums = pool.map(lambda path: file_hash(path, flush), files.values())
        return {
            name: {"bytes": path.stat().st_size, "sha256": digest} for (name, path), digest in zip(files.items(), sums)
        }


def seal(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's own content, so that a flipped byte in it is found, too."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, record: Mapping[str, Any]) -> None:
    """Flush and hash every file in `folder`, then vouch for them, with the record of the run that wrote them."""
    content = {"format": FORMAT, "record": dict(record), "files": hashes(files_in(folder), flush=True)}
    path = folder / MANIFEST
    with path.open("w", encoding="utf-8") as file:
        json.dump({**content, "seal": seal(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for parent in {folder, *(path for path in folder.rglob("*") if path.is_dir())}:
        flush(parent)


def flush(path: Path) -> None:
    """A file, or the names in a folder, are on the disk; a file system that cannot promise it is taken as it is."""
    number = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(number)
    os.close(number)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises ValueError, which says what is wrong with it."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"has no {MANIFEST}: it was not finished, or an earlier version wrote it") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from None
    kept = content.pop("seal", None) if isinstance(content, dict) else None
    if kept is None or kept != seal(content):
        raise ValueError(f"{MANIFEST} is damaged")
    if content.get("format") != FORMAT:
        raise ValueError(f"{MANIFEST} has format {content.get('format')!r}, this version reads {FORMAT}")
    return content


def fault_of(folder: Path) -> str:
    """What is wrong with a checkpoint; "" when every file is there, no other, each byte as it was written."""
    try:
        promised = read_manifest(folder)["files"]
    except ValueError as error:
        return str(error)
    there = files_in(folder)
    if lost := sorted(promised.keys() - there.keys()):
        return f"{', '.join(lost[:3])} missing"
    if foreign := sorted(there.keys() - promised.keys()):
        return f"{', '.join(foreign[:3])} is not in its {MANIFEST}: nobody vouches for it"
    for name, path in there.items():
        if path.is_symlink() or not path.is_file():
            return f"{name} is no plain file"
        if path.stat().st_size != promised[name]["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes of {promised[name]['bytes']:,}"
    try:
        found = hashes(there)
    except OSError as error:
        return f"cannot be read: {error}"
    damaged = [name for name, file in found.items() if file["sha256"] != promised[name]["sha256"]]
    return f"{', '.join(damaged[:3])} is damaged: other bytes than were written" if damaged else ""


# -----------------------------------------------------------------------------
# Writing


class Checkpoints:
    """The checkpoints that a training writes into `output_dir`: at most `limit` whole ones are kept (None: all).

    `record` is what the manifest says of the run (run_record.py).
    """

    def __init__(self, output_dir: Path, limit: int | None, record: Mapping[str, Any]):
        self.output_dir, self.limit, self.record = output_dir, limit, record
        self.staging = output_dir / STAGING
        self.worker: threading.Thread | None = None
        self.failure: Exception | None = None  # of this machine's thread
        self.newest: Path | None = None  # in its place, whole

    def clear(self) -> None:
        """(all ranks) Remove what a killed run has left half-written."""
        if local_rank() == 0:
            shutil.rmtree(self.staging, ignore_errors=True)
        gather(None)

    @contextlib.contextmanager
    def staged(self) -> Iterator[None]:
        """(all ranks) What is written into `staging` inside becomes a checkpoint, in the background, if all succeed.

        Raises `DiskError` where the disk is full, after what was half-written is gone.
        """
        self.settle()
        try:
            with agreed():
                yield
            mark = f".shared-{uuid.uuid4().hex}"
            mark = on_main(lambda: (self.staging / mark).touch() or mark)
            # One of each machine that does not share the main process's disk has shards of its own to vouch for.
            works = is_main() or (local_rank() == 0 and self.staging.is_dir() and not (self.staging / mark).exists())
            gather(None)  # every rank has written, every machine has looked
        except Exception as error:  # or another rank has gone, and this one has written since
            shutil.rmtree(self.staging, ignore_errors=True)
            if is_disk_full(error):
                raise DiskError(self.full_words(error)) from error
            raise
        if works:
            (self.staging / mark).unlink(missing_ok=True)
            self.worker = threading.Thread(target=self._finish, name="checkpoint", daemon=True)
            self.worker.start()

    def full_words(self, error: Exception) -> str:
        """What a full disk means here."""
        kept = self.newest or max(self.output_dir.glob("checkpoint-*[0-9]"), key=step_of_or_none, default=None)
        there = f"{kept.name} is untouched, and --resume goes on from it" if kept else "no earlier checkpoint is there"
        return (
            f"no space for a checkpoint in {self.output_dir} ({error}); nothing half-written is left; {there}. Free "
            "some space, or give another --output_dir, --save_total_limit 1, or fewer --save_steps"
        )

    def _finish(self) -> None:
        try:
            (folder,) = [path for path in self.staging.iterdir() if step_of(path) is not None]
            write_manifest(folder, self.record)
            place = self.output_dir / folder.name
            if place.exists():  # damaged, passed over, and trained again
                place.rename(self.staging / "replaced")
            folder.rename(place)
            flush(self.output_dir)
            self.newest = place
            self._remove_older()
            shutil.rmtree(self.staging, ignore_errors=True)
        except Exception as error:  # raised by `settle`, on every rank
            shutil.rmtree(self.staging, ignore_errors=True)
            self.failure = error

    def _remove_older(self) -> None:
        """Once the new one is in its place. Renamed first: half removed, it would be a torn checkpoint."""
        if self.limit is None or self.limit <= 0:
            return
        whole = [path for path in self.output_dir.glob("checkpoint-*") if (path / MANIFEST).is_file()]
        whole = [path for path in whole if step_of(path) is not None and path != self.newest]
        whole.sort(key=lambda path: (path / MANIFEST).stat().st_mtime)
        for number, path in enumerate(whole[: max(0, len(whole) + 1 - self.limit)]):
            path.rename(self.staging / f"old-{number}")

    def join(self) -> None:
        """(any rank) Wait for this machine's thread; what it failed with is kept for `settle`."""
        if self.worker is not None:
            self.worker.join()
            self.worker = None

    def settle(self) -> None:
        """(all ranks) Wait for the last checkpoint. Raises on every rank what kept it from being whole on one."""
        self.join()
        failure, self.failure = self.failure, None
        words = None if failure is None else (is_disk_full(failure), f"{type(failure).__name__}: {failure}")
        for full, text in filter(None, gather(words)):
            error = DiskError(self.full_words(failure or OSError(text))) if full else None
            raise error or PipelineError(f"a checkpoint could not be finished in {self.output_dir}: {text}")


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """(all ranks) What is done inside, each rank its part. Raises on all what has failed on one: over gloo, since under
    NCCL the others would wait for it in the next collective, long after it has gone."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(RuntimeError):  # the others are stuck in a collective of this very work
            together(exit_code(error), STUCK_S)
        raise
    if code := together(0, WRITES_S):
        error = PipelineError(f"another rank could not write its part of a checkpoint: {code}, {MEANINGS[code]}")
        error.code = code
        raise error


def step_of_or_none(folder: Path) -> int:
    """The step of a checkpoint, -1 for other folders: for sorting."""
    step = step_of(folder)
    return -1 if step is None else step


# -----------------------------------------------------------------------------
# Finding


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The folders named checkpoint-N, the newest first; whole or not."""
    found = [path for path in output_dir.glob("checkpoint-*") if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=step_of_or_none, reverse=True)


def faults_in(output_dir: Path, foreign: Callable[[Mapping[str, Any]], str]) -> dict[str, str]:
    """What is wrong with each checkpoint, from the newest to the first whole one, whose fault is ""."""
    faults = {}
    for folder in checkpoints_in(output_dir):
        size = sum(path.stat().st_size for path in files_in(folder).values() if path.is_file())
        if size > 2**32:
            say(f"verifying {folder.name}, {size / 1e9:.1f} GB")
        faults[folder.name] = fault_of(folder) or foreign(read_manifest(folder)["record"])
        if not faults[folder.name]:
            break
    return faults


def newest_whole(output_dir: Path, foreign: Callable[[Mapping[str, Any]], str] = lambda record: "") -> Path | None:
    """(all ranks) The newest checkpoint that is whole on every machine and whose record is not `foreign` (why it is;
    "": it is not); each that is passed over is named with its fault. None where no checkpoint was ever written. Raises
    `SettingsError` where none of them can be gone on with."""
    mine = faults_in(output_dir, foreign) if local_rank() == 0 else None
    found = [faults for faults in gather(mine) if faults is not None]
    names = {name for faults in found for name in faults}
    for name in sorted(names, key=lambda name: step_of_or_none(Path(name)), reverse=True):
        wrong = next(filter(None, (faults.get(name, "is not on every machine") for faults in found)), "")
        if not wrong:
            return output_dir / name
        say(f"passed over: {name} {wrong}")
    if names:
        raise SettingsError(
            f"--resume: none of the checkpoints in {output_dir} is whole and of this run (see above); leave --resume "
            "out to begin again, or take the weights of one, if you trust them, with --base_model"
        )
    return None


def check_whole(folder: Path) -> None:
    """(all ranks) Raises `SettingsError` for a checkpoint given by its path that its manifest does not vouch for."""
    for fault in gather(fault_of(folder) if local_rank() == 0 else ""):
        if fault:
            raise SettingsError(f"--resume_from_checkpoint {folder} {fault}; give a whole one, or --resume")


# -----------------------------------------------------------------------------
# Earlier results


def keep_earlier_results(output_dir: Path, resumes: bool) -> None:
    """(all ranks) A new training neither goes on from the checkpoints of an earlier one, nor counts or deletes them,
    and its pages are not scored together with those that an earlier one has written: both move to a dated folder.

    Not where the same training has restarted itself (RESTARTED): what lies there is its own.
    """
    resumes = os.environ.pop(RESTARTED, None) is not None or resumes  # read once: a later training is a new one

    def move() -> None:
        checkpoints = sorted(output_dir.glob("checkpoint-*"))
        evaluation = [path for path in [output_dir / "evaluation"] if path.is_dir()]
        beside = [path for path in (output_dir / name for name in BESIDE) if path.exists()]
        if resumes or not (checkpoints or evaluation):
            return
        place = move_aside(output_dir, [*checkpoints, *evaluation, *beside])
        number = f"{len(checkpoints)} checkpoint{'s' if len(checkpoints) > 1 else ''}"
        moved = " and ".join([number] * bool(checkpoints) + ["the evaluation"] * bool(evaluation))
        going_on = "; --resume would go on from them" if checkpoints else ""
        say(f"moved to {place}: {moved} of an earlier run{going_on}")

    on_main(move)


BEST = ("best", "best.json")  # weights
BESIDE = ("run.json", *BEST)  # what a run keeps beside its checkpoints, and goes where they go


def move_aside(output_dir: Path, paths: Iterable[Path]) -> Path:
    """(main process only) The dated folder into which they have gone."""
    place = dated_folder(output_dir / "earlier")
    for path in paths:
        path.rename(place / path.name)
    return place


def keep_apart(output_dir: Path, apart: Callable[[Path], str]) -> None:
    """(all ranks) Checkpoints that the run in `output_dir` does not go on with, and would delete when its own are
    enough, move to a dated folder; why, `apart` says of each ("": it stays)."""

    def move() -> None:
        reasons = {path: why for path in checkpoints_in(output_dir) if (why := apart(path))}
        if reasons:
            place = move_aside(output_dir, reasons)
            say(f"moved to {place}: " + ", ".join(f"{path.name}, which {why}" for path, why in reasons.items()))

    on_main(move)


def dated_folder(wanted: Path) -> Path:
    """Made by that name and the time, or by the first free one of -2, -3, ...: two may begin in one second."""
    first = wanted.with_name(f"{wanted.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    place, number = first, 1
    while True:
        try:
            place.mkdir(parents=True)
            return place
        except FileExistsError:
            number += 1
            place = first.with_name(f"{first.name}-{number}")


def keep_earlier_folder(folder: Path) -> None:
    """(main process only) What lies at `folder` moves to a dated name beside it, and that is said."""
    if folder.exists():
        place = dated_folder(folder)
        place.rmdir()
        folder.rename(place)
        say(f"kept: what was in {folder} is now in {place}")


def say_where_it_stands(newest: Path | None) -> None:
    """(any rank) After a failure: what there is to go on from."""
    if newest is not None:
        say_from_here(f"{newest} is whole; --resume goes on from it")
