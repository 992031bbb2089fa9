"""The training script as a user starts it: the real main, plainly, by torchrun and by the deepspeed launcher.

    python -m pytest tests/test_holo1_dom_finetune.py               # what trains nothing
    python -m pytest tests/test_holo1_dom_finetune.py -m slow       # trains tiny models, some minutes

Sections: Before training, What is learned, What does not fit and several machines, Stopping and resuming, Failures,
Adapters, Evaluation.
"""

import contextlib
import copy
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from card_examples import card_of, numbers_without_a_source
from conftest import (
    GATHERED,
    MAIN,
    ON_CPU,
    PLAIN_JSON,
    PROGRAMS,
    ROOT,
    free_port,
    in_background,
    loaded_for_help,
    make_base,
    make_config,
    make_pages,
    make_processor,
    make_qwen3_5_base,
    make_qwen3_vl_base,
    need_browser,
    output,
    run_script,
    small_run,
    start_deepspeed,
    start_plain,
    start_torchrun,
    start_zero_3,
    weights,
    zero_3,
)

import holo1_dom_finetune as pipeline
from training.checkpoints import checkpoints_in
from training.settings import PageSettings

# -----------------------------------------------------------------------------
# Before training


def test_help_answers_at_once_without_torch(tmp_path):
    said, loaded, seconds = loaded_for_help(MAIN, tmp_path)
    assert "--base_model" in said and "--num_samples" in said
    assert "training.settings" in loaded and not {"torch", "datasets", "deepspeed"} & loaded
    assert seconds < 20, "this loads something heavy"  # a quiet machine needs about one second


FLAGS_THAT_DO_NOT_EXIST = ["--learning_rat", "--unknown"]


@pytest.mark.parametrize("flag", FLAGS_THAT_DO_NOT_EXIST)
def test_abbreviated_and_unknown_flags_are_refused(flag, capsys):
    assert pipeline.main([flag, "1"]) == 2
    said = capsys.readouterr().err
    assert flag in said and "Traceback" not in said


