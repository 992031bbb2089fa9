"""The command line, read to its end: every flag of the settings' classes, and all that is wrong with it at once.

    forbid_torch()                                           # only in a process that checks and ends
    parser = make_parser([training_arguments(), PageSettings])
    values, typed = read(parser, sys.argv[1:], problems)     # argparse itself would stop at the first problem

Standard library and, inside the functions, transformers; torch only where `training_arguments` may have it.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Iterable
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from transformers.hf_argparser import HfArgumentParser

NOTHING = object()  # stands where a flag has no value, or none that can be meant

# Flags that other trainers, older transformers and the wrapper have, and what is meant here.
OTHER_NAMES = {
    "batch_size": "--per_device_train_batch_size",
    "epochs": "--num_train_epochs",
    "evaluation_strategy": "--eval_every",
    "group_by_length": "nothing: pages are dealt out by their cost",
    "logging_dir": "--output_dir",
    "lr": "--learning_rate",
    "max_length": "--max_html_tokens",
    "max_seq_length": "--max_html_tokens",
    "model_name_or_path": "--base_model",
    "overwrite_output_dir": "nothing: what an earlier run has left is moved aside",
    "warmup_ratio": "--warmup_steps, which below 1 is a share of all steps",
}
WRAPPER_FLAGS = "HOLO1_WRAPPER_FLAGS"  # in the environment: the wrapper's own flags by spaces, for "did you mean"


def forbid_torch() -> None:
    """From now on torch is not there for this process, which must end without ever needing it.

    transformers.training_args imports torch wherever it finds it, and that takes seconds. None in sys.modules is
    Python's own word for a module that cannot be imported (importlib.util.find_spec then says None, too), and
    transformers 5.23 is made for machines without torch: these are its real fields, by its real code. Reading its
    source (ast) would have to repeat how HfArgumentParser resolves types and choices; a replaced is_torch_available
    would miss the copies that other modules of transformers have taken. It has to come before transformers' import.
    """
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found": as it should be


def training_arguments() -> type[TrainingArguments]:
    """transformers' class; its fields are flags."""
    from transformers.training_args import TrainingArguments

    return TrainingArguments


def make_parser(classes: list[type], **options: Any) -> HfArgumentParser:
    """The parser of all fields of `classes`; of two with one name, the later class wins. Never by abbreviation."""
    from transformers.hf_argparser import HfArgumentParser

    parser = HfArgumentParser(classes, conflict_handler="resolve", allow_abbrev=False, exit_on_error=False, **options)
    actions = {action.dest: action for action in parser._actions}  # argparse has no public way to what was added
    if "optim" in actions and sys.modules.get("torch", NOTHING) is None:
        # The one default that transformers takes from torch's version, and the one type that comes with torch.
        version = [int(part) for part in re.findall(r"\d+", importlib.metadata.version("torch"))[:2]]
        actions["optim"].default = "adamw_torch_fused" if version >= [2, 8] else "adamw_torch"
    for action in parser._actions:
        if isinstance(action, argparse._AppendAction):  # given several times, one value each
            action.nargs = None
    for name in {"parallelism_config", "liger_kernel_config"} & set(actions):  # an object's type, which takes no text
        actions[name].type = str
    return parser


def read(parser: HfArgumentParser, argv: list[str], problems: list[str]) -> tuple[dict, dict]:
    """(every flag's default, what was typed). What cannot be meant is left out of both and added to `problems`.

    Changes `parser`, which then serves no second time.
    """
    defaults = vars(parser.parse_args([]))
    for action in parser._actions:
        if action.nargs is None and action.option_strings:
            action.nargs, action.const = "?", NOTHING  # a missing value is one problem among others
        if action.type is not None or action.choices is not None:
            action.type, action.choices = tolerant(action, problems), None
        action.default = argparse.SUPPRESS
    try:
        found, rest = parser.parse_known_args(joined(argv))
    except argparse.ArgumentError as error:  # --no_bf16=1
        problems.append(str(error))
        return defaults, {}
    typed = {}
    for name, value in vars(found).items():
        missing = value is NOTHING or (isinstance(value, list) and NOTHING in value)
        if missing and not any(problem.startswith(f"--{name} ") for problem in problems):
            problems.append(f"--{name}: its value is missing")
        elif not missing:
            typed[name] = value
    problems += unknown(rest, parser._option_string_actions)
    return defaults, typed


def joined(argv: list[str]) -> list[str]:
    """`argv` with each negative number tied to its flag: argparse takes -1e-5 for a flag (Python 3.10 to 3.14)."""
    words: list[str] = []
    for word in argv:
        if words and is_number(word) and word.startswith("-") and re.fullmatch(r"--\w[\w-]*", words[-1]):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def is_number(word: str) -> bool:
    """Whether a word of the command line is a number."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def tolerant(action: argparse.Action, problems: list[str]) -> Callable[[str], Any]:
    """The action's own conversion and choices, for argparse: a value that cannot be meant is noted, not raised."""
    convert, choices = action.type or str, None if action.choices is None else list(action.choices)
    flag = action.option_strings[0] if action.option_strings else action.dest
    wanted = {int: "a whole number", float: "a number"}.get(convert, "true or false")
    if isinstance(convert, type) and issubclass(convert, Enum):
        wanted = " or ".join(str(item.value) for item in convert)

    def take(text: str) -> Any:
        try:
            value = convert(text)
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            problems.append(f"{flag} {text}: give {wanted}")
            return NOTHING
        if choices is not None and value not in choices:
            near = difflib.get_close_matches(text, map(str, choices), n=1)
            meant = f"did you mean {near[0]}?" if near else f"one of {', '.join(map(str, choices))}"
            problems.append(f"{flag} {text}: {meant}")
            return NOTHING
        return value

    return take


def unknown(rest: list[str], known: Iterable[str]) -> list[str]:
    """Of the words that belong to no flag, each unknown flag with the nearest known one, and each word that stands
    behind none. The values behind unknown flags are not repeated: one may be a token."""
    names = sorted({flag.lstrip("-").replace("-", "_") for flag in known if flag.startswith("--")})
    names += os.environ.get(WRAPPER_FLAGS, "").replace("-", "_").replace("__", "").split()
    problems, behind = [], False
    for word in rest:
        if word.startswith("-") and not is_number(word):
            behind = True
            flag = word.split("=")[0]
            problems.append(f"{flag}: no such flag; {meant_by(flag.lstrip('-').replace('-', '_'), names)}")
        elif not behind:
            problems.append(f"{word!r} stands behind no flag that takes it; quote a value that has spaces")
    return problems


def meant_by(name: str, names: list[str]) -> str:
    """What whoever has typed a flag that does not exist may have meant."""
    if name in OTHER_NAMES:
        return f"here it is {OTHER_NAMES[name]}"
    near = difflib.get_close_matches(name, names, n=1) or [known for known in names if known.startswith(name)]
    return f"did you mean --{near[0]}?" if near else "--help and --help_training list all"
