"""Screenshots and questions read into slots: the vision tower and the language model over what stands before an answer.

    question = question_of(processor, recipe, request)              # on a CPU, in any thread
    reader.read([question, ...], cache, [slot, ...])      # keys and values of all but each question's last token

Pages are packed into one row, as in training, but without gradients: nothing of it is kept but what slots go on with.

Shapes: T tokens and P patches of all pages that are read together; H as in kernels/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

import use_model_from_hub as use
from families.slot_layers import Captured, Pages, read_layer
from kernels.positions import page_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from writing.slots import Cache


@dataclass
class Question:
    """What is asked for `request`, as token `ids` with the screenshot's `patches` (P, pixels of one) and its `grid`
    (3,) in patches; `chances` where answers are drawn; what is `written` of the answer already, and what of its text
    was `shown`."""

    request: use.Request
    ids: list[int]
    patches: torch.Tensor
    grid: torch.Tensor
    chances: torch.Tensor | None = None
    written: list[int] = field(default_factory=list)
    shown: str = ""


def question_of(
    processor: ProcessorMixin, recipe: use.Recipe, request: use.Request, dtype: torch.dtype = torch.float32
) -> Question:
    """Opens the screenshot, whose patches become `dtype`. Raises what `request.open` raises."""
    screenshot = request.open()
    asked = use.encode_questions(processor, [screenshot], recipe.prompt)
    chances = use.chances(screenshot, recipe, request.sample) if recipe.temperature > 0 else None
    ids = asked["input_ids"][0].tolist()
    patches = asked["pixel_values"].to(dtype)
    # Pinned, a picture travels to the GPU beside its work.
    patches = patches.pin_memory() if torch.cuda.is_available() else patches
    return Question(request, ids, patches, asked["image_grid_thw"][0], chances)


class Reader:
    """Reads questions with the weights of `model`, of which `captured` is what its family says."""

    def __init__(self, model: PreTrainedModel, captured: Captured):
        self.core, self.captured = model.model, captured
        self.image_token = model.config.image_token_id

    @torch.inference_mode()
    def read(self, questions: Sequence[Question], cache: Cache, slots: Sequence[int]) -> list[int]:
        """What the slots go on with, of each question and what is written of its answer, but for the last token, which
        the first step of writing takes. Returns what mRoPE adds to the places of each answer."""
        device, merge = self.core.device, self.core.visual.spatial_merge_size
        grids = torch.stack([question.grid for question in questions])
        pictures, deep = self.captured.see([question.patches for question in questions], grids)
        rows = [(question.ids + question.written)[:-1] for question in questions]
        sizes = [(int(height) // merge, int(width) // merge) for _, height, width in grids]
        before = [question.ids.index(self.image_token) for question in questions]
        # By the sizes: an answer may have written that token, too.
        begins = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).tolist()
        image_places = torch.cat(
            [
                torch.arange(rows * columns) + begin + first
                for begin, first, (rows, columns) in zip(begins, before, sizes)
            ]
        ).to(device, non_blocking=True)
        ids = torch.tensor([token for row in rows for token in row])
        hidden = self.core.get_input_embeddings()(ids.to(device, non_blocking=True))
        hidden = hidden.index_copy(0, image_places, pictures.to(hidden.dtype))
        positions = [page_positions(start, *size, len(row)) for start, size, row in zip(before, sizes, rows)]
        pages = self.pages(hidden, torch.cat(positions, dim=1)[1:], [len(row) for row in rows], slots)
        for number, layer in enumerate(self.captured.layers):
            hidden = read_layer(layer, hidden, pages, cache.states[number])
            if number < len(deep):
                hidden = hidden.index_add(0, image_places, deep[number].to(hidden.dtype))
        return [max(size) - size[0] * size[1] for size in sizes]

    def pages(self, hidden: torch.Tensor, positions: torch.Tensor, lengths: list[int], slots: Sequence[int]) -> Pages:
        """Where tokens stand, from mRoPE's `positions` (3, T) and the `lengths` of the pages, on the device."""
        device = hidden.device
        angles = self.core.language_model.rotary_emb(hidden[None], positions[:, None].to(device, non_blocking=True))
        counts = torch.tensor(lengths)
        place, own = torch.cat([torch.arange(length) for length in lengths]), torch.tensor(list(slots))
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        places = [part.to(device, non_blocking=True) for part in (own, own.repeat_interleave(counts), place)]
        return Pages([part[0] for part in angles], bounds, lengths, *places)
