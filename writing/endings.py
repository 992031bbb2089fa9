"""Where an answer ends that would not end well: at its limit of tokens, in a loop, with elements left open.

    watch = Watch(tokenizer, limit=4096)            # one for each answer
    ending = watch.feed(ids)                        # as they are written, any number at once; None: go on
    ending = watch.ended()                          # the model has ended the answer itself; None: nothing is open
    answer = ids[: ending.keep] + ending.tokens     # a whole document, never longer than the limit

    help = Endings(tokenizer, limit, rows, stops)   # for transformers' generate(), with the same result
    model.generate(..., logits_processor=[..., help.closing], stopping_criteria=[help.stopping])
    help.found[row]                                 # the `Ending` of a row, or None

An answer goes on for as long as what is open in it can still be closed within the limit, and not a token less: one that
comes to its own end within the limit is not touched. Which is why the end token has no place in the limit.

What is no document: an answer that is nothing but words is left as it is, and so is one whose document begins where
there is no room left for any. A document begins as `use_model_from_hub.extract_html` finds it. To one that has no
<html> or <body> by the time it has to end, both are added there: HTML's rules let such a late tag change nothing else.
Into a body in which nothing was written goes an ellipsis, since that is where the page broke off.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from html5lib.constants import voidElements
from transformers import LogitsProcessor, StoppingCriteria

from scoring.validity import MAX_DEPTH
from use_model_from_hub import UseError
from writing.loops import EVERY, Repeats
from writing.open_elements import DOCTYPE, MARK, SPARE_DEPTH, OpenElements, Unclosable
from writing.token_bytes import token_bytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

LIMIT, LOOP, END = "limit", "loop", "end"


@dataclass(frozen=True)
class Ending:
    """The answer is its first `keep` tokens and then `tokens`. `reason` is "limit" where the limit of tokens came,
    "loop" where a piece came over and over, of which the first copy stays, and "end" where the model itself ended the
    answer or its body while elements were open, or did what nothing can close."""

    keep: int
    tokens: list[int]
    reason: str


# -----------------------------------------------------------------------------
# The document in an answer

_TAG = re.compile(r"<[a-z/!?]", re.IGNORECASE)
_DOCUMENT = re.compile(r"<!doctype html|<html[\s>]", re.IGNORECASE)
_START = re.compile(r"<!doctype html|<html[\s>]|<(?:head|body|style|meta|link|title)\b", re.IGNORECASE)
_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n", re.MULTILINE)
_TO_NEXT_END = re.compile(r"[^>]*>|[^>]+\Z")


class Document:
    """The document in the bytes of an answer, behind whatever words and code fence come before it."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.words = ""  # before it
        self.page = OpenElements()
        self.begun = self.among_words = self.over = False

    def add(self, data: bytes) -> None:
        text = self.decoder.decode(data)
        if not self.begun:
            text = self._begin(text)
        if self.over or not text:
            return
        if not self.among_words:
            self.page.feed(text)
            return
        for piece in _TO_NEXT_END.findall(text):  # what follows its </html> are words again
            self.page.feed(piece)
            self.over = self.page.complete
            if self.over:
                return

    def _begin(self, text: str) -> str:
        """What of the text belongs to the document, if it has begun."""
        self.words += text
        answer = self.words.lstrip().removeprefix("\ufeff").lstrip()
        if _TAG.match(answer):
            self.begun, self.words = True, ""
            return answer
        start = _DOCUMENT.search(self.words) and _START.search(self.words)
        tag = _TAG.search(self.words)
        if tag and len(_FENCE.findall(self.words[: tag.start()])) % 2:
            start = tag
        if start is None or answer == "<":
            return ""
        self.begun = self.among_words = True
        return self.words[start.start() :]

    @property
    def in_character(self) -> bool:
        """Whether the bytes end inside of a character."""
        return bool(self.decoder.getstate()[0])

    def closing(self, optional: bool) -> str:
        """What `OpenElements.closing` says, of the whole characters and a replacement for a part of one."""
        if not self.in_character or self.over:
            return self.page.closing(optional)
        kept = self.page.snapshot()
        try:
            self.page.feed("\ufffd")
            return self.page.closing(optional)
        finally:
            self.page.restore(kept)

    def snapshot(self) -> tuple[Any, ...]:
        flags = (self.words, self.begun, self.among_words, self.over)
        return self.decoder.getstate(), flags, self.page.snapshot()

    def restore(self, kept: tuple[Any, ...]) -> None:
        self.decoder.setstate(kept[0])
        self.words, self.begun, self.among_words, self.over = kept[1]
        self.page.restore(kept[2])


