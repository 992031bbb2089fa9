"""Which pages can be trained on: read, cleaned, short enough, and none of them twice.

    page = check_page(name, screenshot, html, settings, count_tokens)       # a dict of PAGE_FIELDS; BadPage
    marks = marks_of(page)                                  # by which duplicates.py tells it from all others

Nothing here knows of models.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import zlib
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from training.cleaning import clean_html, cleaning_steps, visible_text
from training.dataset import BadPage
from use_model_from_hub import MAX_PICTURE_PIXELS, PICTURE_FORMATS


class WantedPages(Protocol):
    """What load_pages reads of the training's settings (training/settings.py says what each means)."""

    dataset: list[str]
    dataset_config: list[str] | None
    dataset_split: list[str] | None
    dataset_revision: list[str] | None
    image_column: list[str] | None
    html_column: list[str] | None
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


class Marks(NamedTuple):
    """What tells a page from others, small enough to be kept or sent: `digests` of its screenshot and of its html, and
    its `shingles` (the bytes of unsigned 64-bit numbers). Two of 800,000 pages share one by chance in 1 of 10^7 runs.
    """

    digests: tuple[int, int]
    shingles: bytes


def marks_of(page: dict[str, Any]) -> Marks:
    """The marks of a page as check_page gives it; html that differs in white space alone has one digest."""
    html = re.sub(r"\s+", " ", re.sub(r">\s+<", "><", page["html"]))
    shingles = {_number("\0".join(shingle).encode()) for shingle in _shingles(html)}
    return Marks((_number(page["screenshot"]), _number(html.encode())), array("Q", shingles).tobytes())


def _number(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
