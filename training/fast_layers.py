"""What makes a step fast and leaves its result the same.

    install(model, fuse=True)       # takes pages packed into one row (packing.pack), each part faster than its own

Nothing here changes what is learned: each part equals the model's own way, which the
tests show. Sections: Element-wise, Modules, Blocks, Model, Vision MLP.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import types
from collections.abc import Callable, Sequence
from functools import lru_cache

from training import zero3
from training.attention import attend
from training.loss import cross_entropy, supervised_loss

# -----------------------------------------------------------------------------
# Element-wise: the model's own formulas, each of which eager torch runs as five to ten passes over memory


def rms_norm(hidden, weight, epsilon: float):
    import torch

    wide = hidden.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(hidden.dtype)


def rms_norm_backward(hidden, weight, epsilon: float, gradient, residual):
    """Gradients of `rms_norm` for `hidden`, plus `residual`, which went past it, and for `weight`."""
    import torch

    wide = hidden.to(torch.float32)
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    normed, outer = wide * inverse, gradient.float()
    inner = outer * weight.float()
    for_hidden = inverse * (inner - normed * (inner * normed).mean(-1, keepdim=True)) + residual.float()
    for_weight = (outer * normed.to(hidden.dtype).float()).sum(0)
    return for_hidden.to(hidden.dtype), for_weight.to(weight.dtype)


def swiglu(gate, up):
    import torch

    return torch.nn.functional.silu(gate) * up


def swiglu_backward(gate, up, gradient):
    """Gradients of `swiglu` for `gate` and `up`, and its value once more."""
    import torch

    sigmoid = torch.sigmoid(gate.float())
    silu = gate.float() * sigmoid
    wide = gradient.float()
    for_gate = wide * up.float() * (sigmoid + silu * (1 - sigmoid))
    return for_gate.to(gate.dtype), (wide * silu).to(up.dtype), silu.to(gate.dtype) * up


def rotate(query, key, cos, sin):
    """Rotary positions; `query`, `key` (S, heads, D), `cos`, `sin` (S, 1, D), whose precision is the product's."""
    import torch

    def turned(states):
        first, second = states.chunk(2, dim=-1)
        wide, halves = states.to(cos.dtype), torch.cat((-second, first), dim=-1).to(cos.dtype)
        return (wide * cos + halves * sin).to(states.dtype)

    return turned(query), turned(key)


class Elementwise:
    """The functions above, for one family of shapes, fused by torch.compile where that works and is asked for."""

    def __init__(self, fuse: bool):
        import torch

        for function in (rms_norm, rms_norm_backward, swiglu, swiglu_backward, rotate, cross_entropy):
            name = function.__name__
            if fuse:
                # A code object of its own: torch.compile keeps its graphs by code, and two families would mix.
                function = types.FunctionType(function.__code__.replace(), function.__globals__, name)
                function = functools.partial(without_history, torch.compile(function))
            setattr(self, name, function)
        if fuse and torch.cuda.is_available():
            from training import rotary_kernel

            compiled = self.rotate
            self.rotate = lambda query, *rest: (rotary_kernel.rotate if query.is_cuda else compiled)(query, *rest)


def without_history(compiled: Callable, *inputs):
    """Call `compiled`; where no gradients are followed, with tensors of one kind.

    It would make a graph for parameters and one for their copies in a layer that is worked out twice, for inputs that
    need gradients and for those that do not, and beyond eight graphs torch leaves a function as it is, and slow.
    """
    import torch

    if not torch.is_grad_enabled():
        inputs = [part.detach() if isinstance(part, torch.Tensor) else part for part in inputs]
    return compiled(*inputs)


def can_fuse() -> str:
    """Why element-wise functions cannot be fused here; empty when they can."""
    import shutil

    import torch

    if not torch.cuda.is_available():
        return "no GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "no C compiler, which triton needs"
    return ""


# -----------------------------------------------------------------------------
# Modules: forwards that know of packed pages


def norm_forward(self, hidden_states):
    return self.fused.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def mlp_forward(self, hidden_state):
    return self.down_proj(self.fused.swiglu(self.gate_proj(hidden_state), self.up_proj(hidden_state)))


def language_attention(self, hidden_states, position_embeddings, page_bounds, longest_page, **unused):
    """(1, T, H) to ((1, T, H), None); pages see themselves only, and only what stands before."""
    rows = hidden_states[0]
    parts = [part(rows) for part in (self.q_proj, self.k_proj, self.v_proj)]
    done = language_heads(self, parts, position_embeddings, page_bounds, longest_page)
    return self.o_proj(done)[None], None


