"""What a run will write, and whether the disks have room for it: looked at before anything is loaded.

    check_space(settings, args, config, tensors, len(pages))     # (all ranks) raises DiskError

Bytes as the Trainer and DeepSpeed write them (transformers 5.23, deepspeed 0.19.8): AdamW has two moments in fp32 for
each trained number, or in 8 bits, others have more or fewer, ZeRO keeps fp32 weights beside them, and a whole copy of
the weights lies in every checkpoint.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from families import family_of
from scoring.report_values import plural
from training import eight_bit
from training.base_model import DTYPES, BaseTensor
from training.checkpoints import BEST, checkpoints_in
from training.errors import DiskError
from training.processes import gather, in_columns, is_main, local_rank, say, world_size
from training.settings import PageSettings
from training.training_arguments import moments_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, TrainingArguments

SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
MARGIN = 1.05  # beside weights and moments: tokenizer, states, logs, pages


def final_bytes(tensors: Mapping[str, BaseTensor]) -> int:
    """Of a final folder: every tensor of the base, in its dtype."""
    return sum(math.prod(tensor.shape) * SIZES[DTYPES[tensor.dtype]] for tensor in tensors.values())


def checkpoint_bytes(
    parameters: int, trained: int, weight_bytes: int, sharded: bool, adapters: bool, moments: float = 8
) -> int:
    """Of one checkpoint: weights of `weight_bytes` each, both `moments` of so many, and fp32 weights where they are
    `sharded`.

    Of adapters the Trainer saves nothing else; DeepSpeed saves the frozen weights with them.
    """
    weights = trained if adapters and not sharded else parameters
    states = math.ceil((moments + 4 * sharded) * trained)
    frozen = weight_bytes * (parameters - trained) if sharded else 0
    return weights * weight_bytes + states + frozen


def moment_bytes(
    optim: str, tensors: Mapping[str, BaseTensor], trained: int, whole: bool, moments: int | None = 2
) -> float:
    """Of all `moments` of one of the `trained` numbers, on average; where nobody knows how many there are, as many as
    of AdamW. Where the base's tensors are stepped on as they are, `whole`, transformers 5.23 leaves those of embeddings
    in fp32."""
    moments = 2 if moments is None else moments
    if not eight_bit.is_asked(optim) or not trained:
        return 4 * moments
    embeddings = [tensor.shape for tensor in tensors.values() if tensor.name.endswith("embed_tokens.weight")]
    in_fp32 = sum(math.prod(shape) for shape in embeddings) / trained if whole else 0.0
    return moments * (4 * in_fp32 + eight_bit.MOMENT_BYTES * (1 - in_fp32))


def checkpoints_at_once(strategy: str, save_steps: float, steps: int, steps_per_epoch: int, limit: int | None) -> int:
    """The most checkpoints that lie on the disk at one time: those that are kept, and the one that is being written.

    Without a strategy there is none, but where a signal stops the run.
    """
    every = {
        "steps": save_steps if save_steps >= 1 else max(1, math.ceil(save_steps * steps)),
        "epoch": steps_per_epoch,
    }
    if strategy not in every:
        return 0
    written = math.ceil(steps / every[strategy])
    return max(1, written if limit is None else min(written, limit + 1))


def still_to_write(at_once: int, there: int) -> int:
    """Checkpoints that need new room where some are there already: each of those goes once a new one has come."""
    return at_once - min(there, max(0, at_once - 1))


def weights_at_once(judged: bool, kept: bool, one_disk: bool) -> tuple[int, int]:
    """The most whole weights for which output folder and final folder need room: of a run that is `judged` during
    training, the best ones so far too, and a moment long those that replace them. `kept`: some are there already.

    On `one_disk` the best become the final ones by a second name, else by a copy beside those of the end. What the
    output folder needs is counted first there: the final weights come when nothing replaces the best any more.
    """
    if not judged:
        return 0, 1
    best = 1 if kept else 2
    return (best, 0) if one_disk else (best, 2)


def check_space(
    settings: PageSettings,
    args: TrainingArguments,
    config: PretrainedConfig,
    tensors: Mapping[str, BaseTensor],
    pages: int,
) -> None:
    """(all ranks) What `pages` training pages will leave must fit onto the disks, at its most.

    Raises `DiskError` on every rank, naming what is needed, what is free and the remedy.
    """
    step_pages = args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size()
    per_epoch = math.ceil(pages / step_pages)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    strategy, limit = str(args.save_strategy.value), args.save_total_limit
    checkpoints = checkpoints_at_once(strategy, args.save_steps, steps, per_epoch, limit)
    adapters, sharded = settings.lora or settings.quantize == "4bit", bool(args.deepspeed)
    trained = trained_numbers(tensors, settings, family_of(config).vision)
    half = 2 if args.bf16 or args.fp16 else 4
    moments = moments_of(args.optim, args.optim_args, sharded)
    size = checkpoint_bytes(
        sum(math.prod(tensor.shape) for tensor in tensors.values()),
        trained,
        weight_bytes=half if sharded else 4,
        sharded=sharded,
        adapters=adapters,
        moments=moment_bytes(args.optim, tensors, trained, not (sharded or adapters), moments),
    )
    final, output_dir, final_dir = final_bytes(tensors), Path(args.output_dir), Path(settings.final_dir)
    wrong, beside, finals, needs = None, 0, 0, []
    if local_rank() == 0:
        checkpoints = still_to_write(checkpoints, len(checkpoints_in(output_dir)))
        one_disk = disk_of(output_dir)[0] == disk_of(final_dir)[0]
        beside, finals = weights_at_once(settings.eval_every > 0, (output_dir / BEST[0]).is_dir(), one_disk)
        needs = [(output_dir, size * checkpoints + final * beside), (final_dir, final * finals)]
        needs = [(folder, int(MARGIN * bytes_)) for folder, bytes_ in needs]
        wrong = shortage(needs)
    for text in filter(None, gather(wrong)):
        raise DiskError(text)
    if is_main():
        what = (
            f"{plural(checkpoints, 'checkpoint')} of {size / 1e9:.2f} GB and {beside + finals} x {final / 1e9:.2f} GB"
        )
        say(in_columns(room_words(needs, f"{what} of weights")))
    if not checkpoints and shortage([(output_dir, int(MARGIN * (size + final)))]):
        say(f"disk: no room for the {size / 1e9:.1f} GB of state that a signal would save: stopped, it would be lost")


def disk_of(folder: Path) -> tuple[int, Path]:
    """The file system on which a folder is or will be, and what of its path is there already."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return there.stat().st_dev, there


