"""Write the HTML of the web page in a screenshot, with a model that this project trained.

    python use_model_from_hub.py --image page.png                         # HTML to stdout
    python use_model_from_hub.py --image page.png --output page.html
    python use_model_from_hub.py --image page.png --model ./holo1_dom_finetune_final --output page.html
    python use_model_from_hub.py --image page.png --model user/holo1_ui2dom --output page.html

The answer goes to --output (or stdout), everything else to stderr. The prompt and the limits come from the model's own
`dom_recipe.json`, so that it is asked exactly what it was trained on. This file stands alone; a copy of it lies in each
final folder, and without --model such a copy takes the model beside it. The training script's evaluation calls the
functions below, so a model is judged by what its users run.

Sections: Recipe, Screenshot, Prompt, Generation, Clean-up, Loading, Command line.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import struct
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for readers and editors; each is loaded where it is used
    import torch
    from PIL.Image import Image, Transpose
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

FINAL_FOLDER = "holo1_dom_finetune_final"
HUB_REPO = "holo1_ui2dom"

# -----------------------------------------------------------------------------
# Recipe: what the model was asked while it was trained

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
    """Everything that is not the answer goes to stderr."""
    print(message, file=sys.stderr, flush=True)


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
        self.too_large = too_large


def open_screenshot(picture: bytes) -> Image:
    """Decode a screenshot to an upright RGB `PIL.Image` of 8 bits, transparency on white: the one way in which
    training, evaluation and use see a picture. Of an animation the first frame.

    Raises `PictureError`, a `ValueError`, on another format than PNG, JPEG or WebP, on more than 20 M pixels, on a
    strip that no processor takes, and on a damaged file.
    """

    image, turn = _decode(picture)
    # What a PNG says of itself first; a chunk of somebody's own may come before it.
    shown = _in_eight_bits(image, depth=picture[picture.find(b"IHDR") + 12] if image.format == "PNG" else 8)
    if turn is not None:
        shown = shown.transpose(turn)
    shown.info = {}  # what the file said of itself: saved again, the picture would turn once more
    return shown


def picture_size(picture: bytes) -> tuple[int, int]:
    """(width, height) of what `open_screenshot` makes of it, and as strict: whatever it raises is raised here."""
    image, turn = _decode(picture, size_alone=True)
    return turned_size(image.size, turn)


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
    if size_alone:
        image = Image.new("1", size)
    return image, turn


def upright(image: Image) -> Transpose | None:
    """How to transpose a loaded picture so that it stands as browsers and viewers show it: by the orientation in its
    EXIF (JPEG, PNG, WebP); None where it stands already, and where its EXIF is damaged."""
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


def turned_size(size: tuple[int, int], turn: Transpose | None) -> tuple[int, int]:
    """(width, height) after `turn`, as `upright` gives it."""
    sideways = turn is not None and turn.name in ("ROTATE_90", "ROTATE_270", "TRANSPOSE", "TRANSVERSE")
    return size[::-1] if sideways else size


def _in_eight_bits(image: Image, depth: int) -> Image:
    """RGB, transparency on white. `depth` is the bits of a sample in the file."""
    import numpy as np
    from PIL import Image

    key = image.info.get(
        "transparency"
    )  # of a PNG without alpha: the one colour that is transparent, in the file's bits
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's convert() would clip at 255
        grey = np.asarray(image).astype(np.uint32)
        opaque = grey != key
        image = Image.fromarray(((grey * 255 + 32_767) // 65_535).astype(np.uint8))
        if isinstance(key, int):
            image.putalpha(Image.fromarray((opaque * 255).astype(np.uint8)))
    elif isinstance(key, int) and image.mode in ("1", "L"):
        image.info["transparency"] = key * {1: 255, 2: 85, 4: 17}.get(depth, 1)  # as the grey itself becomes 8 bits
    elif isinstance(key, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)  # Pillow keeps the high bytes, too
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    return image.convert("RGB")


def limit_pixels(processor: ProcessorMixin, min_pixels: int, max_pixels: int) -> None:
    """Set the range of width x height to which the processor resizes every screenshot.

    Those that merge patches into tokens (Qwen-VL) take both as areas. Others mean edges by the same words: they keep
    what was saved with them, which for a model trained by this project are the limits that it was trained under.
    """
    if hasattr(processor.image_processor, "merge_size"):
        # `size` is the one place that transformers 5 reads; `min_pixels`/`max_pixels` attributes are ignored there.
        processor.image_processor.size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}


# -----------------------------------------------------------------------------
# Prompt


def ask(processor: ProcessorMixin, prompt: str) -> str:
    """The question in the model's own chat template, image first, ending where the answer begins."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


