"""Kernels of a step and of windows: on a GPU as they are, elsewhere by Triton's own interpreter, no mock, but slow."""

import importlib
import os
import sys

import pytest
import torch
from noted_launches import Launches

import use_model_from_hub as use
from families import family_of, slot_layers

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


@pytest.mark.parametrize("kind", HALF, ids=str)
def test_gated_rows_have_the_gradients_of_autograd(kernels, monkeypatch, kind):
    gated = kernels("swiglu_kernels")
    monkeypatch.setattr(gated, "BLOCK", 64)  # of which these five rows of eighty fill six, and a part of another
    torch.manual_seed(0)
    gate, up, gradient = torch.randn(3, 5, 80, device=DEVICE).mul(3).to(kind).unbind()
    wide = [part.float().requires_grad_() for part in (gate, up)]
    wanted = torch.nn.functional.silu(wide[0]) * wide[1]
    exact = (*torch.autograd.grad(wanted, wide, gradient.float()), wanted.detach())
    assert not gated.takes(gate, up)  # gradients would be lost
    with torch.no_grad():
        assert gated.takes(gate, up) and gated.takes(gate, up, gradient)
        others = (gate.float(), up.float()), (gate, up.mT.contiguous().mT), (gate[:3, :1].clone(), up[:3, :1].clone())
        assert not any(gated.takes(*pair) for pair in others)
        close(gated.swiglu(gate, up), wanted, kind)
        for found, each in zip(gated.swiglu_backward(gate, up, gradient), exact):
            close(found, each, kind)
        monkeypatch.setattr(gated, "swiglu", lambda gate, up: 1.1 * gate)
        gated.proved.cache_clear()
        with pytest.warns(UserWarning, match="silu.*differs"):
            assert not gated.takes(gate, up)


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
    table, (cos, sin) = torch.randn(11, 80, device=DEVICE).to(kind), torch.randn(2, 9, 24, device=DEVICE).to(kind)
    history = torch.tensor([[10, 1, 3, 7], [3, 9, 0, 1], [2, 4, 10, 5]], device=DEVICE)
    places, shifts = torch.tensor([2, 0, 3], device=DEVICE), torch.tensor([4, 0, -2], device=DEVICE)
    norm, real = torch.randn(80, device=DEVICE).to(kind), rows.embed_by_kernel
    for new, tokens, positions in ((1, [3, 3, 5], [6, 0, 1]), (2, [3, 7, 3, 9, 5, 5], [6, 7, 0, 1, 1, 2])):
        found = rows.embed(history, places, shifts, table, cos, sin, new, norm)
        wanted = table[torch.tensor(tokens, device=DEVICE)]
        assert torch.equal(found[0], wanted)
        close(found[2], wanted.float() * norm, kind)
        assert torch.allclose(found[1][:, 0], wanted.float().square().sum(-1))
        assert torch.equal(found[3], cos[positions]) and torch.equal(found[4], sin[positions])
        assert rows.embed_proved(80, 24, kind, kind, table.device, new, kind)
    found = rows.embed(history, places, shifts, table, cos, sin)
    assert found[2] is None and rows.embed_proved(80, 24, kind, kind, table.device, 1, None)
    # Squares of one token alone: the first norm of every step would be wrong, and nobody would be told.
    monkeypatch.setattr(
        rows,
        "embed_by_kernel",
        lambda *given, **options: [
            part if part is None else part[:1].expand_as(part) for part in real(*given, **options)
        ],
    )
    rows.embed_proved.cache_clear()
    with pytest.warns(UserWarning, match="the kernel of embedding, launched plain, differs by"):
        again = rows.embed(history, places, shifts, table, cos, sin)
    assert again[2] is None and all(torch.equal(found[part], again[part]) for part in (0, 3, 4))