def disks(needs: Sequence[tuple[Path, int]]) -> list[tuple[Path, int, int]]:
    """Of (folder, bytes): each file system by a folder on it, the bytes that it has to take, and those it has free."""
    by_disk: dict[int, list[tuple[Path, int]]] = {}
    for folder, size in needs:
        disk, there = disk_of(folder)
        by_disk.setdefault(disk, []).append((there, size))
    return [
        (found[0][0], sum(size for _, size in found), shutil.disk_usage(found[0][0]).free) for found in by_disk.values()
    ]


def room_words(needs: Sequence[tuple[Path, int]], what: str) -> str:
    """What a run writes, in words, beside what is free; by file system where there are several."""
    found = disks(needs)
    parts = []
    for place, needed, free in found:
        where = f" on the disk of {place}" if len(found) > 1 else ""
        parts.append(f"{needed / 1e9:,.2f} GB at once{where}; {free / 1e9:,.1f} GB are free")
    return f"disk: this run writes up to {', and up to '.join(parts)} ({what})"


def shortage(needs: Sequence[tuple[Path, int]]) -> str:
    """Why (folder, bytes) do not fit, by file system; "" where they do."""
    for place, needed, free in disks(needs):
        if needed > free:
            return (
                f"the disk of {place} has {free / 1e9:.1f} GB free, and this run may write {needed / 1e9:.1f} GB "
                "at once; free some space, or give another --output_dir and --final_dir, --save_total_limit 1, or "
                "--save_strategy no"
            )
    return ""


def trained_numbers(tensors: Mapping[str, BaseTensor], settings: PageSettings, vision: Sequence[str]) -> int:
    """How many numbers are trained: all, those outside the modules `vision`, or the adapters' own."""
    language = [tensor for tensor in tensors.values() if not tensor.name.startswith(tuple(f"{v}." for v in vision))]
    if settings.lora or settings.quantize == "4bit":
        projections = [tensor.shape for tensor in language if ".layers." in tensor.name and len(tensor.shape) == 2]
        return sum(settings.lora_rank * sum(shape) for shape in projections)
    return sum(math.prod(tensor.shape) for tensor in (language if settings.freeze_vision else tensors.values()))
