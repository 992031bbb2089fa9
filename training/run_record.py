"""What a run was: the settings it began with, its base and its pages, beside its checkpoints and in each of them.

    typed = recorded_typed(output_dir)          # what was typed when it began, for --resume
    problems = differences(record, resolved)    # what --resume was asked to change and cannot
    record = make_record(resolved, base, pages) # of a new run; written as output_dir/run.json

--resume goes on with the settings of the run. What can be honoured when it is typed anew (more steps, another learning
rate) is; what cannot, because trained pages, weights or moments would mean something else, is refused by name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from training.errors import SettingsError
from training.mixture import one_or_all

RECORD_FILE = "run.json"
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
# Typed anew by whoever starts again, or said by the launcher: a later start's own.
NOT_KEPT = {"resume", "resume_from_checkpoint", "output_dir", "deepspeed", "local_rank", "plan", "show_supervision"}
NOT_KEPT |= {"hub_token", "check_settings"}
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


def plain(value: Any) -> Any:
    """A value as JSON keeps it, so that what was written and what is read again compare equal."""
    return json.loads(json.dumps(value, default=str))


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in an output folder; None where no run was. Raises `SettingsError` for one that cannot be read."""
    path = folder / RECORD_FILE
    try:
        record = json.loads(path.read_bytes())
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}, this version reads {FORMAT}")
        return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} is damaged ({error!r}); leave --resume out to begin again") from error


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """(one process of each disk) Written aside and renamed: a run killed meanwhile keeps what it knew."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{RECORD_FILE}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / RECORD_FILE)


def make_record(
    typed: Mapping[str, Any], values: Mapping[str, Any], deepspeed: Mapping[str, Any] | None, processes: int
) -> dict[str, Any]:
    """The record of a run before its base and pages are known: `typed` flags, resolved `values` by name."""
    stage = (deepspeed or {}).get("zero_optimization", {}).get("stage", 0) if deepspeed is not None else None
    return plain(
        {
            "format": FORMAT,
            "typed": {name: one_or_all(value) for name, value in sorted(typed.items()) if name not in NOT_KEPT},
            "fixed": {name: one_or_all(values[name]) for name in FIXED},
            "rate": values["learning_rate"],
            "zero_stage": stage,
            "pages_per_step": pages_per_step(values, processes),
            "processes": processes,
        }
    )


def pages_per_step(values: Mapping[str, Any], processes: int) -> int:
    """Of all processes together."""
    return values[BATCH[0]] * values[BATCH[1]] * processes


def take_over(
    record: Mapping[str, Any], values: dict[str, Any], typed: dict[str, Any], processes: int, problems: list[str]
) -> None:
    """Put what was typed when the run began into `values` and `typed`, beneath what is typed now; pages per step stay
    the same on any number of `processes`, or become one of the `problems`."""
    now = set(typed)
    for name, value in record["typed"].items():
        if name not in now:
            values[name] = typed[name] = value
    total = record["pages_per_step"]
    if {*BATCH, "micro_batch"} & now or record["processes"] == processes:
        return
    if total % processes:
        problems.append(
            f"--resume: its {total} pages per step cannot be dealt out to {processes} processes; take a divisor"
        )
        return
    share = total // processes
    micro = values[BATCH[0]]
    micro = micro if share % micro == 0 else max(size for size in range(1, share + 1) if share % size == 0)
    values |= {BATCH[0]: micro, BATCH[1]: share // micro}


def shown(value: Any) -> str:
    """As it is typed, but for the flag's name."""
    return " and ".join(value) if isinstance(value, list) else str(value)


def differences(
    record: Mapping[str, Any], current: Mapping[str, Any], where: Path, unknown: Collection[str] = ()
) -> list[str]:
    """What the run in `where` cannot change but a record of the settings now, `current`, would; each by its flag, but
    for those whose value is still `unknown`."""
    problems = []
    for name, reason in FIXED.items():
        before, now = record["fixed"].get(name), current["fixed"][name]
        if before != now and name not in unknown:
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