@pytest.mark.slow
def test_a_refusal_is_the_exit_code_of_the_process(tmp_path):
    flag, *_ = FLAGS_THAT_DO_NOT_EXIST
    done = run_script(MAIN, flag, "1", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert flag in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_plan_needs_neither_gpu_nor_weights(tmp_path):
    base = make_base(tmp_path / "base", weights=False)
    done = start_plain(["--plan", "--base_model", str(base)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert " M parameters; 8 pages per step" in done.stdout and " and 4,096 of HTML; " in done.stdout
    table = done.stdout.split("  sum\n")[1].splitlines()
    rows = [line.split() for line in table if line.strip()[:1].isdigit()]
    assert [(row[0], row[1]) for row in rows] == [
        (processes, size) for processes in ("1", "2", "4", "8", "16", "32", "64") for size in ("24", "40", "80", "140")
    ]
    assert all(row[2] == "8" and row[3] == "0%" for row in rows), "the tiny model fits everywhere at once"


@pytest.mark.slow
def test_supervision_is_shown_without_loading_a_model_and_beside_a_run(tiny_base, pages_folder, tmp_path):
    owned = tmp_path / "owned"
    owned.mkdir()
    flags = ["--output_dir", str(owned), "--final_dir", str(tmp_path / "final"), "--seed", "3"]
    with (owned / ".owner").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        done = start_plain([*small_run(tiny_base, pages_folder, show_supervision=True), *flags], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\n[supervised] <!DOCTYPE html>" in done.stdout and "rehearsal" not in done.stdout
    assert "\033" not in done.stdout, "colours in a pipe"
    assert [*tmp_path.rglob("*")] == [owned, owned / ".owner"], "who only looks leaves nothing"


@pytest.mark.slow
def test_a_folder_that_another_run_owns_is_refused_before_the_hub_is_asked(pages_folder, tmp_path):
    with (tmp_path / ".owner").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        done = start_plain(small_run("user/gone", pages_folder, output_dir=tmp_path), tmp_path)
    assert done.returncode == 2 and "a run is going on there" in done.stderr and "user/gone" not in output(done)


@pytest.mark.slow
def test_zero_3_without_a_launcher_takes_a_port_that_is_free(tiny_base, pages_folder, tmp_path):
    flags = [*zero_3(tmp_path, None), *small_run(tiny_base, pages_folder, show_supervision=True)]
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # another program has it already, which is as good
            held.enter_context(socket.create_server(("", 29500)))
        done = start_plain(flags, tmp_path, env=ON_CPU)
    assert done.returncode == 0, output(done)


@pytest.mark.slow
def test_unreadable_pages_end_with_80_before_the_model_loads(tiny_base, tmp_path):
    pages = make_pages(tmp_path / "pages", 20)
    for number in range(5):
        (pages / f"{number:03d}.png").write_bytes(b"not a picture")
    start = time.monotonic()
    done = start_plain(small_run(tiny_base, pages), tmp_path)
    assert done.returncode == 80, output(done)
    assert "Traceback" not in done.stderr and "parameters" not in done.stdout
    assert time.monotonic() - start < 120


@pytest.mark.slow
def test_a_damaged_base_shows_before_training(tmp_path, pages_folder):
    base = make_base(tmp_path / "base", damage=float("nan"))
    done = start_plain(small_run(base, pages_folder), tmp_path)
    assert done.returncode == 82, output(done)
    assert "before training" in done.stderr and "step 1/" not in done.stdout


# -----------------------------------------------------------------------------
# What is learned

# With plain SGD and a learning rate of 1, what one step changes is the gradient.
SGD = {
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "max_steps": 1,
}


def change(base, final) -> dict:
    before, after = weights(base), weights(final)
    assert before.keys() == after.keys()
    return {name: before[name] - after[name] for name in before}


def norm(change: dict) -> float:
    return torch.stack([tensor.norm() for tensor in change.values()]).norm().item()


@pytest.mark.slow
def test_gradients_do_not_depend_on_how_a_step_is_divided(exact_base, pages_folder, tmp_path):
    """8 pages per step as 1 x 8, 2 x 4, 8 x 1 on one rank, 1 x 4 on two, with DDP and under ZeRO-3."""
    ways = {
        "1x8": (start_plain, 1, 8, {}),
        "the model's own way, 2x4": (lambda flags, cwd: start_plain([*flags, "--fast", "False"], cwd), 2, 4, {}),
        "2x4": (start_plain, 2, 4, {}),
        "8x1": (start_plain, 8, 1, {}),
        "1x4 on 2": (start_torchrun, 1, 4, {}),
        "1x4 on 2, ZeRO-3": (
            start_zero_3,
            1,
            4,
            {"processes": 2, "config": PLAIN_JSON | {"zero_allow_untested_optimizer": True}},
        ),
    }
    gradients = {}
    for name, (start, micro, accumulated, options) in ways.items():
        cwd = tmp_path / str(len(gradients))
        cwd.mkdir()
        batch = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulated}
        done = start(small_run(exact_base, pages_folder, **SGD, **batch), cwd, **options)
        assert done.returncode == 0, output(done)
        gradients[name] = change(exact_base, cwd / "holo1_dom_finetune_final")
    reference = gradients.pop("1x8")
    assert norm(reference) > 0.1, "nothing was learned"
    worst = {
        name: max((gradient[key] - reference[key]).abs().max().item() for key in reference)
        for name, gradient in gradients.items()
    }
    assert all(difference <= 1e-5 for difference in worst.values()), worst


@pytest.mark.slow
def test_plainest_json_clips_as_asked_and_ends_loadable(exact_base, pages_folder, tmp_path):
    config = PLAIN_JSON | {"zero_allow_untested_optimizer": True}
    flags = small_run(exact_base, pages_folder, **(SGD | {"max_grad_norm": 0.01}))
    done = start_zero_3(flags, tmp_path, config=config)
    assert done.returncode == 0, output(done)
    assert norm(change(exact_base, tmp_path / "holo1_dom_finetune_final")) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "ranks", "config"), [(make_qwen3_vl_base, 1, None), (make_qwen3_5_base, 2, GATHERED)])
def test_the_fast_path_learns_what_the_plain_one_learns(make, ranks, config, pages_folder, tmp_path):
    """Three epochs of AdamW under ZeRO-3 with layers as leaves, of which the first offloads its activations, and the
    plain way: the same losses and weights. Two ranks gather all weights once per step, as several GPUs do. Of
    Qwen2.5-VL the gradients are compared above."""
    base = make(tmp_path / "base", torch.float32)
    rate = {"learning_rate": 1e-3, "max_steps": 6, "num_train_epochs": 3, "gradient_accumulation_steps": 4 // ranks}
    losses, finals = {}, {}
    for name, way in {"fast": {"offload_share": 0.5}, "plain": {"fast": False}}.items():
        cwd = tmp_path / name
        cwd.mkdir()
        done = start_zero_3(small_run(base, pages_folder, **rate, **way), cwd, ranks, config)
        assert done.returncode == 0, output(done)
        assert ("fast path:" in done.stdout) == ("layers wait in the CPU's memory" in done.stdout) == (name == "fast")
        steps = [line for line in done.stdout.splitlines() if line.startswith("step ")]
        losses[name] = [float(line.split("loss ")[1].split()[0]) for line in steps]
        finals[name] = weights(cwd / "holo1_dom_finetune_final")
    assert losses["fast"] == pytest.approx(losses["plain"], abs=2e-4)
    assert losses["fast"][-1] < losses["fast"][0] - 0.05, "nothing was learned"
    worst = max((finals["fast"][key] - value).abs().max().item() for key, value in finals["plain"].items())
    assert worst < 1e-4, worst


@pytest.mark.slow
def test_every_step_is_logged_and_drawn(tiny_base, pages_folder, tmp_path):
    from PIL import Image

    flags = small_run(tiny_base, pages_folder, max_steps=3, eval_every=2, eval_pages=4, report_to="tensorboard")
    done = start_plain(flags, tmp_path, renders=True)
    assert done.returncode == 0, output(done)
    steps = [line for line in done.stdout.splitlines() if line.startswith("step ") and "loss" in line]
    assert len(steps) == 3
    for word in ("loss ", "lr ", " pages/s", "wait ", " GiB", " left"):
        assert word in steps[0]
    out = tmp_path / "holo1_dom_finetune_output"
    assert Image.open(out / "loss.png").size == (960, 540)
    assert list((out / "runs").rglob("events.out.tfevents.*"))
    results = json.loads((out / "evaluation" / "results.json").read_text())
    assert results["step 2"]["n"] == results["after"]["n"] == results["step 2"]["choosing"]["n"] == 2
    assert [page.get("chooses", False) for page in results["after"]["pages"]] == [True, False, True, False]
    assert {path.name for path in (out / "evaluation" / "page-0001").iterdir()} >= {
        "screenshot.png",
        "reference.html",
        "written.html",
    }


# -----------------------------------------------------------------------------
# What does not fit, and several machines


@pytest.mark.first
@pytest.mark.slow
@pytest.mark.parametrize(("start", "failing"), [(start_torchrun, "1"), (start_deepspeed, "01")])
def test_a_batch_that_does_not_fit_restarts_with_half_as_many_pages(start, failing, exact_base, pages_folder, tmp_path):
    """Memory runs out in the proof on one of two ranks, or on both (simulated: no GPU here); both begin again."""
    script = str(PROGRAMS / "memory_runs_out.py")
    pages = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    flags = small_run(exact_base, pages_folder, compare_base=True, **pages)
    environment = {"FAILING_RANKS": failing}
    options = {"cold": True} if start is start_torchrun else {}  # its store keeps what the first attempt left in it
    done = start(flags, tmp_path, script=script, processes=2, timeout=300, env=environment, **options)
    assert done.returncode == 0, output(done)
    assert "restarting with --micro_batch 2" in done.stdout
    assert "4 pages x 1 accumulated x 2 processes = 8 pages per step" in done.stdout
    assert "2 pages x 2 accumulated x 2 processes = 8 pages per step" in done.stdout
    assert "the longest possible batch of 2 pages fits" in done.stdout
    assert not list(tmp_path.glob("*/earlier-*")), "what it wrote before it restarted is its own"
    typed = json.loads((tmp_path / "holo1_dom_finetune_output" / "run.json").read_text())["typed"]
    added = {"micro_batch", "checkpoint_share", "offload_share"}
    assert "num_samples" in typed and not added & {*typed}, "what the restart added would stay with --resume"


@pytest.mark.first
@pytest.mark.slow
def test_two_machines_with_disks_of_their_own_train_together(tiny_base, pages_folder, tmp_path):
    """Two wrappers on the loopback address, each in a folder of its own; the second reads the same pages for itself."""
    flags = small_run(tiny_base, pages_folder, max_steps=2, gradient_accumulation_steps=2)
    wrapper, port, machines = str(ROOT / "run_deepspeed_training.py"), str(free_port()), []
    for number in ("0", "1"):
        (tmp_path / number).mkdir()
        where = ["--num_nodes", "2", "--node_rank", number, "--no_ssh", "--master_addr", "127.0.0.1"]
        command = [sys.executable, wrapper, *where, "--master_port", port, *flags]
        log = (tmp_path / f"{number}.log").open("w")
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        machines.append(subprocess.Popen(command, cwd=tmp_path / number, env=environment, stdout=log, stderr=log))
    codes = [machine.wait(timeout=240) for machine in machines]
    logs = [(tmp_path / f"{number}.log").read_text() for number in "01"]
    assert codes == [0, 0], logs
    assert "1 page x 2 accumulated x 2 processes = 4 pages per step" in logs[0]
    assert "sees nothing of what rank 0 has prepared" in logs[1] and "sees nothing" not in logs[0]
    pages = [tmp_path / number / "holo1_dom_finetune_output" / "pages" / "train.arrow" for number in "01"]
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert layout(tmp_path / "0" / "holo1_dom_finetune_final") == layout(tiny_base)
    (tmp_path / "one").mkdir()
    config = json.loads((ROOT / "ds_z3.json").read_text())
    together = start_zero_3(flags, tmp_path / "one", processes=2, config=config)
    assert together.returncode == 0, output(together)
    assert losses_of(together.stdout) == losses_of(logs[0]) and len(losses_of(logs[0])) == 2, "as one machine with two"


def losses_of(log: str) -> list[str]:
    return [line.split("loss ")[1].split()[0] for line in log.splitlines() if line.startswith("step ")]


def layout(folder) -> dict:
    return {key: (tuple(value.shape), value.dtype) for key, value in weights(folder).items()}


# -----------------------------------------------------------------------------
# Stopping and resuming


@pytest.mark.slow
@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGUSR1, "SAVE_AND_STOP"])
def test_a_request_saves_the_step_and_resume_goes_on_from_it(asked, tiny_base, pages_folder, tmp_path):
    """By SLURM's warning and by a file, too; the other signals go the same way (tests/training/test_stopping.py)."""
    flags = small_run(tiny_base, pages_folder, max_steps=400, gradient_accumulation_steps=1)
    with in_background(flags, tmp_path, cold=asked == signal.SIGTERM) as process:
        process.wait_for_line("step 3/", 120)
        if isinstance(asked, str):
            (tmp_path / "holo1_dom_finetune_output" / asked).touch()
        else:
            process.send_signal(asked)
        assert process.wait(timeout=60) == 85, process.said()
    checkpoint = checkpoints_in(tmp_path / "holo1_dom_finetune_output")[0]
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert step >= 3 and checkpoint.name == f"checkpoint-{step}"
    done = start_plain([*flags, "--max_steps", str(step + 2), "--resume"], tmp_path)
    assert done.returncode == 0, output(done)
    steps = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("step ")]
    assert steps == [f"{step + 1}/{step + 2}", f"{step + 2}/{step + 2}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    ["plain", "plain, LoRA", "ZeRO-3, gathered", "Qwen3.5, ZeRO-3, 2 ranks", "Qwen3-VL, ZeRO-3, gathered, 2 ranks"],
)
def test_a_resumed_run_ends_in_the_same_weights(way, base_of, pages_folder, tmp_path):
    """The base's vision MLP is 60 wide, trained as 64 and saved as 60."""
    base = base_of(way)
    start, options = (start_zero_3, {"processes": 1 + ("2 ranks" in way)}) if "ZeRO" in way else (start_plain, {})
    if "gathered" in way:
        options["config"] = GATHERED
    step = {"gradient_accumulation_steps": 2, "learning_rate": 1e-2, "max_steps": 4}
    flags = small_run(base, pages_folder, **step, **({"lora": True} if "LoRA" in way else {}))
    whole = start([*flags, "--save_strategy", "steps", "--save_steps", "2"], tmp_path, **options)
    assert whole.returncode == 0, output(whole)
    final = weights(tmp_path / "holo1_dom_finetune_final")
    shutil.rmtree(tmp_path / "holo1_dom_finetune_final")
    shutil.rmtree(tmp_path / "holo1_dom_finetune_output" / "checkpoint-4")
    done = start([*flags, "--resume"], tmp_path, **options)
    assert done.returncode == 0, output(done)
    assert "step 3/4" in done.stdout and "step 2/4" not in done.stdout
    again = weights(tmp_path / "holo1_dom_finetune_final")
    assert all(torch.equal(final[name], again[name]) for name in final)


