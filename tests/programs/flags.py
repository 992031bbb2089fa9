"""Print every flag of the training script as JSON, in a process that cannot import torch."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from training import command_line
from training.settings import PageSettings


def flags() -> dict[str, list]:
    """Each flag with its field, the number of its values, type, default and choices, as text."""
    parser = command_line.make_parser([command_line.training_arguments(), PageSettings])
    return {flag: described(action) for flag, action in parser._option_string_actions.items()}


def described(action: argparse.Action) -> list[str]:
    """What decides how a flag is read; a choice's conversion is a new function each time, hence by its name."""
    choices = None if action.choices is None else list(action.choices)
    kind = getattr(action.type, "__qualname__", str(action.type))
    return [action.dest, str(action.nargs), kind, str(action.default), str(action.const), str(choices)]


if __name__ == "__main__":
    command_line.forbid_torch()
    print(json.dumps(flags()))
    assert sys.modules["torch"] is None
