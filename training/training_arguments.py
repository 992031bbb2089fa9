"""What of transformers.TrainingArguments holds here, and in which bounds: no field is silently without effect.

    problems += not_here(typed, defaults)                  # what this training does in another way, or not at all
    problems += impossible(training, typed, deepspeed)     # numbers out of range, packages that are missing

Each field of transformers 5.23 is either effective as it is documented there, or in NOT_HERE, or read from a table
below; a test holds NOT_HERE and EFFECTIVE against the class, so that a new field is noticed. No torch here.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training import eight_bit

JUDGED = "held-out pages are written and scored with --eval_every N"
PARTS = "the page's scores are fixed; results.json has them all"
BEST = "--eval_every N keeps the best weights by score, and they become final"
HUB = "--push_to_hub sends the final folder once, after training"
SHARDED = "weights are sharded by DeepSpeed; give --deepspeed ds_z3.json"
COMPILED = "--fuse compiles what gains by it"
LIGER = "Liger 0.8 cannot patch these models on transformers 5.23; the fast path (--fast) has such layers of its own"
ORDER = "pages are dealt out by their cost, drawn by --data_seed"
TRAINS = "training, then judging, is all that this script does; leave it out"

# Each field that has no effect here, or a harmful one, with the reason and what to do instead. Refused where it is
# typed with another value than its default.
NOT_HERE = {
    "accelerator_config": f"{ORDER}; leave it out",
    "auto_find_batch_size": "--micro_batch auto finds what fits and keeps the pages per step",
    "batch_eval_metrics": PARTS,
    "bf16_full_eval": "pages are written in the precision that the model is trained in; leave it out",
    "dataloader_drop_last": f"{ORDER}, equally many batches for each process; leave it out",
    "dataloader_in_order": "batches in another order would belong to other steps, and no resume could repeat them",
    "do_eval": f"{JUDGED}, and always at the end",
    "do_predict": f"{TRAINS}; use_model_from_hub.py writes a page",
    "do_train": TRAINS,
    "enable_jit_checkpoint": "SIGTERM saves the step already; leave it out",
    "eval_accumulation_steps": JUDGED,
    "eval_delay": JUDGED,
    "eval_do_concat_batches": JUDGED,
    "eval_on_start": "--compare_base writes and scores the held-out pages before training",
    "eval_steps": JUDGED,
    "eval_strategy": JUDGED,
    "eval_use_gather_object": JUDGED,
    "fp16_full_eval": "pages are written in the precision that the model is trained in; leave it out",
    "fsdp": SHARDED,
    "fsdp_config": SHARDED,
    "greater_is_better": BEST,
    "hub_always_push": HUB,
    "hub_model_id": f"{HUB}; its repository is --hub_repo",
    "hub_private_repo": "the flag is --private_repo",
    "hub_revision": HUB,
    "hub_strategy": HUB,
    "hub_token": "a token on the command line is seen by others; put it into HF_TOKEN",
    "ignore_data_skip": "a resumed run would train on the same pages twice; leave it out",
    "include_for_metrics": PARTS,
    "include_num_input_tokens_seen": "each step's line has its tokens; leave it out",
    "label_names": "the collate makes the labels; leave it out",
    "label_smoothing_factor": "the loss on supervised tokens has no smoothing; leave it out",
    "length_column_name": ORDER,
    "liger_kernel_config": LIGER,
    "load_best_model_at_end": BEST,
    "logging_nan_inf_filter": "it hides a loss that is no number, which must end the training; leave it out",
    "metric_for_best_model": BEST,
    "neftune_noise_alpha": "noise on the embeddings would reach the screenshot's, too; leave it out",
    "parallelism_config": SHARDED,
    "prediction_loss_only": JUDGED,
    "remove_unused_columns": "the collate needs all columns; leave it out",
    "restore_callback_states_from_checkpoint": "no callback of this training has a state; leave it out",
    "save_only_model": "nothing could resume from such a checkpoint; the final folder has the weights alone",
    "skip_memory_metrics": "each step's line has the memory; leave it out",
    "torch_compile": COMPILED,
    "torch_compile_backend": COMPILED,
    "torch_compile_mode": COMPILED,
    "train_sampling_strategy": ORDER,
    "use_cache": "training needs no cache; leave it out",
    "use_liger_kernel": LIGER,
}

# -----------------------------------------------------------------------------
# Numbers


def at_least(least: float, whole: bool = True) -> Callable[[float], bool]:
    """Whether a number is finite, not below `least`, and whole where that is asked."""
    return lambda value: math.isfinite(value) and value >= least and (not whole or value == int(value))


def positive(value: float) -> bool:
    """Whether a number is finite and above 0."""
    return math.isfinite(value) and value > 0


def share(value: float) -> bool:
    """Whether a number is from 0 on and below 1."""
    return 0 <= value < 1


def steps(value: float) -> bool:
    """Whether a number counts steps, or is a share of all steps."""
    return positive(value) and (value < 1 or value == int(value))


A_NUMBER, A_SHARE, A_SEED = "a finite number above 0", "from 0 on and below 1", "a whole number from 0 to 4294967295"
STEPS = "a whole number of steps, at least 1, or below 1 a share of all steps"
ONE = (at_least(1), "at least 1, a whole number")
BOUNDS: dict[str, tuple[Callable[[float], bool], str]] = {
    "adam_beta1": (share, A_SHARE),
    "adam_beta2": (share, A_SHARE),
    "adam_epsilon": (positive, A_NUMBER),
    "data_seed": (lambda value: 0 <= value < 2**32, A_SEED),
    "dataloader_num_workers": (at_least(0), "at least 0"),
    "dataloader_prefetch_factor": ONE,
    "ddp_bucket_cap_mb": ONE,
    "ddp_timeout": (at_least(1), "at least 1 second"),
    "gradient_accumulation_steps": ONE,
    "learning_rate": (positive, A_NUMBER),
    "logging_steps": (steps, STEPS),
    "max_grad_norm": (at_least(0, whole=False), "a finite number, at least 0, which is no clipping"),
    "max_steps": (lambda value: value == -1 or value >= 1, "at least 1; leave it out to count --num_train_epochs"),
    "num_train_epochs": (positive, A_NUMBER),
    "per_device_eval_batch_size": ONE,
    "per_device_train_batch_size": ONE,
    "save_steps": (steps, STEPS),
    "save_total_limit": (at_least(1), "at least 1 checkpoint"),
    "seed": (lambda value: 0 <= value < 2**32, A_SEED),
    "torch_empty_cache_steps": ONE,
    "warmup_steps": (lambda value: value == 0 or steps(value), f"0, or {STEPS}"),
    "weight_decay": (at_least(0, whole=False), "a finite number, at least 0"),
}

# -----------------------------------------------------------------------------
# Optimizers, schedules, reports: what each needs

ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
TARGETED = ("rank", "update_proj_gap", "scale", "proj_type")
# The beginning of a name: (package, TrainingArguments that it does not read, keys of --optim_args), the longest counts.
OPTIMIZERS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "adafactor": ("", ADAM, ()),
    "adagrad": ("", ADAM, ("lr_decay", "weight_decay", "eps")),
    "adamw_8bit": ("bitsandbytes", (), ()),
    "adamw_anyprecision": (
        "torchdistx",
        (),
        ("use_kahan_summation", "momentum_dtype", "variance_dtype", "compensation_buffer_dtype"),
    ),
    "adamw_bnb_8bit": ("bitsandbytes", (), ()),
    "adamw_torch": ("", (), ()),
    "adamw_torch_4bit": ("torchao", (), ("block_size", "bf16_stochastic_round")),
    "adamw_torch_8bit": ("torchao", (), ("block_size", "bf16_stochastic_round")),
    "adamw_torch_npu_fused": ("torch_npu", (), ()),
    "adamw_torch_xla": ("torch_xla", (), ()),
    "ademamix": ("bitsandbytes", (), ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3")),
    "apollo_adamw": ("apollo_torch", (), (*TARGETED, "proj", "scale_type")),
    "galore_adafactor": ("galore_torch", ADAM, TARGETED),
    "galore_adamw": ("galore_torch", (), TARGETED),
    "grokadamw": (
        "grokadamw",
        ADAM,
        ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"),
    ),
    "lion": ("bitsandbytes", ("adam_epsilon",), ()),
    "paged_adamw": ("bitsandbytes", (), ()),
    "paged_ademamix": ("bitsandbytes", (), ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3")),
    "paged_lion": ("bitsandbytes", ("adam_epsilon",), ()),
    "rmsprop": ("", ADAM, ("momentum", "alpha", "eps", "weight_decay", "centered")),
    "rmsprop_bnb": ("bitsandbytes", ADAM, ()),
    "sgd": ("", ADAM, ("momentum", "dampening", "weight_decay", "nesterov")),
    "stable_adamw": ("optimi", (), ("max_lr", "kahan_sum", "decouple_lr")),
}
# Numbers that each keeps for one that learns, beside its master: in fp32, or in 8 bits by eight_bit.BLOCKWISE. As a
# step of each was measured to leave them; one that is missing here has not been.
MOMENTS = {"adamw_torch": 2, "adamw_torch_fused": 2, "adagrad": 1, "ademamix": 3, "ademamix_8bit": 3}
MOMENTS |= dict.fromkeys(eight_bit.NAMES, 2) | dict.fromkeys(("lion_32bit", "lion_8bit"), 1)
MOMENTS |= dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"), 1)
# These change weights inside the backward pass, before anyone has looked for gradients that are no numbers; those want
# to be told when weights are saved or judged, and would leave others in the final folder than they have found.
INSIDE_BACKWARD = ("lomo", "adalomo", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise")
INSIDE_BACKWARD += ("galore_adafactor_layerwise", "apollo_adamw_layerwise")
SCHEDULE_FREE = ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd")

# The keys of --lr_scheduler_kwargs that each schedule reads, and those of which it needs one.
SCHEDULES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": ((), ()),
    "cosine": (("num_cycles",), ()),
    "cosine_with_restarts": (("num_cycles",), ()),
    "polynomial": (("lr_end", "power"), ()),
    "constant": ((), ()),
    "constant_with_warmup": ((), ()),
    "inverse_sqrt": (("timescale",), ()),
    "cosine_with_min_lr": (("num_cycles", "min_lr", "min_lr_rate"), ("min_lr", "min_lr_rate")),
    "cosine_warmup_with_min_lr": (
        ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
        ("min_lr", "min_lr_rate"),
    ),
    "warmup_stable_decay": (
        ("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"),
        ("num_decay_steps",),
    ),
}
BY_METRIC = ("reduce_lr_on_plateau", "greedy")

# The packages that each integration of --report_to needs; of those with a bar between, one.
REPORTS = {
    "azure_ml": "azureml",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet_ml",
    "dagshub": "dagshub mlflow",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "kubeflow": "",  # its trainer sets a variable
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard|tensorboardX",
    "trackio": "trackio",
    "wandb": "wandb",
}
# Fields that only some integrations read.
READ_BY = {
    "project": ("trackio",),
    "trackio_bucket_id": ("trackio",),
    "trackio_space_id": ("trackio",),
    "trackio_static_space_id": ("trackio",),
    "run_name": ("trackio", "wandb", "mlflow", "comet_ml", "swanlab"),
}
DDP_ONLY = (
    "ddp_backend",
    "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters",
    "ddp_static_graph",
)

# Effective as transformers documents them, within what the functions below and training/settings.py ask of some.
EFFECTIVE = {
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "average_tokens_across_devices",
    "bf16",
    "dataloader_multiprocessing_context",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "debug",
    "deepspeed",
    "disable_tqdm",
    "fp16",
    "full_determinism",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "local_rank",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "logging_first_step",
    "logging_strategy",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "optim",
    "optim_args",
    "optim_target_modules",
    "output_dir",
    "push_to_hub",
    "report_to",
    "resume_from_checkpoint",
    "save_on_each_node",
    "save_strategy",
    "tf32",
    "use_cpu",
}


def not_here(typed: dict, defaults: dict) -> list[str]:
    """Each typed field of NOT_HERE that differs from its default; a token is not repeated."""
    return [
        f"--{name}{'' if name.endswith('_token') else f' {typed[name]}'}: {reason}"
        for name, reason in NOT_HERE.items()
        if name in typed and typed[name] != defaults[name]
    ]


def impossible(training: dict, typed: dict, deepspeed: dict | None, processes: int) -> list[str]:
    """What cannot work, whatever machine this is. `training` are the resolved TrainingArguments, `deepspeed` is the
    JSON (None without), `processes` those of the whole run."""
    problems = [
        f"--{name} {training[name]}: {words}"
        for name, (holds, words) in BOUNDS.items()
        if training[name] is not None and not holds(training[name])
    ]
    problems += optimizer_problems(training, typed, deepspeed)
    problems += schedule_problems(training, typed, deepspeed)
    problems += report_problems(training, typed)
    problems += checkpointing_problems(training)
    if str(training["save_strategy"]).rpartition(".")[2].lower() == "best":
        problems.append(f"--save_strategy best: {BEST}; give steps, epoch or no")
    for name in DDP_ONLY:
        if typed.get(name) is not None and (deepspeed is not None or processes == 1):
            why = "DeepSpeed stands in for DDP" if deepspeed is not None else "one process needs no DDP"
            problems.append(f"--{name} {typed[name]}: {why}; leave it out")
    if any("tpu" in str(option).lower() for option in training["debug"] or ()):
        problems.append("--debug tpu_metrics_debug: there is no TPU here; give underflow_overflow, or leave it out")
    return problems


def worker_problems(training: dict, typed: dict) -> list[str]:
    """What torch's DataLoader refuses to have without data workers; `training` has their resolved number."""
    names = [f"dataloader_{part}" for part in ("prefetch_factor", "persistent_workers", "multiprocessing_context")]
    beside = [name for name in names if typed.get(name)] if training["dataloader_num_workers"] == 0 else []
    return [f"--{name} {typed[name]} needs --dataloader_num_workers 1 or more" for name in beside]


