"""Settings: what meets where, and what is refused before anything loads.

Sections: What meets where, What is refused, Without torch, The real script.
"""

import json
import sys
from pathlib import Path

import pytest
from conftest import MAIN, PLAIN_JSON, ROOT, run_script
from small_pages import good_pages, write_folder

from training.errors import SettingsError
from training.run_record import write_record
from training.settings import (
    DEMO,
    LORA_LEARNING_RATE,
    Machine,
    PageSettings,
    check_settings,
    find_problems,
    parse,
    resolve,
)

# -----------------------------------------------------------------------------
# What meets where


def write_json(folder, config, name="ds.json") -> str:
    path = folder / name
    path.write_text(json.dumps(config))
    return str(path)


def test_design_flags_and_their_defaults_are_as_written():
    settings = resolve([]).settings
    assert (settings.hub_repo, settings.push_to_hub, settings.private_repo, settings.num_samples) == (
        "holo1_ui2dom",
        False,
        False,
        1000,
    )
    assert (settings.base_model, settings.dataset) == ("Hcompany/Holo1-3B", ["HuggingFaceM4/WebSight"])
    names = (
        "base_model dataset dataset_config image_column html_column max_pixels max_html_tokens quantize lora "
        "freeze_vision random_weights micro_batch plan eval_pages eval_every compare_base max_bad_share resume "
        "show_supervision demo"
    )
    assert not [name for name in names.split() if not hasattr(settings, name)]


def test_every_setting_has_a_sentence_of_help():
    fields = PageSettings.__dataclass_fields__.values()
    assert not [field.name for field in fields if not field.metadata["help"].endswith(".")]


def test_training_arguments_are_reachable_and_typed_values_win(tmp_path):
    resolved = resolve(["--learning_rate", "3e-6", "--max_steps", "7", "--max_grad_norm", "0.5"])
    assert (resolved.training["learning_rate"], resolved.training["max_steps"]) == (3e-6, 7)
    config = PLAIN_JSON | {"gradient_clipping": 0.25, "optimizer": {"type": "AdamW", "params": {"lr": 2e-4}}}
    path = write_json(tmp_path, config)
    resolved = resolve(["--deepspeed", path, "--gradient_accumulation_steps", "2"])
    assert resolved.training["max_grad_norm"] == 0.25, "JSON beats default"
    assert resolved.training["learning_rate"] == 2e-4, "JSON beats default"
    assert resolved.training["gradient_accumulation_steps"] == 2, "typed beats JSON"
    assert resolved.deepspeed["gradient_accumulation_steps"] == 2, "and the JSON is told"


def test_editing_accumulation_in_the_json_alone_works(tmp_path):
    path = write_json(tmp_path, PLAIN_JSON | {"gradient_accumulation_steps": 3})
    assert resolve(["--deepspeed", path]).training["gradient_accumulation_steps"] == 3


