"""How a run goes on: the real main, killed or ended, and started again. Tiny models, one rank and two over gloo."""

import json
import os
import pickle
import resource
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    PROGRAMS,
    UNRENDERED,
    in_background,
    make_base,
    output,
    small_run,
    start_plain,
    start_torchrun,
    start_zero_3,
    weights,
)

from training import zero3
from training.checkpoints import MANIFEST, read_manifest, seal, write_manifest
from training.errors import DiskError, SettingsError
from training.resuming import converted, find_checkpoint
from training.settings import resolve

RECORDED = str(PROGRAMS / "trained_pages.py")
OUT = "holo1_dom_finetune_output"
FINAL = "holo1_dom_finetune_final"
THREE_EPOCHS = {"max_steps": 11, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 1}
THREE_EPOCHS |= {"learning_rate": 1e-2, "save_total_limit": 20, "eval_pages": 2}


def trained(cwd) -> list[dict]:
    """The pages of each step, rank by rank, as they were trained since `forget`."""
    found = {}
    for file in sorted(cwd.glob("trained-*.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            found.setdefault((line["step"], line["rank"]), []).extend(line["pages"])
    return [{"at": at, "pages": found[at]} for at in sorted(found)]


def forget(cwd) -> None:
    for file in cwd.glob("trained-*.jsonl"):
        file.unlink()


def keep_only(cwd, step: int) -> None:
    """As if the run had been killed after that step: nothing later is on the disk."""
    for folder in (cwd / OUT).glob("checkpoint-*"):
        if int(folder.name.split("-")[1]) > step:
            shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "ranks", "steps"),
    [(start_plain, 1, (9, 10)), (start_torchrun, 2, (6, 9)), (start_zero_3, 2, (6, 10))],
    ids=["plain", "DDP", "ZeRO-3"],
)
def test_a_run_that_goes_on_inside_a_later_epoch_trains_the_same_pages(
    start, ranks, steps, tiny_base, pages_folder, tmp_path
):
    """4 steps an epoch on two ranks, 8 on one: neither the epoch's beginning nor the first epoch can hide a fault."""
    options = {"processes": ranks} if ranks > 1 else {}
    flags = small_run(tiny_base, pages_folder, **THREE_EPOCHS)
    done = start(flags, tmp_path, script=RECORDED, **options)
    assert done.returncode == 0, output(done)
    whole, final = trained(tmp_path), weights(tmp_path / FINAL)
    assert len(whole) == 11 * ranks
    for step in steps:
        keep_only(tmp_path, step)
        forget(tmp_path)
        done = start(["--resume"], tmp_path, script=RECORDED, **options)
        assert done.returncode == 0, output(done)
        assert f"going on from {OUT}/checkpoint-{step}" in done.stdout and f"step {step + 1}/11" in done.stdout
        assert trained(tmp_path) == [at for at in whole if at["at"][0] > step]
        again = weights(tmp_path / FINAL)
        assert all(torch.equal(final[name], again[name]) for name in final)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ZeRO-3", "DDP"])