def installed(package: str) -> bool:
    """Whether a package of this name can be imported; it is not."""
    return importlib.util.find_spec(package) is not None


def optimizer_problems(training: dict, typed: dict, deepspeed: dict | None) -> list[str]:
    """What --optim lacks, and what beside it would not be read."""
    optim = eight_bit.name_of(training["optim"])
    if "optimizer" in (deepspeed or {}):
        beside = [
            f"--{name} {typed[name]}" for name in ("optim", "optim_args", "optim_target_modules") if name in typed
        ]
        return [f"{flag}: the DeepSpeed JSON has an optimizer of its own; leave one out" for flag in beside]
    if optim in INSIDE_BACKWARD:
        return [f"--optim {optim} changes weights before gradients can be looked at; give another, such as adafactor"]
    if optim in SCHEDULE_FREE:
        return [f"--optim {optim}: what is saved and judged would be other weights than it means; give another"]
    package, unread, keys = OPTIMIZERS[max((name for name in OPTIMIZERS if optim.startswith(name)), key=len)]
    problems = eight_bit.problems(optim, deepspeed)
    if package and not installed(package):
        problems.append(f"--optim {optim}: {package} is not installed; install it, or give another, such as adafactor")
    problems += [f"--{name} {typed[name]}: --optim {optim} does not read it" for name in unread if name in typed]
    targeted = optim.startswith(("galore", "apollo"))
    if targeted and (deepspeed or {}).get("zero_optimization", {}).get("stage"):
        problems.append(f"--optim {optim} steps on matrices, which ZeRO lays flat; leave --deepspeed out, or --optim")
    if targeted and not training["optim_target_modules"]:
        problems.append(f"--optim {optim} needs --optim_target_modules, such as all-linear")
    if training["optim_target_modules"] and not targeted:
        problems.append(f"--optim_target_modules {training['optim_target_modules']}: --optim {optim} does not read it")
    for part in (training["optim_args"] or "").replace(" ", "").split(","):
        key, equals, _ = part.partition("=")
        if part and not (equals and key in keys):
            known = f"key=value by commas, of {', '.join(keys)}" if keys else "nothing, it reads none"
            problems.append(f"--optim_args {part}: --optim {optim} takes {known}")
    return problems


