"""What is measured of a written page against its reference.

    compare(page_of(first), page_of(second), html).overall

The scores are those of Design2Code (Si et al., NAACL 2025), TreeBLEU (Gui et al., WebCode2M, 2025) and SSIM (Wang et
al., 2004); CLIP's where its weights are at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from scoring.blocks import Block, Page
from scoring.clip import Clip
from scoring.matching import match
from scoring.validity import looping, validity

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
    from skimage.color import deltaE_ciede2000, rgb2lab

    one, two = (rgb2lab(np.array(colors, dtype=float).reshape(-1, 1, 3) / 255) for colors in zip(*pairs))
    return np.maximum(0.0, 1 - deltaE_ciede2000(one, two) / 100).ravel().tolist()


def ssim(one, two) -> float:
    """Of the grey pictures' common part, times that part's share of what both cover."""
    from skimage.metrics import structural_similarity

    height, width = (min(sizes) for sizes in zip(one.shape[:2], two.shape[:2]))
    covered = one.shape[0] * one.shape[1] + two.shape[0] * two.shape[1] - height * width
    small = [Image.fromarray(part[:height, :width]).convert("L").reduce(SSIM_SHRINK) for part in (one, two)]
    grey = [np.asarray(picture, dtype=np.float32) for picture in small]
    if min(grey[0].shape) < 7:  # smaller than SSIM's window
        return 0.0
    return max(0.0, float(structural_similarity(*grey, data_range=255))) * height * width / covered
