"""Layers that take packed pages, each part faster than the model's own way to the same: what families share.

A family's `Architecture` names those that stand for its modules. Nothing here changes what is computed, which the tests
show. Sections: Modules, Blocks, Model.

Shapes: T language tokens of all pages of a pack, P patches of all their pictures, S either of them; H the width of the
residual stream, I of the MLP, D of a head; (S, heads, D), `page_bounds` and `cu_seqlens` as in kernels/attention.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from families.chunked_loss import supervised_loss
from kernels.attention import attend

if TYPE_CHECKING:
    from transformers.modeling_outputs import CausalLMOutputWithPast

# The activations of `swiglu` and `gelu`, by the names that torch and transformers give them.
SILU = ("SiLU", "SiLUActivation")
GELU = ("GELUTanh",)

# -----------------------------------------------------------------------------
# Modules: forwards that know of packed pages


def norm_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
    """(..., H) to (..., H)."""
    return self.fused.rms_norm(hidden_states, self.weight, epsilon_of(self))


def epsilon_of(norm: torch.nn.Module) -> float:
    """What a norm adds before it divides, by either of transformers' names for it."""
    return norm.eps if hasattr(norm, "eps") else norm.variance_epsilon


def mlp_forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
    """(..., H) to (..., H): a block does without it, but adapters, 4-bit weights and autocast come here."""
    return self.down_proj(self.fused.swiglu(self.gate_proj(hidden_state), self.up_proj(hidden_state)))


def rows_of(hidden_states: torch.Tensor) -> torch.Tensor:
    """(1, T, H) as (T, H). Not by an index, whose gradient would be zeros, and then a copy into them."""
    return hidden_states.flatten(0, 1)


def language_attention(
    self,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    page_bounds: torch.Tensor,
    longest_page: int,
    **unused,
) -> tuple[torch.Tensor, None]:
    """(1, T, H) to ((1, T, H), None); pages see themselves only, and only what stands before."""
    rows = rows_of(hidden_states)
    parts = [part(rows) for part in (self.q_proj, self.k_proj, self.v_proj)]
    done = language_heads(self, parts, position_embeddings, page_bounds, longest_page)
    return self.o_proj(done)[None], None


def language_heads(
    self,
    parts: Sequence[torch.Tensor],
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    page_bounds: torch.Tensor,
    longest_page: int,
) -> torch.Tensor:
    """Query, key, value (T, heads x D each) and positions, cos and sin (1, T, D), to (T, heads x D)."""
    query, key, value = (part.view(len(part), -1, self.head_dim) for part in parts)
    if hasattr(self, "q_norm"):
        query, key = normed_heads(query, self.q_norm), normed_heads(key, self.k_norm)
    cos, sin = (part[0, :, None] for part in position_embeddings)
    query, key = self.fused.rotate(query, key, cos, sin)
    # A flash kernel takes all three in one precision.
    return attend(query, key, value.to(query.dtype), page_bounds, longest_page, self.scaling, causal=True).flatten(1)


def vision_attention(
    self,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    max_seqlen: int,
    **unused,
) -> torch.Tensor:
    """(P, H) to (P, H); patches see their window or, in some layers, their picture."""
    # transformers hands each layer the bounds that are its own: those of windows or those of pictures.
    return self.proj(vision_heads(self, self.qkv(hidden_states), cu_seqlens, position_embeddings, max_seqlen))


def vision_heads(
    self,
    together: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    max_seqlen: int,
) -> torch.Tensor:
    """Query, key and value `together` (P, 3H), cos and sin (P, D), to (P, H)."""
    parts = together.view(len(together), 3, self.num_heads, -1).unbind(1)
    # The tower turns in fp32, as transformers does; the language model in the precision of its states.
    cos, sin = (part.float()[:, None] for part in position_embeddings)
    query, key = self.fused.rotate(*parts[:2], cos, sin)
    # A copy of the values lets go of the three together, of which the other two are not needed any more.
    return attend(query, key, parts[2].contiguous(), cu_seqlens, max_seqlen, self.scaling, causal=False).flatten(1)


def patch_forward(self, pixels: torch.Tensor) -> torch.Tensor:
    """The patch embedding's convolution, whose kernel covers each patch exactly once, as the product that it is:
    (P, 3, frames, height, width) to (P, H, 1, 1, 1)."""
    done = torch.nn.functional.linear(pixels.flatten(1), self.weight.flatten(1), self.bias)
    return done[:, :, None, None, None]


