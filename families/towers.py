"""Vision towers without gradients, as reading takes them: the patches of all pictures in one row.

    pictures, deep = tower.see([patches, ...], grids)

`pictures` (P / 4, H) are what the language model takes at the places of its image tokens, `deep` what its first layers
get there besides (DeepStack, Meng et al. 2024), one (P / 4, H) each.

Shapes: P patches of all pictures that are read together; V the width of the tower, H of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from families.slot_layers import add_linear, rotate, side_by_side
from kernels import row_kernels
from kernels.attention import attend

# Of kernels.positions, from grids to what the tower derives from them.
Geometry = Callable[[torch.Tensor], dict[str, Any]]


class WindowedBlock:
    """A layer of Qwen2.5-VL's tower; gate and up of its MLP side by side."""

    def __init__(self, block: torch.nn.Module):
        mlp, self.attention = block.mlp, block.attn
        self.norms = [(norm.weight, norm.variance_epsilon) for norm in (block.norm1, block.norm2)]
        self.gated, self.gated_bias = side_by_side(mlp.gate_proj, mlp.up_proj)
        self.down, self.down_bias = mlp.down_proj.weight, mlp.down_proj.bias

    def widen(self, multiple: int = 32) -> None:
        """Widen the MLP with zeros, in copies: 3,420 columns are no multiple of 8, and half-precision products of such
        fall back to old tensor-core kernels. Zeros stay zeros: silu(0) x 0 = 0."""
        missing = -len(self.gated) // 2 % multiple
        if not missing:
            return
        gate, up = self.gated.chunk(2)
        self.gated = torch.cat([functional.pad(part, (0, 0, 0, missing)) for part in (gate, up)])
        if self.gated_bias is not None:
            self.gated_bias = torch.cat([functional.pad(part, (0, missing)) for part in self.gated_bias.chunk(2)])
        self.down = functional.pad(self.down, (0, missing))


