"""What a run was, and what of it may change: by the settings' own resolution."""

import json

import pytest

from training.checkpoints import Checkpoints
from training.errors import SettingsError
from training.resuming import begin_record, find_checkpoint, keep_what_is_not_ours, leave_folders, take_folders
from training.run_record import BATCH, FIXED, RECORD_FILE, mark_beginning, take_mark_away, write_record
from training.settings import Machine, check_settings, resolve


def save(kept: Checkpoints, *steps: int) -> None:
    for step in steps:
        with kept.staged():
            (kept.staging / f"checkpoint-{step}").mkdir(parents=True)
            (kept.staging / f"checkpoint-{step}" / "optimizer.pt").write_text("x")
        kept.settle()


def begin(folder, monkeypatch, *flags: str, processes: int = 1):
    """A run that has begun in `folder` with these flags and has written nothing but its record and one checkpoint."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    resolved = resolve(["--output_dir", str(folder), *flags])
    write_record(folder, resolved.record)
    save(Checkpoints(folder, None, resolved.record), 2)
    return resolved


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """A folder of each test's own for --final_dir, which is "." and has one owner: two tests may run at once."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


def train(folder, *flags: str, steps: tuple[int, ...] = ()):
    """As far as the real thing goes without a model: what is moved, noted and saved; where it goes on."""
    resolved = go_on(folder, *flags)
    take_folders(resolved)
    checkpoint = find_checkpoint(resolved, None)
    keep_what_is_not_ours(resolved)
    save(begin_record(resolved, "base", {"fingerprint": "pages"}), *steps)
    leave_folders(0)
    return checkpoint


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def go_on(folder, *flags: str):
    resolved = resolve(["--output_dir", str(folder), *flags])
    check_settings(resolved)
    return resolved


def test_a_resumed_run_takes_the_settings_that_it_began_with(tmp_path, monkeypatch):
    typed = ["--learning_rate", "3e-4", "--seed", "7", "--num_samples", "9", "--demo", "--max_steps", "40"]
    before = begin(tmp_path, monkeypatch, *typed)
    after = go_on(tmp_path, "--resume")
    assert after.training["learning_rate"] == 3e-4 and after.training["seed"] == 7 and after.settings.num_samples == 9
    assert after.training["max_steps"] == 40 and after.settings.dataset == before.settings.dataset
    assert after.record == before.record and after.earlier == before.record


def test_what_can_be_honoured_is_and_is_remembered(tmp_path, monkeypatch):
    begin(tmp_path, monkeypatch, "--learning_rate", "3e-4", "--max_steps", "40")
    after = go_on(tmp_path, "--resume", "--max_steps", "80", "--learning_rate", "1e-4", "--save_steps", "5")
    assert after.training["max_steps"] == 80 and after.training["learning_rate"] == 1e-4
    write_record(tmp_path, after.record)
    assert go_on(tmp_path, "--resume").training["max_steps"] == 80


def test_the_other_name_of_a_setting_is_no_other_setting(tmp_path, monkeypatch):
    begin(tmp_path, monkeypatch, "--optim", "adamw_8bit", "--checkpoint_share", "0.5", "--demo")
    after = go_on(tmp_path, "--resume", "--optim", "adamw_bnb_8bit", "--gradient_checkpointing", "False")
    assert (after.settings.checkpoint_share, after.training["activation_checkpointing"]) == (0, False)
    assert go_on(tmp_path, "--resume", "--checkpoint_share", "0.25").settings.checkpoint_share == 0.25


