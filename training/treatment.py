"""What each layer does with its activations, set anew for each batch by the batch's own size.

    treatment = Treatment(model, way, device=device)        # kept, recomputed, offloaded, as `way` has it
    treatment.set(other)                                    # from the next forward pass on, with the same numbers
    batches = Batches(treatment, plan)                      # one of plan.rungs for each batch
    batches.treat(inputs)                                   # before its forward pass; GiB that it was planned to take
    batches.highest                                         # the plan of the fullest batch so far

The longest batch decides what fits at all, but few batches are as long: each of the others keeps as many layers as its
own size leaves room for. Kept, recomputed and offloaded layers have the same gradients to the bit, so a run learns the
same whatever is chosen. A choice takes some 0.2 ms of the CPU and nothing of the GPU: sizes are read off the tensors'
shapes. Every rank chooses by itself, which is why nothing of this is done where recomputing asks other ranks for
weights (`memory_fit.may_fill`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from training.activation_offload import Offload
from training.memory_plan import Load, MemoryPlan, Way, layer_ways, share_of

CPU = torch.device("cpu")


class Treatment:
    """Lets each layer of both towers of `model` keep its activations, make them again, or have them wait in the CPU's
    memory; without `recomputes`, which is what the Trainer was told, none makes them again. `offload` moves those that
    wait: None where `way`, the first, has none wait, and then no later one may."""

    def __init__(self, model: torch.nn.Module, way: Way, recomputes: bool = True, device: torch.device = CPU):
        self.text, self.vision = layers_of(model, vision=False), layers_of(model, vision=True)
        self.recomputes, self.known = recomputes, {}
        away = "offloaded" in self.ways_of(way.recomputed, way.offloaded, len(self.text))
        self.offload = Offload(self.text, [False] * len(self.text), device) if away else None
        self.set(way)
        if self.vision and not any(part.requires_grad for layer in self.vision for part in layer.parameters()):
            spare_frozen_tower(model)

    def ways_of(self, recomputed: float, offloaded: float, layers: int) -> Sequence[str]:
        """`layer_ways` of a tower of so many layers, by shares; each is worked out once."""
        counts = (layers, share_of(layers, recomputed) * self.recomputes, share_of(layers, offloaded))
        if counts not in self.known:
            self.known[counts] = layer_ways(*counts)
        return self.known[counts]

    def set(self, way: Way) -> None:
        """Before a forward pass, once the backward passes of those before are done."""
        text = self.ways_of(way.recomputed, way.offloaded, len(self.text))
        vision = self.ways_of(way.recomputed_vision, 0.0, len(self.vision))
        for layer, treated in [*zip(self.text, text), *zip(self.vision, vision)]:
            if layer.gradient_checkpointing != (treated == "recomputed"):
                layer.gradient_checkpointing = treated == "recomputed"
        if self.offload is not None:
            self.offload.choose([treated == "offloaded" for treated in text])
        elif "offloaded" in text:
            raise ValueError(
                f"{way.offloaded:.0%} of the layers are to wait in the CPU's memory, and nothing moves them"
            )


class Batches:
    """Treats each batch of a training as `plan.rungs` has it for its size, of which `excess_gib` less are given out: by
    so much the proof before step one has measured more than was planned for it."""

    def __init__(self, treatment: Treatment, plan: MemoryPlan, excess_gib: float = 0.0):
        self.treatment = treatment
        self.rungs = plan.rungs.below(max(0.0, excess_gib))
        self.way = plan.way  # of the last batch
        self.highest: MemoryPlan | None = None
        treatment.set(plan.way)

    @property
    def fills(self) -> bool:
        """Whether batches may keep more activations than the longest one. What one has filled leaves gaps in the
        allocator's memory, in which a later one may not fit, the longest included."""
        return len(self.rungs.ways) > 1

    def treat(self, inputs: Mapping[str, Any]) -> float:
        """(any rank) Before the forward pass of a packed batch; returns the GiB that are planned for it."""
        plan = self.rungs.plan_for(load_of(inputs))
        if plan.way != self.way:
            self.treatment.set(plan.way)
            self.way = plan.way
        if self.highest is None or plan.total_gib > self.highest.total_gib:
            self.highest = plan
        return plan.total_gib


def load_of(inputs: Mapping[str, Any]) -> Load:
    """The size of a packed batch, from its tensors' shapes, which no GPU has to be asked for."""
    return Load(inputs["input_ids"].numel(), len(inputs["pixel_values"]), len(inputs["targets"]))


def spare_frozen_tower(model: torch.nn.Module) -> None:
    """Take from a tower that learns nothing the backward pass that transformers 5.23 gives it: with activation
    checkpointing the output of every embedding, of patches too, is made to need a gradient."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module, "_require_grads_hooks", None):
            module.disable_input_require_grads()  # adapters have a hook of their own (add_adapters)


def layers_of(model: torch.nn.Module, vision: bool) -> list[torch.nn.Module]:
    """The layers of the vision tower, or of the language model, the first first; also where adapters wrap `model`."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]
    return [layer for name, layer in layers if ("visual" in name.split(".")) == vision]
