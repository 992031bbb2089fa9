"""What a page costs: weights that multiply, floating-point operations, seconds, and steps of equal cost. No memory.

    shape = family_of(config).shape(config)                         # families/: what the formulas need to know
    flops = page_flops(shape, tokens=2_800, supervised=1_500, patches=5_000)
    page_operations(shape, 2_800, 1_500, 5_000).language            # of that, what the language model's layers need
    page_seconds(flops, peak_tflops("NVIDIA H200"))
    deal(costs, bins=8)             # the pages of a step in groups that take equally long

Imports neither torch nor anything of ours: the numbers that the plan and the layers share stand here, below both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

LOSS_ROWS = 2_048  # rows of logits that exist at once: 0.6 GiB in bf16 for 151,936 words

# Dense bf16 TFLOP/s by NVIDIA's datasheets; the first name that the device's own contains.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165}
PEAK_TFLOPS |= {"B200": 2250}
# Of a GPU's peak, while a step works: 3B on an H200 took 1.67 s for operations that are half of that at the peak, and
# 0.2 s of it were its two micro-batches' own (memory_plan.MICRO_BATCH_SECONDS).
USED_SHARE = 0.5


@dataclass(frozen=True)
class LinearAttention:
    """The layers of a tower whose attention is a gated delta network (Yang et al. 2024): by their widths in numbers per
    token, those of all heads together. Each of `heads`, of the values, has a state of its width times `state`."""

    layers: int
    keys: int
    values: int
    heads: int
    state: int

    def weights(self, hidden: int) -> int:
        """Weights that multiply, of one layer: queries, keys, values, a gate, two numbers a head, and what leaves."""
        return hidden * (2 * self.keys + 3 * self.values + 2 * self.heads)

    @property
    def kept(self) -> int:
        """Numbers per token that one layer keeps between its products for the backward pass, where
        flash-linear-attention takes it: queries, keys and values before the convolution, and after it apart and normed;
        the gate and what was read; and for each head a row of its chunk, of 64 tokens, and two numbers as they come and
        in fp32."""
        return 4 * self.keys + 4 * self.values + (64 + 6) * self.heads

    @property
    def made(self) -> int:
        """Numbers per token that stand in memory besides while flash-linear-attention takes one layer's backward pass:
        of each chunk of 64 tokens the states and their gradients; as wide as a state's side for each head, what is
        taken from it and four gradients; and values four times. Counted in fla-core 0.6.0, all alive at its end; with
        what is `kept`, within 2 % of what one layer took (benchmarks/results/h100_linear_attention.json)."""
        return 2 * self.values * self.state // 64 + 5 * self.heads * self.state + 4 * self.values

    @property
    def flops(self) -> int:
        """Operations of one layer's state for a token, forward: read with the key, written, read with the query."""
        return 6 * self.values * self.state


@dataclass(frozen=True)
class Tower:
    """Transformer layers of one kind, by their widths in numbers per token (or patch).

    `queries` and `keys` are those of all heads together, `gates` what multiplies the attention's result; `gated` is an
    MLP of three products, else of two. `windowed` of the layers attend to no more than `window` tokens, the others to
    all but those of `linear` attention; `normed_heads` is a norm of each head of queries and keys. `padded` numbers
    more are kept by a layer that attends without a window, where flash-attn 4 takes its segments (`head_padding`).
    """

    layers: int
    hidden: int
    queries: int
    keys: int
    intermediate: int
    gated: bool = True
    windowed: int = 0
    window: int = 0
    gates: int = 0
    linear: LinearAttention = LinearAttention(0, 0, 0, 0, 0)
    normed_heads: bool = False
    padded: int = 0

    @property
    def attending(self) -> int:
        """Layers whose tokens look at each other."""
        return self.layers - self.linear.layers

    @property
    def kept(self) -> int:
        """Numbers per token that one layer whose tokens look at each other keeps between its products for the backward
        pass: query, key, value and what attention made of them; queries and keys before their heads are normed; and
        the gate."""
        return 2 * self.queries + 2 * self.keys + (self.queries + self.keys) * self.normed_heads + self.gates

    @property
    def last(self) -> int:
        """Weights of the last products of all layers, which are left out where a layer is recomputed."""
        return self.layers * self.hidden * self.intermediate

    @property
    def weights(self) -> int:
        """Weights that multiply, of all layers: neither norms nor biases."""
        attention = self.hidden * (2 * self.queries + 2 * self.keys + self.gates)
        mlp = (3 if self.gated else 2) * self.hidden * self.intermediate
        return self.attending * attention + self.linear.layers * self.linear.weights(self.hidden) + self.layers * mlp


