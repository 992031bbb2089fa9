"""How long a large model would take on a CPU, said and asked before its weights are fetched.

    if words := slow_words(vars(settings), training):  # "" for a small model, and where its size cannot be known yet
        say(words)
        sure(settings.yes)                          # asks on a terminal; SettingsError for a no

The size comes from the model's config.json alone. The rate is this machine's own, measured with numpy's product of
matrices, which no step surpasses: on an idle machine the time is a lower bound, on a busy one it is what that leaves.
Without torch, since --check_settings tells it, too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from families import family_of
from families.page_costs import page_flops, weights_of
from training.errors import ON_CPU, SettingsError, agreed, can_be_asked

LARGE = 1_000_000_000  # weights: a page of fewer takes a CPU seconds, of more it takes minutes
HTML_TOKENS = 1_000  # of a page; what it really has is known when pages are read, after the weights are fetched
SIDE = 1536  # of the matrices that are multiplied: 7 GFLOP, a few tenths of a second on two cores


def slow_words(settings: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """One line with the arithmetic, for a model of 1 B weights or more that is to be trained; else "". `settings` are
    the project's and `training` TrainingArguments, both by name."""
    if settings["demo"] or settings["plan"] or settings["show_supervision"]:
        return ""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            settings["base_model"], revision=settings["base_revision"], trust_remote_code=settings["trust_remote_code"]
        )
        family = family_of(config)
        shape, image = family.shape(config), family.most_image_tokens(config, settings["max_pixels"])
    except Exception:  # whatever is wrong with it is said in full, with its remedy, where the base is fetched
        return ""
    weights = sum(weights_of(shape))
    if weights < LARGE:
        return ""
    html = min(HTML_TOKENS, settings["max_html_tokens"])
    flops, rate = page_flops(shape, image + html, html, image * shape.per_token), flops_per_second()
    pages = pages_trained(settings["num_samples"], training)
    return (
        f"{ON_CPU} {settings['base_model']} has {weights / 1e9:.1f} B weights and there is no GPU: {pages:,} pages x "
        f"{flops / 1e12:,.0f} TFLOP / {rate / 1e12:.2f} TFLOP/s (measured now) = "
        f"{duration(pages * flops / rate)} at that rate"
    )


def pages_trained(num_samples: int, training: Mapping[str, Any]) -> int:
    """Pages that go through the model on this process, all epochs together."""
    if training["max_steps"] > 0:
        return training["max_steps"] * training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    return round(num_samples * training["num_train_epochs"])


def flops_per_second() -> float:
    """Operations per second of a product of fp32 matrices on all cores; the second of two, when they are awake."""
    import numpy as np

    matrix = np.ones((SIDE, SIDE), np.float32)
    for _ in range(2):
        start = time.perf_counter()
        matrix @ matrix
        seconds = time.perf_counter() - start
    return 2 * SIDE**3 / seconds


def duration(seconds: float) -> str:
    """In the unit that one would say it in."""
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("hours", 3600)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds / 60:,.0f} minutes"


def sure(yes: bool) -> None:
    """Raises `SettingsError` unless whoever sits at the terminal wants it. Nobody is asked who has said --yes, or where
    a launcher has started this: its ranks have no keyboard, and the wrapper has asked before."""
    if yes or "RANK" in os.environ or not can_be_asked():
        return
    if not agreed():
        raise SettingsError("not started: take a GPU, a smaller --base_model, or --yes")
