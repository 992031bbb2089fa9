"""The products of a layer in fp8, forward and both gradients, for what `fast_parts` asks `Linear.products` for.

    put_into_fp8(model.model.language_model, Fp8())         # its layers' products, from the next forward on

What stands between the products is as it was: residual stream, norms, attention, sums of gradients in bf16. For the
backward pass is kept what is kept in bf16 (fast_parts.NormedProducts and its neighbours), so that what is recomputed or
waits elsewhere is the same. Shapes as in fast_parts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from families.fast_parts import AddMlp as PlainMlp
from families.fast_parts import AddProduct as PlainProduct
from families.fast_parts import NormedProducts as PlainProducts
from families.fast_parts import Products, epsilon_of
from kernels import fp8


@dataclass
class Fp8:
    """How products are computed; one object for all layers of a model.

    `gradients` is their precision, e4m3 or e5m2. `quick`, `quick_input` and `quick_weight` let tensor cores sum up
    alone: forward, for the gradients that go on to other layers, and for those of weights, which are the longest sums,
    over all tokens. With `keep`, weights are cast once until `forget` is called, for a byte each.
    """

    gradients: torch.dtype = fp8.E4M3
    quick: bool = True
    quick_input: bool = False
    quick_weight: bool = False
    keep: bool = False
    kept: dict[torch.nn.Linear, fp8.Weights] = field(default_factory=dict)
    used: set[torch.nn.Linear] = field(default_factory=set)  # whose products have come here

    def weights(self, first: torch.nn.Linear, *weights: torch.Tensor) -> fp8.Weights:
        """`weights` (N, K) that take the same rows, in fp8; the `first` one's module is what they are known by, since
        autograd may hand out other tensors for them."""
        if not self.keep:
            return fp8.Weights(weights)
        if first not in self.kept:
            self.kept[first] = fp8.Weights(weights)
        return self.kept[first]

    def forget(self) -> None:
        """Weights have changed."""
        self.kept.clear()

    def rows(self, gradient: torch.Tensor) -> fp8.Rows:
        """A gradient (S, N) in fp8."""
        return fp8.cast(gradient, self.gradients)

    def normed_products(
        self, hidden: torch.Tensor, norm: torch.nn.Module, *linears: torch.nn.Linear
    ) -> tuple[torch.Tensor, ...]:
        """`fast_parts.normed_products`, of an RMSNorm."""
        self.used.update(linears)
        return NormedProducts.apply(hidden, norm, self, linears[0], norm.weight, *flat(linears))

    def add_product(self, residual: torch.Tensor, hidden: torch.Tensor, linear: torch.nn.Linear) -> torch.Tensor:
        """`fast_parts.add_product`."""
        self.used.add(linear)
        return AddProduct.apply(residual, hidden, self, linear, linear.weight, linear.bias)

    def add_mlp(
        self, hidden: torch.Tensor, norm: torch.nn.Module, *linears: torch.nn.Linear, again: bool = False
    ) -> torch.Tensor:
        """`fast_parts.add_mlp`, of gate, up and down, without biases."""
        self.used.update(linears)
        return AddMlp.apply(hidden, norm, self, linears, again, norm.weight, *(linear.weight for linear in linears))


def put_into_fp8(layers: torch.nn.Module, way: Products | None) -> None:
    """Let the products in `layers` be computed by `way`, or as they were (None); but for those whose widths are no
    multiples of 16, and those that a block computes otherwise: `way.used` has those that have been."""
    for module in layers.modules():
        if type(module) is torch.nn.Linear:
            fits = module.in_features % fp8.ALIGNED == 0 == module.out_features % fp8.ALIGNED
            module.products = way if fits else None


def normed_rows(norm: torch.nn.Module, hidden: torch.Tensor, weight: torch.Tensor) -> fp8.Rows:
    """`hidden` (S, H) normed, in fp8."""
    if norm.fused.own_norm:
        return fp8.cast(norm.fused.rms_norm(hidden, weight, epsilon_of(norm)))
    return fp8.norm_cast(hidden, weight, epsilon_of(norm))


def weight_gradients(
    way: Fp8,
    wanted: Sequence[bool],
    outer: torch.Tensor | None,
    gradient: fp8.Rows,
    rows: fp8.Rows,
    sizes: Sequence[int],
) -> list[torch.Tensor | None]:
    """For weights and biases, in turn, that are `wanted`, of the `gradient` (S, N of all) and `rows` (S, K); for biases
    of `outer`, the gradient as it was, which may be None where there are none."""
    for_weights, for_biases = [None] * len(sizes), [None] * len(sizes)
    if any(wanted[::2]):
        for_weights = fp8.for_weight(gradient, rows, way.quick_weight).split(list(sizes))
    if any(wanted[1::2]):
        # A sum over rows as a product, as in fast_parts.
        for_biases = (outer.T @ outer.new_ones(len(outer))).split(list(sizes))
    both = [part for pair in zip(for_weights, for_biases) for part in pair]
    return [part if asked else None for part, asked in zip(both, wanted)]


class NormedProducts(torch.autograd.Function):
    """`fast_parts.normed_products` in fp8, of an RMSNorm: keeps the residual stream and the weights."""

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        norm: torch.nn.Module,
        way: Fp8,
        first: torch.nn.Linear,
        norm_weight: torch.Tensor,
        *weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        normed = normed_rows(norm, hidden, norm_weight)
        ctx.save_for_backward(hidden, norm_weight, *weights[::2])
        ctx.norm, ctx.way, ctx.first = norm, way, first
        return tuple(way.weights(first, *weights[::2]).forward(normed, weights[1::2], way.quick))

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple:
        hidden, norm_weight, *weights = ctx.saved_tensors
        way, fused, epsilon = ctx.way, ctx.norm.fused, epsilon_of(ctx.norm)
        # Side by side: one scale a token, and one product that sums over all of them.
        outer = torch.cat(gradients, 1)
        gradient = way.rows(outer)
        inner = way.weights(ctx.first, *weights).for_input(gradient, way.quick_input)
        normed = normed_rows(ctx.norm, hidden, norm_weight)
        sizes = [len(weight) for weight in weights]
        found = weight_gradients(way, ctx.needs_input_grad[5:], outer, gradient, normed, sizes)
        nothing = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
        for_hidden, for_norm = fused.rms_norm_backward(hidden, norm_weight, epsilon, inner, nothing)
        return for_hidden, None, None, None, for_norm, *found


class AddProduct(torch.autograd.Function):
    """`fast_parts.add_product` in fp8."""

    @staticmethod
    def forward(
        ctx,
        residual: torch.Tensor,
        hidden: torch.Tensor,
        way: Fp8,
        linear: torch.nn.Linear,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.way, ctx.linear = way, linear
        return way.weights(linear, weight).forward(fp8.cast(hidden), [bias], way.quick)[0].add_(residual)

    @staticmethod
    def backward(ctx, outer: torch.Tensor) -> tuple:
        hidden, weight = ctx.saved_tensors
        way, gradient = ctx.way, ctx.way.rows(outer)
        inner = way.weights(ctx.linear, weight).for_input(gradient, way.quick_input)
        wanted = ctx.needs_input_grad[4:]
        return (
            outer,
            inner,
            None,
            None,
            *weight_gradients(way, wanted, outer, gradient, fp8.cast(hidden), [len(weight)]),
        )


class AddMlp(torch.autograd.Function):
    """`fast_parts.add_mlp` in fp8: keeps the residual stream, gate and up. Their products and what they come from never
    stand in memory in bf16."""

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        norm: torch.nn.Module,
        way: Fp8,
        linears: Sequence[torch.nn.Linear],
        again: bool,
        norm_weight: torch.Tensor,
        gate_weight: torch.Tensor,
        up_weight: torch.Tensor,
        down_weight: torch.Tensor,
    ) -> torch.Tensor:
        normed = normed_rows(norm, hidden, norm_weight)
        gate, up = way.weights(linears[0], gate_weight, up_weight).forward(normed, [None, None], way.quick)
        ctx.save_for_backward(hidden, gate, up, norm_weight, gate_weight, up_weight, down_weight)
        ctx.norm, ctx.way, ctx.linears = norm, way, linears
        if again:
            return torch.empty_like(hidden)
        return (
            way.weights(linears[2], down_weight).forward(fp8.swiglu_cast(gate, up), [None], way.quick)[0].add_(hidden)
        )

    @staticmethod
    def backward(ctx, outer: torch.Tensor) -> tuple:
        hidden, gate, up, norm_weight, gate_weight, up_weight, down_weight = ctx.saved_tensors
        way, fused, epsilon, wanted = ctx.way, ctx.norm.fused, epsilon_of(ctx.norm), ctx.needs_input_grad
        gradient = way.rows(outer)
        inner = way.weights(ctx.linears[2], down_weight).for_input(gradient, way.quick_input)
        both, product = fp8.swiglu_backward_cast(gate, up, inner, way.gradients)
        del inner  # as in fast_parts: not beside what comes next
        for_down, _ = weight_gradients(way, (wanted[8], False), None, gradient, product, [len(down_weight)])
        del gradient, product
        normed = normed_rows(ctx.norm, hidden, norm_weight)
        asked, sizes = (wanted[6], False, wanted[7], False), [len(gate_weight), len(up_weight)]
        for_gate, _, for_up, _ = weight_gradients(way, asked, None, both, normed, sizes)
        inner = way.weights(ctx.linears[0], gate_weight, up_weight).for_input(both, way.quick_input)
        for_hidden, for_norm = fused.rms_norm_backward(hidden, norm_weight, epsilon, inner, outer)
        return for_hidden, None, None, None, None, for_norm, for_gate, for_up, for_down


# -----------------------------------------------------------------------------
# Proof


@dataclass
class Beside:
    """Computes what fast_parts does, and in the backward pass each part of a layer by `way`, too, of the same inputs
    and the same gradients: what that is off by is its own rounding, however many layers there are.

    `errors` are told for each part by the `names` of its linear layers: of the norm, of the median token forward, of
    the median token backward, and of the gradients of all weights together; and along its gradient, of its length, of
    the weight that is furthest. (4,)
    """

    way: Fp8
    names: dict[torch.nn.Linear, str]
    errors: dict[str, torch.Tensor] = field(default_factory=dict)

    def normed_products(
        self, hidden: torch.Tensor, norm: torch.nn.Module, *linears: torch.nn.Linear
    ) -> tuple[torch.Tensor, ...]:
        """`Fp8.normed_products`."""

        def ours(hidden: torch.Tensor, norm_weight: torch.Tensor, *weights: torch.Tensor | None) -> tuple:
            return NormedProducts.apply(hidden, norm, self.way, linears[0], norm_weight, *weights)

        def theirs(hidden: torch.Tensor, norm_weight: torch.Tensor, *weights: torch.Tensor | None) -> tuple:
            return PlainProducts.apply(hidden, norm, len(linears), norm_weight, None, *weights)

        return InBoth.apply(self, linears, (theirs, ours), None, hidden, norm.weight, *flat(linears))

    def add_product(self, residual: torch.Tensor, hidden: torch.Tensor, linear: torch.nn.Linear) -> torch.Tensor:
        """`Fp8.add_product`."""

        def ours(hidden: torch.Tensor, residual: torch.Tensor, *weights: torch.Tensor | None) -> tuple:
            return (AddProduct.apply(residual, hidden, self.way, linear, *weights),)

        def theirs(hidden: torch.Tensor, residual: torch.Tensor, *weights: torch.Tensor | None) -> tuple:
            return (PlainProduct.apply(residual, hidden, *weights),)

        return InBoth.apply(self, (linear,), (theirs, ours), 1, hidden, residual, *flat((linear,)))[0]

    def add_mlp(
        self, hidden: torch.Tensor, norm: torch.nn.Module, *linears: torch.nn.Linear, again: bool = False
    ) -> torch.Tensor:
        """`Fp8.add_mlp`; `again` makes what nobody needs, too."""

        def ours(hidden: torch.Tensor, norm_weight: torch.Tensor, *weights: torch.Tensor | None) -> tuple:
            return (AddMlp.apply(hidden, norm, self.way, linears, False, norm_weight, *weights[::2]),)

        def theirs(hidden: torch.Tensor, norm_weight: torch.Tensor, *weights: torch.Tensor | None) -> tuple:
            return (PlainMlp.apply(hidden, norm, False, norm_weight, *weights),)

        return InBoth.apply(self, linears, (theirs, ours), 0, hidden, norm.weight, *flat(linears))[0]


class InBoth(torch.autograd.Function):
    """The first of two `ways` to a part of a layer, of what is `given`: (S, in) first, weights last. The other beside
    it in the backward pass, where nothing has to be kept for it. `residual` is the place of what is added to."""

    @staticmethod
    def forward(
        ctx,
        beside: Beside,
        linears: Sequence[torch.nn.Linear],
        ways: Sequence[Callable[..., tuple]],
        residual: int | None,
        *given: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(*given)
        ctx.rest = beside, linears, ways, residual
        return ways[0](*given)

    @staticmethod
    def backward(ctx, *outer: torch.Tensor) -> tuple:
        beside, linears, ways, residual = ctx.rest
        # Once: what a checkpoint has made again may be had no second time.
        given, asked = ctx.saved_tensors, ctx.needs_input_grad[4:]
        made = [alone(way, given, asked, outer) for way in ways]
        (right, wanted), (done, found) = made
        nothing = torch.zeros((1, 1), device=given[0].device)
        before = nothing if residual is None else given[residual]
        forward = torch.stack([off_in_rows(*pair, before) for pair in zip(done, right)]).amax()
        told = [forward, off_in_rows(found[0], wanted[0], outer[0] if residual == 0 else nothing)]
        # After the states, and not vectors: gradients of biases and norms are made in bf16 either way.
        pairs = list(zip(found, wanted))[1 if residual is None else residual + 1 :]
        offs = [off_in_all(one, other) for one, other in pairs if one is not None and one.dim() > 1]
        if offs:
            off, along, size = torch.stack(offs, 1)
            told += [off.norm() / size.norm(), (along / size**2).amax()]
        beside.errors[", ".join(beside.names[linear] for linear in linears)] = torch.stack(told)
        beside.way.used.update(linears)
        return *[None] * 4, *wanted


def flat(linears: Sequence[torch.nn.Linear]) -> list[torch.Tensor | None]:
    """Weight and bias of each, one after another."""
    return [tensor for linear in linears for tensor in (linear.weight, linear.bias)]


def alone(
    way: Callable[..., tuple],
    given: Sequence[torch.Tensor | None],
    asked: Sequence[bool],
    outer: Sequence[torch.Tensor],
) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor | None]]:
    """What `way` makes of what is `given`, and for those that are `asked` for the gradients of `outer`."""
    apart = [part if part is None else part.detach().requires_grad_(want) for part, want in zip(given, asked)]
    with torch.enable_grad():
        done = way(*apart)
    found = iter(torch.autograd.grad(done, [part for part, want in zip(apart, asked) if want], outer))
    return tuple(part.detach() for part in done), [next(found) if want else None for want in asked]


def off_in_rows(found: torch.Tensor, wanted: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Of the norm of `wanted` less the `rest` (S, N) that was added to it, in the median one of its rows that are not
    zeros: few tokens may be so large that what they are rounded to says nothing of what was added to them. A 64th of
    the rest counts, too: in bf16 both sums are rounded by some 0.2 % of it."""
    size, off = (wanted.float() - rest.float()).norm(dim=1), (found.float() - wanted.float()).norm(dim=1)
    size = torch.hypot(size, rest.float().norm(dim=-1) / 64)
    return (off[size > 0] / size[size > 0]).median()


def off_in_all(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The norm of what `found` is off by, what of it lies along `wanted`, times the norm of that, and that. (3,)"""
    right, difference = wanted.float(), found.float() - wanted.float()
    return torch.stack([difference.norm(), torch.sum(difference * right).abs(), right.norm()])