@pytest.mark.slow
def test_an_earlier_run_is_neither_resumed_nor_deleted_silently(tiny_base, pages_folder, tmp_path):
    flags = small_run(tiny_base, pages_folder, max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=1)
    first = start_plain([*flags, "--eval_pages", "3"], tmp_path)
    assert first.returncode == 0, output(first)
    second = start_plain(flags, tmp_path)
    assert "step 1/2" in second.stdout
    assert "1 checkpoint and the evaluation of an earlier run; --resume would go on" in second.stdout
    folder = tmp_path / "holo1_dom_finetune_output"
    assert {path.name for path in folder.glob("earlier-*/*")} == {"checkpoint-2", "evaluation", "run.json"}
    assert len(list(folder.glob("earlier-*/evaluation/page-*"))) == 3
    assert len(list(folder.glob("evaluation/page-*"))) == 2, (
        "pages of the earlier run would be scored with the new ones"
    )


# -----------------------------------------------------------------------------
# Failures


@pytest.mark.slow
@pytest.mark.parametrize("start", [start_plain, start_torchrun, start_zero_3], ids=lambda start: start.__name__)
def test_a_loss_that_is_not_finite_stops_before_the_update(start, exact_base, pages_folder, tmp_path):
    flags = small_run(exact_base, pages_folder, learning_rate=1e30, warmup_steps=0, max_steps=5)
    options = {"processes": 2} if start is not start_plain else {}
    status = tmp_path / "status"
    status.mkdir()
    done = start(flags, tmp_path, env={"HOLO1_STATUS_DIR": str(status)}, **options)
    ranks = [(status / f"rank-{rank}").read_text() for rank in range(len(list(status.glob("rank-*"))))]
    assert ranks == ["82"] * options.get("processes", 1), output(done)
    assert "lower --learning_rate" in done.stderr
    assert 'holo1_dom_finetune.py", line' not in done.stderr, "torchrun has a traceback of its own; ours would be a bug"
    emergency = tmp_path / "holo1_dom_finetune_checkpoint"
    assert all(tensor.isfinite().all() for tensor in weights(emergency).values())
    assert weights(emergency).keys() == weights(exact_base).keys()