def test_the_plainest_json_gets_what_it_lacks(tmp_path):
    resolved = resolve(["--deepspeed", write_json(tmp_path, PLAIN_JSON), "--max_grad_norm", "0.01"])
    assert resolved.deepspeed["gradient_clipping"] == 0.01
    assert resolved.deepspeed["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


def test_no_micro_batch_makes_the_cpu_wait_for_the_gpu(tmp_path):
    resolved = resolve(["--deepspeed", write_json(tmp_path, PLAIN_JSON)], Machine(True, True, "an H100"))
    assert resolved.deepspeed["timers"] == {"throughput": {"enabled": False}}
    assert resolved.training["accelerator_config"] == {"non_blocking": True}
    asked = {"throughput": {"enabled": True, "synchronized": False}}
    assert resolve(["--deepspeed", write_json(tmp_path, PLAIN_JSON | {"timers": asked})]).deepspeed["timers"] == asked
    for flags in (["--dataloader_pin_memory", "False"], ["--use_cpu"]):  # what is not pinned cannot travel beside
        assert not resolve(flags, Machine(True, True, "an H100")).training["accelerator_config"]


def test_what_deepspeed_would_not_understand_or_not_do_is_told(tmp_path):
    zero = {"stage": 3, "offload_optimizer": "cpu"}
    path = write_json(tmp_path, {"zero_optimization": zero, "activation_checkpointing": {"cpu_checkpointing": True}})
    resolved = resolve(["--deepspeed", path, "--optim", "adamw_8bit"])
    (problem,) = resolved.problems
    assert "zero_optimization.offload_optimizer is 'cpu'; it must be an object" in problem
    assert any("give --checkpoint_share or --offload_share" in note for note in resolved.notes)


def test_shipped_jsons_keep_the_plain_values():
    for name, device in (("ds_z3.json", "none"), ("ds_z3_offload.json", "cpu")):
        config = json.loads((ROOT / name).read_text())
        zero = config["zero_optimization"]
        assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (1, 8)
        assert config["bf16"] == {"enabled": True}
        assert (zero["stage"], zero["overlap_comm"], zero["contiguous_gradients"]) == (3, True, True)
        assert (zero["offload_param"]["device"], zero["offload_optimizer"]["device"]) == (device, device)


def test_micro_batch_keeps_the_pages_per_step():
    training = resolve(["--micro_batch", "4"]).training
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"]) == (4, 2)
    assert "must divide the 8 pages" in resolve(["--micro_batch", "3"]).problems[0]


def test_precision_falls_back_on_a_cpu_and_says_so():
    resolved = resolve(["--use_cpu"])
    assert (resolved.training["bf16"], resolved.training["fp16"]) == (False, False)
    assert any(note.startswith("precision: fp32") for note in resolved.notes)


def test_deepspeed_switches_quantisation_off_and_says_why(tmp_path):
    resolved = resolve(["--deepspeed", write_json(tmp_path, PLAIN_JSON), "--quantize", "4bit"])
    assert resolved.settings.quantize == "none"
    assert "quantisation: none (DeepSpeed shards full-precision weights)" in resolved.notes


def test_adapters_learn_faster_unless_typed():
    assert resolve(["--lora"]).training["learning_rate"] == LORA_LEARNING_RATE
    assert resolve(["--lora", "--learning_rate", "1e-6"]).training["learning_rate"] == 1e-6


def test_demo_stands_for_flags_that_typing_overrides():
    resolved = resolve(["--demo", "--num_train_epochs", "1", "--deepspeed", str(ROOT / "ds_z3.json")])
    assert resolved.training["num_train_epochs"] == 1
    assert resolved.training["per_device_train_batch_size"] == DEMO["per_device_train_batch_size"]
    assert resolved.settings.compare_base
    resolved = resolve(["--demo", "--checkpoint_share", "0.5"])
    assert resolved.problems == [] and resolved.training["activation_checkpointing"] is True


# -----------------------------------------------------------------------------
# What is refused

BAD_SETTINGS = [
    (["--num_samples", "0"], "--num_samples 0: at least 1"),
    (["--eval_pages", "-1"], "--eval_pages -1: at least 1"),
    (["--max_pixels", "100"], "--max_pixels 100: at least 3136"),
    (["--max_html_tokens", "0"], "--max_html_tokens 0: at least 1"),
    (["--max_bad_share", "2"], "--max_bad_share 2.0: a share between 0 and 1"),
    (["--prompt", " "], "--prompt is empty"),
    (["--base_model", "./nowhere"], "--base_model ./nowhere: no config.json there"),
    (["--dataset", "./nowhere"], "--dataset ./nowhere: no such folder"),
    (["--random_weights", "--quantize", "4bit"], "quantised weights cannot train"),
    (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0: at least 1"),
    (["--resume"], "--resume: no run has begun in"),
    (["--deepspeed", "./nowhere.json"], "--deepspeed ./nowhere.json: No such file"),
    (["--micro_batch", "5"], "--micro_batch 5 must divide the 8 pages"),
    (["--micro_batch", "0"], "--micro_batch 0 must divide the 8 pages"),
    (["--offload_share", "1.5"], "--offload_share 1.5: a share between 0 and 1"),
    (["--offload_share", "0.5", "--fast", "False"], "--offload_share 0.5: the plain path (--fast False)"),
    (["--offload_share", "0.5", "--checkpoint_share", "0.75"], "or give --checkpoint_share 0.5 instead"),
    (
        ["--offload_share", "0.5", "--gradient_checkpointing"],
        "--gradient_checkpointing True and --offload_share 0.5 are",
    ),
    (
        ["--checkpoint_share", "0.5", "--activation_checkpointing", "False"],
        "False and --checkpoint_share 0.5: give one",
    ),
    (["--gradient_checkpointing", "--activation_checkpointing", "False"], "are one setting: give one"),
    (["--eval_strategy", "steps"], "held-out pages are written and scored with --eval_every"),
    (["--hub_token", "hf_secret"], "put it into HF_TOKEN"),
    (["--clean", "comments,everything"], "everything"),
    (["--lora_alpha", "0"], "--lora_alpha 0: at least 1"),
    (["--resume_from_checkpoint", "gone"], "--resume_from_checkpoint gone "),
    (["--output_dir", "file/below"], "--output_dir file/below: "),
    (["--output_dir", "/proc/below"], "--output_dir /proc/below: nothing can be written into /proc ("),
]


@pytest.mark.parametrize(("argv", "message"), BAD_SETTINGS, ids=lambda value: " ".join(value)[:40])
def test_impossible_settings_are_named_with_a_remedy(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(SettingsError) as error:
        check_settings(resolve(argv))
    assert message in str(error.value)


def test_all_problems_are_named_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--num_samples", "0", "--max_pixels", "1", "--base_model", "./nowhere", "--resume"]
    with pytest.raises(SettingsError) as error:
        check_settings(resolve(argv))
    assert str(error.value).count("\n  - ") == 4


@pytest.mark.parametrize("name", ["checkpoint-2", "checkpoint-best/inner", "best"])
def test_a_base_that_the_run_would_move_aside_is_refused(name, tmp_path):
    """What lies there of an earlier run is moved before the base is loaded, which then was no longer there."""
    (base := tmp_path / "out" / name).mkdir(parents=True)
    (base / "config.json").write_text("{}")
    argv = ["--base_model", str(base), "--final_dir", str(tmp_path), "--output_dir"]
    with pytest.raises(SettingsError, match=r"is moved aside when another run begins in --output_dir .*/out;"):
        check_settings(resolve([*argv, str(tmp_path / "out")]))
    check_settings(resolve([*argv, str(tmp_path / "other")]))


def test_the_older_name_of_checkpointing_is_heard():
    assert resolve(["--gradient_checkpointing", "False"]).training["activation_checkpointing"] is False


@pytest.mark.parametrize("text", ['{"bf16": true}', "{", "[1]", '{"zero_optimization": {"stage": 7}}'])
def test_broken_deepspeed_json_is_refused(text, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(SettingsError, match="--deepspeed"):
        check_settings(resolve(["--deepspeed", str(path)]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_accumulation_steps": "4"}, 'gradient_accumulation_steps is "4"; give a number or "auto"'),
        ({"gradient_clipping": True}, 'gradient_clipping is true; give a number or "auto"'),
        ({"bf16": {"enabled": 1}}, 'bf16.enabled is 1; give true, false or "auto"'),
        ({"train_batch_size": 64}, "train_batch_size is 64, but pages x accumulated x processes are 8"),
    ],
)
def test_json_values_that_cannot_be_meant_are_named(change, message, tmp_path):
    path = write_json(tmp_path, PLAIN_JSON | change)
    with pytest.raises(SettingsError) as error:
        check_settings(resolve(["--deepspeed", path]))
    assert message in str(error.value)


def test_a_fitting_batch_size_in_the_json_is_fine_and_typed_pages_win_over_it(tmp_path):
    path = write_json(tmp_path, PLAIN_JSON | {"train_batch_size": 8})
    assert not resolve(["--deepspeed", path]).problems
    assert not resolve(["--deepspeed", path, "--gradient_accumulation_steps", "2"]).problems


@pytest.mark.parametrize(
    ("argv", "machine", "message"),
    [
        ([], Machine(gpu=False), "--fp8 needs a GPU of compute capability 8.9 or more, and there is none"),
        ([], Machine(True, True, "an A100", False), "capability 8.9 or more, which an A100 is not; leave it out"),
        (["--fp16"], Machine(True, True, "an H100", True), "--fp8 needs bf16, for all that it leaves as it is"),
        (["--fast", "False"], Machine(), "--fp8 with --fast False"),
        (["--lora"], Machine(), "--fp8 with --lora"),
    ],
)
def test_fp8_is_refused_by_name_where_it_cannot_be(argv, machine, message, tmp_path, monkeypatch):
    json_file = ["--deepspeed", write_json(tmp_path, PLAIN_JSON)]
    assert any(message in problem for problem in find_problems(resolve(["--fp8", *json_file, *argv], machine)))
    hopper = Machine(True, True, "an H100", True)
    assert not find_problems(resolve(["--fp8", *json_file], hopper))
    assert not find_problems(resolve(["--fp8", "--plan", *json_file], Machine(gpu=False)))
    (problem,) = find_problems(resolve(["--fp8"], hopper))
    assert "--fp8 without DeepSpeed" in problem, "whatever --quantize auto makes of it"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (problem,) = find_problems(resolve(["--fp8", *json_file], Machine()))
    assert "and there is none; leave it out" in problem, "the wrapper has looked"


def test_python_version_is_one_that_is_tested():
    assert sys.version_info >= (3, 10)


@pytest.mark.parametrize(
    ("dataset", "note"),
    [
        ("xcodemind/webcode2m", ["xcodemind/webcode2m: half of its pages are longer than 3,844 tokens"]),
        (
            "HuggingFaceM4/websight",
            ["HuggingFaceM4/websight: v0.2 needs the network to look like its screenshots, v0.1"],
        ),
        ("some/thing", []),
    ],
)
def test_what_is_known_of_a_dataset_is_said_when_it_is_taken(dataset, note):
    resolved = resolve(["--dataset", dataset])
    check_settings(resolved)
    said = [one for one in resolved.notes if one.startswith(dataset)]
    assert len(said) == len(note) and all(one.startswith(start) for one, start in zip(said, note))


def test_looking_for_problems_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not find_problems(resolve(["--output_dir", "one/two"]))
    assert not list(tmp_path.iterdir())


def test_what_is_typed_reaches_an_optimizer_of_the_json_that_does_not_name_it(tmp_path):
    config = PLAIN_JSON | {"optimizer": {"type": "AdamW", "params": {}}}
    typed = ["--weight_decay", "0.1", "--adam_epsilon", "1e-6", "--adam_beta2", "0.95", "--learning_rate", "3e-6"]
    params = resolve(["--deepspeed", write_json(tmp_path, config), *typed]).deepspeed["optimizer"]["params"]
    assert params == {"weight_decay": 0.1, "eps": 1e-6, "betas": [0.9, 0.95], "lr": 3e-6}


def test_a_home_folder_is_one_folder_for_everybody(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(["--output_dir", "~/out"]).training["output_dir"] == str(tmp_path / "out")


# -----------------------------------------------------------------------------
# Without torch

ON_A_CPU, ON_A_GPU = Machine(gpu=False), Machine(True, True, "a GPU")


def test_a_machine_at_which_nobody_has_looked_decides_nothing():
    resolved = resolve(["--micro_batch", "4"], Machine())
    assert (resolved.settings.quantize, resolved.training["bf16"], resolved.training["use_cpu"]) == (
        "auto",
        True,
        False,
    )
    assert not resolved.problems and not [note for note in resolved.notes if note.startswith(("precision", "data"))]
    resolved = resolve(["--dataloader_prefetch_factor", "4"], Machine())
    assert not resolved.problems, "a GPU would have data workers"


def test_a_cpu_and_a_gpu_resolve_to_what_they_can_do():
    cpu, gpu = resolve([], ON_A_CPU), resolve([], ON_A_GPU)
    assert (cpu.training["bf16"], cpu.training["use_cpu"], cpu.settings.quantize) == (False, True, "none")
    assert (gpu.training["bf16"], gpu.training["use_cpu"], gpu.settings.quantize) == (True, False, "4bit")
    old = resolve([], Machine(True, False, "an old GPU"))
    assert (old.training["bf16"], old.training["fp16"]) == (False, True)
    assert "precision: fp16, because an old GPU has no bf16" in old.notes


def test_a_gpu_that_is_not_to_be_used_counts_as_none(tmp_path):
    assert resolve(["--use_cpu"], ON_A_GPU).settings.quantize == "none"
    argv = ["--use_cpu", "--deepspeed", write_json(tmp_path, PLAIN_JSON)]
    assert "--use_cpu: DeepSpeed takes the GPUs that it sees" in resolve(argv, ON_A_GPU).problems[0]
    assert not resolve(argv, ON_A_CPU).problems


# -----------------------------------------------------------------------------
# The real script


THREE = ["--learning_rat", "1e-5", "--dataset", "./nowhere", "--max_html_tokens", "-4"]
THREE_PROBLEMS = [
    "--learning_rat: no such flag; did you mean --learning_rate?",
    "--max_html_tokens -4: at least 1",
    "--dataset ./nowhere: no such folder; give a folder or a Hub name",
]


@pytest.mark.slow
def test_the_check_names_all_problems_a_line_each_and_loads_nothing_heavy(tmp_path):
    done = run_script("-X", "importtime", MAIN, "--check_settings", *THREE, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert [line for line in lines if not line.startswith("import time:")] == THREE_PROBLEMS
    assert (done.returncode, done.stdout) == (2, "")
    loaded = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "transformers.training_args" in loaded, "the fields are transformers' own"
    assert not {"torch", "datasets", "deepspeed", "peft", "accelerate"} & loaded
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_check_of_good_settings_says_what_was_checked_and_what_not(tmp_path):
    flags = ["--deepspeed", str(ROOT / "ds_z3.json"), "--optim", "adafactor", "--data_seed", "3"]
    world = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    world |= {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    write_folder(tmp_path / "pages", good_pages(3))
    flags += ["--dataset", "pages", "--dataset", "USER/NAME"]
    done = run_script(MAIN, "--check_settings", *flags, cwd=tmp_path, env=world)
    assert (done.returncode, done.stderr) == (0, "")
    silent = "(the Hub does not answer: ConnectError)"
    assert " ".join(done.stdout.split()) == (
        "checked, and well as far as it could be seen: settings, folders, --dataset pages (metadata.jsonl); not "
        f"checked: --base_model Hcompany/Holo1-3B {silent}, --dataset USER/NAME {silent}, each page, GPU memory "
        "(--plan)"
    )


@pytest.mark.slow
def test_training_refuses_what_the_check_refuses(tmp_path):
    done = run_script(MAIN, *THREE, "--check_settings=True", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert not [problem for problem in THREE_PROBLEMS if f"  - {problem}\n" not in done.stderr]


def test_what_is_wrong_with_the_command_line_alone_is_raised_where_nobody_gathers_it():
    with pytest.raises(SettingsError, match="did you mean --learning_rate"):
        parse(THREE)


def test_every_place_may_be_in_the_home_folder(tmp_path, monkeypatch):
    """Typed so that the shell leaves the ~, and where the run is gone on with."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ds.json").write_text("{}")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    again = ["--output_dir=~/out", "--deepspeed", "~/ds.json"]
    for more in (["--final_dir=~/final", "--base_model", "~/base"], ["--resume"]):
        resolved = resolve([*again, *more])
        assert find_problems(resolved) == []
        write_record(tmp_path / "out", resolved.record)
        found = (resolved.training["output_dir"], resolved.settings.final_dir, resolved.settings.base_model)
        assert found == tuple(f"{tmp_path}/{name}" for name in ("out", "final", "base"))
    asked = resolve(["--resume_from_checkpoint=~/out/checkpoint-2"])
    assert f"--resume_from_checkpoint {tmp_path}/out/checkpoint-2 has no manifest.json" in str(asked.problems)