def test_a_run_goes_on_with_another_number_of_processes(way, exact_base, pages_folder, tmp_path):
    """Two processes, one, and two again: ZeRO's shards are dealt out anew, pages per step stay the same."""
    step = {"max_steps": 6, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    step |= {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0, "save_total_limit": 9}
    start = start_zero_3 if way == "ZeRO-3" else start_torchrun
    done = start(small_run(exact_base, pages_folder, **step), tmp_path, processes=2, script=RECORDED)
    assert done.returncode == 0, output(done)
    final, pages = weights(tmp_path / FINAL), pages_of_steps(tmp_path)
    keep_only(tmp_path, 2)
    for processes, accumulated, last in ((1, 4, 4), (2, 2, 6)):
        forget(tmp_path)
        more = ["--resume", "--max_steps", str(last)]
        done = start(more, tmp_path, processes=processes, script=RECORDED)
        assert done.returncode == 0, output(done)
        ranks = "1 process" if processes == 1 else f"{processes} processes"
        words = f"1 page x {accumulated} accumulated x {ranks} = 4 pages per step"
        assert words in done.stdout and f"going on from {OUT}/checkpoint-{last - 2}" in done.stdout
        assert (f"to {processes} processes in" in done.stdout) == (way == "ZeRO-3")
        assert pages_of_steps(tmp_path) == {step: pages[step] for step in (last - 1, last)}
    assert not (tmp_path / OUT / "checkpoint.converted").exists()
    again, before = weights(tmp_path / FINAL), weights(exact_base)
    learned, apart = (
        sum((other[name] - final[name]).square().sum() for name in final).sqrt() for other in (before, again)
    )
    assert learned > 0.1 and apart < 1e-4 * learned, "moments that are lost or another's learn something else"


def test_a_conversion_that_lacks_space_or_memory_is_told_from_one_that_cannot_be(tmp_path, monkeypatch):
    """DeepSpeed's own part is played: it writes a file, which may grow no further, or has no memory."""
    checkpoint, args = tmp_path / "checkpoint-2", SimpleNamespace(output_dir=str(tmp_path))
    free = shutil.disk_usage(tmp_path).free

    def write(error: Exception | None):
        def convert(checkpoint, place):
            place.mkdir()
            with (place / "half").open("wb", buffering=0) as file:
                while not error:
                    file.write(bytes(4096))
            raise error

        return convert

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number_of_bytes, fails_with, expected, words in (
        (free, None, DiskError, "has to be converted for 1 processes: the disk of .* or go on with 2 processes"),
        (10, None, DiskError, "no space to convert .* nothing half-written is left"),
        (10, MemoryError("played"), MemoryError, "played"),
        (10, KeyError("played"), SettingsError, "DeepSpeed cannot convert it for 1"),
    ):
        files = {"global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt": {"bytes": number_of_bytes}}
        monkeypatch.setattr(zero3, "convert", write(fails_with))
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        try:
            with pytest.raises(expected, match=words):
                converted(checkpoint, {"record": {"processes": 2}, "files": files}, args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not (tmp_path / zero3.CONVERTED).exists()


def test_what_a_killed_run_has_converted_goes(tmp_path):
    """The next one may have as many processes as the checkpoint, and needs it no more."""
    (tmp_path / zero3.CONVERTED / "checkpoint-2").mkdir(parents=True)
    assert find_checkpoint(resolve(["--output_dir", str(tmp_path)]), None) is None
    assert not (tmp_path / zero3.CONVERTED).exists()


def pages_of_steps(cwd) -> dict[int, list[str]]:
    """The pages of each step, whichever rank had them."""
    found = {}
    for micro_batch in trained(cwd):
        found.setdefault(micro_batch["at"][0], []).extend(micro_batch["pages"])
    return {step: sorted(names) for step, names in found.items()}


@pytest.mark.slow
def test_a_finished_run_trains_no_step_more_and_what_is_typed_anew_is_honoured(tiny_base, pages_folder, tmp_path):
    step = {"max_steps": 3, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 1}
    step |= {"lr_scheduler_type": "constant", "warmup_steps": 0, "learning_rate": 1e-3}
    done = start_plain(small_run(tiny_base, pages_folder, **step), tmp_path)
    assert done.returncode == 0, output(done)
    final = weights(tmp_path / FINAL)
    done = start_plain(["--resume"], tmp_path)
    assert done.returncode == 0 and "step " not in done.stdout, output(done)
    assert f"kept: what was in {FINAL} is now in {FINAL}-" in done.stdout
    again = weights(tmp_path / FINAL)
    assert all(torch.equal(final[name], again[name]) for name in final)
    assert len(list(tmp_path.glob(f"{FINAL}-2*"))) == 1, "the model of the first run"
    more = ["--max_steps", "6", "--learning_rate", "5e-4", "--save_steps", "3", "--weight_decay", "0.5"]
    done = start_plain(["--resume", *more], tmp_path)
    assert done.returncode == 0, output(done)
    rates = [float(line.split("lr ")[1].split()[0]) for line in done.stdout.splitlines() if line.startswith("step ")]
    assert rates == [5e-4] * 3, "not the checkpoint's"
    assert {path.name for path in (tmp_path / OUT).glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    saved = torch.load(tmp_path / OUT / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert [group["weight_decay"] for group in saved["param_groups"]] == [0.5, 0.0]


@pytest.mark.slow
def test_pages_and_base_must_be_what_they_were(tmp_path, pages_folder):
    base, pages = make_base(tmp_path / "base"), shutil.copytree(pages_folder, tmp_path / "pages")
    step = {"max_steps": 1, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 1}
    done = start_plain(small_run(base, pages, **step), tmp_path)
    assert done.returncode == 0, output(done)
    lines = (pages / "metadata.jsonl").read_text()
    (pages / "metadata.jsonl").write_text(lines.replace("<p>", "<p>other "))
    done = start_plain(["--resume", "--max_steps", "2"], tmp_path)
    assert done.returncode == 0 and "pages: as they were when this run began" in done.stdout, output(done)
    shutil.rmtree(tmp_path / OUT / "pages")
    done = start_plain(["--resume"], tmp_path)
    assert done.returncode == 2 and "gives other pages than the run" in done.stderr, output(done)
    (pages / "metadata.jsonl").write_text(lines)
    make_base(tmp_path / "base", damage=0.5)
    done = start_plain(["--resume", "--max_steps", "3"], tmp_path)
    assert done.returncode == 2 and "holds other weights than when the run" in done.stderr, output(done)
    assert "step " not in done.stdout


class Canary:
    """What a pickle of a stranger may do on being read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.slow
def test_no_pickle_of_a_stranger_is_ever_run(tiny_base, pages_folder, tmp_path):
    """In each kind of file, without a manifest that vouches for it, and with a forged one that does."""
    step = {"max_steps": 2, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 1}
    done = start_zero_3(small_run(tiny_base, pages_folder, **step), tmp_path)
    assert done.returncode == 0, output(done)
    newest, canary = tmp_path / OUT / "checkpoint-2", tmp_path / "canary"
    record, kept = read_manifest(newest)["record"], tmp_path / "kept"
    shutil.copytree(newest, kept)
    files = [path.relative_to(kept) for path in [*kept.glob("global_step2/*.pt"), *kept.glob("*.p*t*")]]
    assert {str(file) for file in files} >= {"scheduler.pt", "rng_state.pth"} and len(files) == 4
    for file in files:  # nobody vouches for them
        (newest / file).write_bytes(pickle.dumps(Canary(canary)))
    done = start_zero_3(["--resume"], tmp_path)
    assert not canary.exists() and done.returncode == 0, output(done)
    assert "passed over: checkpoint-2 global_step2/" in done.stdout and "step 2/2" in done.stdout
    for file in files:  # a forged manifest does
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)
        (newest / file).write_bytes(pickle.dumps(Canary(canary)))
        write_manifest(newest, record)
        done = start_zero_3(["--resume", "--max_steps", "3"], tmp_path)
        assert not canary.exists() and done.returncode != 0, output(done)


# transformers 5.23 corrects its end tokens in memory, and then refuses to write what else stands there.
INCONSISTENT = {"do_sample": False, "temperature": 1e-6, "eos_token_id": 0, "pad_token_id": 0}


@pytest.mark.slow
def test_a_checkpoint_of_a_base_that_transformers_would_not_write_and_no_token_in_anything(pages_folder, tmp_path):
    base = make_base(tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps(INCONSISTENT))
    step = {"max_steps": 1, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 1}
    cwd, tokens = tmp_path / "run", {name: f"hf_canaryOf{name.title().replace('_', '')}1234567" for name in TOKENS}
    cwd.mkdir()
    done = start_plain(small_run(base, pages_folder, **step, report_to="tensorboard"), cwd, env=tokens)
    assert done.returncode == 0, output(done)
    for folder in (cwd / OUT / "checkpoint-1", cwd / FINAL):
        assert json.loads((folder / "generation_config.json").read_text()) == INCONSISTENT, "the base's own"
    written = [path.read_bytes() for path in cwd.rglob("*") if path.is_file()]
    assert len(written) > 30
    for content in (*written, done.stdout.encode(), done.stderr.encode()):
        assert b"hf_canaryOf" not in content


TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "HOLO1_SECRET")


@pytest.mark.slow
def test_two_runs_never_share_a_folder(tiny_base, pages_folder, tmp_path):
    """The first one waits before its first step until the second has been refused."""
    flags = small_run(tiny_base, pages_folder, max_steps=2, save_strategy="steps", save_steps=1)
    waiting = [str(tmp_path / "go"), *flags]
    program, environment = str(PROGRAMS / "waits_for_a_file.py"), UNRENDERED | {"PYTHONUNBUFFERED": "1"}
    with in_background(waiting, tmp_path, script=program, env=environment) as first:
        first.wait_for_line("waiting", 120)
        refused = start_plain(flags, tmp_path)
        elsewhere = start_plain([*flags, "--output_dir", "elsewhere"], tmp_path)
        apart = start_plain([*flags, "--output_dir", "apart", "--final_dir", "apart"], tmp_path)
        (tmp_path / "go").touch()
        code, said = first.wait(120), first.said()
    for done, flag in ((refused, f"--output_dir {OUT}"), (elsewhere, "--final_dir .")):
        assert done.returncode == 2, output(done)
        assert f"{flag}: a run is going on there (process {first.pid} on " in done.stderr, output(done)
    assert apart.returncode == 0 and (tmp_path / "apart" / FINAL / "model.safetensors").is_file(), output(apart)
    assert code == 0 and "step 2/2" in said, said
    assert not list(tmp_path.rglob(".*owner")), "left behind"


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_the_older_checkpoint_and_nothing_half_written(tiny_base, pages_folder, tmp_path):
    """The second checkpoint, of two ranks' shards, meets files that may grow no further (the real errors of torch.save
    and safetensors). A disk that is too small from the start is refused before anything is loaded."""
    step = {"max_steps": 4, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 1}
    flags = small_run(tiny_base, pages_folder, **step)
    full = str(PROGRAMS / "disk_is_full.py")
    for name, start, options in (("plain", start_plain, {}), ("ZeRO-3", start_zero_3, {"processes": 2})):
        place, status = tmp_path / name, tmp_path / f"status-{name}"
        place.mkdir()
        status.mkdir()
        done = start(flags, place, script=full, env={"FULL_AT": "2", "HOLO1_STATUS_DIR": str(status)}, **options)
        assert "81" in [file.read_text() for file in status.glob("rank-*")], output(done)
        assert "nothing half-written is left; checkpoint-1 is untouched" in done.stderr, output(done)
        assert [path.name for path in (place / OUT).glob("checkpoint*")] == ["checkpoint-1"]
        done = start(["--resume"], place, **options)
        assert done.returncode == 0 and "step 2/4" in done.stdout, output(done)


def test_a_manifest_seals_itself(tmp_path):
    (tmp_path / "file").write_text("x")
    write_manifest(tmp_path, {"seed": 42})
    content = json.loads((tmp_path / MANIFEST).read_text())
    kept = content.pop("seal")
    assert kept == seal(content) and kept != seal({**content, "record": {"seed": 43}})
