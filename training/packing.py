"""From pages to batches: what the model is asked, what the loss sees, and rows of them that survive full memory.

    encoder = PageEncoder(processor, prompt)
    collate = PageCollator(processor, encoder, pages, chunk=4, config=model.config, packed=True)
    batch = collate([pages[0], pages[1]])

Sections: Prompt and mask, Collate, Geometry.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import use_model_from_hub as use
from training import page_costs
from training.errors import DataError, SettingsError

# -----------------------------------------------------------------------------
# Prompt and mask

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


# -----------------------------------------------------------------------------
# Collate

CHUNK_DEEPSPEED, CHUNK_FALLBACK = 16, 4  # screenshots decoded and processed at once
# What allocators say when they fail; pillow and numpy raise MemoryError, torch on a CPU a plain RuntimeError.
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(text in str(error).lower() for text in OUT_OF_MEMORY)


class PageCollator:
    """Pages to a batch, tolerant of full memory and of broken pictures, never of a missing one.

    Screenshots are decoded and processed `chunk` at a time; when memory runs out the chunk is halved, down to one, and
    doubled again after success. A page that cannot be read is replaced by another of the same dataset: ZeRO-3 waits
    for ever for a rank whose batch is shorter or has no picture. Replacements are noted in `notes_file`.
    """

    def __init__(
        self,
        processor,
        encoder: PageEncoder,
        pages,
        chunk: int,
        notes_file: Path | None = None,
        config=None,
        packed: bool = False,
        dtype=None,
    ):
        self.processor, self.encoder, self.pages, self.notes_file = processor, encoder, pages, notes_file
        self.chunk = self.largest_chunk = chunk
        self.config = config  # of the model, to count its operations; None: not counted
        self.packed = packed  # into one row; else padded rows, as every model takes them
        self.dtype = dtype  # of the pixels, which halves what travels to the GPU; None: as the processor makes them

    def __call__(self, pages: list[dict]) -> dict:
        """Returns `pixel_values` (patches, dim), `image_grid_thw` (B, 3) and what `pad` or `pack` adds."""
        import torch

        kept, features = [], []
        while len(kept) < len(pages):
            batch = pages[len(kept) : len(kept) + self.chunk]
            chunk_pages, chunk_features = self.process(batch)
            kept += chunk_pages
            features += chunk_features
        grids = torch.stack([grid for _, grid in features])
        rows = []
        for page, grid in zip(kept, grids):
            rows.append(self.encoder.encode(page["html"], int(grid.prod()) // self.encoder.merge))
        batch = {"pixel_values": torch.cat([pixels for pixels, _ in features]), "image_grid_thw": grids}
        if self.config is not None:
            sizes = zip(rows, grids.prod(dim=1).tolist())
            batch["flops"] = sum(self.flops(labels, patches) for (_, labels), patches in sizes)
        if not self.packed:
            return batch | self.pad(rows)
        if self.dtype is not None:
            batch["pixel_values"] = batch["pixel_values"].to(self.dtype)
        sizes = (grids[:, 1:] // math.isqrt(self.encoder.merge)).tolist()
        batch |= pack(rows, sizes, len(self.encoder.before), IGNORED)
        return batch | image_geometry(self.config)(grids)

    def flops(self, labels: list[int], patches: int) -> float:
        return page_costs.page_flops(self.config, len(labels), len(labels) - labels.count(IGNORED), patches)

    def pad(self, rows: list[tuple[list[int], list[int]]]) -> dict:
        """`input_ids`, `labels`, `attention_mask`, `mm_token_type_ids`, all (B, T)."""
        import torch

        longest = max(len(ids) for ids, _ in rows)
        token = self.processor.tokenizer.pad_token_id
        input_ids = torch.tensor([ids + [token] * (longest - len(ids)) for ids, _ in rows])
        lengths = torch.tensor([len(ids) for ids, _ in rows])
        return {
            "input_ids": input_ids,
            "labels": torch.tensor([row + [IGNORED] * (longest - len(row)) for _, row in rows]),
            "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
            # Without these the model's positions silently become one-dimensional (transformers 5.23).
            "mm_token_type_ids": (input_ids == self.encoder.image_token_id).long(),
        }

    def process(self, pages: list[dict]) -> tuple[list[dict], list[tuple]]:
        """As many of `pages` as fit into memory, at least one: (pages, one (pixels, grid) each)."""
        replaced, wanted = 0, pages[0]
        while True:
            pages = pages[: self.chunk]
            try:
                done = self.decode_and_process(pages)
            except Exception as error:
                if not is_out_of_memory(error) or replaced == 8:  # eight different pages: the machine is too small
                    raise
                if self.chunk == 1:
                    pages = [self.replacement(wanted, "out of memory even alone", replaced)]
                    replaced += 1
                    continue
                self.chunk = max(1, min(self.chunk, len(pages)) // 2)
                print(f"collate: memory ran out, going on with {self.chunk} screenshots at once", flush=True)
            else:
                self.chunk = min(self.largest_chunk, self.chunk * 2)
                return done

    def decode_and_process(self, pages: list[dict]) -> tuple[list[dict], list[tuple]]:
        kept, screenshots = [], []
        for wanted in pages:
            page = wanted
            for tries in range(len(self.pages) + 1):
                try:
                    screenshots.append(use.open_screenshot(page["screenshot"]))
                    break
                except ValueError as error:
                    page = self.replacement(wanted, str(error), tries)
            else:
                raise DataError("no page of the dataset can be read any more")
            kept.append(page)
        features = self.processor.image_processor(images=screenshots, return_tensors="pt")
        sizes = features["image_grid_thw"].prod(dim=1).tolist()
        return kept, list(zip(features["pixel_values"].split(sizes), features["image_grid_thw"]))

    def replacement(self, page: dict, reason: str, tries: int = 0) -> dict:
        """A page that depends on the broken one's name alone, so that every run replaces alike."""
        digest = hashlib.sha256(page["name"].encode()).digest()
        spare = self.pages[(int.from_bytes(digest[:8], "big") + tries) % len(self.pages)]
        note = {"page": page["name"], "reason": reason, "replaced_by": spare["name"]}
        print(f"collate: {json.dumps(note)}", flush=True)
        if self.notes_file:
            with self.notes_file.open("a", encoding="utf-8") as notes:
                notes.write(json.dumps(note) + "\n")
        return spare


