"""Narrow tiles as they are compiled for Hopper, which needs no GPU; their numbers: tests/kernels/interpreted.py."""

import os
import re

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
POINTERS = ("source", "weight", "bias", "residual", "norm", "target", "scaled")


def compiled(kind: str, depth: int) -> str:
    """The PTX of the kernel of `kind` for up to 8 rows, for compute capability 9.0."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels import skinny_products as room

    tile = room.fitted(room.TILES[kind][8], depth, 2_048)
    kernel, (width, block, warps, stages, sharers, pieces) = room.product_kernel, tile
    flags = {"NORMED": kind == "qkv", "BIAS": kind == "qkv", "RESIDUAL": kind != "qkv", "SCALED": False, "GATED": False}
    fixed = flags | {"DEPTH": depth, "PARTS": 128, "ROWS": 8, "COLUMNS": width, "BLOCK": block, "SHARERS": sharers}
    fixed |= {"PIECES": pieces, "EARLY": True, "WARMED": room.WARMED[kind]}
    kinds = dict.fromkeys(POINTERS, "*bf16") | {"arrived": "*i32", "epsilon": "fp32"}
    kinds |= dict.fromkeys(("squares", "squares_done", "shares"), "*fp32")
    kinds |= dict.fromkeys(("rows", "columns", "parts"), "i32")
    names = kernel.arg_names
    signature = {name: kinds.get(name, "constexpr") for name in names}
    given = {(names.index(name),): value for name, value in fixed.items()}
    whole = {(names.index(name),): [["tt.divisibility", 16]] for name in (*POINTERS, "squares", "columns")}
    options = {"num_warps": warps, "num_stages": stages, "launch_pdl": True}
    source = ASTSource(kernel, signature, given, whole)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted is not compiled")
@pytest.mark.parametrize(("kind", "depth"), [("qkv", 2_048), ("qkv", 2_560), ("out", 2_048), ("down", 11_008)])
def test_before_the_kernel_before_has_ended_only_what_it_does_not_write_is_asked_for(kind, depth):
    """All weights where the depth is one block, of others their first lines; and what is added, past the processor's
    own cache."""
    before, after = compiled(kind, depth).split("griddepcontrol.wait")
    whole = (kind, depth) == ("qkv", 2_048)
    # 16 columns of 2,048 numbers by 256 threads, 16 bytes each time: 16 loads of weights.
    assert len(re.findall(r"ld\.global\.v4", before)) == (16 if whole else 0)
    assert ("prefetch.global.L2" in before) == (not whole)
    assert "cp.async" not in before and ("cp.async" in after) == (not whole)
    assert ("ld.global.cg" in before) == (kind != "qkv")


def test_a_tile_of_one_stage_is_for_a_depth_that_is_one_block_of_each_program():
    from kernels.broad_products import Broad
    from kernels.skinny_products import BROAD_OTHERWISE, NARROW_OTHERWISE, TILES, fitted

    assert fitted(TILES["qkv"][8], 2_048, 2_560) == TILES["qkv"][8]
    assert fitted(TILES["qkv"][8], 2_560, 6_144) == NARROW_OTHERWISE
    assert fitted(Broad(64, 512, 4, 1, 4), 2_048, 2_048) == Broad(64, 512, 4, 1, 4)
    # Too many columns for four programs a tile, and another depth.
    assert fitted(Broad(64, 512, 4, 1, 4), 2_048, 6_144) == BROAD_OTHERWISE.shared(6_144)
    assert fitted(Broad(64, 512, 4, 1, 4), 4_096, 2_560) == BROAD_OTHERWISE
    assert fitted(TILES["down"][64], 9_728, 2_560) == TILES["down"][64]
