"""Which pages can be trained on: read, cleaned, short enough, and none of them twice.

    page = check_page(name, screenshot, html, settings, count_tokens)       # a dict of PAGE_FIELDS; BadPage
    check_new(page, seen, sizes, pages_with, is_held_out=False)             # BadPage for a duplicate

Nothing here knows of models.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from training.cleaning import clean_html, cleaning_steps, visible_text
from training.dataset import BadPage
from use_model_from_hub import PictureError, extract_html, picture_size


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
    if "```" in html.partition("<")[0]:
        html = extract_html(html)
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


def check_new(
    page: dict[str, Any],
    seen: set[bytes],
    sizes: list[int],
    pages_with: dict[Shingle, list[int]],
    is_held_out: bool,
) -> None:
    """BadPage for a duplicate of any page, or a near-duplicate of a held-out one: word 3-shingles with a Jaccard
    similarity of 0.8 and more (Broder, 1997), found by an index from shingle to held-out pages.

    0.7 where most shingles are characters: two texts that share 90 % come to 0.82, less a few shingles for every place
    in which they differ, which counts in a short page. Others stay far below.
    """
    html = re.sub(r"\s+", " ", re.sub(r">\s+<", "><", page["html"]))
    hashes = {hashlib.sha256(content).digest() for content in (page["screenshot"], html.encode())}
    if seen & hashes:
        raise BadPage("duplicate", "the screenshot or the html of an earlier page")
    shingles = _shingles(html)
    shared = Counter(other for shingle in shingles for other in pages_with.get(shingle, ()))
    alike = 0.7 if 2 * sum(isinstance(shingle, str) for shingle in shingles) > len(shingles) else 0.8
    if not is_held_out and any(both >= alike * (len(shingles) + sizes[other] - both) for other, both in shared.items()):
        raise BadPage("like a held-out page", "nearly the same text")
    seen |= hashes
    for shingle in shingles if is_held_out else ():
        pages_with[shingle].append(len(sizes))
    sizes.append(len(shingles))
