"""Which pages can be trained on: read, cleaned, short enough, and none of them twice.

    page = check_page(name, screenshot, html, settings, count_tokens)       # a dict of PAGE_FIELDS; BadPage
    marks = marks_of(page)                                  # by which duplicates.py tells it from all others

Nothing here knows of models.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from training.cleaning import clean_html, cleaning_steps, visible_text
from training.dataset import BadPage
from use_model_from_hub import PictureError, extract_html, page_in_fence, picture_size


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
    """(width, height) of a PNG, JPEG or WebP as it is shown to a model: upright. BadPage when it is damaged and, before
    anything is decoded, a bomb. 10 ms for a PNG of 1,280 x 2,000 pixels, 2 ms for a JPEG."""
    try:
        return picture_size(data)
    except PictureError as error:
        raise BadPage("too large" if error.too_large else "unreadable", f"{len(data):,} bytes, {error}") from error


def check_page(
    name: str, screenshot: bytes | BadPage, html: Any, settings: WantedPages, count_tokens: CountTokens
) -> dict[str, Any]:
    """The page as it is stored; BadPage, the cheap reasons first."""
    if isinstance(screenshot, BadPage):
        raise screenshot
    if not isinstance(html, str | None):
        raise BadPage("unreadable", f"html is no text but {type(html).__name__}")
    html = _as_an_answer(clean_html(html or "", cleaning_steps(settings.clean)))
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


def _as_an_answer(html: str) -> str:
    """`html` such that an answer which repeats it is taken for it whole: `extract_html` changes nothing.

    A page in a code fence, as chats hold it, comes out of it. One that begins with words (a server's warning before its
    document) would be cut as an answer that begins with chatter is: <html> before it makes the same document, for
    browsers add it anyway.
    """
    html = html.strip()
    fenced = page_in_fence(html)
    html = html if fenced is None else fenced
    return html if extract_html(html) == html else f"<html>{html}"


# Scripts that put no spaces between words, and how many of their characters in a row make a shingle: four of Chinese
# and Japanese, some two words, and seven of Thai, Lao, Burmese and Khmer, since the fewer letters a script has, the
# more of them tell texts apart (k-shingles: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.2).
_IDEOGRAPHS = "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
_UNSPACED = (
    (re.compile(f"[{_IDEOGRAPHS}\U0001b000-\U0001b16f\U00020000-\U0003ffff]"), 4),
    (re.compile("[\u0e01-\u0e4e\u0e80-\u0ece\u1000-\u103f\u1050-\u108f\u1780-\u17d3\ua9e0-\ua9ef\uaa60-\uaa7f]"), 7),
)
Shingle = tuple[str, ...] | str  # three words, or some characters of a script without spaces


def _shingles(html: str) -> set[Shingle]:
    """Every three words in a row of the visible text, and every few characters where a script puts no spaces between
    words; none under ten words, too few to tell one page from another."""
    text = visible_text(html).lower()
    found: set[Shingle] = set()
    words_worth = 0.0
    for characters, length in () if text.isascii() else _UNSPACED:
        run = "".join(characters.findall(text))
        if run:
            text = characters.sub(" ", text)
            found |= {run[place : place + length] for place in range(len(run) - length + 1)}
            words_worth += len(run) / length
    words = re.findall(r"\w+", text)
    found |= set(zip(words, words[1:], words[2:], strict=False))
    return found if len(words) + words_worth >= 10 else set()


class Marks(NamedTuple):
    """What tells a page from others, small enough to be kept or sent: `digests` of its screenshot and of its html, and
    its `shingles` (the bytes of unsigned 64-bit numbers). Two of 800,000 pages share one by chance in 1 of 10^7 runs.
    From a Jaccard similarity of `alike` on its text is nearly another's.
    """

    digests: tuple[int, int]
    shingles: bytes
    alike: float = 0.8  # of words


def marks_of(page: dict[str, Any]) -> Marks:
    """The marks of a page as check_page gives it; html that differs in white space alone has one digest.

    Its text is like another's from 0.7 on where most shingles are characters: two texts that share 90 % come to 0.82,
    less a few shingles for every place in which they differ, which counts in a short page. Others stay far below.
    """
    html = re.sub(r"\s+", " ", re.sub(r">\s+<", "><", page["html"]))
    shingles = _shingles(html)
    numbers = array("Q", {_number("\0".join(shingle).encode()) for shingle in shingles}).tobytes()
    of_characters = sum(isinstance(shingle, str) for shingle in shingles)
    alike = 0.7 if 2 * of_characters > len(shingles) else Marks._field_defaults["alike"]
    return Marks((_number(page["screenshot"]), _number(html.encode())), numbers, alike)


def _number(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
