"""Demo: the bundled pages are what their generator writes, and the demo teaches the bundled model to write them."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from card_examples import block, card_of, numbers_without_a_source, run_commands
from conftest import ROOT, run_script

from scoring.validity import validity

sys.path.insert(0, str(ROOT / "demo"))
import make_demo_pages


def test_bundled_pages_are_what_the_generator_writes():
    lines = (ROOT / "demo" / "pages" / "metadata.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    made = [html for html, _ in itertools.islice(make_demo_pages.generate("demo", seed=7), len(texts))]
    assert len(texts) == 360 and texts == made


def test_the_demo_family_is_none_of_the_bases():
    """Rules and tags that only the demo has; what it shares are `body`, the palette and the frame of a document."""
    base = [html for html, _ in itertools.islice(make_demo_pages.generate("base", seed=1), 3000)]
    names = set(re.findall(r"\n(\w+)\{", "".join(base))) | set(re.findall(r"<(\w+)", "".join(base)))
    demo = [html for html, _ in itertools.islice(make_demo_pages.generate("demo", seed=1), 300)]
    own = set(re.findall(r"\n(\w+)\{", "".join(demo))) | set(re.findall(r"<(\w+)", "".join(demo)))
    assert {"dl", "dt", "section", "b", "footer"} == own - names


def test_bundled_model_is_small_and_of_the_true_architecture():
    folder = ROOT / "demo" / "tiny_holo1"
    assert (folder / "model.safetensors").stat().st_size < 10_000_000
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert config["vision_config"]["fullatt_block_indexes"] == [1, 3] and config["vision_config"]["window_size"] == 112


NOISE = ["FutureWarning", "Warning:", "accumulation steps mismatch", "PAD/BOS/EOS", "base64", "world_info", "Traceback"]
NOISE += ["[INFO]", "[WARNING]", "launch.py", "runner.py:", "gemm_4bit", '{"', "\x1b", "\r"]


def assert_quiet(done: subprocess.CompletedProcess, folder: Path) -> None:
    """What a run writes into files: lines of ours that 100 columns hold, but for the command and long paths."""
    said = done.stdout + done.stderr
    assert not [noise for noise in NOISE if noise in said], said[:3000]
    command = [line for line in done.stdout.splitlines() if "deepspeed.launcher.runner" in line]
    long = [line for line in said.splitlines() if len(line) > 100 and line not in command]
    assert len(command) == 1 and not [line for line in long if str(folder) not in line and "/" not in line], long
    steps = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(steps) > 3 and max(map(len, steps)) <= 100
    assert sum(line.startswith("pages scored: ") for line in done.stderr.splitlines()) >= 2, "a bar's twin for files"


@pytest.mark.first
@pytest.mark.slow
def test_demo_fine_tunes_through_launcher_and_zero_3(tmp_path):
    """The README's first command: hardly a page right before, most of them after, and none by guessing."""
    done = run_script(str(ROOT / "run_deepspeed_training.py"), "--demo", cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ZeRO stage 3" in done.stdout
    resolved = json.loads((tmp_path / "holo1_dom_finetune_output" / "deepspeed.json").read_text())
    assert resolved["zero_optimization"]["stage"] == 3 and resolved["gradient_clipping"] == 1.0
    assert_quiet(done, tmp_path)
    results = json.loads((tmp_path / "holo1_dom_finetune_output" / "evaluation" / "results.json").read_text())
    before, after = results["before"], results["after"]
    assert (before["n"], after["n"]) == (40, 40)
    assert before["exact"] <= 0.1 and after["shuffled_exact"] <= 0.1
    assert after["exact"] >= 0.6 and after["valid"] >= 0.95
    assert before["failures"] == after["failures"] == 0 and after["likeness"] - before["likeness"] > 0.5
    assert results["comparison"]["metrics"]["likeness"]["low"] > 0.5 and "likeness of the rendered pages" in done.stdout
    report = (tmp_path / "holo1_dom_finetune_output" / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert report.count("data:image/") >= 80, "both pictures of each page"
    page = tmp_path / "holo1_dom_finetune_output" / "evaluation" / "page-0001"
    command = [sys.executable, str(ROOT / "use_model_from_hub.py"), "--image", str(page / "screenshot.png")]
    used = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert used.returncode == 0, used.stderr
    assert used.stdout.strip() == (page / "written.html").read_text().strip(), "users get what was judged"
    # What the card shows, as it stands, in a folder that has nothing but the final one.
    (fresh := tmp_path / "fresh").mkdir()
    final = (tmp_path / "holo1_dom_finetune_final").rename(fresh / "holo1_dom_finetune_final")
    card = card_of(final)
    assert "\n# tiny_holo1 fine-tuned on pages\n" in card and not numbers_without_a_source(card, results)
    shown = run_commands(block(card, "bash"), fresh, warm.usual_environment())
    assert shown.returncode == 0, shown.stderr
    assert validity((fresh / "page.html").read_text(encoding="utf-8")).valid
