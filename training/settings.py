"""Every setting of the training: declared once, met by the command line and the DeepSpeed JSON, checked before anything
loads.

    resolved = resolve(sys.argv[1:])      # typed beats JSON, JSON beats default
    check_settings(resolved)              # raises once, naming every problem
    answer(sys.argv[1:])                  # --help, or the same for --check_settings, without torch; ends the process

Sections: Settings, Resolution, Checks.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import use_model_from_hub as use
from families import FAMILIES
from training import at_hand
from training import training_arguments as fields_of_transformers
from training.checkpoints import checkpoints_in, read_manifest
from training.cleaning import cleaning_steps
from training.command_line import forbid_torch, make_parser, read, training_arguments
from training.cpu_time import slow_words, sure
from training.errors import SettingsError, refuse_other_systems
from training.mixture import FLAGS, asked_datasets, split_share
from training.processes import hush_libraries, local_world_size, world_size
from training.run_record import (
    ADDED,
    differences,
    has_begun,
    inherit,
    keep_pages_per_step,
    make_record,
    read_record,
    take_over,
)

PROJECT = Path(__file__).resolve().parents[1]
PAGES_FOLDER = "holo1_dom_finetune_pages"

# -----------------------------------------------------------------------------
# Settings


def setting(default: Any, help: str, **options: Any) -> Any:
    """A field of PageSettings: its default, the sentence that --help prints, argparse's `options` such as choices."""
    given = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**given, metadata={"help": help, **options})


@dataclass
class PageSettings:
    """Every setting of this project, each declared here and nowhere else."""

    hub_repo: str = setting(use.HUB_REPO, "Hub repository for the model, NAME or USER/NAME.")
    push_to_hub: bool = setting(False, "Push the final folder after training; the right to write is checked before.")
    private_repo: bool = setting(False, "Make the Hub repository private.")
    num_samples: int = setting(1000, "Training pages; the dataset may end earlier.")
    base_model: str = setting(
        "Hcompany/Holo1-3B", f"Hub repository or folder of a {' or '.join(FAMILIES.values())} model."
    )
    base_revision: str | None = setting(None, "Branch, tag or commit of the base model on the Hub.")
    trust_remote_code: bool = setting(False, "Run code that the base model's repository brings along.")
    dataset: list[str] = setting(
        ["HuggingFaceM4/WebSight"],
        "Hub dataset, or a folder with metadata.jsonl and pictures. Several are given one by one, with their shares: "
        "--dataset A:0.7 --dataset B; the five flags below then stand once for each, in that order, - to say nothing.",
        action="append",
    )
    dataset_config: list[str] | None = setting(
        None, "Configuration of the dataset (default: v0.1 for WebSight).", action="append"
    )
    dataset_split: list[str] | None = setting(None, "Split of the dataset (default: train).", action="append")
    dataset_revision: list[str] | None = setting(
        None, "Branch, tag or commit of the dataset on the Hub.", action="append"
    )
    image_column: list[str] | None = setting(
        None,
        "Column of the screenshots, or a path, as images.0 (default: known sets by name, else image). Given once, it "
        "is that of every dataset that is not known by name; so is --html_column.",
        action="append",
    )
    html_column: list[str] | None = setting(
        None,
        "Column of the HTML, or a path, as messages.1.content (default: known sets by name, else text).",
        action="append",
    )
    pages_dir: str | None = setting(
        None, f"Where prepared pages are kept for later runs (default: {PAGES_FOLDER} beside --output_dir)."
    )
    clean: str = setting(
        "comments,scripts,tracking,base64", "What is removed from the HTML, by commas; none leaves it as it is."
    )
    prompt: str = setting(use.Recipe.prompt, "The question, asked after the screenshot.")
    max_pixels: int = setting(use.Recipe.max_pixels, "Larger screenshots are shrunk to this width x height.")
    max_html_tokens: int = setting(use.Recipe.max_html_tokens, "Longer pages are dropped: a cut page teaches no end.")
    max_bad_share: float = setting(0.02, "Share of broken pages (unreadable, empty) above which training is refused.")
    quantize: str = setting(
        "auto",
        "4-bit NF4 base with LoRA adapters: auto (on a GPU without DeepSpeed), none, 4bit.",
        choices=["auto", "none", "4bit"],
    )
    lora: bool = setting(
        False, "Train LoRA adapters on the language model only; they are merged into the final folder."
    )
    lora_rank: int = setting(16, "Rank of the adapters.")
    lora_alpha: int = setting(32, "Scale of the adapters: alpha / rank multiplies their product.")
    freeze_vision: bool = setting(False, "Leave the vision tower and its merger as they are.")
    random_weights: bool = setting(False, "Start from random weights: the base is configuration and processor only.")
    fast: bool = setting(
        True, "The fast path (families/fast_parts.py); False is the model's own, slower way to the same."
    )
    fuse: str = setting(
        "auto",
        "Fuse element-wise parts with torch.compile: auto (on a GPU with triton), yes, no.",
        choices=["auto", "yes", "no"],
    )
    fp8: bool = setting(
        False, "Multiply in fp8 (e4m3) in the layers of the language model; refused where it does not agree with bf16."
    )
    micro_batch: str = setting(
        "auto", "Pages that go through at once on each GPU, or auto: as many as fit. Pages per step stay the same."
    )
    checkpoint_share: float | None = setting(
        None, "Share of the layers whose activations are recomputed; not set: as few as memory asks for."
    )
    offload_share: float | None = setting(
        None,
        "Share of the language model's layers whose activations wait in the CPU's memory; not set: as many as help, on "
        "a GPU; 0 is none.",
    )
    fill_memory: bool = setting(
        True, "Let each batch keep the activations that its own size leaves room for; False: as the longest one does."
    )
    plan: bool = setting(False, "Print how much memory 1 to 64 GPUs need and what auto would choose, then stop.")
    eval_pages: int = setting(32, "Held-out pages, written by the model after training.")
    eval_every: int = setting(
        0, "Write and score the held-out pages also every N steps, and keep the best weights; 0 is only at the end."
    )
    early_stopping_patience: int = setting(
        0, "Stop after so many evaluations of --eval_every without a better score; 0 is never."
    )
    compare_base: bool = setting(False, "Write and score the held-out pages also before training.")
    penalty_grid: str = setting("1.0,1.05", "Repetition penalties under which --compare_base compares, by commas.")
    resume: bool = setting(
        False, "Go on from the newest whole checkpoint in --output_dir, with the settings it began with."
    )
    final_dir: str = setting(".", "Where the final folder and the emergency checkpoint are written, by their names.")
    hang_timeout: float | None = setting(
        None, "Seconds without a finished step after which training hangs and is ended (not set: by the steps so far)."
    )
    yes: bool = setting(False, "Do not ask before a model of 1 B weights or more is trained on a CPU.")
    show_supervision: bool = setting(False, "Print one example with the supervised tokens in colour, then stop.")
    check_settings: bool = setting(False, "Check all that can be checked without loading anything, then stop.")
    demo: bool = setting(False, "The bundled tiny model on the bundled pages: no network, no GPU, a few minutes.")

    def __post_init__(self):
        """What may be given several times is a list, also where a record or a caller has one alone."""
        for name in ("dataset", *FLAGS):
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, [value])