def head_padding(hidden: int, heads: int) -> int:
    """Numbers more per patch that a layer keeps whose heads flash-attn 4 has to be given wider, in whole 32s: query,
    key, value and result as wide as that, and the result as the product behind it takes it (attention.flash_4)."""
    more = -(hidden // heads) % 32
    return 4 * heads * more + hidden * (more > 0)


@dataclass(frozen=True)
class Shape:
    """A model as its costs see it. `patch` counts the numbers of one patch of a screenshot, `per_token` the patches
    that become one image token, `merger` the weights that multiply once for each image token, which are those of
    `mergers` of them."""

    language: Tower
    vocabulary: int
    tied: bool  # the head is the embedding
    vision: Tower
    patch: int
    per_token: int
    merger: int
    mergers: int = 1


def peak_tflops(device: str) -> float | None:
    """Dense bf16 TFLOP/s of a device, by the name that torch gives it; None where it is not known."""
    return next((tflops for name, tflops in PEAK_TFLOPS.items() if name in device), None)


def parameters(shape: Shape) -> tuple[int, int, int, int]:
    """Weights that multiply: (language layers, head, vision layers with what reads the patches, merger)."""
    tower = shape.vision.weights + shape.patch * shape.vision.hidden
    return shape.language.weights, shape.language.hidden * shape.vocabulary, tower, shape.merger


def weights_of(shape: Shape) -> tuple[int, int, int]:
    """Weights of (language layers, vision tower and merger, embedding and head)."""
    language, head, tower, merger = parameters(shape)
    return language, tower + merger, head if shape.tied else 2 * head


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of a page, forward and backward, nothing recomputed, by what does them: the layers of
    either tower, and the `rest`, which is the head, the merger, and what reads the patches."""

    language: float
    vision: float
    rest: float

    @property
    def total(self) -> float:
        """Those of the whole page."""
        return self.language + self.vision + self.rest


def page_operations(shape: Shape, tokens: int, supervised: int, patches: int) -> Operations:
    """What one page needs: products and attention.

    6 per weight and token, as Kaplan et al. 2020 count, the head for supervised tokens only; causal attention half;
    linear attention as its definition has it, token by token, though chunks of tokens take more.
    """
    text, vision = shape.language, shape.vision
    language, head, tower, merger = parameters(shape)
    attention = 12 * text.attending * text.queries * tokens**2 / 2 + 3 * text.linear.layers * text.linear.flops * tokens
    seen = (vision.layers - vision.windowed) * patches + vision.windowed * min(vision.window, patches)
    rest = head * supervised + (tower - vision.weights) * patches + merger * patches / shape.per_token
    return Operations(
        language=6 * language * tokens + attention,
        vision=6 * vision.weights * patches + 12 * vision.queries * patches * seen,
        rest=6 * rest,
    )


def page_flops(shape: Shape, tokens: int, supervised: int, patches: int) -> float:
    """Floating-point operations that one page needs (`page_operations`), all together."""
    return page_operations(shape, tokens, supervised, patches).total


def flops_of_pages(shape: Shape, counted: Iterable[Mapping[str, int]], question: int) -> list[float]:
    """`page_flops` of pages by their counted `html_tokens` and `image_tokens`; the question has `question` more."""
    costs = []
    for page in counted:
        tokens = question + page["image_tokens"] + page["html_tokens"] + 1
        patches = page["image_tokens"] * shape.per_token
        costs.append(page_flops(shape, tokens, page["html_tokens"] + 1, patches))
    return costs


def page_seconds(flops: float, tflops: float | None) -> float:
    """Seconds that a page of `flops` keeps a GPU of `tflops` (by its datasheet; unknown: an H100's) busy."""
    return flops / (USED_SHARE * (tflops or 989) * 1e12)


def deal(costs: Sequence[float], bins: int) -> list[list[int]]:
    """Indices 0..len(costs)-1 in `bins` groups of equal size (one more in some, if they do not divide) and cost.

    The dearest first, each to the cheapest group with room (LPT, Graham 1969); groups come back dearest first.
    """
    groups: list[list[int]] = [[] for _ in range(bins)]
    sums = [0.0] * bins
    room = [len(costs) // bins + (group < len(costs) % bins) for group in range(bins)]
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        chosen = min((group for group in range(bins) if len(groups[group]) < room[group]), key=lambda g: (sums[g], g))
        groups[chosen].append(index)
        sums[chosen] += costs[index]
    return [groups[group] for group in sorted(range(bins), key=lambda group: (-sums[group], group))]
