"""What stands on a model card, taken off it as a reader would: its commands, its program, its numbers."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import use_model_from_hub as use

# Sentences and names whose numbers nobody measures.
WORDS = (
    "Scores and shares lie between 0 and 1, a copy's score is 1.",
    "Design2Code",
    "Apache-2.0",
    "image-text-to-text",
)


def block(card: str, language: str) -> str:
    """The code of the card in this language, as it stands."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    return found


def run_commands(commands: str, cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """As they are pasted into a shell, in which the interpreter and the client of these tests are found first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    environment = environment | {"PATH": path}
    return subprocess.run(
        ["bash", "-e", "-c", commands], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def leaves(value: Any) -> Iterator[Any]:
    """Every number and string of a JSON value, names included."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield str(key)
            yield from leaves(one)
    elif isinstance(value, list):
        for one in value:
            yield from leaves(one)
    elif value is not None and not isinstance(value, bool):
        yield value


def numbers_without_a_source(card: str, *sources: dict) -> list[str]:
    """Numbers of the card that are in none of the JSON `sources`: neither as a number, rounded to as many digits as
    are printed (or as percent), nor in a word of theirs, such as a date or the name of a base."""
    found = [leaf for source in sources for leaf in leaves(source)]
    numbers = {float(leaf) for leaf in found if not isinstance(leaf, str)}
    texts = "\n".join(leaf for leaf in found if isinstance(leaf, str))
    for words in (*WORDS, block(card, "bash"), block(card, "python"), use.FINAL_FOLDER):
        card = card.replace(words, "")
    card = re.sub(r"(?<=@misc{).*", "", card).replace(r"\_", "_")  # the citation's key is made of names
    tokens = [token.rstrip(".,-") for token in re.findall(r"[+-]?[\w.-]*\d[\w.,-]*(?: %)?", card)]
    return [token for token in tokens if not (is_in(token, texts) or is_one_of(token, numbers))]


def is_in(token: str, texts: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(token)}(?!\w)", texts) is not None


def is_one_of(token: str, numbers: set[float]) -> bool:
    try:
        value = float(token.replace(",", "").removesuffix(" %"))
    except ValueError:
        return False
    scale, digits = 100 if token.endswith("%") else 1, len(token.partition(".")[2])
    # As `+.3f` prints it, or as `.4g` does.
    return any(round(scale * one, digits) == value or float(f"{one:.4g}") == value for one in numbers)


def card_of(final: Path) -> str:
    return (final / "README.md").read_text(encoding="utf-8")