def head_forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
    """The loss, a scalar, of states `hidden` (L, H) against `targets` (L,); without targets their logits (..., V)."""
    # Without targets as Linear itself does it: by torch.nn.functional's, which DeepSpeed replaces under ZeRO-3.
    if targets is None:
        return torch.nn.functional.linear(hidden, self.weight)
    return supervised_loss(hidden, self.weight, targets, self.fused.cross_entropy)


# -----------------------------------------------------------------------------
# Blocks: a whole layer of plain weights, with bias or residual inside the products, keeping for the backward pass only
# what is dear to recompute: of 100 KB a token and layer, 61 (selective recomputation, Korthikanti et al. 2022)


def language_block(
    self,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    page_bounds: torch.Tensor,
    longest_page: int,
    again: bool = False,
    **unused,
) -> torch.Tensor:
    """A layer of the language model, (1, T, H) to (1, T, H)."""
    attention, mlp, rows = self.self_attn, self.mlp, rows_of(hidden_states)
    parts = normed_products(rows, self.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
    done = language_heads(attention, parts, position_embeddings, page_bounds, longest_page)
    rows = add_product(rows, done, attention.o_proj)
    return add_mlp(rows, self.post_attention_layernorm, mlp, again)[None]


def vision_block(
    self,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    max_seqlen: int,
    again: bool = False,
    **unused,
) -> torch.Tensor:
    """A layer of the vision tower, (P, H) to (P, H)."""
    # The tower's weights hold query, key and value together, so they come out of one product.
    (together,) = normed_products(hidden_states, self.norm1, self.attn.qkv)
    done = vision_heads(self.attn, together, cu_seqlens, position_embeddings, max_seqlen)
    return add_mlp(add_product(hidden_states, done, self.attn.proj), self.norm2, self.mlp, again)


def vision_gelu_block(
    self,
    hidden_states: torch.Tensor,
    cu_seqlens: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    max_seqlen: int,
    again: bool = False,
    **unused,
) -> torch.Tensor:
    """A layer of a vision tower with LayerNorm and an MLP of two products around `gelu`, (P, H) to (P, H)."""
    (together,) = normed_products(hidden_states, self.norm1, self.attn.qkv)
    done = vision_heads(self.attn, together, cu_seqlens, position_embeddings, max_seqlen)
    rows, mlp = add_product(hidden_states, done, self.attn.proj), self.mlp
    parts = (self.norm2.weight, self.norm2.bias, *_flat((mlp.linear_fc1, mlp.linear_fc2)))
    return AddGeluMlp.apply(rows, self.norm2, again, *parts)


def layer_forward(self, hidden_states: torch.Tensor, *positional, **options) -> torch.Tensor:
    """The block of this layer; its own forward where adapters, 4-bit weights or autocast have a way of their own."""
    # Asked at every call: adapters come after `install`, and autocast is a matter of the moment.
    if positional or torch.is_autocast_enabled(hidden_states.device.type) or parts_of(self) != self.plain_parts:
        return type(self).forward(self, hidden_states, *positional, **options)
    block = functools.partial(self.block, self, **options)
    # As transformers' GradientCheckpointingLayer does around a layer's own forward (5.23), with the same function, so
    # that whatever `gradient_checkpointing_enable` was told holds here, too. But a block draws no random numbers, whose
    # state would be read and set around it by a CPU that launches a layer of the tower more slowly than that computes.
    if self.gradient_checkpointing and self.training:
        return self._gradient_checkpointing_func(Recomputed(block), hidden_states, preserve_rng_state=False)
    return block(hidden_states)


class Recomputed:
    """A block that torch runs once more in the backward pass, for what it keeps: of its last product, a quarter of the
    layer's, nothing is kept, so that is left out then, and what comes back has no values."""

    def __init__(self, block: Callable[..., torch.Tensor]):
        self.block, self.again = block, False

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The block of `hidden`; from the second time on only what it keeps."""
        again, self.again = self.again, True
        return self.block(hidden, again=again)


def parts_of(layer: torch.nn.Module) -> list[type]:
    """The classes of the parts of a layer's parts: adapters put others there."""
    return [type(part) for child in layer.children() for part in child.children()]


def is_plain(layer: torch.nn.Module) -> bool:
    """Whether all products of a layer are torch's own, not those of 4-bit weights."""
    return all(type(part) is torch.nn.Linear for part in layer.modules() if isinstance(part, torch.nn.Linear))


class Products(Protocol):
    """Another way to the three functions below, an attribute `products` of the linear layers that go it."""

    def normed_products(
        self, hidden: torch.Tensor, norm: torch.nn.Module, *linears: torch.nn.Linear
    ) -> tuple[torch.Tensor, ...]: ...

    def add_product(self, residual: torch.Tensor, hidden: torch.Tensor, linear: torch.nn.Linear) -> torch.Tensor: ...

    def add_mlp(
        self, hidden: torch.Tensor, norm: torch.nn.Module, *linears: torch.nn.Linear, again: bool
    ) -> torch.Tensor: ...


def products_of(*linears: torch.nn.Linear) -> Products | None:
    """The other way of `linears`, which belong together; None where one of them has none, as almost always."""
    ways = [getattr(linear, "products", None) for linear in linears]
    return ways[0] if all(ways) else None


def normed_products(hidden: torch.Tensor, norm: torch.nn.Module, *linears: torch.nn.Linear) -> tuple[torch.Tensor, ...]:
    """norm(`hidden`) (S, H) times the weights of each of `linears`, (S, out) each; what was normed is recomputed in the
    backward pass."""
    if way := products_of(*linears):
        return way.normed_products(hidden, norm, *linears)
    return NormedProducts.apply(hidden, norm, len(linears), norm.weight, bias_of(norm), *_flat(linears))


def normed_heads(states: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    """Each head of `states` (S, heads, D) normed by itself, in the precision of `states`."""
    return NormedHeads.apply(states, norm, norm.weight)


def add_product(residual: torch.Tensor, hidden: torch.Tensor, linear: torch.nn.Linear) -> torch.Tensor:
    """`residual` (S, H) + `linear`(`hidden`) (S, in); returns (S, H)."""
    if way := products_of(linear):
        return way.add_product(residual, hidden, linear)
    return AddProduct.apply(residual, hidden, linear.weight, linear.bias)


def add_mlp(hidden: torch.Tensor, norm: torch.nn.Module, mlp: torch.nn.Module, again: bool = False) -> torch.Tensor:
    """`hidden` + mlp(rms_norm(`hidden`)), (S, H); what was normed and the gated product are recomputed in the backward
    pass, gate and up (S, I) are kept. With `again` nothing but what is kept is made (`Recomputed`)."""
    linears = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if way := products_of(*linears):
        return way.add_mlp(hidden, norm, *linears, again=again)
    return AddMlp.apply(hidden, norm, again, norm.weight, *_flat(linears))


def _flat(linears: Sequence[torch.nn.Linear]) -> list[torch.Tensor | None]:
    """Weight and bias of each, one after another, as autograd has to see them to ask for their gradients."""
    return [tensor for linear in linears for tensor in (linear.weight, linear.bias)]


def bias_of(norm: torch.nn.Module) -> torch.Tensor | None:
    """The bias of a LayerNorm, which tells it from an RMSNorm."""
    return getattr(norm, "bias", None)


def _norm(norm: torch.nn.Module, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is None:
        return norm.fused.rms_norm(hidden, weight, epsilon_of(norm))
    return norm.fused.layer_norm(hidden, weight, bias, norm.eps)


def _norm_gradients(
    norm: torch.nn.Module, hidden: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """For `hidden`, plus `residual`, for the weight and for the bias."""
    if bias_of(norm) is None:
        return *norm.fused.rms_norm_backward(hidden, weight, epsilon_of(norm), gradient, residual), None
    return norm.fused.layer_norm_backward(hidden, weight, norm.eps, gradient, residual)


# The autograd functions. Weights are saved as parameters, not as views, so that ZeRO-3 may take their data away and
# bring it back in between.


def weight_gradients(ctx, place: int, gradient: torch.Tensor, hidden: torch.Tensor) -> list[torch.Tensor | None]:
    """For the weight (out, in) at input `place` and the bias (out,) after it, of `gradient` (S, out) and `hidden`
    (S, in); None for what is frozen, and for the bias that is not there."""
    for_weight = gradient.T @ hidden if ctx.needs_input_grad[place] else None
    # A sum over rows as a product: a GPU takes two thirds of the time.
    for_bias = gradient.T @ gradient.new_ones(len(gradient)) if ctx.needs_input_grad[place + 1] else None
    return [for_weight, for_bias]


def add_linear(
    residual: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    # One call that adds as it multiplies; with a bias the product is new, so the residual may be added in place.
    if bias is None:
        return torch.addmm(residual, hidden, weight.T)
    return _linear(hidden, weight, bias).add_(residual)


def _linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # DeepSpeed puts another one into torch.nn.functional, an autograd function inside ours (zero3.plain_linear).
    return torch._C._nn.linear(hidden, weight, bias)


class NormedProducts(torch.autograd.Function):
    """`normed_products` for autograd: keeps the residual stream and the weights, (S, H) in all."""

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        norm: torch.nn.Module,
        count: int,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor | None,
        *weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        normed = _norm(norm, hidden, norm_weight, norm_bias)
        ctx.save_for_backward(hidden, norm_weight, norm_bias, *weights[::2])
        ctx.norm = norm
        return tuple(_linear(normed, weights[2 * n], weights[2 * n + 1]) for n in range(count))

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple:
        hidden, norm_weight, norm_bias, *weights = ctx.saved_tensors
        normed, found = _norm(ctx.norm, hidden, norm_weight, norm_bias), []
        # Summed up inside the products, which saves a pass over (S, H) for each product after the first.
        inner = gradients[0] @ weights[0]
        for gradient, weight in zip(gradients[1:], weights[1:]):
            inner = inner.addmm_(gradient, weight)
        for number, gradient in enumerate(gradients):
            found += weight_gradients(ctx, 5 + 2 * number, gradient, normed)
        # Nothing went past the norm here: the residual's own gradient comes from `AddProduct`.
        nothing = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
        outer, *for_norm = _norm_gradients(ctx.norm, hidden, norm_weight, inner, nothing)
        return outer, None, None, *for_norm, *found


class NormedHeads(torch.autograd.Function):
    """`normed_heads` for autograd: keeps what was not normed yet."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, norm: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        ctx.norm = norm
        # As rows of one head each: one shape for the heads of queries and of keys, of which there are fewer.
        done = norm.fused.head_norm(states.reshape(-1, states.shape[-1]), weight, norm.variance_epsilon)
        return done.view(states.shape).to(states.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        states, weight = ctx.saved_tensors
        rows, outer = (part.reshape(-1, part.shape[-1]) for part in (states, gradient))
        nothing = torch.zeros((), dtype=states.dtype, device=states.device)
        backward, epsilon = ctx.norm.fused.head_norm_backward, ctx.norm.variance_epsilon
        for_states, for_weight = backward(rows, weight, epsilon, outer, nothing)
        return for_states.view(states.shape), None, for_weight


class AddProduct(torch.autograd.Function):
    """`add_product` for autograd: the residual's gradient is the one that comes, no copy of it."""

    @staticmethod
    def forward(
        ctx, residual: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        return add_linear(residual, hidden, weight, bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        hidden, weight = ctx.saved_tensors
        return gradient, gradient @ weight, *weight_gradients(ctx, 2, gradient, hidden)


class AddMlp(torch.autograd.Function):
    """`add_mlp` for autograd: keeps the residual stream, gate and up."""

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        norm: torch.nn.Module,
        again: bool,
        norm_weight: torch.Tensor,
        gate_weight: torch.Tensor,
        gate_bias: torch.Tensor | None,
        up_weight: torch.Tensor,
        up_bias: torch.Tensor | None,
        down_weight: torch.Tensor,
        down_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        normed = norm.fused.rms_norm(hidden, norm_weight, epsilon_of(norm))
        gate, up = _linear(normed, gate_weight, gate_bias), _linear(normed, up_weight, up_bias)
        ctx.save_for_backward(hidden, gate, up, norm_weight, gate_weight, up_weight, down_weight)
        ctx.norm = norm
        return (
            torch.empty_like(hidden)
            if again
            else add_linear(hidden, norm.fused.swiglu(gate, up), down_weight, down_bias)
        )

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        hidden, gate, up, norm_weight, gate_weight, up_weight, down_weight = ctx.saved_tensors
        fused, epsilon = ctx.norm.fused, epsilon_of(ctx.norm)
        for_gate, for_up, product = fused.swiglu_backward(gate, up, gradient @ down_weight)
        for_down = weight_gradients(ctx, 8, gradient, product)
        del product  # before what was normed is recomputed: the two need not stand in memory together
        normed = fused.rms_norm(hidden, norm_weight, epsilon)
        found = weight_gradients(ctx, 4, for_gate, normed) + weight_gradients(ctx, 6, for_up, normed)
        inner = (for_gate @ gate_weight).addmm_(for_up, up_weight)
        outer, for_norm = fused.rms_norm_backward(hidden, norm_weight, epsilon, inner, gradient)
        return outer, None, None, for_norm, *found, *for_down


class AddGeluMlp(torch.autograd.Function):
    """`hidden` + mlp(norm(`hidden`)), (S, H), for autograd: keeps the residual stream and what goes into `gelu`."""

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        norm: torch.nn.Module,
        again: bool,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        first_weight: torch.Tensor,
        first_bias: torch.Tensor | None,
        second_weight: torch.Tensor,
        second_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        inner = _linear(_norm(norm, hidden, norm_weight, norm_bias), first_weight, first_bias)
        ctx.save_for_backward(hidden, inner, norm_weight, norm_bias, first_weight, second_weight)
        ctx.norm = norm
        return (
            torch.empty_like(hidden)
            if again
            else add_linear(hidden, norm.fused.gelu(inner), second_weight, second_bias)
        )

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        hidden, inner, norm_weight, norm_bias, first_weight, second_weight = ctx.saved_tensors
        for_inner, product = ctx.norm.fused.gelu_backward(inner, gradient @ second_weight)
        for_second = weight_gradients(ctx, 7, gradient, product)
        del product  # as in `AddMlp`
        found = weight_gradients(ctx, 5, for_inner, _norm(ctx.norm, hidden, norm_weight, norm_bias))
        outer, *for_norm = _norm_gradients(ctx.norm, hidden, norm_weight, for_inner @ first_weight, gradient)
        return outer, None, None, *for_norm, *found, *for_second


# -----------------------------------------------------------------------------
# Model


def add_at_places(
    self, hidden_states: torch.Tensor, visual_pos_masks: torch.Tensor, visual_embeds: torch.Tensor
) -> torch.Tensor:
    """DeepStack (Meng et al. 2024): `visual_embeds` (image tokens, H) added to `hidden_states` (1, T, H) at the places
    (image tokens,), which stand for the mask: a GPU would be waited for to count that."""
    return hidden_states.index_add(1, visual_pos_masks, visual_embeds.to(hidden_states.dtype)[None])


def packed_forward(
    self,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    pixel_values: torch.Tensor,
    image_grid_thw: torch.Tensor,
    image_places: torch.Tensor,
    page_bounds: torch.Tensor,
    longest_page: int,
    supervised_places: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    **geometry: torch.Tensor | int,
) -> CausalLMOutputWithPast:
    """The loss of one row of packed pages: the sum over its supervised tokens / `num_items_in_batch`, or their mean.

    `input_ids` (1, T), `position_ids` (4, 1, T), `pixel_values` (P, pixels of a patch), `image_grid_thw` (pages, 3) in
    patches, `image_places` (image tokens,), `page_bounds` (pages + 1), `supervised_places` and `targets` (L,), and what
    the family's `geometry` has made of the grids. Returns transformers' output with nothing but `loss`.
    """
    # Not at the top: transformers is heavy, and the rest of this room does without it.
    from transformers.modeling_outputs import CausalLMOutputWithPast

    core, vision = self.model, {name.removeprefix("image_"): value for name, value in geometry.items()}
    if "interp_bits" in vision:
        vision["interp_weights"] = vision.pop("interp_bits").view(torch.float32)
    # The pictures of all pages go through the tower in one row, too; its windows and pictures are the segments there.
    seen = core.visual(pixel_values.to(core.visual.dtype), grid_thw=image_grid_thw, **vision)
    # Of some families (Qwen3-VL) also what the first layers of the language model are given of the tower's.
    deep = getattr(seen, "deepstack_features", None)
    deep = {"visual_pos_masks": image_places, "deepstack_visual_embeds": deep} if deep else {}
    embedded = rows_of(core.get_input_embeddings()(input_ids))
    embedded = embedded.index_copy(0, image_places, seen.pooler_output.to(embedded.dtype))[None]  # (1, T, H)
    pages = {"page_bounds": page_bounds, "longest_page": longest_page}
    # The segments are the mask. One of four dimensions is ready-made for transformers (5.23): none of T x T is made.
    mask = embedded.new_empty((1, 1, 1, 1))
    options = {"position_ids": position_ids, "attention_mask": mask, "use_cache": False, **deep}
    # transformers passes words that it does not know down to the layers, which is how the bounds come there.
    hidden = core.language_model(inputs_embeds=embedded, **options, **pages).last_hidden_state
    # Picked before the head: of 151,936 logits a token, only those that the loss sees are ever computed.
    loss = self.lm_head(rows_of(hidden).index_select(0, supervised_places), targets)
    return CausalLMOutputWithPast(loss=loss / (len(targets) if num_items_in_batch is None else num_items_in_batch))