def language_heads(self, parts, position_embeddings, page_bounds, longest_page):
    query, key, value = (part.view(len(part), -1, self.head_dim) for part in parts)
    cos, sin = (part[0, :, None] for part in position_embeddings)
    query, key = self.fused.rotate(query, key, cos, sin)
    return attend(query, key, value.to(query.dtype), page_bounds, longest_page, self.scaling, causal=True).flatten(1)


def vision_attention(self, hidden_states, cu_seqlens, position_embeddings, max_seqlen, **unused):
    """(P, H) to (P, H); patches see their window or, in some layers, their picture."""
    return self.proj(vision_heads(self, self.qkv(hidden_states), cu_seqlens, position_embeddings, max_seqlen))


def vision_heads(self, together, cu_seqlens, position_embeddings, max_seqlen):
    parts = together.view(len(together), 3, self.num_heads, -1).unbind(1)
    cos, sin = (part.float()[:, None] for part in position_embeddings)
    query, key = self.fused.rotate(*parts[:2], cos, sin)
    # A copy of the values lets go of the three together, of which the other two are not needed any more.
    return attend(query, key, parts[2].contiguous(), cu_seqlens, max_seqlen, self.scaling, causal=False).flatten(1)


def patch_forward(self, pixels):
    """The patch embedding's convolution, whose kernel covers each patch exactly once, as the product that it is."""
    import torch

    done = torch.nn.functional.linear(pixels.flatten(1), self.weight.flatten(1))
    return done[:, :, None, None, None]


def head_forward(self, hidden, targets=None):
    import torch

    if targets is None:
        return torch.nn.functional.linear(hidden, self.weight)
    return supervised_loss(hidden, self.weight, targets, self.fused.cross_entropy)


# -----------------------------------------------------------------------------
# Blocks: a whole layer of plain weights, with bias or residual inside the products, keeping for the backward pass only
# what is dear to work out again: of 100 KB a token and layer, 61


def language_block(self, hidden_states, position_embeddings, page_bounds, longest_page, **unused):
    attention, mlp = self.self_attn, self.mlp
    parts = normed_products(
        hidden_states[0], self.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj
    )
    done = language_heads(attention, parts, position_embeddings, page_bounds, longest_page)
    rows = add_product(hidden_states[0], done, attention.o_proj)
    return add_mlp(rows, self.post_attention_layernorm, mlp)[None]


def vision_block(self, hidden_states, cu_seqlens, position_embeddings, max_seqlen, **unused):
    (together,) = normed_products(hidden_states, self.norm1, self.attn.qkv)
    done = vision_heads(self.attn, together, cu_seqlens, position_embeddings, max_seqlen)
    return add_mlp(add_product(hidden_states, done, self.attn.proj), self.norm2, self.mlp)


def layer_forward(self, hidden_states, *positional, **options):
    """The block of this layer; its own forward where adapters, 4-bit weights or autocast have a way of their own."""
    import torch

    products = (*self.mlp.children(), *(self.self_attn if self.block is language_block else self.attn).children())
    linear = all(type(module) in (torch.nn.Linear, type(self.mlp.act_fn)) for module in products)
    if not linear or positional or torch.is_autocast_enabled(hidden_states.device.type):
        return type(self).forward(self, hidden_states, *positional, **options)
    block = functools.partial(self.block, self, **options)
    if self.gradient_checkpointing and self.training:
        return self._gradient_checkpointing_func(block, hidden_states)
    return block(hidden_states)


def normed_products(hidden, norm, *linears):
    """rms_norm(`hidden`) (S, H) times the weights of each of `linears`; what was normed is worked out twice."""
    return _normed_products().apply(hidden, norm, len(linears), norm.weight, *_flat(linears))


def add_product(residual, hidden, linear):
    """`residual` + `linear`(`hidden`), both (S, ...)."""
    return _add_product().apply(residual, hidden, linear.weight, linear.bias)


def add_mlp(hidden, norm, mlp):
    """`hidden` + mlp(rms_norm(`hidden`)); what was normed and the gated product are worked out twice."""
    return _add_mlp().apply(hidden, norm, norm.weight, *_flat((mlp.gate_proj, mlp.up_proj, mlp.down_proj)))


def _flat(linears) -> list:
    return [tensor for linear in linears for tensor in (linear.weight, linear.bias)]


# The autograd functions, made once torch is known. Weights are saved as parameters, not as views, so that ZeRO-3 may
# take their data away and bring it back in between.