@pytest.mark.parametrize("kind", HALF, ids=str)
def test_the_likeliest_token_is_the_first_of_the_largest(kernels, kind):
    """Over several programs a row, the last of which is not full; the count of those that have ended is zero again."""
    rows = kernels("row_kernels")
    torch.manual_seed(9)
    logits = torch.randn(4, 2 * rows.LIKELIEST + 9, device=DEVICE).to(kind)
    logits[1, [3, 5, rows.LIKELIEST + 1]] = logits[2, -1] = logits[3, [rows.LIKELIEST, -1]] = 99
    for _ in range(2):
        assert torch.equal(rows.likeliest(logits)[1:], torch.tensor([3, logits.shape[1] - 1, rows.LIKELIEST]))
        assert logits[0, rows.likeliest(logits)[0]] == logits[0].max()
    assert rows.likeliest_proved.cache_info().currsize == 1 and rows.likeliest_proved(
        *logits.shape[1:], kind, logits.device
    )
    history, places = torch.zeros(4, 6, dtype=torch.long, device=DEVICE), torch.tensor([4, 0, 2, 1], device=DEVICE)
    rows.take_likeliest(logits, history, places, torch.tensor([1, 0, 1, 1], device=DEVICE))
    assert places.tolist() == [5, 0, 3, 2] and history.count_nonzero() == 4
    assert torch.equal(history[range(4), [5, 1, 3, 2]], rows.likeliest(logits))
    logits[3, 7] = float("nan")
    assert rows.likeliest(logits)[3] == logits[3].argmax() == 7


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
    like = hidden.new_empty(1024, 512)  # of 512 columns where it is gated
    assert all(skinny.tile_of(name, hidden, like)[0] for name in skinny.TILES), "no kernel was tried"
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
    assert added.squares.shape == (count, 512 // skinny.TILES["down"][skinny.tile_rows(count)][0])


def test_a_row_comes_out_the_same_whatever_stands_beside_it(kernels):
    skinny = kernels("skinny_products")
    torch.manual_seed(2)
    hidden, weight = torch.randn(8, 256, device=DEVICE).half(), torch.randn(64, 256, device=DEVICE).half()
    norm, squares = (torch.ones(256, device=DEVICE).half(), 1e-6), hidden.float().square().sum(-1, keepdim=True)
    whole = skinny.normed_product("qkv", skinny.Rows(hidden, squares), norm, weight)
    alone = skinny.Rows(hidden[3:4], squares[3:4])
    assert torch.equal(whole[3:4], skinny.normed_product("qkv", alone, norm, weight))


@pytest.mark.parametrize("kind", MULTIPLIED, ids=str)
@pytest.mark.parametrize("count", [5, 20, 64])
@pytest.mark.parametrize("sharers", [1, 3])
def test_products_of_many_rows_by_broad_tiles_equal_torchs(kernels, count, sharers, kind):
    """Columns that are no whole tiles; norms of which one half is in the rows already."""
    skinny = kernels("skinny_products")
    torch.manual_seed(7)

    def draw(*shape):
        return (torch.randn(*shape, device=DEVICE) / 8).to(kind)

    hidden, inner, norm = draw(count, 256) * 8, draw(count, 320), (draw(256).float() * 8, 1e-6)
    weight, bias, gated, down = draw(96, 256), draw(96), draw(2 * 96, 256), draw(256, 320)
    normed = skinny.rms_norm(hidden.float(), *norm)
    tile, squares = skinny.Broad(64, 64, 4, 3, sharers), hidden.float().pow(2).view(count, 4, -1).sum(-1)
    done = skinny.launch(tile, False, hidden, weight, bias, norm, squares)[0]
    close(done, normed @ weight.float().T + bias.float(), kind)
    scaled = (hidden * norm[0]).to(kind)
    again = skinny.launch(tile, False, hidden, weight, bias, norm, squares, scaled=scaled)[0]
    assert torch.equal(done, again) and not torch.equal(done, skinny.launch(tile, False, hidden, weight, bias)[0])
    both = skinny.launch(skinny.Broad(64, 64, 4, 3, 1), False, hidden, gated, None, norm, squares, gated=True)[0]
    close(both, skinny.swiglu(normed @ gated.float().T), kind)
    added, left, following = skinny.launch(tile, False, inner, down, residual=hidden, following=norm[0])
    close(added, hidden.float() + inner.float() @ down.float().T, kind)
    assert torch.equal(following, (added * norm[0]).to(kind)) and left.shape == (count, 4)
    assert torch.allclose(left.sum(-1), added.float().pow(2).sum(-1), rtol=1e-5)
    narrow = skinny.launch((16, 64, 2, 3, sharers, 1), False, inner, down, residual=hidden, following=norm[0])
    close(narrow[0], added.float(), kind)
    assert torch.equal(narrow[2], (narrow[0] * norm[0]).to(kind))


@pytest.mark.parametrize("count", [5, 40])
@pytest.mark.parametrize("spoilt", ["weight off by a number", "rows off by a number", "weight across"])
def test_what_does_not_lie_whole_is_torchs_and_said(kernels, spoilt, count):
    """The copy engine takes nothing that begins between two multiples of 16 bytes, and all kernels count the places of
    a weight row by row; every proof is on tensors that lie well."""
    skinny = kernels("skinny_products")
    torch.manual_seed(9)
    rows, inner = torch.randn(2, count, 512, device=DEVICE).half()
    weight = (torch.randn(512, 512, device=DEVICE) / 8).half()
    wanted = rows.float() + inner.float() @ weight.float().T

    def off(tensor):
        return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)

    inner = off(inner) if spoilt.startswith("rows") else inner
    weight = weight.T.contiguous().T if spoilt == "weight across" else weight
    weight = off(weight) if spoilt == "weight off by a number" else weight
    with pytest.warns(UserWarning, match=r"product \(down\) of a weight \(512, 512\): .* torch does it, slower"):
        close(skinny.add_product("down", skinny.Rows(rows.clone()), inner, weight).hidden, wanted, torch.float16)


