"""Which pages can be trained on: read, cleaned, short enough, and none of them twice.

    page = check_page(name, screenshot, html, settings, count_tokens)       # a dict of PAGE_FIELDS; BadPage
    check_new(page, seen, sizes, pages_with, is_held_out=False)             # BadPage for a duplicate

Nothing here knows of models.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from training.cleaning import clean_html, cleaning_steps, visible_text
from training.dataset import BadPage
from use_model_from_hub import MAX_PICTURE_PIXELS, PICTURE_FORMATS


class WantedPages(Protocol):
    """What load_pages reads of the training's settings (training/settings.py says what each means)."""

    dataset: str
    dataset_config: str | None
    dataset_split: str | None
    dataset_revision: str | None
    image_column: str | None
    html_column: str | None
    clean: str
    num_samples: int
    eval_pages: int
    max_html_tokens: int
    max_bad_share: float


MAX_ASPECT_RATIO = 200  # Qwen2-VL's processors raise beyond it
PAGE_FIELDS = {
    "name": "string",
    "screenshot": "binary",
    "html": "string",
    "width": "int32",
    "height": "int32",
    "html_tokens": "int32",
    "image_tokens": "int32",
}
CountTokens = Callable[[str, int, int], tuple[int, int]]  # (html, width, height) -> (html tokens, image tokens)


def screenshot_size(data: bytes) -> tuple[int, int]:
    """(width, height) of a PNG, JPEG or WebP. BadPage when it is damaged and, before anything is decoded, a bomb."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PICTURE_PIXELS:
                raise BadPage("too large", f"{width:,} x {height:,} pixels")
            if max(width, height) >= MAX_ASPECT_RATIO * min(width, height):
                raise BadPage("unreadable", f"{width:,} x {height:,} pixels: a strip that no processor takes")
            # Only decoding finds every damaged file: 10 ms for 1,280 x 2,000 pixels, 2 ms for a JPEG at an eighth.
            picture.draft("L", (1, 1))
            picture.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadPage("too large", str(error)) from error
    except (OSError, SyntaxError, ValueError, TypeError, IndexError, struct.error, zlib.error) as error:
        raise BadPage("unreadable", f"{len(data):,} bytes, no whole PNG, JPEG or WebP: {error}") from error
    return width, height


def check_page(
    name: str, screenshot: bytes | BadPage, html: Any, settings: WantedPages, count_tokens: CountTokens
) -> dict[str, Any]:
    """The page as it is stored; BadPage, the cheap reasons first."""
    if isinstance(screenshot, BadPage):
        raise screenshot
    if not isinstance(html, str | None):
        raise BadPage("unreadable", f"html is no text but {type(html).__name__}")
    html = clean_html(html or "", cleaning_steps(settings.clean)).strip()
    if not re.search("<[a-z]", html, re.I):
        raise BadPage("empty", f"no element in {html[:40]!r}")
    if html != html.encode(errors="replace").decode():
        raise BadPage("unreadable", "html holds half a character (a lone surrogate)")
    width, height = screenshot_size(screenshot)
    # No page's tokens hold 64 characters on average; one of many megabytes need not be counted.
    html_tokens, image_tokens = len(html) // 64, 0
    if html_tokens <= settings.max_html_tokens:
        html_tokens, image_tokens = count_tokens(html, width, height)
    if html_tokens > settings.max_html_tokens:
        raise BadPage("too long", f"{html_tokens:,} tokens of html, {settings.max_html_tokens:,} allowed")
    return dict(zip(PAGE_FIELDS, (name, screenshot, html, width, height, html_tokens, image_tokens), strict=True))


def _shingles(html: str) -> set[tuple[str, ...]]:
    """Every three words in a row of the visible text; none under ten words, too few to tell one page from another."""
    words = re.findall(r"\w+", visible_text(html).lower())
    return set(zip(words, words[1:], words[2:], strict=False)) if len(words) >= 10 else set()


def check_new(
    page: dict[str, Any],
    seen: set[bytes],
    sizes: list[int],
    pages_with: dict[tuple[str, ...], list[int]],
    is_held_out: bool,
) -> None:
    """BadPage for a duplicate of any page, or a near-duplicate of a held-out one: word 3-shingles with a Jaccard
    similarity of 0.8 and more (Broder, 1997), found by an index from shingle to held-out pages."""
    html = re.sub(r"\s+", " ", re.sub(r">\s+<", "><", page["html"]))
    hashes = {hashlib.sha256(content).digest() for content in (page["screenshot"], html.encode())}
    if seen & hashes:
        raise BadPage("duplicate", "the screenshot or the html of an earlier page")
    shingles = _shingles(html)
    shared = Counter(other for shingle in shingles for other in pages_with.get(shingle, ()))
    if not is_held_out and any(both >= 0.8 * (len(shingles) + sizes[other] - both) for other, both in shared.items()):
        raise BadPage("like a held-out page", "nearly the same text")
    seen |= hashes
    for shingle in shingles if is_held_out else ():
        pages_with[shingle].append(len(sizes))
    sizes.append(len(shingles))
