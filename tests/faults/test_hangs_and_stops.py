"""A rank that hangs, one whose memory runs out, and requests to stop while nothing trains: the real main, real signals,
two gloo ranks where it matters. What goes wrong, and where, is planned in tests/programs/hangs.py.
"""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import (
    PROGRAMS,
    UNRENDERED,
    Running,
    in_background,
    output,
    small_run,
    start_plain,
    start_torchrun,
)

HANGS = str(PROGRAMS / "hangs.py")
CHOSEN = str(PROGRAMS / "planned_scores.py")
PAGE_A_STEP = {"gradient_accumulation_steps": 1, "save_strategy": "steps"}


def planned(cwd: Path, **plan: str) -> dict[str, str]:
    """The environment of a training that the wrapper has started and for which tests/programs/hangs.py has a plan."""
    (cwd / "status").mkdir(exist_ok=True)
    return {**UNRENDERED, "PYTHONUNBUFFERED": "1", "HOLO1_STATUS_DIR": str(cwd / "status"), **plan}


def begin(flags: list[str], cwd: Path, **plan: str):
    """A block with the training as a `Running`."""
    return in_background(flags, cwd, script=HANGS, env=planned(cwd, **plan))


def when_reached(process: Running, file: Path) -> None:
    end = time.monotonic() + 240
    while not file.exists():
        assert process.poll() is None and time.monotonic() < end, process.said()
        time.sleep(0.05)


def codes(cwd: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in (cwd / "status").glob("rank-*")}


@pytest.mark.slow
def test_all_ranks_end_with_83_where_memory_runs_out_on_one(tiny_base, pages_folder, tmp_path):
    """In the second step of rank 1; the other one is stuck, as it would be in a collective of NCCL's."""
    pages = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    flags = small_run(tiny_base, pages_folder, max_steps=4, save_strategy="steps", save_steps=1, **pages)
    plan = planned(tmp_path, HOW="memory", AT_RANK="1", AT_STEP="2", OTHERS="hang")
    done = start_torchrun(flags, tmp_path, script=HANGS, env=plan)
    said = output(done)
    assert codes(tmp_path) == {"rank-0": "83", "rank-1": "83"}, said
    assert json.loads((tmp_path / "status" / "smaller").read_text()) == {"micro_batch": 2, "resume": True}
    assert "rank 0: ending after 1 steps, as rank 1 has: 83, out of memory" in said


@pytest.mark.slow
def test_a_run_that_reads_pages_ends_at_once(tiny_base, pages_folder, tmp_path):
    """SIGUSR1 is SLURM's warning; the main thread is stuck in C."""
    with begin(small_run(tiny_base, pages_folder), tmp_path, HOW="pages") as process:
        when_reached(process, tmp_path / "reached-0")
        assert json.loads((tmp_path / "status" / "beat-0").read_text())["limit_s"] is None, "reading pages is no hang"
        process.send_signal(signal.SIGUSR1)
        code, said = process.wait(60), process.said()
    assert code == 128 + signal.SIGUSR1, said
    assert codes(tmp_path) == {"rank-0": str(128 + signal.SIGUSR1)}
    assert "stopped by SIGUSR1: nothing was trained, and checkpoints are as they were" in said


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_reads_pages_is_the_one_that_goes_on(tiny_base, pages_folder, tmp_path):
    """In the folder of an earlier one, which differs in what a resumed run could change. Broken off by Ctrl-C it was a
    mistake, and the earlier one is meant."""
    flags, out = small_run(tiny_base, pages_folder, max_steps=1, **PAGE_A_STEP), tmp_path / "holo1_dom_finetune_output"
    done = start_plain([*flags, "--learning_rate", "1e-4"], tmp_path)
    assert done.returncode == 0, output(done)
    for number, code in ((signal.SIGINT, 128 + signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)):
        with begin([*flags, "--learning_rate", "3e-4"], tmp_path, HOW="pages") as process:
            when_reached(process, tmp_path / "reached-0")
            process.send_signal(number)
            assert process.wait(60) == code, process.said()
        assert (out / "run_begins.json").exists() == (number == signal.SIGKILL)
        (tmp_path / "reached-0").unlink()
    done = start_plain(["--resume"], tmp_path)
    assert done.returncode == 0 and "was ended before its first step, and begins again" in done.stdout, output(done)
    assert "1 checkpoint and the evaluation of an earlier run" in done.stdout and "step 1/1" in done.stdout
    assert json.loads((out / "run.json").read_text())["rate"] == 3e-4 and not (out / "run_begins.json").exists()


