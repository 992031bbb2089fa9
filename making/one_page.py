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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from making.browser_steps import step
from making.drops import PageDropped
from making.page_settings import Settings
from making.reductions import Draft, compose, draft_of, learn, questions, reducible_items
from making.style_sheets import GREY
from scoring.renders import SHOT, Job, Render, Renderer
from use_model_from_hub import MAX_PICTURE_PIXELS

CHANCE = 0.0011  # share of the pixels: what two renders of one page were seen to differ by
MAX_RENDERS = 16  # to find out which reductions stay: what is kept back costs tokens, a render time
MOST_PNG_PIXELS = 300_000  # of a larger screenshot PNG was never the smaller file, and took a twelfth of a page's time
MAX_CUTS = 4  # attempts to meet a token limit
MAX_SVG_CHARACTERS = 400  # of markup with what it uses; a longer drawing becomes a grey picture
MAX_TRIED_PICTURES = 200  # whose own rules are tried first; each try makes the browser lay the page out again

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Trials:
    """Renders a candidate and holds it against the page as it was; `left` renders may still be made."""

    renderer: Renderer
    window: tuple[int, int]  # width and height, CSS px
    image: np.ndarray  # (H, W, 3) uint8
    left: int = MAX_RENDERS
    made: int = 0

    def same(self, html: str) -> bool:
        """To the pixel. Where so few differ that it may be chance, the candidate is rendered once more."""
        for _ in range(2):
            if self.left <= 0:
                return False
            self.left -= 1
            self.made += 1
            differing = share_of_differing(rendered(self.renderer, Job(html, *self.window)).image, self.image)
            if differing == 0 or differing > 2 * CHANCE:
                return differing == 0
        return False

    def reproduces(self, html: str) -> bool:
        """Whether it renders as it did before, but for what chance explains."""
        self.made += 2
        renders = (rendered(self.renderer, Job(html, *self.window)) for _ in range(2))
        return any(share_of_differing(render.image, self.image) <= limit for render, limit in zip(renders, (0, CHANCE)))


def rendered(renderer: Renderer, job: Job) -> Render:
    """PageDropped where that fails; a page whose candidates do not render is none to learn from, either."""
    render = renderer.render(job)
    if render.failure:
        raise PageDropped("render", render.failure)
    return render


def share_of_differing(one: np.ndarray, other: np.ndarray) -> float:
    """The share, 0 to 1, of pixels in which two pictures (H, W, 3) differ; 1 where their sizes do."""
    if one.shape != other.shape:
        return 1.0
    return float((one != other).any(axis=-1).mean())


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
    while waiting and trials.left > 1:
        group = waiting.pop(0)
        html = compose(draft, dropped | set(group))
        if trials.same(html):
            dropped |= set(group)
            best = html
        elif len({kind for kind, _ in group}) > 1:
            waiting += [kind for kind in kinds if kind[0][0] != "element"]
        elif len(group) > 1:
            waiting += [group[: len(group) // 2], group[len(group) // 2 :]]
            waiting.sort(key=len, reverse=True)  # the larger, the more there is to gain
    if gone := sorted(number for kind, number in dropped if kind == "element"):
        draft.matched = dict(zip(after, rematch(gone)))
        html = compose(draft, dropped)
        best = html if trials.same(html) else best
    return best or compose(draft, ()), len(everything - dropped)


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
    image, answer = rendered(renderer, Job(normalised, *window, steps=(SHOT, step("analyse", **asked)))).values
    if (image == image[0, 0]).all():
        raise PageDropped("blank", "every pixel has the same colour")
    learn(draft, asked, answer)
    trials = Trials(renderer, window, image)

    def rematch(gone: list[int]) -> list[int]:
        asked_again = step("analyse", **asked | {"gone": gone})
        return rendered(renderer, Job(normalised, *window, steps=(asked_again,))).values[0]["after"]

    target, kept_back = shortest(draft, trials, rematch)
    if target == compose(draft, ()) and not trials.reproduces(target):
        raise PageDropped("changing", f"more than {CHANCE:.2%} of its pixels differ between renders")
    facts = {"pictures": pictures, "cut": cut, "kept_back": kept_back, "renders": 2 + trials.made}
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
