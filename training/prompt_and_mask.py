"""What the model is asked and what the loss sees: ids and labels of one page, built together.

    encoder = PageEncoder(processor, prompt, family_of(config))
    (picture,) = encoder.family.pictures(processor, [screenshot])
    ids, labels = encoder.encode(page["html"], picture.ids)
    print(colour_supervision(ids, labels, processor.tokenizer, encoder.image_token_id))

How a screenshot becomes ids is the family's; the rest is the processor's own chat template and tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import use_model_from_hub as use
from families.family import Family
from training.errors import PipelineError, SettingsError

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

IGNORED = -100  # the label that no loss sees


class PageEncoder:
    """Turns a page's HTML and the ids of its screenshot into ids and labels, built together, never searched for.

    The question is tokenised once, in the model's own chat template, and split at its one image token. The answer is
    the HTML and the end-of-turn token; only these carry labels. Raises `SettingsError` for a chat template that shows
    no image, or several, and for one that trains another question than it asks.
    """

    def __init__(self, processor: ProcessorMixin, prompt: str, family: Family):
        self.tokenizer, self.family = processor.tokenizer, family
        self.image_token_id: int = processor.image_token_id
        question = use.ask(processor, prompt)
        self.before, self.after = self.split_question(question)
        self.question_tokens = len(self.before) + len(self.after)  # without the screenshot's
        self.lead, self.end = self.answer_frame(processor, prompt, question)

    def tokens(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text, without any added; with `special`, what spells a special token becomes one."""
        # A page that spells out <|im_end|> must not end the answer: special tokens in HTML are plain text.
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special)["input_ids"]

    def split_question(self, question: str) -> tuple[list[int], list[int]]:
        """The ids before and after the one image token. Raises `SettingsError` for none or several."""
        ids = self.tokens(question, special=True)
        if ids.count(self.image_token_id) != 1:
            raise SettingsError(
                f"the chat template asks with {ids.count(self.image_token_id)} image tokens where 1 was expected: "
                f"{question!r}; give a --base_model whose chat template shows one image"
            )
        place = ids.index(self.image_token_id)
        return ids[:place], ids[place + 1 :]

    def answer_frame(self, processor: ProcessorMixin, prompt: str, question: str) -> tuple[str, int]:
        """What the chat template puts around an answer: the blank before it, if any, and the token that ends it."""
        mark = "ANSWER"
        turns = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]},
            {"role": "assistant", "content": [{"type": "text", "text": mark}]},
        ]
        whole = processor.apply_chat_template(turns, tokenize=False)
        lead, found, rest = whole.removeprefix(question).partition(mark)
        # A blank is part of the answer, as the base has learned it ("Assistant: ..." to the question "Assistant:").
        if not (whole.startswith(question) and found) or lead.strip():
            raise SettingsError("the chat template trains another question than it asks; give another --base_model")
        return lead, self.tokens(rest, special=True)[0]

    def html_tokens(self, html: str) -> int:
        """Supervised tokens of a page, without the end of the turn."""
        return len(self.tokens(self.lead + html))

    def encode(self, html: str, image_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids and labels of one page, both of length T; `IGNORED` wherever the loss does not look."""
        question = [*self.before, *image_ids, *self.after]
        answer = [*self.tokens(self.lead + html), self.end]
        return question + answer, [IGNORED] * len(question) + answer


def count_tokens(encoder: PageEncoder, processor: ProcessorMixin) -> Callable[[str, int, int], tuple[int, int]]:
    """A function (html, width, height) -> (html tokens, image tokens), without decoding the picture."""

    def count(html: str, width: int, height: int) -> tuple[int, int]:
        return encoder.html_tokens(html), encoder.family.image_tokens(processor, width, height)

    return count


def colour_supervision(
    ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase, image_token_id: int, colours: bool = True
) -> str:
    """One example as text: image tokens counted, the prompt grey, what the loss sees green; without `colours`, for a
    file, in words."""
    parts, place = [], 0
    while place < len(ids):
        supervised, picture = labels[place] != IGNORED, ids[place] == image_token_id
        end = place
        while end < len(ids) and (labels[end] != IGNORED, ids[end] == image_token_id) == (supervised, picture):
            end += 1
        text = f"[{end - place:,} image tokens]" if picture else tokenizer.decode(ids[place:end])
        colour = "32" if supervised else "34" if picture else "90"
        word = "[supervised] " if supervised else "" if picture else "[not supervised] "
        parts.append(f"\033[{colour}m{text}\033[0m" if colours else f"\n{word}{text}")
        place = end
    return "".join(parts)


def check_same_question(
    encoder: PageEncoder, processor: ProcessorMixin, screenshots: Sequence[Image], prompt: str
) -> None:
    """Raise `PipelineError` where training would ask another question than use does, image tokens included.

    Both build it their own way, and a model trained on another question writes worse pages without a word of it.
    """
    asked = use.encode_questions(processor, list(screenshots), prompt)
    for picture, row, mask in zip(
        encoder.family.pictures(processor, list(screenshots)),
        asked["input_ids"].tolist(),
        asked["attention_mask"].tolist(),
    ):
        ids, labels = encoder.encode("", picture.ids)
        question = ids[: next(index for index, label in enumerate(labels) if label != IGNORED)]
        used = [token for token, kept in zip(row, mask) if kept]
        if question != used:
            raise PipelineError(
                f"training would ask with {len(question)} tokens what use_model_from_hub.py asks with {len(used)}: "
                "`pictures` of the family in families must give the processor's own tokens of an image"
            )
