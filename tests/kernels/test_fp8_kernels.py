"""The casts of fp8 as they are compiled for Hopper, which needs no GPU; their numbers: tests/kernels/interpreted.py."""

import os
import re

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
# The widest rows that Holo1-3B's and 7B's products take: hidden states, and what goes into the MLP's last product.
HIDDEN, INNER = (2_048, 3_584), (11_008, 18_944)
TOGETHER = (2_560, 4_608)  # gradients of query, key and value, side by side


def compiled(kernel, pointers: dict[str, str], fixed: dict[str, object], warps: int) -> dict:
    """The kernel for compute capability 9.0, its arguments aligned as torch's tensors are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    kinds = {name: "constexpr" if name in fixed else pointers.get(name, "i32") for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if kinds[name].startswith("*") or name in ("width", "stride", "columns", "padded")
    }
    source = ASTSource(kernel, kinds, {(names.index(name),): value for name, value in fixed.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted is not compiled")
def test_casts_of_the_widest_rows_spill_nothing_and_are_written_by_the_wide():
    """Local memory is as slow as any other; `sass` has all of it, the code between has none of what ptxas spills."""
    from kernels import fp8

    codes = {}
    out = {"target": "*fp8e4nv", "scales": "*fp32"}
    for width in (*HIDDEN, *TOGETHER, *INNER):
        fixed = {"LARGEST": 448.0, "WIDTH": triton.next_power_of_2(width)}
        warps = fp8.warps_for(width)
        codes["cast", width] = compiled(fp8.cast_kernel, out | {"source": "*bf16"}, fixed, warps)
        if width in HIDDEN:
            normed = out | {"source": "*bf16", "weight": "*bf16", "epsilon": "fp32"}
            codes["norm", width] = compiled(fp8.norm_cast_kernel, normed, fixed, warps)
        if width in INNER:
            gated = out | {"gates": "*bf16", "ups": "*bf16"}
            codes["swiglu", width] = compiled(fp8.swiglu_cast_kernel, gated, fixed, warps)
    back = dict.fromkeys(("gates", "ups", "gradients"), "*bf16") | dict.fromkeys(("inner", "products"), "*fp8e4nv")
    back |= dict.fromkeys(("inner_scales", "product_scales"), "*fp32")
    block, warps = fp8.PIECE
    fixed = {"LARGEST": 448.0, "PRODUCTS_LARGEST": 448.0, "BLOCK": block}
    codes["backward", INNER[0]] = compiled(fp8.swiglu_backward_kernel, back, fixed, warps)
    rows, columns, warps = fp8.TILE
    for scaled, twice in ((False, False), (True, False), (True, True)):
        # What is not asked for is the source again.
        given = {"scales": scaled, "other_scales": twice, "most": scaled}
        across = {"source": "*u8", "target": "*u8"} | {name: "*fp32" if is_ else "*u8" for name, is_ in given.items()}
        fixed = {"KIND": fp8.NAMES[fp8.E4M3], "SCALED": scaled, "TWICE": twice, "ROWS": rows, "COLUMNS": columns}
        codes["transpose", scaled + twice] = compiled(fp8.transpose_kernel, across, fixed, warps)
    for name, code in codes.items():
        assert re.search(r"\bLDG\b", code["sass"]) and not re.search(r"\b(STL|LDL)\b", code["sass"]), name
        told = "cvt.rn.satfinite.e4m3x2" in code["ptx"]
        assert told == (name != ("transpose", 0)), f"{name}: by the GPU's own conversion"
        # The casts' scales come from bits: a GPU's division is off by one at times. 16 bytes at once.
        assert name[0] in ("transpose", "swiglu", "backward", "norm") or "div" not in code["ptx"], name
        assert {"ld.global.v4.b32"} <= {*re.findall(r"ld\.global\S*", code["ptx"])}, name


def test_the_gradients_of_gate_and_up_find_their_rows_in_the_cache_again():
    """Three rows of 3B's width in half precision for each that 132 multiprocessors of 2,048 threads may have under way,
    in an H100's 50 MB, which hold what is written meanwhile, too."""
    from kernels import fp8

    under_way = 132 * (2_048 // (32 * fp8.PIECE[1]))
    assert under_way * 3 * 2 * INNER[0] < 40e6