CHANGED = {
    "base_model": "demo/tiny_holo1",
    "base_revision": "main",
    "random_weights": "True",
    "dataset": "demo/pages",
    "dataset_config": "v0.2",
    "dataset_split": "test",
    "dataset_revision": "abc",
    "image_column": "picture",
    "html_column": "code",
    "clean": "none",
    "num_samples": "5",
    "eval_pages": "3",
    "max_html_tokens": "99",
    "seed": "1",
    "data_seed": "1",
    "prompt": "Draw it.",
    "max_pixels": "50176",
    "lora": "True",
    "lora_rank": "4",
    "lora_alpha": "4",
    "freeze_vision": "True",
    "optim": "sgd",
}
NOT_ON_A_CPU = {"quantize", "fp16", "bf16"}  # resolved by the machine: typed, they change nothing here


def test_every_fixed_setting_is_tried_here():
    assert {*CHANGED} | NOT_ON_A_CPU == {*FIXED}


@pytest.mark.parametrize("name", CHANGED)
def test_what_cannot_be_honoured_is_refused_by_name(name, tmp_path, monkeypatch):
    begin(tmp_path, monkeypatch)
    with pytest.raises(SettingsError, match=f"--{name} .*the run in .* began with .*leave it out, or begin a new run"):
        go_on(tmp_path, "--resume", f"--{name}", CHANGED[name])
    with pytest.raises(SettingsError, match=f"--{name} "):
        go_on(tmp_path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-2"), f"--{name}", CHANGED[name])


def test_pages_per_step_stay_the_same_on_another_number_of_processes(tmp_path, monkeypatch):
    begin(tmp_path, monkeypatch, "--gradient_accumulation_steps", "6")
    monkeypatch.setenv("WORLD_SIZE", "3")
    after = go_on(tmp_path, "--resume")
    assert after.training["per_device_train_batch_size"] * after.training["gradient_accumulation_steps"] == 2
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SettingsError, match="6 pages per step cannot be dealt out to 4 processes"):
        go_on(tmp_path, "--resume")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert go_on(tmp_path, "--resume", "--micro_batch", "3").training["gradient_accumulation_steps"] == 2
    with pytest.raises(SettingsError, match=r"8 pages per step: the run in .* began with 6"):
        go_on(tmp_path, "--resume", "--gradient_accumulation_steps", "8")


def batch_of(resolved) -> tuple[int, int]:
    return tuple(resolved.training[name] for name in BATCH)


