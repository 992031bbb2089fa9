"""Inference: a screenshot in, HTML out, everything else to stderr."""

import io
import json
import random
import shutil
import struct
import zlib
from dataclasses import asdict, replace

import pytest
from conftest import ROOT, loaded_for_help, make_pages, run_script, start_plain, weights
from small_pages import picture, png

import use_model_from_hub as use

SCRIPT = str(ROOT / "use_model_from_hub.py")
DOCUMENT = "<!DOCTYPE html>\n<html><body><p>river</p></body></html>"
HOW_TO = "<div><h1>How to</h1><pre>```js\nlet a = 1\n```</pre><p>The rest of the page</p></div>"


def test_help_answers_at_once_without_torch(tmp_path):
    said, loaded, seconds = loaded_for_help(SCRIPT, tmp_path)
    assert "--image" in said and "argparse" in loaded and "torch" not in loaded
    assert seconds < 20, "this loads something heavy"  # a quiet machine needs about one second


@pytest.mark.parametrize(
    ("answer", "html"),
    [
        (DOCUMENT, DOCUMENT),
        (f"```html\n{DOCUMENT}\n```", DOCUMENT),
        (f"Here is the page:\n\n```html\n{DOCUMENT}\n```\nI hope it helps.", DOCUMENT),
        (f"Sure! {DOCUMENT} Done.", DOCUMENT),
        ("<html><body>open", "<html><body>open"),
        ("```html\n<html><body>open\n```", "<html><body>open"),
        ("```\n<p>only a part</p>\n```", "<p>only a part</p>"),
        ("<p>only a part</p>", "<p>only a part</p>"),
        ("<HTML><BODY>x</BODY></HTML >", "<HTML><BODY>x</BODY></HTML >"),
        ("<html><body></html></body></html>", "<html><body></html></body></html>"),
        ("", ""),
        # What starts with a tag, a comment or a doctype is a page to its end.
        (f"{DOCUMENT}\n<div>footer</div>", f"{DOCUMENT}\n<div>footer</div>"),
        (f"<style>p {{}}</style>{DOCUMENT}", f"<style>p {{}}</style>{DOCUMENT}"),
        (f"<!-- saved -->\n{DOCUMENT}", f"<!-- saved -->\n{DOCUMENT}"),
        (f"<?php 1 ?>{DOCUMENT}<!-- 0.1 s -->", f"<?php 1 ?>{DOCUMENT}<!-- 0.1 s -->"),
        (f"\ufeff \n{DOCUMENT}\n", DOCUMENT),
        (HOW_TO, HOW_TO),
        (f"<html><body><pre>\n{HOW_TO}\n```\n</pre>", f"<html><body><pre>\n{HOW_TO}\n```\n</pre>"),
        ("Warning: no file <p>a part</p>", "Warning: no file <p>a part</p>"),
        # A snippet that a text shows before its first tag is no page.
        ("How to\n```js\nlet a\n```\n<p>The rest</p>", "How to\n```js\nlet a\n```\n<p>The rest</p>"),
        ("How to\n```js\nlet a = '<b>'\n```\n<p>The rest</p>", "How to\n```js\nlet a = '<b>'\n```\n<p>The rest</p>"),
        ("First\n```css\nb {}\n```\nthen\n```html\n<b>a</b>\n```", "<b>a</b>"),
        ("```html\nHello <b>you</b>\n```", "Hello <b>you</b>"),
        # Fences and chatter around them, and fences inside.
        (f"```html\n{HOW_TO}\n```", HOW_TO),
        (f"Here:\n```html\n{HOW_TO}\n```\nIt has a heading.", HOW_TO),
        (f"```html\n{DOCUMENT}\n<p>after</p>\n```\nDone.", f"{DOCUMENT}\n<p>after</p>"),
        ("```html\n<b>a</b>\n```\nand:\n```css\nb {}\n```\nDone.", "<b>a</b>"),
        ("```html\n<pre>\n```\nx\n```\n</pre>\n```", "<pre>\n```\nx\n```\n</pre>"),
        (f"Sure! <style>p {{}}</style><html>{DOCUMENT}", f"<style>p {{}}</style><html>{DOCUMENT}"),
        ("I see no page.", "I see no page."),
    ],
)
def test_fences_and_prose_go_and_the_document_stays(answer, html):
    assert use.extract_html(answer) == html


def samples(*values: int, depth: int) -> bytes:
    """One row of a PNG."""
    bits = "".join(format(value, f"0{depth}b") for value in values)
    bits += "0" * (-len(bits) % 8)
    return b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("see_through", [False, True])