def _weight_gradients(ctx, place: int, gradient, hidden) -> list:
    """For the weight at input `place` and the bias after it."""
    for_weight = gradient.T @ hidden if ctx.needs_input_grad[place] else None
    # A sum over rows as a product: a GPU takes two thirds of the time.
    for_bias = gradient.T @ gradient.new_ones(len(gradient)) if ctx.needs_input_grad[place + 1] else None
    return [for_weight, for_bias]


def _add_linear(residual, hidden, weight, bias):
    import torch

    if bias is None:
        return torch.addmm(residual, hidden, weight.T)
    return _linear(hidden, weight, bias).add_(residual)


def _linear(hidden, weight, bias):
    import torch

    return torch._C._nn.linear(hidden, weight, bias)  # DeepSpeed puts another one into torch.nn.functional


@lru_cache(maxsize=1)
def _normed_products() -> type:
    import torch

    class NormedProducts(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, norm, count, norm_weight, *weights):
            normed = norm.fused.rms_norm(hidden, norm_weight, norm.variance_epsilon)
            ctx.save_for_backward(hidden, norm_weight, *weights[::2])
            ctx.norm = norm
            return tuple(_linear(normed, weights[2 * n], weights[2 * n + 1]) for n in range(count))

        @staticmethod
        def backward(ctx, *gradients):
            hidden, norm_weight, *weights = ctx.saved_tensors
            fused, epsilon = ctx.norm.fused, ctx.norm.variance_epsilon
            normed, found = fused.rms_norm(hidden, norm_weight, epsilon), []
            inner = gradients[0] @ weights[0]
            for gradient, weight in zip(gradients[1:], weights[1:]):
                inner = inner.addmm_(gradient, weight)
            for number, gradient in enumerate(gradients):
                found += _weight_gradients(ctx, 4 + 2 * number, gradient, normed)
            nothing = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
            outer, for_norm = fused.rms_norm_backward(hidden, norm_weight, epsilon, inner, nothing)
            return outer, None, None, for_norm, *found

    return NormedProducts


@lru_cache(maxsize=1)
def _add_product() -> type:
    import torch

    class AddProduct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, residual, hidden, weight, bias):
            ctx.save_for_backward(hidden, weight)
            return _add_linear(residual, hidden, weight, bias)

        @staticmethod
        def backward(ctx, gradient):
            hidden, weight = ctx.saved_tensors
            return gradient, gradient @ weight, *_weight_gradients(ctx, 2, gradient, hidden)

    return AddProduct


@lru_cache(maxsize=1)
def _add_mlp() -> type:
    import torch

    class AddMlp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, norm, norm_weight, gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias):
            normed = norm.fused.rms_norm(hidden, norm_weight, norm.variance_epsilon)
            gate, up = _linear(normed, gate_weight, gate_bias), _linear(normed, up_weight, up_bias)
            ctx.save_for_backward(hidden, gate, up, norm_weight, gate_weight, up_weight, down_weight)
            ctx.norm = norm
            return _add_linear(hidden, norm.fused.swiglu(gate, up), down_weight, down_bias)

        @staticmethod
        def backward(ctx, gradient):
            hidden, gate, up, norm_weight, gate_weight, up_weight, down_weight = ctx.saved_tensors
            fused, epsilon = ctx.norm.fused, ctx.norm.variance_epsilon
            for_gate, for_up, product = fused.swiglu_backward(gate, up, gradient @ down_weight)
            for_down = _weight_gradients(ctx, 7, gradient, product)
            del product
            normed = fused.rms_norm(hidden, norm_weight, epsilon)
            found = _weight_gradients(ctx, 3, for_gate, normed) + _weight_gradients(ctx, 5, for_up, normed)
            inner = (for_gate @ gate_weight).addmm_(for_up, up_weight)
            outer, for_norm = fused.rms_norm_backward(hidden, norm_weight, epsilon, inner, gradient)
            return outer, None, for_norm, *found, *for_down

    return AddMlp


# -----------------------------------------------------------------------------
# Model

NO_MASK = {"full_attention": None, "sliding_attention": None}  # the segments are the mask


