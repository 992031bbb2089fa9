"""Write the HTML of the web page in a screenshot, with a model that this project trained.

    python use_model_from_hub.py --image page.png                         # HTML to stdout
    python use_model_from_hub.py --image page.png --model user/holo1_ui2dom --output page.html
    python use_model_from_hub.py --image screenshots --output pages       # a folder; the same again goes on

The answer goes to --output (or stdout), everything else to stderr. Prompt and limits come from the model's own
`dom_recipe.json`: it is asked what it was trained on. This file stands alone; a copy lies in each final folder, and
takes the model beside it. Evaluation calls the functions below, so a model is judged by what its users run.

Sections: Recipe, Screenshot, Prompt, Generation, Clean-up, Loading, Pages, Command line.
"""

from __future__ import annotations

import argparse
import errno
import glob
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for readers and editors; each is loaded where it is used
    import torch
    from PIL.Image import Image, Transpose
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

FINAL_FOLDER = "holo1_dom_finetune_final"
HUB_REPO = "holo1_ui2dom"

# -----------------------------------------------------------------------------
# Recipe: what the model was asked while it was trained

THOUGHTS = r"\b(?:enable_)?thinking\b"  # by which Qwen3.5's and Holo2's templates let a model think before it answers
RECIPE_FILE = "dom_recipe.json"


class UseError(Exception):
    """Something the user can mend: the message names the value and the remedy. `code` is the exit code."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Recipe:
    """How a page is asked for. `min_pixels` and `max_pixels` bound width x height after resizing; tokens are the
    tokenizer's. `repetition_penalty` 1.0 and `top_p` 1.0 leave the model's own probabilities alone; `temperature` 0 is
    greedy decoding, above it answers are drawn, and `seed` says which."""

    prompt: str = "Write the complete HTML document of the web page in this screenshot."
    min_pixels: int = 3_136
    max_pixels: int = 1_003_520
    max_html_tokens: int = 4_096
    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def load_recipe(source: str, revision: str | None = None) -> Recipe:
    """Read `dom_recipe.json` of a folder or a Hub repository; the defaults, with a warning, where there is none."""
    path = Path(source) / RECIPE_FILE
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError  # the Hub says no; not: the Hub is out of reach

        try:
            path = Path(hf_hub_download(source, RECIPE_FILE, revision=revision))
        except RemoteEntryNotFoundError:
            path = Path()
    if not path.is_file():
        say(f"{source} has no {RECIPE_FILE}: it was not trained by this project, asking with the defaults")
        return Recipe()
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UseError(f"{path} is not JSON ({error}); copy it anew from the training's final folder") from error
    return Recipe(**{field.name: facts[field.name] for field in fields(Recipe) if field.name in facts})


def say(message: str) -> None:
    """Everything that is not the answer goes to stderr, above the bars that stand there."""
    from tqdm import tqdm

    (tqdm.write if sys.stderr.isatty() else print)(message + "\n", file=sys.stderr, end="")


# -----------------------------------------------------------------------------
# Screenshot

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PICTURE_PIXELS = 20_000_000  # a bomb is refused on its header, before anything is decoded
MAX_ASPECT_RATIO = 200  # Qwen2-VL's processors raise beyond it
# What Pillow 13 raises for damaged files; SyntaxError is its PNG reader's.
_DAMAGED = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, struct.error, zlib.error)


class PictureError(ValueError):
    """A picture that cannot be shown to a model; `too_large` where only its size is wrong."""

    def __init__(self, message: str, too_large: bool = False):
        super().__init__(message)
        self.too_large, self.code = too_large, 80


def open_screenshot(picture: bytes) -> Image:
    """Decode a screenshot to an upright RGB `PIL.Image` of 8 bits, transparency on white: the one way in which
    training, evaluation and use see a picture. Of an animation the first frame. Raises `PictureError` on another format
    than PNG, JPEG or WebP, on more than 20 M pixels, on a strip that no processor takes, and on a damaged file."""
    image, turn = _decode(picture)
    # What a PNG says of itself first; a chunk of somebody's own may come before it.
    shown = _in_eight_bits(image, depth=picture[picture.find(b"IHDR") + 12] if image.format == "PNG" else 8)
    shown = shown if turn is None else shown.transpose(turn)
    shown.info = {}  # what the file said of itself: saved again, the picture would turn once more
    return shown


def picture_size(picture: bytes) -> tuple[int, int]:
    """(width, height) of what `open_screenshot` makes of it, and as strict: whatever it raises is raised here."""
    image, turn = _decode(picture, size_alone=True)
    return (image if turn is None else image.transpose(turn)).size


def _decode(picture: bytes, size_alone: bool = False) -> tuple[Image, Transpose | None]:
    """The picture as it is stored, and what turns it upright; with `size_alone` that has the right `size` alone."""
    import warnings

    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs, since our own, lower limit follows, and of damaged EXIF
            image = Image.open(io.BytesIO(picture), formats=PICTURE_FORMATS)
            size = width, height = image.size
            if width * height > MAX_PICTURE_PIXELS:
                raise PictureError(f"{width:,} x {height:,} pixels, more than {MAX_PICTURE_PIXELS:,}", too_large=True)
            if max(size) >= MAX_ASPECT_RATIO * min(size):
                raise PictureError(f"{width:,} x {height:,} pixels: a strip that no processor takes")
            if size_alone:  # only decoding finds every damaged file, but a JPEG's eighth is done in a fifth of the time
                image.draft("L", (1, 1))
            image.load()
            turn = upright(image)
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(str(error), too_large=True) from error
    except Image.UnidentifiedImageError as error:  # whose message names an object in memory
        raise PictureError("not a readable PNG, JPEG or WebP picture") from error
    except _DAMAGED as error:
        raise PictureError(f"not a readable PNG, JPEG or WebP picture ({str(error)[:100]})") from error
    return (Image.new("1", size) if size_alone else image), turn


def upright(image: Image) -> Transpose | None:
    """How to transpose a loaded picture so that it stands as browsers show it, by its EXIF; None where it stands."""
    from PIL import Image as PIL_Image

    # Not image.getexif(), which also asks XMP and text chunks; browsers do not.
    exif = PIL_Image.Exif()
    try:
        exif.load(image.info.get("exif") or b"")
        orientation = exif.get(0x0112)
    except _DAMAGED:
        return None
    way = PIL_Image.Transpose
    turns = {2: way.FLIP_LEFT_RIGHT, 3: way.ROTATE_180, 4: way.FLIP_TOP_BOTTOM, 5: way.TRANSPOSE}
    turns |= {6: way.ROTATE_270, 7: way.TRANSVERSE, 8: way.ROTATE_90}
    return turns.get(orientation) if isinstance(orientation, int) else None


def _in_eight_bits(image: Image, depth: int) -> Image:
    """RGB, transparency on white. `depth` is the bits of a sample in the file."""
    import numpy as np
    from PIL import Image

    key = image.info.get("transparency")  # of a PNG without alpha: the one colour that is transparent, in its bits
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's convert() would clip at 255
        grey = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((grey * 255 + 32_767) // 65_535).astype(np.uint8))
        if isinstance(key, int):
            image.putalpha(Image.fromarray(((grey != key) * 255).astype(np.uint8)))
    elif isinstance(key, int) and image.mode in ("1", "L"):
        image.info["transparency"] = key * {1: 255, 2: 85, 4: 17}.get(depth, 1)  # as the grey itself becomes 8 bits
    elif isinstance(key, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)  # Pillow keeps the high bytes, too
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    return image.convert("RGB")


def limit_pixels(processor: ProcessorMixin, min_pixels: int, max_pixels: int) -> None:
    """Set the range of width x height to which a processor that merges patches into tokens (Qwen-VL) resizes every
    screenshot. Others mean edges by these words: they keep what was saved with them, the limits of their training."""
    if hasattr(processor.image_processor, "merge_size"):
        # The one place that transformers 5 reads; its attributes `min_pixels` and `max_pixels` are ignored.
        processor.image_processor.size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}


# -----------------------------------------------------------------------------
# Prompt


def ask(processor: ProcessorMixin, prompt: str) -> str:
    """The question in the model's own chat template, image first, thinking off, ending where the answer begins."""
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    off = dict.fromkeys(re.findall(THOUGHTS, str(processor.chat_template)), False)  # other templates complain
    return processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **off)


