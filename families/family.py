"""What differs between architectures, as far as training and writing ask for it.

    family = family_of(model.config)                        # families/__init__.py
    pictures = family.pictures(processor, screenshots)      # one `Picture` each
    batch = family.join(pictures)                           # what the model takes of them, for the whole batch

No torch at import: `--help`, the checks and `--plan` read families, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from families.page_costs import Shape

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn
    from transformers import ProcessorMixin

    from families.slot_layers import Captured


class FamilyError(ValueError):
    """An architecture that nobody has written, or whose file does not fit its model."""


@dataclass(frozen=True)
class Picture:
    """One screenshot as a model takes it.

    `ids` stand where the chat template has its one image token (with the tokens of rows and columns, where a model
    marks those): `Shape.per_token` patches each. `inputs` are its tensors by the names of the model's forward.
    """

    ids: list[int]
    inputs: dict[str, Tensor]


def repeated_image_ids(processor: ProcessorMixin, features: dict, index: int) -> list[int]:
    """The ids of picture `index`, by what the processor itself puts into a question (transformers 5.23). `features` are
    its image processor's, asked for all that the processor asks for (its class's `images_kwargs`): SmolVLM's for rows
    and columns of tiles."""
    text = processor.replace_image_token(features, index)
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def stack(pictures: Sequence[Picture]) -> dict[str, Tensor]:
    """(B, ...) of each input: for processors whose pictures all have one size."""
    import torch

    return {name: torch.stack([picture.inputs[name] for picture in pictures]) for name in pictures[0].inputs}


@dataclass(frozen=True)
class Architecture:
    """What runs on the fast path instead of transformers' own modules, by their classes: training/fast_layers.py puts
    it there, families/fast_parts.py has what several families share. A subclass may compute something else, so only
    the very classes count.

    - `model` takes the place of the model's forward: one row of packed pages to its loss (`fast_parts.packed_forward`);
    - `forwards` take the place of a module's forward, `methods` of others of its methods, by name;
    - `blocks` take the place of a whole layer's forward while its products are plain ones (`fast_parts.layer_forward`);
      ZeRO-3 fetches each of these layers at once. They have an attribute `gradient_checkpointing`;
    - `activations` are those that `forwards` and `blocks` compute for a class, by the names of torch and transformers:
      a module with another one keeps its own forward;
    - `elementwise` are functions of its own for `elementwise.Elementwise`, in the place of those of the same names;
    - `towers` are the parts of the model for whose shapes element-wise functions are compiled, each its own; the head
      belongs to the last of them;
    - `vision_layers` names the list of the vision tower's layers; `widened` those products of its MLP that the MLP's
      width is a side of, with that axis of the weight: tensor cores want a multiple of 8;
    - `words(config, device, dtype)` says what else runs there, with what has to prove itself proved, for the line that
      a training begins with.
    """

    model: Callable
    forwards: Mapping[type, Callable]
    blocks: Mapping[type, Callable]
    activations: Mapping[type, tuple[str, ...]]
    methods: Mapping[type, Mapping[str, Callable]] = field(default_factory=dict)
    towers: tuple[str, ...] = ("model.visual", "model.language_model")
    vision_layers: str = "model.visual.blocks"
    widened: Mapping[str, int] = field(default_factory=dict)
    elementwise: tuple[Callable, ...] = ()
    words: Callable[[Any, str, Any], str] | None = None

    @property
    def leaves(self) -> list[str]:
        """The classes that ZeRO-3 fetches whole (zero3.set_leaves): its layers."""
        return [layer.__name__ for layer in self.blocks]


@dataclass(frozen=True)
class Family:
    """One architecture. To add one, write `families/<model_type>.py` with a `FAMILY`, by the `model_type` of
    its config.json, and name it in `families/__init__.py`:

    1. `vision`: the modules of the vision tower and what joins it to the language model, by name. `--freeze_vision`
       leaves them as they are, and 4-bit quantisation leaves them whole: reading small print is what they are for.
    2. `adapters`: a regular expression of the modules that LoRA adapts, the language model's own projections. By leaf
       name alone those of a vision tower would often match, too.
    3. `limit_pixels(processor, least, most)`: bounds width x height after resizing, in the units of the processor. It
       is saved with the processor, which is how `use_model_from_hub.py` comes to the same sizes.
    4. `image_tokens(processor, width, height)`: how many ids a screenshot of that size takes, without decoding it.
    5. `most_image_tokens(config, most_pixels)`: the most that `limit_pixels` lets through, from the configuration.
    6. `pictures(processor, screenshots)`: one `Picture` for each. `repeated_image_ids` gives the ids wherever the
       processor has `replace_image_token`.
    7. `join(pictures)`: their inputs as those of a batch; `stack` where all have one size.
    8. `token_types`: whether the model's positions need `mm_token_type_ids` (B, T), 1 on image tokens.
    9. `shape(config)`: the widths by which costs are counted, a `page_costs.Shape`.

    That is all that the plain path needs: padded rows, the model's own forward, writing by generate(). The fast one:

    10. `architecture`: a function without arguments to its `Architecture`, which may import torch.
    11. `geometry(config)`: a function from `image_grid_thw` (B, 3) to what the vision tower derives from it, as
        keyword arguments "image_...", and what else the data workers should work out. `packing.pack` has the positions
        of Qwen's models.

    And the engine that writes:

    12. `captured(model)`: what it works with, a `slot_layers.Captured`: layers, whose mixers read and step, and a tower
        of `towers.py`. None where transformers' generate() writes.
    13. `activations`: of the MLPs of the language model and of the tower, which these layers compute; models with
        others are left to generate().

    Give `TINY` in tests/conftest.py a tiny model of it: tests/families/test_family.py then holds 1 to 9 against its
    true processor and its true modules, tests/families/test_fast_parts.py the fast path against the model's own,
    tests/writing/test_engine.py the engine against generate().
    """

    model_type: str
    vision: tuple[str, ...]
    adapters: str
    limit_pixels: Callable[[object, int, int], None]
    image_tokens: Callable[[object, int, int], int]
    most_image_tokens: Callable[[object, int], int]
    pictures: Callable[[object, list[Image]], list[Picture]]
    join: Callable[[Sequence[Picture]], dict[str, Tensor]]
    shape: Callable[[object], Shape]
    token_types: bool = False
    architecture: Callable[[], Architecture] | None = None
    geometry: Callable[[Any], Callable[[Tensor], dict[str, Any]]] | None = None
    captured: Callable[[nn.Module], Captured] | None = None
    activations: tuple[str, str] = ("silu", "silu")

    @property
    def fast(self) -> bool:
        """Whether there is a fast path for it."""
        return self.architecture is not None

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        """The modules named in `vision`. Raises `FamilyError` on a name that `model` lacks: quantisation and
        freezing would pass over it in silence."""
        known = dict(model.named_modules())
        missing = [name for name in self.vision if name not in known]
        if missing:
            names = ", ".join(missing)
            raise FamilyError(f"{type(model).__name__} has no {names}: correct families/{self.model_type}.py")
        return [known[name] for name in self.vision]
