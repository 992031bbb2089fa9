"""The bytes of each token, and the fewest tokens for a text.

    words = token_bytes(tokenizer)
    words.of[15]                                    # b"0"
    words.spell("</p></body></html>")               # the ids of the fewest tokens that give this text

Of byte-level tokenizers alone, as Qwen's are: a token of theirs is a string of bytes, wherever it stands.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from use_model_from_hub import UseError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LONGEST = 32  # bytes of a token that may stand in closing text; longer ones are runs of white space and rulers


def byte_letters() -> dict[str, int]:
    """The letter that a byte-level vocabulary writes for each byte (GPT-2's `bytes_to_unicode`): printable ones as they
    are, all others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + place): byte for place, byte in enumerate(sorted({*range(256)} - {*printable}))}


class TokenBytes:
    """`of[id]` is the bytes that a token adds to the answer: none for special ones, which decoding skips."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
        if decoder.get("type") != "ByteLevel":
            raise UseError(
                f"a tokenizer with the decoder {decoder.get('type')} is none of bytes: documents cannot be closed in "
                "its tokens; write without endings"
            )
        letters = byte_letters()
        vocabulary = tokenizer.get_vocab()
        added = tokenizer.added_tokens_decoder
        self.of = [b""] * (max(vocabulary.values()) + 1)
        for text, number in vocabulary.items():
            if number in added:
                self.of[number] = b"" if added[number].special else added[number].content.encode()
            else:
                self.of[number] = bytes(letters[letter] for letter in text)
        # Never an added token: a chat's own marks, which a model reads as something else than text.
        self.known = {
            word: number for number, word in enumerate(self.of) if number not in added and 0 < len(word) <= LONGEST
        }
        self.digits = frozenset(number for number, word in enumerate(self.of) if word.isdigit())
        self.spell = lru_cache(50_000)(self._spell)

    def join(self, ids: list[int]) -> bytes:
        """The bytes of several tokens; those beyond the vocabulary, which embeddings are padded with, have none."""
        try:
            return b"".join([self.of[number] for number in ids])
        except IndexError:
            return b"".join(self.of[number] for number in ids if number < len(self.of))

    def _spell(self, text: str) -> tuple[int, ...]:
        """The ids of the fewest tokens that give `text`. The tokenizer's own may be more by a few, but a document that
        is complete must never be thought to need more tokens for its end than it has."""
        data, known = text.encode(), self.known
        end = len(data)
        fewest, first = [0] * (end + 1), [0] * end  # of the text from each byte on
        for start in range(end - 1, -1, -1):
            best = end + 1
            for stop in range(start + 1, min(end, start + LONGEST) + 1):
                number = known.get(data[start:stop])
                if number is not None and fewest[stop] < best:
                    best, first[start] = fewest[stop], stop
            fewest[start] = best + 1
        ids, place = [], 0
        while place < end:
            ids.append(known[data[place : first[place]]])
            place = first[place]
        return tuple(ids)


_KNOWN: WeakKeyDictionary = WeakKeyDictionary()


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> TokenBytes:
    """`TokenBytes`, made once for each tokenizer: it takes a quarter of a second for 150,000 tokens. Raises `UseError`
    where tokens are not bytes."""
    if tokenizer not in _KNOWN:
        _KNOWN[tokenizer] = TokenBytes(tokenizer)
    return _KNOWN[tokenizer]