def moments_of(optim: Any, optim_args: str | None, deepspeed: bool) -> int | None:
    """Numbers that --optim keeps for one that learns, beside its master, under DeepSpeed or without it; None where that
    is not known."""
    name, given = eight_bit.name_of(optim), (optim_args or "").replace(" ", "").lower().split(",")
    given = {key for key, _, value in (part.partition("=") for part in given) if value not in ("", "0", "0.0", "false")}
    if name == "adafactor":  # of a matrix a mean for each row and column; DeepSpeed lays matrices flat
        return int(deepspeed)
    if name in ("sgd", "rmsprop"):
        return (name == "rmsprop") * (1 + ("centered" in given)) + ("momentum" in given)
    return MOMENTS.get(name)


def json_object(name: str, given: Any) -> tuple[dict, list[str]]:
    """A field that takes JSON from the command line: (the object, what is wrong with it)."""
    if not given or isinstance(given, dict):
        return given or {}, []
    try:
        found = json.loads(given)
    except json.JSONDecodeError:
        found = None
    if isinstance(found, dict):
        return found, []
    return {}, [f"--{name} {given}: give a JSON object, such as '{{\"num_cycles\": 2}}'"]


def schedule_problems(training: dict, typed: dict, deepspeed: dict | None) -> list[str]:
    """What --lr_scheduler_type lacks, and what beside it would not be read."""
    schedule = str(getattr(training["lr_scheduler_type"], "value", training["lr_scheduler_type"]))
    if "scheduler" in (deepspeed or {}):
        beside = [f"--{name} {typed[name]}" for name in typed if name in ("lr_scheduler_type", "lr_scheduler_kwargs")]
        return [f"{flag}: the DeepSpeed JSON has a scheduler of its own; leave one out" for flag in beside]
    if schedule in BY_METRIC:
        return [f"--lr_scheduler_type {schedule} follows the Trainer's evaluations, which are not made here"]
    options, problems = json_object("lr_scheduler_kwargs", training["lr_scheduler_kwargs"])
    keys, needed = SCHEDULES[schedule]
    for key in options:
        if key not in keys:
            known = f"reads {', '.join(keys)}" if keys else "reads none"
            problems.append(f"--lr_scheduler_kwargs {key}: --lr_scheduler_type {schedule} {known}")
    if needed and not set(needed) & set(options):
        example = '{"num_decay_steps": 100}' if needed == ("num_decay_steps",) else '{"min_lr_rate": 0.1}'
        problems.append(f"--lr_scheduler_type {schedule} needs --lr_scheduler_kwargs, such as '{example}'")
    if schedule == "constant" and typed.get("warmup_steps"):
        problems.append(f"--warmup_steps {typed['warmup_steps']}: give --lr_scheduler_type constant_with_warmup")
    return problems


