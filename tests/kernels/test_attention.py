"""A segment sees itself alone, and a kernel is believed only where it has given what torch's own gives."""

import importlib
import shutil
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import PROGRAMS

from kernels import attention


def test_a_segment_sees_nothing_of_its_neighbours():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 12, 2, 8)
    bounds = torch.tensor([0, 3, 8, 12])
    before = attention.attend(query, key, value, bounds, 5, 0.3, causal=False)
    changed = [tensor.clone() for tensor in (query, key, value)]
    for tensor in changed:
        tensor[3:8] += 1
    after = attention.attend(*changed, bounds, 5, 0.3, causal=False)
    assert torch.equal(before[:3], after[:3]) and torch.equal(before[8:], after[8:])
    assert not torch.allclose(before[3:8], after[3:8])


def test_attention_with_fewer_keys_is_causal_inside_each_segment():
    torch.manual_seed(0)
    query, key, value = torch.randn(10, 4, 8), torch.randn(10, 2, 8), torch.randn(10, 2, 8)
    done = attention.attend(query, key, value, torch.tensor([0, 4, 10]), 6, 0.3, causal=True)
    for head in range(4):
        for start, end in ((0, 4), (4, 10)):
            for place in range(start, end):
                scores = query[place, head] @ key[start : place + 1, head // 2].T * 0.3
                wanted = scores.softmax(-1) @ value[start : place + 1, head // 2]
                assert torch.allclose(done[place, head], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("package", "why"),
    [
        (None, None),
        ("", None),  # flash-attn 2 alone
        ("import not_there_at_all", "ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("raise OSError('undefined symbol: of another torch')", "OSError: undefined symbol: of another torch"),
    ],
    ids=["not installed", "without it", "a part is missing", "for another torch"],
)
def test_a_flash_attn_that_is_installed_and_broken_is_told(package, why, tmp_path, monkeypatch):
    """Who has installed it would believe that it is used. What is not there is nobody's fault."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(place for place in sys.path if "site-packages" not in place)])
    if package is not None:
        (tmp_path / "flash_attn").mkdir()
        (tmp_path / "flash_attn" / "__init__.py").write_text("")
    if package:
        (tmp_path / "flash_attn" / "cute.py").write_text(package)
    importlib.invalidate_caches()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert not attention.importable("flash_attn.cute")
    for name in ("flash_attn", "flash_attn.cute"):  # nobody's after this
        sys.modules.pop(name, None)
    shown = [str(warning.message) for warning in told]
    assert shown == ([f"flash_attn.cute is installed, but cannot be imported, and is not used: {why}"] if why else [])


class NoNumber(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states):
        return states.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def altered(part: str):
    """A kernel of attention that does something wrong with `part`."""

    def kernel(query, key, value, bounds, longest, scale, causal):
        if part == "gradients only":  # as flash-attn 4 beta 36 does for heads of 80
            query = query.detach() + 0 * query
        elif part == "no number":
            key = NoNumber.apply(key)
        elif part == "its run":
            raise TypeError("no such word")
        done = attention.segment_by_segment(query, key, value, bounds, longest, scale, causal)
        return done * 1.1 if part == "the values" else done

    return kernel


PROOF = (attention.SEGMENTS, (4, 2, 16), torch.float32, True, "cpu")


@pytest.mark.parametrize("part", ["nothing", "the values", "gradients only", "no number", "its run"])
def test_a_kernel_is_believed_only_where_it_gives_the_same(monkeypatch, part):
    monkeypatch.setitem(attention.KERNELS, part, altered(part))
    attention.agrees.cache_clear()
    if part == "nothing":
        assert attention.agrees(part, *PROOF)
    else:
        said = "its run fails .* no such word" if part == "its run" else f"{part} differs from SDPA"
        with pytest.warns(UserWarning, match=said):
            assert not attention.agrees(part, *PROOF)


def test_a_kernel_may_be_proved_inside_a_layer_that_is_recomputed(monkeypatch):
    monkeypatch.setitem(attention.KERNELS, "nothing", altered("nothing"))
    attention.agrees.cache_clear()
    weight = torch.randn(3, 3, requires_grad=True)

    def layer(hidden):
        hidden = torch.tanh(hidden @ weight)
        assert attention.agrees("nothing", *PROOF)
        return torch.tanh(hidden @ weight)

    hidden = torch.randn(2, 3)
    (wanted,) = torch.autograd.grad(torch.tanh(torch.tanh(hidden @ weight) @ weight).sum(), weight)
    done = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=False)
    (found,) = torch.autograd.grad(done.sum(), weight)
    assert torch.equal(found, wanted)


def test_a_kernel_that_keeps_the_bounds_may_be_proved_in_inference_mode(monkeypatch):
    """As writing does, where nothing was proved before; torch's own kernel keeps them for its gradients."""

    class Keeping(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, bounds):
            ctx.save_for_backward(bounds)
            return query.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient, None

    def kernel(query, key, value, bounds, *rest):
        return attention.segment_by_segment(Keeping.apply(query, bounds), key, value, bounds, *rest)

    monkeypatch.setitem(attention.KERNELS, "keeps", kernel)
    attention.agrees.cache_clear()
    with torch.inference_mode():
        assert attention.agrees("keeps", *PROOF)


@pytest.mark.parametrize(
    ("longest", "agreeing", "taken"), [(128, True, "VARLEN"), (300, True, "FLASH_4"), (300, False, "VARLEN")]
)
def test_flash_attn_4_takes_long_segments_that_it_has_proved(monkeypatch, longest, agreeing, taken):
    """Its kernel needs a GPU: who is asked is tested here, and what for."""
    asked = []
    kernels = {name: lambda *given, name=name: asked.append((name, *given)) for name in attention.KERNELS}
    monkeypatch.setattr(attention, "KERNELS", kernels)
    monkeypatch.setattr(attention, "attention_kernel", lambda device, half: attention.FLASH_4)
    proofs = []
    monkeypatch.setattr(attention, "agrees", lambda *given: proofs.append(given) or agreeing)
    query, key, value = torch.zeros(300, 4, 16), torch.zeros(300, 2, 16), torch.ones(300, 2, 16)
    bounds = torch.tensor([0, 300])
    attention.attend(query, key, value, bounds, longest, 0.3, True)
    ((name, *given),) = asked
    assert name == getattr(attention, taken)
    assert all(a is b for a, b in zip(given, (query, key, value, bounds, longest, 0.3, True), strict=True))
    wanted = (attention.FLASH_4, attention.VARLEN, (4, 2, 16), torch.float32, True)
    assert proofs == ([wanted] if longest > 128 else [])


@pytest.mark.parametrize("usual", ["FLASH_4", "VARLEN", "SEGMENTS"])
@pytest.mark.parametrize(
    ("longest", "fewer", "width", "causal", "agreeing"),
    [
        (64, 4, 80, False, True),
        (64, 4, 80, False, False),
        (65, 4, 80, False, True),
        (64, 2, 80, False, True),
        (64, 4, 160, False, True),
        (64, 4, 80, True, True),
    ],
    ids=["windows", "unlike torch's", "longer", "fewer keys", "wider", "causal"],
)
def test_our_own_kernel_takes_windows_that_it_has_proved(monkeypatch, usual, longest, fewer, width, causal, agreeing):
    """The kernel itself: tests/kernels/interpreted.py."""
    pytest.importorskip("triton", reason="triton is not installed")
    asked, proofs = [], []
    kernels = {name: lambda *given, name=name: asked.append(name) for name in attention.KERNELS}
    monkeypatch.setattr(attention, "KERNELS", kernels)
    monkeypatch.setattr(attention, "attention_kernel", lambda device, half: getattr(attention, usual))
    monkeypatch.setattr(attention, "agrees", lambda *given, lengths: proofs.append((given, lengths)) or agreeing)
    attention.windows_agree.cache_clear()
    query, (key, value) = torch.zeros(64, 4, width), torch.zeros(2, 64, fewer, width)
    for _ in range(2):
        attention.attend(query, key, value, torch.tensor([0, 64]), longest, 0.3, causal)
    attention.windows_agree.cache_clear()
    proved = usual != "SEGMENTS" and (longest, fewer, width, causal) == (64, 4, 80, False)
    shapes = (attention.WINDOWS, attention.VARLEN, (4, 4, 80), torch.float32, False)
    assert proofs == [(shapes, attention.WINDOWED)] * proved
    other = attention.VARLEN if usual == "FLASH_4" else getattr(attention, usual)
    assert asked == [attention.WINDOWS if proved and agreeing else other] * 2


@pytest.mark.parametrize(
    ("usual", "window", "agreeing", "words"),
    [
        ("FLASH_4", 112, True, "{FLASH_4} for the language model, {VARLEN} for the rest, {WINDOWS} for windows"),
        ("VARLEN", 112, True, "{VARLEN}, {WINDOWS} for windows"),
        ("VARLEN", 112, False, "{VARLEN}"),
        ("VARLEN", 224, True, "{VARLEN}"),
        ("VARLEN", None, True, "{VARLEN}"),
        ("SEGMENTS", 112, True, "{SEGMENTS}"),
    ],
)
def test_a_training_says_which_kernels_it_has_proved(monkeypatch, usual, window, agreeing, words):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(attention, "attention_kernel", lambda device, half: getattr(attention, usual))

    def agrees(kernel, other, shapes, dtype, causal, lengths=attention.PAGES):
        assert shapes == ((16, 2, 128) if causal else (16, 16, 80)) and dtype == torch.bfloat16
        return agreeing if kernel == attention.WINDOWS else causal

    monkeypatch.setattr(attention, "agrees", agrees)
    attention.windows_agree.cache_clear()
    text = SimpleNamespace(num_attention_heads=16, num_key_value_heads=2, hidden_size=2048)
    vision = SimpleNamespace(num_heads=16, hidden_size=1280, patch_size=14, window_size=window)
    config = SimpleNamespace(get_text_config=lambda: text, vision_config=vision)
    found = attention.attention_words(config, "cuda", torch.bfloat16)
    attention.windows_agree.cache_clear()
    assert found == words.format(**vars(attention))


@pytest.mark.parametrize("pair", [True, False], ids=["with sums", "alone"])
@pytest.mark.parametrize("width", [80, 96])
def test_heads_of_odd_widths_are_filled_up_for_flash_attn_4(monkeypatch, width, pair):
    """In place of its kernel, which needs a GPU: SDPA, under its name, with its arguments."""

    def flash_attn_varlen_func(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal
    ):
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] == 96 and cu_seqlens_q is cu_seqlens_k
        done = attention.segment_by_segment(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal)
        return (done, None) if pair else done

    module = ModuleType("flash_attn.cute")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    torch.manual_seed(0)
    parts = [torch.randn(7, heads, width, requires_grad=True) for heads in (4, 2, 2)]
    bounds, found = torch.tensor([0, 3, 7]), []
    for kernel in (attention.flash_4, attention.segment_by_segment):
        done = kernel(*parts, bounds, 4, width**-0.5, True)
        found.append([done, *torch.autograd.grad(done.square().sum(), parts)])
    # Gradients of up to 20; how fp32 rounds them differs by processor.
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(*found))


@pytest.fixture
def fresh_kernel_choice():
    attention.attention_kernel.cache_clear()
    yield
    attention.attention_kernel.cache_clear()


@pytest.mark.usefixtures("fresh_kernel_choice")
@pytest.mark.parametrize(
    ("capability", "files", "kernel"),
    [
        ((9, 0), ["cute/__init__.py"], "FLASH_4"),  # flash-attn 4 alone: the package itself has no code
        ((8, 0), ["cute/__init__.py"], "VARLEN"),
        ((8, 0), ["cute/__init__.py", "__init__.py"], "FLASH"),
        ((9, 0), ["__init__.py"], "FLASH"),
        ((9, 0), [], "VARLEN"),
        ((7, 5), ["__init__.py"], "SEGMENTS"),
    ],
)
def test_the_installed_kernel_is_taken(monkeypatch, tmp_path, capability, files, kernel):
    """What a GPU says of itself and packages that need one cannot be had here: both are played."""
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    for file in files:
        path = tmp_path / "flash_attn" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROGRAMS / "played_flash_attn.py", path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    found = attention.attention_kernel("cuda", True)
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        sys.modules.pop(name)
    assert found == getattr(attention, kernel)
