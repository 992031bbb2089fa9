"""Inference: a screenshot in, HTML out, everything else to stderr."""

import io
import json
import random
import shutil
import signal
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from threading import Event, current_thread
from types import SimpleNamespace

import pytest
from conftest import (
    ROOT,
    in_background,
    loaded_for_help,
    make_pages,
    need_browser,
    run_script,
    start_plain,
    weights,
)
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
    (["--image", "."], 2, "give a folder for their pages by --output"),
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


# -----------------------------------------------------------------------------
# Many pages


@pytest.fixture
def here(tiny_base, tmp_path, monkeypatch):
    """A folder with screenshots in a/ and b/, one of them broken, and a trained model that writes 6 tokens."""
    monkeypatch.chdir(tmp_path)
    make_pages(tmp_path / "shots" / "a", 2)
    make_pages(tmp_path / "shots" / "b", 3, seed=1)
    (tmp_path / "shots" / "b" / "001.png").write_bytes(b"broken")
    shutil.copytree(tiny_base, tmp_path / "model")
    recipe = {"prompt": "write", "max_html_tokens": 6, "max_pixels": 280 * 280}
    (tmp_path / "model" / "dom_recipe.json").write_text(json.dumps(recipe))
    return tmp_path


def names(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def named(images: list[str], output: str | None) -> list[tuple[str, str]]:
    pages, into_folder = use.find_pages(images, output)
    assert into_folder or len(pages) == 1
    return [(page.path.as_posix(), page.html.as_posix()) for page in pages]


def test_pages_lie_as_their_screenshots_do_and_none_meet(here):
    a, b = [("shots/a/000.png", "out/a/000.html"), ("shots/a/001.png", "out/a/001.html")], "shots/b/002.png"
    assert named(["shots"], "out")[:2] == named(["shots/*/*.png"], "out")[:2] == a
    assert (
        named(["shots/a"], "out") == named(["shots/a/*"], "out") == [(one, two.replace("/a/", "/")) for one, two in a]
    )
    assert (
        named(["shots/a", b], "out") == [*a, (b, "out/b/002.html")] == named(["shots/a", b, "shots/a/000.png"], "out")
    )
    assert use.parse(["--image", "-", "--output", "-"]).output is None  # stdin to stdout, and no file of that name
    assert named([b], "page.html") == [(b, "page.html")] and named([b], "out/") == [(b, "out/002.html")]
    for name in (".hidden.png", "000.preview.png", "notes.txt", "000.JPG"):
        (here / "shots" / "a" / name).write_bytes(b"x")
    found = [("000.JPG", "000.JPG.html"), ("000.png", "000.png.html"), ("001.png", "001.png.html")]
    assert named(["shots/a"], "out") == [(f"shots/a/{one}", f"out/{two}") for one, two in found]
    for images, output, words in [
        (["shots"], None, "5 screenshots; give a folder|6 screenshots; give a folder"),
        (["shots"], "shots/a/000.png", "is a file, and there may be several"),
        (["shots/*.png"], "out", r"shots/\*\.png: no \.png"),
        ([b], "no/page.html", "the folder does not exist"),
    ]:
        with pytest.raises(use.UseError, match=words):
            use.find_pages(images, output)


def test_a_folder_is_written_once_and_what_was_made_otherwise_is_not_taken_for_done(here, capsys):
    command = ["--image", "shots", "--model", "./model", "--output", "out", "--batch", "2"]
    assert use.main(command) == 80
    said = capsys.readouterr()
    assert "shots/b/001.png: not a readable PNG" in said.err and said.out == ""
    assert "0 of 5 pages were there, 4 new, 1 failed" in said.err and "4 of 4 pages cut off at 6 tokens" in said.err
    pages = [f"{name}{end}" for name in ("a/000", "a/001", "b/000", "b/002") for end in (".html", ".json")]
    assert names(here / "out") == pages
    record = json.loads((here / "out" / "a" / "000.json").read_text())
    told = {"screenshot": "shots/a/000.png", "max_html_tokens": 6, "temperature": 0.0, "tokens": 6, "cut_off": True}
    assert told.items() <= record.items() and len(record["sha256"]) == len(record["weights"]) == 64
    alone = use.main(["--image", "shots/b/002.png", "--model", "./model"])
    assert alone == 0 and capsys.readouterr().out == (here / "out" / "b" / "002.html").read_text()

    def again(*flags: str) -> tuple[int, str]:
        code = use.main([*command, *flags])
        return code, capsys.readouterr().err

    times = {name: (here / "out" / name).stat().st_mtime_ns for name in pages}
    (here / "out" / "b" / "002.html").unlink()
    shutil.copy(here / "shots" / "b" / "000.png", here / "shots" / "b" / "001.png")
    code, said = again()
    assert code == 0 and "3 of 5 pages were there, 2 new, 0 failed" in said
    kept = {name: (here / "out" / name).stat().st_mtime_ns for name in pages[:6]}
    assert kept.items() <= times.items()
    code, said = again()  # nothing to do: no model is loaded
    assert code == 0 and "5 of 5 pages were there" in said and "./model on" not in said
    code, said = again("--max_html_tokens", "5")
    assert code == 2 and "5 of 5 pages" in said and "max_html_tokens was 6, is 5" in said and "--overwrite" in said
    shutil.copy(here / "shots" / "b" / "000.png", here / "shots" / "a" / "000.png")
    assert "out/a/000.html: sha256 was" in again()[1]
    (here / "out" / "a" / "000.json").unlink()
    assert "without a record" in again()[1]
    (here / "model" / "model.safetensors").touch()
    assert "5 of 5 pages stand there already, but made otherwise" in again()[1]
    code, said = again("--overwrite", "--max_html_tokens", "5")
    assert code == 0 and "5 new" in said
    assert again("--max_html_tokens", "5")[0] == 0


def test_screenshots_are_opened_once_each_by_what_writes_when_their_turn_comes(here, monkeypatch, capsys):
    """All were decoded twice, and by the main thread, for which a GPU waits. It opens as many as it takes to know that
    there is something to load a model for."""
    opened, decode = [], use._decode
    monkeypatch.setattr(use, "_decode", lambda *given: opened.append(current_thread().name) or decode(*given))

    class Reading:
        def write(self, requests, shown=None):
            requests = list(requests)
            assert len(requests) == 5 and opened == ["MainThread"]
            with ThreadPoolExecutor(2, "reader") as pool:
                for request, picture in [(it, pool.submit(it.open)) for it in requests]:
                    try:
                        yield request, use.Written(f"<p>{picture.result().size}</p>", "", 1, False)
                    except use.UseError as error:
                        yield request, use.Failed(error)

    monkeypatch.setattr(use, "load_model", lambda *unused: (SimpleNamespace(device="cpu"), None))
    monkeypatch.setattr(use, "writer", lambda *unused: Reading())
    assert use.main(["--image", "shots", "--model", "./model", "--output", "out"]) == 80
    said = capsys.readouterr().err
    assert "--image shots/b/001.png: not a readable PNG" in said and "4 new, 1 failed" in said
    assert len(opened) == 6 and {name.partition("_")[0] for name in opened[1:]} == {"reader"}
    monkeypatch.setattr(use, "load_model", lambda *unused: pytest.fail("a model was loaded, though nothing is to do"))
    assert use.main(["--image", "shots", "--model", "./model", "--output", "out"]) == 80
    said = capsys.readouterr().err
    assert "b/001.png: not a readable" in said and "4 of 5 pages were there, 0 new" in said and "tokens/s" not in said


def test_of_several_answers_the_chosen_one_is_on_the_disk_before_the_next_ones_come(here, monkeypatch, capsys):
    """And counted, also where the rest never comes."""
    from writing import best_of, choosing

    asked_on = Event()

    class Writing:
        def write(self, requests, shown=None):
            for request in requests:
                if request.place:
                    asked_on.set()
                    patience = time.monotonic() + 10
                    while not (here / "out" / "a" / "000.html").exists() and time.monotonic() < patience:
                        time.sleep(0.01)
                    raise KeyboardInterrupt
                yield request, use.Written(f"<p>{request.sample}</p>", "", 7, False)

    monkeypatch.setattr(use, "load_model", lambda *unused: (SimpleNamespace(device="cpu"), None))
    monkeypatch.setattr(use, "writer", lambda *unused: Writing())
    monkeypatch.setattr(use, "render", lambda *unused: None)
    monkeypatch.setattr(choosing, "Renderer", lambda browsers: closing(SimpleNamespace(close=lambda: None)))
    monkeypatch.setattr(best_of, "choose", lambda *unused: asked_on.wait(10) and best_of.Choice(1, (0.1, 0.2)))
    assert use.main("--image shots --model ./model --output out --best_of 2".split()) == 130
    assert names(here / "out") == ["a/000.html", "a/000.json"]
    assert (here / "out" / "a" / "000.html").read_text() == "<p>1</p>\n"
    said = capsys.readouterr().err
    assert "7 tokens of the answers that are kept" in said and "0 of 5 pages were there, 1 new" in said


def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(monkeypatch):
    tried = []

    def write_pages(model, processor, screenshots, recipe, samples, shown, endings):
        tried.append(len(screenshots))
        if len(screenshots) > 2 or "too large" in screenshots:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return [use.Written(f"{shot}{sample}", "", 1, False) for shot, sample in zip(screenshots, samples)]

    def requests(shots: str | list[str]) -> list[use.Request]:
        return [use.Request(place, lambda shot=shot: shot, sample=place) for place, shot in enumerate(shots)]

    monkeypatch.setattr(use, "write_pages", write_pages)
    generating = use.Generating(None, None, use.Recipe(), batch=5)
    answers = [(request.place, page.html) for request, page in generating.write(requests("abcdefg"))]
    assert answers == [(place, f"{shot}{place}") for place, shot in enumerate("abcdefg")]
    assert tried == [5, 2, 2, 2, 1]
    with pytest.raises(RuntimeError, match="allocate"):
        list(generating.write(requests(["a", "too large"])))
    assert tried[5:] == [2, 1, 1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_shown_while_a_page_is_written_is_the_page(here, monkeypatch, capsys):
    """Drawn by a random model: bytes that are no character, special tokens, any white space."""
    model, processor = use.load_model("./model", use.Recipe())
    drawn = use.Recipe(prompt="write", max_html_tokens=60, max_pixels=280 * 280, temperature=2.0)
    shot = use.open_screenshot((here / "shots" / "a" / "000.png").read_bytes())
    for seed in range(6):
        pieces = []
        request = use.Request(3, lambda: shot, sample=seed)
        ((back, page),) = use.Generating(model, processor, drawn).write(
            [request], lambda *told, to=pieces: to.append(told)
        )
        assert back is request and {told[0] for told in pieces} == {request} and len(pieces) > 20
        assert "".join(words for _, words in pieces) == page.raw
    for pieces, last in [
        (["\ufeff \n<", "!DOCTYPE html>\n", "<p>a  ", " </p>\n\n", " "], None),
        (["Here it", " is:\n```html\n", "<p>a</p>\n```", " Done."], None),
        (["<p>a</p>", "<b>", "<b>", "<b>"], "<p>a</p></html>"),
    ]:
        monkeypatch.setattr("sys.stdout", Terminal())
        shown = use.Shown(streams=True)
        for piece in pieces:
            shown(None, piece)
        page = last or use.extract_html("".join(pieces))
        early = use.sys.stdout.getvalue()
        assert early == "" if pieces[0].startswith("Here") else page.startswith(early) or last
        shown.end(page)
        whole = use.sys.stdout.getvalue()
        assert whole == page + "\n" if not last else whole.endswith(page + "\n")
    assert "not how the page ended" in capsys.readouterr().err


def test_on_a_terminal_the_page_comes_as_it_is_written(here, monkeypatch):
    command = ["--image", "shots/a/000.png", "--model", "./model", "--max_html_tokens", "8"]
    page = "<p>two words</p>\n<p>\u6cb3</p>"
    monkeypatch.setattr("sys.stdout", Terminal())
    early = []

    def write_pages(model, processor, screenshots, recipe, samples, shown, endings):
        for start in range(0, len(page), 5):
            shown(page[start : start + 5])
            early.append(use.sys.stdout.getvalue())
        return [use.Written(page, page, 8, False)]

    monkeypatch.setattr(use, "write_pages", write_pages)
    assert use.main(command) == 0
    assert use.sys.stdout.getvalue() == page + "\n" and early[0] == page[:5] and early[-1] == page


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "-1"], "--temperature -1.0: give one from 0 to 100"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--top_p", "0"], "--top_p 0.0: give one from 0.001 to 1"),
        (["--max_html_tokens", "0"], "--max_html_tokens 0: give one from 1 to 1,000,000"),
        (["--batch", "0"], "--batch 0"),
        (["--seed", "x"], "invalid int value: 'x'"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_name(flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        use.parse(["--image", "a.png", *flags])
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_a_copy_refuses_what_needs_the_project_and_flags_without_effect_are_named(here, monkeypatch, capsys):
    command = ["--image", "shots/a/000.png", "--model", "./model"]
    for flags, words in [
        (["--top_p", "0.9", "--seed", "1"], "--top_p, --seed: nothing is drawn at temperature 0"),
        (["--preview"], "--preview: give --output"),
    ]:
        assert use.main([*command, *flags]) == 2 and words in capsys.readouterr().err
    monkeypatch.setattr(use, "__file__", str(here / "use_model_from_hub.py"))
    for flag, value, module in [("--best_of", "2", "writing.choosing"), ("--server", "http://x", "writing.server")]:
        assert use.main([*command, flag, value]) == 2
        assert f"{flag} needs {module}: run the use_model_from_hub.py of the project's" in capsys.readouterr().err


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    use.write_whole(page, b"old")
    (tmp_path / "link.html").symlink_to(page)
    use.write_whole(tmp_path / "link.html", b"new")
    assert page.read_bytes() == b"new" and (tmp_path / "link.html").is_symlink()

    def stop(*unused: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(use.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        use.write_whole(page, b"newer")
    assert names(tmp_path) == ["link.html", "page.html"] and page.read_bytes() == b"new"
    use.write_whole(use.Path("/dev/null"), b"gone")
    assert not use.Path("/dev/null").is_file()


@pytest.mark.slow
def test_a_folder_that_was_killed_goes_on_where_it_was(here):
    """SIGKILL leaves whole files, SIGTERM and Ctrl-C say how far they came; the same command writes the rest."""
    make_pages(here / "many", 80)
    command = ["--image", "many", "--model", "./model", "--output", "out", "--max_html_tokens", "60", "--batch", "8"]
    times: dict[str, int] = {}
    for sign, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with in_background(command, here, script=SCRIPT) as run:
            until = time.monotonic() + 120
            while len(pages := list((here / "out").glob("*.html"))) < len(times) + 5:
                assert run.poll() is None and time.monotonic() < until, run.said()
                time.sleep(0.01)
            run.send_signal(sign)
            assert run.wait(60) == code, run.said()
            assert sign == signal.SIGKILL or f"out: {len(times)} of 80 pages were there" in run.said()
        pages = {page.name: page.stat().st_mtime_ns for page in (here / "out").glob("*.html")}
        assert times.items() <= pages.items() and 5 <= len(pages) - len(times) < 80
        for name in pages:
            html, record = here / "out" / name, json.loads((here / "out" / name).with_suffix(".json").read_text())
            assert html.read_text().endswith("\n") and record["max_html_tokens"] == 60
        times = pages
    done = start_plain(command, here, script=SCRIPT)
    assert done.returncode == 0 and f"out: {len(times)} of 80 pages were there" in done.stderr, done.stderr
    assert times.items() <= {page.name: page.stat().st_mtime_ns for page in (here / "out").glob("*.html")}.items()
    assert names(here / "out") == sorted(f"{number:03d}.{end}" for number in range(80) for end in ("html", "json"))


@pytest.mark.slow
def test_a_copy_alone_writes_folders_and_previews(here):
    need_browser()
    shutil.copy(SCRIPT, here / "model")
    script = str(here / "model" / "use_model_from_hub.py")
    run = {"script": script, "cwd": here, "ours": False, "renders": True}
    done = start_plain(["--image", "shots", "--output", "out", "--preview", "--batch", "2"], **run)
    assert done.returncode == 80 and "4 new, 1 failed" in done.stderr, done.stderr
    pages = ("a/000", "a/001", "b/000", "b/002")
    assert names(here / "out") == [name + end for name in pages for end in (".html", ".json", ".preview.png")]
    # What a page asks for is not fetched, and its scripts do not run.
    script = "<script>document.body.innerHTML = ''</script>"
    # Nor does it matter when the picture is taken: what ends is at its end.
    moving = "<style>@keyframes k{to{background:#f00}}body{background:#00f;animation:k 900s forwards}</style>"
    (here / "out" / "a" / "000.html").write_text(f"{moving}<body>{script}<img src='http://x/y.png'>")
    (here / "out" / "a" / "000.preview.png").unlink()
    done = start_plain(["--image", "shots", "--output", "out", "--preview", "--batch", "2"], **run)
    preview = use.open_screenshot((here / "out" / "a" / "000.preview.png").read_bytes())
    left = use.open_screenshot((here / "shots" / "a" / "000.png").read_bytes())
    assert preview.size == (left.width + 16 + max(160, left.width), left.height)
    assert preview.crop((0, 0, *left.size)).tobytes() == left.tobytes()
    assert preview.getpixel((preview.width - 1, 1)) == (255, 0, 0)
    assert preview.getpixel((left.width + 8, 1)) == (128, 128, 128) and "previews: 1 of 1" in done.stderr


@pytest.mark.parametrize("word", ["enable_thinking", "thinking", ""])
def test_thoughts_are_off_by_the_name_that_the_template_knows(word):
    template = f"{{% if {word} %}}<think>{{% endif %}}"
    processor = SimpleNamespace(chat_template=template, apply_chat_template=lambda turns, **given: given)
    given = use.ask(processor, "write")
    assert {name: value for name, value in given.items() if "thinking" in name} == ({word: False} if word else {})
