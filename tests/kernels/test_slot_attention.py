"""Attention over slots as it is compiled for Hopper, which needs no GPU; its numbers: tests/kernels/interpreted.py."""

import os
import re

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
HALVES = ("qkv", "cos", "sin", "keys", "values", "target", "query_norm", "key_norm")
HOLO1 = {"HEADS": 16, "FEWER": 2, "NEW": 1, "WIDTH": 128, "TURNS": 128, "NORMED": False, "GATED": False}
QWEN3_5 = HOLO1 | {"HEADS": 8, "WIDTH": 256, "TURNS": 64, "NORMED": True, "GATED": True}


def compiled(parts: int, model: dict):
    """The kernel for compute capability 9.0, as attend_in_parts launches it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels import slot_attention as room

    kernel, width = room.attend_kernel, model["WIDTH"]
    block, warps, stages = room.shape_of(parts, width)
    queries = model["NEW"] * model["HEADS"] // model["FEWER"]
    fixed = model | {"PARTS": parts, "BLOCK": block, "EARLY": True}
    fixed |= {
        "ROWS": max(16, triton.next_power_of_2(queries)),
        "NEW_ROWS": max(16, triton.next_power_of_2(model["NEW"])),
    }
    kinds = dict.fromkeys(HALVES, "*bf16") | {"places": "*i64", "capacity": "i32"}
    kinds |= dict.fromkeys(("sums", "tops", "partial"), "*fp32") | dict.fromkeys(("scale", "epsilon"), "fp32")
    names = kernel.arg_names
    signature = {name: kinds.get(name, "constexpr") for name in names}
    given = {(names.index(name),): value for name, value in fixed.items()}
    whole = {(names.index(name),): [["tt.divisibility", 16]] for name in kinds if name not in ("scale", "epsilon")}
    options = {"num_warps": warps, "num_stages": stages, "launch_pdl": True}
    return triton.compile(ASTSource(kernel, signature, given, whole), target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted is not compiled")
@pytest.mark.parametrize(
    ("parts", "model"), [(8, HOLO1), (8, HOLO1 | {"NEW": 2}), (32, HOLO1), (2, HOLO1), (1, HOLO1), (8, QWEN3_5)]
)
def test_nothing_of_a_program_lies_outside_of_its_registers(parts, model):
    """Local memory is as slow as any other; `sass` has all of it, the code between has none of what ptxas spills."""
    code = compiled(parts, model).asm["sass"]
    assert re.search(r"\bLDG\b", code) and not re.search(r"\b(STL|LDL)\b", code)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted is not compiled")
@pytest.mark.parametrize(("parts", "model"), [(1, HOLO1), (8, HOLO1), (8, HOLO1 | {"NEW": 2}), (8, QWEN3_5)])
def test_old_keys_are_on_their_way_before_the_kernel_before_has_ended_and_nothing_else_is(parts, model):
    """They are what nobody writes; queries and new keys are what that kernel leaves."""
    before, *after = compiled(parts, model).asm["ptx"].split("griddepcontrol.wait")
    assert "cp.async.cg.shared.global" in before and "ld.global" in after[0]
    # Of what is read into registers the place alone.
    assert len(re.findall(r"ld\.global", before)) == 1 and "st.global" not in before
