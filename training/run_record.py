"""What a run was: the settings it began with, its base and its pages, beside its checkpoints and in each of them.

    typed = recorded_typed(output_dir)          # what was typed when it began, for --resume
    problems = differences(record, resolved)    # what --resume was asked to change and cannot
    record = make_record(typed, values, ...)    # of this run; written as output_dir/run.json
    mark_beginning(output_dir, record)          # of a new run, before its base and its pages are known

--resume goes on with the settings of the run. What can be honoured when it is typed anew (more steps, another learning
rate) is; what cannot, because trained pages, weights or moments would mean something else, is refused by name.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from training.errors import SettingsError
from training.mixture import one_or_all
from training.processes import rank

RECORD_FILE = "run.json"
DEEPSPEED_FILE = "deepspeed.json"  # as it was resolved, whole: the log says in a few words what it comes to
# Of a run that has not come to its first step: minutes may pass until base and pages are there, and what lies beside it
# is an earlier run's. Killed meanwhile, it begins again.
BEGINNING = "run_begins.json"
FORMAT = 1  # of the record

# What a run cannot change, and why, as it is told to whoever types another value.
WHY = {
    "base": "the checkpoint's weights began as the other base's",
    "pages": "pages that were trained on would be trained on again, left out, or held out",
    "question": "the model has learned to answer the other question",
    "weights": "the checkpoint holds other weights",
    "moments": "the checkpoint holds another optimizer's moments",
}
FIXED = {
    "base_model": "base",
    "base_revision": "base",
    "random_weights": "base",
    "dataset": "pages",
    "dataset_config": "pages",
    "dataset_split": "pages",
    "dataset_revision": "pages",
    "image_column": "pages",
    "html_column": "pages",
    "clean": "pages",
    "num_samples": "pages",
    "eval_pages": "pages",
    "max_html_tokens": "pages",
    "seed": "pages",
    "data_seed": "pages",
    "prompt": "question",
    "max_pixels": "question",
    "quantize": "weights",
    "lora": "weights",
    "lora_rank": "weights",
    "lora_alpha": "weights",
    "freeze_vision": "weights",
    "fp16": "weights",
    "bf16": "weights",
    "optim": "moments",
}
SAME = {"adamw_bnb_8bit": "adamw_8bit"}  # transformers 5.23 has two names for one --optim
# Typed anew by whoever starts again, or said by the launcher: a later start's own.
NOT_KEPT = {"resume", "resume_from_checkpoint", "output_dir", "deepspeed", "local_rank", "plan", "show_supervision"}
NOT_KEPT |= {"hub_token", "check_settings", "yes"}
# In the environment of a training that was started again with less: how many of its last words were added for that.
ADDED = "HOLO1_ADDED_WORDS"
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


def plain(value: Any) -> Any:
    """A value as JSON keeps it, so that what was written and what is read again compare equal."""
    return json.loads(json.dumps(value, default=str))


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of the last run in an output folder, whether it came to its first step or not (`has_begun`); None
    where no run was. Raises `SettingsError` for one that cannot be read."""
    path = folder / BEGINNING if (folder / BEGINNING).exists() else folder / RECORD_FILE
    try:
        record = json.loads(path.read_bytes())
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}, this version reads {FORMAT}")
        return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} is damaged ({error!r}); leave --resume out to begin again") from error


def has_begun(record: Mapping[str, Any]) -> bool:
    """Whether the run has come so far that a checkpoint could be its own."""
    return record.get("begun", True)


