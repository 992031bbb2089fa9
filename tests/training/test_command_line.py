"""The command line: everything that is wrong with it, at once, and the same flags with and without torch."""

import json

import pytest
from conftest import PROGRAMS, run_script
from programs.flags import flags

from training import command_line
from training.settings import PageSettings


def read(*argv: str) -> tuple[dict, list[str]]:
    """(what was typed, what is wrong) for the project's own settings."""
    problems: list[str] = []
    _, typed = command_line.read(command_line.make_parser([PageSettings]), list(argv), problems)
    return typed, problems


def test_values_are_typed_and_nothing_else():
    typed, problems = read(
        "--num_samples", "7", "--lora", "--fast", "False", "--max-bad-share=-0.5", "--prompt", "- a b"
    )
    assert typed == {"num_samples": 7, "lora": True, "fast": False, "max_bad_share": -0.5, "prompt": "- a b"}
    assert not problems


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--num_sample", "7"], "--num_sample: no such flag; did you mean --num_samples?"),
        (["--num-sample=7"], "--num-sample: no such flag; did you mean --num_samples?"),
        (["--max_p", "7"], "--max_p: no such flag; did you mean --max_pixels?"),
        (["--zzz"], "--zzz: no such flag; --help and --help_training list all"),
        (["--lr", "1e-5"], "--lr: no such flag; here it is --learning_rate"),
        (["--num_samples", "1e3"], "--num_samples 1e3: give a whole number"),
        (["--max_bad_share", "much"], "--max_bad_share much: give a number"),
        (["--lora", "maybe"], "--lora maybe: give true or false"),
        (["--quantize", "5bit"], "--quantize 5bit: did you mean 4bit?"),
        (["--quantize", "x"], "--quantize x: one of auto, none, 4bit"),
        (["--num_samples"], "--num_samples: its value is missing"),
        (["--num_samples", "--lora"], "--num_samples: its value is missing"),
        (["--dataset", "my", "pages"], "'pages' stands behind no flag that takes it; quote a value that has spaces"),
        (["--no_fast=1"], "argument --no_fast/--no-fast: ignored explicit argument '1'"),
    ],
)
def test_what_cannot_be_meant_is_named_with_what_may_be(argv, problem):
    assert read(*argv) == (
        {"lora": True} if argv[-1] == "--lora" else {"dataset": ["my"]} if "my" in argv else {},
        [problem],
    )


def test_all_of_it_is_named_and_what_is_right_is_kept():
    typed, problems = read("--lorra", "--num_samples", "few", "--max_pixels", "9", "--quantize", "5bit", "--eval_every")
    assert typed == {"max_pixels": 9}
    assert [problem.split()[0].rstrip(":") for problem in problems] == [
        "--num_samples",
        "--quantize",
        "--eval_every",
        "--lorra",
    ]


def test_what_stands_behind_an_unknown_flag_is_not_repeated():
    _, problems = read("--hub_tokken", "hf_secret", "--huub_token=hf_secret")
    assert len(problems) == 2 and "hf_secret" not in str(problems)


def test_the_wrappers_own_flags_may_be_meant_too(monkeypatch):
    assert "--num_samples" in read("--num_gpu", "4")[1][0] or "list all" in read("--num_gpu", "4")[1][0]
    monkeypatch.setenv(command_line.WRAPPER_FLAGS, "--num_gpus --master_port")
    assert read("--num_gpu", "4")[1] == ["--num_gpu: no such flag; did you mean --num_gpus?"]


@pytest.mark.slow
def test_every_flag_is_the_same_without_torch(tmp_path):
    """The real parser here, where torch is, beside the one of a process in which torch cannot be imported."""
    import torch

    assert torch.nn, "transformers sees it here"
    done = run_script(str(PROGRAMS / "flags.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    alone, here = json.loads(done.stdout), flags()
    assert len(here) > 150 and alone == here
