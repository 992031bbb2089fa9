"""The casts of fp8 as they are compiled for Hopper, which needs no GPU; their numbers: tests/kernels/interpreted.py."""

import os

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
# The widest rows that Holo1-3B's and 7B's products take: hidden states, and what goes into the MLP's last product.
HIDDEN, INNER = (2_048, 3_584), (11_008, 18_944)


def compiled(kernel, pointers: dict[str, str], fixed: dict[str, object], warps: int) -> str:
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
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted is not compiled")
def test_casts_of_the_widest_rows_spill_nothing_and_are_written_by_the_wide():
    from kernels import fp8

    codes = {}
    out = {"target": "*fp8e4nv", "scales": "*fp32"}
    for width in (*HIDDEN, *INNER):
        fixed = {"LARGEST": 448.0, "WIDTH": triton.next_power_of_2(width)}
        warps = fp8.warps_for(width)
        codes["cast", width] = compiled(fp8.cast_kernel, out | {"source": "*bf16"}, fixed, warps)
        if width in HIDDEN:
            normed = out | {"source": "*bf16", "weight": "*bf16", "epsilon": "fp32"}
            codes["norm", width] = compiled(fp8.norm_cast_kernel, normed, fixed, warps)
        else:
            gated = out | {"gates": "*bf16", "ups": "*bf16"}
            codes["swiglu", width] = compiled(fp8.swiglu_cast_kernel, gated, fixed, warps)
    back = dict.fromkeys(("gates", "ups", "gradients"), "*bf16") | dict.fromkeys(("inner", "products"), "*fp8e4nv")
    back |= dict.fromkeys(("inner_scales", "product_scales"), "*fp32")
    fixed = {"LARGEST": 448.0, "PRODUCTS_LARGEST": 448.0, "BLOCK": 2_048}
    codes["backward", INNER[0]] = compiled(fp8.swiglu_backward_kernel, back, fixed, 8)
    rows, columns, warps = fp8.TILE
    across = {"source": "*u8", "target": "*u8"} | dict.fromkeys(("scales", "other_scales", "most"), "*fp32")
    for scaled, twice in ((False, False), (True, False), (True, True)):
        fixed = {"KIND": fp8.NAMES[fp8.E4M3], "SCALED": scaled, "TWICE": twice, "ROWS": rows, "COLUMNS": columns}
        codes["transpose", scaled + twice] = compiled(fp8.transpose_kernel, across, fixed, warps)
    for name, code in codes.items():
        assert "ld.local" not in code and "st.local" not in code, name
        assert name == ("transpose", 0) or "cvt.rn.satfinite.e4m3x2" in code, f"{name}: by the GPU's own conversion"
