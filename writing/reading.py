"""Screenshots and questions read into slots: the vision tower and the language model over what stands before an answer.

    question = question_of(processor, recipe, request)              # on a CPU, in any thread
    reader.read([question, ...], cache, [slot, ...])      # keys and values of all but each question's last token

Pages are packed into one row, as in training, but without gradients: nothing of it is kept. All of Qwen2.5-VL
(transformers 5.23), which is the one architecture that `Reader` knows.

Shapes: T tokens and P patches of all pages that are read together; H and D as in kernels/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

import use_model_from_hub as use
from kernels import row_kernels, slot_attention
from kernels.attention import attend
from kernels.positions import image_geometry, page_positions

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


class Layer:
    """The weights of a layer of either tower, those that take the same input side by side in one.

    The model's own parameters become views of them: it stays as it was, and nothing is in memory twice.
    """

    def __init__(self, layer: torch.nn.Module):
        mlp = layer.mlp
        if hasattr(layer, "self_attn"):
            attention = layer.self_attn
            self.norms = (layer.input_layernorm, layer.post_attention_layernorm)
            self.qkv, self.qkv_bias = side_by_side(attention.q_proj, attention.k_proj, attention.v_proj)
            self.out, self.out_bias = attention.o_proj.weight, None
        else:
            attention, self.norms = layer.attn, (layer.norm1, layer.norm2)
            self.qkv, self.qkv_bias = attention.qkv.weight, attention.qkv.bias
            self.out, self.out_bias = attention.proj.weight, attention.proj.bias
        self.gated, self.gated_bias = side_by_side(mlp.gate_proj, mlp.up_proj)
        self.down, self.down_bias = mlp.down_proj.weight, mlp.down_proj.bias
        self.scale = attention.scaling

    def norm(self, number: int) -> tuple[torch.Tensor, float]:
        """Weight and epsilon of the norm before attention (0) or the MLP (1)."""
        return self.norms[number].weight, self.norms[number].variance_epsilon


def side_by_side(*linears: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights (N of all, K) and biases (N of all,) as one tensor each, of which the linears' own become views."""
    with torch.no_grad():
        whole = []
        for name in ("weight", "bias"):
            parts = [getattr(module, name) for module in linears]
            if parts[0] is None:
                whole.append(None)
                continue
            joined = torch.cat(parts)
            for part, view in zip(parts, joined.split([len(part) for part in parts])):
                part.data = view
            whole.append(joined)
    return whole[0], whole[1]


def aligned(layer: Layer, multiple: int = 32) -> None:
    """Widen the MLP of a vision layer with zeros, in the copies that reading uses: 3,420 columns are no multiple of 8,
    and half-precision products of such fall back to old tensor-core kernels. Zeros stay zeros: silu(0) x 0 = 0."""
    missing = -len(layer.gated) // 2 % multiple
    if not missing:
        return
    gate, up = layer.gated.chunk(2)
    layer.gated = torch.cat([functional.pad(part, (0, 0, 0, missing)) for part in (gate, up)])
    if layer.gated_bias is not None:
        layer.gated_bias = torch.cat([functional.pad(part, (0, missing)) for part in layer.gated_bias.chunk(2)])
    layer.down = functional.pad(layer.down, (0, missing))


