"""How alike two pages look and are built, and how good a written page is: matched text blocks, structure, validity.

    python page_scores.py reference.html prediction.html --json -
    python page_scores.py references/ predictions/ --report report.html --json scores.json
    python page_scores.py holo1_dom_finetune_output/evaluation --report report.html      # what a training has written

    with Renderer() as renderer:
        score(reference_html, prediction_html, renderer).overall

Chromium renders both pages, safely (scoring/renders.py). The scores are those of Design2Code (Si et al., NAACL 2025),
TreeBLEU (Gui et al., WebCode2M, 2025) and SSIM (Wang et al., 2004); CLIP's where its weights are at hand. Before every
run the scorer proves itself (`prove`). Needs html5lib, numpy, scikit-image with scipy, and cydifflib; torch and
transformers for CLIP only.

Sections: Validity, Repetition and equality, Blocks, Matching, CLIP, Scores, Proof, Comparison, Many pages, Command
line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from scoring.renders import SHOT, BrowserMissing, Job, Render, Renderer

# -----------------------------------------------------------------------------
# Validity

# html5lib's time grows with the square of the depth and of a tag's attributes. Chromium nests 512 elements at most.
MAX_CHARACTERS, MAX_ATTRIBUTES, MAX_DEPTH = 1_000_000, 500, 512
UNSEEN = {"script", "style", "template", "noscript", "title", "head"}
SEEN_WITHOUT_TEXT = {"img", "input", "svg", "video", "audio", "canvas", "iframe", "hr", "textarea", "select", "object"}
SEEN_WITHOUT_TEXT |= {"embed", "math", "progress", "meter", "button"}


@dataclass(frozen=True)
class Validity:
    """`valid` is `complete and closed and body_not_empty`; `reason` names the first of them that fails."""

    valid: bool
    complete: bool
    closed: bool
    body_not_empty: bool
    doctype: bool  # not part of `valid`: WebSight's pages, the default training data, have none
    reason: str | None


@lru_cache(maxsize=1)
def _recording_parser() -> type:
    import html5lib

    kind = html5lib.constants.tokenTypes

    class RecordingTokenizer(html5lib._tokenizer.HTMLTokenizer):
        """Keeps what stands in the source, which the tree cannot tell from what the parser adds."""

        def __iter__(self):
            self.starts, self.last = set(), None
            for token in super().__iter__():
                if len(self.parser.tree.openElements) > MAX_DEPTH:
                    raise ValueError(f"nested deeper than {MAX_DEPTH}")
                if token["type"] in (kind["StartTag"], kind["Doctype"]):
                    self.starts.add("!doctype" if token["type"] == kind["Doctype"] else token["name"])
                if token["type"] not in (kind["SpaceCharacters"], kind["Comment"], kind["ParseError"]):
                    self.last = token["name"] if token["type"] == kind["EndTag"] else None
                yield token

        def attributeNameState(self):
            if len(self.currentToken["data"]) > MAX_ATTRIBUTES:
                raise ValueError(f"a tag of over {MAX_ATTRIBUTES} attributes")
            return super().attributeNameState()

    class RecordingParser(html5lib.HTMLParser):
        def mainLoop(self):
            self.tokenizer.__class__ = RecordingTokenizer  # html5lib 1.1 takes no tokenizer of one's own
            super().mainLoop()

    return RecordingParser


def _left_open(errors: Iterable[tuple[Any, str, dict]]) -> str | None:
    """The first error of html5lib that says: something was still open when the document ended."""
    for _, code, details in errors:
        if code == "expected-one-end-tag-but-got-another" and details.get("gotName") in ("body", "html"):
            return f"<{details.get('expectedName')}> is left open"
        if "eof" in code and not code.startswith(("expected-doctype", "expected-eof", "expected-numeric")):
            return f"the text ends too early ({code})"
    return None


def _shows_something(element: Any) -> bool:
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
    import html5lib

    if len(html) > MAX_CHARACTERS:
        return Validity(False, False, False, False, False, f"over {MAX_CHARACTERS:,} characters")
    parser = _recording_parser()(tree=html5lib.getTreeBuilder("etree"), namespaceHTMLElements=False)
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
    """Whether the text ends in one segment of 1 to 200 characters, at least 8 times and 200 characters long."""
    text = html.rstrip()
    for period in range(1, 201):
        tail = text[-max(200, 8 * period) :]
        if len(tail) >= max(200, 8 * period) and tail[period:] == tail[:-period]:
            return True
    return False


def _normalised(html: str) -> str:
    return re.sub(r"> <", "><", re.sub(r"\s+", " ", html)).strip()


def same_html(a: str, b: str) -> bool:
    """Equal once runs of whitespace are one space, and none is left between tags and at the ends."""
    return _normalised(a) == _normalised(b)


def summarise(pages: Sequence[Mapping[str, Any]]) -> dict[str, float | int | None]:
    """{"n", and the share of pages that are "valid", "truncated", "looping", "exact"}; None without pages."""
    shares = ("valid", "truncated", "looping", "exact")
    return {"n": len(pages)} | {
        name: sum(map(bool, (page[name] for page in pages))) / len(pages) if pages else None for name in shares
    }


# -----------------------------------------------------------------------------
# Blocks: where each text stands and in which colour, found by rendering the page twice with a colour for each text

TEXT_TAGS = "p h1 h2 h3 h4 h5 h6 div span a b li table td th button footer header figcaption".split()
LEVELS = tuple(range(10, 251, 16))  # of red, green and blue; 16 apart, so that each is known within 4
PALETTE, SHIFT = len(LEVELS) ** 3, 50  # colours; what the second render adds to each, modulo 256
NEAR_COLOUR, NEAR_SHIFT = 4, 8  # by Design2Code's definition
BAND = 1024  # rows of a picture that are compared at once, to need less memory
MAX_PASSES = 4  # pairs of renders: a page with more texts than colours is coloured in parts

# Prototypes' own functions: a form's field called `style` or `parentNode` would stand in for the form's property.
PREPARE = """
const get = (type, name) => Object.getOwnPropertyDescriptor(type.prototype, name).get;
const parentOf = (node) => get(Node, "parentNode").call(node);
const styleOf = (node) => get(node instanceof SVGElement ? SVGElement
  : node instanceof HTMLElement ? HTMLElement : MathMLElement, "style").call(node);