@pytest.mark.slow
@pytest.mark.parametrize(("start", "ranks"), [(start_plain, 1), (start_torchrun, 2), (start_zero_3, 2)])
def test_a_gradient_that_is_not_finite_on_one_rank_poisons_no_weight(start, ranks, exact_base, pages_folder, tmp_path):
    """The third backward pass gives NaN on the last rank; the emergency checkpoint equals the weights of step 2."""
    status = tmp_path / "status"
    status.mkdir()
    rate = {"learning_rate": 1e-3, "warmup_steps": 0, "lr_scheduler_type": "constant", "gradient_accumulation_steps": 1}
    flags = small_run(exact_base, pages_folder, **rate, max_steps=4)
    options = {"processes": ranks} if ranks > 1 else {}
    played = {"HOLO1_STATUS_DIR": str(status), "FAULT": f"nan@{ranks - 1}:3"}
    done = start(flags, tmp_path, script=str(PROGRAMS / "faults.py"), env=played, **options)
    codes = [(status / f"rank-{rank}").read_text() for rank in range(ranks)]
    assert codes == ["82"] * ranks, output(done)
    assert "gradients are not finite at step 3" in done.stderr
    emergency = weights(tmp_path / "holo1_dom_finetune_checkpoint")
    assert all(tensor.isfinite().all() for tensor in emergency.values())
    done = start([*flags, "--max_steps", "2"], tmp_path, **options)
    assert done.returncode == 0, output(done)
    clean = weights(tmp_path / "holo1_dom_finetune_final")
    worst = max((clean[key] - emergency[key]).abs().max().item() for key in clean)
    assert worst < 1e-6, worst


