"""Masters of 32 bits, kept as 16 and 16; the kernel of the step: tests/kernels/interpreted.py."""

import pytest
import torch

from kernels import masters
from kernels.masters import Rule, Shard


def from_bits(*bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def kept(wide: torch.Tensor) -> Shard:
    """Masters as they are kept, with moments of zeros."""
    shard = Shard(wide.to(torch.bfloat16), torch.empty_like(wide, dtype=torch.int16), *torch.zeros(2, len(wide)))
    shard.weights.fill_(7)  # what was there counts for nothing
    masters.split(wide, *shard[:2])
    return shard


@pytest.mark.parametrize("chunk", [2**22, 1000])
def test_all_masters_come_back_but_ties_above_even_weights(monkeypatch, chunk):
    """Every upper half there is, with the lower halves on both sides of each edge: zeros, the smallest numbers, both
    signs, the largest finite ones, infinities and whatever is no number."""
    monkeypatch.setattr(masters, "CHUNK", chunk)
    lower = torch.tensor([0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF])
    drawn = torch.randint(0, 2**16, (4,), generator=torch.Generator().manual_seed(0))
    bits = (torch.arange(2**16)[:, None] * 2**16 + torch.cat((lower, drawn))).reshape(-1).to(torch.int32)
    wide = bits.view(torch.float32)
    weights, rests, *_ = kept(wide)
    found = masters.join(weights, rests)
    none = wide.isnan()
    ties = ((bits & 0x1FFFF) == 0x8000) & ~none
    assert torch.equal(weights[~none], wide[~none].to(torch.bfloat16)) and weights[none].isnan().all()
    assert torch.equal(found.view(torch.int32)[~none & ~ties], bits[~none & ~ties])
    assert torch.equal(found.view(torch.int32)[ties], bits[ties] - 1) and found[none].isnan().all()
    assert found.isinf().sum() == wide.isinf().sum() == 2
    assert 0 < ties.sum() < len(bits) / 20 and none.sum() > 1000
    again = kept(found)  # once more changes nothing
    assert torch.equal(again.weights[~none], weights[~none]) and torch.equal(again.rests, rests)


def test_a_weight_alone_is_a_master_without_a_rest():
    weights = torch.randn(1000).to(torch.bfloat16)
    shard = kept(weights.float())
    assert torch.equal(shard.weights, weights) and not shard.rests.any()
    assert kept(from_bits(0x00000001, 0x80000001)).rests.tolist() == [1, 1]


@pytest.mark.parametrize("chunk", [2**22, 700])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fifty_steps_are_those_of_torchs_adamw(monkeypatch, chunk, kind, decay):
    """In fp32, with bf16 copies; masters within some units of their last place or of an update's."""
    monkeypatch.setattr(masters, "CHUNK", chunk)
    draw = torch.Generator().manual_seed(1)
    start = torch.randn(2048, generator=draw) * 10.0 ** torch.linspace(-6, 1, 2048)
    shard, rule = kept(start), Rule(1e-3, (0.9, 0.999), 1e-8, decay)
    plain = torch.nn.Parameter(masters.join(*shard[:2]))
    optimizer = torch.optim.AdamW([plain], lr=1e-3, weight_decay=decay, fused=True)
    scale = torch.tensor(0.37)
    for number in range(1, 51):
        gradients = (torch.randn(2048, generator=draw) * 10.0 ** torch.linspace(1, -6, 2048)).to(kind)
        plain.grad = gradients.float() * scale
        optimizer.step()
        masters.step_by_torch(gradients, shard, rule, scale, torch.tensor(float(number)))
    found, wanted = masters.join(*shard[:2]), plain.detach()
    state = optimizer.state[plain]
    assert torch.allclose(shard.first, state["exp_avg"], rtol=1e-5, atol=1e-12)
    assert torch.allclose(shard.second, state["exp_avg_sq"], rtol=1e-5, atol=1e-20)
    error = (found - wanted).abs()
    assert (error <= 50 * 2.0**-23 * wanted.abs() + 50 * 1e-3 * 1e-6).all()
    unit = (shard.weights.view(torch.int16).int() - wanted.to(torch.bfloat16).view(torch.int16).int()).abs()
    assert unit.max() <= 1 and unit.float().mean() < 0.005
    assert (wanted - start).abs().min() > 1e-5 * rule.lr


def test_what_is_no_number_stays_none():
    shard = kept(torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0, 1.0]))
    gradients = torch.tensor([0.0, 0.0, 1.0, torch.nan, 1.0])
    masters.step_by_torch(gradients, shard, Rule(1e-3, (0.9, 0.999), 1e-8, 0.0), torch.ones(()), torch.ones(()))
    assert shard.weights.isfinite().tolist() == [False, False, False, False, True]
    assert masters.join(*shard[:2]).isfinite().tolist() == [False, False, False, False, True]


@pytest.mark.parametrize("kind", ["*bf16", "*fp32"])
def test_the_kernel_compiles_for_an_h100_and_reads_16_bytes_at_once(kind):
    """Without a GPU; what it computes: tests/kernels/interpreted.py."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from kernels.adamw_kernel import BLOCK, adamw_kernel

    kinds = [kind, "*i16", "*i16", "*fp32", "*fp32", "*fp32", "i32", *["fp32"] * 7, "constexpr"]
    even = {(place,): [["tt.divisibility", 16]] for place in range(7)}
    names = dict(zip(adamw_kernel.arg_names, kinds, strict=True))
    source = triton.compiler.ASTSource(adamw_kernel, names, constexprs={"BLOCK": BLOCK}, attrs=even)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": 4}).asm["ptx"]
    loads = [
        line.split()[1 if line.lstrip().startswith("@") else 0] for line in ptx.splitlines() if "ld.global" in line
    ]
    single = [load for load in loads if "v4" not in load]
    assert len(single) == 3, loads  # of the scalars
    assert "fma.rn.f32" in ptx and "div.rn.f32" in ptx and "sqrt.rn.f32" in ptx and ".ftz" not in ptx
