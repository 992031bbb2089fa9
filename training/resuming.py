"""How a run goes on: from which checkpoint, with which settings of its own, and with what was typed anew.

take_folders(resolved)                              # (all ranks) nobody else's from here on, and marked as this run's
checkpoint = find_checkpoint(resolved, args)        # (all ranks) verified before anything is read or loaded
keep_what_is_not_ours(resolved)                     # (all ranks) moved aside before anything is written
checkpoints = begin_record(resolved, base, pages)   # (all ranks) noted for whoever goes on with this one
honour_typed(trainer)                               # (all ranks) once the Trainer has loaded the checkpoint
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR

import use_model_from_hub as use
from training import eight_bit, zero3
from training.checkpoints import (
    BEST,
    Checkpoints,
    check_whole,
    keep_apart,
    keep_earlier_results,
    move_aside,
    newest_whole,
    read_manifest,
    step_of,
)
from training.disk_space import shortage
from training.errors import DataError, DiskError, SettingsError, is_disk_full, is_out_of_memory
from training.folder_lock import let_go, own
from training.processes import gather, local_rank, on_each_machine, on_main, say, world_size
from training.run_record import DEEPSPEED_FILE, RECORD_FILE, mark_beginning, take_mark_away, why_foreign, write_record
from training.settings import Resolved

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


def take_folders(resolved: Resolved) -> None:
    """(all ranks) Own what this run writes into, before anything is written: a second run there would destroy this
    one's checkpoints. A new run leaves its mark, so that killed at any time it is this one that --resume means.

    Raises `SettingsError` where another run is going on there.
    """
    settings, output_dir = resolved.settings, Path(resolved.training["output_dir"])
    own(output_dir, "--output_dir")
    own(Path(settings.final_dir), "--final_dir", f".{use.FINAL_FOLDER}.owner")
    if local_rank() == 0 and not settings.resume:
        mark_beginning(output_dir, resolved.record)


def leave_folders(code: int) -> None:
    """(any rank) At the end of a run, with its exit code; one that could not work as it was typed is no run at all."""
    if code in (SettingsError.code, DataError.code):
        take_mark_away()
    let_go()


def find_checkpoint(resolved: Resolved, args: TrainingArguments) -> Path | None:
    """(all ranks) The whole checkpoint from which training goes on; None where it begins at step 0.

    Raises `SettingsError` where there is none that can be gone on from. From here on this process reads no pickle that
    brings anything but tensors and plain values.
    """
    # torch.load then ignores the weights_only=False that DeepSpeed 0.19.8 asks for: a manifest can be forged, too.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    asked, output_dir = resolved.training["resume_from_checkpoint"], Path(resolved.training["output_dir"])
    if local_rank() == 0:  # of a run that was killed after it had been converted, and may go on unconverted now
        shutil.rmtree(output_dir / zero3.CONVERTED, ignore_errors=True)
    if resolved.settings.resume:
        checkpoint = newest_whole(output_dir, partial(why_foreign, resolved.earlier))
        if checkpoint is None and resolved.record["from"]:  # killed before it had written one of its own
            check_whole(checkpoint := Path(resolved.record["from"]))
        elif checkpoint is None:
            say(f"{output_dir} has no checkpoint yet: this run begins at step 0 again, with its settings and pages")
            return None
    elif asked:
        check_whole(checkpoint := Path(asked))
    else:
        return None
    written = read_manifest(checkpoint)
    files, processes = written["files"], written["record"]["processes"]
    if not any(name == "optimizer.pt" or name.endswith("optim_states.pt") for name in files):
        raise SettingsError(
            f"{checkpoint} holds weights only (--save_only_model): give them to a new run as --base_model"
        )
    say(f"going on from {checkpoint}, whole by its manifest")
    if resolved.deepspeed is not None:
        zero3.trust_own_classes()
        if processes != world_size():
            return converted(checkpoint, written, args)
    return checkpoint


def converted(checkpoint: Path, written: Mapping[str, Any], args: TrainingArguments) -> Path:
    """(all ranks) The checkpoint, whose manifest is `written`, for as many processes as there are now.

    Raises `DiskError` where the disk is too small or full, `SettingsError` where DeepSpeed cannot convert it.
    """
    start, place = time.monotonic(), Path(args.output_dir) / zero3.CONVERTED
    processes = written["record"]["processes"]
    instead = f"go on with {processes} processes, or give its weights alone to a new run as --base_model {checkpoint}"

    optim = written["record"].get("fixed", {}).get("optim", "")
    if optim in eight_bit.BLOCKWISE:
        raise SettingsError(
            f"{checkpoint} was written by {processes} processes with --optim {optim}, and DeepSpeed converts fp32 "
            f"moments only; {instead}"
        )

    def convert() -> Path:
        if short := shortage([(place, bytes_of_conversion(written["files"]))]):
            raise DiskError(f"{checkpoint} has to be converted for {world_size()} processes: {short}; or {instead}")
        try:
            return zero3.convert(checkpoint, place)
        except Exception as error:
            shutil.rmtree(place, ignore_errors=True)
            if is_disk_full(error):
                raise DiskError(
                    f"no space to convert {checkpoint} for {world_size()} processes ({error}); nothing half-written is "
                    f"left, and it is untouched; free some space in {place.parent}, or {instead}"
                ) from error
            if is_out_of_memory(error):
                raise
            raise SettingsError(
                f"{checkpoint} was written by {processes} processes, and DeepSpeed cannot convert it for "
                f"{world_size()} ({type(error).__name__}: {error}); {instead}"
            ) from error

    folder = on_each_machine(convert, Path.is_dir)
    zero3.expect_converted(args.hf_deepspeed_config.config)
    say(f"converted from {processes} to {world_size()} processes in {time.monotonic() - start:.1f} s")
    return folder


def bytes_of_conversion(files: Mapping[str, Mapping[str, Any]]) -> int:
    """The most that lies on the disk at once while a checkpoint of these files is converted (deepspeed 0.19.8): its
    moments and fp32 weights twice, in pieces and put together, or in the end all of it."""
    states = sum(file["bytes"] for name, file in files.items() if name.endswith("optim_states.pt"))
    return max(2 * states, sum(file["bytes"] for file in files.values()))


def steps_before(checkpoint: Path | None) -> int:
    """The step at which a run goes on."""
    return 0 if checkpoint is None else step_of(checkpoint) or 0


def goes_on_here(resolved: Resolved) -> bool:
    """Whether this run is the one whose checkpoints lie in its output folder: by --resume, or back to one of them."""
    asked = resolved.training["resume_from_checkpoint"]
    inside = bool(asked) and Path(asked).resolve().parent == Path(resolved.training["output_dir"]).resolve()
    return resolved.settings.resume or inside


def keep_what_is_not_ours(resolved: Resolved) -> None:
    """(all ranks) What this run does not go on with moves to a dated folder: all that an earlier run has left, or
    another run's checkpoints, and those after the one to which it goes back. Neither counted, nor deleted, nor taken by
    the next --resume."""
    output_dir, asked = Path(resolved.training["output_dir"]), resolved.training["resume_from_checkpoint"]
    keep_earlier_results(output_dir, resumes=goes_on_here(resolved))
    if not goes_on_here(resolved):
        return

    def apart(folder: Path) -> str:
        if asked and step_of(folder) > step_of(Path(asked)):
            return f"comes after {Path(asked).name}"
        try:
            return why_foreign(resolved.earlier, read_manifest(folder)["record"])
        except ValueError:
            return ""  # damaged, and replaced when that step is trained again

    keep_apart(output_dir, apart)
    if asked:
        on_main(lambda: forget_best_after(output_dir, step_of(Path(asked)), resolved.earlier))


def forget_best_after(output_dir: Path, step: int, earlier: Mapping[str, Any]) -> None:
    """(main process only) The best weights move aside where they are another run's, or from after the step to which
    this one goes back."""
    try:
        best = json.loads((output_dir / BEST[1]).read_text(encoding="utf-8"))["step"]
        other = json.loads((output_dir / RECORD_FILE).read_bytes())
    except (OSError, ValueError, KeyError, TypeError):
        return  # none, or not to be read: BestWeights says so
    if (best is not None and best > step) or why_foreign(earlier, other):
        place = move_aside(output_dir, [path for path in (output_dir / name for name in BEST) if path.exists()])
        say(f"moved to {place}: the best weights so far, of step {best}")


def begin_record(resolved: Resolved, base: str, pages: Mapping[str, str]) -> Checkpoints:
    """(all ranks) Note what this run is, once its base and its pages are known by their fingerprints; returns where its
    checkpoints go.

    Raises `SettingsError` where the base's weights are others than those that the run began with.
    """
    output_dir, before = Path(resolved.training["output_dir"]), (resolved.earlier or {}).get("base", base)
    if before != base:
        raise SettingsError(
            f"--base_model {resolved.settings.base_model} holds other weights than when the run in {output_dir} began; "
            "put those back, or begin a new run"
        )
    record = resolved.record | {"base": base, "pages": dict(pages)}
    known = resolved.earlier.get("run") if goes_on_here(resolved) and resolved.earlier else None
    record["run"] = known or on_main(lambda: uuid.uuid4().hex)
    if local_rank() == 0:
        write_record(output_dir, record)
        if resolved.deepspeed is not None:
            write_record(output_dir, resolved.deepspeed, DEEPSPEED_FILE)
        take_mark_away()
    checkpoints = Checkpoints(output_dir, resolved.training["save_total_limit"], record)
    checkpoints.clear()
    return checkpoints


def honour_typed(trainer: Trainer) -> None:
    """(all ranks) What a checkpoint brings back, but the settings say anew: rates, decay, and when to log and save.

    The Trainer (transformers 5.23) takes the optimizer's groups, the schedule's rates and its intervals as they were
    saved, whatever was typed since.
    """
    args, scheduler = trainer.args, trainer.lr_scheduler
    if args.deepspeed:
        zero3.count_steps_apart(trainer.model_wrapped)
    gather(None)  # every rank has read it
    if local_rank() == 0:
        shutil.rmtree(Path(args.output_dir) / zero3.CONVERTED, ignore_errors=True)
    trainer.state.compute_steps(args, trainer.state.max_steps)
    groups = trainer.optimizer.param_groups
    for number, group in enumerate(groups):
        # The Trainer's two groups: what decays, and norms and biases, which do not.
        decays = len(groups) != 2 or number == 0
        typed = {"weight_decay": args.weight_decay if decays else 0.0, "eps": args.adam_epsilon}
        typed |= {"betas": (args.adam_beta1, args.adam_beta2), "initial_lr": args.learning_rate}
        group |= {name: value for name, value in typed.items() if name in group}
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = [args.learning_rate for _ in scheduler.base_lrs]
        rates = [args.learning_rate * shape(scheduler.last_epoch) for shape in scheduler.lr_lambdas]
        for group, rate in zip(groups, rates):
            group["lr"] = rate
        scheduler._last_lr = rates