# What differs from transformers' own defaults; each stays a flag (--learning_rate, ...).
TRAINING_DEFAULTS = {
    "output_dir": "holo1_dom_finetune_output",
    "per_device_train_batch_size": 1,  # a page is up to 1,280 image tokens and 4,096 of HTML
    "gradient_accumulation_steps": 8,
    "per_device_eval_batch_size": 8,  # pages written at once
    "num_train_epochs": 1,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # below 1: a share of all steps
    "bf16": True,
    "activation_checkpointing": True,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,  # the filter hides what must be seen
    "save_total_limit": 2,
    "report_to": "tensorboard",
    "remove_unused_columns": False,  # the collate needs them all
    "disable_tqdm": True,  # one line a step instead
    "ddp_timeout": 7200,  # rank 0 reads the dataset while the others wait
}
LORA_LEARNING_RATE = 1e-4  # unless typed; adapters start from zero and need more than full weights

DEMO = {
    "base_model": str(PROJECT / "demo" / "tiny_holo1"),
    "dataset": str(PROJECT / "demo" / "pages"),
    "num_samples": 320,
    "eval_pages": 40,
    "compare_base": True,
    "penalty_grid": "1.0",
    "max_pixels": 224 * 224,
    "max_html_tokens": 256,
    "num_train_epochs": 7,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 8,  # divided among the processes
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 20,
    "activation_checkpointing": False,
    "save_strategy": "no",
}

PLACES = ("output_dir", "final_dir", "resume_from_checkpoint", "base_model", "deepspeed")  # may begin with ~

# DeepSpeed's name for a value that TrainingArguments has, too.
JSON_TWINS = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "learning_rate",
    "scheduler.params.warmup_num_steps": "warmup_steps",
}


# -----------------------------------------------------------------------------
# Resolution


@dataclass
class Resolved:
    """The settings after command line, JSON and defaults have met: `training` are TrainingArguments, `deepspeed` is the
    JSON as it will be used (None without DeepSpeed), `notes` say what was decided and why, `record` is what the run's
    checkpoints will say of it, and `earlier` the record of the run that is gone on with (None: a new one)."""

    settings: PageSettings
    training: dict
    deepspeed: dict | None
    notes: list[str]
    problems: list[str]
    record: dict
    earlier: dict | None
    machine: Machine


