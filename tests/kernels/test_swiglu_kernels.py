"""What Triton makes of the kernels for an H100, which needs none of them here: that they are right is shown by
interpreted.py, and how fast they are by a GPU alone; but what costs most can be read."""

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from kernels import swiglu_kernels


@pytest.mark.parametrize("kernel", [swiglu_kernels.swiglu_kernel, swiglu_kernels.swiglu_backward_kernel], ids=str)
def test_a_thread_reads_and_writes_many_numbers_at_once(kernel):
    names = kernel.arg_names
    signature = dict.fromkeys(names, "*bf16") | {"count": "i32", "BLOCK": "constexpr"}
    # As it is launched: addresses are multiples of 16 bytes, and the count of MULTIPLE, unless it is not to be known.
    known = [number for number, name in enumerate(names) if signature[name] != "constexpr"]
    known = [number for number in known if names[number] not in [p.name for p in kernel.params if p.do_not_specialize]]
    attributes = {(number,): [["tt.divisibility", 16]] for number in known}
    source = ASTSource(kernel, signature, {"BLOCK": swiglu_kernels.BLOCK}, attributes)
    ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    assert swiglu_kernels.MULTIPLE % 16 == 0
    moved = set(re.findall(r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v\d)?\.[bfsu]\d+", ptx))
    assert moved and all(".v4.b32" in way for way in moved), moved