def add_mlp(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    """`hidden` (S, H) and the MLP of it."""
    normed = row_kernels.rms_norm(hidden, *layer.norm(1))
    inner = row_kernels.swiglu(functional.linear(normed, layer.gated, layer.gated_bias))
    return add_linear(hidden, inner, layer.down, layer.down_bias)


def add_linear(
    hidden: torch.Tensor, inner: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`hidden` (S, N) plus `inner` (S, K) times `weight` (N, K), in one call where there is no bias."""
    return torch.addmm(hidden, inner, weight.T) if bias is None else functional.linear(inner, weight, bias).add_(hidden)


class Reader:
    """Reads questions with the weights of `model`, a Qwen2.5-VL of plain weights; `layers` are shared with writing."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[Layer]):
        self.core, self.layers = model.model, layers
        self.image_token = model.config.image_token_id
        self.geometry = image_geometry(model.config)
        with torch.no_grad():
            self.blocks = [Layer(block) for block in self.core.visual.blocks]
            for block in self.blocks:
                if block.gated.element_size() == 2:
                    aligned(block)

    @torch.inference_mode()
    def see(self, pictures: Sequence[torch.Tensor], grids: torch.Tensor) -> torch.Tensor:
        """`pictures` (patches, pixels of one), each of its row in `grids` (pictures, 3), all on a CPU, to their tokens
        (P / 4, H)."""
        tower, device = self.core.visual, self.core.device
        geometry = self.geometry(grids)
        order = geometry["image_window_index"]
        unit, back = tower.spatial_merge_unit, torch.argsort(order).to(device, non_blocking=True)
        places = geometry["image_position_ids"].view(len(order), unit, -1)[order].flatten(0, 1)
        patches = torch.cat([patches.to(device, tower.dtype, non_blocking=True) for patches in pictures])
        hidden = functional.linear(patches, tower.patch_embed.proj.weight.flatten(1))
        # Windows stand together from here on.
        hidden = hidden.view(len(order), unit, -1)[order.to(device, non_blocking=True)].flatten(0, 1)
        cos, sin = (part.float() for part in tower.rotary_pos_emb(hidden, places.to(device, non_blocking=True)))
        bounds = [
            (geometry[f"image_cu_{name}seqlens"].to(device, torch.int32), geometry[f"image_max_{name}seqlen"])
            for name in ("window_", "")
        ]
        for number, block in enumerate(self.blocks):
            hidden = self.see_block(block, hidden, (cos, sin), *bounds[number in tower.fullatt_block_indexes])
        return tower.merger(hidden)[back]

    def see_block(
        self,
        block: Layer,
        hidden: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        bounds: torch.Tensor,
        longest: int,
    ) -> torch.Tensor:
        """A layer of the vision tower, (P, H) to (P, H), over the segments of `bounds`."""
        heads = self.core.visual.config.num_heads
        together = functional.linear(row_kernels.rms_norm(hidden, *block.norm(0)), block.qkv, block.qkv_bias)
        query, key, value = together.view(len(hidden), 3, heads, -1).unbind(1)
        query, key = rotate(query, key, *angles)
        done = attend(query, key, value.contiguous(), bounds, longest, block.scale, causal=False).flatten(1)
        return add_mlp(block, add_linear(hidden, done, block.out, block.out_bias))

    @torch.inference_mode()
    def read(self, questions: Sequence[Question], cache: Cache, slots: Sequence[int]) -> list[int]:
        """Keys and values of each question, and of what is written of its answer, into the slots, but for the last
        token, which the first step of writing takes. Returns what mRoPE adds to the places of each answer."""
        device, config = self.core.device, self.core.config.get_text_config()
        grids = torch.stack([question.grid for question in questions])
        pictures = self.see([question.patches for question in questions], grids)
        rows = [(question.ids + question.written)[:-1] for question in questions]
        ids = torch.tensor([token for row in rows for token in row])
        merge, text = self.core.visual.spatial_merge_size, config.num_attention_heads
        fewer, sizes = config.num_key_value_heads, [(int(h) // merge, int(w) // merge) for _, h, w in grids]
        before = [question.ids.index(self.image_token) for question in questions]
        positions = [page_positions(start, *size, len(row)) for start, size, row in zip(before, sizes, rows)]
        image_places = (ids == self.image_token).nonzero().flatten().to(device, non_blocking=True)
        hidden = self.core.get_input_embeddings()(ids.to(device, non_blocking=True))
        hidden = hidden.index_copy(0, image_places, pictures.to(hidden.dtype))
        places = torch.cat(positions, dim=1)[1:, None].to(device, non_blocking=True)
        angles = [part[0] for part in self.core.language_model.rotary_emb(hidden[None], places)]
        lengths = torch.tensor([0, *(len(row) for row in rows)])
        bounds, longest = lengths.cumsum(0).to(device, torch.int32), int(lengths.max())
        slot = torch.tensor(list(slots)).repeat_interleave(lengths[1:]).to(device, non_blocking=True)
        place = torch.cat([torch.arange(len(row)) for row in rows]).to(device, non_blocking=True)
        for number, layer in enumerate(self.layers):
            qkv = functional.linear(row_kernels.rms_norm(hidden, *layer.norm(0)), layer.qkv, layer.qkv_bias)
            query, key, value = qkv.view(len(qkv), text + 2 * fewer, -1).split((text, fewer, fewer), dim=1)
            query, key = rotate(query, key, *angles)
            keys, values = cache.layer(number)
            keys[slot, :, place], values[slot, :, place] = key, value
            done = attend(query, key, value.contiguous(), bounds, longest, layer.scale, causal=True).flatten(1)
            hidden = add_mlp(layer, add_linear(hidden, done, layer.out, layer.out_bias))
        return [max(size) - size[0] * size[1] for size in sizes]


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`query` and `key` (S, heads, D) turned by `cos` and `sin` (S, D), in the precision of the angles."""
    if query.is_cuda and query.element_size() == 2:
        from kernels import rotary_kernel

        return rotary_kernel.turned(query, cos, sin, False), rotary_kernel.turned(key, cos, sin, False)
    turn = slot_attention.turned
    return tuple(turn(part.to(cos.dtype), cos[:, None], sin[:, None]).to(part.dtype) for part in (query, key))