# -----------------------------------------------------------------------------
# Adapters


def test_adapters_begin_the_same_in_every_run_with_a_seed():
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration(make_config(make_processor().tokenizer))

    def first(seed: int) -> list:
        torch.randn(seed + 1)  # whatever happened before
        twin = pipeline.add_adapters(copy.deepcopy(model), PageSettings(lora=True), seed)
        return [weight for name, weight in twin.named_parameters() if "lora_A" in name]

    assert len(first(7)) == 14, "seven projections in each of two layers"
    assert all(torch.equal(one, other) for one, other in zip(first(7), first(7)))
    assert not any(torch.equal(one, other) for one, other in zip(first(7), first(8)))


def test_adapters_keep_no_copies_of_what_they_read_where_autocast_narrows_it(monkeypatch):
    """By peft's own cast they kept one for each product. What is computed is the same to the bit."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration(make_config(make_processor().tokenizer)).bfloat16()
    pipeline.fast_layers.install(model, fuse=False)
    model = pipeline.add_adapters(model, PageSettings(lora=True), seed=0)
    adapters = {name: part for name, part in model.named_parameters() if "layers.0.mlp" in name and "lora_" in name}
    assert len(adapters) == 6 and {part.dtype for part in adapters.values()} == {torch.float32}
    for part in adapters.values():
        torch.nn.init.normal_(part)
    mlp = model.get_base_model().model.language_model.layers[0].mlp
    hidden = torch.randn(5, mlp.gate_proj.in_features).bfloat16()

    def learned() -> tuple[torch.Tensor, list[torch.Tensor], int]:
        kept = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda part: kept.setdefault(part.untyped_storage()._cdata, part), lambda part: part
        )
        with torch.autocast("cpu", torch.bfloat16), hooks:
            done = mlp(hidden)
        found = torch.autograd.grad(done.float().square().sum(), [*adapters.values()])
        return done, found, sum(part.shape == hidden.shape for part in kept.values())

    done, found, copies = learned()
    with torch.no_grad():
        assert mlp(hidden).dtype == done.dtype, "without autocast peft's cast is still made"
    for module in mlp.modules():
        module.__dict__.pop("_cast_input_dtype", None)
    wanted, gradients, more = learned()
    assert torch.equal(done, wanted) and all(map(torch.equal, found, gradients))
    assert (copies, more) == (1, 2), "gate and up read the same"


@pytest.mark.slow
def test_adapters_learn_the_same_where_every_layer_is_kept(exact_base, pages_folder, tmp_path):
    """Nothing is recomputed, and three ranks under ZeRO-3 gather all weights once per step; the first layer, too,
    whose input comes from frozen weights, learns what it learns without DeepSpeed. One rank has none of the rehearsal's
    two pages to write."""
    step = {"max_steps": 2, "learning_rate": 1e-2, "warmup_steps": 0, "lora": True, "activation_checkpointing": False}
    learned = {}
    for name, start, pages, options in (
        ("plain", start_plain, 3, {}),
        ("ZeRO-3", start_zero_3, 1, {"processes": 3, "config": GATHERED}),
    ):
        place = tmp_path / name
        place.mkdir()
        done = start(small_run(exact_base, pages_folder, gradient_accumulation_steps=pages, **step), place, **options)
        assert done.returncode == 0, output(done)
        learned[name] = change(exact_base, place / "holo1_dom_finetune_final")
    first = [key for key in learned["plain"] if "layers.0." in key and key.endswith("proj.weight")]
    assert len(first) == 7 and all(learned["plain"][key].norm() > 0.01 for key in first)
    assert max((learned["plain"][key] - change).abs().max() for key, change in learned["ZeRO-3"].items()) <= 1e-5


# -----------------------------------------------------------------------------
# Evaluation

PLANNED = str(PROGRAMS / "planned_scores.py")


@pytest.mark.slow
def test_the_best_weights_by_score_become_the_final_folder(tiny_base, pages_folder, tmp_path):
    """What pages score is planned here; all else is real: training stops early and step 1 wins over the end."""
    step = {"learning_rate": 1e-2, "gradient_accumulation_steps": 1, "lr_scheduler_type": "constant", "warmup_steps": 0}
    flags = small_run(tiny_base, pages_folder, max_steps=5, eval_every=1, early_stopping_patience=1, **step)
    planned = {"PLANNED": json.dumps({"step 1": 0.5, "step 2": 0.4, "after": 0.1}), "UNRENDERED": "1"}
    done = start_zero_3(flags, tmp_path, processes=2, script=PLANNED, env=planned)
    assert done.returncode == 0, output(done)
    assert re.findall(r"^step (\d/5)", done.stdout, re.MULTILINE) == ["1/5", "2/5"]
    assert "step 1 scored 0.500, the end 0.100: the better is final" in done.stdout
    results = json.loads((tmp_path / "holo1_dom_finetune_output" / "evaluation" / "results.json").read_text())
    assert results["final"] == "step 1" and results["after"]["likeness"] == 0.5
    assert results["last"]["likeness"] == 0.1, "what the end had reached stays known"
    assert not (tmp_path / "holo1_dom_finetune_output" / "best").exists()
    final = weights(tmp_path / "holo1_dom_finetune_final")
    once = tmp_path / "once"
    once.mkdir()
    flags = small_run(tiny_base, pages_folder, max_steps=1, **step)
    assert start_zero_3(flags, once, processes=2).returncode == 0
    assert all(torch.equal(final[name], value) for name, value in weights(once / "holo1_dom_finetune_final").items())


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "where"), [(1, ""), (2, ""), (2, "in the copy")])
def test_out_of_memory_while_judging_leaves_an_emergency_checkpoint(
    processes, where, tiny_base, pages_folder, tmp_path
):
    """Only one rank's memory runs out; the others hear of it, and all save the weights of the same step."""
    flags = small_run(tiny_base, pages_folder, max_steps=3, eval_every=2, gradient_accumulation_steps=1)
    planned = {"PLANNED": "{}", "UNRENDERED": "1", "OUT_OF_MEMORY": "step 2", "IN_THE_COPY": where}
    done = start_torchrun(flags, tmp_path, processes=processes, script=PLANNED, env=planned)
    assert "emergency checkpoint: ./holo1_dom_finetune_checkpoint" in done.stdout, output(done)
    assert "Out of memory" in done.stderr and done.returncode != 0
    saved = weights(tmp_path / "holo1_dom_finetune_checkpoint")
    assert saved.keys() == weights(tiny_base).keys()
    assert any(not torch.equal(saved[name], value) for name, value in weights(tiny_base).items()), "untrained"


