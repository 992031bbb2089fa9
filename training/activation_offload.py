"""Activations that wait in the CPU's memory until the backward pass asks for them, copied beside the arithmetic.

    layers = model.model.language_model.layers
    offload = Offload(layers, [True, False, False, False] * 9, device)      # every fourth layer, the first among them
    model(**batch).loss.backward()      # the same numbers, to the bit, with fewer GiB on the GPU
    offload.pinned_gib                  # of the CPU's memory; it stays, batch after batch
    offload.choose([False] * 36)        # for the forward passes to come, and what belongs to them
    offload.stop()                      # the layers are as they were
    link_rate(device), pinnable_gib()   # what the plan has to know before

Offloading as in vDNN (Rhu et al. 2016), by layers, of what torch's autograd saves (`saved_tensors_hooks`).

A GPU has three streams here: the one that computes (torch's current one), one on which copies leave, one on which they
come back. Its memory belongs to the first alone: it is allocated there, and let go of only after that stream was told
to wait for the copy. So torch's allocator, which knows the order of one stream, gives it away again without
`record_stream`, under which a CPU that runs ahead of its GPU would find no free block and take more. A copy that leaves
waits for what was computed before it; one that comes back waits until its memory is free.

On a CPU copies are made at once, in the same order, from and to the same places. Sections: Rates, The CPU's memory,
Streams, Layers.
"""

from __future__ import annotations

import functools
import math
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from scoring.machine import free_bytes
from training.processes import local_world_size

GIB = 2**30
SMALLEST_BYTES = 2**20  # on a GPU; what is smaller costs more in calls than it takes of the memory
CHUNK_BYTES = 2**28  # pinned at once, in some 0.1 s; torch would round other sizes up to a power of two
ALIGNED_BYTES = 512  # where a tensor begins, as on a GPU
PINNED_SHARE = 0.5  # of the CPU's free memory: the rest is for data workers, checkpoints and what is kept of files
STILL_LEAVING = 1  # layers that are done with, but whose copies may not be
AHEAD = 3  # layers' backward passes, at least, in which a copy comes back

# -----------------------------------------------------------------------------
# Rates


def link_rate(device: torch.device, size: int = CHUNK_BYTES, runs: int = 4) -> float:
    """GB/s (10^9) from a GPU to pinned memory while as much comes back, each way; infinite on a CPU. Takes 0.3 s.

    Processes that share a link have to measure at the same time.
    """
    if device.type != "cuda":
        return math.inf
    streams, start = [torch.cuda.Stream(device) for _ in range(2)], 0.0
    pairs = [
        (torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.empty(size, dtype=torch.uint8, device=device)),
        (torch.empty(size, dtype=torch.uint8, device=device), torch.empty(size, dtype=torch.uint8, pin_memory=True)),
    ]
    for run in range(runs + 1):
        if run < 2:  # the first has touched all of the memory, and is not counted
            torch.cuda.synchronize(device)
            start = time.perf_counter()
        for stream, (target, source) in zip(streams, pairs):
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(device)
    return runs * size / (time.perf_counter() - start) / 1e9


def pinnable_gib() -> float:
    """GiB of the CPU's memory that this process may pin, beside the others of this machine."""
    return PINNED_SHARE * free_bytes() / local_world_size() / GIB


# -----------------------------------------------------------------------------
# The CPU's memory


class Stored:
    """One storage that a layer has saved, as bytes: `pieces` in the CPU's memory, and `buffer` (bytes,) on the device
    while it is there. It lives as long as autograd needs any tensor in it."""

    __slots__ = ("__weakref__", "buffer", "original", "pieces", "ready", "stream", "version")

    def __init__(self, original: torch.Tensor, pieces: list[torch.Tensor]):
        self.ready: torch.cuda.Event | None = None  # when the copy into `buffer` has come back
        self.stream: torch.cuda.Stream | None = None  # the one that has allocated `buffer` for it
        self.original: torch.Tensor | None = original  # as it was saved; `version` counts its changes in place
        self.version, self.pieces = original._version, pieces
        self.buffer: torch.Tensor | None = as_bytes(original)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(len(piece) for piece in self.pieces)

    def leave(self) -> None:
        """The device's memory goes to whoever wants it; the stream that computes has to wait for the copy before."""
        self.check()
        self.original = self.buffer = None

    def check(self) -> None:
        """Raises RuntimeError where what was to be copied has been changed, which autograd cannot see under hooks."""
        if self.original._version != self.version:
            raise RuntimeError("a tensor that a layer had saved for its backward pass was changed in place")

    def __del__(self):
        # Never asked for, although fetched: its memory must not be given away while the copy is still coming.
        if self.ready is not None:
            self.stream.wait_event(self.ready)


