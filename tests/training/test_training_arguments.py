"""Every field of transformers' own settings: effective, or refused with what to do instead."""

import importlib.util
import inspect
import json
import typing
from dataclasses import fields

import pytest
import torch
from conftest import PLAIN_JSON
from transformers import Trainer, TrainingArguments, optimization
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from training import eight_bit
from training import training_arguments as rules
from training.memory_plan import Way
from training.settings import Machine, resolve

FIELDS = {field.name for field in fields(TrainingArguments)}


def problems_of(*argv: str) -> list[str]:
    """What resolving finds wrong, for a machine at which nobody has looked."""
    return resolve(list(argv), Machine()).problems


# -----------------------------------------------------------------------------
# The tables are complete


def test_every_field_is_effective_bounded_or_refused():
    tables = [rules.NOT_HERE, rules.BOUNDS, rules.READ_BY, rules.DDP_ONLY, rules.EFFECTIVE]
    assert {name for table in tables for name in table} == FIELDS
    assert not set(rules.NOT_HERE) & {name for table in tables[1:] for name in table}


def test_every_optimizer_and_its_needs_are_known():
    refused = {*rules.INSIDE_BACKWARD, *rules.SCHEDULE_FREE}
    assert refused <= {item.value for item in OptimizerNames}
    left = {item.value for item in OptimizerNames} - refused
    assert not {name for name in left if not any(name.startswith(known) for known in rules.OPTIMIZERS)}
    assert set(rules.MOMENTS) <= left


@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        *((name, None) for name in (*rules.MOMENTS, "adafactor", "sgd", "rmsprop")),
        ("sgd", "momentum=0.9"),
        ("sgd", "momentum=0.0, nesterov=False"),
        ("rmsprop", "momentum=0.9,centered=True"),
        ("rmsprop", "centered=False"),
    ],
)
def test_an_optimizer_keeps_as_much_as_is_planned_for_it(optim, optim_args, tmp_path):
    """As transformers makes it, after a real step: on a matrix, and on the flat tensor that ZeRO makes of one."""
    arguments = TrainingArguments(str(tmp_path), optim=optim, optim_args=optim_args, use_cpu=True, report_to="none")
    for shape in ((1024, 1024), (1024 * 1024,)):
        weights = torch.nn.Parameter(torch.ones(shape))
        weights.grad = torch.ones_like(weights)
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = kind([weights], **options)
        optimizer.step()
        (state,) = optimizer.state.values() or [{}]
        kept = sum(value.nbytes for name, value in state.items() if torch.is_tensor(value) and name[:4] != "qmap")
        moments = rules.moments_of(optim, optim_args, deepspeed=len(shape) == 1)
        way = Way(moments=moments, eight_bit=eight_bit.is_asked(optim))
        assert kept / weights.numel() == pytest.approx(way.moment_bytes, abs=0.01), (optim, optim_args, shape)


def test_every_schedule_reads_what_its_function_takes():
    own = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    assert {*rules.SCHEDULES, *rules.BY_METRIC} == {item.value for item in SchedulerType}
    for name, (keys, _) in rules.SCHEDULES.items():
        function = optimization.TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
        assert set(keys) == set(inspect.signature(function).parameters) - own, name


def test_every_report_is_known():
    assert set(rules.REPORTS) == set(INTEGRATION_TO_CALLBACK)


# -----------------------------------------------------------------------------
# What is refused

# Where another value than True would be a value of the type.
TYPED = {
    "accelerator_config": "{}",
    "dataloader_in_order": "False",
    "eval_accumulation_steps": "2",
    "eval_delay": "2",
    "eval_do_concat_batches": "False",
    "eval_steps": "2",
    "eval_strategy": "steps",
    "hub_strategy": "end",
    "label_smoothing_factor": "0.1",
    "neftune_noise_alpha": "5",
    "skip_memory_metrics": "False",
    "train_sampling_strategy": "sequential",
}


@pytest.mark.parametrize("name", rules.NOT_HERE)
def test_a_field_without_effect_is_refused_with_what_to_do_instead(name):
    (problem,) = [one for one in problems_of(f"--{name}", TYPED.get(name, "True")) if one.startswith(f"--{name}")]
    assert problem.endswith(f": {rules.NOT_HERE[name]}") and len(rules.NOT_HERE[name]) > 15


@pytest.mark.parametrize("name", rules.NOT_HERE)
def test_a_field_without_effect_may_be_typed_as_it_is(name):
    field = TrainingArguments.__dataclass_fields__[name]
    default = False if name in ("remove_unused_columns", "logging_nan_inf_filter") else field.default
    if isinstance(default, str | bool | int | float):
        assert not problems_of(f"--{name}", str(default))


OUT_OF_RANGE = {
    "adam_beta1": "1",
    "adam_beta2": "-0.1",
    "adam_epsilon": "0",
    "data_seed": "-1",
    "dataloader_num_workers": "-1",
    "dataloader_prefetch_factor": "0",
    "ddp_bucket_cap_mb": "0",
    "ddp_timeout": "0",
    "gradient_accumulation_steps": "0",
    "learning_rate": "-1",
    "logging_steps": "0",
    "max_grad_norm": "-1",
    "max_steps": "0",
    "num_train_epochs": "0",
    "per_device_eval_batch_size": "0",
    "per_device_train_batch_size": "0",
    "save_steps": "2.5",
    "save_total_limit": "0",
    "seed": "4294967296",
    "torch_empty_cache_steps": "0",
    "warmup_steps": "-0.1",
    "weight_decay": "-0.1",
}


