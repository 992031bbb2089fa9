"""Activations that wait in the CPU's memory: the same numbers to the bit, whatever is done with other layers."""

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


@pytest.fixture(scope="module", params=FAST)
def tiny(request):
    """Of six layers, so that ways can be mixed."""
    tiny = Tiny(request.param)
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
def test_kept_recomputed_and_offloaded_layers_learn_the_same_to_the_bit(tiny, adapters, monkeypatch):
    """Batches of different sizes, larger ones last, over chunks in which a tensor does not end."""
    monkeypatch.setattr(activation_offload, "CHUNK_BYTES", 5_120)
    model = trained(tiny, adapters)
    batches = [tiny.collate(tiny.pages(count, seed=count), packed=True) for count in (3, 1, 4)]
    treated(model, "kkkkkk").stop()
    wanted = [learned(model, model(**batch).loss) for batch in batches]
    check_equal(wanted[0], learned(model, model(**batches[0]).loss))
    assert not torch.equal(wanted[0]["loss 0"], wanted[1]["loss 0"])
    treated(model, "rrrrrr").stop()
    check_equal(learned(model, model(**batches[0]).loss), wanted[0])
    for ways in ("oooooo", "okrokr", "kkookk"):
        offload = treated(model, ways)
        for batch, right in zip(batches, wanted):
            check_equal(learned(model, model(**batch).loss), right)
            assert not offload.memory.living, "whatever waited is gone, and its place is free"
        assert offload.memory.used > 5_120
        offload.stop()


def test_batches_whose_backward_passes_come_later_do_not_overwrite_each_other(tiny, monkeypatch):
    monkeypatch.setattr(activation_offload, "CHUNK_BYTES", 5_120)
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
    """Saves its input once, as it is and turned, a state of its own, a weight and positions that all layers share."""

    gradient_checkpointing = False

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 8))
        self.spoilt = False

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        state = torch.tanh((hidden.T.mul(positions)).T @ self.weight.T)
        made = hidden * state
        if self.spoilt:
            state.add_(1)
        return made


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