const set = (node, name, value) => CSSStyleDeclaration.prototype.setProperty.call(
  styleOf(node), name, value, "important");
const all = (selector) => [...Document.prototype.querySelectorAll.call(document, selector)];
"""

RECOLOUR = (
    """() => {"""
    + PREPARE
    + """
  const still = new CSSStyleSheet();
  still.replaceSync("*,*::before,*::after{transition:none!important}");
  document.adoptedStyleSheets = [still];
  const levels = %(levels)s, count = levels.length, coloured = new Map();
  for (const node of all("*")) if ("style" in node) set(node, "background-color", "rgba(255, 255, 255, 0)");
  all("%(tags)s").forEach((node, place) => {
    const pass = Math.floor(place / count ** 3), number = count ** 3 - 1 - place %% count ** 3;
    const parts = [Math.floor(number / count ** 2), Math.floor(number / count) %% count, number %% count];
    const colour = parts.map((part) => (levels[part] + %(shift)d) %% 256);
    coloured.set(node, [pass, ...parts.map((part) => levels[part])]);
    set(node, "color", pass === %(pass)d ? `rgb(${colour})` : "transparent");
    set(node, "opacity", "1");
  });
  if (%(shift)d) return coloured.size;
  const body = get(Document, "body").call(document), found = [];
  if (!body) return found;
  const unseen = new Set(["SCRIPT", "STYLE", "TEMPLATE", "NOSCRIPT"]);
  const walker = Document.prototype.createTreeWalker.call(document, body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const text = node.data.trim();
    if (!text || unseen.has(parentOf(node).nodeName)) continue;
    for (let owner = parentOf(node); owner && owner !== body; owner = parentOf(owner)) {
      if (coloured.has(owner)) {
        if (coloured.get(owner)[0] === %(pass)d) found.push([text, ...coloured.get(owner).slice(1)]);
        break;
      }
      if (Element.prototype.getAttribute.call(owner, "style")?.match(/(^|;)\\s*color\\s*:/)) break;
    }
  }
  return found;
}"""
)

SUBTREES = (
    """() => {"""
    + PREPARE
    + """
  const children = get(Element, "children"), found = new Set();
  for (const node of all("*")) {
    const inner = [...children.call(node)].map((child) => child.localName);
    if (inner.length) found.add(`${node.localName}(${inner.join(", ")})`);
  }
  return [...found];
}"""
)


@dataclass(frozen=True)
class Block:
    """A text, its box in shares of the page's width and height, and its mean colour (red, green, blue; 0 to 255)."""

    text: str
    x: float
    y: float
    width: float
    height: float
    color: tuple[float, float, float]

    @property
    def area(self) -> float:
        return self.width * self.height

    @property
    def center(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height / 2


@dataclass(frozen=True)
class Page:
    """A rendered page: picture (H, W, 3), text blocks, `tag(child, child)` of every element, or why there is none."""

    image: Any
    blocks: tuple[Block, ...] = ()
    subtrees: frozenset[str] = frozenset()
    failure: str | None = None
    clipped: bool = False


def job_for(html: str, width: int = 1280, height: int = 720) -> Job:
    """What is to be rendered of a page so that `page_of` can read it."""
    tags = len(re.findall(rf"<(?:{'|'.join(TEXT_TAGS)})\b", html, re.IGNORECASE))
    passes = min(MAX_PASSES, max(1, -(-tags // PALETTE)))
    steps = [SHOT, SUBTREES]
    for number in range(passes):
        for shift in (0, SHIFT):
            values = {"levels": list(LEVELS), "tags": ",".join(TEXT_TAGS), "shift": shift, "pass": number}
            steps += [RECOLOUR % values, SHOT]
    return Job(html, width, height, tuple(steps))


def page_of(render: Render) -> Page:
    if render.failure is not None:
        return Page(None, failure=render.failure)
    image, subtrees, *passes = render.values
    found: list[Block] = []
    for texts, first, elements, second in zip(passes[::4], passes[1::4], passes[2::4], passes[3::4]):
        if elements > PALETTE * len(passes) // 4:
            return Page(None, failure=f"{elements:,} text elements, more than colours")
        found += blocks_of(image, first, second, texts)
    return Page(image, same_boxes_merged(found), frozenset(subtrees), clipped=render.clipped)


def blocks_of(image, first, second, texts: Sequence[Sequence]) -> list[Block]:
    """Blocks of `texts` (text, red, green, blue) by two renders whose text differs by SHIFT, colours by `image`."""
    import numpy as np

    height, width = (min(sizes) for sizes in zip(image.shape[:2], first.shape[:2], second.shape[:2]))
    parts = []
    for top in range(0, height, BAND):
        one, two = (part[top : min(top + BAND, height), :width] for part in (first, second))
        shifted = one + np.uint8(SHIFT)  # bytes: modulo 256
        near = np.maximum(shifted, two) - np.minimum(shifted, two) <= NEAR_SHIFT
        rows, columns = np.nonzero(near[..., 0] & near[..., 1] & near[..., 2])
        parts.append((rows + top, columns, one[rows, columns].astype(np.int16)))
    rows, columns, colors = map(np.concatenate, zip(*parts))
    levels = np.rint((colors - LEVELS[0]) / 16).astype(np.int64).clip(0, len(LEVELS) - 1)
    known = (np.abs(colors - (LEVELS[0] + 16 * levels)) <= NEAR_COLOUR).all(axis=1)
    rows, columns = rows[known], columns[known]
    keys = levels[known] @ np.array([len(LEVELS) ** 2, len(LEVELS), 1])
    order = np.argsort(keys, kind="stable")
    known, starts = np.unique(keys[order], return_index=True)
    pixels = dict(zip(known.tolist(), np.split(order, starts[1:])))
    found = []
    for text, *color in texts:
        key = sum(LEVELS.index(part) * len(LEVELS) ** power for part, power in zip(color, (2, 1, 0)))
        if key not in pixels or not text.strip():
            continue
        y, x = rows[pixels[key]], columns[pixels[key]]
        mean = image[y, x].mean(axis=0).astype(int)
        box = x.min() / first.shape[1], y.min() / first.shape[0]
        box += (x.max() - x.min() + 1) / first.shape[1], (y.max() - y.min() + 1) / first.shape[0]
        found.append(Block(text.strip().lower(), *map(float, box), tuple(map(float, mean))))
    return found


def same_boxes_merged(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Texts that share a box, as those of one element do, are one block."""
    found: dict[tuple, Block] = {}
    for block in blocks:
        box = block.x, block.y, block.width, block.height
        if box in found:
            color = tuple((one + two) / 2 for one, two in zip(found[box].color, block.color))
            block = replace(found[box], text=f"{found[box].text} {block.text}", color=color)
        found[box] = block
    return tuple(found.values())


# -----------------------------------------------------------------------------
# Matching

ALIKE, MERGE_GAIN, CONTEXT = 0.5, 0.05, 0.1  # least similarity of a pair; least gain of a merge; weight of neighbours


class Similarity:
    """difflib's ratio of two texts, each pair worked out once; with its rule for popular characters."""

    def __init__(self, swapped: bool = False):
        from cydifflib import SequenceMatcher

        self.new, self.matchers, self.swapped = SequenceMatcher, {}, swapped
        self.known: dict[str, dict[str, float]] = {}
        self.turned = None if swapped else Similarity(swapped=True)  # the ratio depends on which text comes first

    def matcher(self, second: str) -> Any:
        if second not in self.matchers:
            self.matchers[second] = self.new(None, "", second)  # what it finds out about its second text, it keeps
        return self.matchers[second]

    def cost(self, text: str, column: str) -> float:
        """The ratio, negative."""
        known = self.known.setdefault(text, {})
        if column not in known:
            one, two = (column, text) if self.swapped else (text, column)
            matcher = self.matcher(two)
            matcher.set_seq1(one)
            known[column] = -1.0 if one == two else -matcher.ratio()
        return known[column]

    def costs(self, first: Sequence[Block], second: Sequence[Block]):
        """(first, second)"""
        import numpy as np

        columns = [block.text for block in second]
        rows = [[self.cost(block.text, column) for column in columns] for block in first]
        return np.array(rows, dtype=float).reshape(len(first), len(second))


class Bound:
    """The most that a merge of two neighbouring rows can gain, without solving the assignment again.

    For rows at least as many as columns, also after the merge. Any prices of the columns give a lower bound of the new
    total by weak duality of linear programs; the best prices are those of the assignment at hand. A merge that is
    bounded below `MERGE_GAIN` is not worth working out, and its texts need not even be compared: no ratio is above what
    the characters that two texts share would allow (difflib's `quick_ratio`).
    """

    def __init__(self, costs, rows, columns, second: Sequence[Block], similarity: Similarity):
        import numpy as np

        # Prices as shortest paths from the rows that are left over, along the assigned ones (Bellman-Ford).
        price = np.delete(costs, rows, axis=0).min(axis=0)
        owner = costs[rows[np.argsort(columns)]]
        steps = owner - np.diag(owner)[:, None]
        for _ in range(len(price)):
            lower = np.minimum(price, (price[:, None] + steps).min(axis=0))
            if (lower == price).all():
                break
            price = lower
        self.price, self.worth = price, np.minimum(0.0, (costs - price).min(axis=1))
        self.slack = costs[rows, columns].sum() - price.sum() - self.worth.sum()  # 0, but for rounding
        self.similarity, self.columns = similarity, [block.text for block in second]
        self.places = {character: n for n, character in enumerate(sorted({*"".join(self.columns)}))}
        self.lengths = np.array([len(column) for column in self.columns])
        self.counts = np.array([self.count(column) for column in self.columns])

    def count(self, text: str):
        import numpy as np

        return np.bincount([self.places[c] for c in text if c in self.places], minlength=len(self.places))

    def rules_out(self, place: int, text: str) -> bool:
        """Whether merging the rows `place` and the next into one of `text` cannot gain enough."""
        import numpy as np

        least = self.slack + self.worth[place] + self.worth[place + 1] - MERGE_GAIN + 1e-9  # of the new row's worth
        if least > 0:
            return False
        shared = np.minimum(self.counts, self.count(text)).sum(axis=1)
        lowest = -2 * shared / (len(text) + self.lengths)
        doubtful = np.flatnonzero(lowest - self.price < least)
        return all(self.similarity.cost(text, self.columns[n]) - self.price[n] >= least for n in doubtful.tolist())


def assigned(costs) -> tuple[Any, Any]:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(costs)


def merged(one: Block, two: Block) -> Block:
    x, y = min(one.x, two.x), min(one.y, two.y)
    width = max(one.x + one.width, two.x + two.width) - x
    height = max(one.y + one.height, two.y + two.height) - y
    color = tuple((a + b) // 2 for a, b in zip(one.color, two.color))
    return Block(f"{one.text} {two.text}", x, y, width, height, color)


def gain(before: Sequence[float], after: Sequence[float]) -> float:
    """By how much the mean of the costs that changed has fallen; 0 unless the best of them has fallen, too."""
    common = Counter(before) & Counter(after)
    old, new = (list((Counter(costs) - common).elements()) for costs in (before, after))
    mean = [sum(costs) / len(costs) if costs else 0.0 for costs in (old, new)]
    if mean[0] > mean[1] and not (old and new and min(old) > min(new)):
        return 0.0
    return mean[0] - mean[1]


def merge_neighbours(first: list[Block], second: Sequence[Block], similarity: Similarity, turned: bool) -> list[Block]:
    """`first` with those neighbours merged that match `second` better together, the best first."""
    import numpy as np

    similarity = similarity.turned if turned else similarity

    def solved(costs) -> tuple[Any, Any]:
        return assigned(costs.T)[::-1] if turned else assigned(costs)

    if len(first) < 2:
        return first
    costs, gains = similarity.costs(first, second), []
    current = costs[solved(costs)].tolist()
    bound = Bound(costs, *solved(costs), second, similarity) if len(first) > len(second) else None
    for place in range(len(first) - 1):
        both = merged(first[place], first[place + 1])
        if bound and bound.rules_out(place, both.text):
            continue
        after = np.concatenate([costs[:place], similarity.costs([both], second), costs[place + 2 :]])
        better = gain(current, after[solved(after)].tolist())
        if better > MERGE_GAIN:
            gains.append((place, better))
    taken: set[int] = set()
    for place, _ in sorted(gains, key=lambda item: item[1], reverse=True):
        if not {place, place + 1} & taken:
            first = [*first[:place], merged(first[place], first[place + 1]), *first[place + 1 :]]
            taken |= {place, place + 1}
            first[place + 1] = None  # so that places stay what they were
    return [block for block in first if block is not None]


def with_context(costs):
    """Costs below -ALIKE, lowered by CONTEXT times the sum of the two lowest neighbours."""
    import numpy as np

    adjusted = costs.copy()
    for row, column in zip(*np.nonzero(costs < -ALIKE)):
        near = costs[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2].ravel()
        near = np.sort(np.delete(near, np.flatnonzero(near == costs[row, column])[0]))
        adjusted[row, column] += CONTEXT * near[:2].sum()
    return adjusted


def match(prediction: Sequence[Block], reference: Sequence[Block]) -> tuple[list[Block], list[Block], list[tuple]]:
    """(blocks of the prediction, of the reference, both merged; pairs (prediction, reference, similarity))."""
    similarity, predicted, wanted = Similarity(), list(prediction), list(reference)
    while True:
        before = len(predicted), len(wanted)
        predicted = merge_neighbours(predicted, wanted, similarity, turned=False)
        wanted = merge_neighbours(wanted, predicted, similarity, turned=True)
        if (len(predicted), len(wanted)) == before:
            break
    costs = similarity.costs(predicted, wanted)
    pairs = [(predicted[i], wanted[j], -costs[i, j]) for i, j in zip(*assigned(with_context(costs)))]
    return predicted, wanted, [pair for pair in pairs if pair[2] >= ALIKE]


# -----------------------------------------------------------------------------
# CLIP: how alike two pages are besides their texts

CLIP_MODEL = "openai/clip-vit-base-patch32"  # ViT-B/32, as in Design2Code


class ClipMissing(RuntimeError):
    """CLIP cannot be scored here; the message says what is missing."""


class Clip:
    """Cosine of CLIP's features of two pictures, their texts painted over (Telea 2004), squeezed into a square.

    `name` is a folder, or a Hub repository that is in the cache; nothing is fetched. Raises `ClipMissing`. Runs on the
    CPU, about 0.3 s for a pair.
    """

    def __init__(self, name: str = CLIP_MODEL):
        import huggingface_hub as hub

        def place(file: str) -> Path | None:
            found = Path(name, file) if Path(name).is_dir() else hub.try_to_load_from_cache(name, file)
            return Path(found) if isinstance(found, str | Path) and Path(found).is_file() else None

        config, processor = place("config.json"), place("preprocessor_config.json")
        weights = place("model.safetensors") or place("pytorch_model.bin")
        if not (config and processor and weights):
            raise ClipMissing(f"the weights of {name} are not at hand: hf download {name}")
        try:
            import cv2
            import torch
            from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
        except ImportError as error:
            raise ClipMissing(f"{error.name} is not installed: pip install -r requirements.txt") from None
        self.torch, self.cv2, self.name = torch, cv2, name
        self.processor = CLIPImageProcessor.from_json_file(processor)
        # Not by from_pretrained, which would deal the weights out to all ranks of a ZeRO-3 training.
        self.model = CLIPModel(CLIPConfig.from_json_file(config)).eval()
        if weights.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        lost = self.model.load_state_dict(state, strict=False).missing_keys
        if any(not key.endswith("position_ids") for key in lost):
            raise ClipMissing(f"{name} lacks {', '.join(lost[:3])}: another kind of checkpoint?")

    def __call__(self, one: Page, two: Page) -> float:
        pictures = [self.without_texts(page) for page in (one, two)]
        inputs = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        with self.torch.no_grad():
            pooled = self.model.vision_model(pixel_values=inputs).pooler_output
            features = self.model.visual_projection(pooled)
        return max(0.0, float(self.torch.nn.functional.cosine_similarity(features[0], features[1], dim=0)))

    def without_texts(self, page: Page):
        import numpy as np
        from PIL import Image

        height, width = page.image.shape[:2]
        mask = np.zeros((height, width), np.uint8)
        for block in page.blocks:
            left, top = int(block.x * width), int(block.y * height)
            mask[top : top + int(block.height * height), left : left + int(block.width * width)] = 255
        picture = self.cv2.inpaint(page.image, mask, 3, self.cv2.INPAINT_TELEA) if page.blocks else page.image
        return Image.fromarray(picture).resize((min(width, height),) * 2, Image.Resampling.LANCZOS)


# -----------------------------------------------------------------------------
# Scores

SSIM_SHRINK = 2  # both sides of the pictures, before SSIM: a quarter of the time, and small type still counts
METRICS = ("block", "text", "position", "color", "overall", "likeness", "tree_bleu", "ssim")
MISPLACED, MISCOLOURED, MISSED = 0.9, 0.8, 0.5  # below these a page carries the cause's name


@dataclass(frozen=True)
class PageScore:
    """All scores are 0 to 1. `overall` is Design2Code's, the mean of the first four and of `clip` where that is known;
    `likeness` is `block` times the mean of text, position and colour, so that a wrong page with one lucky match cannot
    look half right."""

    block: float = 0.0
    text: float = 0.0
    position: float = 0.0
    color: float = 0.0
    overall: float = 0.0
    likeness: float = 0.0
    tree_bleu: float = 0.0
    ssim: float = 0.0
    clip: float | None = None
    valid: bool = False
    blocks_reference: int = 0
    blocks_prediction: int = 0
    failure: str | None = None  # why a page could not be rendered; all scores are 0 then
    causes: tuple[str, ...] = ()
    matched: tuple[tuple[Block, Block], ...] = field(default=(), repr=False)  # (reference, prediction)
    missing: tuple[Block, ...] = field(default=(), repr=False)  # of the reference only
    invented: tuple[Block, ...] = field(default=(), repr=False)  # of the prediction only

    def as_json(self) -> dict[str, Any]:
        """Without the blocks, and without CLIP's score where there is none."""
        left_out = ("matched", "missing", "invented", *(["clip"] if self.clip is None else []))
        return {
            name: value
            for name, value in asdict(replace(self, matched=(), missing=(), invented=())).items()
            if name not in left_out
        }


def score(
    reference: str, prediction: str, renderer: Renderer | None = None, width: int = 1280, clip: Clip | None = None
) -> PageScore:
    """How alike two pages are, given as HTML. Raises `renders.BrowserMissing` without Chromium.

    With a `renderer` of one's own many pages share a browser; the proof is the caller's then.
    """
    if renderer is None:
        with Renderer() as own:
            prove(own, clip=clip)
            return score(reference, prediction, own, width, clip)
    wanted, written = map(page_of, renderer.map([job_for(reference, width), job_for(prediction, width)]))
    return compare(wanted, written, prediction, clip)


def compare(reference: Page, prediction: Page, html: str, clip: Clip | None = None) -> PageScore:
    """`html` is the prediction's, for what its picture does not tell."""
    checked = validity(html)
    causes = ["cut off"] if html.strip() and not checked.closed else []
    causes += ["looping"] if looping(html) else []
    failure = prediction.failure and f"the written page: {prediction.failure}"
    failure = (reference.failure and f"the reference: {reference.failure}") or failure
    sizes = {"blocks_reference": len(reference.blocks), "blocks_prediction": len(prediction.blocks)}
    if failure:
        lists = {"missing": reference.blocks, "invented": prediction.blocks}
        lists["clip"] = 0.0 if clip else None
        return PageScore(valid=checked.valid, failure=failure, causes=("not rendered", *causes), **sizes, **lists)
    found = block_scores(prediction.blocks, reference.blocks)
    found["tree_bleu"] = len(reference.subtrees & prediction.subtrees) / max(1, len(reference.subtrees))
    found["ssim"] = ssim(reference.image, prediction.image)
    if clip:
        found["clip"] = clip(reference, prediction)
        found["overall"] = (4 * found["overall"] + found["clip"]) / 5
    causes += ["no text to compare"] if not reference.blocks else []
    causes += ["blank"] if reference.blocks and not prediction.blocks else []
    causes += ["misplaced"] if found["matched"] and found["position"] < MISPLACED else []
    causes += ["miscoloured"] if found["matched"] and found["color"] < MISCOLOURED else []
    causes += ["texts missing"] if prediction.blocks and len(found["missing"]) > MISSED * len(reference.blocks) else []
    return PageScore(valid=checked.valid, causes=tuple(causes), **sizes, **found)


def block_scores(prediction: Sequence[Block], reference: Sequence[Block]) -> dict[str, Any]:
    """Design2Code's four scores, their mean, and which blocks were matched; without any match all are 0."""
    predicted, wanted, pairs = match(prediction, reference) if prediction and reference else (prediction, reference, [])
    taken = {id(block) for pair in pairs for block in pair[:2]}
    missing, invented = ([block for block in blocks if id(block) not in taken] for blocks in (wanted, predicted))
    lists = {"missing": tuple(missing), "invented": tuple(invented)}
    lists["matched"] = tuple((two, one) for one, two, _ in pairs)
    four = [0.0] * 4
    if pairs:
        areas = sum(one.area + two.area for one, two, _ in pairs)
        offsets = [max(abs(a - b) for a, b in zip(one.center, two.center)) for one, two, _ in pairs]
        four[0] = areas / (areas + sum(block.area for block in (*missing, *invented)))
        four[1] = sum(similarity for *_, similarity in pairs) / len(pairs)
        four[2] = sum(1 - offset for offset in offsets) / len(pairs)
        four[3] = sum(color_likeness([(one.color, two.color) for one, two, _ in pairs])) / len(pairs)
    four = [float(value) for value in four]
    named = dict(zip(("block", "text", "position", "color"), four))
    return named | {"overall": sum(four) / 4, "likeness": four[0] * sum(four[1:]) / 3} | lists


def color_likeness(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[float]:
    """1 - CIEDE2000 / 100 of pairs of colours (red, green, blue; 0 to 255), at least 0."""
    import numpy as np
    from skimage.color import deltaE_ciede2000, rgb2lab

    one, two = (rgb2lab(np.array(colors, dtype=float).reshape(-1, 1, 3) / 255) for colors in zip(*pairs))
    return np.maximum(0.0, 1 - deltaE_ciede2000(one, two) / 100).ravel().tolist()


def ssim(one, two) -> float:
    """Of the grey pictures' common part, times that part's share of what both cover."""
    import numpy as np
    from PIL import Image
    from skimage.metrics import structural_similarity

    height, width = (min(sizes) for sizes in zip(one.shape[:2], two.shape[:2]))
    covered = one.shape[0] * one.shape[1] + two.shape[0] * two.shape[1] - height * width
    small = [Image.fromarray(part[:height, :width]).convert("L").reduce(SSIM_SHRINK) for part in (one, two)]
    grey = [np.asarray(picture, dtype=np.float32) for picture in small]
    if min(grey[0].shape) < 7:  # smaller than SSIM's window
        return 0.0
    return max(0.0, float(structural_similarity(*grey, data_range=255))) * height * width / covered


# -----------------------------------------------------------------------------
# Proof: before every run, on pages whose scores are known

PROOF = [  # (tag, left, top, colour, text), in pixels of a page of 640 by 480
    ("h1", 20, 10, "#102030", "Harbour timetable"),
    ("p", 20, 70, "#803010", "Ferries leave every morning"),
    ("p", 330, 70, "#106030", "Return before the evening tide"),
    ("div", 20, 130, "#1040a0", "Island of birds"),
    ("div", 330, 130, "#a01060", "Lighthouse and museum"),
    ("span", 20, 190, "#505050", "Tickets at the quay"),
    ("a", 330, 190, "#0060c0", "Ask the captain"),
    ("li", 60, 250, "#604000", "Bring warm clothes"),
    ("button", 330, 250, "#000000", "Reserve two seats"),
    ("footer", 20, 420, "#203040", "Closed on stormy days"),
]


class ScorerError(RuntimeError):
    """The scorer does not score what it should; no number of it can be trusted."""


def proof_page(items: Sequence[Sequence]) -> str:
    lines = (
        f'<{tag} style="position:absolute;margin:0;left:{left}px;top:{top}px;color:{color}">{text}</{tag}>'
        for tag, left, top, color, text in items
    )
    return f"<!DOCTYPE html>\n<html><head><title>proof</title></head><body>{''.join(lines)}</body></html>"


def proof_cases() -> dict[str, str]:
    """Changed copies of the page; of each pair the second is changed more."""
    turned = [item[4] for item in PROOF]
    turned = [*turned[1:], turned[0]]
    colors = ["#f0e010", "#10e0f0"] * 5

    def changed(count: int, change: Callable[[int, Sequence], Sequence]) -> str:
        return proof_page([change(n, item) if n < count else item for n, item in enumerate(PROOF)])

    return {
        "itself": proof_page(PROOF),
        "blank": proof_page([]),
        "3 moved": changed(3, lambda n, item: (item[0], item[1] + 150, item[2] + 100, *item[3:])),
        "6 moved": changed(6, lambda n, item: (item[0], item[1] + 150, item[2] + 100, *item[3:])),
        "3 recoloured": changed(3, lambda n, item: (*item[:3], colors[n], item[4])),
        "9 recoloured": changed(9, lambda n, item: (*item[:3], colors[n], item[4])),
        "3 shortened": changed(3, lambda n, item: (*item[:4], item[4][: len(item[4]) * 2 // 3])),
        "9 shortened": changed(9, lambda n, item: (*item[:4], item[4][: len(item[4]) * 2 // 3])),
        "2 removed": proof_page(PROOF[:-2]),
        "6 removed": proof_page(PROOF[:-6]),
        "another page": "<!DOCTYPE html>\n<html><body><main><p>Nothing of the kind</p></main></body></html>",
        "texts shuffled": changed(10, lambda n, item: (*item[:4], turned[n])),
    }


def prove(renderer: Renderer, cases: Mapping[str, str] | None = None, clip: Clip | None = None) -> dict[str, PageScore]:
    """Raise `ScorerError`, naming the case, unless known pages score as they must. Returns their scores."""
    known = dict(cases or proof_cases())
    html = known["itself"]
    pages = dict(zip(known, map(page_of, renderer.map(job_for(page, width=640) for page in known.values()))))
    found = {name: compare(pages["itself"], page, known[name], clip) for name, page in pages.items()}
    failed = Page(None, failure="on purpose")
    found["not rendered"] = compare(pages["itself"], failed, html, clip)
    found["both not rendered"] = compare(failed, failed, html, clip)

    def claim(true: bool, text: str, *names: str) -> None:
        if not true:
            seen = "; ".join(f"{name}: {found[name].as_json()}" for name in names)
            raise ScorerError(f"the scorer is broken: {text}. {seen}")

    for name in known:
        claim(found[name].failure is None, f"{name!r} could not be rendered", name)
    for metric in (*METRICS, *(["clip"] if clip else [])):
        value = getattr(found["itself"], metric)
        claim(abs(value - 1) < 1e-5, f"{metric} of a page against itself is {value}, not 1", "itself")
        for name in ("not rendered", "both not rendered"):
            claim(getattr(found[name], metric) == 0, f"{metric} of a failed render is not 0", name)
    for metric in ("block", "text", "position", "color", "likeness", *([] if clip else ["overall"])):
        claim(getattr(found["blank"], metric) == 0, f"{metric} of a blank page is not 0", "blank")
    claim(found["itself"].blocks_reference == len(PROOF), f"{len(PROOF)} texts give another number of blocks", "itself")
    for metric, few, many in (
        ("position", "3 moved", "6 moved"),
        ("color", "3 recoloured", "9 recoloured"),
        ("text", "3 shortened", "9 shortened"),
        ("block", "2 removed", "6 removed"),
        ("tree_bleu", "2 removed", "another page"),
        ("ssim", "3 moved", "6 moved"),
    ):
        values = [getattr(found[name], metric) for name in ("itself", few, many)]
        claim(
            values[0] > values[1] > values[2], f"{metric} does not fall from {few!r} to {many!r}: {values}", few, many
        )
    for name, kept in (("6 moved", ("text", "color")), ("9 recoloured", ("text", "position", "block"))):
        for metric in kept:
            claim(getattr(found[name], metric) > 0.99, f"{metric} has fallen where only others may: {name!r}", name)
    claim(found["another page"].likeness < 0.2, "another page looks half right", "another page")
    claim(found["texts shuffled"].position < 0.9, "position does not see that texts were shuffled", "texts shuffled")
    return found


# -----------------------------------------------------------------------------
# Comparison


def paired_comparison(before: Sequence[float], after: Sequence[float], draws: int = 10_000, seed: int = 0) -> dict:
    """Two scores of each page: means, their difference with its 95 % bootstrap interval (Efron 1979, percentiles), and
    `p` by a sign-flip permutation test (Fisher 1935), two-sided: how often chance alone would differ as much."""
    import numpy as np

    one, two = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if one.shape != two.shape or not len(one):
        raise ValueError(f"{len(one)} scores before and {len(two)} after: there must be as many, and at least one")
    difference, random = two - one, np.random.default_rng(seed)
    means = difference[random.integers(0, len(difference), (draws, len(difference)))].mean(axis=1)
    flipped = (difference * random.choice((-1.0, 1.0), (draws, len(difference)))).mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    as_far = np.abs(flipped) >= abs(difference.mean()) - 1e-12
    return {
        "n": len(difference),
        "before": float(one.mean()),
        "after": float(two.mean()),
        "difference": float(difference.mean()),
        "low": float(low),
        "high": float(high),
        "p": float((as_far.sum() + 1) / (draws + 1)),
    }


def means(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """n, failures, and the mean of each metric: failures as 0, and (`..._without_failures`) without them."""
    failed = [row for row in scores if row.get("failure")]
    found: dict[str, Any] = {"n": len(scores), "failures": len(failed), "failed": [row.get("page") for row in failed]}
    rendered = [row for row in scores if not row.get("failure")]
    for metric in (*METRICS, *(["clip"] if any("clip" in row for row in scores) else [])):
        found[metric] = sum(row[metric] for row in scores) / len(scores) if scores else None
        alone = sum(row[metric] for row in rendered) / len(rendered) if rendered else None
        found[f"{metric}_without_failures"] = alone
    return found


def shares(scores: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the pages: `valid`, and each cause that a page has."""
    causes = Counter(cause for row in scores for cause in row["causes"])
    counts = {"valid": sum(row["valid"] for row in scores), **causes}
    return {name: count / max(1, len(scores)) for name, count in counts.items()}


# -----------------------------------------------------------------------------
# Many pages


@dataclass(frozen=True)
class Pair:
    """A page's name, its reference, what was written (None: nothing was), and the browser's window in CSS pixels."""

    name: str
    reference: str
    prediction: str | None
    width: int = 1280
    height: int = 720

    @property
    def key(self) -> str:
        content = json.dumps([self.reference, self.prediction, self.width, self.height])
        return hashlib.sha256(content.encode("utf-8", "replace")).hexdigest()


def score_pairs(
    pairs: Iterable[Pair], renderer: Renderer, clip: Clip | None = None
) -> Iterator[tuple[Pair, PageScore, Any, Any]]:
    """Of each pair, in order: its score, and the pictures of reference and prediction (None where there is none)."""
    waiting: list[Pair] = []

    def jobs() -> Iterator[Job]:
        for pair in pairs:
            waiting.append(pair)
            yield job_for(pair.reference, pair.width, pair.height)
            yield job_for(pair.prediction or "", pair.width, pair.height)

    pages = map(page_of, renderer.map(jobs()))
    for wanted in pages:
        pair, written = waiting.pop(0), next(pages)
        if pair.prediction is None:
            written = Page(None, failure="there is none")
        yield pair, compare(wanted, written, pair.prediction or "", clip), wanted.image, written.image


def window_of(width: int, height: int) -> tuple[int, int]:
    """The browser's window for a screenshot: as wide, and no higher."""
    return min(2560, max(160, width)), min(720, max(64, height))


def pairs_of(references: Path, predictions: Path | None, width: int) -> list[Pair]:
    """Pairs of two folders, by equal file names, or of what a training has left: page-*/{reference,written}.html, in a
    window for screenshot.png beside them."""
    from PIL import Image

    def window(place: Path) -> tuple[int, int]:
        screenshot = place.with_name("screenshot.png")
        if predictions is not None or not screenshot.is_file():
            return width, 720
        with Image.open(screenshot) as picture:
            return window_of(*picture.size)

    if predictions is None:
        files = [
            (place.parent.name, place, place.with_name("written.html"))
            for place in sorted(references.glob("page-*/reference.html"))
        ]
    else:
        files = [
            (str(place.relative_to(references).with_suffix("")), place, predictions / place.relative_to(references))
            for place in sorted(references.rglob("*.html"))
        ]
    return [
        Pair(name, read(wanted), read(written) if written.is_file() else None, *window(wanted))
        for name, wanted, written in files
    ]


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


class Progress:
    """Scores and pictures of a run, on disk until it ends: an interrupted one goes on where it was."""

    def __init__(self, folder: Path | None, pictures: bool, clip: str | None = None):
        self.folder, self.pictures, self.clip, self.rows = folder, pictures, clip, {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "scores.jsonl"
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            try:
                row = json.loads(line)
            except ValueError:  # the end of an interrupted run
                continue
            if row["pictures"] >= pictures and row["clip"] == clip:
                self.rows[row["key"]] = row["score"]

    def keep(self, key: str, score: PageScore, images: Sequence[Any]) -> None:
        self.rows[key] = asdict(score)
        if self.folder is None:
            return
        for name, image in zip(("reference", "written"), images):
            if self.pictures and image is not None:
                from PIL import Image

                picture = Image.fromarray(image)
                picture = picture.reduce(2) if picture.width > 960 else picture  # twice what the report shows
                picture.save(self.folder / f"{key}-{name}.png", compress_level=1)
        with (self.folder / "scores.jsonl").open("a", encoding="utf-8") as file:
            row = {"key": key, "pictures": self.pictures, "clip": self.clip, "score": self.rows[key]}
            file.write(json.dumps(row) + "\n")

    def picture(self, key: str, name: str) -> Path | None:
        file = self.folder / f"{key}-{name}.png" if self.folder else None
        return file if file and file.is_file() else None

    def forget(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def run_pairs(
    pairs: Sequence[Pair], renderer: Renderer, progress: Progress, clip: Clip | None = None
) -> list[dict[str, Any]]:
    """Scores of all pairs, in order, each with its `page`; a bar on stderr."""
    from tqdm import tqdm

    left = [pair for pair in pairs if pair.key not in progress.rows]
    with tqdm(total=len(pairs), initial=len(pairs) - len(left), unit="page", file=sys.stderr) as bar:
        for pair, score, *images in score_pairs(left, renderer, clip):
            progress.keep(pair.key, score, images)
            bar.update()
    return [{"page": pair.name, **score_of(progress.rows[pair.key]).as_json()} for pair in pairs]


def score_of(row: Mapping[str, Any]) -> PageScore:
    """A score back from its JSON."""

    def block(value: Mapping[str, Any]) -> Block:
        return Block(**{**value, "color": tuple(value["color"])})

    lists = {name: tuple(map(block, row[name])) for name in ("missing", "invented")}
    lists["matched"] = tuple((block(one), block(two)) for one, two in row["matched"])
    return PageScore(**{**row, **lists, "causes": tuple(row["causes"])})


def write_pages_report(
    file: Path,
    title: str,
    pairs: Sequence[Pair],
    progress: Progress,
    facts: Mapping[str, str],
    more: Mapping[str, Mapping[str, Any]] | None = None,
    comparison: Mapping[str, Any] | None = None,
) -> None:
    """`more` has further scores of a page by its name, such as `truncated`; they stand beside the others."""
    from scoring.report import Box, PageResult, write_report

    def box(block: Block) -> Box:
        return Box(block.x, block.y, block.width, block.height, block.text)

    def results() -> Iterator[PageResult]:
        for pair in pairs:
            key = pair.key
            score = score_of(progress.rows[key])
            known = (*METRICS, "valid", *(["clip"] if score.clip is not None else []))
            shown = {name: getattr(score, name) for name in known} | dict((more or {}).get(pair.name, {}))
            yield PageResult(
                name=pair.name,
                scores=shown,
                reference=progress.picture(key, "reference"),
                written=progress.picture(key, "written"),
                html=pair.prediction or "",
                reference_html=pair.reference,
                matched=[(box(one), box(two)) for one, two in score.matched],
                missing=[box(block) for block in score.missing],
                invented=[box(block) for block in score.invented],
                failure=score.failure,
                causes=score.causes,
            )

    file.parent.mkdir(parents=True, exist_ok=True)
    write_report(file, title, results(), dict(facts), comparison)


def find_clip(name: str = CLIP_MODEL) -> tuple[Clip | None, str]:
    """CLIP, or why there is none; for those who can do without."""
    try:
        return Clip(name), ""
    except ClipMissing as error:
        return None, str(error)


def browser_facts(renderer: Renderer, clip: Clip | None, why_not: str) -> dict[str, str]:
    """What scores depend on, besides the pages."""
    facts = renderer.facts
    fonts = facts.get("fonts") or []
    return {
        "browser": f"{facts.get('chromium')}{'' if facts.get('sandbox') else ', without its sandbox (as root)'}",
        "fonts": f"{len(fonts)}: {', '.join(fonts[:12])}{', ...' if len(fonts) > 12 else ''}",
        "CLIP": clip.name if clip else f"not scored, {why_not}",
    }


# -----------------------------------------------------------------------------
# Command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "references", type=Path, help="a page, a folder of pages, or the evaluation folder of a training"
    )
    parser.add_argument("predictions", type=Path, nargs="?", help="a page, or a folder with files of the same names")
    parser.add_argument("--json", help="file for the scores; - for stdout")
    parser.add_argument("--report", type=Path, help="file for a report that shows every page")
    parser.add_argument("--width", type=int, default=1280, help="of the browser's window, in pixels")
    parser.add_argument("--clip", help=f"folder or cached repository of CLIP's weights (default: {CLIP_MODEL})")
    args = parser.parse_args(argv)
    for place in (args.references, args.predictions):
        if place is not None and not place.exists():
            parser.error(f"{place}: no such file or folder")
    if args.predictions and args.references.is_dir() != args.predictions.is_dir():
        parser.error(f"{args.references} and {args.predictions}: give two files, or two folders")
    if args.predictions is None and not args.references.is_dir():
        parser.error("give a reference and a prediction, or the evaluation folder of a training")
    return args


def summary_line(found: Mapping[str, Any]) -> str:
    """Of `means` and `shares`."""
    metrics = [name for name in (*METRICS, "clip") if name in found]
    scores = ", ".join(f"{metric} {found[metric]:.3f}" for metric in metrics)
    valid = f"{100 * found['valid']:.1f} % valid"
    text = f"{found['n']} pages, {valid}, {found['failures']} failures, counted as 0: {scores}"
    if found["failures"]:
        alone = ", ".join(f"{m} {found[m + '_without_failures'] or 0:.3f}" for m in metrics)
        text += f"; without them: {alone}; failed: {', '.join(map(str, found['failed'][:20]))}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    single = args.references.is_file()
    pairs = pairs_of(args.references, args.predictions, args.width)
    if single:
        pairs = [Pair(args.references.stem, read(args.references), read(args.predictions), args.width)]
    if not pairs:
        print(f"{args.references}: no pages there (*.html, or page-*/reference.html)", file=sys.stderr)
        return 2
    target = args.report or (Path(args.json) if args.json not in (None, "-") else None)
    partial = target and target.with_name(f"{target.name}.partial")
    for place in (args.report, Path(args.json) if args.json not in (None, "-") else None):
        if place:  # now, and not after an hour
            place.parent.mkdir(parents=True, exist_ok=True)
    try:
        clip, why_not = (Clip(args.clip), "") if args.clip else find_clip()
        progress = Progress(partial, pictures=args.report is not None, clip=clip and clip.name)
        with Renderer() as renderer:
            prove(renderer, clip=clip)
            scores = run_pairs(pairs, renderer, progress, clip)
            facts = browser_facts(renderer, clip, why_not)
    except (BrowserMissing, ClipMissing, ScorerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, ScorerError) else 2
    print(f"CLIP: {facts['CLIP']}", file=sys.stderr)
    print(summary_line(means(scores) | shares(scores)), file=sys.stderr)
    if args.report:
        names = {"references": args.references.name, "predictions": (args.predictions or args.references).name}
        write_pages_report(args.report, "What was written", pairs, progress, names | facts)
    whole = {"summary": means(scores) | shares(scores), "facts": facts, "pages": scores}
    text = json.dumps(scores[0] if single else whole, indent=2)
    if args.json == "-":
        print(text)
    elif args.json:
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    progress.forget()
    return 0


if __name__ == "__main__":
    sys.exit(main())