@pytest.mark.slow
def test_a_run_that_judges_at_the_end_is_told_from_one_that_lost_something(tiny_base, pages_folder, tmp_path):
    with begin(small_run(tiny_base, pages_folder, max_steps=1, **PAGE_A_STEP), tmp_path, HOW="judge") as process:
        when_reached(process, tmp_path / "reached-0")
        process.send_signal(signal.SIGTERM)
        code, said = process.wait(60), process.said()
    assert code == 85 and codes(tmp_path) == {"rank-0": "85"}, said
    last = said.strip().splitlines()[-1]
    assert "the model is whole in holo1_dom_finetune_final" in last and "output/checkpoint-1" in last, said
    card = (tmp_path / "holo1_dom_finetune_final" / "README.md").read_text()
    assert "trained and saved, but not judged yet" in card


@pytest.mark.slow
def test_ranks_that_judge_during_training_agree_and_save_the_step(tiny_base, pages_folder, tmp_path):
    """A file asks them; rank 0 is between two batches when it is seen, or about to be."""
    flags = small_run(tiny_base, pages_folder, max_steps=4, eval_every=1, eval_pages=8, **PAGE_A_STEP)
    flags += ["--per_device_eval_batch_size", "1"]
    with ThreadPoolExecutor(1) as beside:
        plan = planned(tmp_path, HOW="judge")
        run = beside.submit(start_torchrun, flags, tmp_path, script=HANGS, env=plan, timeout=240)
        while not (tmp_path / "reached-0").exists() and not run.done():
            time.sleep(0.05)
        (tmp_path / "holo1_dom_finetune_output" / "SAVE_AND_STOP").touch()
        time.sleep(3)
        (tmp_path / "go_on").touch()
        said = output(run.result())
    assert codes(tmp_path) == {"rank-0": "85", "rank-1": "85"}, said
    assert (tmp_path / "holo1_dom_finetune_output" / "checkpoint-1" / "trainer_state.json").is_file()
    assert "stopped by SAVE_AND_STOP at step 1" in said and "step 2/4" not in said
    assert not (tmp_path / "holo1_dom_finetune_output" / "SAVE_AND_STOP").exists()


@pytest.mark.slow
def test_no_rank_waits_for_an_upload(tiny_base, pages_folder, tmp_path):
    """It may take longer than a collective may, which would then end a run whose model is trained and saved."""
    pages = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    flags, plan = small_run(tiny_base, pages_folder, max_steps=1, **pages), planned(tmp_path, HOW="publish")
    done = start_torchrun(flags, tmp_path, script=HANGS, env=plan)
    said = output(done)
    assert done.returncode == 0 and codes(tmp_path) == {"rank-0": "0", "rank-1": "0"}, said
    assert "while it was published, the other rank had ended" in said and "done: python use_model_from_hub.py" in said


@pytest.mark.slow
def test_a_failure_while_judging_at_the_end_leaves_a_card(tiny_base, pages_folder, tmp_path):
    """The score of the last evaluation is not planned, which raises a KeyError there."""
    flags = small_run(tiny_base, pages_folder, max_steps=1, **PAGE_A_STEP)
    done = start_plain(flags, tmp_path, script=CHOSEN, env={"PLANNED": "{}", "UNRENDERED": "1"})
    assert done.returncode == 1 and "KeyError: 'after'" in done.stderr, output(done)
    card = (tmp_path / "holo1_dom_finetune_final" / "README.md").read_text()
    assert "trained and saved, but not judged yet" in card and "| steps | 1 |" in card