def test_a_row_among_many_comes_out_the_same_whatever_stands_beside_it(kernels):
    skinny = kernels("skinny_products")
    torch.manual_seed(8)
    hidden, inner = torch.randn(2, 40, 512, device=DEVICE).half()
    weight = torch.randn(512, 512, device=DEVICE).half() / 8
    whole = skinny.add_product("down", skinny.Rows(hidden), inner, weight)
    fewer = skinny.add_product("down", skinny.Rows(hidden[3:36].clone()), inner[3:36].clone(), weight)
    assert isinstance(skinny.tile_of("down", inner, weight)[0], skinny.Broad)
    assert torch.equal(whole.hidden[3:36], fewer.hidden) and torch.equal(whole.squares[3:36], fewer.squares)


@pytest.mark.skipif(DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="nothing is interpreted")
@pytest.mark.parametrize("family", ["", "Qwen3.5"])
def test_a_step_of_many_slots_by_broad_tiles_gives_torchs_logits(base_of, monkeypatch, family):
    """Each norm but the first is half done where the rows come from; in fp16, which small states bear."""
    import writing.step
    from writing.slots import Cache, State

    model, _ = use.load_model(str(base_of(family)), use.Recipe(prompt="write", max_html_tokens=8))
    model = model.half().to(DEVICE)
    room, slots, halves = writing.step.add_product.__globals__, 17, []
    monkeypatch.setitem(slot_layers.attend_slots.__globals__, "PROOF_PLACES", 32)
    layers = family_of(model.config).captured(model).layers
    launch, on_triton = room["launch"], room["on_triton"]

    def noted(tile, begins, source, *given, **options):
        if len(source) == slots and "norm" not in options:  # proofs name it
            halves.append((options.get("scaled") is not None, options.get("following") is not None))
        return launch(tile, begins, source, *given, **options)

    def logits(tiles):
        monkeypatch.setitem(room, "TILES", {kind: {32: tile} for kind, tile in tiles.items()})
        torch.manual_seed(10)
        cache, state = Cache(layers, slots, 64, torch.float16, DEVICE), State(slots, 64, DEVICE, 0)
        for part in (part for parts in cache.states for part in parts):
            part.copy_(0.3 * torch.randn(part.shape))
        tokens, places = torch.arange(5, 5 + slots, device=DEVICE)[:, None], torch.full_like(state.places, 20)
        step = writing.step.Step(model, family_of(model.config).captured(model), cache, state, slots, 1, None)
        with torch.inference_mode():
            return step.forward(tokens, places, state.shifts, torch.ones_like(places)).float()

    plain = room["planned"]
    wanted = logits(dict.fromkeys(room["TILES"]))
    monkeypatch.setitem(room, "launch", noted)
    monkeypatch.setitem(room, "planned", lambda kind, source, normed: plain(kind, source, False))
    broad = {kind: room["Broad"](64, 32, 4, 3, 1 if kind == "gated" else 2) for kind in room["TILES"]}
    found = logits(broad)
    assert (found - wanted).norm() < 0.002 * wanted.norm() and on_triton(model.lm_head.weight)
    # Of two layers: out, gated and down go through tiles whatever the family; a gated product always finds its half.
    assert halves.count((True, False)) >= 2 and halves.count((False, True)) == 4