def encode_questions(processor: ProcessorMixin, screenshots: list[Image], prompt: str) -> BatchFeature:
    """Screenshots (PIL) to model inputs: `input_ids` and `attention_mask` (B, T), padded on the left so that every
    answer starts at the same column, and what the processor makes of the pictures, by its own names: of Qwen-VL
    `pixel_values` (patches, dim), `image_grid_thw` (B, 3) and `mm_token_type_ids` (B, T)."""
    texts = [ask(processor, prompt)] * len(screenshots)
    text_options = {"padding": True, "padding_side": "left"}
    # Without mm_token_type_ids the positions silently become one-dimensional (transformers 5.23, Qwen2.5-VL). Models
    # that do not know them refuse to write with them, so the processor is asked whether its model takes them.
    if "mm_token_type_ids" in processor.model_input_names:
        text_options["return_mm_token_type_ids"] = True
    # A list for each question: some processors take a flat one for the pictures of a single question.
    return processor(text=texts, images=[[picture] for picture in screenshots], return_tensors="pt", **text_options)


# -----------------------------------------------------------------------------
# Generation


@dataclass(frozen=True)
class Request:
    """One answer that is wanted: of the screenshot that `open()` gives when its turn comes; `sample` tells the answers
    apart that are drawn for the same screenshot, and `place` is the caller's own."""

    place: int
    open: Callable[[], Image]
    sample: int = 0


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


class Progress:
    """A stopping criterion that never stops: it says every few seconds how far the answers are."""

    def __init__(self, limit: int, every_seconds: float = 5.0):
        self.limit, self.every_seconds = limit, every_seconds
        self.tokens, self.start = 0, time.monotonic()
        self.last = self.start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        import torch

        self.tokens += 1
        if time.monotonic() - self.last > self.every_seconds:
            self.last = time.monotonic()
            say(f"  {self.tokens:,} of at most {self.limit:,} tokens, {self.tokens / (self.last - self.start):.1f}/s")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def chances(screenshot: Image, recipe: Recipe, sample: int) -> torch.Tensor:
    """(max_html_tokens,) numbers from 0 to 1 in fp32, one for each token that is drawn: they depend on seed, screenshot
    and sample alone, so that an answer is the same whatever is written beside it, and in whatever order."""
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
    """A logits processor that draws: all tokens but the drawn one become impossible, and greedy decoding takes it.

    `chances` (B, tokens) of each row. torch.multinomial, which generate() would call, takes its numbers from one
    generator for the whole batch: an answer would depend on the pages beside it.
    """

    def __init__(self, chances: torch.Tensor):
        self.chances, self.start = chances, None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.start = input_ids.shape[1] if self.start is None else self.start
        token = draw(scores, self.chances[:, input_ids.shape[1] - self.start])
        return scores.new_full(scores.shape, float("-inf")).scatter_(1, token[:, None], 0.0)


def logits_processors(recipe: Recipe) -> list[Callable]:
    """transformers' own processors for what `recipe` asks, in generate()'s order, without the drawing."""
    from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

    asked = []
    if recipe.repetition_penalty != 1:
        asked.append(RepetitionPenaltyLogitsProcessor(recipe.repetition_penalty))
    if recipe.temperature > 0 and recipe.temperature != 1:
        asked.append(TemperatureLogitsWarper(recipe.temperature))
    if recipe.temperature > 0 and recipe.top_p < 1:
        asked.append(TopPLogitsWarper(recipe.top_p))
    return asked


def write_pages(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    screenshots: list[Image],
    recipe: Recipe,
    show_progress: bool = False,
    samples: Sequence[int] | None = None,
) -> list[Written]:
    """Write the HTML of a batch of screenshots (PIL) by transformers' generate(), at most `recipe.max_html_tokens`
    tokens each; `samples` numbers answers that are drawn, 0 each where it is not given."""
    import torch
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    inputs = encode_questions(processor, screenshots, recipe.prompt).to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    stops = end_tokens(model, processor)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=recipe.max_html_tokens,
        eos_token_id=stops,
        pad_token_id=processor.tokenizer.pad_token_id,
        use_cache=True,
    )
    processors = LogitsProcessorList(logits_processors(recipe))
    if recipe.temperature > 0:
        numbers = [chances(*pair) for pair in zip(screenshots, repeat(recipe), samples or repeat(0))]
        processors.append(Draw(torch.stack(numbers).to(model.device)))
    criteria = StoppingCriteriaList([Progress(recipe.max_html_tokens)] if show_progress else [])
    # transformers would have the ranks of any ZeRO-3 run wait for each other at every token, and for ever where one has
    # nothing to write. Only weights that ZeRO-3 has sharded need that.
    sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    options = {"logits_processor": processors, "stopping_criteria": criteria, "synced_gpus": sharded}
    # What `config` leaves open generate() takes from the base's own: it may sample, or punish repetition, which HTML is
    # full of.
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with torch.inference_mode():
            output = model.generate(**inputs, generation_config=config, **options)
    finally:
        model.generation_config = kept
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [written(processor, row, stops) for row in rows]