@pytest.mark.parametrize("way", ["defaults", "typed", "json"])
def test_pages_per_step_stay_the_same_however_often_the_number_of_processes_changes(way, tmp_path, monkeypatch):
    """Each start notes what the run is now, as begin_record does; the next one must not take that for the beginning."""
    json_file = tmp_path / "ds.json"
    json_file.write_text(json.dumps({"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 8}))
    flags = {"defaults": [], "typed": ["--gradient_accumulation_steps", "8"], "json": ["--deepspeed", str(json_file)]}
    ds = flags["json"] if way == "json" else []
    run = tmp_path / "run"
    begin(run, monkeypatch, *flags[way], processes=2)
    for processes, more, expected in (
        (1, [], (1, 16)),
        (1, [], (1, 16)),
        (2, [], (1, 8)),
        (1, [], (1, 16)),
        (1, ["--micro_batch", "4"], (4, 4)),
        (8, [], (2, 1)),
        (1, ["--micro_batch", "1"], (1, 16)),
        (2, [], (1, 8)),
    ):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        after = go_on(run, "--resume", *more, *ds)
        assert batch_of(after) == expected, (processes, more)
        if ds:
            assert after.deepspeed["gradient_accumulation_steps"] == expected[1]
        assert after.record["began_on"] == 2, "by which the steps of an epoch are counted"
        write_record(run, after.record)


def test_an_edited_batch_is_refused_and_auto_goes_on_choosing(tmp_path, monkeypatch):
    json_file, run = tmp_path / "ds.json", tmp_path / "run"
    json_file.write_text(json.dumps({"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 8}))
    begin(run, monkeypatch, "--deepspeed", str(json_file), processes=2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    json_file.write_text(json.dumps({"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 4}))
    with pytest.raises(SettingsError, match=r"4 pages per step: the run in .* began with 16"):
        go_on(run, "--resume", "--deepspeed", str(json_file))
    monkeypatch.setattr("training.settings.local_world_size", lambda: 1)
    gpu = resolve(["--output_dir", str(run), "--resume", "--deepspeed", str(json_file)], Machine(True, True, "a GPU"))
    assert gpu.settings.micro_batch == "auto", "what the run itself has dealt out is nothing that anybody has typed"


def test_no_more_pages_go_through_at_once_than_were_asked_for(tmp_path, monkeypatch):
    """2 at once do not divide the 3 pages that each of two processes has; 3 at once were never tried."""
    begin(tmp_path, monkeypatch, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert batch_of(go_on(tmp_path, "--resume")) == (1, 3)


def test_deepspeed_and_plain_runs_do_not_go_on_with_each_other(tmp_path, monkeypatch):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    begin(tmp_path / "run", monkeypatch)
    with pytest.raises(SettingsError, match="trains without DeepSpeed and cannot go on under DeepSpeed's ZeRO stage 3"):
        go_on(tmp_path / "run", "--resume", "--deepspeed", str(tmp_path / "ds.json"))


def test_a_folder_without_a_run_is_not_gone_on_with(tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match=r"no run has begun in .*nowhere; leave --resume out"):
        go_on(tmp_path / "nowhere", "--resume")
    (tmp_path / "old" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(SettingsError, match=r"no run.json that says what their run was"):
        go_on(tmp_path / "old", "--resume")
    with pytest.raises(SettingsError, match=r"has no manifest.json: .*give a whole checkpoint, or --resume"):
        go_on(tmp_path, "--resume_from_checkpoint", str(tmp_path / "old" / "checkpoint-3"))
    begin(tmp_path / "run", monkeypatch)
    (tmp_path / "run" / RECORD_FILE).write_text('{"format": 1, "ty')
    with pytest.raises(SettingsError, match=r"run\.json is damaged"):
        go_on(tmp_path / "run", "--resume")


def test_a_run_that_was_killed_before_its_first_step_begins_again_as_itself(tmp_path, monkeypatch):
    """Where nothing else lies, and where the checkpoints of an earlier run do, with which it must not go on."""
    for folder in (tmp_path / "new", tmp_path / "used"):
        if folder.name == "used":
            begin(folder, monkeypatch, "--learning_rate", "1e-4", processes=2)
        monkeypatch.setenv("WORLD_SIZE", "2")
        flags = ["--learning_rate", "3e-4", "--seed", "7", "--gradient_accumulation_steps", "4"]
        mark_beginning(folder, go_on(folder, *flags).record)
        monkeypatch.setenv("WORLD_SIZE", "1")
        after = go_on(folder, "--resume", "--max_steps", "9")
        assert after.earlier is None and not after.settings.resume and after.record["pages_per_step"] == 8
        assert after.training["learning_rate"] == 3e-4 and after.training["seed"] == 7
        assert after.training["max_steps"] == 9
        assert any("ended before its first step, and begins again" in note for note in after.notes)
        mark_beginning(folder, after.record)
        assert go_on(folder, "--resume").training["max_steps"] == 9, "killed once more"
        take_mark_away()
    assert go_on(tmp_path / "used", "--resume").training["learning_rate"] == 1e-4, "withdrawn: the earlier one is meant"


def test_a_run_that_began_from_a_checkpoint_begins_again_from_there(tmp_path, monkeypatch):
    """Killed before it had begun, and before it had a checkpoint of its own."""
    begin(tmp_path / "first", monkeypatch, "--learning_rate", "1e-4")
    checkpoint, folder = str(tmp_path / "first" / "checkpoint-2"), tmp_path / "second"
    started = go_on(folder, "--resume_from_checkpoint", checkpoint, "--max_steps", "9")
    mark_beginning(folder, started.record)
    after = go_on(folder, "--resume")
    assert after.training["resume_from_checkpoint"] == checkpoint and after.training["max_steps"] == 9
    assert after.earlier["fixed"] == started.earlier["fixed"] and after.training["learning_rate"] == 1e-4
    with pytest.raises(SettingsError, match=r"--seed 7: the run in .* began with 42"):
        go_on(folder, "--resume", "--seed", "7")
    write_record(folder, after.record)
    take_mark_away()
    assert find_checkpoint(go_on(folder, "--resume"), None) == tmp_path / "first" / "checkpoint-2"


def test_another_runs_checkpoint_is_neither_gone_on_with_nor_deleted(tmp_path, monkeypatch, capsys):
    """Whole, newer, and of a run with another seed, or with the very same settings."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    for number, flags in enumerate((["--seed", "7"], [])):
        mine, other = tmp_path / f"mine-{number}", tmp_path / f"other-{number}"
        train(mine, steps=(2, 4))
        train(other, *flags, steps=(3, 9))
        for step in (3, 9):
            (other / f"checkpoint-{step}").rename(mine / f"checkpoint-{step}")
        assert train(mine, "--resume", steps=(6, 8)) == mine / "checkpoint-4"
        said, why = capsys.readouterr().out, (flags and "--seed 7") or "the same settings, begun apart"
        assert f"passed over: checkpoint-9 is of another run ({why})" in said
        assert names(mine) == ["checkpoint-6", "checkpoint-8"]
        (kept,) = mine.glob("earlier-*")
        assert names(kept) == ["checkpoint-3", "checkpoint-9"] and f"moved to {kept}: checkpoint-9, which is" in said
    with pytest.raises(SettingsError, match=r"none of the checkpoints in .* is whole and of this run"):
        for step in (6, 8):
            (mine / f"checkpoint-{step}").rename(other / f"checkpoint-{step}")
        train(other, "--resume")


def test_a_run_that_goes_back_leaves_the_branch_behind(tmp_path, monkeypatch, capsys):
    """To 100 of 100, 150 and 200: the later ones are none of its own any more, nor are the best weights of 150."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    train(tmp_path, "--save_total_limit", "9", steps=(100, 150, 200))
    (tmp_path / "best").mkdir()
    (tmp_path / "best.json").write_text('{"step": 150}')
    back = tmp_path / "checkpoint-100"
    assert train(tmp_path, "--resume_from_checkpoint", str(back), "--learning_rate", "1e-6", steps=(110,)) == back
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-110"] and not (tmp_path / "best").exists()
    assert names(min(tmp_path.glob("earlier-*"))) == ["checkpoint-150", "checkpoint-200"]
    assert "checkpoint-150, which comes after checkpoint-100" in capsys.readouterr().out
    assert train(tmp_path, "--resume") == tmp_path / "checkpoint-110"


def test_a_run_from_another_folders_checkpoint_leaves_that_of_the_earlier_run_there(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    out, other = tmp_path / "out", tmp_path / "other"
    train(out, steps=(100, 200))
    (out / "best").mkdir()
    train(other, steps=(50,))
    from_there = other / "checkpoint-50"
    assert train(out, "--resume_from_checkpoint", str(from_there)) == from_there and names(out) == []
    (kept,) = out.glob("earlier-*")
    assert names(kept) == ["checkpoint-100", "checkpoint-200"]
    assert (kept / "best").is_dir() and (kept / RECORD_FILE).is_file()
    assert train(out, "--resume", steps=(60,)) == from_there, "it has none of its own yet"
    assert train(out, "--resume") == out / "checkpoint-60"


def test_no_token_is_recorded(tmp_path, monkeypatch):
    resolved = resolve(["--output_dir", str(tmp_path), "--hub_token", "hf_aaaaaaaaaaaaaaaaaaaaaaaa"])
    assert "hf_aaaa" not in json.dumps(resolved.record)