@pytest.mark.skipif(DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="nothing is interpreted")
@pytest.mark.parametrize(("slots", "family", "products"), [(3, "", 4), (17, "Qwen3.5", 3)])
def test_the_parts_of_a_step_prove_all_that_it_takes(base_of, monkeypatch, slots, family, products):
    """One that were missing would be compiled alone, after all the others."""
    import writing.step
    from writing.slots import Cache, State

    model, _ = use.load_model(str(base_of(family)), use.Recipe(prompt="write", max_html_tokens=8))
    model = model.half().to(DEVICE)
    used = (writing.step.add_product, slot_layers.attend_slots, slot_layers.delta_step, writing.step.embed)
    skinny, attention, delta, rows = (work.__globals__ for work in used)
    monkeypatch.setitem(attention, "PROOF_PLACES", 32)
    plain = skinny["planned"]
    monkeypatch.setitem(skinny, "planned", lambda kind, source, normed: plain(kind, source, False))
    tiles = {kind: {8: (16, 32, 2, 3, 1, 1), 32: skinny["Broad"](64, 32, 4, 3, 1)} for kind in skinny["TILES"]}
    tiles["gated"] = dict.fromkeys(tiles["gated"])  # by torch, with the kernels of the rows
    monkeypatch.setitem(skinny, "TILES", tiles)
    layers = family_of(model.config).captured(model)
    cache, state = Cache(layers.layers, slots, 64, torch.float16, DEVICE), State(slots, 64, DEVICE, 0)
    step = writing.step.Step(model, layers, cache, state, slots, 1, writing.step.Chooser([], drawn=False))
    works = [skinny["way_of"], attention["way_of"], delta["way_of"]]
    works += [skinny["rms_norm"].__globals__["proved"], rows["embed_proved"], rows["likeliest_proved"]]
    for work in works:
        work.cache_clear()
    launches = Launches(monkeypatch, [skinny, vars(skinny["broad_products"]), attention, delta, rows])
    with torch.inference_mode():
        for part in step.parts():
            part()
    proved = [work.cache_info().misses for work in works]
    assert proved[0] == products and bool(proved[1]) == bool(family) and proved[3:] == [2, 1, 1], proved
    step.advance()
    assert [work.cache_info().misses for work in works] == proved
    # Others would be compiled alone, and nothing would have proved them.
    assert len(launches.proved) >= 8 and launches.unproved() == []


def test_rows_that_met_the_next_norm_are_taken_by_it_alone(kernels, monkeypatch):
    skinny = kernels("skinny_products")
    hidden, norm, other = torch.ones(20, 64).bfloat16(), torch.ones(64), torch.ones(64)
    rows = skinny.Rows(hidden, None, 2 * hidden, norm)
    assert torch.equal(rows.scaled_for((norm, 1e-6)), 2 * hidden) and rows.scaled_for((other, 1e-6)) is None
    assert skinny.Rows(hidden).scaled_for((norm, 1e-6)) is None
    # Other GPUs than Hopper have narrow tiles for few rows, and torch for more.
    with monkeypatch.context() as patched:
        patched.setattr(skinny, "takes", lambda device: False)
        assert skinny.planned("down", hidden[:16], False) == skinny.ELSEWHERE["down", 16]
        assert skinny.planned("down", hidden[:8], False) == skinny.TILES["down"][8]
        assert skinny.planned("qkv", hidden[:8], True) == skinny.ELSEWHERE["qkv", 8]
        assert skinny.planned("gated", hidden[:16], True) == skinny.TILES["gated"][16]
        assert skinny.planned("down", hidden, False) is None
    # fp16 ends at 65,504: a large state times a large weight would be none any more.
    assert isinstance(skinny.planned("down", hidden.half(), False), skinny.Broad)
    assert skinny.planned("qkv", hidden.half(), True) is None


def test_products_are_proved_with_squares_in_as_many_parts_as_they_come(kernels, monkeypatch):
    """Another number of parts is another kernel, which nobody would have proved."""
    skinny = kernels("skinny_products")
    tiles = {"down": {32: skinny.Broad(64, 32, 4, 3, 1)}, "head": {32: (16, 32, 2, 3, 1, 1)}}
    monkeypatch.setattr(skinny, "TILES", skinny.TILES | tiles)
    hidden, inner = torch.randn(20, 256, device=DEVICE).half(), torch.randn(20, 64, device=DEVICE).half()
    down, head = torch.randn(256, 64, device=DEVICE).half(), torch.randn(128, 256, device=DEVICE).half()
    norm, asked, real = (torch.ones(256, device=DEVICE).half(), 1e-6), [], skinny.way_of
    monkeypatch.setattr(skinny, "way_of", lambda *given: asked.append(given) or real(*given))
    rows = skinny.add_product("down", skinny.Rows(hidden), inner, down, ("head", norm))
    skinny.normed_product("head", rows, norm, head)
    assert rows.parts == skinny.parts_of("head", hidden) == 4 and asked[-1][0] == "head" and asked[-1][-2] == 4
    before = list(asked)
    skinny.prove("head", hidden, head, norm)
    assert asked[-1] == before[-1], "what is proved beforehand is what the step takes"