class WindowedTower:
    """Qwen2.5-VL's (transformers 5.23): most layers attend inside windows."""

    def __init__(self, tower: torch.nn.Module, geometry: Geometry):
        self.tower, self.geometry = tower, geometry
        with torch.no_grad():
            self.blocks = [WindowedBlock(block) for block in tower.blocks]
            for block in self.blocks:
                if block.gated.element_size() == 2:
                    block.widen()

    @torch.inference_mode()
    def see(self, pictures: Sequence[torch.Tensor], grids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """`pictures` (patches, pixels of one), each of its row in `grids` (pictures, 3), all on a CPU, to their tokens
        (P / 4, H)."""
        tower, device = self.tower, self.tower.device
        geometry = self.geometry(grids)
        order = geometry["image_window_index"]
        unit, back = tower.spatial_merge_unit, torch.argsort(order).to(device, non_blocking=True)
        places = geometry["image_position_ids"].view(len(order), unit, -1)[order].flatten(0, 1)
        patches = torch.cat([patches.to(device, tower.dtype, non_blocking=True) for patches in pictures])
        hidden = functional.linear(patches, tower.patch_embed.proj.weight.flatten(1))
        # Windows stand together from here on.
        hidden = hidden.view(len(order), unit, -1)[order.to(device, non_blocking=True)].flatten(0, 1)
        angles = [part.float() for part in tower.rotary_pos_emb(hidden, places.to(device, non_blocking=True))]
        bounds = [
            (geometry[f"image_cu_{name}seqlens"].to(device, torch.int32), geometry[f"image_max_{name}seqlen"])
            for name in ("window_", "")
        ]
        for number, block in enumerate(self.blocks):
            hidden = self.see_block(block, hidden, angles, *bounds[number in tower.fullatt_block_indexes])
        return tower.merger(hidden)[back], []

    def see_block(
        self,
        block: WindowedBlock,
        hidden: torch.Tensor,
        angles: Sequence[torch.Tensor],
        bounds: torch.Tensor,
        longest: int,
    ) -> torch.Tensor:
        """(P, V) to (P, V), over the segments of `bounds`."""
        attention, normed = block.attention, row_kernels.rms_norm(hidden, *block.norms[0])
        done = see_heads(attention, normed, angles, bounds, longest)
        hidden = add_linear(hidden, done, attention.proj.weight, attention.proj.bias)
        both = functional.linear(row_kernels.rms_norm(hidden, *block.norms[1]), block.gated, block.gated_bias)
        return add_linear(hidden, row_kernels.swiglu(both), block.down, block.down_bias)


class PlainTower:
    """Qwen3-VL's and Qwen3.5's (transformers 5.23): every layer sees the whole picture, places are learned and
    interpolated beside the rotary ones, norms have means and biases, and the MLP has no gate."""

    def __init__(self, tower: torch.nn.Module, geometry: Geometry):
        self.tower, self.geometry = tower, geometry
        # Of Qwen3-VL: after which layers a merger of its own makes what goes into the language model deep down.
        after = getattr(tower, "deepstack_visual_indexes", ())
        self.mergers = dict(zip(after, getattr(tower, "deepstack_merger_list", ())))

    @torch.inference_mode()
    def see(self, pictures: Sequence[torch.Tensor], grids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """As `WindowedTower.see`."""
        tower, device = self.tower, self.tower.device
        geometry = self.geometry(grids)
        places, taps, shares = (
            geometry[f"image_{name}"].to(device, non_blocking=True)
            for name in ("position_ids", "interp_indices", "interp_bits")
        )
        shares = shares.view(torch.float32)
        bounds, longest = geometry["image_cu_seqlens"].to(device, torch.int32), geometry["image_max_seqlen"]
        patches = torch.cat([patches.to(device, tower.dtype, non_blocking=True) for patches in pictures])
        embed = tower.patch_embed.proj
        hidden = functional.linear(patches, embed.weight.flatten(1), embed.bias)
        # One neighbour after the other: all four in fp32 at once would be the most memory that reading takes.
        learned = sum(tower.pos_embed(taps[:, tap]) * shares[:, tap, None] for tap in range(taps.shape[1]))
        hidden = hidden + learned.to(hidden.dtype)
        angles = [part.float() for part in tower.rotary_pos_emb(hidden, places)]
        deep = []
        for number, block in enumerate(tower.blocks):
            hidden = self.see_block(block, hidden, angles, bounds, longest)
            if number in self.mergers:
                deep.append(self.mergers[number](hidden))
        return tower.merger(hidden), deep

    def see_block(
        self,
        block: torch.nn.Module,
        hidden: torch.Tensor,
        angles: Sequence[torch.Tensor],
        bounds: torch.Tensor,
        longest: int,
    ) -> torch.Tensor:
        """(P, V) to (P, V), each patch with all of its picture."""
        attention, mlp = block.attn, block.mlp
        done = see_heads(attention, block.norm1(hidden), angles, bounds, longest)
        hidden = add_linear(hidden, done, attention.proj.weight, attention.proj.bias)
        inner = mlp.act_fn(functional.linear(block.norm2(hidden), mlp.linear_fc1.weight, mlp.linear_fc1.bias))
        return add_linear(hidden, inner, mlp.linear_fc2.weight, mlp.linear_fc2.bias)


def see_heads(
    attention: torch.nn.Module,
    normed: torch.Tensor,
    angles: Sequence[torch.Tensor],
    bounds: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """`normed` (P, V) to what each patch has seen of its segment (P, V), before the product back."""
    together = functional.linear(normed, attention.qkv.weight, attention.qkv.bias)
    query, key, value = together.view(len(normed), 3, attention.num_heads, -1).unbind(1)
    query, key = rotate(query, key, *angles)
    return attend(query, key, value.contiguous(), bounds, longest, attention.scaling, causal=False).flatten(1)