# -----------------------------------------------------------------------------
# Geometry


def image_geometry(config) -> Callable:
    """A function from `image_grid_thw` (B, 3) to what the vision tower derives from it, as keyword arguments.

    Worked out in the data workers, it costs the GPU no wait.
    """
    vision = config.vision_config
    merge, window, patch = vision.spatial_merge_size, vision.window_size, vision.patch_size

    def geometry(grids) -> dict:
        from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

        index, windows = get_vision_window_index(grids, merge, window, patch)
        bounds = get_vision_cu_seqlens(grids)
        return {
            "image_position_ids": get_vision_position_ids(grids, merge),
            "image_cu_seqlens": bounds,
            "image_max_seqlen": int(bounds.diff().max()),
            "image_window_index": index,
            "image_cu_window_seqlens": windows,
            "image_max_window_seqlen": int(windows.diff().max()),
        }

    return geometry


def pack(rows: Sequence[tuple[list[int], list[int]]], sizes: Sequence[tuple[int, int]], before: int, ignored: int):
    """Pages as one row. `rows` (ids, labels) of each page, `sizes` (rows, columns) of each picture in tokens, which
    begins after `before` tokens. Returns `input_ids` (1, T), `position_ids` (4, 1, T), `image_places`,
    `supervised_places` and `targets` (all 1-D), `page_bounds` (pages + 1), `longest_page`."""
    import torch

    lengths = [len(ids) for ids, _ in rows]
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    labels = torch.tensor([label for _, row in rows for label in row])
    pictures = [torch.arange(height * width) + start + before for start, (height, width) in zip(starts, sizes)]
    positions = [page_positions(before, *size, length) for size, length in zip(sizes, lengths)]
    # The state at a place predicts the next token. No page begins with a supervised one, so none looks across.
    supervised = (labels != ignored).nonzero().flatten()
    return {
        "input_ids": torch.tensor([[token for ids, _ in rows for token in ids]]),
        "position_ids": torch.cat(positions, dim=1)[:, None],
        "image_places": torch.cat(pictures),
        "supervised_places": supervised - 1,
        "targets": labels[supervised],
        "page_bounds": torch.tensor(starts, dtype=torch.int32),
        "longest_page": max(lengths),
    }


def page_positions(text_before: int, rows: int, columns: int, length: int):
    """Positions (4, length) of one page: the running place, then mRoPE's time, height and width.

    Text counts on from one to the next; the picture's `rows` x `columns` tokens share one moment and spread over height
    and width from there; the text after it begins beyond the larger of the two (Qwen2-VL, Wang et al. 2024, sec. 2.1).
    """
    import torch

    picture = rows * columns
    places = torch.arange(picture)
    height, width = places // columns + text_before, places % columns + text_before
    before = torch.arange(text_before)
    after = torch.arange(length - text_before - picture) + text_before + max(rows, columns)
    moment = torch.full((picture,), text_before)
    parts = [torch.cat([before, part, after]) for part in (moment, height, width)]
    return torch.stack([torch.arange(length), *parts])