@pytest.mark.first
@pytest.mark.slow
def test_a_resumed_run_knows_the_best_weights_and_what_they_wrote(tiny_base, pages_folder, tmp_path):
    """Step 1 is the best; step 3 is judged once without a plan, which ends that run."""
    step = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    flags = small_run(tiny_base, pages_folder, eval_every=1, eval_pages=4, compare_base=True, **step)
    planned = {"before": 0.0, "step 1": 0.5, "step 2": 0.4}
    done = start_plain(flags, tmp_path, script=PLANNED, renders=True, env={"PLANNED": json.dumps(planned)})
    assert done.returncode == 1 and "KeyError: 'step 3'" in done.stderr, output(done)
    planned |= {"step 3": 0.3, "after": 0.1}
    evaluation = tmp_path / "holo1_dom_finetune_output" / "evaluation"
    for folder in evaluation.glob("rendered_step_1*"):  # then they are rendered again
        shutil.rmtree(folder)
    planned = {"PLANNED": json.dumps(planned)}
    done = start_plain([*flags, "--resume"], tmp_path, script=PLANNED, renders=True, env=planned)
    assert done.returncode == 0, output(done)
    assert "step 1 scored 0.500, the end 0.100: the better is final" in done.stdout
    results = json.loads((evaluation / "results.json").read_text())
    assert results["final"] == "step 1" and results["after"] == results["step 1"]
    assert "decoding" not in results["step 3"] and results["comparison"]["metrics"]["likeness"]["n"] == 2
    assert [row["repetition_penalty"] for row in results["comparison"]["decoding"]] == [1.0, 1.05]
    assert (evaluation / "report.html").is_file()
    for page, row in enumerate(results["after"]["pages"], start=1):
        written = (evaluation / f"page-{page:04d}" / "written.html").read_text()
        assert written == (evaluation / f"page-{page:04d}" / "written_step_1.html").read_text() and row["page"]
    assert not (tmp_path / "holo1_dom_finetune_output" / "best.json").exists()


