"""Whether a written page is a whole document, repeats itself, or equals another; read from the text alone.

    validity("<html><body><p>Hello</p></body></html>").valid                            # True
    looping("<li>again</li>" * 100)                                                     # True
    same_html("<p>a</p> <p>b</p>", "<p>a</p><p>b</p>")                                  # True

Valid is what the HTML5 standard reads as a whole document.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import html5lib

# html5lib's time grows with the square of the depth and of a tag's attributes. Chromium nests 512 elements at most.
MAX_CHARACTERS, MAX_ATTRIBUTES, MAX_DEPTH = 1_000_000, 500, 512
UNSEEN = {"script", "style", "template", "noscript", "title", "head"}
SEEN_WITHOUT_TEXT = {"img", "input", "svg", "video", "audio", "canvas", "iframe", "hr", "textarea", "select", "object"}
SEEN_WITHOUT_TEXT |= {"embed", "math", "progress", "meter", "button"}
KIND = html5lib.constants.tokenTypes


@dataclass(frozen=True)
class Validity:
    """`valid` is `complete and closed and body_not_empty`; `reason` names the first of them that fails."""

    valid: bool
    complete: bool
    closed: bool
    body_not_empty: bool
    doctype: bool  # not part of `valid`: WebSight's pages, the default training data, have none
    reason: str | None


class RecordingTokenizer(html5lib._tokenizer.HTMLTokenizer):
    """Keeps what stands in the source, which the tree cannot tell from what the parser adds: `starts`, the names of
    start tags (and "!doctype"), and `last`, the end tag that comes last, if nothing comes after it."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.starts, self.last = set(), None
        for token in super().__iter__():
            if len(self.parser.tree.openElements) > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH}")
            if token["type"] in (KIND["StartTag"], KIND["Doctype"]):
                self.starts.add("!doctype" if token["type"] == KIND["Doctype"] else token["name"])
            if token["type"] not in (KIND["SpaceCharacters"], KIND["Comment"], KIND["ParseError"]):
                self.last = token["name"] if token["type"] == KIND["EndTag"] else None
            yield token

    def attributeNameState(self) -> bool:
        """Raises ValueError where the tag has too many."""
        if len(self.currentToken["data"]) > MAX_ATTRIBUTES:
            raise ValueError(f"a tag of over {MAX_ATTRIBUTES} attributes")
        return super().attributeNameState()


class RecordingParser(html5lib.HTMLParser):
    """With a `RecordingTokenizer`: html5lib 1.1 takes no tokenizer of one's own, so this is its `_parse` with ours."""

    def _parse(
        self, stream: str, innerHTML: bool = False, container: str = "div", scripting: bool = False, **options: Any
    ) -> None:
        self.innerHTMLMode, self.container, self.scripting = innerHTML, container, scripting
        self.tokenizer = RecordingTokenizer(stream, parser=self, **options)
        self.reset()
        self.mainLoop()  # parsed again only where the encoding changes on the way, and a string has none


def _left_open(errors: Iterable[tuple[Any, str, dict]]) -> str | None:
    """The first error of html5lib that says: something was still open when the document ended."""
    for _, code, details in errors:
        if code == "expected-one-end-tag-but-got-another" and details.get("gotName") in ("body", "html"):
            return f"<{details.get('expectedName')}> is left open"
        if "eof" in code and not code.startswith(("expected-doctype", "expected-eof", "expected-numeric")):
            return f"the text ends too early ({code})"
    return None


def _shows_something(element: Any) -> bool:
    """Whether an element (xml.etree) has text to be seen, or something that is seen without any."""
    waiting = [element]
    while waiting:  # not by recursion: pages may nest deeper than Python's stack
        node = waiting.pop()
        name = node.tag.rpartition("}")[2] if isinstance(node.tag, str) else ""
        hidden = name == "input" and node.get("type", "").lower() == "hidden"
        if name in SEEN_WITHOUT_TEXT and not hidden:
            return True
        if name and name not in UNSEEN:
            if (node.text or "").strip():
                return True
            waiting.extend(node)
        if node is not element and (node.tail or "").strip():
            return True
    return False


def validity(html: str) -> Validity:
    """Whether `html` is a whole document, read as the HTML5 standard reads it; never raises."""
    if len(html) > MAX_CHARACTERS:
        return Validity(False, False, False, False, False, f"over {MAX_CHARACTERS:,} characters")
    parser = RecordingParser(tree=html5lib.getTreeBuilder("etree"), namespaceHTMLElements=False)
    try:
        document = parser.parse(html.encode("utf-8", "replace").decode())
    except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # Too deep, or a bug of html5lib 1.1 (an AssertionError for one in 6,000 random strings of tags).
        return Validity(False, False, False, False, False, f"not parsed: {error!r}")
    body = document.find("body")
    absent = [name for name in ("html", "body") if name not in parser.tokenizer.starts]
    left_open = _left_open(parser.errors) if parser.tokenizer.last == "html" else "no </html> at the end"
    shows = body is not None and _shows_something(body)
    problems = ["no <" + "> and no <".join(absent) + ">"] if absent else []
    problems += [left_open] if left_open else []
    problems += [] if shows else ["nothing in the body"]
    doctype = "!doctype" in parser.tokenizer.starts
    return Validity(not problems, not absent, not left_open, shows, doctype, problems[0] if problems else None)


# -----------------------------------------------------------------------------
# Repetition and equality


def looping(html: str) -> bool:
    """Whether the text ends in one segment of 1 to 200 characters, repeated at least 8 times and over at least 200
    characters. A whole page of equal rows does not: it goes on after them."""
    text = html.rstrip()
    for period in range(1, 201):
        tail = text[-max(200, 8 * period) :]
        if len(tail) >= max(200, 8 * period) and tail[period:] == tail[:-period]:
            return True
    return False


def _normalised(html: str) -> str:
    # Composed, as the tokenizer reads a page: the same letters by Unicode's own word (canonical equivalence).
    return re.sub(r"> <", "><", re.sub(r"\s+", " ", unicodedata.normalize("NFC", html))).strip()


def same_html(a: str, b: str) -> bool:
    """Whether two documents are equal once runs of whitespace are one space, and none is left between tags and at the
    ends."""
    return _normalised(a) == _normalised(b)
