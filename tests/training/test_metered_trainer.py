"""A step's line tells what was sent before the step, and nobody asks the GPU after it."""

import os
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import GATHERED, PROGRAMS, call_in_processes, free_port, output, small_run, start_zero_3

from training import processes, progress
from training.metered_trainer import MeteredTrainer
from training.processes import agree
from training.progress import Meter


@pytest.mark.slow
def test_nobody_asks_for_a_number_between_a_step_and_the_next_forward_pass(exact_base, pages_folder, tmp_path):
    """Under bf16 masters are split, as on a GPU."""
    flags = small_run(exact_base, pages_folder, max_steps=3, max_grad_norm=0.1, gradient_accumulation_steps=2)
    options = {"script": str(PROGRAMS / "asks_after_a_step.py"), "env": {"STEPS": "3"}, "config": GATHERED}
    done = start_zero_3(flags, tmp_path, **options)
    assert done.returncode == 0, output(done)
    assert "masters: bf16 weights" in done.stdout, output(done)
    assert re.search(r"^asked after a step: (.*)$", done.stdout, re.M).group(1) == "[]"


def measure(rank: int, world: int, port: int) -> None:
    """On each rank: two steps of two micro-batches; rank 1 alone is asked to stop, in the second."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    # Tokens go by a group of their own: in the usual one the weights of a model may be on their way.
    processes._cpu_group.append(torch.distributed.new_group(backend="gloo"))
    reduce, groups = torch.distributed.all_reduce, []
    torch.distributed.all_reduce = lambda *given, group=None, **named: (
        groups.append(group) or reduce(*given, group=group, **named)
    )
    # The loss is divided by what compute_loss then multiplies by: all ranks' tokens, or this one's.
    batches = [{"targets": torch.zeros(10 * (1 + rank))}, {"targets": torch.zeros(3)}]
    for together, wanted in ((True, 36.0), (False, 13.0 + 10 * rank)):
        trainer = SimpleNamespace(data_collator=SimpleNamespace(packed=True))
        trainer.args = SimpleNamespace(average_tokens_across_devices=together)
        assert MeteredTrainer._get_num_items_in_batch(trainer, batches, torch.device("cpu")) == wanted
    assert groups == processes._cpu_group
    meter, args = Meter(), SimpleNamespace(device=torch.device("cpu"))
    for step, loss in enumerate((1.0, 5.0)):
        for micro in range(2):
            meter.count(batch_of(pages=2 + rank, supervised=10 * (1 + rank)), image_token_id=0)
            meter.add(torch.tensor(loss + rank + micro))
        meter.waited, meter.planned_gib = float(rank), 70.0 + rank
        meter.send(args.device)
        assert agree(bool(step and rank)) == bool(step)
        meter.steps += 1
    meter.planned_gib = 99.0  # of a batch of the next step: not sent yet
    progress.process_peak_gib = lambda: 5.0 + rank  # after it was sent
    line = meter.read(args)
    assert line["peak_gib"] == 6.0
    seconds = line["seconds_per_step"] * 2
    # Of both ranks: 1 + 2 + 5 + 6 and 2 + 3 + 6 + 7, over two ranks.
    assert line["loss"] == 16.0
    assert line["pages_per_second"] * seconds == pytest.approx(20, rel=1e-5)
    assert line["supervised_tokens_per_second"] * seconds == pytest.approx(120, rel=1e-5)
    assert line["data_wait_share"] * seconds == pytest.approx(1.0, rel=1e-5)
    assert line["planned_gib"] == 71.0
    assert meter.sent is None and meter.losses == 0.0
    torch.distributed.destroy_process_group()


def batch_of(pages: int, supervised: int) -> dict:
    bounds, targets = torch.arange(pages + 1), torch.zeros(supervised)
    return {"page_bounds": bounds, "targets": targets, "image_places": torch.zeros(7), "flops": 1e12}


def test_a_line_is_of_all_ranks_and_of_what_was_sent(tmp_path):
    port = free_port()
    call_in_processes(measure, [[rank, 2, port] for rank in range(2)], tmp_path)
