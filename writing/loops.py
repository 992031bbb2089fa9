"""The same piece over and over, in token ids: where it began, as soon as no page would go on like that.

    repeats = Repeats(token_bytes(tokenizer), limit=4096)
    for token in answer:
        repeats.add([token])
        if found := repeats.loop():
            begin, period = found               # from token `begin` on, a piece of `period` tokens and nothing else

What pages repeat themselves was measured on 74 real ones, as they are and cleaned, and on 360 of the demo's, by Qwen's
tokenizer, over all their prefixes and all periods to 600 tokens. Their longest runs: 9 cards of 256 tokens (2,304); 5
table cells of 103 (516); 40 times a line break (79); in base64 151 tokens of one, and 359 of 8. Nothing is nested in
itself more than a few times. A loop of a model goes on to its limit. So patience costs only time, and there is plenty
of it in what is below: more copies and more tokens than any page has, for flat pieces twice and more.
"""

from __future__ import annotations

import re
from array import array
from dataclasses import dataclass

from writing.token_bytes import TokenBytes

EVERY = 16  # tokens; at multiples of it a loop is looked for, so that it does not matter how many come at once
COMPARED = 64  # tokens at the end that must have stood there one period before
DIGITS = 0xFFFFFFFF  # stands for a whole number where growing ones are looked for: beyond every id


@dataclass(frozen=True)
class Patience:
    """A piece is a loop from so many copies on, and so many tokens of them."""

    copies: int
    tokens: int


FLAT = (Patience(32, 1_024), Patience(16, 2_048))  # either of them
ROWS = (Patience(64, 2_048),)  # what a table or a list is there for
RUNS = (Patience(64, 2_048),)  # base64, white space
NESTED = (Patience(32, 128),)  # each copy opens more than it closes: no page goes on like that
# A number grows by the same in each copy. Pages count, too: the days, the years of a birth (some 120), lines.
GROWING = (Patience(160, 1_024),)
GROWING_NESTED = (Patience(48, 192),)

_ROW = re.compile(r"<(?:tr|td|th|li|option|dt|dd|col)\b", re.IGNORECASE)
_RUN = re.compile(r"[A-Za-z0-9+/=]+|\s+")
_OPENS = re.compile(r"<(/?)([a-zA-Z][^\s/>]*)[^<>]*?(/?)>")
# Void elements, and those that end where the next one begins.
_NO_END = frozenset(
    "area base br col embed hr img input link meta param source track wbr p li dt dd option optgroup tr td th tbody "
    "thead tfoot rp rt colgroup".split()
)


def nests(piece: str) -> bool:
    """Whether a piece, written again and again, opens ever more elements. Read twice over, since it may begin inside of
    a tag."""
    depth = 0
    for end, name, empty in _OPENS.findall(piece + piece):
        if name.lower() not in _NO_END and not empty:
            depth += -1 if end else 1
    return depth > 0


def patience_with(piece: str, growing: bool) -> tuple[Patience, ...]:
    """How much of `piece` is not yet a loop."""
    if nests(piece):
        return GROWING_NESTED if growing else NESTED
    if growing:
        return GROWING
    if _RUN.fullmatch(piece):
        return RUNS
    return ROWS if _ROW.search(piece + piece) else FLAT


class Tail:
    """Ids as bytes, four each, so that the end is compared with what stood before it at the speed of memory."""

    def __init__(self) -> None:
        self.bytes = bytearray()

    def __len__(self) -> int:
        return len(self.bytes) // 4

    def add(self, ids: list[int]) -> None:
        self.bytes += array("I", ids)

    def period(self, longest: int) -> int | None:
        """The smallest period, at most `longest`, of the last `COMPARED` ids and as many before them."""
        data, size = self.bytes, 4 * COMPARED
        start, stop = max(0, len(data) - size - 4 * longest), len(data) - 1
        end = data[-size:]
        while len(data) > size:
            place = data.rfind(end, start, stop)
            if place < 0:
                return None
            if place % 4 == 0:
                return (len(data) - size - place) // 4
            stop = place + size - 1
        return None

    def repeats(self, period: int, tokens: int) -> bool:
        """Whether the last `tokens` ids have that period."""
        size, shift = 4 * tokens, 4 * period
        return size <= len(self.bytes) and self.bytes[-size:-shift] == self.bytes[shift - size :]

    def begin(self, period: int) -> int:
        """The first id from which on everything has that period."""
        ids = array("I", bytes(self.bytes))
        place = len(ids) - period
        while place > 0 and ids[place - 1] == ids[place - 1 + period]:
            place -= 1
        return place


