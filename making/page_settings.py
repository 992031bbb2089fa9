"""What decides how a page comes out, checked before anything is rendered.

    settings = Settings(widths=(1280, 390), tokenizer="holo1_dom_finetune_final")
    check_settings(settings)                        # SettingsError that names every problem
    count = token_counter(settings.tokenizer)

The command line (make_pages.py) has a flag for each field.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from training.errors import SettingsError

RECIPE = 4  # how pages are made; another number makes every folder from the start


@dataclass(frozen=True)
class Settings:
    """What decides how a page comes out; a page made under other settings is made again."""

    scripts: str = "drop"  # or run: once, without a network; the DOM that they leave is taken
    widths: tuple[int, ...] = (1280,)  # of the viewport, CSS px, dealt out by a hash of the page's name
    height: int = 720  # of the viewport; a shorter page's screenshot is as high
    max_height: int = 2000  # px of a screenshot; a longer page is cut
    max_html_tokens: int | None = None  # needs a tokenizer
    max_html_characters: int | None = None
    tokenizer: str | None = None  # a folder with tokenizer.json, or that file

    def digest(self) -> str:
        """16 hex digits that stand for these settings and RECIPE in a page's line; equal ones make equal pages."""
        return hashlib.sha256(json.dumps([RECIPE, asdict(self)], sort_keys=True).encode()).hexdigest()[:16]

    def width_of(self, name: str) -> int:
        """CSS px for the page of that name: by a hash, so that it stays whatever other pages there are."""
        return self.widths[int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(self.widths)]


def check_settings(settings: Settings) -> None:
    """SettingsError that names every problem at once."""
    problems = []
    if not settings.widths or not all(100 <= width <= 8_000 for width in settings.widths):
        problems.append(f"--widths {','.join(map(str, settings.widths))}: from 100 to 8,000 px, such as 1280,390")
    if not 1 <= settings.height <= settings.max_height:
        problems.append(f"--height {settings.height}: from 1 px to --max_height {settings.max_height}")
    if not 100 <= settings.max_height <= 16_384:
        problems.append(f"--max_height {settings.max_height}: from 100 to 16,384 px")
    for name in ("max_html_tokens", "max_html_characters"):
        if (limit := getattr(settings, name)) is not None and limit < 1:
            problems.append(f"--{name} {limit}: at least 1, or leave it out")
    if settings.max_html_tokens and not settings.tokenizer:
        problems.append(f"--max_html_tokens {settings.max_html_tokens} needs --tokenizer FOLDER, the model's own")
    if settings.tokenizer and not tokenizer_file(settings.tokenizer).is_file():
        problems.append(f"--tokenizer {settings.tokenizer}: no tokenizer.json there")
    if problems:
        raise SettingsError("; ".join(problems))


def tokenizer_file(place: str) -> Path:
    """The tokenizer.json that `place`, a folder or that file, stands for; it need not exist."""
    path = Path(place).expanduser()
    return path / "tokenizer.json" if path.is_dir() else path


def token_counter(place: str | None) -> Callable[[str], int]:
    """A function that counts the tokens of a text by the tokenizer at `place`, or its characters where that is None.

    SettingsError where the file cannot be read.
    """
    if place is None:
        return len
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file(place)))
    except Exception as error:  # tokenizers raises nothing narrower
        raise SettingsError(f"--tokenizer {place}: tokenizer.json cannot be read: {error}") from error
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