def encode_questions(processor: ProcessorMixin, screenshots: list[Image], prompt: str) -> BatchFeature:
    """Screenshots (PIL) to model inputs: `input_ids` and `attention_mask` (B, T), padded on the left so that every
    answer starts at the same column, and what the processor makes of the pictures, by its own names: of Qwen-VL
    `pixel_values` (patches, dim), `image_grid_thw` (B, 3) and `mm_token_type_ids` (B, T)."""
    texts = [ask(processor, prompt)] * len(screenshots)
    text_options = {"padding": True, "padding_side": "left"}
    # Without them Qwen2.5-VL's positions silently become one-dimensional (transformers 5.23); others refuse them.
    text_options |= {f"return_{name}": True for name in {"mm_token_type_ids"} & {*processor.model_input_names}}
    # A list for each question: some processors take a flat one for those of a single question.
    return processor(text=texts, images=[[picture] for picture in screenshots], return_tensors="pt", **text_options)


# -----------------------------------------------------------------------------
# Generation


@dataclass(frozen=True)
class Request:
    """One answer that is wanted: of the screenshot that `open()` gives when its turn comes, in any thread. A `UseError`
    from there becomes this request's answer, a `Failed`, and the rest goes on. `place` is the caller's."""

    place: int
    open: Callable[[], Image]
    sample: int = 0  # which of the answers that are drawn for one screenshot


@dataclass
class Written:
    """One answer: the HTML, what the model really wrote, its length in tokens, and whether it had to be stopped: at the
    limit of tokens, or where it began to loop. `closing_tokens` were not the model's, but closed what was open."""

    html: str
    raw: str
    tokens: int
    cut_off: bool
    looped: bool = False
    closing_tokens: int = 0


