"""Activations that wait in the CPU's memory: the same numbers to the bit, whatever is done with other layers."""

import contextlib

import pytest
import torch
from conftest import Tiny

import holo1_dom_finetune as pipeline
from families import FAMILIES, family_of
from training import activation_offload, fast_layers
from training.activation_offload import HostMemory, Offload
from training.settings import PageSettings

FAST = [name for name in FAMILIES if family_of(name).fast]
CPU = torch.device("cpu")


def tiny_of(name: str) -> Tiny:
    """Of six layers, so that ways can be mixed."""
    tiny = Tiny(name)
    text = tiny.config.text_config
    text.num_hidden_layers = 6
    if hasattr(text, "layer_types"):
        text.layer_types = (6 * text.layer_types)[:6]
    return tiny


def trained(tiny: Tiny, adapters: bool = False) -> torch.nn.Module:
    model = tiny.model()
    fast_layers.align_vision_mlp(model)
    fast_layers.install(model, fuse=False)
    if adapters:
        model = pipeline.add_adapters(model, PageSettings(lora=True), 0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros at first, behind which A would learn nothing
                torch.nn.init.normal_(parameter)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return next(module for name, module in model.named_modules() if name.endswith("language_model.layers"))[:]


def treated(model: torch.nn.Module, ways: str) -> Offload:
    """`ways`: k(ept), r(ecomputed) or o(ffloaded) for each layer of the language model; the tower keeps all."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    layers = layers_of(model)
    for layer, way in zip(layers, ways, strict=True):
        layer.gradient_checkpointing = way == "r"
    return Offload(layers, [way == "o" for way in ways], CPU)


def learned(model: torch.nn.Module, *losses: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    found = {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}
    return found | {f"loss {number}": loss.detach() for number, loss in enumerate(losses)}


def check_equal(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys() and len(wanted) > 20
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("name", FAST)
def test_kept_recomputed_and_offloaded_layers_learn_the_same_to_the_bit(name, adapters, monkeypatch):
    """Batches of different sizes, the larger one last, over chunks in which a tensor does not end."""
    monkeypatch.setattr(activation_offload, "CHUNK_BYTES", 5_120)
    tiny = tiny_of(name)
    model = trained(tiny, adapters)
    batches = [tiny.collate(tiny.pages(count, seed=count), packed=True) for count in (1, 3)]
    treated(model, "kkkkkk").stop()
    wanted = [learned(model, model(**batch).loss) for batch in batches]
    check_equal(wanted[0], learned(model, model(**batches[0]).loss))
    assert not torch.equal(wanted[0]["loss 0"], wanted[1]["loss 0"])
    treated(model, "rrrrrr").stop()
    check_equal(learned(model, model(**batches[0]).loss), wanted[0])
    for ways in ("oooooo", "okrokr"):
        offload = treated(model, ways)
        for batch, right in zip(batches, wanted):
            check_equal(learned(model, model(**batch).loss), right)
            assert not offload.memory.living, "whatever waited is gone, and its place is free"
        assert offload.memory.used > 5_120
        offload.stop()


def test_batches_whose_backward_passes_come_later_do_not_overwrite_each_other(monkeypatch):
    monkeypatch.setattr(activation_offload, "CHUNK_BYTES", 5_120)
    tiny = tiny_of("qwen3_vl")
    model = trained(tiny)
    batches = [tiny.collate(tiny.pages(count, seed=count), packed=True) for count in (2, 3)]
    treated(model, "kkkkkk").stop()
    wanted = learned(model, *(model(**batch).loss for batch in batches))
    offload = treated(model, "okoook")
    check_equal(learned(model, *(model(**batch).loss for batch in batches)), wanted)
    high = offload.memory.used
    model(**batches[0])  # a forward pass alone, and one that an error ends in the midst
    whole, offload.forwards[4] = offload.forwards[4], lambda *inputs, **options: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model(**batches[1])
    assert not offload.leaving, "an error holds no memory of the device"
    offload.forwards[4] = whole
    check_equal(learned(model, *(model(**batch).loss for batch in batches)), wanted)
    assert offload.memory.used == high, "what those had taken is free again"


class Small(torch.nn.Module):
    """Saves its input, turned and in two parts, a state of its own, a weight, and positions that all layers share."""

    gradient_checkpointing = False

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 8) / 3)
        self.spoilt = False

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        state = torch.tanh((hidden.T * positions).T @ self.weight.T)
        made = torch.cat((hidden[:2] * state[:2], hidden[2:] * state[2:]))
        if self.spoilt:
            state.add_(1)
        return made


class Played:
    """Stands for a stream of a GPU whose copies are made as late as they may be: when somebody waits for them."""

    def __init__(self, eager: bool = False):
        self.eager, self.queue, self.done, self.knows = eager, [], 0, -1

    def record_event(self) -> tuple["Played", int]:
        if self.eager:  # computes at once; the number tells what has been asked for before
            self.done += 1
        return self, self.done if self.eager else len(self.queue)

    def wait_event(self, event: tuple["Played", int]) -> None:
        other, place = event
        if other.eager:
            self.knows = place
        elif self.eager:
            other.run(place)
        else:
            self.queue.append(lambda: other.run(place))

    def run(self, place: int) -> None:
        while self.done < place:
            self.done += 1
            self.queue[self.done - 1]()


@pytest.fixture
def late(monkeypatch):
    """Gives an `Offload` played streams; memory that is new, or let go of, holds no numbers."""
    now = [computing := Played(eager=True)]

    @contextlib.contextmanager
    def stream(played):
        now.append(played)
        yield
        now.pop()

    def copy(targets, sources, real=activation_offload._copy):
        assert now[-1].knows == computing.done, "a copy that does not wait for what is computed"
        now[-1].queue.append(lambda: real(targets, sources))

    def leave(stored, real=activation_offload.Stored.leave):
        buffer = stored.buffer
        real(stored)
        buffer.fill_(255)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(activation_offload, "_copy", copy)
    monkeypatch.setattr(activation_offload.Stored, "leave", leave)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)

    def with_streams(offload: Offload) -> Offload:
        offload.link.leaving, offload.link.coming = Played(), Played()
        return offload

    yield with_streams
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("chosen", [(0, 4), (0, 1, 2), (6, 7), range(8)], ids=str)
def test_copies_that_come_as_late_as_they_may_change_nothing(chosen, late):
    """Three batches of different sizes, of which two go forward before the first goes back."""
    torch.manual_seed(0)
    layers = [Small() for _ in range(8)]

    def learned(*sizes: int) -> list[torch.Tensor]:
        ends, draw = [], torch.Generator().manual_seed(1)
        for size in sizes:
            hidden = torch.randn(size, 8, generator=draw).requires_grad_() * 1
            for layer in layers:
                hidden = layer(hidden, positions=torch.ones(size))
            ends.append(hidden)
        found = [torch.autograd.grad(end.sum(), [layer.weight for layer in layers]) for end in ends]
        return [gradient for part in found for gradient in part]

    wanted = [learned(*sizes) for sizes in ((5, 9), (7,), (3,))]
    offload = late(Offload(layers, [number in chosen for number in range(8)], CPU))
    for sizes, right in zip(((5, 9), (7,), (3,)), wanted):
        assert all(torch.equal(one, other) for one, other in zip(learned(*sizes), right, strict=True))
    assert not offload.memory.living and offload.link.leaving.done > 10


def test_another_choice_begins_with_the_next_forward_pass_and_changes_nothing(late):
    """Made while the backward pass of the one before is still to come, as late as copies may be."""
    torch.manual_seed(0)
    layers, draw = [Small() for _ in range(8)], torch.Generator().manual_seed(1)
    inputs = [torch.randn(size, 8, generator=draw) for size in (5, 9, 7, 3, 8)]
    weights = [layer.weight for layer in layers]

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone().requires_grad_() * 1
        for layer in layers:
            hidden = layer(hidden, positions=torch.ones(len(hidden)))
        return hidden.sum()

    wanted = [torch.autograd.grad(forward(hidden), weights) for hidden in inputs]
    offload = late(Offload(layers, [False] * 8, CPU))
    end, sent = None, []
    for number, (hidden, chosen) in enumerate(zip(inputs, [(0, 4), (), (6, 7), range(8), (3,)], strict=True)):
        offload.choose([layer in chosen for layer in range(8)])
        if end is not None:
            found = torch.autograd.grad(end, weights)
            assert all(torch.equal(one, other) for one, other in zip(found, wanted[number - 1], strict=True))
        end = forward(hidden)
        sent.append(sorted(offload.current.layers))
    assert sent == [[0, 4], [], [6, 7], [*range(8)], [3]]
    del end
    assert not offload.memory.living


def test_memory_that_was_fetched_for_nothing_is_not_given_away_before_its_copy_has_come(late):
    layers = [Small() for _ in range(8)]
    offload = late(Offload(layers, [number in (0, 4) for number in range(8)], CPU))
    hidden = torch.randn(5, 8, requires_grad=True) * 1
    for layer in layers:
        hidden = layer(hidden, positions=torch.ones(5))
    torch.autograd.grad(hidden.sum(), [layers[7].weight])
    coming = offload.link.coming
    assert coming.done == 0 < len(coming.queue), "begun, and nobody has asked for it yet"
    del hidden
    assert coming.done == len(coming.queue) and not offload.memory.living


def test_activations_leave_once_and_come_back_before_their_turn(monkeypatch):
    layers, told = [Small() for _ in range(8)], []
    offload = Offload(layers, [number in (0, 4) for number in range(8)], CPU)
    send, fetch = offload.link.send, offload.link.fetch
    monkeypatch.setattr(offload.link, "send", lambda stored: told.append("sent") or send(stored))
    monkeypatch.setattr(offload.link, "fetch", lambda wanted: told.append(f"{len(wanted)} fetched") or fetch(wanted))
    hidden, positions = torch.randn(5, 8, requires_grad=True) * 1, torch.randn(5)
    for number, layer in enumerate(layers):
        told.append(number)
        hidden = layer(hidden, positions=positions)
        hidden.register_hook(lambda gradient, number=number: told.append(f"back in {number}"))
        # The last one to leave may still be leaving; once all layers are done, nothing is.
        waiting = [reference() for record in offload.current.layers.values() for reference in record.stored]
        here = [stored.buffer is not None for stored in waiting]
        assert here == {0: [True] * 3, 4: [False] * 3 + [True] * 3, 7: [False] * 6}.get(number, here)
    # Input, what goes into the product, and the state; neither weights nor positions.
    assert told == [0, *["sent"] * 3, 1, 2, 3, 4, *["sent"] * 3, 5, 6, 7]
    assert offload.memory.used == 6 * activation_offload.ALIGNED_BYTES and not offload.leaving
    del told[:], waiting
    hidden.sum().backward()
    wanted = ["3 fetched", "back in 7", "back in 6", "back in 5", "3 fetched", "back in 4", "back in 3", "back in 2"]
    assert told == [*wanted, "back in 1", "back in 0"]
    assert not offload.memory.living


def test_what_is_changed_after_it_was_saved_is_an_error():
    """Under hooks autograd no longer looks for that, and a copy that is still leaving would be half of each."""
    layers = [Small() for _ in range(2)]
    layers[0].spoilt = True
    offload = Offload(layers, [True, False], CPU)
    with pytest.raises(RuntimeError, match="saved for its backward pass was changed in place"):
        layers[1](layers[0](torch.randn(5, 8), positions=torch.ones(5)), positions=torch.ones(5))
    offload.stop()
    assert "forward" not in vars(layers[0])


def test_pinned_memory_that_is_not_there_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(activation_offload, "free_bytes", lambda: 10**9)
    with pytest.raises(MemoryError, match="give a smaller --offload_share"):
        HostMemory(pinned=True).take(1)


def test_weights_in_the_precision_of_autocast_do_not_travel():
    layer, told = torch.nn.Linear(8, 8), []
    offload = Offload([layer], [True], CPU)
    send = offload.link.send
    offload.link.send = lambda stored: told.append(stored.original.shape) or send(stored)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(5, 8, requires_grad=True) * 1).sum().backward()
    assert told == [(5, 8)] and layer.weight.grad.abs().sum() > 0