class Repeats:
    """Looks for a loop at the end of an answer of at most `limit` tokens. A loop is found at multiples of 16 tokens."""

    def __init__(self, words: TokenBytes, limit: int):
        self.words, self.longest = words, max(COMPARED, min(512, limit // 16))
        self.ids: list[int] = []
        self.exact, self.shape = Tail(), Tail()
        self.places: list[int] = []  # of each id of `shape` in the answer
        self.next_look_at_numbers = 0

    def add(self, ids: list[int]) -> None:
        """More of the answer."""
        start, digits = len(self.ids), self.words.digits
        if digits.isdisjoint(ids):
            shape, places = ids, range(start, start + len(ids))
        else:
            shape, places, in_number = [], [], start > 0 and self.ids[-1] in digits
            for place, number in enumerate(ids, start):
                is_digit = number in digits
                if not (is_digit and in_number):
                    shape.append(DIGITS if is_digit else number)
                    places.append(place)
                in_number = is_digit
        self.places += places
        self.ids += ids
        self.exact.add(ids)
        self.shape.add(shape)

    def loop(self) -> tuple[int, int] | None:
        """(the token at which a loop began, its period in tokens), of an answer that has just come to a multiple of 16
        tokens and ends in a loop."""
        if len(self.ids) % EVERY:
            return None
        period = self.exact.period(self.longest)
        if period is not None:
            return self._of(self.exact, period, growing=False)
        if len(self.ids) < self.next_look_at_numbers:
            return None
        period = self.shape.period(self.longest)
        if period is None or not (found := self._of(self.shape, period, growing=True)):
            return None
        begin, period = found
        if self._numbers_grow(begin, period):
            first = self.places[begin]
            return first, self.places[begin + period] - first
        self.next_look_at_numbers = len(self.ids) * 9 // 8  # tables of numbers are long, and reading them is not free
        return None

    def _of(self, tail: Tail, period: int, growing: bool) -> tuple[int, int] | None:
        if not tail.repeats(period, max(COMPARED + period, NESTED[0].tokens)):
            return None
        start = len(self.ids) - period if tail is self.exact else self.places[len(tail) - period]
        piece = self.words.join(self.ids[start:]).decode("utf-8", "replace")
        for patience in patience_with(piece, growing):
            if tail.repeats(period, max(patience.tokens, patience.copies * period)):
                return tail.begin(period), period
        return None

    def _numbers_grow(self, begin: int, period: int) -> bool:
        """Whether the numbers of each copy are those of the one before it and the same more, in nearly all copies."""
        marks = [place for place in range(begin, len(self.shape)) if self._is_number(place)]
        each = sum(self._is_number(place) for place in range(begin, begin + period))
        numbers = [self._number(place) for place in marks]
        copies = [numbers[place : place + each] for place in range(0, len(numbers) - each + 1, each)]
        steps = [tuple(b - a for a, b in zip(*pair)) for pair in zip(copies[1:], copies[2:])]  # the first may be cut
        steps = steps[:-1]  # the last number may not be all there
        return bool(steps) and any(steps[0]) and steps.count(steps[0]) >= 0.95 * len(steps)

    def _is_number(self, place: int) -> bool:
        return self.shape.bytes[4 * place : 4 * place + 4] == b"\xff\xff\xff\xff"

    def _number(self, place: int) -> int:
        stop = self.places[place + 1] if place + 1 < len(self.places) else len(self.ids)
        return int(self.words.join(self.ids[self.places[place] : stop])[:18])
