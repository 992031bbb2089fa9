"""Kernels of a step and of windows: on a GPU as they are, elsewhere by Triton's own interpreter, no mock, but slow."""

import importlib
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.bfloat16, torch.float16]
# Triton's interpreter multiplies the bits of bf16 matrices as whole numbers (3.8).
MULTIPLIED = HALF if DEVICE == "cuda" else [torch.float16]


@pytest.fixture
def kernels(monkeypatch):
    """A function that gives a room of kernels/, interpreted where there is no GPU."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when a kernel is declared
    names = []

    def load(name):
        monkeypatch.delitem(sys.modules, f"kernels.{name}", raising=False)
        names.append(f"kernels.{name}")
        return importlib.import_module(f"kernels.{name}")

    yield load
    for name in names:
        sys.modules.pop(name, None)


def close(found, wanted, kind):
    """Within the rounding of `kind`, of what was computed in fp32."""
    epsilon = torch.finfo(kind).eps
    assert found.dtype == kind and found.shape == wanted.shape
    assert (found.float() - wanted.float()).abs().max() <= 4 * epsilon * wanted.float().abs().max()


@pytest.mark.parametrize("kind", HALF, ids=str)
def test_rows_are_normed_and_gated_as_by_torch(kernels, kind):
    rows = kernels("row_kernels")
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 80, device=DEVICE).to(kind) * 3, torch.randn(80, device=DEVICE).to(kind)
    close(rows.rms_norm(hidden, weight, 1e-6), rows.rms_norm(hidden.float(), weight.float(), 1e-6), kind)
    kept = weight.float()  # as of norms whose weight is kept less one
    close(rows.rms_norm(hidden, kept, 1e-6), rows.rms_norm(hidden.float(), kept, 1e-6), kind)
    both = torch.randn(5, 2 * 72, device=DEVICE).to(kind)
    close(rows.swiglu(both), rows.swiglu(both.float()), kind)
    assert all(rows.proved("norm", 80, kind, hidden.device, weights) for weights in (kind, torch.float32))
    assert rows.proved("swiglu", 144, kind, hidden.device)


@pytest.mark.parametrize("kind", HALF, ids=str)
def test_norms_of_many_rows_have_the_gradients_of_autograd(kernels, monkeypatch, kind):
    norms = kernels("norm_kernels")
    monkeypatch.setattr(norms, "PROGRAMS", 3)  # some of which take two rows of these seven, others three
    torch.manual_seed(0)
    hidden, gradient, residual = (torch.randn(3, 7, 80, device=DEVICE).to(kind) * 3).unbind()
    weight = torch.randn(80, device=DEVICE).to(kind)
    rows, scale = hidden.float().requires_grad_(), weight.float().requires_grad_()
    wanted = torch.nn.functional.rms_norm(rows, (80,), scale, 1e-6)
    for_rows, for_scale = torch.autograd.grad(wanted, (rows, scale), gradient.float())
    assert not norms.takes(hidden, weight)  # gradients would be lost
    with torch.no_grad():
        assert norms.takes(hidden, weight) and not norms.takes(hidden.float(), weight)
        close(norms.rms_norm(hidden, weight, 1e-6), wanted, kind)
        for past in (residual, residual.new_zeros(())):
            outer, inner = norms.rms_norm_backward(hidden, weight, 1e-6, gradient, past)
            close(outer, for_rows + past.float(), kind)
            close(inner, for_scale, kind)


def test_norms_may_be_proved_inside_a_checkpointed_layer(kernels):
    norms = kernels("norm_kernels")

    class Normed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight):
            ctx.save_for_backward(hidden)
            assert norms.takes(hidden, weight)
            return norms.rms_norm(hidden, weight, 1e-6)

        @staticmethod
        def backward(ctx, gradient):
            return gradient + 0 * ctx.saved_tensors[0], None

    hidden, weight = torch.randn(5, 80, device=DEVICE).half(), torch.ones(80, device=DEVICE).half()
    done = torch.utils.checkpoint.checkpoint(Normed.apply, hidden.requires_grad_(), weight, use_reentrant=False)
    done.sum().backward()
    assert hidden.grad.all()
    norms.proved.cache_clear()
    with torch.inference_mode():
        assert norms.takes(hidden, weight)


@pytest.mark.parametrize("kind", HALF, ids=str)
def test_a_step_begins_with_the_rows_of_its_tokens_and_places(kernels, monkeypatch, kind):
    rows = kernels("row_kernels")
    torch.manual_seed(1)
    table, (cos, sin) = torch.randn(11, 80, device=DEVICE).to(kind), torch.randn(2, 7, 24, device=DEVICE).to(kind)
    tokens, places = torch.tensor([10, 3, 3], device=DEVICE), torch.tensor([6, 0, 5], device=DEVICE)
    found, real = rows.embed(tokens, places, table, cos, sin), rows.embed_by_kernel
    assert torch.equal(found[0], table[tokens])
    assert torch.allclose(found[1][:, 0], table[tokens].float().square().sum(-1))
    assert torch.equal(found[2], cos[places]) and torch.equal(found[3], sin[places])
    assert rows.embed_proved(80, 24, kind, kind, table.device)
    # Squares of one token alone: the first norm of every step would be wrong, and nobody would be told.
    monkeypatch.setattr(rows, "embed_by_kernel", lambda *given: [part[:1].expand_as(part) for part in real(*given)])
    rows.embed_proved.cache_clear()
    with pytest.warns(UserWarning, match="the kernel of embedding, launched plain, differs by"):
        again = rows.embed(tokens, places, table, cos, sin)
    assert all(torch.equal(one, other) for one, other in zip(found[::2], again[::2]))


def test_a_wrong_norm_is_not_used_and_that_is_said(kernels, monkeypatch):
    rows = kernels("row_kernels")
    hidden, weight = torch.randn(5, 80, device=DEVICE).half(), torch.randn(80, device=DEVICE).half()
    wanted, real = rows.rms_norm(hidden, weight, 1e-6), rows.norm_by_kernel
    monkeypatch.setattr(rows, "norm_by_kernel", lambda *given: 1.1 * real(*given))
    rows.proved.cache_clear()
    with pytest.warns(UserWarning, match="the kernel of norm, launched plain, differs by 0.1"):
        close(rows.rms_norm(hidden, weight, 1e-6), wanted, torch.float16)


@pytest.mark.parametrize("kind", MULTIPLIED, ids=str)
@pytest.mark.parametrize("count", [1, 5, 16])
def test_products_of_few_rows_equal_torchs(kernels, count, kind):
    skinny = kernels("skinny_products")
    torch.manual_seed(1)

    def draw(*shape):
        return (torch.randn(*shape, device=DEVICE) / 8).to(kind)

    hidden, inner, norm = draw(count, 512) * 8, draw(count, 256), (draw(512) * 8, 1e-6)
    wide = skinny.Rows(hidden.float())
    wide_norm = norm[0].float(), norm[1]
    weight, bias, gated, down = draw(96, 512), draw(96), draw(2 * 64, 512), draw(512, 256)
    rows = skinny.Rows(hidden, hidden.float().pow(2).view(count, 4, -1).sum(-1))
    assert all(skinny.tile_of(name, hidden, 512)[0] for name in skinny.TILES), "no kernel was tried"
    close(
        skinny.normed_product("qkv", rows, norm, weight, bias),
        skinny.normed_product("qkv", wide, wide_norm, weight.float(), bias.float()),
        kind,
    )
    close(
        skinny.normed_product("head", skinny.Rows(hidden), norm, weight),
        skinny.normed_product("head", wide, wide_norm, weight.float()),
        kind,
    )
    close(
        skinny.gated_product("gated", rows, norm, gated),
        skinny.gated_product("gated", wide, wide_norm, gated.float()),
        kind,
    )
    close(
        skinny.normed_product("qkv", rows, wide_norm, weight, bias),
        skinny.normed_product("qkv", wide, wide_norm, weight.float(), bias.float()),
        kind,
    )
    added = skinny.add_product("down", rows, inner, down)
    close(added.hidden, skinny.add_product("down", wide, inner.float(), down.float()).hidden, kind)
    assert torch.allclose(added.sums().sum(-1), added.hidden.float().pow(2).sum(-1), rtol=1e-5)
    assert added.squares.shape == (count, 512 // skinny.TILES["down"][8][0])


def test_a_row_comes_out_the_same_whatever_stands_beside_it(kernels):
    skinny = kernels("skinny_products")
    torch.manual_seed(2)
    hidden, weight = torch.randn(8, 256, device=DEVICE).half(), torch.randn(64, 256, device=DEVICE).half()
    norm, squares = (torch.ones(256, device=DEVICE).half(), 1e-6), hidden.float().square().sum(-1, keepdim=True)
    whole = skinny.normed_product("qkv", skinny.Rows(hidden, squares), norm, weight)
    alone = skinny.Rows(hidden[3:4], squares[3:4])
    assert torch.equal(whole[3:4], skinny.normed_product("qkv", alone, norm, weight))


def test_a_kernel_that_is_wrong_or_fails_is_not_used_and_that_is_said(kernels, monkeypatch):
    skinny, room = kernels("skinny_products"), kernels("slot_attention")
    hidden = torch.randn(4, 256, device=DEVICE).half()
    assert skinny.tile_of("down", hidden, 64)[1] != skinny.NEVER
    real = skinny.launch

    def wrong(*arguments, **options):
        done, left = real(*arguments, **options)
        return done + 0.05 * done.abs().max(), left

    monkeypatch.setattr(skinny, "launch", wrong)
    skinny.way_of.cache_clear()
    with pytest.warns(UserWarning, match=r"the kernel of products \(down\), launched plain, differs by"):
        assert skinny.tile_of("down", hidden, 64) == (None, skinny.NEVER)
    real_attention = room.attend_in_parts

    def forgets_a_key(qkv, cos, sin, keys, *rest, **options):
        before = keys[0, 0].clone()
        done = real_attention(qkv, cos, sin, keys, *rest, **options)
        keys[0, 0] = before
        return done

    shapes = (2, 4, 2, 32, 1, 32, None, False, torch.float16, hidden.device)
    monkeypatch.setattr(room, "PROOF_PLACES", 192)
    monkeypatch.setattr(room, "MOST_PARTS", 4)
    assert room.way_of(*shapes)
    room.way_of.cache_clear()
    monkeypatch.setattr(room, "attend_in_parts", forgets_a_key)
    with pytest.warns(UserWarning, match="the kernel of attention over slots, launched plain, differs by"):
        assert not room.way_of(*shapes)
    room.way_of.cache_clear()
    monkeypatch.setattr(room, "attend_in_parts", lambda *unused, **options: 1 / 0)
    with pytest.warns(UserWarning, match="fails: division by zero"):
        assert not room.way_of(*shapes)


@pytest.mark.parametrize(("turns", "norm", "gated"), [(32, "half", False), (8, "whole", True), (16, None, True)])
def test_heads_that_are_normed_gated_and_turned_in_part_equal_torchs(kernels, monkeypatch, turns, norm, gated):
    room = kernels("slot_attention")
    monkeypatch.setattr(room, "PROOF_PLACES", 96)
    monkeypatch.setattr(room, "MOST_PARTS", 2)
    torch.manual_seed(4)
    slots, heads, fewer, width, new, kind = 2, 4, 2, 32, 3, torch.float16
    places = torch.tensor([0, 70], device=DEVICE)
    qkv = torch.randn(slots * new, (heads * (1 + gated) + 2 * fewer) * width, device=DEVICE).to(kind)
    angles = torch.randn(slots * new, turns // 2, device=DEVICE)
    cos, sin = (torch.cat((part, part), -1).to(kind) for part in (angles.cos(), angles.sin()))
    norms = norm and tuple(torch.randn(2, width, device=DEVICE).to(kind if norm == "half" else torch.float32))
    keys, values = torch.randn(2, slots, fewer, 96, width, device=DEVICE).to(kind)
    wanted_cache = [part.float() for part in (keys, values)]
    options = {"places": places, "heads": heads, "scale": width**-0.5}
    wide = room.Extras(norms and tuple(part.float() for part in norms), 1e-6, gated)
    wanted = room.attend_plain(qkv.float(), cos.float(), sin.float(), *wanted_cache, **options, extras=wide)
    found = room.attend_slots(qkv, cos, sin, keys, values, **options, extras=room.Extras(norms, 1e-6, gated))
    assert room.way_of.cache_info().currsize == 1
    close(found, wanted, kind)
    for cache, want in zip((keys, values), wanted_cache):
        close(cache, want, kind)


@pytest.mark.parametrize("kind", HALF, ids=str)
def test_steps_of_the_delta_rule_equal_torchs(kernels, kind):
    """Four in a row, from the first token on: the convolution goes round. A slot that stands still keeps all."""
    room = kernels("delta_step")
    torch.manual_seed(5)
    slots, heads, fewer, key, value, taps = 3, 4, 2, 16, 32, 4
    mixed = 2 * fewer * key + heads * value

    def draw(*shape):
        return torch.randn(*shape, device=DEVICE)

    mixing = room.Mixing(draw(mixed, taps).to(kind), draw(heads), draw(heads), draw(value).to(kind), 1e-6, heads, fewer)
    wide = room.Mixing(*(part.float() for part in mixing[:4]), *mixing[4:])
    recent, states = torch.zeros(slots, taps, mixed, device=DEVICE).to(kind), torch.zeros(slots, heads, key, value)
    states = states.to(DEVICE)
    mine = recent.float(), states.clone()
    places, live = torch.tensor([[0, 5, 9], [1, 0, 1]], device=DEVICE)
    for number in range(4):
        token = draw(slots, mixed + heads * value + 2 * heads).to(kind)
        wanted = room.step_plain(token.float(), wide, *mine, places + number, live)
        found = room.delta_step(token, mixing, recent, states, places + number, live)
        close(found, wanted, kind)
        assert torch.equal(recent.float(), mine[0])
        assert (states - mine[1]).norm() < 4 * torch.finfo(kind).eps * mine[1].norm()
    assert room.way_of.cache_info().currsize == 1 and not states[1].any() and not recent[1].any()


@pytest.mark.parametrize("kind", MULTIPLIED, ids=str)
@pytest.mark.parametrize(("heads", "fewer", "new"), [(16, 2, 1), (4, 2, 8), (3, 1, 4), (2, 2, 1)])
@pytest.mark.parametrize("parts", [1, 3, None])
def test_attention_over_slots_equals_torchs(kernels, heads, fewer, new, parts, kind):
    """Lengths from nothing to more than a block, and what stood in the cache before stays but for the new places."""
    room = kernels("slot_attention")
    torch.manual_seed(3)
    width, slots, capacity = 32, 3, 160
    places = torch.tensor([0, 61, 140], device=DEVICE)
    qkv = torch.randn(slots * new, (heads + 2 * fewer) * width, device=DEVICE).to(kind)
    angles = torch.randn(slots * new, width // 2, device=DEVICE)
    cos, sin = (torch.cat((part, part), -1).to(kind) for part in (angles.cos(), angles.sin()))
    keys, values = torch.randn(2, slots, fewer, capacity, width, device=DEVICE).to(kind)
    before = keys.clone(), values.clone()
    wanted_cache = [part.float() for part in (keys, values)]
    options = {"places": places, "heads": heads, "scale": width**-0.5}
    wanted = room.attend_plain(qkv.float(), cos.float(), sin.float(), *wanted_cache, **options)
    found = room.attend_in_parts(qkv, cos, sin, keys, values, **options, parts=parts)
    close(found, wanted, kind)
    for cache, old, want in zip((keys, values), before, wanted_cache):
        close(cache, want, kind)
        for slot, place in enumerate(places.tolist()):
            assert torch.equal(cache[slot, :, :place], old[slot, :, :place])
            assert torch.equal(cache[slot, :, place + new :], old[slot, :, place + new :])


@pytest.mark.parametrize("name", ["E4M3", "E5M2"])
def test_rows_are_cast_and_transposed_to_fp8_as_by_torch(kernels, monkeypatch, name):
    """Rows of any size, of zeros, and apart in memory; a number of them that is no multiple of 16."""
    room = kernels("fp8")
    torch.manual_seed(6)
    kind, sizes = getattr(room, name), 2.0 ** torch.arange(-18, 19, device=DEVICE)[:, None]
    # Of numbers that fp8 has: the interpreter rounds others otherwise, at times to half of them (3.8).
    rows = (torch.randn(37, 96, device=DEVICE).to(kind).float() * sizes).bfloat16()
    rows[5] = 0
    gate, up, outer = torch.randn(3, 37, 48, device=DEVICE).half()

    def made():
        both = room.swiglu_backward_cast(gate, up, outer, kind)
        normed = room.norm_cast(gate, up[0], 1e-6, kind)
        return room.cast(rows[:, 16:], kind), room.swiglu_cast(gate, up, kind), *both, normed

    found = made()
    scales = found[1].scales, found[3].scales
    most = (scales[0] * scales[1]).amax()
    across = room.transposed(found[1].values), room.transposed(found[1].values, scales, most)
    monkeypatch.setattr(room, "on_triton", lambda states: False)
    for one, other in zip(found, wanted := made()):
        assert one.values.dtype == other.values.dtype and torch.equal(one.scales, other.scales)
        assert (one.dequantised() - other.dequantised()).norm() < 0.2 * other.dequantised().norm()
    assert torch.equal(found[0].values.float(), wanted[0].values.float())
    assert torch.equal(found[0].dequantised(), rows[:, 16:].float())
    assert torch.equal(across[0].float(), room.transposed(found[1].values).float())
    assert across[0].shape == (48, 48) and not across[0][:, 37:].float().any()
    # Moved by powers of two, numbers are rounded only where they become the smallest that fp8 has.
    apart = across[1].float() - room.transposed(found[1].values, scales, most).float()
    assert apart.abs().max() <= torch.finfo(kind).tiny * torch.finfo(kind).eps


@pytest.mark.parametrize("kind", MULTIPLIED, ids=str)
@pytest.mark.parametrize("width", [80, 24])
def test_windows_equal_segments_by_torch(kernels, width, kind):
    """Gradients too; keys and values of strides of their own, windows cut off by the picture's edge, a fifth of a row
    that is nobody's."""
    room, attention = kernels("window_attention"), kernels("attention")
    torch.manual_seed(6)
    lengths = [64, 1, 33, 16]
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    together = torch.randn(sum(lengths), 5, 2, width, device=DEVICE).to(kind)
    query, key, value, outer, _ = together.unbind(1)
    given = [query.clone(), key, value.transpose(0, 1).contiguous().transpose(0, 1)]
    found, wanted = ([part.to(form).detach().requires_grad_() for part in given] for form in (kind, torch.float32))
    assert found[1].stride(0) == 5 * 2 * width and found[2].stride(1) > width
    done = room.see(*found, bounds, 64, width**-0.5)
    right = attention.segment_by_segment(*wanted, bounds, 64, width**-0.5, False)
    close(done, right, kind)
    rest = torch.autograd.grad(done, found, outer), torch.autograd.grad(right, wanted, outer.float())
    for one, other in zip(*rest):
        close(one, other, kind)
    with pytest.raises(ValueError, match="a window of 65 places is longer than the 64"):
        room.see(*found, bounds, 65, 1.0)
    assert attention.WINDOW == room.LONGEST


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
def test_adamws_step_on_split_masters_is_torchs(kernels, monkeypatch, kind):
    """Three steps of a length that is no multiple of a block; on a GPU to the bit those of torch's fused AdamW."""
    room = kernels("adamw_kernel")
    masters = sys.modules["kernels.masters"]
    draw = torch.Generator(DEVICE).manual_seed(7)
    wide = torch.randn(2_500, generator=draw, device=DEVICE) * 10.0 ** torch.linspace(-6, 1, 2_500, device=DEVICE)
    # Both zeros, the smallest numbers, ties, the largest one, which has no finite weight.
    odd = [0, -(2**31), 1, -(2**31) + 1, 0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F7FFFFF, -(2**31) + 0x3F808000]
    wide[: len(odd)] = torch.tensor(odd, dtype=torch.int32).view(torch.float32).to(DEVICE)
    wide[20:23] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    found = room.Shard(wide.to(torch.bfloat16), wide.to(torch.int16), *torch.zeros(2, len(wide), device=DEVICE))
    masters.split(wide, *found[:2])
    wanted = room.Shard(*(part.clone() for part in found))
    plain = torch.nn.Parameter(masters.join(*found[:2]))
    optimizer = torch.optim.AdamW([plain], lr=1e-3, weight_decay=0.1, fused=True)
    rule, scale = room.Rule(1e-3, (0.9, 0.999), 1e-8, 0.1), torch.full((), 0.37, device=DEVICE)
    for number in (1.0, 2.0, 3.0):
        gradients = torch.randn(len(wide), generator=draw, device=DEVICE).to(kind)
        gradients[int(number) :: 100] = 0
        plain.grad = gradients.float() * scale
        optimizer.step()
        room.step(gradients, found, rule, scale, torch.full((), number))
        masters.step_by_torch(gradients, wanted, rule, scale, torch.full((), number, device=DEVICE))
    assert room.proved.cache_info().currsize == 1 and room.proved(kind, wide.device)
    whole = plain.detach().isfinite()
    mine, torchs = (masters.join(*shard[:2])[whole] for shard in (found, wanted))
    if DEVICE == "cuda":
        again = room.Shard(*(torch.empty_like(part) for part in found))
        masters.split(plain.detach(), *again[:2])
        assert torch.equal(found.weights[whole], again.weights[whole])
        apart = (found.rests[whole].int() - again.rests[whole].int()).abs()
        assert apart.max() <= 1 and apart.sum() <= 3  # ties that were moved, some 7,500 masters having been kept
    assert (mine - torchs).abs().max() < 1e-9 + 4e-7 * torchs.abs().max()
    assert ((mine - torchs).abs() <= 3e-8 + 4e-7 * torchs.abs()).all()
    assert not found.weights[~whole].isfinite().any() and (~whole).sum() == 3
    for one, other in zip(found[2:], wanted[2:]):  # torch's functions do not round 0.001 to fp32 before
        assert torch.allclose(one, other, rtol=2e-5, atol=1e-8, equal_nan=True)
    monkeypatch.setattr(room, "step_by_kernel", lambda *given: None)
    room.proved.cache_clear()
    with pytest.warns(UserWarning, match="the kernel of AdamW, launched plain, differs by"):
        room.step(gradients, found, rule, scale, torch.full((), 4.0, device=DEVICE))
    assert not torch.equal(found.first, wanted.first)