@pytest.mark.parametrize("name", rules.BOUNDS)
def test_a_number_out_of_range_is_refused(name):
    text, kind = OUT_OF_RANGE[name], typing.get_type_hints(TrainingArguments)[name]
    wrong = [text, "nan", "inf"] if kind is float else [text]
    for value in wrong:
        assert [one for one in problems_of(f"--{name}", value) if one.startswith(f"--{name} ")], value


@pytest.mark.parametrize("name", rules.BOUNDS)
def test_a_default_is_in_range(name):
    default = resolve([], Machine()).training[name]
    assert default is None or not problems_of(f"--{name}", str(default))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--optim galore_adamw", "--optim galore_adamw: galore_torch is not installed"),
        ("--optim galore_adamw", "--optim galore_adamw needs --optim_target_modules, such as all-linear"),
        ("--optim galore_adamw --deepspeed ds_z3.json", "--optim galore_adamw steps on matrices, which ZeRO lays flat"),
        ("--optim lomo", "--optim lomo changes weights before gradients can be looked at"),
        ("--optim schedule_free_adamw", "what is saved and judged would be other weights"),
        ("--optim adamw_torch_8bit", "--optim adamw_torch_8bit: torchao is not installed"),
        ("--optim sgd --adam_beta1 0.8", "--adam_beta1 0.8: --optim sgd does not read it"),
        ("--optim sgd --optim_args momentun=0.9", "--optim_args momentun=0.9: --optim sgd takes key=value by commas"),
        ("--optim_args rank=2", "--optim_args rank=2: --optim adamw_torch_fused takes nothing, it reads none"),
        ("--optim_target_modules all-linear", "--optim_target_modules all-linear: --optim adamw_torch_fused does not"),
        ("--lr_scheduler_type reduce_lr_on_plateau", "follows the Trainer's evaluations, which are not made here"),
        ("--lr_scheduler_type cosine_with_min_lr", "needs --lr_scheduler_kwargs, such as '{\"min_lr_rate\": 0.1}'"),
        (
            "--lr_scheduler_type warmup_stable_decay",
            "needs --lr_scheduler_kwargs, such as '{\"num_decay_steps\": 100}'",
        ),
        ("--lr_scheduler_kwargs min_lr=1", "--lr_scheduler_kwargs min_lr=1: give a JSON object"),
        (
            '--lr_scheduler_kwargs {"power":2}',
            "--lr_scheduler_kwargs power: --lr_scheduler_type cosine reads num_cycles",
        ),
        ("--lr_scheduler_type constant --warmup_steps 5", "--warmup_steps 5.0: give --lr_scheduler_type constant_with"),
        ("--report_to wandb", "--report_to wandb: wandb is not installed; install it, or give --report_to none"),
        ("--report_to wandbb", "--report_to wandbb: give none, all or one of azure_ml"),
        ("--report_to kubeflow", "--report_to kubeflow: no Kubeflow trainer has started this"),
        ("--run_name mine", "--run_name mine: only read with --report_to trackio or wandb"),
        ("--project mine", "--project mine: only read with --report_to trackio"),
        ("--ddp_backend gloo", "--ddp_backend gloo: one process needs no DDP"),
        ("--dataloader_num_workers 0 --dataloader_prefetch_factor 2", "--dataloader_prefetch_factor 2 needs"),
        ("--debug tpu_metrics_debug", "there is no TPU here"),
        ("--save_strategy best", "--save_strategy best: --eval_every N keeps the best weights"),
        ('--activation_checkpointing_kwargs {"every_n_layers":2}', "every_n_layers is overruled here"),
    ],
)
def test_what_would_end_later_or_have_no_effect_is_refused(argv, message):
    for package in ("galore_torch", "torchao", "wandb"):
        assert package not in argv or importlib.util.find_spec(package) is None, "installed here: name another"
    assert [problem for problem in problems_of(*argv.split()) if message in problem]


@pytest.mark.parametrize(
    "argv",
    [
        "--optim sgd --optim_args momentum=0.9,nesterov=True",
        "--optim adamw_bnb_8bit --adam_beta2 0.95",
        '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr_rate":0.1}',
        '--activation_checkpointing_kwargs {"use_reentrant":false}',
        "--report_to all",
        "--debug underflow_overflow",
        "--save_steps 0.25 --warmup_steps 100 --max_steps 1000 --max_grad_norm 0",
    ],
)
def test_what_works_is_let_through(argv):
    assert not problems_of(*argv.split())


def test_an_optimizer_and_a_scheduler_in_the_json_leave_none_to_type(tmp_path):
    own = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}, "scheduler": {"type": "WarmupLR", "params": {}}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(PLAIN_JSON | own))
    typed = ["--optim", "sgd", "--lr_scheduler_type", "linear", "--ddp_static_graph", "True"]
    assert problems_of("--deepspeed", str(path), *typed) == [
        "--optim sgd: the DeepSpeed JSON has an optimizer of its own; leave one out",
        "--lr_scheduler_type linear: the DeepSpeed JSON has a scheduler of its own; leave one out",
        "--ddp_static_graph True: DeepSpeed stands in for DDP; leave it out",
    ]


def test_several_processes_without_deepspeed_have_ddp(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not problems_of("--ddp_backend", "gloo", "--ddp_static_graph", "True")


def test_on_a_cpu_what_needs_data_workers_is_refused_before_torch_does():
    argv = ["--dataloader_persistent_workers", "True", "--dataloader_prefetch_factor", "2"]
    assert len(resolve(argv, Machine(gpu=False)).problems) == 2
    assert not resolve([*argv, "--dataloader_num_workers", "1"], Machine(gpu=False)).problems
    assert not resolve(argv, Machine(True, True, "a GPU")).problems, "which has workers"
