"""One step of writing: the next token of every slot, or several where drafts come true; captured as a CUDA graph.

    step = Step(model, captured, cache, state, slots=8, new=1, chooser=Chooser([], drawn=False))
    step.run(16)                                    # sixteen steps, for which nobody waits

A GPU that is told each kernel by Python is idle for 98 % of such a step; a graph starts all of them at once. Products
of up to 16 rows, on Hopper of up to 64, go through kernels that read each weight once (kernels/skinny_products.py).

Shapes: S slots, Q new tokens of each, R = S x Q rows; H, D, V as in kernels/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

import use_model_from_hub as use
from families.slot_layers import Captured, Layer, Moment, Norm
from kernels.early import read_compiler
from kernels.row_kernels import embed, likeliest, take_likeliest
from kernels.skinny_products import Rows, add_product, gated_product, normed_product, prove, scale_for
from writing.drafts import drafts
from writing.slots import Cache, State

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Chooser:
    """The next token of each row from its logits, by stock `processors` of transformers; `drawn` with the numbers of
    `State.chances` instead of the likeliest."""

    def __init__(self, processors: Sequence[Callable], drawn: bool):
        self.processors, self.drawn = processors, drawn

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is taken, whatever stood before: drafts can be held against that."""
        return not self.processors and not self.drawn

    def take(self, logits: torch.Tensor, state: State, slots: int) -> None:
        """Puts the next tokens, from `logits` (S, V) of the first `slots` slots, into their history, and moves the
        places of those that write."""
        history, places, live = state.history[:slots], state.places[:slots], state.live[:slots]
        if self.plain:
            take_likeliest(logits, history, places, live)
        else:
            history.scatter_(1, places[:, None] + 1, self.choose(logits, state, slots)[:, None])
            places += live

    def choose(self, logits: torch.Tensor, state: State, slots: int) -> torch.Tensor:
        """Tokens (S,) from such logits, where they are not just the likeliest."""
        scores = logits.float()
        for process in self.processors:
            scores = process(state.history[:slots], scores)
        if not self.drawn:
            return scores.argmax(-1)
        # The number of the token that comes: one for each place of the answer.
        number = (state.places - state.starts + 1)[:slots].clamp(0, state.chances.shape[1] - 1)
        return use.draw(scores, state.chances[:slots].gather(1, number[:, None])[:, 0])