class Saved(NamedTuple):
    """What autograd holds instead of a tensor: which part of which storage it is."""

    stored: Stored
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> torch.Tensor:
        """A view of the storage's bytes on the device, laid out as the tensor was."""
        buffer = self.stored.buffer
        found = torch.empty(0, dtype=self.dtype, device=buffer.device)
        return found.set_(buffer.untyped_storage(), self.offset, self.shape, self.stride)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage of `tensor`, (bytes,), without a copy."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))


class HostMemory:
    """The CPU's memory for all layers of a batch, taken one after another and given back together: a stack that is as
    high as the largest batch has made it. Sizes may differ from batch to batch."""

    def __init__(self, pinned: bool):
        self.pinned, self.chunks, self.used = pinned, [], 0
        self.living: weakref.WeakSet[Stored] = weakref.WeakSet()

    def take(self, size: int) -> list[torch.Tensor]:
        """`size` bytes, in pieces where chunks end. Raises MemoryError where the machine has no more to pin."""
        place, pieces = self.used, []
        self.used += math.ceil(size / ALIGNED_BYTES) * ALIGNED_BYTES
        while self.used > len(self.chunks) * CHUNK_BYTES:
            self.grow()
        while size:
            chunk, begin = divmod(place, CHUNK_BYTES)
            part = min(size, CHUNK_BYTES - begin)
            pieces.append(self.chunks[chunk][begin : begin + part])
            place, size = place + part, size - part
        return pieces

    def grow(self) -> None:
        # Pinned memory cannot be swapped out: a system without any left kills processes, and says nothing.
        if self.pinned and free_bytes() < 4 * CHUNK_BYTES:
            raise MemoryError(
                f"activations wait in {len(self.chunks) * CHUNK_BYTES / GIB:.1f} GiB of the CPU's memory, and there is "
                "no more: give a smaller --offload_share"
            )
        self.chunks.append(torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=self.pinned))

    def begin_again(self) -> None:
        """From the bottom, unless somebody still waits for what lies there.

        No copy comes back from there any more then: the stream that computes was told to wait for each before what it
        belongs to was let go of, and what is sent from now on waits for that stream.
        """
        if not len(self.living):
            self.used = 0


# -----------------------------------------------------------------------------
# Streams


class Link:
    """Copies between a device and the CPU's memory, in the order in which they are asked for."""

    def __init__(self, device: torch.device):
        self.device = device
        streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else [None, None]
        self.leaving, self.coming = streams

    def send(self, stored: Stored) -> None:
        """Copies `stored` to the CPU's memory, once what was asked for until now is computed."""
        if self.leaving is None:
            return _copy(stored.pieces, _parts(stored.buffer, stored.pieces))
        self.leaving.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(self.leaving):
            _copy(stored.pieces, _parts(stored.buffer, stored.pieces))

    def sent(self) -> torch.cuda.Event | None:
        """The moment at which all is sent that was to be sent until now; None: it is."""
        return self.leaving and self.leaving.record_event()

    def wait(self, moment: torch.cuda.Event | None) -> None:
        """What is asked for from now on is computed after `moment`, and memory that is let go of is given away then."""
        if moment is not None:
            torch.cuda.current_stream(self.device).wait_event(moment)

    def fetch(self, wanted: Sequence[Stored]) -> None:
        """Copies what was sent, and let go of, back into new memory; each is `ready` by itself, in this order."""
        # All memory first: where there is not enough, nothing is begun.
        buffers = [torch.empty(stored.size, dtype=torch.uint8, device=self.device) for stored in wanted]
        if self.coming is None:
            for stored, buffer in zip(wanted, buffers):
                _copy(_parts(buffer, stored.pieces), stored.pieces)
                stored.buffer = buffer
            return
        computing = torch.cuda.current_stream(self.device)
        # Somebody may still compute with the memory, whose block torch has given away in that stream's order. `leave`
        # came after that stream was told to wait for the copy that left, so this one waits for that, too.
        self.coming.wait_event(computing.record_event())
        with torch.cuda.stream(self.coming):
            for stored, buffer in zip(wanted, buffers):
                stored.buffer, stored.stream = buffer, computing
                _copy(_parts(buffer, stored.pieces), stored.pieces)
                stored.ready = self.coming.record_event()

    def arrived(self, stored: Stored) -> None:
        """What is asked for from now on is computed with what has come back."""
        if stored.ready is not None:
            self.wait(stored.ready)
            stored.ready = None


