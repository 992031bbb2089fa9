"""What a run tells of itself while it trains: rates, waits and memory in one line a step, and the loss as a picture.

    meter = Meter()
    meter.count(batch, image_token_id)          # every micro-batch, on this rank
    meter.add(loss)                             # its loss, on the GPU
    meter.send(device)                          # (all ranks) of a step's last micro-batch, before its backward pass
    logs |= meter.read(args)                    # (all ranks) since the last line

Everything is per optimizer step and over all ranks, in seconds and GiB; pauses for evaluation do not count.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import TrainerState, TrainingArguments

from families.page_costs import peak_tflops
from scoring.bar import draw, erase, on_terminal
from scoring.machine import free_gpu_bytes
from scoring.report_values import plural
from training.heartbeat import heart
from training.processes import add_up, is_main, largest, say, take_largest, world_size
from training.prompt_and_mask import IGNORED

if TYPE_CHECKING:
    from tqdm import tqdm


def say_memory(what: str, start: float) -> None:
    """Say how long a stage took and how much memory the process holds after it."""
    gib = psutil.Process().memory_info().rss / 2**30
    gpu = f", GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB peak" if torch.cuda.is_available() else ""
    say(f"{what} in {time.monotonic() - start:.1f} s; memory {gib:.1f} GiB{gpu}")


def say_batch(args: TrainingArguments) -> None:
    """The pages of a step as arithmetic."""
    micro, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    total = micro * accumulated * world_size()
    ranks = plural(world_size(), "process")
    say(f"{plural(micro, 'page')} x {accumulated} accumulated x {ranks} = {plural(total, 'page')} per step")


class Meter:
    """What went through the model since the last log line, on this rank.

    It is sent before a step's last backward pass: who asked a GPU for it after the step would wait for the optimizer,
    and the GPU then for whoever asked.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forgets all that was counted; the clock (seconds) starts again."""
        self.start, self.paused, self.waited = time.monotonic(), 0.0, 0.0
        self.pages = self.supervised = self.image = self.steps = 0
        self.flops = self.planned_gib = 0.0  # the highest plan of a batch
        self.losses: torch.Tensor | float = 0.0  # the sum over micro-batches
        # Sums over all ranks, the largest of each number, and what there is to wait for until both are in the CPU's
        # memory.
        self.sent: tuple[torch.Tensor, torch.Tensor, torch.cuda.Event | None] | None = None

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside is no training time."""
        start = time.monotonic()
        yield
        self.paused += time.monotonic() - start

    def count(self, inputs: dict, image_token_id: int) -> None:
        """Adds a batch: pages, supervised and image tokens, and its "flops", which are taken out of `inputs`, as the
        names of its "pages" are, for the heartbeat."""
        self.flops += inputs.pop("flops", 0.0)
        names = inputs.pop("pages", ())
        heart.trains_on(names, len(names))
        if "targets" in inputs:
            self.pages += len(inputs["page_bounds"]) - 1
            self.supervised += len(inputs["targets"])
            self.image += len(inputs["image_places"])
        else:
            self.pages += len(inputs["labels"])
            self.supervised = self.supervised + inputs["labels"].ne(IGNORED).sum()
            self.image = self.image + inputs["input_ids"].eq(image_token_id).sum()

    def add(self, loss: torch.Tensor) -> None:
        """Adds a micro-batch's loss, a scalar, which stays where it is."""
        self.losses = self.losses + loss.detach()

    def send(self, device: torch.device) -> None:
        """(all ranks) What was counted so far starts on its way to all ranks and to the CPU; nobody waits for it, nor a
        GPU for another one, which may be at a longer page."""
        counts, arrived = [self.losses, self.pages, self.supervised, self.image, self.flops / 1e12], None
        with beside(device, [number for number in counts if torch.is_tensor(number)]):
            sums = on_device(counts, device, torch.float64 if device.type == "cuda" else torch.float32)
            worst = on_device([self.waited, self.planned_gib], device, torch.float32)
            add_up(sums)
            take_largest(worst)
            if device.type == "cuda":
                sums, worst = to_cpu(sums), to_cpu(worst)
                arrived = torch.cuda.Event()
                arrived.record()
        self.sent = sums, worst, arrived

    def arrived(self) -> tuple[list[float], list[float]]:
        """Sums over all ranks, and the largest of each number, as they were sent last."""
        sums, worst, arrived = self.sent
        if arrived:
            arrived.synchronize()
        return sums.tolist(), worst.tolist()

    def read(self, args: TrainingArguments) -> dict[str, float]:
        """(all ranks) The mean loss of all ranks, summed over the steps, rates over all ranks, the longest wait for
        data, and the highest peak memory of one; where batches are planned, the highest of their plans since the last
        line."""
        if self.sent is None:
            self.send(torch.device(args.device))
        seconds, steps = time.monotonic() - self.start - self.paused, max(1, self.steps)
        (loss, *sums), (waited, planned) = self.arrived()
        peak = largest(peak_gib())  # of this moment, with the backward pass that came after the rest was sent
        pages, supervised, image, tflops = (number / seconds for number in sums)
        self.reset()
        most = peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        return (
            {
                "loss": loss / world_size(),
                "pages_per_second": pages,
                "supervised_tokens_per_second": supervised,
                "image_tokens_per_second": image,
                "seconds_per_step": seconds / steps,
                "data_wait_share": waited / seconds,
                "peak_gib": peak,
            }
            | ({"mfu": tflops / most / world_size()} if most and tflops else {})
            | ({"planned_gib": planned} if planned else {})
        )