@dataclass
class Failed:
    """Why a page has no answer, after how many attempts, 0 where `open` raised. Who takes it for a `Written` fails."""

    error: UseError
    attempts: int = 0


def chances(screenshot: Image, recipe: Recipe, sample: int) -> torch.Tensor:
    """(max_html_tokens,) numbers from 0 to 1, one for each token that is drawn, of seed, screenshot and sample alone:
    an answer is the same whatever is written beside it."""
    import torch

    mixed = zlib.crc32(f"{recipe.seed} {sample} {screenshot.size}".encode(), zlib.crc32(screenshot.tobytes()))
    return torch.rand(recipe.max_html_tokens, generator=torch.Generator().manual_seed(mixed))


def draw(scores: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """The token (B,) of each row of `scores` (B, V) at which the sum of probabilities passes `chance` (B,)."""
    sums = scores.softmax(-1).cumsum(-1)
    whole = sums[:, -1:]
    # Below the whole sum, lest rounding draws a token behind the last one that has any probability.
    return (sums <= (chance[:, None] * whole).minimum(whole.nextafter(whole.new_zeros(())))).sum(-1)


class Draw:
    """A logits processor that draws by `chances` (B, tokens): greedy decoding takes the one token that stays possible.
    torch.multinomial has one generator for a batch: an answer would depend on the pages beside it."""

    def __init__(self, chances: torch.Tensor):
        self.chances, self.start = chances, None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.start = self.start or input_ids.shape[1]
        token = draw(scores, self.chances[:, input_ids.shape[1] - self.start])
        return scores.new_full(scores.shape, float("-inf")).scatter_(1, token[:, None], 0.0)


def logits_processors(recipe: Recipe) -> list[Callable]:
    """transformers' own processors for what `recipe` asks, in generate()'s order, without the drawing."""
    from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

    asked = [RepetitionPenaltyLogitsProcessor(recipe.repetition_penalty)] if recipe.repetition_penalty != 1 else []
    if recipe.temperature > 0:
        asked += [TemperatureLogitsWarper(recipe.temperature)] if recipe.temperature != 1 else []
        asked += [TopPLogitsWarper(recipe.top_p)] if recipe.top_p < 1 else []
    return asked


def write_pages(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    screenshots: list[Image],
    recipe: Recipe,
    samples: Sequence[int] | None = None,
    shown: Callable[[str], None] | None = None,
    endings: Callable[..., Any] | None = None,
) -> list[Written]:
    """Write the HTML of a batch of screenshots (PIL) by transformers' generate(), at most `recipe.max_html_tokens`
    tokens each; `samples` numbers answers that are drawn, 0 each where it is not given. Of a single screenshot `shown`
    gets each word as it is written. `endings(tokenizer, limit, rows, stops)` has documents end that would not:
    `writing.endings.Endings`, where this project lies beside."""
    import torch
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList, TextStreamer

    inputs = encode_questions(processor, screenshots, recipe.prompt).to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    stops = end_tokens(model, processor)
    ends = {"eos_token_id": stops, "pad_token_id": processor.tokenizer.pad_token_id}
    config = GenerationConfig(do_sample=False, max_new_tokens=recipe.max_html_tokens, use_cache=True, **ends)
    processors = LogitsProcessorList(logits_processors(recipe))
    if recipe.temperature > 0:
        numbers = [chances(*pair) for pair in zip(screenshots, repeat(recipe), samples or repeat(0))]
        processors.append(Draw(torch.stack(numbers).to(model.device)))
    streamer = TextStreamer(processor.tokenizer, True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    streamer.on_finalized_text = lambda text, stream_end=False: shown(text)
    criteria, found = StoppingCriteriaList(), repeat(None)
    if endings is not None:
        ends = endings(processor.tokenizer, recipe.max_html_tokens, len(screenshots), stops)
        processors.append(ends.closing)  # behind the drawing: it looks at what was drawn
        criteria.append(ends.stopping)
        found = ends.found
    # transformers would have the ranks of any ZeRO-3 run wait for each other at every token: sharded weights need that.
    sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    options = {"streamer": streamer if shown else None, "synced_gpus": sharded, "stopping_criteria": criteria}
    # What `config` leaves open generate() takes from the base's own: it may sample, or punish what HTML is full of.
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with torch.inference_mode():
            output = model.generate(**inputs, generation_config=config, logits_processor=processors, **options)
    finally:
        model.generation_config = kept
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [written(processor, row, stops, ending) for row, ending in zip(rows, found)]


def written(processor: ProcessorMixin, row: Sequence[int], stops: Sequence[int], ending: Any = None) -> Written:
    """The answer in the token ids `row`, which one of `stops` ends, or nothing, or what `writing.endings` has found."""
    length = next((place for place, token in enumerate(row) if token in stops), None)
    ids, reason, closing = row if length is None else row[:length], None, 0
    if ending is not None:
        ids, reason, closing = [*row[: ending.keep], *ending.tokens], ending.reason, len(ending.tokens)
    raw = processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    cut_off = length is None if ending is None else reason == "limit"
    return Written(extract_html(raw), raw, len(ids), cut_off, looped=reason == "loop", closing_tokens=closing)


def end_tokens(model: PreTrainedModel, processor: ProcessorMixin) -> list[int]:
    """The tokens that end an answer: the tokenizer's end of turn and those of the model's generation configuration."""
    known = getattr(model.generation_config, "eos_token_id", None)
    return sorted({*(known if isinstance(known, list) else [known]), processor.tokenizer.eos_token_id} - {None})


class Generating:
    """Writes pages by generate(), `batch` of them at once, half as many where memory runs out, down to one."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, recipe: Recipe, batch: int = 1, endings=None):
        self.asked, self.batch, self.endings = (model, processor, recipe), batch, endings

    def write(self, requests: Iterable[Request], shown: Shown | None = None) -> Iterator[tuple[Request, Any]]:
        """The answers in order; a page that is written alone is `shown`. Out of memory it raises for a single page."""
        requests = iter(requests)
        while some := list(islice(requests, self.batch)):
            batch, screenshots = [], []
            for request in some:
                try:
                    screenshots.append(request.open())
                    batch.append(request)
                except UseError as error:
                    yield request, Failed(error)
            if not batch:
                continue
            pieces = partial(shown, batch[0]) if shown and len(batch) == 1 else None
            samples, answers = [it.sample for it in batch], None
            model, processor, recipe = self.asked
            try:
                answers = write_pages(model, processor, screenshots, recipe, samples, pieces, self.endings)
            except Exception as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
            if answers is None:  # out of the except block, which keeps alive what the error's frames hold
                self.batch, requests = len(batch) // 2, chain(batch, requests)
                say(f"out of memory with {len(batch)} pages at once, going on with {self.batch}")
            else:
                yield from zip(batch, answers)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, a GPU's or the machine's; torch on a CPU says so in a plain RuntimeError."""
    named = {"MemoryError", "OutOfMemoryError"} & {kind.__name__ for kind in type(error).__mro__}
    words = r"out of memory|not enough memory|can(no|')t allocate memory"
    return bool(named) or (isinstance(error, RuntimeError) and bool(re.search(words, str(error).lower())))


def writer(model, processor, recipe: Recipe, batch: int | None = None, wanted: int | None = None, tell: Callable = say):
    """What writes `wanted` pages in all: with the project around it its engine where that can, and documents end."""
    batch = batch or (1 if model.device.type == "cpu" else 8)
    if project := room("writing.writer"):
        return project.writer(model, processor, recipe, batch, wanted, tell)
    return Generating(model, processor, recipe, batch)


# -----------------------------------------------------------------------------
# Clean-up

_TAG = re.compile(r"<[a-z/!?]", re.IGNORECASE)
_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n", re.MULTILINE)
_HTML_FENCE = re.compile(r"\s*```\s*(?:x?html?|xml|svg)?\s*", re.IGNORECASE)
_FENCE_END = re.compile(r"\n[ \t]*```[ \t]*(?=\n|\Z)")
_OTHER_FENCE = re.compile(r"^[ \t]*```[ \t]*\w[^\n`]*\n.*?(?:^[ \t]*```[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_START = re.compile(r"<!doctype html|<html[\s>]|<(?:head|body|style|meta|link|title)\b", re.IGNORECASE)
_DOCUMENT = re.compile(r"<!doctype html|<html[\s>]", re.IGNORECASE)
_END = re.compile(r"</html\s*>", re.IGNORECASE)


def extract_html(answer: str) -> str:
    """Take the page out of an answer. One that starts with a tag, a comment or a doctype is the page, whatever comes
    later: it stays as it is, but for white space at its ends. Else what stands in the code fence that its first tag is
    in; else, where words come before a document, the document to its last </html>. It changes none of the stored pages.
    """
    answer = answer.strip().removeprefix("\ufeff").lstrip()
    page = page_in_fence(answer)
    if page is not None:
        return page
    if _TAG.match(answer) or not _DOCUMENT.search(answer):
        return answer
    start = _START.search(answer).start()
    ends = list(_END.finditer(answer, start))
    # An unclosed document keeps its tail, but a closing fence was never part of the page.
    return answer[start : ends[-1].end()] if ends else re.sub(r"\n```\s*\Z", "", answer[start:])


def page_in_fence(answer: str) -> str | None:
    """The content of the code fence in which the first tag stands (without any tag, that of the first fence); None
    where it stands in none, or in a snippet of another language that a text shows before its page."""
    tag = _TAG.search(answer)
    fences = list(_FENCE.finditer(answer, 0, len(answer) if tag is None else tag.start()))
    if not fences or (tag is not None and len(fences) % 2 == 0):  # each second one ends what the one before began
        return None
    fence = fences[0] if tag is None else fences[-1]
    snippet = tag is not None and answer[fence.end() : tag.start()].strip()
    if snippet and not _HTML_FENCE.fullmatch(fence[0]):
        return None
    content = answer[fence.end() :]
    # A page may hold fences itself: the one ends it after which no tag comes, but in a fence of another language.
    for end in _FENCE_END.finditer(content):
        if not _TAG.search(_OTHER_FENCE.sub("", content[end.end() :])):
            return content[: end.start()].strip()
    return content.strip()


# -----------------------------------------------------------------------------
# Loading


def resolve_model(name: str | None) -> str:
    """A folder or a Hub repository: by default the one that this file lies in, or here, else this user's repository."""
    own = Path(__file__).parent
    if name is None:
        if (own / RECIPE_FILE).is_file() and (own / "config.json").is_file():
            return str(own)
        name = f"./{FINAL_FOLDER}" if Path(FINAL_FOLDER).is_dir() else HUB_REPO
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UseError(f"--model {name}: no config.json in this folder; give the final folder of a training")
        return name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UseError(f"--model {name}: no such folder; train first, or give a folder or a Hub name like user/name")
    if "/" in name:
        return name
    from huggingface_hub import whoami
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError  # httpx's or httpx2's own

    try:
        return f"{whoami()['name']}/{name}"
    except (LocalTokenNotFoundError, HTTPError, OSError) as error:
        remedy = f"give --model USER/{name}, or log in with `hf auth login`"
        raise UseError(f"no folder ./{FINAL_FOLDER} here, and {name} needs its owner's name: {remedy}") from error


def best_dtype(device: str):
    """bf16 on a GPU that has it, fp16 on one that has not, fp32 on a CPU."""
    import torch

    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16 if device == "cuda" else torch.float32


def load_model(source: str, recipe: Recipe, trust_remote_code: bool = False):
    """Load (model, processor) for writing, in `best_dtype`. Raises `UseError` when that is impossible."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of tensors, a second's worth
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"dtype": best_dtype(device), "trust_remote_code": trust_remote_code}
    # transformers fills what is not there with random numbers and only warns; told so, it does that with wrong shapes.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
        model, info = AutoModelForImageTextToText.from_pretrained(source, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise UseError(f"--model {source} cannot be loaded: {error}") from error
    unlike = [str(found[0]) for found in info["mismatched_keys"]]
    if bad := [*sorted(info["missing_keys"]), *(f"{name} (another shape)" for name in sorted(unlike))]:
        names = ", ".join(bad[:10]) + (f" and {len(bad) - 10} more" if len(bad) > 10 else "")
        raise UseError(f"--model {source} lacks weights that its config.json asks for: {names}; fetch it again")
    limit_pixels(processor, recipe.min_pixels, recipe.max_pixels)
    return model.to(device).eval(), processor


def room(name: str, flag: str = "") -> Any:
    """A module of the project; None in a copy that stands alone, where a `flag` that needs it raises `UseError`."""
    found = Path(__file__).parent.joinpath(*name.split(".")).with_suffix(".py").is_file()
    if flag and not found:
        raise UseError(f"{flag} needs {name}: run the use_model_from_hub.py of the project's repository, not a copy")
    if __name__ == "__main__":  # which is imported by its name, too: there must be one UseError
        sys.modules["use_model_from_hub"] = sys.modules[__name__]
    return importlib.import_module(name) if found else None


# -----------------------------------------------------------------------------
# Pages: which there are, where they go, and what a user sees of them meanwhile and afterwards

PREVIEW = ".preview.png"
_PICTURE = re.compile(r"(?<!\.preview)\.(png|jpe?g|webp)$", re.IGNORECASE)


@dataclass
class Page:
    """A screenshot, `-` for stdin, and where its HTML goes, None for stdout; `sha256` of the screenshot once read."""

    path: Path
    html: Path | None = None
    sha256: str = ""
    piped: bytes = b""  # which can be read only once

    def read(self) -> bytes:
        picture = self.piped if str(self.path) == "-" else self.path.read_bytes()
        self.sha256 = hashlib.sha256(picture).hexdigest()
        return picture

    def open(self) -> Image:
        """The screenshot, decoded. Raises `UseError`."""
        try:
            return open_screenshot(self.read())
        except (OSError, PictureError) as error:
            words = f"--image {self.path}: {getattr(error, 'strerror', None) or error}"
            raise UseError(words, getattr(error, "code", 2)) from error

    def opens(self) -> bool:
        with suppress(UseError):
            return bool(self.open())
        return False

    def beside(self, suffix: str) -> Path:
        return self.html.with_name(self.html.name.removesuffix(".html") + suffix)


def find_pages(images: Sequence[str], output: str | None) -> tuple[list[Page], bool]:
    """The pages of --image, and whether --output is a folder for them. Folders, to their depths, and patterns mean
    pictures there, but for hidden ones and our previews; anything else means just that, and need not be there.
    There they lie as their screenshots do below the folder that all of these share: a/x.html, b/x.html; all with
    their suffix, x.png.html, where x.png and x.jpg lie beside each other. Raises `UseError`."""
    found, bases, single = {}, [], len(images) == 1
    for image in images:
        base, pattern = Path(image), os.path.join(glob.escape(image), "**", "*")
        if not base.is_dir() and (base.exists() or not glob.has_magic(image)):
            base, hits = base.parent, [image]
        else:
            pattern, single = pattern if base.is_dir() else image, False
            while not base.is_dir():
                base = base.parent
            if not (hits := sorted(filter(_PICTURE.search, glob.glob(pattern, recursive=True)))):
                raise UseError(f"--image {image}: no .png, .jpg, .jpeg or .webp there", code=80)
        bases.append(os.path.abspath(base))
        found |= {os.path.abspath(hit): Page(Path(hit), piped=hit == "-" and sys.stdin.buffer.read()) for hit in hits}
    pages = list(found.values())
    if output is None and len(pages) > 1:
        raise UseError(f"--image: {len(pages):,} screenshots; give a folder for their pages by --output")
    if output is None or (single and not output.endswith(("/", os.sep)) and not os.path.isdir(output)):
        if output and not Path(output).absolute().parent.is_dir():
            raise UseError(f"--output {output}: the folder does not exist; create it first")
        pages[0].html = Path(output) if output else None
        pages[0].open()
        return pages, False
    if os.path.isfile(output):
        raise UseError(f"--output {output} is a file, and there may be several pages; give a folder")
    names = [os.path.relpath(place, os.path.commonpath(bases)) for place in found]
    stems = [os.path.splitext(name)[0] for name in names]
    unique = len({*map(str.casefold, stems)}) == len(stems)  # on some disks X.html is x.html
    for page, name in zip(pages, stems if unique else names):
        page.html = Path(output, name + ".html")
    return pages, True


def missing(pages: Sequence[Page], made: dict[str, Any]) -> list[Page]:
    """Those that are not there. Raises `UseError` where any was `made` otherwise, by the JSON beside it."""
    others = []
    for page in filter(lambda page: page.html.exists(), pages):
        record, _ = page.beside(".json"), page.read()
        then = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        now = {**made, "sha256": page.sha256}
        changes = [f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]
        others += [f"{page.html}: {', '.join(changes) if then else 'without a record'}"] if changes else []
    if others:
        what = f"{len(others):,} of {len(pages):,} pages stand there already, but made otherwise ({others[0]})"
        raise UseError(f"--output: {what}; add --overwrite to write all again, or give another folder")
    return [page for page in pages if not page.html.exists()]


def write_whole(path: Path, content: bytes) -> None:
    """Aside, then renamed: whoever is killed leaves a whole file or none. Raises OSError."""
    path = Path(os.path.realpath(path))
    aside = path.with_name(f".{path.name}.part")
    if path.exists() and not path.is_file():  # a device or a pipe, whose place no file may take
        path.write_bytes(content)
        return
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def keep(page: Page, answer: Written, made: dict[str, Any] | None) -> None:
    """To its file; in a folder with how it was `made`, which comes first, so that no page is there without."""
    page.html.parent.mkdir(parents=True, exist_ok=True)
    page.beside(PREVIEW).unlink(missing_ok=True)
    if made:
        page.html.unlink(missing_ok=True)
        row = {"screenshot": str(page.path), "sha256": page.sha256, **made, **asdict(answer)}
        del row["html"], row["raw"]
        write_whole(page.beside(".json"), (json.dumps(row, indent=1) + "\n").encode())
    write_whole(page.html, (answer.html + "\n").encode())


def with_bar(what: str, items: Iterable, total: int, done: int = 0) -> Iterable:
    """`items`, and on stderr how many of `total` are done: a bar on a terminal, elsewhere a line each 30 s."""
    from tqdm import tqdm

    lines = {"mininterval": 30, "bar_format": "{desc}: {n} of {total}, {remaining} left\n"}
    look = {} if sys.stderr.isatty() else lines
    return tqdm(items, desc=what, total=total, initial=done, unit="page", dynamic_ncols=True, **look)


class Shown:
    """A page while it is written: its text, where it `streams`, else every few seconds how long it is. Text waits until
    it has begun with a tag, after which `extract_html` takes nothing away: what is shown is the page."""

    def __init__(self, streams: bool):
        self.streams, self.raw, self.out, self.told = streams, "", "", 0.0

    def __call__(self, request: Request, piece: str) -> None:
        self.raw, self.told = self.raw + piece, self.told or time.monotonic()
        text = self.raw.strip().removeprefix("\ufeff").lstrip()
        if self.streams and _TAG.match(text):
            print(text[len(self.out) :], end="", flush=True)
            self.out = text
        elif not self.out and time.monotonic() - self.told > 5:
            self.told = time.monotonic()
            say(f"  {len(text):,} characters")

    def end(self, html: str) -> None:
        """The rest of the page; all of it where it ended otherwise, as one whose loop was cut off."""
        if not html.startswith(self.out):
            say("\nwhat stands above is not how the page ended; this is it:")
        print(html.removeprefix(self.out), flush=True)


def render(html: str, width: int, height: int, renderer: Any = None) -> Image:
    """The HTML in a window of so many CSS px, without scripts or network, in a browser of its own or by `renderer`; the
    project's keeps to time and memory, too. Raises `UseError`."""
    from PIL import Image

    try:
        if renders := room("scoring.renders"):
            with nullcontext(renderer) if renderer else renders.Renderer(1) as renderer:
                done = renderer.render(renders.Job(html, width, height))
            if done.failure:
                raise RuntimeError(done.failure)
            return Image.fromarray(done.image)
        from playwright.sync_api import sync_playwright

        names = "chromium-headless-shell chromium chromium-browser google-chrome".split()
        found = next(filter(None, map(shutil.which, names)), None)  # None: playwright's own
        flags = ["--proxy-server=127.0.0.1:1", "--proxy-bypass-list=<-loopback>"]
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND"]
        with sync_playwright() as playwright, playwright.chromium.launch(executable_path=found, args=flags) as browser:
            tab = browser.new_page(viewport={"width": width, "height": height}, java_script_enabled=False, offline=True)
            tab.route("**/*", lambda route: route.abort())
            tab.set_content(html, timeout=15_000)
            return open_screenshot(tab.screenshot(full_page=True, timeout=15_000, animations="disabled"))
    except Exception as error:  # playwright's own class may not be there
        remedy = "pip install playwright && playwright install chromium"
        raise UseError(f"not rendered: {' '.join(str(error).split())[:200]} ({remedy})") from error


def draw_previews(pages: Sequence[Page]) -> int:
    """Screenshot and render side by side, of each page that is there without; how many could not be drawn."""
    from PIL import Image

    failed, pages = 0, [page for page in pages if page.html.exists() and not page.beside(PREVIEW).exists()]
    renders = room("scoring.renders") if pages else None
    with renders.Renderer(1) if renders else nullcontext() as renderer:  # starting one takes longer than a page
        for page in with_bar("previews", pages, len(pages)) if pages else ():
            try:
                left, file, html = page.open(), io.BytesIO(), page.html.read_text(encoding="utf-8")
                right = render(html, max(160, left.width), min(720, left.height), renderer)
                both = Image.new("RGB", (left.width + 16 + right.width, max(left.height, right.height)), "grey")
                both.paste(left)
                both.paste(right, (left.width + 16, 0))
                both.save(file, "PNG")
                write_whole(page.beside(PREVIEW), file.getvalue())
            except (OSError, UseError) as error:
                failed += 1
                say(f"{page.html}: no preview: {error}")
    return failed


# -----------------------------------------------------------------------------
# Command line

NUMBERS = {  # flag: type, lowest, highest, help; those of the recipe take the place of its own values
    "batch": (int, 1, 4_096, "pages at once (default: 8 on a GPU, 1 on a CPU; the project's engine decides itself)"),
    "best_of": (int, 1, 64, "write so many answers, keep the one whose render is most like the screenshot"),
    "max_html_tokens": (int, 1, 1_000_000, "tokens of a page at most (this and the next: default the recipe's)"),
    "repetition_penalty": (float, 0.1, 10, "above 1 punishes tokens that were there; HTML repeats itself"),
    "temperature": (float, 0, 100, "0 takes the likeliest token; above it answers are drawn"),
    "top_p": (float, 0.001, 1, "draw from the likeliest tokens that together have this share"),
    "seed": (int, 0, 2**63 - 1, "which answers are drawn"),
    "max_pixels": (int, 3_136, MAX_PICTURE_PIXELS, "width x height at most of what a Qwen-VL model is shown"),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    several = 'screenshots, folders, patterns in quotes, "-" for stdin'
    parser.add_argument("--image", required=True, nargs="+", action="extend", help=several)
    parser.add_argument("--output", help="file for one screenshot's HTML (default and -: stdout), folder for several")
    parser.add_argument("--model", help=f"folder or Hub repository (beside this file, ./{FINAL_FOLDER}, {HUB_REPO})")
    parser.add_argument("--show_html", action="store_true", help="print the HTML also when it goes to --output")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that the model repository brings")
    parser.add_argument("--overwrite", action="store_true", help="write pages again that stand in the output folder")
    parser.add_argument("--preview", action="store_true", help=f"NAME{PREVIEW}: screenshot and render side by side")
    parser.add_argument("--server", help="URL of an OpenAI-compatible server that writes; --batch pages in flight")
    parser.add_argument("--server_model", help="the model's name there, where it has several")
    for name, (kind, *_, text) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=kind, help=text)
    args = parser.parse_args(argv)
    args.output = None if args.output == "-" else args.output
    for name, (_, low, high, _) in NUMBERS.items():
        if (value := getattr(args, name)) is not None and not low <= value <= high:
            parser.error(f"--{name} {value}: give one from {low:,} to {high:,}")
    return args


def find_recipe(args: argparse.Namespace, source: str) -> tuple[Recipe, str]:
    """The model's recipe with what was typed, and what tells its weights from others: of a folder a hash of its files'
    names, sizes and times, of the Hub the commit. Raises `UseError`."""
    from huggingface_hub import hf_hub_download

    try:
        recipe = load_recipe(source)
        commit = "" if Path(source).is_dir() else Path(hf_hub_download(source, "config.json")).parent.name
    except OSError as error:  # the Hub's own errors are OSErrors, too: no such repository, no network, no access
        raise UseError(f"--model {source} cannot be found: {error}") from error
    facts = sorted((it.name, it.stat().st_size, it.stat().st_mtime_ns) for it in Path(source).glob("*.safetensors"))
    typed = {name: value for name in asdict(recipe) if (value := getattr(args, name, None)) is not None}
    recipe = replace(recipe, **typed)
    if args.best_of and args.temperature is None and recipe.temperature == 0:
        recipe = replace(recipe, temperature=0.7)  # greedy answers would all be the same
    if recipe.temperature == 0 and {"top_p", "seed"} & {*typed}:
        raise UseError("--top_p, --seed: nothing is drawn at temperature 0; add --temperature")
    return recipe, commit or hashlib.sha256(repr(facts).encode()).hexdigest()


def write_all(args: argparse.Namespace, pages: list[Page], there: int | None, made: dict, opened: Callable) -> int:
    """Write every page by what `opened` gives, into a folder of which `there` are already, None: a single page, whose
    trouble is raised. How many failed; what is interrupted says how far it came."""
    failed, done, prints = 0, [], args.show_html or not args.output
    shown = Shown(prints and sys.stdout.isatty()) if there is None and not args.best_of else None
    requests, total = (Request(place, page.open) for place, page in enumerate(pages)), len(pages) + (there or 0)

    def kept(request: Request, answer: Written) -> None:  # of several answers when one is chosen, in any thread
        if pages[request.place].html:
            keep(pages[request.place], answer, None if there is None else made)
        done.append(answer)

    writes = opened(kept) if any(page.opens() for page in pages) else Generating(None, None, Recipe())  # loads no torch
    answers, start = writes.write(requests, shown), time.monotonic()
    try:
        for request, answer in answers if there is None or not pages else with_bar("pages", answers, total, there):
            page = pages[request.place]
            if isinstance(answer, Failed):
                failed, words = failed + 1, f"--image {page.path}: " * (answer.attempts > 0) + str(answer.error)
                if there is None:
                    raise UseError(words, answer.error.code)
                say(words)
                continue
            if not args.best_of:
                kept(request, answer)
            if shown and shown.out:
                shown.end(answer.html)
            elif prints:
                print(answer.html, flush=True)
    finally:
        tokens, seconds = sum(answer.tokens for answer in done), time.monotonic() - start
        if done:
            which = " of the answers that are kept" if args.best_of else ""
            say(f"{tokens:,} tokens{which} in {seconds:.1f} s, {tokens / max(seconds, 1e-9):,.1f} tokens/s")
        if cut := sum(answer.cut_off for answer in done):
            say(f"{cut:,} of {len(done):,} pages cut off at {made['max_html_tokens']:,} tokens and not complete")
        if looped := sum(answer.looped for answer in done):
            say(f"{looped:,} of {len(done):,} pages began to repeat themselves and were cut there")
        if there is not None:
            say(f"{args.output}: {there:,} of {total:,} pages were there, {len(done):,} new, {failed:,} failed")
        elif args.output and done:
            say(f"written to {args.output}")
    return failed


def run(args: argparse.Namespace) -> int:
    """The exit code, 80 where some page is not there. What can be refused is refused before torch loads."""
    pages, into_folder = find_pages(args.image, args.output)
    choosing = room("writing.choosing", "--best_of") if args.best_of else None
    if args.preview and not args.output:
        raise UseError("--preview: give --output, beside which the picture will lie")
    if args.preview or choosing:
        render("<p>page</p>", 160, 64)  # is there a browser?
    source = resolve_model(args.model)
    recipe, weights = find_recipe(args, source)
    asked = args.server_model, args.batch or 16
    server = args.server and room("writing.server", "--server").Server(args.server, recipe, *asked, source=source)
    made = {"weights": weights, "server": server and f"{server.url} {server.model}", "best_of": args.best_of}
    made |= asdict(recipe)
    todo = missing(pages, made) if into_folder and not args.overwrite else pages

    def opened(kept: Callable):
        start, writes = time.monotonic(), server
        if not server:
            model, processor = load_model(source, recipe, args.trust_remote_code)
            say(f"{source} on {model.device} in {time.monotonic() - start:.1f} s: {json.dumps(asdict(recipe))}")
            writes = writer(model, processor, recipe, args.batch, len(todo) * (args.best_of or 1))
        return choosing.BestOf(writes, args.best_of, kept) if choosing else writes

    failed = write_all(args, todo, len(pages) - len(todo) if into_folder else None, made, opened)
    failed += draw_previews(pages) if args.preview else 0  # last: no GPU waits for a browser
    return 80 if failed else 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return run(args)
    except UseError as error:
        say(f"error: {error}")
        return error.code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        short = is_out_of_memory(error)
        if not short and not isinstance(error, OSError):
            raise
        say(f"error: {error}" + ("; lower --max_pixels or --max_html_tokens" if short else ""))
        return 83 if short else 81 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that nothing half-written is left
    sys.exit(main())