@dataclass(frozen=True)
class Machine:
    """What the settings have to know of this machine; None where nobody has looked."""

    gpu: bool | None = None
    bf16: bool | None = None
    gpu_name: str = ""
    fp8: bool | None = None  # whether the GPU multiplies in fp8


def look_at_machine() -> Machine:
    """Asks torch, and imports it."""
    import torch

    if not torch.cuda.is_available():
        return Machine(gpu=False)
    bf16, fp8 = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_capability() >= (8, 9)
    return Machine(True, bf16, torch.cuda.get_device_name(), fp8)


def parse(argv: list[str], problems: list[str] | None = None) -> tuple[dict, dict]:
    """Parse the command line: (all values, only the typed ones). What is wrong with it, a flag that does not exist, a
    value of the wrong type, a field that has no effect here, is added to `problems`, all of it; or, where these are not
    given, raises `SettingsError`. Ends the process where help is asked for."""
    about = {"description": __doc__.split("\n")[0]}
    if {"-h", "--help"} & set(argv):  # without torch, hence at once
        more = "Every field of transformers.TrainingArguments is a flag, too; --help_training lists them."
        make_parser([PageSettings], epilog=more, **about).parse_args(["--help"])
    # Both have push_to_hub; the later class wins, and the Trainer must never push by itself.
    parser = make_parser([training_arguments(), PageSettings], **about)
    if "--help_training" in argv:
        parser.parse_args(["--help"])
    found: list[str] = []
    defaults, typed = read(parser, argv, found)
    values = {**defaults, **TRAINING_DEFAULTS}
    found += fields_of_transformers.not_here(typed, values)
    if problems is None and found:
        raise SettingsError(in_one(found))
    if problems is not None:
        problems += found
    if typed.get("demo"):  # --demo stands for these flags; what was typed beside it still wins
        share = max(1, DEMO["per_device_train_batch_size"] // world_size())
        shares = {"checkpoint_share", "gradient_checkpointing"} & {*typed}  # say it in another way
        demo = {name: value for name, value in DEMO.items() if name != "activation_checkpointing" or not shares}
        typed = {**demo, "per_device_train_batch_size": share, **typed}
    values.update(typed)
    for name in PLACES:
        # A shell leaves the ~ of "~/x", and of --name=~/x, as it is.
        if isinstance(values[name], str):
            values[name] = os.path.expanduser(values[name])
            typed |= {name: values[name]} if name in typed else {}
    del values["local_rank"]  # the launcher's own; the environment says it, too
    return values, typed


def in_one(problems: list[str]) -> str:
    """All problems in the one message of a `SettingsError`."""
    return "these settings cannot work:\n" + "\n".join(f"  - {problem}" for problem in problems)


def get_json(config: dict, path: str) -> Any:
    """The value at a path with dots, such as optimizer.params.lr; None where any part of it is missing."""
    for key in path.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def set_json(config: dict, path: str, value: Any) -> None:
    """Puts `value` at a path with dots; objects that are missing on the way are made."""
    *parents, last = path.split(".")
    for key in parents:
        config = config.setdefault(key, {})
    config[last] = value


def read_deepspeed_json(path: str, problems: list[str]) -> dict:
    """The JSON as far as it can be used: what is wrong is added to `problems`, and left out of it."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"--deepspeed {path}: {error.strerror}; give a DeepSpeed JSON such as ds_z3.json")
        return {}
    except json.JSONDecodeError as error:
        problems.append(f"--deepspeed {path}: not JSON, line {error.lineno} column {error.colno}: {error.msg}")
        return {}
    if not isinstance(config, dict):
        problems.append(f"--deepspeed {path}: must be a JSON object, not {type(config).__name__}")
        return {}
    for block in ("bf16", "fp16", "zero_optimization", "optimizer", "scheduler"):
        if not isinstance(config.get(block, {}), dict):
            problems.append(f"--deepspeed {path}: {block} is {config[block]!r}; it must be an object")
            config[block] = {}
    for block in ("zero_optimization.offload_optimizer", "zero_optimization.offload_param"):
        if (value := get_json(config, block)) is not None and not isinstance(value, dict):
            problems.append(
                f'--deepspeed {path}: {block} is {value!r}; it must be an object, such as {{"device": "cpu"}}'
            )
            set_json(config, block, {})
    for key in JSON_TWINS:
        value, truth = get_json(config, key), key.endswith("enabled")
        if value not in (None, "auto") and (not isinstance(value, int | float) or isinstance(value, bool) != truth):
            wanted = "true, false" if truth else "a number"
            problems.append(f'--deepspeed {path}: {key} is {json.dumps(value)}; give {wanted} or "auto"')
            set_json(config, key, "auto")
    return config


def resolve(argv: list[str], machine: Machine | None = None) -> Resolved:
    """Bring command line, DeepSpeed JSON and defaults together: typed beats JSON, JSON beats default.

    `machine` is what the settings are resolved for; not given, torch is asked what this one has. Where nobody has
    looked (`Machine()`), what depends on it stays as it was asked for. Raises nothing: `problems` has what is wrong.
    """
    notes, problems = [], []
    values, typed = parse(argv, problems)
    now, earlier = {*typed}, earlier_record(values, notes, problems)
    if earlier is not None:
        take_over(earlier, values, typed)
    machine = look_at_machine() if machine is None else machine
    gpu = False if values["use_cpu"] else machine.gpu
    if machine.gpu and values["use_cpu"] and values["deepspeed"]:
        problems.append("--use_cpu: DeepSpeed takes the GPUs that it sees; hide them by CUDA_VISIBLE_DEVICES= instead")
    config = read_deepspeed_json(values["deepspeed"], problems) if values["deepspeed"] else None
    if config is not None:
        take_from_json(config, values, typed)
    batch = keep_pages_per_step(earlier, values, now, world_size(), problems)
    for asked, other in (("fp16", "bf16"), ("bf16", "fp16")):
        if typed.get(asked) and other not in typed:
            values[other] = False
    resolve_precision(values, machine, gpu, notes)
    resolve_quantization(values, gpu, notes)
    resolve_shares(values, typed, now, problems)
    gpus = local_world_size() if gpu else 0
    resolve_workers(values, typed, gpus, notes)
    if gpu is not None or "dataloader_num_workers" in typed:
        problems += fields_of_transformers.worker_problems(values, typed)
    resolve_micro_batch(values, typed, gpus, problems)
    if (values["lora"] or values["quantize"] == "4bit") and not {"learning_rate", "demo"} & set(typed):
        values["learning_rate"] = LORA_LEARNING_RATE
        notes.append(f"learning rate {LORA_LEARNING_RATE} for adapters")
    if config is not None:
        asked = config.pop("train_batch_size", "auto")  # DeepSpeed multiplies it itself, and so do we
        typed_pages = {"per_device_train_batch_size", "gradient_accumulation_steps", "micro_batch"} & set(typed)
        finish_deepspeed_json(config, values, typed, notes)
        total = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * world_size()
        if not typed_pages and asked not in ("auto", total):
            problems.append(
                f"--deepspeed {values['deepspeed']}: train_batch_size is {json.dumps(asked)}, but pages x "
                f"accumulated x processes are {total}; leave it out, or make them agree"
            )
    problems += fields_of_transformers.impossible(values, typed, config, world_size())
    record = make_record(typed_by_the_user(argv, typed, earlier), values, config, world_size(), batch)
    earlier = earlier if earlier is None or has_begun(earlier) else None
    inherit(record, earlier)
    names = {item.name for item in fields(PageSettings)}
    settings = PageSettings(**{name: values.pop(name) for name in names})
    return Resolved(settings, values, config, notes, problems, record, earlier, machine)


def typed_by_the_user(argv: list[str], typed: dict, earlier: dict | None) -> dict:
    """Of what was `typed` now and in the `earlier` record, what was not added by a start with less memory (ADDED): that
    is for the machine as it is then, and a run that is resumed later tries again what it was asked for."""
    if not (added := int(os.environ.get(ADDED, "0"))):
        return typed
    return {**(earlier["typed"] if earlier else {}), **parse(argv[:-added], [])[1]}


def take_from_json(config: dict, values: dict, typed: dict) -> None:
    """What the DeepSpeed JSON says in numbers beats defaults, and nothing that was typed."""
    for path, name in JSON_TWINS.items():
        if name not in typed and get_json(config, path) not in (None, "auto"):
            values[name] = get_json(config, path)
    betas = get_json(config, "optimizer.params.betas")
    if isinstance(betas, list) and not {"adam_beta1", "adam_beta2"} & set(typed):
        values["adam_beta1"], values["adam_beta2"] = betas
    if not {"bf16", "fp16"} & set(typed) and get_json(config, "fp16.enabled") is True:
        values["bf16"] = False  # the default must not contradict a JSON that asks for fp16


def earlier_record(values: dict, notes: list[str], problems: list[str]) -> dict | None:
    """What the run was that --resume or --resume_from_checkpoint goes on with; None for a new run.

    One that was killed before its first step has nothing to go on with, and is begun again: no --resume any more.
    """
    output_dir, asked = Path(values["output_dir"]), values["resume_from_checkpoint"]
    if values["resume"] and asked:
        problems.append(f"--resume and --resume_from_checkpoint {asked}: give one of them")
        return None
    if not values["resume"]:
        return record_of(asked, problems) if asked else None
    try:
        record = read_record(output_dir)
    except SettingsError as error:
        problems.append(f"--resume: {error}")
        return None
    if record is None and not checkpoints_in(output_dir):
        problems.append(f"--resume: no run has begun in {output_dir}; leave --resume out to begin one")
    elif record is None:
        problems.append(
            f"--resume: {output_dir} has checkpoints, but no run.json that says what their run was (an earlier "
            "version wrote them, or it is lost); their weights go on in a new run with --base_model"
        )
    elif not has_begun(record):
        values["resume"], values["resume_from_checkpoint"] = False, record["from"]
        notes.append(f"--resume: the last run in {output_dir} was ended before its first step, and begins again")
        if record["from"] and (before := record_of(record["from"], problems)):
            return {**before, "typed": record["typed"], "batch": record["batch"]}
    return record


def record_of(checkpoint: str, problems: list[str]) -> dict | None:
    """The record of the run that wrote the checkpoint of --resume_from_checkpoint."""
    try:
        return read_manifest(Path(checkpoint))["record"]
    except ValueError as error:
        problems.append(f"--resume_from_checkpoint {checkpoint} {error}; give a whole checkpoint, or --resume")
    return None


def resolve_precision(values: dict, machine: Machine, gpu: bool | None, notes: list[str]) -> None:
    """bf16 where the hardware has it, else fp16 on a GPU and fp32 on a CPU; a plan is for GPUs, wherever it is made."""
    if gpu is None or (values["plan"] and not gpu):
        return
    if not gpu and (values["bf16"] or values["fp16"]):
        values["bf16"] = values["fp16"] = False
        notes.append("precision: fp32, because there is no GPU")
    elif values["bf16"] and not machine.bf16:
        values["bf16"], values["fp16"] = False, True
        notes.append(f"precision: fp16, because {machine.gpu_name} has no bf16")
    values["dataloader_pin_memory"] = values["dataloader_pin_memory"] and gpu
    if values["dataloader_pin_memory"]:  # batches travel beside the arithmetic; else each tensor waits for the GPU
        values["accelerator_config"] = {"non_blocking": True}
    if not gpu and not values["deepspeed"]:
        values["use_cpu"] = True  # accelerate then picks gloo; DeepSpeed chooses its own accelerator


def resolve_quantization(values: dict, gpu: bool | None, notes: list[str]) -> None:
    """4-bit only where adapters can train on it: never under DeepSpeed, whose ZeRO-3 cannot shard it."""
    if values["deepspeed"]:
        chosen, why = "none", "DeepSpeed shards full-precision weights"
    elif values["quantize"] != "auto":
        chosen, why = values["quantize"], "asked for"
    elif gpu is None and not values["plan"]:
        return
    elif values["random_weights"] or not (gpu or values["plan"]):  # --plan is asked before there is a GPU
        chosen, why = "none", "random weights" if values["random_weights"] else "no GPU to save memory on"
    else:
        found = importlib.util.find_spec("bitsandbytes") is not None
        chosen, why = ("4bit", "bitsandbytes works here") if found else ("none", "bitsandbytes is not installed")
    values["quantize"] = chosen
    notes.append(f"quantisation: {chosen} ({why})")


def resolve_micro_batch(values: dict, typed: dict, gpus: int, problems: list[str]) -> None:
    """A number keeps the pages per step. `auto` needs a GPU, and leaves what was typed as it is."""
    asked = values["micro_batch"]
    if asked == "auto":
        if (not gpus and not values["plan"]) or "per_device_train_batch_size" in typed or not values["fast"]:
            values["micro_batch"] = str(values["per_device_train_batch_size"])
    else:
        pages = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
        size = int(asked) if asked.isdecimal() else 0
        if size < 1 or pages % size:
            problems.append(f"--micro_batch {asked} must divide the {pages} pages per step of a GPU, or be auto")
        else:
            values["per_device_train_batch_size"], values["gradient_accumulation_steps"] = size, pages // size


def resolve_shares(values: dict, typed: dict, now: set[str], problems: list[str]) -> None:
    """Which layers keep their activations: of one layer they are recomputed or wait in the CPU's memory, not both. Of
    --checkpoint_share and the switch, which has two names, what was typed `now` wins over what a run began with."""
    for name in ("checkpoint_share", "offload_share"):
        if values[name] is not None and not 0 <= values[name] <= 1:
            problems.append(f"--{name} {values[name]}: a share between 0 and 1")
    switch = resolve_switch(values, typed, now, problems)
    share, away = values["checkpoint_share"], values["offload_share"]
    told = f"--checkpoint_share {share}"
    if switch and (share is None or (switch in now and "checkpoint_share" not in now)):
        told = f"--{switch} {values[switch]}"
        values["checkpoint_share"] = share = float(values["activation_checkpointing"])
    elif share is not None:
        if switch in now and values[switch] != (share > 0):
            problems.append(f"--{switch} {values[switch]} and {told}: give one of them")
        values["activation_checkpointing"] = share > 0
    if away and not values["fast"]:
        problems.append(f"--offload_share {away}: the plain path (--fast False) knows nothing of it; leave one out")
    elif away and share and share <= 1 and away <= 1 < share + away - 1e-9:
        problems.append(
            f"{told} and --offload_share {away} are more than all layers together; leave one out, or give "
            f"--checkpoint_share {1 - away:g} instead"
        )


def resolve_switch(values: dict, typed: dict, now: set[str], problems: list[str]) -> str:
    """Puts what was typed by transformers' older names of two fields into the newer ones; returns the name by which the
    switch of all recomputing was typed, "" where it was not."""
    found = ""
    for newer in ("activation_checkpointing_kwargs", "activation_checkpointing"):
        older = newer.replace("activation", "gradient")
        if {newer, older} <= now and values[newer] != values[older]:
            problems.append(f"--{older} {values[older]} and --{newer} {values[newer]} are one setting: give one")
        if older in now or (older in typed and newer not in now):
            values[newer] = values[older]
        found = next((name for name in (older, newer) if name in now), "")
        found = found or next((name for name in (older, newer) if name in typed), "")
    return found


def resolve_workers(values: dict, typed: dict, gpus: int, notes: list[str]) -> None:
    """Processes that decode and tokenise ahead of each GPU; on a CPU they would only take its cores away."""
    if gpus and "dataloader_num_workers" not in typed:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        values["dataloader_num_workers"] = max(1, min(8, cores // gpus - 1))
    if values["dataloader_num_workers"] and "dataloader_persistent_workers" not in typed:
        values["dataloader_persistent_workers"] = True
    if gpus:
        notes.append(f"data workers: {values['dataloader_num_workers']} for each GPU")


def finish_deepspeed_json(config: dict, values: dict, typed: dict, notes: list[str]) -> None:
    """Write the resolved values into the JSON, so that DeepSpeed and the Trainer cannot disagree."""
    for path, name in JSON_TWINS.items():
        # An optimizer or schedule of its own would use its own value for what was typed and is not in the JSON.
        wanted = name in typed and path.split(".")[0] in config
        if "." not in path or wanted or get_json(config, path) is not None:
            set_json(config, path, values[name])
    set_json(config, "bf16.enabled", values["bf16"])
    set_json(config, "fp16.enabled", values["fp16"])
    if get_json(config, "optimizer.params.betas") is not None or (
        "optimizer" in config and {"adam_beta1", "adam_beta2"} & set(typed)
    ):
        set_json(config, "optimizer.params.betas", [values["adam_beta1"], values["adam_beta2"]])
    if get_json(config, "scheduler.params.warmup_num_steps") is not None:
        set_json(config, "scheduler.params.warmup_num_steps", "auto")  # counts steps; ours may be a share
    if get_json(config, "zero_optimization.stage") == 3:
        # Without it a checkpoint holds DeepSpeed's shards and no weights that anything else can load.
        set_json(config, "zero_optimization.stage3_gather_16bit_weights_on_model_save", True)
    offload = get_json(config, "zero_optimization.offload_optimizer.device") not in (None, "none")
    if offload and "optimizer" not in config:
        config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW on the CPU; DeepSpeed would refuse it
    # DeepSpeed times each micro-batch, which nobody reads here, and has the CPU wait for that until the GPU has done
    # all. Then the GPU waits for the CPU: some 90 ms a micro-batch of 3B on one H100, by a profile.
    config.setdefault("timers", {"throughput": {"enabled": False}})
    notes.append(f"DeepSpeed {values['deepspeed']}: {deepspeed_words(config)}")
    if "activation_checkpointing" in config:  # of models that call DeepSpeed's own function, as none here does
        notes.append("its activation_checkpointing changes nothing: give --checkpoint_share or --offload_share")


def deepspeed_words(config: dict) -> str:
    """What a resolved DeepSpeed JSON comes to, in a few words; pages per step and precision have lines of their own."""
    zero = config.get("zero_optimization", {})
    moved = [name for name in ("param", "optimizer") if get_json(zero, f"offload_{name}.device") not in (None, "none")]
    words = [f"ZeRO stage {zero.get('stage', 0)}", f"gradients clipped at {config.get('gradient_clipping', 'auto')}"]
    words += [f"{' and '.join(moved)} offloaded"] if moved else []
    words += [f"its own {name}" for name in ("optimizer", "scheduler") if name in config]
    return ", ".join(words)


# -----------------------------------------------------------------------------
# Checks


def check_settings(resolved: Resolved) -> None:
    """Gather every setting that cannot work and raise `SettingsError` once, before anything loads."""
    if problems := find_problems(resolved):
        raise SettingsError(in_one(problems))


def answer(argv: list[str]) -> None:
    """--help and --check_settings: says what there is to say, and ends the process; so does any other command line
    where this is no Linux. Others go on, with less noise from what is imported next.

    --check_settings ends it with 0 and what was checked, or with 2 and a line on stderr for each problem. The code is
    the one that training resolves and checks with, for a machine at which nobody has looked: so it needs no torch, and
    some seconds. The wrapper asks this before it starts the launcher, with WORLD_SIZE set.
    """
    helps = {"-h", "--help"} & {*argv}
    if not helps:
        refuse_other_systems()
        if "--check_settings" not in argv:
            return hush_libraries()
    forbid_torch()
    resolved = resolve(argv, Machine())
    problems = find_problems(resolved)
    if not resolved.settings.check_settings:
        problems.append("--check_settings False: leave it out")
    on_cpu = finds_no_gpu(resolved.machine) or resolved.training["use_cpu"]
    if not problems:
        found = at_hand.look(resolved.settings)
        problems += found.problems
        slow = on_cpu and found.base_is_there and slow_words(vars(resolved.settings), resolved.training)
        if not problems:
            print(at_hand.words(found), *([slow] if slow else []), sep="\n", flush=True)
    for problem in problems:
        print(" ".join(problem.split()), file=sys.stderr, flush=True)
    sys.exit(2 if problems else 0)


def ask_before_cpu(resolved: Resolved) -> str:
    """(main process only) The line of a large model on a machine without a GPU, once it may be trained all the same;
    "" for any other. Under the wrapper it has been said, and asked: --yes."""
    told = resolved.settings.yes and "HOLO1_STATUS_DIR" in os.environ
    if told or (resolved.machine.gpu and not resolved.training["use_cpu"]):
        return ""
    at_hand.look_at_base(resolved.settings.base_model, resolved.settings.base_revision, found := at_hand.Found())
    # One that the Hub does not give is told where it is fetched, once.
    if found.base_is_there and (words := slow_words(vars(resolved.settings), resolved.training)):
        print(words, file=sys.stderr, flush=True)
        sure(resolved.settings.yes)
        return words
    return ""


def find_problems(resolved: Resolved) -> list[str]:
    """Every problem of the resolved settings, each with its remedy; what is merely worth knowing becomes a note."""
    settings, problems = resolved.settings, list(resolved.problems)
    problems += number_problems(settings) + place_problems(resolved) + resume_problems(resolved)
    problems += fp8_problems(resolved) if settings.fp8 else []
    if settings.early_stopping_patience and not settings.eval_every:
        problems.append(f"--early_stopping_patience {settings.early_stopping_patience} needs --eval_every N")
    if not settings.prompt.strip():
        problems.append("--prompt is empty: say what the model shall write")
    if settings.random_weights and settings.quantize == "4bit":
        problems.append("--random_weights with --quantize 4bit: quantised weights cannot train; leave one out")
    if (settings.lora or settings.quantize == "4bit") and settings.freeze_vision:
        resolved.notes.append("--freeze_vision changes nothing: adapters train on the language model only")
    if resolved.training["bf16"] and resolved.training["fp16"]:
        problems.append("bf16 and fp16 are both on: choose one, on the command line or in the DeepSpeed JSON")
    stage = get_json(resolved.deepspeed or {}, "zero_optimization.stage")
    if resolved.deepspeed is not None and stage not in (None, 0, 1, 2, 3):
        problems.append(f"--deepspeed: zero_optimization.stage is {stage!r}; 0, 1, 2 or 3")
    try:
        cleaning_steps(settings.clean)
    except SettingsError as error:
        problems.append(str(error))
    try:
        for asked in asked_datasets(settings):
            if asked.source.note:
                resolved.notes.append(f"{asked.name}: {asked.source.note}")
    except SettingsError as error:
        problems += str(error).split("\n")
    return problems


def finds_no_gpu(machine: Machine) -> bool:
    """Whether training will find none; where nobody has looked here, the wrapper may have, and says so by
    DS_ACCELERATOR."""
    return machine.gpu is False or (machine.gpu is None and os.environ.get("DS_ACCELERATOR") == "cpu")


def fp8_problems(resolved: Resolved) -> list[str]:
    """Why the layers of the language model cannot multiply in fp8, each with its remedy; whether it agrees with bf16
    shows before step one (fp8_training.py)."""
    settings, training, machine = resolved.settings, resolved.training, resolved.machine
    on_cpu = finds_no_gpu(machine) or training["use_cpu"]
    on_cpu &= not settings.plan  # which is asked before there is a GPU
    four_bit = settings.quantize == "4bit" and "quantize" in resolved.record["typed"]  # else chosen without DeepSpeed
    asked = {
        "with --fast False: the model's own way multiplies in bf16; leave one out": not settings.fast,
        "with --lora: adapters multiply beside weights that stay as they are; leave one out": settings.lora,
        "with --quantize 4bit: 4-bit weights multiply in their own way; leave one out": four_bit,
        "without DeepSpeed: weights are in 4 bits or fp32 there; give --deepspeed ds_z3.json": (
            resolved.deepspeed is None and not (settings.lora or four_bit)
        ),
        "needs a GPU of compute capability 8.9 or more, and there is none; leave it out": on_cpu,
        f"needs a GPU of compute capability 8.9 or more, which {machine.gpu_name} is not; leave it out": (
            machine.fp8 is False and not on_cpu and not settings.plan
        ),
        "needs triton, which is not installed; install requirements.txt, or leave it out": (
            importlib.util.find_spec("triton") is None and not settings.plan
        ),
        "needs bf16, for all that it leaves as it is; leave --fp16 and --bf16 False out": (
            not training["bf16"] and not on_cpu and machine.fp8 is not False and not settings.plan
        ),
    }
    return [f"--fp8 {why}" for why, holds in asked.items() if holds]


def number_problems(settings: PageSettings) -> list[str]:
    """Numbers of `PageSettings` that are out of range."""
    at_least = {"num_samples": 1, "eval_pages": 1, "eval_every": 0, "max_html_tokens": 1, "lora_rank": 1}
    at_least |= {"lora_alpha": 1, "early_stopping_patience": 0, "max_pixels": use.Recipe.min_pixels}
    at_least |= {} if settings.hang_timeout is None else {"hang_timeout": 1}
    problems = [
        f"--{name} {getattr(settings, name)}: at least {least}"
        for name, least in at_least.items()
        if getattr(settings, name) < least
    ]
    try:
        penalties(settings)
    except ValueError:
        problems.append(f"--penalty_grid {settings.penalty_grid}: numbers above 0 by commas, such as 1.0,1.05")
    if not 0 <= settings.max_bad_share <= 1:
        problems.append(f"--max_bad_share {settings.max_bad_share}: a share between 0 and 1")
    return problems


def place_problems(resolved: Resolved) -> list[str]:
    """Folders that are not there, hold nothing that can be used, or cannot be written into."""
    settings, output_dir, problems = resolved.settings, resolved.training["output_dir"], []
    base = Path(settings.base_model)
    if base.is_dir() and base.resolve() == (Path(settings.final_dir) / use.FINAL_FOLDER).resolve():
        problems.append(f"--base_model {settings.base_model} is where the result will be written; rename it first")
    local = settings.base_model.startswith((".", "/", "~")) or settings.base_model.count("/") > 1
    if (base.is_dir() or local) and not (base / "config.json").is_file():
        problems.append(f"--base_model {settings.base_model}: no config.json there; give a model folder or a Hub name")
    for name in (split_share(text)[0] for text in settings.dataset):
        if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
            problems.append(f"--dataset {name}: no such folder; give a folder or a Hub name")
    if settings.plan:  # writes nothing
        return problems
    places, output = [base.resolve(), *base.resolve().parents], Path(output_dir).resolve()
    moved = [place.name for place in places if place.parent == output]
    if base.is_dir() and any(name.startswith("checkpoint-") or name == "best" for name in moved):
        problems.append(
            f"--base_model {settings.base_model} is moved aside when another run begins in --output_dir {output_dir}; "
            "move it out of there yourself, or give another --output_dir"
        )
    if trouble := fields_of_transformers.folder_trouble(output_dir):
        problems.append(f"--output_dir {output_dir}: {trouble}; give a folder that can be written into")
    if trouble := fields_of_transformers.folder_trouble(settings.final_dir):
        problems.append(f"--final_dir {settings.final_dir}: {trouble}; give a folder that can be written into")
    pages_dir = settings.pages_dir and os.path.expanduser(settings.pages_dir)
    if pages_dir and (trouble := fields_of_transformers.folder_trouble(pages_dir)):
        problems.append(f"--pages_dir {settings.pages_dir}: {trouble}; give a folder that can be written into")
    return problems


def resume_problems(resolved: Resolved) -> list[str]:
    """What a run that is gone on with cannot change; the checkpoint itself is looked at later (resuming.py)."""
    before, now = resolved.earlier, resolved.record
    if before is None:
        return []
    # Where nobody has looked at the machine, what it decides is not known yet.
    unknown = {"bf16", "fp16", "quantize"} if resolved.machine.gpu is None else set()
    problems = differences(before, now, Path(resolved.training["output_dir"]), unknown)
    if get_json(resolved.deepspeed or {}, "scheduler") and before["rate"] != now["rate"]:
        problems.append(
            f"--learning_rate {now['rate']}: the DeepSpeed JSON's own scheduler would keep {before['rate']}"
        )
    return problems


def penalties(settings: PageSettings) -> list[float]:
    """The repetition penalties of --penalty_grid; raises ValueError."""
    found = [float(part) for part in settings.penalty_grid.split(",") if part.strip()]
    if not all(penalty > 0 for penalty in found):
        raise ValueError(settings.penalty_grid)
    return found
