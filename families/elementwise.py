"""The element-wise parts of layers, each of which eager torch runs as five to ten passes over memory.

    fused = Elementwise(fuse=not can_fuse())        # for one family of shapes: one each for a tower
    fused.rms_norm(hidden, weight, epsilon)

The model's own formulas, and their gradients. Shapes: S tokens or patches of all pages of a pack; H the width of the
residual stream, I of the MLP, D of a head; (S, heads, D).
"""

from __future__ import annotations

import functools
import importlib.util
import math
import shutil
import types
from collections.abc import Callable, Sequence

import torch

from families.chunked_loss import cross_entropy


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`hidden` (S, H) over its root mean square, times `weight` (H,) (Zhang and Sennrich 2019); (S, H)."""
    wide = hidden.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(hidden.dtype)


def rms_norm_backward(
    hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, gradient: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `rms_norm` for `hidden` (S, H), plus `residual` (S, H) or (), which went past it, and for `weight`
    (H,)."""
    wide = hidden.to(torch.float32)
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    normed, outer = wide * inverse, gradient.float()
    inner = outer * weight.float()
    for_hidden = inverse * (inner - normed * (inner * normed).mean(-1, keepdim=True)) + residual.float()
    # The norm was rounded before it met the weight, so it is here, too.
    for_weight = (outer * normed.to(hidden.dtype).float()).sum(0)
    return for_hidden.to(hidden.dtype), for_weight.to(weight.dtype)


def layer_norm(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`hidden` (S, H) less its mean, over its standard deviation, times `weight` (H,) plus `bias` (H,) (Ba et al.
    2016); (S, H). Rounded once, as torch's own."""
    wide = hidden.to(torch.float32)
    wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return (wide * weight.float() + bias.float()).to(hidden.dtype)


def layer_norm_backward(
    hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, gradient: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `layer_norm` for `hidden` (S, H), plus `residual` (S, H) or (), which went past it, and for `weight`
    and `bias` (H,)."""
    wide = hidden.to(torch.float32)
    wide = wide - wide.mean(-1, keepdim=True)
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    normed, outer = wide * inverse, gradient.float()
    inner = outer * weight.float()
    centred = inner - inner.mean(-1, keepdim=True) - normed * (inner * normed).mean(-1, keepdim=True)
    for_hidden = inverse * centred + residual.float()
    for_weight, for_bias = (outer * normed).sum(0), outer.sum(0)
    return for_hidden.to(hidden.dtype), for_weight.to(weight.dtype), for_bias.to(weight.dtype)


def gelu(inner: torch.Tensor) -> torch.Tensor:
    """GELU of `inner` (S, I), the approximation by tanh (Hendrycks and Gimpel 2016)."""
    return torch.nn.functional.gelu(inner, approximate="tanh")


def gelu_backward(inner: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of `gelu` for `inner`, and its value recomputed, both (S, I): as in `swiglu_backward`."""
    wide, scale, cubic = inner.float(), math.sqrt(2 / math.pi), 0.044715
    turned = torch.tanh(scale * (wide + cubic * wide.pow(3)))
    slope = scale * (1 + 3 * cubic * wide.pow(2)) * (1 - turned.pow(2))
    for_inner = gradient.float() * 0.5 * (1 + turned + wide * slope)
    return for_inner.to(inner.dtype), (0.5 * wide * (1 + turned)).to(inner.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(`gate`) * `up`, all (S, I) (Shazeer 2020)."""
    return torch.nn.functional.silu(gate) * up


def swiglu_backward(
    gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `swiglu` for `gate` and `up`, and its value recomputed, all (S, I): in one pass, for the product of
    the weight behind it needs that value, and 22 KB a token of 3B need not be kept."""
    sigmoid = torch.sigmoid(gate.float())
    silu = gate.float() * sigmoid
    wide = gradient.float()
    for_gate = wide * up.float() * (sigmoid + silu * (1 - sigmoid))
    return for_gate.to(gate.dtype), (wide * silu).to(up.dtype), silu.to(gate.dtype) * up


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary positions (RoPE, Su et al. 2021); `query` (S, heads, D), `key` (S, fewer heads, D), `cos`, `sin`
    (S, 1, D), whose precision is the product's."""

    def turned(states: torch.Tensor) -> torch.Tensor:
        first, second = states.chunk(2, dim=-1)
        wide, halves = states.to(cos.dtype), torch.cat((-second, first), dim=-1).to(cos.dtype)
        return (wide * cos + halves * sin).to(states.dtype)

    return turned(query), turned(key)


class Elementwise:
    """The functions above and the loss's, for one family of shapes (those of a tower), as attributes of their names;
    fused by torch.compile with `fuse`. The norms of heads, whose shapes are others, are a pair of their own. Those of a
    family's `own` take the places of others of their names."""

    def __init__(self, fuse: bool, own: Sequence[Callable] = ()) -> None:
        alike = (rms_norm, rms_norm_backward, layer_norm, layer_norm_backward, swiglu, swiglu_backward)
        named = {function.__name__: function for function in (*alike, gelu, gelu_backward, rotate, cross_entropy)}
        named |= {"head_norm": rms_norm, "head_norm_backward": rms_norm_backward}
        named |= {function.__name__: function for function in own}
        self.own_norm = named["rms_norm"] is not rms_norm  # a family's, which computes something else
        for name, function in named.items():
            if fuse:
                # A code object of its own: torch.compile keeps its graphs by code, and two families would mix.
                function = types.FunctionType(function.__code__.replace(), function.__globals__, name)
                function = functools.partial(without_history, torch.compile(function))
            setattr(self, name, function)
        if fuse and torch.cuda.is_available():
            # Imported here: it needs triton, which a machine without a GPU may lack.
            from kernels import norm_kernels, rotary_kernel, swiglu_kernels

            # Asked at each call: a copy of the model on the CPU has no kernel.
            compiled = self.rotate
            self.rotate = lambda query, *rest: (rotary_kernel.rotate if query.is_cuda else compiled)(query, *rest)
            rooms = dict.fromkeys(("rms_norm", "rms_norm_backward"), norm_kernels)
            rooms |= dict.fromkeys(("swiglu", "swiglu_backward"), swiglu_kernels)
            # Those of a family's own compute something else.
            for name in rooms.keys() - {function.__name__ for function in own}:
                kernel = getattr(rooms[name], name)
                setattr(self, name, functools.partial(by_kernel, rooms[name].takes, kernel, getattr(self, name)))


def by_kernel(takes: Callable[..., bool], kernel: Callable, compiled: Callable, *given: torch.Tensor | float) -> object:
    """By `kernel` where it `takes` what is `given`, else `compiled`."""
    return (kernel if takes(*given) else compiled)(*given)


def without_history(compiled: Callable, *inputs: torch.Tensor | float) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Call `compiled`; where no gradients are followed, with tensors of one kind.

    It would make a graph for parameters and one for their copies in a layer that is recomputed, for inputs that need
    gradients and for those that do not, and beyond eight graphs torch leaves a function as it is, and slow.
    """
    if not torch.is_grad_enabled():
        inputs = [part.detach() if isinstance(part, torch.Tensor) else part for part in inputs]
    return compiled(*inputs)


def can_fuse() -> str:
    """Why element-wise functions cannot be fused here; empty when they can."""
    # A CPU is for trials and tests, where compiling takes longer than it saves.
    if not torch.cuda.is_available():
        return "no GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return "no C compiler, which triton needs"
    return ""