@pytest.mark.slow
def test_without_a_browser_training_goes_on_and_says_what_is_missing(tiny_base, pages_folder, tmp_path):
    nowhere = {"PATH": str(tmp_path), "PLAYWRIGHT_BROWSERS_PATH": str(tmp_path)}
    done = start_plain(small_run(tiny_base, pages_folder, max_steps=1), tmp_path, env=nowhere)
    assert done.returncode == 0, output(done)
    assert "pages are not rendered" in done.stdout and "playwright install chromium" in done.stdout
    evaluation = tmp_path / "holo1_dom_finetune_output" / "evaluation"
    assert (evaluation / "results.json").is_file() and not (evaluation / "report.html").exists()


@pytest.mark.slow
def test_base_and_tuned_are_compared_by_rendering(tiny_base, pages_folder, tmp_path):
    need_browser()
    done = start_plain(
        small_run(tiny_base, pages_folder, max_steps=1, eval_pages=4, compare_base=True), tmp_path, renders=True
    )
    assert done.returncode == 0, output(done)
    evaluation = tmp_path / "holo1_dom_finetune_output" / "evaluation"
    results = json.loads((evaluation / "results.json").read_text())
    assert results["before"]["failures"] == results["after"]["failures"] == 0
    found = results["comparison"]["metrics"]["likeness"]
    assert found["n"] == 4 and found["low"] <= found["difference"] <= found["high"] and 0 < found["p"] <= 1
    assert [row["repetition_penalty"] for row in results["comparison"]["decoding"]] == [1.0, 1.05]
    assert "likeness of the rendered pages" in done.stdout
    report = (evaluation / "report.html").read_text(encoding="utf-8")
    assert report.rstrip().endswith("</html>") and not list(evaluation.glob("rendered_*"))
    final = tmp_path / "holo1_dom_finetune_final"
    card = card_of(final)
    assert (final / "evaluation" / "results.json").read_text() == json.dumps(results, indent=2) + "\n"
    assert f"| likeness | {results['before']['likeness']:.3f} | {results['after']['likeness']:.3f} | how much" in card
    assert f"Difference in likeness: {found['difference']:+.3f} (95 % bootstrap interval" in card
    assert (final / "use_model_from_hub.py").read_bytes() == (ROOT / "use_model_from_hub.py").read_bytes()
    assert not numbers_without_a_source(card, results) and "not measured" not in card and "unknown |" not in card