def report_problems(training: dict, typed: dict) -> list[str]:
    """Integrations that transformers does not know or that are not installed, and what they would not read."""
    asked = training["report_to"]
    names = [asked] if isinstance(asked, str) else list(asked or [])
    problems = []
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in REPORTS:
            problems.append(f"--report_to {name}: give none, all or one of {', '.join(REPORTS)}")
        elif missing := [either for either in REPORTS[name].split() if not any(map(installed, either.split("|")))]:
            packages = " and ".join(missing).replace("|", " or ")
            problems.append(f"--report_to {name}: {packages} is not installed; install it, or give --report_to none")
        elif name == "kubeflow" and "KUBEFLOW_TRAINER_SERVER_URL" not in os.environ:
            problems.append("--report_to kubeflow: no Kubeflow trainer has started this; give --report_to none")
    for name, readers in READ_BY.items():
        if name in typed and not {*readers, "all"} & {*names}:
            problems.append(f"--{name} {typed[name]}: only read with --report_to {' or '.join(readers)}")
    return problems


def checkpointing_problems(training: dict) -> list[str]:
    """The options of torch.utils.checkpoint; which layers are recomputed is --checkpoint_share."""
    name = "activation_checkpointing_kwargs"
    options, problems = json_object(name, training[name])
    if "every_n_layers" in options:
        problems.append(f"--{name}: every_n_layers is overruled here; give --checkpoint_share")
    return problems


def folder_trouble(folder: str | Path) -> str:
    """Why nothing could be written into a folder that need not exist yet; empty where it can. Leaves nothing there."""
    place = Path(folder).expanduser().absolute()
    while not place.exists() and place.parent != place:
        place = place.parent
    if not place.is_dir():
        return f"{place} is a file"
    try:
        # Asked of the file system itself: permissions alone say yes to root, and to a read-only disk.
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        return f"nothing can be written into {place} ({error.strerror})"
    return ""