def write_record(folder: Path, record: Mapping[str, Any], name: str = RECORD_FILE) -> None:
    """(one process of each machine) Written aside and renamed: a run killed meanwhile keeps what it knew."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.partial-{rank()}"  # on a shared disk all write the same, each aside
    with partial.open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / name)


_marked: list[Path] = []  # marks of runs of this process


def mark_beginning(folder: Path, record: Mapping[str, Any]) -> None:
    """(one process of each machine) Note what a new run is before anything is read, for --resume."""
    write_record(folder, {**record, "begun": False}, BEGINNING)
    _marked.append(folder / BEGINNING)


def take_mark_away() -> None:
    """(any rank) The run has begun and has its record; or it was broken off by hand, or cannot work as it was typed:
    --resume then goes on with the run before it."""
    while _marked:
        with contextlib.suppress(OSError):
            _marked.pop().unlink()


def make_record(
    typed: Mapping[str, Any],
    values: Mapping[str, Any],
    deepspeed: Mapping[str, Any] | None,
    processes: int,
    batch: list[int],
) -> dict[str, Any]:
    """The record of a run before its base and pages are known: `typed` flags, resolved `values` by name, the `batch`
    that was asked for (`keep_pages_per_step`)."""
    stage = (deepspeed or {}).get("zero_optimization", {}).get("stage", 0) if deepspeed is not None else None
    return plain(
        {
            "format": FORMAT,
            "typed": {name: one_or_all(value) for name, value in sorted(typed.items()) if name not in NOT_KEPT},
            "fixed": {name: one_or_all(values[name]) for name in FIXED},
            "rate": values["learning_rate"],
            "zero_stage": stage,
            "pages_per_step": pages_per_step(values, processes),
            "batch": batch,
            "from": values["resume_from_checkpoint"] and os.path.abspath(values["resume_from_checkpoint"]),
            "processes": processes,
            "began_on": processes,
        }
    )


def pages_per_step(values: Mapping[str, Any], processes: int) -> int:
    """Of all processes together."""
    return values[BATCH[0]] * values[BATCH[1]] * processes


def inherit(record: dict[str, Any], earlier: Mapping[str, Any] | None) -> None:
    """Put into the `record` of a run that goes on what stays as it was in its `earlier` one, whatever becomes of it:
    from which checkpoint it began, and on how many processes, which decides on the steps of an epoch."""
    if earlier is not None:
        record["from"] = record["from"] or earlier.get("from")
        record["began_on"] = earlier.get("began_on", earlier["processes"])


def take_over(record: Mapping[str, Any], values: dict[str, Any], typed: dict[str, Any]) -> None:
    """Put what was typed when the run began into `values` and `typed`, beneath what is typed now."""
    for name, value in record["typed"].items():
        if name not in typed:
            values[name] = typed[name] = value


def keep_pages_per_step(
    record: Mapping[str, Any] | None,
    values: dict[str, Any],
    now: Collection[str],
    processes: int,
    problems: list[str],
) -> list[int]:
    """The batch that was asked for, by flags, JSON or defaults: pages at once, accumulated.

    Where the run of `record` goes on and asks for the same, `values` become such that any number of `processes` has its
    pages per step, however often that number changes, or that is one of the `problems`. What is typed `now` stays.
    """
    batch = [values[name] for name in BATCH]
    # An edited JSON asks for another batch as much as a flag does, and is compared with the run's as it is.
    if record is None or {*BATCH} & {*now} or record.get("batch", batch) != batch:
        return batch
    total = record["pages_per_step"]
    share, left = divmod(total, processes)
    if left or not share:
        problems.append(
            f"--resume: its {total} pages per step cannot be dealt out to {processes} processes; take a divisor"
        )
        return batch
    micro = at_most(batch[0], share)
    values |= {BATCH[0]: micro, BATCH[1]: share // micro}
    if "micro_batch" not in now and values["micro_batch"].isdecimal():
        values["micro_batch"] = str(at_most(int(values["micro_batch"]), share))
    return batch


def at_most(size: int, pages: int) -> int:
    """The largest number of pages at once that is no larger than `size` and divides `pages`."""
    return max(fewer for fewer in range(1, max(1, size) + 1) if pages % fewer == 0)


def shown(value: Any) -> str:
    """As it is typed, but for the flag's name."""
    return " and ".join(value) if isinstance(value, list) else str(value)


def differ(before: Any, now: Any) -> bool:
    """Whether two values of a setting mean something else."""
    names = [SAME.get(value, value) if isinstance(value, str) else value for value in (before, now)]
    return names[0] != names[1]


def differences(
    record: Mapping[str, Any], current: Mapping[str, Any], where: Path, unknown: Collection[str] = ()
) -> list[str]:
    """What the run in `where` cannot change but a record of the settings now, `current`, would; each by its flag, but
    for those whose value is still `unknown`."""
    problems = []
    for name, reason in FIXED.items():
        before, now = record["fixed"].get(name), current["fixed"][name]
        if differ(before, now) and name not in unknown:
            problems.append(
                f"--{name} {shown(now)}: the run in {where} began with {shown(before)}, and {WHY[reason]}; leave it "
                "out, or begin a new run"
            )
    if record["pages_per_step"] != current["pages_per_step"]:
        problems.append(
            f"{current['pages_per_step']} pages per step: the run in {where} began with {record['pages_per_step']}, "
            f"and {WHY['pages']}; --{BATCH[0]} x --{BATCH[1]} x processes must stay the same"
        )
    if record["zero_stage"] != current["zero_stage"]:
        words = [
            "without DeepSpeed" if stage is None else f"under DeepSpeed's ZeRO stage {stage}"
            for stage in (record["zero_stage"], current["zero_stage"])
        ]
        problems.append(f"--resume: the run in {where} trains {words[0]} and cannot go on {words[1]}")
    return problems


def why_foreign(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Why a checkpoint with the record `other` is none of the run with the record `own`; "" where it is."""
    if own.get("run") and own.get("run") == other.get("run"):
        return ""
    theirs = other["fixed"]
    found = [f"--{name} {theirs.get(name)}" for name in FIXED if differ(own["fixed"][name], theirs.get(name))]
    found += [f"other {name}" for name in ("base", "pages") if print_of(own.get(name)) != print_of(other.get(name))]
    found += [
        f"{other.get(name)} {name}, here {own[name]}"
        for name in ("pages_per_step", "zero_stage")
        if own[name] != other.get(name)
    ]
    if not found and not (own.get("run") and other.get("run")):  # of an earlier version, without a name
        return ""
    return f"is of another run ({', '.join(found) or 'the same settings, begun apart'})"


def print_of(value: Any) -> Any:
    """What of a base or of pages is compared: the fingerprint."""
    return value.get("fingerprint") if isinstance(value, Mapping) else value