# -----------------------------------------------------------------------------
# Watching an answer

# Start tags, and what may make a document one that cannot be closed: looked at token by token.
_OPENS = re.compile(r"<(/(?:body|html|form)\b|[a-z][^\s/>]*)", re.IGNORECASE)
_DANGERS = frozenset(("/body", "/html", "/form", "plaintext", "frameset"))  # a form, once missed, is never closed
_DANGEROUS_TAIL = re.compile(r"</?(?:body|html|form|plaintext|frameset)", re.IGNORECASE)
_LONG_TAIL = 900  # characters; a tag with more attributes than html5lib can bear is longer
_AROUND_TAIL = '-->"></script></script>'  # what may come to close a tag, a comment, a script
_AROUND = f'{DOCTYPE}<html></head><body>{MARK}-->"></script></script></script></body></html>'  # beside elements


def obstacle(tokenizer: PreTrainedTokenizerFast) -> str:
    """Why documents cannot be closed in the tokens of this tokenizer; "" where they can."""
    try:
        token_bytes(tokenizer)
    except UseError as error:
        return str(error)
    return ""


class Watch:
    """Watches one answer of at most `limit` tokens, the end token not counted.

    What it says does not depend on how many tokens come at once. Most calls cost no more than a look at the bytes: only
    where an upper bound of what closing takes comes near to what is left is the document read, token by token there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, limit: int):
        self.words, self.limit = token_bytes(tokenizer), limit
        self.repeats, self.document = Repeats(self.words, limit), Document()
        self.ending: Ending | None = None
        self.read = 0  # tokens that `document` has read
        self.helpless = False  # the document began where there was no room for it
        self.around, self.around_tail = len(self.words.spell(_AROUND)), len(self.words.spell(_AROUND_TAIL))
        self._measure()

    @property
    def ids(self) -> list[int]:
        """The answer so far."""
        return self.repeats.ids

    def feed(self, ids: Sequence[int]) -> Ending | None:
        """More of the answer, without its end token: how it ends, where it must, or None."""
        ids = list(ids)
        while ids and self.ending is None:
            size = EVERY - len(self.ids) % EVERY
            self.ending = self._take(ids[:size])
            ids = ids[size:]
        return self.ending

    def ended(self) -> Ending | None:
        """The model has written its end token: how the document is closed, where it is left open, or None."""
        if self.ending is None:
            self._read_to(len(self.ids))
            page = self.document.page
            wanted = "html" in page.starts or page.tail[:5].lower() == "<html"  # else it may be a part of a page
            if self.document.begun and wanted and not self.helpless and not self._is_whole():
                self.ending = self._close(len(self.ids), END)
        return self.ending

    def _take(self, ids: list[int]) -> Ending | None:
        """At most as many tokens as there are to the next look for a loop."""
        start = len(self.ids)
        self.repeats.add(ids)
        self._expect(self.words.join(ids))
        if self._may_be_near():
            self._read_to(start)
            kept = self.cost, self.depth, self.danger, self.begun_tag, self.behind
            self._expect(self.words.join(ids))
            if self._may_be_near():
                self.cost, self.depth, self.danger, self.begun_tag, self.behind = kept
                if found := self._walk():
                    return found
        loop = self.repeats.loop()
        return self._cut(*loop) if loop else None

    # How near the limit is, at most

    def _measure(self) -> None:
        """Bounds from the document as far as it has been read."""
        page = self.document.page
        opened = [*page.stack, *page.formatting()]
        self.cost = self.around + self._spelled(opened)
        self.depth, self.danger = len(opened), self._is_dangerous()
        # A tag that is begun counts with what comes behind it.
        words = self.document.words  # empty once the document has begun
        self.begun_tag = page.tail or words[words.rfind("<") :][:40] * ("<" in words)
        self.behind = len(page.tail)

    def _spelled(self, nodes: Sequence[Any]) -> int:
        return sum(len(self.words.spell(f"</{node.name}>")) for node in nodes)

    def _expect(self, data: bytes) -> None:
        """The same with what comes next: every element that it opens twice, as formatting ones may open again."""
        text = self.begun_tag + data.decode("utf-8", "replace")
        self.behind += len(data)
        for name in _OPENS.findall(text):
            name = name.lower()
            if name in _DANGERS:
                self.danger = True
            elif name not in voidElements:
                self.cost += 2 * (len(name) + 3)
                self.depth += 1
        last = text.rfind("<")
        self.begun_tag = text[last:] if last >= 0 and len(text) - last < 40 and ">" not in text[last:] else ""

    def _may_be_near(self) -> bool:
        if self.helpless or self.document.over:
            return False
        left = self.limit - len(self.ids)
        return self.danger or left <= self.cost or self.depth >= MAX_DEPTH - SPARE_DEPTH or self.behind > _LONG_TAIL

    # Reading

    def _read_to(self, place: int) -> None:
        """Reads what has come before `place`, which is known to be far from its limit."""
        if place > self.read:
            begun = self.document.begun
            self.document.add(self.words.join(self.ids[self.read : place]))
            self.read = place
            self._measure()
            if self.document.begun and not begun:
                self.helpless = not self._can_end()

    def _walk(self) -> Ending | None:
        """Reads the rest, token by token: ends the answer before the first one behind which it could not end."""
        for place in range(self.read, len(self.ids)):
            before = self.document.snapshot()
            data = self.words.join(self.ids[place : place + 1])
            self.document.add(data)
            self.read = place + 1
            self._expect(data)
            if self._can_end():
                continue
            if self.document.begun and not before[1][1]:
                self.helpless = True
                return None
            reason = END if self._cost() is None else LIMIT
            self.document.restore(before)
            return self._close(place, reason)
        self.danger, self.behind = self._is_dangerous(), len(self.document.page.tail)
        return None

    def _is_dangerous(self) -> bool:
        """Whether the next token may make something of the document that cannot be closed, however much is left."""
        page = self.document.page
        return bool(page.broken or page.body_ended or _DANGEROUS_TAIL.match(page.tail))

    def _is_whole(self) -> bool:
        return self.document.over or self.document.page.complete

    def _can_end(self) -> bool:
        """Whether what has been read can be made a whole document with the tokens that are left."""
        document, page = self.document, self.document.page
        if not document.begun or self._is_whole():
            return True
        if page.broken:
            return False
        left = self.limit - self.read
        if (
            not (_DANGEROUS_TAIL.match(page.tail) or len(page.tail) > _LONG_TAIL or self._is_deep())
            and left > self.cost
        ):
            return True
        cost = self._cost()
        if cost is None:
            return False
        # The next tokens are counted from here: text may open formatting elements again, what is begun may come to
        # something else than it would now.
        self.depth = len(page.stack) + len(page.formatting())
        self.cost = cost + self.around_tail + len(page.tail) + self._spelled(page.formatting())
        self.begun_tag = page.tail if len(page.tail) < 40 else ""
        return cost <= left

    def _is_deep(self) -> bool:
        return len(self.document.page.stack) >= MAX_DEPTH - SPARE_DEPTH - 2

    def _cost(self) -> int | None:
        """The fewest tokens that make a whole document of what has been read; None where nothing does."""
        try:
            return len(self.words.spell(self.document.closing(optional=False)))
        except Unclosable:
            return None

    # Ending

    def _close(self, keep: int, reason: str) -> Ending | None:
        """Closes the document that has been read to `keep`: with all end tags, where there is room for them."""
        document = self.document
        if not document.begun or self._is_whole() or self.helpless:
            return Ending(keep, [], reason)
        for optional in (True, False):
            try:
                tokens = self.words.spell(document.closing(optional))
            except Unclosable:
                continue
            if len(tokens) <= self.limit - keep:
                return Ending(keep, list(tokens), reason)
        return None

    def _cut(self, begin: int, period: int) -> Ending | None:
        """Ends the answer behind the first copy of what was repeated: there, or a little before, where an element has
        begun or ended, or a rule of a style sheet."""
        ids, keep = self.ids, begin + period
        document = self.document = Document()
        document.add(self.words.join(ids[:begin]))
        fitting = None
        for place in range(begin, keep):
            data = self.words.join(ids[place : place + 1])
            document.add(data)
            page = document.page
            last = b"}" if page.raw == "style" else b">"
            if document.begun and not page.tail and data.rstrip().endswith(last):
                fitting = place + 1, document.snapshot()
        if fitting is not None:
            keep = fitting[0]
            document.restore(fitting[1])
        self.read = keep
        return self._close(keep, LOOP)


# -----------------------------------------------------------------------------
# For transformers' generate()


class CloseDocument(LogitsProcessor):
    """Has each row end as its `Watch` says, by making all other tokens impossible. It must come last, and the token
    with the highest score be taken, as greedy decoding does and `use_model_from_hub.Draw` has it."""

    def __init__(self, endings: Endings):
        self.endings = endings

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = scores.argmax(-1).tolist()
        wanted = [self.endings.next_token(row, token) for row, token in enumerate(chosen)]
        rows = [row for row, token in enumerate(chosen) if wanted[row] != token]
        if rows:
            scores = scores.clone()
            scores[rows] = float("-inf")
            scores[rows, [wanted[row] for row in rows]] = 0.0
        return scores


class StopLoops(StoppingCriteria):
    """Stops each row in which a loop was found, and calls `meanwhile` at each token."""

    def __init__(self, endings: Endings, meanwhile: Callable[[], None]):
        self.endings, self.meanwhile = endings, meanwhile

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> torch.Tensor:
        self.meanwhile()
        looped = [found is not None and found.reason == LOOP for found in self.endings.found]
        return input_ids.new_tensor(looped).bool()


class Unwatched:
    """In place of a `Watch`, where documents cannot be closed in a tokenizer's tokens: nothing is ended."""

    def __init__(self, *unused: Any):
        pass

    def feed(self, ids: Sequence[int]) -> None:
        pass

    def ended(self) -> None:
        pass