def test_a_kernel_that_is_wrong_or_fails_is_not_used_and_that_is_said(kernels, monkeypatch):
    skinny, room = kernels("skinny_products"), kernels("slot_attention")
    hidden, weight = torch.randn(4, 256, device=DEVICE).half(), torch.randn(64, 256, device=DEVICE).half()
    assert skinny.tile_of("down", hidden, weight)[1] != skinny.NEVER
    real = skinny.launch

    def wrong(*arguments, **options):
        done, *left = real(*arguments, **options)
        return done + 0.05 * done.abs().max(), *left

    monkeypatch.setattr(skinny, "launch", wrong)
    skinny.way_of.cache_clear()
    with pytest.warns(UserWarning, match=r"the kernel of products \(down\), launched plain, differs by"):
        assert skinny.tile_of("down", hidden, weight) == (None, skinny.NEVER)
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


@pytest.mark.parametrize(
    ("turns", "norm", "gated", "parts"), [(32, "half", False, 2), (8, "whole", True, 2), (16, None, True, 1)]
)
def test_heads_that_are_normed_gated_and_turned_in_part_equal_torchs(kernels, monkeypatch, turns, norm, gated, parts):
    room = kernels("slot_attention")
    monkeypatch.setattr(room, "PROOF_PLACES", 96)
    monkeypatch.setattr(room, "MOST_PARTS", parts)
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
def test_steps_of_the_delta_rule_equal_torchs(kernels, kind, monkeypatch):
    """Four in a row, from the first token on: the convolution goes round. A slot that stands still keeps all."""
    room = kernels("delta_step")
    launches = Launches(monkeypatch, [vars(room)])
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
    places, live = (torch.tensor(part, device=DEVICE) for part in ([0, 5, 9], [1, 0, 1]))
    for number in range(4):
        token = draw(slots, mixed + heads * value + 2 * heads).to(kind)
        wanted = room.step_plain(token.float(), wide, *mine, places + number, live)
        found = room.delta_step(token, mixing, recent, states, places + number, live)
        close(found, wanted, kind)
        assert torch.equal(recent.float(), mine[0])
        assert (states - mine[1]).norm() < 4 * torch.finfo(kind).eps * mine[1].norm()
    assert room.way_of.cache_info().currsize == 1 and not states[1].any() and not recent[1].any()
    assert launches.proved and launches.unproved() == []


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


@pytest.mark.parametrize("name", ["E4M3", "E5M2"])
def test_a_rows_scale_is_the_least_power_of_two_that_holds_it(kernels, name):
    """To the bit, where its largest number is all but that of fp8, is that, and is all but a bit more."""
    room = kernels("fp8")
    kind, powers = getattr(room, name), 2.0 ** torch.arange(-50, 51, device=DEVICE)
    edge = torch.finfo(kind).max * powers
    below, above = (torch.nextafter(edge, torch.full_like(edge, to)) for to in (0.0, torch.inf))
    for largest, wanted in ((below, powers), (edge, powers), (above, 2 * powers)):
        rows = torch.zeros(len(powers), 16, device=DEVICE)
        rows[:, 3] = -largest
        assert torch.equal(room.cast(rows, kind).scales[:, 0], wanted)
        assert torch.equal(room.scales_by_torch(largest[:, None], kind)[:, 0], wanted)


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