def written(processor: ProcessorMixin, row: Sequence[int], stops: Sequence[int]) -> Written:
    """The answer in the token ids `row`, which one of `stops` ends, or nothing."""
    length = next((place for place, token in enumerate(row) if token in stops), None)
    ids = row if length is None else row[:length]
    raw = processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Written(extract_html(raw), raw, len(ids), cut_off=length is None)


def end_tokens(model: PreTrainedModel, processor: ProcessorMixin) -> list[int]:
    """The tokens that end an answer: the tokenizer's end of turn and those of the model's generation configuration."""
    known = getattr(model.generation_config, "eos_token_id", None)
    known = known if isinstance(known, list) else [known]
    return sorted({token for token in [*known, processor.tokenizer.eos_token_id] if token is not None})


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
    """Take the page out of an answer.

    One that starts with a tag, a comment or a doctype is the page, whatever comes later: it stays as it is, but for
    white space at its ends. Else what stands in the code fence that its first tag is in; else, where words come before
    a document, the document to its last </html>. The stored pages are such that this changes none of them.
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
    """A folder or a Hub repository: the final folder that this file lies in, or that lies here, else this user's
    repository of the default name."""
    own = Path(__file__).parent
    if name is None and (own / RECIPE_FILE).is_file() and (own / "config.json").is_file():
        return str(own)
    if name is None:
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
        raise UseError(
            f"no folder ./{FINAL_FOLDER} here, and the Hub repository {name} needs its owner's name: "
            f"give --model USER/{name}, or log in with `hf auth login`"
        ) from error


def best_dtype(device: str):
    """bf16 on a GPU that has it, fp16 on one that has not, fp32 on a CPU."""
    import torch

    if device != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_model(source: str, recipe: Recipe, trust_remote_code: bool = False):
    """Load (model, processor) for writing, in `best_dtype`. Raises `UseError` when that is impossible."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

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
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        names = ", ".join(bad[:10])
        raise UseError(f"--model {source} lacks weights that its config.json asks for: {names}{more}; fetch it again")
    limit_pixels(processor, recipe.min_pixels, recipe.max_pixels)
    return model.to(device).eval(), processor


# -----------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--image", required=True, help="the screenshot: PNG, JPEG or WebP")
    parser.add_argument("--output", help="file for the HTML (default: stdout)")
    default = f"default: the one that this file lies beside, else ./{FINAL_FOLDER}, else {HUB_REPO}"
    parser.add_argument("--model", help=f"folder or Hub repository ({default})")
    parser.add_argument("--show_html", action="store_true", help="print the HTML also when it goes to --output")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that the model repository brings")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    # Everything that can be refused is refused before torch loads.
    try:
        screenshot = open_screenshot(Path(args.image).read_bytes())
    except OSError as error:
        raise UseError(f"--image {args.image}: {error.strerror or error}") from error
    except ValueError as error:
        raise UseError(f"--image {args.image}: {error}", code=80) from error
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise UseError(f"--output {args.output}: the folder does not exist; create it first")
    source = resolve_model(args.model)
    start = time.monotonic()
    try:
        recipe = load_recipe(source)
    except OSError as error:  # the Hub's own errors are OSErrors, too: no such repository, no network, no access
        raise UseError(f"--model {source} cannot be found: {error}") from error
    model, processor = load_model(source, recipe, args.trust_remote_code)
    say(f"{source} on {model.device} in {time.monotonic() - start:.1f} s: {json.dumps(asdict(recipe))}")
    start = time.monotonic()
    page = write_pages(model, processor, [screenshot], recipe, show_progress=True)[0]
    seconds = time.monotonic() - start
    say(f"{page.tokens:,} tokens in {seconds:.1f} s, {page.tokens / seconds:.1f} tokens/s")
    if page.cut_off:
        say(f"the page was cut off at {recipe.max_html_tokens:,} tokens and is not complete")
    if args.output:
        Path(args.output).write_text(page.html + "\n", encoding="utf-8")
        say(f"written to {args.output}")
    if args.show_html or not args.output:
        print(page.html)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        run(args)
    except UseError as error:
        say(f"error: {error}")
        return error.code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
