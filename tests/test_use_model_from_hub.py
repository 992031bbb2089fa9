"""Inference: a screenshot in, HTML out, everything else to stderr."""

import json
import shutil

import pytest
from conftest import ROOT, loaded_for_help, make_pages, run_script, start_plain, weights

import use_model_from_hub as use

SCRIPT = str(ROOT / "use_model_from_hub.py")
DOCUMENT = "<!DOCTYPE html>\n<html><body><p>river</p></body></html>"


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
    ],
)
def test_fences_and_prose_go_and_the_document_stays(answer, html):
    assert use.extract_html(answer) == html


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


def test_base_settings_of_generation_do_not_leak_in(tiny_base):
    from PIL import Image

    recipe = use.Recipe(prompt="write", max_html_tokens=6, max_pixels=280 * 280)
    model, processor = use.load_model(str(tiny_base), recipe)
    shot = Image.new("RGB", (84, 84), "pink")
    greedy = use.write_pages(model, processor, [shot], recipe)[0]
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    model.generation_config.repetition_penalty = 9.0
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
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    done = start_plain(flags, tmp_path, script=SCRIPT)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