def packed_forward(
    self,
    input_ids,
    position_ids,
    pixel_values,
    image_grid_thw,
    image_places,
    page_bounds,
    longest_page: int,
    supervised_places,
    targets,
    num_items_in_batch=None,
    **geometry,
):
    """The loss of one row of packed pages: the sum over its supervised tokens / `num_items_in_batch`, or their mean."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    core, vision = self.model, {name.removeprefix("image_"): value for name, value in geometry.items()}
    pictures = core.visual(pixel_values.to(core.visual.dtype), grid_thw=image_grid_thw, **vision).pooler_output
    embedded = core.get_input_embeddings()(input_ids)[0]
    embedded = embedded.index_copy(0, image_places, pictures.to(embedded.dtype))[None]  # (1, T, H)
    pages = {"page_bounds": page_bounds, "longest_page": longest_page}
    options = {"position_ids": position_ids, "attention_mask": NO_MASK, "use_cache": False}
    hidden = core.language_model(inputs_embeds=embedded, **options, **pages).last_hidden_state
    loss = self.lm_head(hidden[0].index_select(0, supervised_places), targets)
    return CausalLMOutputWithPast(loss=loss / (len(targets) if num_items_in_batch is None else num_items_in_batch))


def install(model, fuse: bool) -> None:
    """Let `model` (Qwen2.5-VL, not wrapped) take batches of `pack`, by faster ways to the same numbers."""
    import torch
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as own

    forwards = {
        own.Qwen2_5_VLRMSNorm: norm_forward,
        own.Qwen2_5_VLMLP: mlp_forward,
        own.Qwen2MLP: mlp_forward,
        own.Qwen2_5_VLAttention: language_attention,
        own.Qwen2_5_VLVisionAttention: vision_attention,
        torch.nn.Conv3d: patch_forward,
    }
    blocks = {own.Qwen2_5_VLDecoderLayer: language_block, own.Qwen2_5_VLVisionBlock: vision_block}
    for part in (model.model.visual, model.model.language_model):
        fused = Elementwise(fuse)
        for module in part.modules():
            if type(module) in forwards and getattr(module, "act_fn", None).__class__.__name__ in ("NoneType", *SILU):
                module.fused = fused
                module.forward = types.MethodType(forwards[type(module)], module)
            elif type(module) in blocks and type(module.mlp.act_fn).__name__ in SILU:
                module.block = blocks[type(module)]
                module.forward = types.MethodType(layer_forward, module)
    model.lm_head.fused = fused
    model.lm_head.forward = types.MethodType(head_forward, model.lm_head)
    model.forward = types.MethodType(packed_forward, model)


LEAVES = ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"]  # what ZeRO-3 fetches whole (zero3.set_leaves)
SILU = ("SiLU", "SiLUActivation")  # mlp_forward's own activation


# -----------------------------------------------------------------------------
# Vision MLP


def align_vision_mlp(model, multiple: int = 32) -> int:
    """(all ranks) Widen the vision MLPs with zeros to a multiple of `multiple`; returns the new width.

    3,420 is no multiple of 8, so half-precision products fall back to old tensor-core kernels. Zeros stay zeros:
    silu(0) x 0 = 0, and so are all their gradients. What is saved has to be cut to the base's shapes again.
    """
    import torch

    width = 0
    for block in model.model.visual.blocks:
        for name in ("gate_proj", "up_proj", "down_proj"):
            old = getattr(block.mlp, name)
            shape = [old.out_features, old.in_features]
            axis = 1 if name == "down_proj" else 0
            width = shape[axis] = math.ceil(shape[axis] / multiple) * multiple
            if shape == [old.out_features, old.in_features]:
                return width
            options = {"bias": old.bias is not None, "dtype": old.weight.dtype, "device": old.weight.device}
            with zero3.sharded_from_birth():
                new = torch.nn.Linear(shape[1], shape[0], **options)
            with zero3.gathered([*old.parameters(), *new.parameters()], writer=0), torch.no_grad():
                for part, narrow in old.named_parameters():
                    wide = getattr(new, part)
                    wide.zero_()[tuple(map(slice, narrow.shape))] = narrow
                    wide.requires_grad_(narrow.requires_grad)
            new.register_load_state_dict_pre_hook(widen)
            setattr(block.mlp, name, new)
    return width


def widen(module, state: dict, prefix: str, *unused) -> None:
    """Saved weights have the base's shapes; a checkpoint that is resumed is widened on its way in."""
    import torch

    for name, parameter in module.named_parameters():
        narrow = state.get(prefix + name)
        if narrow is not None and narrow.dim() == parameter.dim() and narrow.shape != parameter.shape:
            missing = [wide - now for wide, now in zip(parameter.shape, narrow.shape)]
            padding = [side for size in reversed(missing) for side in (0, size)]
            state[prefix + name] = torch.nn.functional.pad(narrow, padding)


def narrowed(tensor, shape: Sequence[int]):
    """The part of a widened tensor that the base has."""
    return tensor[tuple(map(slice, shape))]