_beside: list[torch.cuda.Stream] = []  # at most one


@contextlib.contextmanager
def beside(device: torch.device, read: Sequence[torch.Tensor]) -> Iterator[None]:
    """What is asked of a GPU inside is done on a stream of its own, once what was asked before, of which `read` is read
    inside, is computed; the stream that computes does not wait for it."""
    if device.type != "cuda":
        yield
        return
    if not _beside:
        _beside.append(torch.cuda.Stream(device))
    (stream,) = _beside
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    for tensor in read:
        if tensor.is_cuda:
            tensor.record_stream(stream)  # its memory goes to nobody before it is read


def on_device(numbers: Sequence[torch.Tensor | float], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """`numbers` as one tensor (N,) on `device`, where some of them may be already, without waiting for a GPU."""
    known = torch.tensor([0.0 if torch.is_tensor(number) else number for number in numbers], dtype=dtype)
    if device.type == "cuda":
        # From other memory torch waits until all before is done; a container may allow none to be pinned.
        with contextlib.suppress(RuntimeError):
            known = known.pin_memory()
    known = known.to(device, non_blocking=True)
    for place, number in enumerate(numbers):
        if torch.is_tensor(number):
            known[place] += number
    return known


def to_cpu(numbers: torch.Tensor) -> torch.Tensor:
    """On their way into pinned memory, for which nobody waits; there already where none may be pinned."""
    try:
        return numbers.to("cpu", non_blocking=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return numbers.cpu()


def peak_gib() -> float:
    """The most memory that this process has held so far, in GiB: of a GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return process_peak_gib()


def gpu_memory_words() -> str:
    """Who has a GPU's memory at this moment, in GiB; empty without one."""
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    peak, outside = torch.cuda.max_memory_allocated(), total - free - reserved
    gib = [f"{size / 2**30:.1f}" for size in (allocated, peak, reserved - allocated, outside, free)]
    # Outside are CUDA's own, NCCL's, what kernels that spill have had set aside, and other processes.
    return "{} GiB in tensors (at most {}), {} in gaps between them, {} outside of torch, {} free".format(*gib)


def cache_words() -> str:
    """How often torch found no room and gave all that it kept for later back to the GPU, which waits for that; and the
    most that was in tensors, or let go of while another stream was at work on it, which the peak does not count."""
    told = torch.cuda.memory_stats()
    active, times = told.get("active_bytes.all.peak", 0) / 2**30, told.get("num_alloc_retries", 0)
    return f"torch gave its cache back {plural(times, 'time')}; at most {active:.1f} GiB were not to be given to others"


# Torch reads the second only where the first is not there, not even empty (tried with 2.11.0 and 2.14.1).
ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def segment_words() -> str:
    """Whether torch's memory on this GPU grows in segments; empty without one."""
    if not torch.cuda.is_available():
        return ""
    there = torch.empty(1, device="cuda")  # held meanwhile, so that torch has a segment at all
    if torch.cuda.get_allocator_backend() != "native":
        return (
            "torch's memory is CUDA's own allocator's, of which the plan knows nothing, so memory may run out: leave "
            f"`backend` out of {' and '.join(ALLOCATOR_SETTINGS)}"
        )
    words = judge_segments(torch.cuda.memory_snapshot(), os.environ)
    del there
    return words


def judge_segments(segments: Iterable[Mapping[str, Any]], environment: Mapping[str, str]) -> str:
    """Whether most of torch's memory lies in segments that grow, from what its allocator says of each, and if not, by
    which setting in the environment, and what to do."""
    sizes = {True: 0, False: 0}
    for segment in segments:
        sizes[bool(segment.get("is_expandable"))] += segment["total_size"]
    grown, fixed = (size / 2**30 for size in (sizes[True], sizes[False]))
    if sizes[True] > sizes[False]:
        return f"torch's memory grows in segments, {grown:.1f} GiB so far" + (f"; {fixed:.1f} do not" if fixed else "")
    name = next((name for name in ALLOCATOR_SETTINGS if name in environment), ALLOCATOR_SETTINGS[0])
    value = environment.get(name, "")
    if "expandable_segments:True" in value.replace(" ", ""):
        why = f"though {name} is {value}: this GPU's driver, or another setting there, does not let it"
    elif value:
        why = f"because {name} is {value}: add expandable_segments:True"
    else:
        why = f"because {name} is empty: give it expandable_segments:True"
    return (
        f"torch's memory does not grow in segments, {why}. {fixed:.1f} GiB lie in fixed ones, which batches of other "
        "sizes leave gaps in; the plan does not know of them, so memory may run out"
    )


def process_peak_gib() -> float:
    """The most memory that this process has held so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def memory_is_tight() -> bool:
    """Whether a tenth or less is free, where no plan fills it on purpose. Clearing costs 0.3 s a step, several times a
    small model's whole step."""
    if torch.cuda.is_available():
        free, total = free_gpu_bytes(), torch.cuda.mem_get_info()[1] * torch.cuda.get_per_process_memory_fraction()
    else:
        free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    return free < 0.1 * total


def release_memory() -> None:
    """Gives back what nobody holds any more: Python's circles, and on a GPU torch's cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def log_line(logs: dict, state: TrainerState) -> str:
    """A step's `logs` for the console, in 100 columns up to step 99,999: loss, rate, pages a second, the share of the
    GPU's operations (MFU) and of the time that waits for data, peak in GiB, hours and minutes left. Tokens a second are
    in the logs of --report_to."""
    minutes, seconds = divmod(round((state.max_steps - state.global_step) * logs["seconds_per_step"]), 60)
    left = f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes}:{seconds:02d} min"
    speed = logs["pages_per_second"]
    return (
        f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.1e}"
        f"  {speed:.{2 if speed < 10 else 1 if speed < 100 else 0}f} pages/s"
        + (f"  MFU {100 * logs['mfu']:.0f} %" if "mfu" in logs else "")
        + f"  wait {100 * logs['data_wait_share']:.0f} %  {logs['peak_gib']:.1f} GiB  {left} left"
    )


_bar: list[tqdm] = []  # of the steps, while they are trained on a terminal


def say_step(logs: dict, state: TrainerState) -> None:
    """(main process only speaks) The line of a step, and on a terminal a bar of all steps below it."""
    say(log_line(logs, state))
    if not is_main() or not on_terminal():
        return
    if not _bar:
        _bar.append(draw("steps", state.max_steps, state.global_step, "step"))
    _bar[0].update(state.global_step - _bar[0].n)
    if state.global_step >= state.max_steps:
        erase(_bar.pop())


def draw_loss(history: list[dict], path: Path) -> list[tuple[int, float]]:
    """The loss curve as a picture: every step pale, their running mean strong. Returns its (step, loss)."""
    import matplotlib  # half a second, and only at the end of a run

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if not points:
        return points
    steps, losses = zip(*points)
    mean, smooth = losses[0], []
    for loss in losses:
        mean += (loss - mean) * 0.1
        smooth.append(mean)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="each step")
    axes.plot(steps, smooth, color="#08519c", linewidth=2, label="running mean")
    axes.set(xlabel="optimizer step", ylabel="loss per supervised token", title="Training loss")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path)
    pyplot.close(figure)
    return points
