"""Attention over slots as it is compiled for Hopper, which needs no GPU; its numbers: tests/kernels/interpreted.py."""

import os
import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
not_interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted is not compiled"
)
HALVES = ("qkv", "cos", "sin", "keys", "values", "target", "query_norm", "key_norm", "first", "second", "third")
NOTHING = (0, 0, 128, False)  # that is asked for ahead
HOLO1 = {"HEADS": 16, "FEWER": 2, "NEW": 1, "WIDTH": 128, "TURNS": 128, "NORMED": False, "GATED": False}
QWEN3_5 = HOLO1 | {"HEADS": 8, "WIDTH": 256, "TURNS": 64, "NORMED": True, "GATED": True}


def compiled(parts: int, joins: bool, ahead: tuple = NOTHING, soon: bool = False, model: dict = HOLO1):
    """The kernel for compute capability 9.0, as attend_in_parts launches it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels import slot_attention as room

    kernel, width = room.attend_kernel, model["WIDTH"]
    block, warps, stages = room.SHAPES[parts > 1 or width > 128]
    queries = model["NEW"] * model["HEADS"] // model["FEWER"]
    fixed = model | {"PARTS": parts, "JOINS": joins, "AHEAD": ahead, "SOON": soon, "BLOCK": block, "EARLY": True}
    fixed |= {"ROWS": max(16, triton.next_power_of_2(queries)), "NEW_ROWS": triton.next_power_of_2(model["NEW"])}
    kinds = dict.fromkeys(HALVES, "*bf16") | {"places": "*i64", "arrived": "*i32", "capacity": "i32"}
    kinds |= dict.fromkeys(("sums", "tops", "partial"), "*fp32") | dict.fromkeys(("scale", "epsilon"), "fp32")
    names = kernel.arg_names
    signature = {name: kinds.get(name, "constexpr") for name in names}
    given = {(names.index(name),): value for name, value in fixed.items()}
    whole = {(names.index(name),): [["tt.divisibility", 16]] for name in kinds if name not in ("scale", "epsilon")}
    options = {"num_warps": warps, "num_stages": stages if width < 256 else 2, "launch_pdl": True}
    return triton.compile(ASTSource(kernel, signature, given, whole), target=GPUTarget("cuda", 90, 32), options=options)


@not_interpreted
@pytest.mark.parametrize(
    ("parts", "joins", "ahead", "model"),
    [
        (8, True, (65_536, 32_768, 128, False), HOLO1),
        (8, True, (65_536, 0, 128, True), HOLO1 | {"NEW": 2}),
        (32, True, (65_536, 0, 64, False), HOLO1),
        (2, False, NOTHING, HOLO1),
        (8, True, (65_536, 0, 128, False), QWEN3_5),
    ],
)
def test_nothing_of_a_program_lies_outside_of_its_registers(parts, joins, ahead, model):
    """Local memory is as slow as any other; `sass` has all of it, the code between has none of what ptxas spills."""
    code = compiled(parts, joins, ahead, model=model).asm["sass"]
    assert re.search(r"\bLDG\b", code) and not re.search(r"\b(STL|LDL)\b", code)


@not_interpreted
def test_what_the_others_have_left_is_read_once_all_have_come():
    code = compiled(8, True).asm["ptx"]
    left, counted = code.split("atom.global.gpu.acq_rel.add.u32")
    assert left.index("griddepcontrol.wait") < left.rindex("bar.sync") and "ld.global.cg" not in left
    read = re.findall(r"ld\.global\S*", counted)
    assert len(read) >= 3 * 8 and {*read} <= {"ld.global.cg.b32", "ld.global.cg.v4.b32"}
    assert "atom.global" not in compiled(8, False).asm["ptx"]


@not_interpreted
@pytest.mark.parametrize("soon", [False, True])
@pytest.mark.parametrize("bulk", [False, True])
def test_weights_are_asked_for_before_or_behind_the_wait_line_by_line_or_in_bulk(soon, bulk):
    """Of Holo1's 65,536 lines of the next weight each of 128 programs asks for 512, four of each of its threads."""
    name = "cp.async.bulk.prefetch.L2.global" if bulk else "prefetch.global.L2"
    plain, code = (compiled(8, True, ahead, soon).asm["ptx"] for ahead in (NOTHING, (65_536, 0, 128, bulk)))
    before, behind = (
        [part.count(name) for part in text.split("griddepcontrol.wait")] for text in (plain, code)
    )  # what is in the cache is asked for, too
    asked = [two - one for one, two in zip(before, behind)]
    assert asked == [1 if bulk else 4, 0][:: 1 if soon else -1]


def test_no_more_is_asked_for_than_a_weight_has_and_nothing_among_many_slots(monkeypatch):
    from kernels import slot_attention as room

    first, second = torch.empty(64, 100).bfloat16(), torch.empty(2 * 32, 128).bfloat16()  # 100 and 128 lines
    monkeypatch.setattr(room, "AHEAD", {8: room.Ahead(2**24, 2**24), 16: room.Ahead(50 * 128, 70 * 128), 32: None})
    kind = torch.bfloat16
    assert room.lines_ahead((first, second), 8, kind) == (100, 64)
    assert room.lines_ahead((first, second), 9, kind) == (50, 35)
    assert room.lines_ahead((first,), 1, kind) == (100, 0) and room.lines_ahead((), 1, kind) == (0, 0)
    assert room.lines_ahead((first, second), 17, kind) == room.lines_ahead((first, second), 65, kind) == (0, 0)
    assert room.lines_ahead((first.float(),), 8, kind) == room.lines_ahead((first.T,), 8, kind) == (0, 0)
    between = torch.empty(64 * 100 + 1).bfloat16()[1:].view(64, 100)  # the copy engine takes multiples of 16 bytes
    assert room.lines_ahead((between,), 8, kind) == (0, 0)
    gate, up = room.halves(second)
    assert gate.data_ptr() == second.data_ptr() and up.data_ptr() == second[32].data_ptr()