def test_greys_of_any_depth_are_the_same_in_eight_bits(depth, see_through):
    """16 bits were nearly white, and of 2 and 4 bits the transparent colour was not found."""
    most = 2**depth - 1
    values = [0, most, most // 3, most * 3 // 4]
    key = struct.pack(">H", values[2]) if see_through else b""
    shown = use.open_screenshot(png(4, 1, depth, 0, samples(*values, depth=depth), key))
    expected = [round(value * 255 / most) for value in values]
    if see_through:
        expected = [255 if value == values[2] else grey for value, grey in zip(values, expected)]
    assert shown.mode == "RGB" and [shown.getpixel((x, 0)) for x in range(4)] == [(grey,) * 3 for grey in expected]


def test_a_chunk_before_the_header_of_a_png_changes_nothing():
    """The bits of a sample were read where the header stands as a rule: 0 of them ended in a division by zero."""
    whole = png(4, 1, 8, 0, samples(0, 51, 102, 255, depth=8), struct.pack(">H", 51))
    before = struct.pack(">I4sI", 4, b"teXt", 0) + struct.pack(">I", zlib.crc32(b"teXt" + bytes(4)))
    shown = use.open_screenshot(whole[:8] + before + whole[8:])
    assert (
        list(shown.tobytes())
        == list(use.open_screenshot(whole).tobytes())
        == [0] * 3 + [255] * 3 + [102] * 3 + [255] * 3
    )


@pytest.mark.parametrize("depth", [8, 16])
def test_colours_and_alpha_of_any_depth_are_the_same_in_eight_bits_on_white(depth):
    most = 2**depth - 1
    one, two = (most, 0, most // 5), (0, most // 2, most)
    key = struct.pack(">HHH", *two)
    shown = use.open_screenshot(png(2, 1, depth, 2, samples(*one, *two, depth=depth), key))
    assert [shown.getpixel((x, 0)) for x in range(2)] == [(255, 0, 51), (255, 255, 255)]
    shown = use.open_screenshot(png(2, 1, depth, 6, samples(*one, most, *one, 0, depth=depth)))
    assert [shown.getpixel((x, 0)) for x in range(2)] == [(255, 0, 51), (255, 255, 255)]
    shown = use.open_screenshot(png(2, 1, depth, 4, samples(most // 5, most, 0, 0, depth=depth)))
    assert [shown.getpixel((x, 0)) for x in range(2)] == [(51, 51, 51), (255, 255, 255)]


def turned(kind: str, orientation: int, stored) -> bytes:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = orientation
    file, options = io.BytesIO(), {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}}
    stored.save(file, kind, exif=exif.tobytes(), **options[kind])
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_stands_upright_by_its_exif_and_its_size_is_told_so(kind):
    """The stored picture is made from the upright one by turning it back, as EXIF's own table says."""
    from PIL import Image

    way = Image.Transpose
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("black", (0, 0, 16, 16))
    upright.paste((128, 128, 128), (16, 0, 48, 16))
    stored = {1: upright, 2: upright.transpose(way.FLIP_LEFT_RIGHT), 3: upright.transpose(way.ROTATE_180)}
    stored |= {4: upright.transpose(way.FLIP_TOP_BOTTOM), 5: upright.transpose(way.TRANSPOSE)}
    stored |= {6: upright.transpose(way.ROTATE_90), 7: upright.transpose(way.TRANSVERSE)}
    stored |= {8: upright.transpose(way.ROTATE_270), 0: upright, 9: upright}
    for orientation, image in stored.items():
        data = turned(kind, orientation, image)
        shown = use.open_screenshot(data)
        assert use.picture_size(data) == shown.size == (48, 32), orientation
        greys = [shown.getpixel(place)[0] for place in ((4, 4), (40, 4), (4, 28), (40, 28))]
        assert all(abs(grey - wanted) < 9 for grey, wanted in zip(greys, (0, 128, 255, 255))), orientation
        file = io.BytesIO()
        shown.save(file, "PNG")  # as evaluation keeps it: it must not turn again
        assert use.open_screenshot(file.getvalue()).size == (48, 32)


def test_a_damaged_exif_turns_nothing():
    from PIL import Image

    for kind in ("JPEG", "PNG", "WEBP"):
        file = io.BytesIO()
        Image.new("RGB", (48, 32)).save(file, kind, exif=b"Exif\0\0no exif at all")
        assert use.open_screenshot(file.getvalue()).size == use.picture_size(file.getvalue()) == (48, 32)


def test_of_an_animation_the_first_frame_is_taken_and_inks_become_colours():
    from PIL import Image

    red, blue = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")
    for kind in ("PNG", "WEBP"):
        file = io.BytesIO()
        red.save(file, kind, save_all=True, append_images=[blue], **({"lossless": True} if kind == "WEBP" else {}))
        assert use.open_screenshot(file.getvalue()).getpixel((5, 5)) == (255, 0, 0)
    file = io.BytesIO()
    red.convert("CMYK").save(file, "JPEG", quality=100)
    assert max(abs(a - b) for a, b in zip(use.open_screenshot(file.getvalue()).getpixel((5, 5)), (255, 0, 0))) < 5


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_whatever_is_wrong_with_a_picture_has_one_name(kind):
    whole, rng = turned(kind, 6, use.open_screenshot(picture(1))), random.Random(0)
    for number in range(300):
        spoilt = bytearray(whole[: rng.randrange(len(whole))] if number % 3 == 0 else whole)
        for _ in range(4):
            if spoilt:
                spoilt[rng.randrange(min(len(spoilt), 200))] = rng.randrange(256)
        for read in (use.open_screenshot, use.picture_size):
            try:
                read(bytes(spoilt))
            except use.PictureError as error:
                assert len(str(error)) < 200 and "object at" not in str(error)


def test_recipe_of_the_folder_is_used(tmp_path):
    assert use.load_recipe(str(tmp_path)) == use.Recipe()
    facts = {"prompt": "Write.", "max_pixels": 9999, "max_html_tokens": 7, "commit": "unknown to inference"}
    (tmp_path / "dom_recipe.json").write_text(json.dumps(facts))
    assert use.load_recipe(str(tmp_path)) == use.Recipe(prompt="Write.", max_pixels=9999, max_html_tokens=7)


def test_model_is_the_final_folder_where_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert use.resolve_model("user/name") == "user/name"
    (tmp_path / "holo1_dom_finetune_final").mkdir()
    with pytest.raises(use.UseError, match=r"no config\.json in this folder"):
        use.resolve_model(None)
    (tmp_path / "holo1_dom_finetune_final" / "config.json").write_text("{}")
    assert use.resolve_model(None) == "./holo1_dom_finetune_final"
    with pytest.raises(use.UseError, match=r"\./nowhere: no such folder"):
        use.resolve_model("./nowhere")


def test_a_copy_beside_a_model_takes_that_one(tmp_path, monkeypatch):
    """As the one that lies in every final folder; the project's own lies beside none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "holo1_dom_finetune_final").mkdir()
    (tmp_path / "holo1_dom_finetune_final" / "config.json").write_text("{}")
    monkeypatch.setattr(use, "__file__", str(tmp_path / "renamed" / "use_model_from_hub.py"))
    (tmp_path / "renamed").mkdir()
    (tmp_path / "renamed" / "config.json").write_text("{}")
    assert use.resolve_model(None) == "./holo1_dom_finetune_final"
    (tmp_path / "renamed" / "dom_recipe.json").write_text("{}")
    assert use.resolve_model(None) == str(tmp_path / "renamed") and use.resolve_model("user/name") == "user/name"


def test_base_settings_of_generation_do_not_leak_in(tiny_base):
    from PIL import Image

    recipe = use.Recipe(prompt="write", max_html_tokens=6, max_pixels=280 * 280)
    model, processor = use.load_model(str(tiny_base), recipe)
    shot = Image.new("RGB", (84, 84), "pink")
    greedy = use.write_pages(model, processor, [shot], recipe)[0]
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    model.generation_config.repetition_penalty, model.generation_config.no_repeat_ngram_size = 9.0, 1
    assert [use.write_pages(model, processor, [shot], recipe)[0].raw for _ in range(3)] == [greedy.raw] * 3
    assert greedy.cut_off and greedy.tokens == 6


def test_a_model_that_lacks_weights_writes_nothing(tiny_base, tmp_path):
    """transformers would fill them with random numbers and write a page all the same."""
    from safetensors.torch import save_file

    folder, whole = tmp_path / "model", weights(tiny_base)
    shutil.copytree(tiny_base, folder)

    def loaded(tensors):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return use.load_model(str(folder), use.Recipe())

    loaded(whole)
    lost = [key for key in whole if key.endswith(("blocks.1.mlp.up_proj.weight", "layers.1.mlp.down_proj.weight"))]
    assert len(lost) == 2
    names = r"model\.language_model\.layers\.1\.mlp\.down_proj\.weight, model\.visual\.blocks\.1\.mlp\.up_proj\.weight"
    with pytest.raises(use.UseError, match=rf"lacks weights that its config\.json asks for: {names}; "):
        loaded({key: value for key, value in whole.items() if key not in lost})
    with pytest.raises(use.UseError, match=r"blocks\.0\.attn\.proj\.bias, .* and 20 more; "):
        loaded({key: value for key, value in whole.items() if not key.startswith("visual")})
    with pytest.raises(use.UseError, match=r": model\.language_model\.norm\.weight \(another shape\); "):
        loaded({**whole, "model.norm.weight": whole["model.norm.weight"][:8].clone()})
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(use.UseError, match=r": lm_head\.weight; "):
        loaded(whole)
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(use.UseError, match="cannot be loaded"):
        use.load_model(str(folder), use.Recipe())


@pytest.mark.slow
def test_answer_goes_to_stdout_and_the_rest_to_stderr(tiny_base, tmp_path):
    picture = make_pages(tmp_path / "pages", 1) / "000.png"
    (tmp_path / "model").symlink_to(tiny_base)
    recipe = {"prompt": "write", "max_html_tokens": 8}
    common = ["--image", str(picture), "--model", str(tmp_path / "model")]
    done = run_script(SCRIPT, *common, cwd=tmp_path)  # as a user starts it; the others forked
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stderr and "tokens/s" not in done.stdout
    assert "was not trained by this project" in done.stderr
    shutil.copytree(tiny_base, tmp_path / "trained")
    (tmp_path / "trained" / "dom_recipe.json").write_text(json.dumps(recipe))
    files = ["--image", str(picture), "--model", "./trained", "--output", "page.html"]
    done = start_plain(files, tmp_path, script=SCRIPT)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "cut off at 8 tokens" in done.stderr
    page = (tmp_path / "page.html").read_text()
    assert start_plain([*files, "--show_html"], tmp_path, script=SCRIPT).stdout == page


BAD = [
    (["--image", "nowhere.png"], 2, "nowhere.png: No such file"),
    (["--image", "."], 2, "Is a directory"),
    (["--image", "broken.png"], 80, "broken.png: not a readable PNG, JPEG or WebP"),
    (["--image", "strip.png"], 80, "strip.png: 4 x 1,000 pixels: a strip that no processor takes"),
    (["--image", "nothing.png"], 80, "nothing.png: not a readable PNG, JPEG or WebP"),
    (["--image", "good.png", "--output", "no/such/page.html"], 2, "the folder does not exist"),
    (["--image", "good.png", "--model", "./nowhere"], 2, "./nowhere: no such folder"),
    (["--image", "good.png", "--model", "./empty"], 2, "cannot be loaded"),
    ([], 2, "--image"),
    (["--image", "good.png", "--mod", "x"], 2, "--mod"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "code", "message"), BAD, ids=lambda value: str(value)[:30])
def test_bad_input_gets_a_message_and_a_code(flags, code, message, tmp_path):
    (tmp_path / "good.png").write_bytes((make_pages(tmp_path / "pages", 1) / "000.png").read_bytes())
    (tmp_path / "broken.png").write_bytes(b"nothing")
    (tmp_path / "nothing.png").touch()
    (tmp_path / "strip.png").write_bytes(picture(1, size=(4, 1000)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    done = start_plain(flags, tmp_path, script=SCRIPT)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


def test_drawn_answers_depend_on_seed_sample_and_screenshot_alone(tiny_base):
    """The same whatever is written beside them, in whichever order; and other seeds and samples draw others."""
    from PIL import Image

    drawn = use.Recipe(prompt="write", max_html_tokens=12, max_pixels=280 * 280, temperature=1.5, top_p=0.95)
    model, processor = use.load_model(str(tiny_base), drawn)
    shots = [Image.new("RGB", (84, 84), "pink"), Image.new("RGB", (140, 112), "navy")]
    alone = [
        use.write_pages(model, processor, [shot], drawn, samples=[sample])[0] for shot in shots for sample in (0, 1)
    ]
    assert len({page.raw for page in alone}) == 4
    together = use.write_pages(model, processor, [shots[1], shots[0], shots[1]], drawn, samples=[1, 0, 0])
    assert [page.raw for page in together] == [alone[3].raw, alone[0].raw, alone[2].raw]
    other = replace(drawn, seed=1)
    assert use.write_pages(model, processor, shots[:1], other)[0].raw != alone[0].raw
    # All the probability is left to one token: what is drawn is what greedy decoding takes.
    sure = replace(drawn, temperature=1e-4, top_p=1.0)
    assert use.write_pages(model, processor, shots, sure) == use.write_pages(
        model, processor, shots, use.Recipe(**(asdict(drawn) | {"temperature": 0.0}))
    )


def test_a_token_is_drawn_where_the_sum_of_probabilities_passes_the_number():
    import torch

    scores = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log().expand(6, 4)
    numbers = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.76, 1.0])
    assert use.draw(scores, numbers).tolist() == [0, 0, 1, 1, 2, 2]
    drawn = use.draw(scores[:1].expand(20_000, 4), torch.rand(20_000, generator=torch.Generator().manual_seed(3)))
    shares = torch.bincount(drawn, minlength=4) / 20_000
    assert (shares - torch.tensor([0.5, 0.25, 0.25, 0.0])).abs().max() < 0.015 and shares[3] == 0