@pytest.mark.parametrize("compare_base", [False, True])
def test_the_copy_that_wrote_goes_while_the_last_pages_are_rendered_unless_it_writes_again(compare_base):
    there, copies = [], []

    def make_copy():
        made = torch.nn.Identity()
        copies.append(weakref.ref(made))
        return made

    judge = SimpleNamespace(
        settings=SimpleNamespace(compare_base=compare_base),
        results=SimpleNamespace(add=lambda *unused: None),
        best=SimpleNamespace(leads=lambda result: False),
        decoding=None,
        copy=make_copy,
        write=lambda *unused: [],
        judge=lambda *unused: there.append(copies[0]() is not None) or {},
    )
    assert pipeline.Evaluator.evaluate(judge, "step 1") == {}
    assert there == [compare_base] and copies[0]() is None


OLD, NEW = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
GROWING, OTHER = "expandable_segments:True", "max_split_size_mb:40"
FIRST = "TORCH_NCCL_HIGH_PRIORITY="


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "there", "first"),
    [([], {OLD: GROWING}, FIRST + "1"), ([f"{NEW}={OTHER}", FIRST + "0"], {NEW: OTHER}, FIRST + "0")],
    ids=["nothing typed", "newer name"],
)
def test_torchs_memory_grows_in_segments_from_the_moment_that_torch_is_loaded_unless_its_user_says_otherwise(
    typed, there, first, tmp_path
):
    """And what travels between GPUs goes first."""
    done = run_script(str(PROGRAMS / "allocator.py"), *typed, cwd=tmp_path)
    (used,) = there.values()
    assert done.stdout.strip().splitlines()[-1] == f"{there}; {used}; {first}", output(done)


@pytest.mark.slow
@pytest.mark.parametrize("older", [OTHER, ""])
def test_torch_does_not_read_the_newer_name_of_its_settings_beside_the_older_one(older, tmp_path):
    """Why the script looks for the newer one before it sets the older one, and what progress.judge_segments tells."""
    done = run_script(str(PROGRAMS / "allocator_settings.py"), cwd=tmp_path, env={OLD: older, NEW: GROWING})
    assert (done.returncode, done.stdout.strip()) == (0, older), output(done)