def _parts(buffer: torch.Tensor, pieces: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return buffer.split([len(piece) for piece in pieces])


def _copy(targets: Iterable[torch.Tensor], sources: Iterable[torch.Tensor]) -> None:
    for target, source in zip(targets, sources):
        target.copy_(source, non_blocking=True)


# -----------------------------------------------------------------------------
# Layers


class Layer:
    """What one layer has saved in one forward pass."""

    def __init__(self, known: set[int]):
        self.known = known  # storages that are no activations of its own, by their addresses
        self.stored: list[weakref.ref[Stored]] = []
        # Until its copies have left: everything, by storage and by how often that was changed in place. Held, so that
        # no other storage can come to lie at the same address while the layer runs.
        self.held: dict[tuple[int, int, int], Stored] = {}
        self.sent: torch.cuda.Event | None = None


class Pass:
    """A forward pass through all layers, and the backward pass that belongs to it, with what was `chosen` for both."""

    def __init__(self, chosen: Sequence[bool]):
        self.last, self.layers = -1, {}  # the last layer that has begun; each `Layer` by its number
        self.chosen = chosen
        # How many layers' backward passes before its own a layer begins to come back.
        self.ahead = max(AHEAD, math.ceil(len(chosen) / max(1, sum(chosen))))


class Offload:
    """Lets those of `layers`, given in the order of the forward pass, wait in the CPU's memory that are `chosen`.

    Their forwards are replaced, and nothing of them is recomputed. All other layers say when the time has come: a layer
    begins to come back some layers before its turn, and one at a time besides the one that computes, so two are on the
    device at most. Spread, with kept layers behind the last, copies have the time of several layers.
    """

    def __init__(self, layers: Sequence[torch.nn.Module], chosen: Sequence[bool], device: torch.device):
        self.layers, self.link = list(layers), Link(device)
        self.memory = HostMemory(pinned=device.type == "cuda")
        self.smallest = SMALLEST_BYTES if device.type == "cuda" else 0
        self.weights = [[*layer.parameters(), *layer.buffers()] for layer in self.layers]
        self.forwards, self.own = [layer.forward for layer in self.layers], []
        self.leaving: deque[Layer] = deque()
        self.choose(chosen)
        self.current = Pass(self.chosen)
        for number, layer in enumerate(self.layers):
            self.own.append("forward" in vars(layer))
            layer.forward = functools.partial(self.forward, number)

    def choose(self, chosen: Sequence[bool]) -> None:
        """Others wait in the CPU's memory, from the next forward pass on; one that has begun, and its backward pass,
        go on as they were. A layer that waits there is not recomputed, until it is told to be."""
        self.chosen = list(chosen)
        for layer, away in zip(self.layers, self.chosen, strict=True):
            if away:
                layer.gradient_checkpointing = False

    @property
    def pinned_gib(self) -> float:
        """GiB of the CPU's memory that are taken, for good."""
        return len(self.memory.chunks) * CHUNK_BYTES / GIB

    def stop(self) -> None:
        """The layers run as they did before; what waits is still fetched by backward passes to come."""
        for layer, forward, own in zip(self.layers, self.forwards, self.own):
            del layer.forward
            if own:
                layer.forward = forward

    def forward(self, number: int, *inputs: Any, **options: Any) -> Any:
        """Stands for the forward of layer `number`."""
        if not torch.is_grad_enabled():  # nothing is saved
            return self.forwards[number](*inputs, **options)
        if number <= self.current.last or self.current.last < 0:
            self.begin()
        this = self.current
        this.last = number
        if this.chosen[number]:
            made = self.run(this, number, inputs, options)
        else:
            made = self.forwards[number](*inputs, **options)
            if number == len(self.layers) - 1:  # what comes now, the logits, needs the memory most
                self.let_go(0)
        output = made if torch.is_tensor(made) else made[0]
        if output.requires_grad:
            output.register_hook(functools.partial(self.backward_begins, this, number))
        return made

    def begin(self) -> None:
        """Another forward pass; whatever an earlier one has left, by an error or without a backward pass, goes."""
        self.let_go(0)
        self.memory.begin_again()
        self.current = Pass(self.chosen)

    def run(self, this: Pass, number: int, inputs: tuple, options: dict) -> Any:
        """A layer whose activations leave."""
        # Positions, masks and bounds are the same for all layers: on the device they stay anyway.
        others = [*tensors_in(inputs[1:]), *tensors_in(options.values()), *self.weights[number]]
        layer = Layer({tensor.untyped_storage().data_ptr() for tensor in others})
        this.layers[number] = layer
        self.leaving.append(layer)
        pack, unpack = functools.partial(self.pack, layer), functools.partial(self.unpack, layer)
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                made = self.forwards[number](*inputs, **options)
        except BaseException:
            self.let_go(0)
            raise
        layer.sent = self.link.sent()
        self.let_go(STILL_LEAVING)
        return made

    def pack(self, layer: Layer, tensor: torch.Tensor) -> torch.Tensor | Saved:
        """What autograd keeps for `tensor`. Parameters as they are: ZeRO-3 takes their data away and brings it back."""
        if isinstance(tensor, torch.nn.Parameter):
            return tensor
        if not self.travels(layer, tensor):
            return tensor.detach()  # not itself: a layer's output would hold what holds it
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), storage.nbytes(), tensor._version)
        if (stored := layer.held.get(key)) is None:
            stored = Stored(tensor.detach(), self.memory.take(storage.nbytes()))
            layer.held[key] = stored
            layer.stored.append(weakref.ref(stored))
            self.memory.living.add(stored)
            self.link.send(stored)
        return Saved(stored, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def travels(self, layer: Layer, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is an activation of `layer`, and worth a copy."""
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
            return False
        storage = tensor.untyped_storage()
        if tensor.device.type != self.link.device.type or storage.nbytes() <= self.smallest:
            return False
        return storage.data_ptr() not in layer.known and not is_weight(tensor)

    def unpack(self, layer: Layer, saved: torch.Tensor | Saved) -> torch.Tensor:
        """The tensor that `pack` was given, or one with the same numbers in the same layout."""
        if isinstance(saved, torch.Tensor):
            return saved
        if saved.stored.buffer is None:
            self.fetch(layer)
        self.link.arrived(saved.stored)
        return saved.tensor()

    def backward_begins(self, this: Pass, number: int, gradient: torch.Tensor) -> None:
        """A hook of autograd: everything behind layer `number` has its gradients."""
        if (layer := this.layers.get(number)) is not None:
            if layer in self.leaving:  # among the last: what is still here need not come back
                self.leaving.remove(layer)
                self.link.wait(layer.sent)
                for stored in layer.held.values():
                    stored.check()
                layer.held = {}
            self.fetch(layer)
        earlier = max((other for other in this.layers if other < number), default=-1)
        if earlier >= max(0, number - this.ahead):
            self.fetch(this.layers[earlier])

    def fetch(self, layer: Layer) -> None:
        """Has all of a layer come back that somebody needs, and is not here; what is needed first comes first."""
        found = (reference() for reference in reversed(layer.stored))
        if wanted := [stored for stored in found if stored is not None and stored.buffer is None]:
            self.link.fetch(wanted)

    def let_go(self, most: int) -> None:
        """Of the layers whose copies are leaving, all but the last `most` leave the device's memory."""
        while len(self.leaving) > most:
            layer = self.leaving.popleft()
            self.link.wait(layer.sent or self.link.sent())
            held, layer.held = layer.held, {}
            for stored in held.values():
                stored.leave()


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """All tensors of a layer's arguments, of which some are tuples."""
    for value in values:
        if torch.is_tensor(value):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)


def is_weight(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is a view of a parameter, or of one in another precision, as autocast makes it."""
    whole = tensor if tensor._base is None else tensor._base
    if isinstance(whole, torch.nn.Parameter):
        return True
    made = whole.grad_fn
    if made is None or made.name() != "ToCopyBackward0":
        return False
    return isinstance(getattr(made.next_functions[0][0], "variable", None), torch.nn.Parameter)