def moments_of(room, count):
    """bitsandbytes' state of `count` numbers before their first step."""
    from bitsandbytes.functional import create_dynamic_map

    maps = (create_dynamic_map(signed).to(DEVICE) for signed in (True, False))
    scales = torch.zeros(2, -(-count // 256), device=DEVICE)
    return room.Moments(*torch.zeros(2, count, dtype=torch.uint8, device=DEVICE), *maps, *scales)


def copy_of(moments):
    return type(moments)(*(part.clone() for part in moments))


def eight_bit_step_by_torch(gradients, weights, moments, rule, number):
    """What bitsandbytes' CUDA kernel does, in fp64; gives weights, and both moments before they are rounded to codes,
    each with the codes that are nearest to less and to more of it by a millionth, and with the largest of its block."""
    (beta1, beta2), finite = (torch.tensor(beta).item() for beta in rule.betas), gradients.isfinite()
    gradient, told = gradients.double(), []
    for square, beta in ((False, beta1), (True, beta2)):
        codes, table, scales = moments[square], moments[2 + square], moments[4 + square].repeat_interleave(256)
        moment = beta * table[codes.long()].double() * scales[: len(codes)]
        moment += (1 - beta) * (gradient**2 if square else gradient)
        moment = torch.where(finite, moment, 0.0)
        most = torch.nn.functional.pad(moment.abs(), (0, -len(moment) % 256)).view(-1, 256).amax(1).float()
        most[most < torch.finfo(torch.float32).tiny] = 0.0
        share = moment / most.double().repeat_interleave(256)[: len(moment)].clamp(min=1e-300)
        middles = (table[1:].double() + table[:-1].double()) / 2
        around = [torch.searchsorted(middles, share * (1 + off)) for off in (-1e-6, 1e-6)]
        if not square:  # what is very small keeps its sign
            around = [torch.where(moment.signbit(), code.clamp(max=126), code) for code in around]
        told.append((moment, *around, most))
    bias, root = 1 - beta1**number, (1 - beta2**number) ** 0.5
    moved = weights.double() - rule.lr * root / bias * told[0][0] / (told[1][0].sqrt() + rule.eps * root)
    moved *= 1 - rule.lr * rule.weight_decay
    return torch.where(finite, moved, weights.double()), told


def gradients_of_all_sizes(count, draw):
    """Of `count` numbers: blocks of one size and of many, of zeros, of what fp32 holds in fewer digits, of large ones;
    and some that are no numbers, one block of them only."""
    gradients = torch.randn(count, generator=draw, device=DEVICE)
    gradients[256:768] *= 10.0 ** torch.linspace(-9, 1, 512, device=DEVICE)
    gradients[768:1024] = 0.0
    gradients[1024:1280] *= 1e-39
    gradients[1280:1536] *= 1e18
    gradients[1536:1546] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0] * 2)
    gradients[1792:2048] = torch.nan
    return gradients


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_steps_in_8_bits_have_the_weights_and_codes_of_bitsandbytes_kernel(kernels, kind):
    """Twenty steps, each from what the one before has left, the last block being short."""
    room = kernels("adamw_8bit_kernel")
    draw, count = torch.Generator(DEVICE).manual_seed(8), 2_500
    rule = room.Rule(1e-3, (0.9, 0.999), 1e-8, 0.1)
    moments, scale = moments_of(room, count), torch.full((), 0.37, device=DEVICE)
    weights, between = torch.randn(count, generator=draw, device=DEVICE), 0
    for number in range(1, 21):
        gradients = gradients_of_all_sizes(count, draw).to(kind)
        wanted, told = eight_bit_step_by_torch(gradients.float() * scale, weights, moments, rule, number)
        room.step(gradients, weights, moments, rule, number, scale)
        assert ((weights - wanted).abs() <= 2.0**-22 * wanted.abs() + 1e-5 * rule.lr).all()
        for codes, scales, (_, low, high, most) in zip(moments[:2], moments[4:], told):
            assert torch.allclose(scales, most, rtol=1e-6, atol=0)
            there = most.repeat_interleave(256)[:count] > 0
            assert ((codes == low) | (codes == high))[there].all()
            assert (~there).sum() >= 768  # of which any code says zero
            between += (low != high).sum().item()
    assert between < 20  # numbers whose code may be one of two
    assert not moments.scales1[[3, 4, 7]].any() and not moments.scales2[[3, 4, 7]].any()
    assert moments.scales1[5] > 1e16 and moments.codes1.unique().numel() > 230 and weights.isfinite().all()


