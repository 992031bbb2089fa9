"""One page, from its HTML to the shortest target that renders to the same pixels, and its screenshot.

    record, image = make_page("index.html", html, settings, renderer, count)    # PageDropped
    suffix, file = encode(image)

Three renders suffice where nothing shows: the page as it came, normalised, and reduced. Pixels decide, so a reduction
may guess: one that is wrong costs renders, never a target that looks otherwise.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from making.browser_steps import step
from making.drops import PageDropped
from making.page_settings import Settings
from making.reductions import Draft, Item, compose, draft_of, learn, questions, reducible_items
from making.style_sheets import GREY
from making.trials import Trials, rendered
from scoring.renders import SHOT, Job, Renderer
from use_model_from_hub import MAX_PICTURE_PIXELS

MOST_PNG_PIXELS = 300_000  # of a larger screenshot PNG was never the smaller file, and took a twelfth of a page's time
MAX_CUTS = 4  # attempts to meet a token limit
MAX_SVG_CHARACTERS = 400  # of markup with what it uses; a longer drawing becomes a grey picture
MAX_TRIED_PICTURES = 200  # whose own rules are tried first; each try makes the browser lay the page out again
MAX_TURNS = 4  # in which overlapping words become transparent; more overlap where nobody could read them
MAX_LAYOUTS = 150  # to find out what an unseen piece may leave behind; each makes the browser lay the page out again

if TYPE_CHECKING:
    import numpy as np


def has_pixel(words: list[tuple[bool, int, list[list[int]]]], shown: np.ndarray, clear: list[np.ndarray]) -> list[bool]:
    """Of each word of words.js whether the picture `shown` (H, W, 3) holds it.

    `clear` are the pictures without any word and, where words overlap, without those of one turn after the other. What
    is no plain text (drawn by an SVG, or cut out of a background) counts as held.
    """
    changed = [(shown != one).any(axis=-1) if one.shape == shown.shape else None for one in clear]

    def held(boxes: list[list[int]], where: np.ndarray | None) -> bool:
        return where is None or any(
            where[max(0, top) : max(0, bottom), max(0, left) : max(0, right)].any()
            for left, top, right, bottom in boxes
        )

    return [
        bool(boxes) and (own or (held(boxes, changed[0]) and (len(changed) == 1 or held(boxes, changed[1 + turn]))))
        for own, turn, boxes in words
    ]


def shortest(draft: Draft, trials: Trials, rematch: Callable[[list[int]], list[int]]) -> tuple[str, int]:
    """The page with every reduction that leaves each pixel as it is, and how many were kept back.

    All at once first. Where that shows, elements and everything else apart, for an element that must stay has rules
    that must, too; then kinds, then halves of a kind while renders are left. `rematch` says which selectors match once
    the elements of these numbers are gone.
    """
    kinds = reducible_items(draft)
    everything = set(itertools.chain(*kinds))
    html = compose(draft, everything)
    if trials.same(html):
        return html, 0
    elements = [item for item in everything if item[0] == "element"]
    dropped, best, after = set(), "", draft.matched
    draft.matched = dict(zip(after, rematch([])))
    waiting = [group for group in (list(everything - set(elements)), elements) if group]
    shells: list[Item] = []  # of elements that must stay, what may stay of them
    while (waiting or shells) and trials.left > 1:
        if not waiting:
            waiting, shells = [shells], []
        group = waiting.pop(0)
        html = compose(draft, dropped | set(group))
        if trials.same(html):
            dropped |= set(group)
            best = html
        elif len({kind for kind, _ in group}) > 1:
            waiting += [kind for kind in kinds if kind[0][0] != "element"]
        elif len(group) == 1 and group[0][0] == "element":
            shells += [("shell", group[0][1])] if draft.shells[group[0][1]] else []
        elif len(group) > 1:
            waiting += [group[: len(group) // 2], group[len(group) // 2 :]]
            waiting.sort(key=len, reverse=True)  # the larger, the more there is to gain
    if gone := sorted(number for kind, number in dropped if kind == "element"):
        draft.matched = dict(zip(after, rematch(gone)))
        html = compose(draft, dropped)
        best = html if trials.same(html) else best
    hollow = {("element", number) for kind, number in dropped if kind == "shell"}
    return best or compose(draft, ()), len(everything - dropped - hollow)


def looked_at(
    normalised: str, window: tuple[int, int], limit: int, renderer: Renderer
) -> tuple[np.ndarray, tuple[str, str]]:
    """(the page's screenshot (H, W, 3) uint8, the steps that mark what has no pixel above `limit` px); PageDropped."""
    words = step("words", limit=limit, most_turns=MAX_TURNS)
    steps = (SHOT, words, step("clear", turn=None), SHOT)
    image, listed, _, without = rendered(renderer, Job(normalised, *window, steps=steps)).values
    if (image == image[0, 0]).all():
        raise PageDropped("blank", "every pixel has the same colour")
    clear = [without]
    if turns := max((turn for _, turn, _ in listed), default=0):
        steps = tuple(one for turn in range(turns + 1) for one in (step("clear", turn=turn), SHOT))
        clear += rendered(renderer, Job(normalised, *window, steps=(words, *steps))).values[2::2]
    flags = "".join("01"[held] for held in has_pixel(listed, image, clear))
    return image, (words, step("unseen", flags=flags, most_checks=MAX_LAYOUTS))


def drawn(
    html: str, settings: Settings, window: tuple[int, int], limit: int, renderer: Renderer
) -> tuple[str, np.ndarray, dict[str, Any]]:
    """(target, its screenshot (H, W, 3) uint8, facts) of a self-contained page, cut at `limit` px; PageDropped."""
    steps = (
        step(
            "normalise",
            scripts=settings.scripts == "run",
            grey=GREY,
            most_tried=MAX_TRIED_PICTURES,
            most_svg_characters=MAX_SVG_CHARACTERS,
        ),
        step("cut", limit=limit),
        step("extract"),
    )
    pictures, cut, extract = rendered(
        renderer, Job(html, *window, steps=steps, scripts=settings.scripts == "run")
    ).values
    if extract["shadow"]:
        raise PageDropped("shadow", "scripts have put a part of it into a shadow root")
    if not extract["text"]:
        raise PageDropped("without text", "no text in its body")
    draft = draft_of(extract)
    normalised, asked = compose(draft, ()), questions(draft)
    image, unseen = looked_at(normalised, window, settings.max_height, renderer)
    answers = rendered(renderer, Job(normalised, *window, steps=(*unseen, step("analyse", **asked)))).values
    learn(draft, asked, answers[-1], answers[-2])
    trials = Trials(renderer, window, normalised, image, settings.max_height)

    def rematch(gone: list[int]) -> list[int]:
        asked_again = step("analyse", **asked | {"gone": gone})
        return rendered(renderer, Job(normalised, *window, steps=(*unseen, asked_again))).values[-1]["after"]

    target, kept_back = shortest(draft, trials, rematch)
    facts = {"pictures": pictures, "cut": cut, "kept_back": kept_back, "renders": 3 + trials.made}
    return target, image[: settings.max_height], facts | {"normalised": normalised}


def make_page(
    name: str, html: str, settings: Settings, renderer: Renderer, count: Callable[[str], int]
) -> tuple[dict[str, Any], np.ndarray]:
    """(the page's record without its file's name, the screenshot); PageDropped.

    A target over the limit is cut higher up, until it fits.
    """
    width, limit = settings.width_of(name), settings.max_height
    limits = ((settings.max_html_tokens, count), (settings.max_html_characters, len))
    for attempt in range(MAX_CUTS + 1):
        target, image, facts = drawn(html, settings, (width, settings.height), limit, renderer)
        over = [(most, length) for most, length in limits if most is not None and length(target) > most]
        if not over:
            break
        most, length = over[0]
        fixed = sum(length(css) for css in re.findall(r"<style>.*?</style>", target, re.S))
        limit = int(min(limit, image.shape[0]) * 0.95 * (most - fixed) / max(1, length(target) - fixed))
        if attempt == MAX_CUTS or limit < 50:
            raise PageDropped("too long", f"{length(target):,} with a style sheet of {fixed:,}, {most:,} allowed")
    if image.shape[0] * image.shape[1] > MAX_PICTURE_PIXELS:  # the training would refuse it
        raise PageDropped("too long", f"{image.shape[1]:,} x {image.shape[0]:,} pixels")
    normalised = facts.pop("normalised")
    lengths = {"characters": len, "tokens": count} if settings.tokenizer else {"characters": len}
    sizes = {unit: [length(text) for text in (html, normalised, target)] for unit, length in lengths.items()}
    record = {"text": target, "width": image.shape[1], "height": image.shape[0], "viewport": width}
    return record | facts | sizes, image


def encode(image: np.ndarray) -> tuple[str, bytes]:
    """(suffix, file) of a picture (H, W, 3): lossless WebP, or PNG where that may be smaller or nothing else goes."""
    from PIL import Image

    files, picture = {}, Image.fromarray(image)
    kinds = {".png": {"compress_level": 6}, ".webp": {"lossless": True, "quality": 30, "method": 3}}
    if max(picture.size) > 16_383:  # px, which is all that WebP can hold
        del kinds[".webp"]
    elif picture.width * picture.height > MOST_PNG_PIXELS:
        del kinds[".png"]
    for suffix, options in kinds.items():
        file = io.BytesIO()
        picture.save(file, suffix[1:].upper(), **options)
        files[suffix] = file.getvalue()
    return min(files.items(), key=lambda item: len(item[1]))
