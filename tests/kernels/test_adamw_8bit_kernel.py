"""What the compiler makes of AdamW's step in 8 bits; what it computes: tests/kernels/interpreted.py."""

import re

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.parametrize("split", [False, True], ids=["fp32", "split"])
@pytest.mark.parametrize("kind", ["*bf16", "*fp32"])
def test_it_compiles_for_an_h100_and_keeps_blocks_inside_warps(kind, split):
    """Without a GPU: four numbers a thread in each access, nothing spilt, no shared memory but to store scales."""
    from kernels.adamw_8bit_kernel import ROWS, WARPS, step_kernel

    kinds = {"gradients": kind, "weights": "*i16" if split else "*fp32", "codes1": "*u8", "codes2": "*u8"}
    kinds |= {"rests": "*i16" if split else "constexpr", "count": "i32", "ROWS": "constexpr", "END": "constexpr"}
    kinds |= dict.fromkeys(("map1", "map2", "scales1", "scales2", "scale"), "*fp32")
    kinds = {name: kinds.get(name, "fp32") for name in step_kernel.arg_names}
    fixed = {"ROWS": ROWS, "END": False} | ({} if split else {"rests": None})
    even = [place for place, one in enumerate(kinds.values()) if one[0] == "*"]
    attrs = {(place,): [["tt.divisibility", 16]] for place in even}
    source = triton.compiler.ASTSource(step_kernel, kinds, constexprs=fixed, attrs=attrs)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": WARPS})
    ptx = compiled.asm["ptx"]
    accesses = re.findall(r"\b(ld|st)\.global\S*?(?:\.(v\d))?\.b(\d+)", ptx)
    wide = [access for access in accesses if access[1]]
    halves = 2  # of a block: each thread has four numbers of one and four of the other
    fp32, half = ("v4", "32"), ("v2", "32")  # 128 and 64 bits
    wanted = [("ld", *(fp32 if kind == "*fp32" else half))] * halves
    wanted += [(way, *(half if split else fp32)) for way in ("ld", "st")] * halves * (2 if split else 1)
    assert sorted(wide) == sorted(wanted)
    assert all(bits == "32" for *_, bits in accesses)  # codes, four at once, scales, and what codes stand for
    assert ".local" not in ptx and compiled.metadata.shared <= 64