def test_steps_in_8_bits_are_bitsandbytes_own_on_a_cpu_up_to_its_table_of_shares(kernels):
    """bitsandbytes' CPU implementation finds codes by shares rounded to 1 / 32,768; on a GPU it is its kernel."""
    from bitsandbytes.functional import optimizer_update_8bit_blockwise

    room = kernels("adamw_8bit_kernel")
    draw, count = torch.Generator(DEVICE).manual_seed(9), 2_500
    rule = room.Rule(1e-3, tuple(torch.tensor(beta).item() for beta in (0.9, 0.999)), 1e-8, 0.1)
    ours = moments_of(room, count)
    weights = torch.randn(count, generator=draw, device=DEVICE)
    for number in range(1, 21):
        gradients = gradients_of_all_sizes(count, draw)
        gradients[~gradients.isfinite()] = 0.0  # the CPU would make everything of them
        theirs, moved, before = copy_of(ours), weights.clone(), weights.clone()
        rates = *rule.betas, 0.0, 0.0, rule.eps, number, rule.lr
        states = theirs.map1, theirs.map2, theirs.scales1, theirs.scales2, rule.weight_decay
        optimizer_update_8bit_blockwise("adam", gradients, moved, *theirs[:2], *rates, *states)
        room.step(gradients, weights, ours, rule, number)
        # There the decay comes before the step.
        apart, length = (weights - moved).abs(), (moved - before).abs()
        assert (apart <= 2.0**-22 * moved.abs() + (1e-6 + 1.1 * rule.lr * rule.weight_decay) * length + 1e-9).all()
        for place in (0, 1):
            found, wanted = (part[4 + place] for part in (ours, theirs))
            assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-38)
            shares = [part[2 + place][part[place].long()] for part in (ours, theirs)]
            there = wanted.repeat_interleave(256)[:count] > 1e-37
            assert ((shares[0] - shares[1]).abs() <= 0.015)[there].all()
            near = (ours[place].int() - theirs[place].int()).abs() <= 1
            assert near[there & (shares[0].abs() > 2e-3)].all()


def test_weights_in_bf16_with_their_rests_take_the_same_step_in_8_bits(kernels):
    room = kernels("adamw_8bit_kernel")
    draw, count = torch.Generator(DEVICE).manual_seed(10), 1_500
    rule, wide = room.Rule(1e-3, (0.9, 0.999), 1e-8, 0.1), torch.randn(count, generator=draw, device=DEVICE)
    narrow = wide.to(torch.bfloat16)
    upper = narrow.view(torch.int16)
    rests = (wide.view(torch.int32) - (upper.int() << 16)).clamp(max=0x7FFF).to(torch.int16)
    wide = ((upper.int() << 16) + rests).view(torch.float32)
    moments = moments_of(room, count)
    same = copy_of(moments)
    for number in (1, 2, 3):
        gradients = torch.randn(count, generator=draw, device=DEVICE).to(torch.bfloat16)
        room.step(gradients, wide, moments, rule, number)
        room.step(gradients, narrow, same, rule, number, rests=rests)
        found = ((upper.int() << 16) + rests).view(torch.int32)
        assert (found - wide.view(torch.int32)).abs().max() <= number  # a tie is moved by one
        assert torch.equal(narrow, found.view(torch.float32).to(torch.bfloat16))
        assert all(torch.equal(one, other) for one, other in zip(moments, same))


def bitsandbytes_kernel(name, gradients, weights, *states):
    """`eight_bit_step_by_torch` in place of bitsandbytes' function."""
    room = sys.modules["kernels.adamw_8bit_kernel"]
    codes1, codes2, *betas, _, _, eps, number, lr, map1, map2, scales1, scales2, decay = states
    moments = room.Moments(codes1, codes2, map1, map2, scales1, scales2)
    moved, told = eight_bit_step_by_torch(gradients, weights, moments, room.Rule(lr, betas, eps, decay), number)
    weights.copy_(moved)
    for codes, scales, (_, low, _, most) in zip(moments[:2], moments[4:], told):
        codes.copy_(low)
        scales.copy_(most)


def test_the_step_in_8_bits_has_to_be_bitsandbytes_own(kernels, monkeypatch):
    """On a GPU against its kernel, here against the same in fp64; its CPU implementation is another one."""
    from bitsandbytes.functional import optimizer_update_8bit_blockwise

    room = kernels("adamw_8bit_kernel")
    device, right = torch.device(DEVICE), room.step
    if DEVICE == "cpu":
        monkeypatch.setattr(room, "NUMBERS", 2**14 + 100)
    theirs = bitsandbytes_kernel if DEVICE == "cpu" else optimizer_update_8bit_blockwise
    assert room.why_not(theirs, device) == ""
    if DEVICE == "cpu":
        assert "otherwise in step 1" in room.why_not(optimizer_update_8bit_blockwise, device)

    def longer(name, gradients, weights, *given):
        """By what an H100 was measured to round its corrections; a decay of the same length may cancel an update."""
        given, by = list(given), 1 + 4e-5
        given[8], given[13] = given[8] * by, given[13] / by
        theirs(name, gradients, weights, *given)

    assert room.why_not(longer, device) == ""

    def early(gradients, weights, moments, rule, number):  # the decay before the step
        weights *= 1 - rule.lr * rule.weight_decay
        right(gradients, weights, moments, rule._replace(weight_decay=0.0), number)

    def doubled(gradients, weights, moments, rule, number):
        right(gradients, weights, moments, rule, number)
        moments.scales2.mul_(1.001)

    def next_code(gradients, weights, moments, rule, number):
        right(gradients, weights, moments, rule, number)
        moments.codes1[1::100] -= (moments.codes1[1::100] > 130).byte()

    def a_single_code(gradients, weights, moments, rule, number):
        right(gradients, weights, moments, rule, number)
        moments.codes2[600] += number == 1

    wrong = {
        "has 1 of": a_single_code,
        "has moved weights by up to": early,
        "other blocks' largest": doubled,
        "codes otherwise": next_code,
    }
    for told, step in wrong.items():
        monkeypatch.setattr(room, "step", step)
        assert told in room.why_not(theirs, device)