class Endings:
    """The endings of the rows of one call of generate(), whose answers may have `limit` tokens each and are ended by
    one of `stops`. `found[row]` is the `Ending` of a row that had to be ended; what generate() gives of it is right to
    `keep`, and all of it where the reason is not a loop. `meanwhile` is called at each token, and what it raises ends
    the writing."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        limit: int,
        rows: int,
        stops: Sequence[int],
        watch: Callable[..., Watch | Unwatched] = Watch,
        meanwhile: Callable[[], None] = lambda: None,
    ):
        self.watches = [watch(tokenizer, limit) for _ in range(rows)]
        self.stops = list(stops)
        self.found: list[Ending | None] = [None] * rows
        self.forced: list[list[int]] = [[] for _ in range(rows)]
        self.over = [False] * rows
        self.closing, self.stopping = CloseDocument(self), StopLoops(self, meanwhile)

    def next_token(self, row: int, token: int) -> int:
        """The token that comes next in a row for which `token` was chosen."""
        if self.over[row]:
            return self._forced(row) if self.found[row] and self.found[row].reason != LOOP else token
        watch = self.watches[row]
        ending = watch.ended() if token in self.stops else watch.feed([token])
        self.found[row], self.over[row] = ending, bool(ending) or token in self.stops
        if ending is None or ending.reason == LOOP:
            return token
        self.forced[row] = list(ending.tokens)
        return self._forced(row)

    def _forced(self, row: int) -> int:
        return self.forced[row].pop(0) if self.forced[row] else self.stops[0]