class Step:
    """The first `slots` slots of `cache` and `state`, each with `new` tokens a step: the one that was chosen last and
    drafts after it."""

    def __init__(
        self,
        model: PreTrainedModel,
        captured: Captured,
        cache: Cache,
        state: State,
        slots: int,
        new: int,
        chooser: Chooser,
    ):
        self.core, self.head, self.captured, self.cache, self.state = model.model, model.lm_head, captured, cache, state
        self.slots, self.new, self.chooser = slots, new, chooser
        self.following = torch.arange(new, device=state.places.device)
        # Of all places, as text has them; what mRoPE adds to a place is never more than zero.
        everywhere = torch.arange(state.history.shape[1] + new, device=state.places.device)
        angles = self.core.language_model.rotary_emb(
            self.head.weight[:1, None], everywhere.view(1, 1, -1).expand(3, -1, -1)
        )
        self.angles = [part[0] for part in angles]
        self.graph: torch.cuda.CUDAGraph | None = None

    # -- what the graph holds

    @torch.inference_mode()
    def advance(self) -> None:
        """One step of every live slot; changes cache and state."""
        state, count = self.state, self.slots
        places, live = state.places[:count], state.live[:count]
        history, shifts = state.history[:count], state.shifts[:count]
        if self.new == 1:
            self.chooser.take(self.forward(history, places, shifts, live), state, count)
            return
        guessed = drafts(history, places, state.starts[:count], self.new - 1)
        # Where nothing has been chosen yet, and all that is guessed will be written over.
        after = (places[:, None] + 1 + self.following).clamp_(max=history.shape[1] - 1)
        history.scatter_(1, after[:, :-1], guessed)
        chosen = likeliest(self.forward(history, places, shifts, live)).view(count, self.new)
        # A draft was right where the token chosen before it is the draft; the first wrong one ends the row.
        right = (chosen[:, :-1] == guessed).long().cumprod(-1).sum(-1)
        # Those after the last right one are written, too, and written over by the next step.
        history.scatter_(1, after, chosen)
        places += (right + 1) * live

    def forward(
        self, history: torch.Tensor, places: torch.Tensor, shifts: torch.Tensor, live: torch.Tensor
    ) -> torch.Tensor:
        """Logits (R, V) after each of the new tokens, which stand from `places` (S,) on in `history` (S, C)."""
        table, first = self.core.get_input_embeddings().weight, self.captured.layers[0].norms[0]
        scale = scale_for(("qkv", first), table[: self.slots * self.new])
        hidden, squares, scaled, *angles = embed(history, places, shifts, table, *self.angles, self.new, scale)
        moment, rows = Moment(angles, places, live), Rows(hidden, squares, scaled, scale)
        for number, (layer, after) in enumerate(self.chain()):
            mixer = layer.mixer
            wide = normed_product("qkv", rows, layer.norms[0], mixer.taken, mixer.taken_bias)
            done = mixer.step(wide, moment, self.cache.layer(number, self.slots))
            rows = add_product("out", rows, done, mixer.out, ("gated", layer.norms[1]))
            inner = gated_product("gated", rows, layer.norms[1], layer.gated)
            rows = add_product("down", rows, inner, layer.down, after)
        return normed_product("head", rows, self.captured.norm, self.head.weight)

    def chain(self) -> Iterator[tuple[Layer, tuple[str, Norm]]]:
        """Each layer and the product that comes after it, with its norm: what is added to the residual stream knows
        whose norm comes next."""
        layers = self.captured.layers
        return zip(layers, [*(("qkv", layer.norms[0]) for layer in layers[1:]), ("head", self.captured.norm)])

    # -- capture and replay

    def parts(self) -> list[Callable[[], object]]:
        """All of a step that takes kernels, each on states of its own, so that it does not matter which is first."""
        slots, rows, state, (_, width) = self.slots, self.slots * self.new, self.state, self.head.weight.shape
        made = self.head.weight.new_zeros
        places, live = state.places[:slots], state.live[:slots]
        angles = [part[:1].expand(rows, -1).contiguous() for part in self.angles]
        # Of its own, too, since `take_likeliest` moves on what it is given.
        still, history = torch.zeros_like(places), torch.zeros_like(state.history[:slots])
        table, first = self.core.get_input_embeddings().weight, self.captured.layers[0].norms[0]
        scale = scale_for(("qkv", first), table[:rows])
        found = [partial(embed, history, still, still, table, *self.angles, self.new, scale)]
        # The first layer's rows are none of a product.
        mixer = self.captured.layers[0].mixer
        found += [partial(prove, "qkv", made(rows, width), mixer.taken, first, None, 1, mixer.taken_bias)]
        for number, (layer, after) in enumerate(self.chain()):
            mixer, moment, kept = layer.mixer, Moment(angles, places, live), self.cache.layer(number, slots)
            # The longest first.
            found += [
                partial(mixer.step, made(rows, len(mixer.taken)), moment, kept),
                partial(prove, "out", made(rows, mixer.out.shape[1]), mixer.out, None, ("gated", layer.norms[1])),
                partial(prove, "down", made(rows, layer.down.shape[1]), layer.down, None, after),
                partial(prove, "gated", made(rows, width), layer.gated, layer.norms[1]),
                partial(prove, "qkv", made(rows, width), mixer.taken, layer.norms[0], bias=mixer.taken_bias),
            ]
        found += [partial(prove, "head", made(rows, width), self.head.weight, self.captured.norm)]
        logits = made(rows, len(self.head.weight))
        if self.new > 1:
            found += [partial(likeliest, logits)]
        elif self.chooser.plain:
            found += [partial(take_likeliest, logits, history, torch.zeros_like(places), still)]
        return found

    def warm(self) -> None:
        """A step that compiles and proves kernels, and leaves the state as it was: a token that it left in the history
        would be one that a repetition penalty punishes. Slots stand still meanwhile, or what recurrent layers keep of
        them would go on."""
        kept = [part.clone() for part in self.state.parts()]
        self.state.live.zero_()
        self.advance()
        for part, before in zip(self.state.parts(), kept):
            part.copy_(before)

    def capture(self, beside: torch.cuda.CUDAGraph | None = None) -> None:
        """Record a step, on a GPU; takes a tenth of a second, and some seconds where kernels are not yet compiled.

        What it works out lies where that of the graph `beside` lies: they never run at once, and leave nothing there.
        Raises torch.OutOfMemoryError where there is no room for it.
        """
        self.warm()
        graph = torch.cuda.CUDAGraph()
        # Threads pin screenshots meanwhile, and NCCL's looks at its events: their calls are none of this stream's.
        with torch.cuda.graph(graph, beside and beside.pool(), capture_error_mode="thread_local"):
            self.advance()
        self.graph = graph

    def run(self, steps: int) -> None:
        """`steps` steps, one after another."""
        for _ in range(steps):
            if self.graph is None:
                self.advance()
            else:
                self.graph.replay()


PLACES = 64  # of a slot in which nothing is written; kernels ask whether it is a multiple of sixteen


def compile_step(
    model: PreTrainedModel,
    captured: Captured,
    slots: int,
    new: int,
    chooser: Chooser,
    chances: int,
    at_once: bool,
) -> None:
    """Compiles and proves the kernels of such a step, in any thread, while others write: it takes a step over slots of
    its own, through the first layers, of which one follows another and each kind is there. `chances` as in `State`;
    `at_once` in as many threads as there are kernels."""
    kinds = [type(layer.mixer) for layer in captured.layers]
    layers = captured.layers[: max(2, 1 + max(map(kinds.index, kinds)))]
    device = model.device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each thread has its own
    cache, state = Cache(layers, slots, PLACES, model.dtype, device), State(slots, PLACES, device, chances)
    step = Step(model, replace(captured, layers=layers), cache, state, slots, new, chooser)
    if at_once:
        side_by_side(step.parts(), device)
    step.advance()


def side_by_side(parts: Sequence[Callable[[], object]], device: torch.device) -> None:
    """Each of `parts` in a thread of its own, once the first one has ended: most of what compiles a kernel lets go of
    the interpreter. What one of them raises is raised here."""

    def run(part: Callable[[], object]) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own, as it has its own mode
        with torch.inference_mode():
            part()

    with ThreadPoolExecutor(len(parts)) as pool:
        # For the first kernel of a machine Triton has a C compiler build what loads kernels, 0.7 s, meanwhile.
        if device.type == "cuda":
            pool.submit(read_compiler)
        run(parts[0])
        for done in [pool.submit(run, part) for part in parts[1:]]:
            done.result()