def test_bitsandbytes_optimizer_steps_by_our_kernel_in_8_bits(kernels, monkeypatch):
    """Its own states, its own checkpoint: the halves of a run by either way; what is not AdamW in fp32 is its own."""
    import bitsandbytes

    room, theirs, taken = kernels("adamw_8bit_kernel"), bitsandbytes.functional.optimizer_update_8bit_blockwise, []
    monkeypatch.setattr(room, "step", lambda *given, step=room.step: taken.append(given[-1]) or step(*given))
    draw = torch.Generator(DEVICE).manual_seed(11)
    start = torch.randn(70, 60, generator=draw, device=DEVICE)
    gradients = torch.randn(6, 70, 60, generator=draw, device=DEVICE)
    ways = {"theirs": theirs, "ours": room.stand_in(theirs, DEVICE)}

    def run(*halves, kind=torch.float32, of=bitsandbytes.optim.AdamW):
        weights, state = torch.nn.Parameter(start.clone().to(kind)), None
        for half, way in enumerate(halves):
            monkeypatch.setattr(bitsandbytes.functional, "optimizer_update_8bit_blockwise", ways[way])
            optimizer = of([weights], lr=1e-3, optim_bits=8)
            if state:
                optimizer.load_state_dict(state)
            for gradient in gradients[3 * half : 3 * half + 3]:
                weights.grad = gradient.to(kind)
                optimizer.step()
            state = optimizer.state_dict()
        return weights.detach(), optimizer.state[weights]

    (plain, before), *others = (run(*halves) for halves in (("theirs",) * 2, ("ours", "theirs"), ("theirs", "ours")))
    assert taken == [1, 2, 3, 4, 5, 6]
    for weights, state in others:
        assert (weights - plain).abs().max() < 0.05 * (plain - start).abs().max()
        assert {name: getattr(value, "dtype", int) for name, value in state.items()} == {
            name: getattr(value, "dtype", int) for name, value in before.items()
        }
    run("ours", kind=torch.bfloat16)
    run("ours", of=bitsandbytes.optim.Lion)
    start = torch.randn(4201, generator=draw, device=DEVICE)[1:].view(70, 60)
    odd = torch.nn.Parameter(start)  # begins between two places where four numbers may be read at once
    odd.grad = gradients[0]
    monkeypatch.setattr(bitsandbytes.functional, "optimizer_update_8bit_blockwise", ways["ours"])
    bitsandbytes.optim.AdamW([odd], optim_bits=8).step()
    assert len(taken) == 6
    with pytest.raises(ValueError, match="begin where four numbers may be read"):
        room.step(gradients[0].view(-1), start.view(-1), moments_of(room, 4200), room.Rule(0.0, (0, 0), 0.0, 0.0), 1)


def test_steps_in_8_bits_on_split_masters_are_proved(kernels, monkeypatch):
    """By those on whole ones; a kernel that forgets the scale, or a rest, is found out."""
    room = kernels("adamw_8bit_kernel")
    monkeypatch.setattr(room, "NUMBERS", 5 * 1024 + 100)
    assert room.why_not_on_rests(torch.device(DEVICE)) == ""
    step = room.step

    def forgets_scale(*given):
        step(*given[:5], *([None, given[6]] if len(given) > 6 else []))

    def forgets_rest(*given):
        step(*given)
        if len(given) > 6:
            given[6][4_200] += 2

    for wrong in (forgets_scale, forgets_rest):
        monkeypatch.setattr(room, "step", wrong)
        assert "has moved split masters otherwise than whole ones in step 1" in room.why_not_on_rests(
            torch.device(DEVICE)
        )


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
