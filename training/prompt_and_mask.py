"""What the model is asked and what the loss sees: ids and labels of one page, built together.

encoder = PageEncoder(processor, prompt)
ids, labels = encoder.encode(page["html"], image_tokens=980)
print(colour_supervision(ids, labels, processor.tokenizer, encoder.image_token_id))
"""

from __future__ import annotations

from collections.abc import Callable

import use_model_from_hub as use
from training.errors import SettingsError

IGNORED = -100  # the label that no loss sees


class PageEncoder:
    """Turns a page's HTML and its number of image tokens into ids and labels, built together, never searched for.

    The question is tokenised once, in the model's own chat template, and split at its one image token. The answer is
    the HTML and the end-of-turn token; only these carry labels.
    """

    def __init__(self, processor, prompt: str):
        self.tokenizer = processor.tokenizer
        self.image_token_id = processor.image_token_id
        question = use.ask(processor, prompt)
        self.before, self.after = self.split_question(question)
        self.end = self.find_end(processor, prompt, question)
        self.merge = processor.image_processor.merge_size**2

    def tokens(self, text: str, special: bool = False) -> list[int]:
        # A page that spells out <|im_end|> must not end the answer: special tokens in HTML are plain text.
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"]

    def split_question(self, question: str) -> tuple[list[int], list[int]]:
        ids = self.tokens(question, special=True)
        if ids.count(self.image_token_id) != 1:
            raise SettingsError(
                f"the chat template asks with {ids.count(self.image_token_id)} image tokens where 1 was expected: "
                f"{question!r}; give a --base_model with a Qwen-VL chat template"
            )
        place = ids.index(self.image_token_id)
        return ids[:place], ids[place + 1 :]

    def find_end(self, processor, prompt: str, question: str) -> int:
        """The token with which the chat template ends an answer."""
        mark = "ANSWER"
        turns = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]},
            {"role": "assistant", "content": [{"type": "text", "text": mark}]},
        ]
        whole = processor.apply_chat_template(turns, tokenize=False)
        if not whole.startswith(question + mark):
            raise SettingsError("the chat template trains another question than it asks; give another --base_model")
        return self.tokens(whole[len(question + mark) :], special=True)[0]

    def encode(self, html: str, image_tokens: int) -> tuple[list[int], list[int]]:
        """Ids and labels of one page, both of length T; `IGNORED` wherever the loss does not look."""
        question = [*self.before, *[self.image_token_id] * image_tokens, *self.after]
        answer = [*self.tokens(html), self.end]
        return question + answer, [IGNORED] * len(question) + answer


def count_tokens(encoder: PageEncoder, processor) -> Callable[[str, int, int], tuple[int, int]]:
    """A function (html, width, height) -> (html tokens, image tokens), without decoding the picture."""

    def count(html: str, width: int, height: int) -> tuple[int, int]:
        patches = processor.image_processor.get_number_of_image_patches(height, width, {})
        return len(encoder.tokens(html)), patches // encoder.merge

    return count


def colour_supervision(ids: list[int], labels: list[int], tokenizer, image_token_id: int) -> str:
    """One example as text: image tokens counted, the prompt grey, what the loss sees green."""
    parts, place = [], 0
    while place < len(ids):
        supervised, picture = labels[place] != IGNORED, ids[place] == image_token_id
        end = place
        while end < len(ids) and (labels[end] != IGNORED, ids[end] == image_token_id) == (supervised, picture):
            end += 1
        text = f"[{end - place:,} image tokens]" if picture else tokenizer.decode(ids[place:end])
        colour = "32" if supervised else "34" if picture else "90"
        parts.append(f"\033[{colour}m{text}\033[0m")
        place = end
    return "".join(parts)
