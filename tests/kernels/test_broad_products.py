"""Broad tiles as they are compiled for Hopper, which needs no GPU; their numbers: tests/kernels/interpreted.py."""

import os
import re

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
SHARED_BYTES = 227 * 1024  # that a program may have on an H100
POINTERS = ("weight", "bias", "residual", "following", "target", "scaled")
# Depth, columns and what is around the product, by its kind, of Holo1-3B.
KINDS = {
    "qkv": (2_048, 2_560, {"NORMED": True, "BIAS": True}),
    "out": (2_048, 2_048, {"RESIDUAL": True, "SCALED": True}),
    "gated": (2_048, 11_008, {"NORMED": True, "GATED": True}),
    "down": (11_008, 2_048, {"RESIDUAL": True, "SCALED": True}),
    "head": (2_048, 151_936, {"NORMED": True}),
}


def compiled(kernel, tile, rows: int, depth: int, around: dict[str, bool]):
    """The kernel with such a tile for compute capability 9.0."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, flags = kernel.arg_names, dict.fromkeys(("NORMED", "BIAS", "RESIDUAL", "SCALED", "GATED"), False) | around
    sizes = {"ROWS": rows, "COLUMNS": tile.columns, "BLOCK": tile.block, "SHARERS": tile.sharers}
    fixed = sizes | flags | {"DEPTH": depth, "PARTS": 32, "EARLY": True}
    kinds = dict.fromkeys(POINTERS, "*bf16") | {"arrived": "*i32", "epsilon": "fp32"}
    kinds |= dict.fromkeys(("squares", "squares_done", "shares"), "*fp32")
    kinds |= dict.fromkeys(("rows", "columns", "parts"), "i32")
    kinds |= {"sources": f"tensordesc<bf16[{rows},{tile.block}]>"}
    kinds |= {"weights": f"tensordesc<bf16[{tile.columns},{tile.block}]>"}
    signature = {name: kinds.get(name, "constexpr") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in fixed.items()})
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "launch_pdl": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def given_of(code: str, registers: set[str]) -> set[int]:
    """Which arguments of the kernel these hold the addresses of."""
    made = dict(re.findall(r"cvta\.param\.u64\s+(%rd\d+), (%rd\d+);", code))
    given = dict(re.findall(r"mov\.b64\s+(%rd\d+), broad_kernel_param_(\d+);", code))
    return {int(given[made.get(register, register)]) for register in registers}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted is not compiled")
def test_broad_tiles_are_multiplied_out_of_shared_memory_that_the_copy_engine_fills():
    from kernels.broad_products import Broad, broad_kernel
    from kernels.skinny_products import TILES

    found = set()
    for kind, tiles in TILES.items():
        depth, columns, around = KINDS[kind]
        for rows, tile in tiles.items():
            if isinstance(tile, Broad):
                done = compiled(broad_kernel, tile.shared(columns), rows, depth, around)
                code = done.asm["ptx"]
                assert f"wgmma.mma_async.sync.aligned.m64n{rows}k16" in code and "mma.sync" not in code
                assert "cp.async.bulk.tensor" in code and "ld.local" not in code
                assert done.metadata.shared <= SHARED_BYTES and depth % tile.block == 0
                before, after = code.split("griddepcontrol.wait")
                early, late = (
                    set(re.findall(r"cp\.async\.bulk\.tensor\.2d.*\], \[(%rd\d+),", part)) for part in (before, after)
                )
                # No load of what the kernel before has left may stand before the wait for it: there are weights alone,
                # all of them where the depth is one block, and the rows stand behind it.
                whole = tile.shared(columns).sharers * tile.block == depth and kind != "gated"
                assert bool(early) == whole and late and not early & late
                assert ("cp.async.bulk.prefetch.L2" in before) == (not whole)
                # Rows are the first argument, the weight the one after its shape and strides.
                assert given_of(code, late) == ({0} if whole else {0, 5}) and given_of(code, early) <= {5}
                read = re.findall(r"ld\.global\S*", before)
                residual = [name for name in read if ".cg." in name]
                assert bool(residual) == bool(around.get("RESIDUAL"))
                # The rest are bias or the norm's weight: the rows' squares in fp32 are what the kernel before has left.
                assert not any("b32" in name for name in read if name not in residual)
                if tile.shared(columns).sharers > 1:
                    # The last program reads what all have left once all have come, past its processor's own cache.
                    left, counted = code.split("atom.global.gpu.acq_rel.add.u32")
                    assert "bar.sync" in left[left.rindex("st.global") :]
                    # Sums are in fp32, what they are added to is not.
                    read = re.findall(r"ld\.global\S*b32", counted)
                    assert read and all(".cg." in name for name in read)
                found.add((kind, rows))
    assert {("gated", 64), ("down", 64), ("out", 16), ("qkv", 32)} <= found


@pytest.mark.parametrize(("columns", "sharers"), [(2_048, 4), (2_560, 4), (6_144, 2), (22_016, 1), (64, 4)])
def test_no_more_programs_share_a_tile_than_a_gpu_wants(columns, sharers):
    from kernels.broad_products import Broad

    assert Broad(64, 128, 4, 4, 4).shared(columns) == Broad(64, 128, 4, 4, sharers)
