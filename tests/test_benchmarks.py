"""benchmarks/: pages of the wanted size, the same weights for all, figures read off log lines, and one small run."""

import argparse
import importlib.util
import json
import os
import random
import re
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_base, make_tokenizer, need_browser, output, run_script, weights
from hidden_texts import GHOST, document
from PIL import Image
from transformers import AutoModelForImageTextToText

from training.cleaning import CLEANING_STEPS, clean_html
from training.page_checks import screenshot_size

sys.path.insert(0, str(ROOT / "benchmarks"))
import attention_speed
import default_run
import dictation
import endings_write
import linear_attention
import make_pages_like_real
import make_pages_speed
import make_shapes
import optimizer_speed
import optimizer_step
import other_order
import random_weights
import rivals
import same_curve
import step_profile
import step_speed
import unseen_text
import write_speed

import use_model_from_hub as use
import writing.engine
from families import family_of, page_costs
from kernels import attention, gated_delta
from scoring.renders import Renderer
from training.page_order import PageSampler

SIZES = json.loads(make_pages_like_real.SIZES.read_text())

# -----------------------------------------------------------------------------
# Pages


def count(text: str, tokenizer=make_tokenizer()) -> int:  # noqa: B008 (one for all tests)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_the_sizes_are_of_screenshots_and_short_enough():
    sizes = SIZES["width_height_html_tokens"]
    assert (SIZES["pages_read"], SIZES["most_html_tokens"], len(sizes)) == (74, 4096, 43)
    assert {width for width, _, _ in sizes} == {1280}
    assert all(600 <= height <= 2000 and 100 <= tokens <= 4096 for _, height, tokens in sizes)


def test_every_size_is_drawn_once_before_any_comes_twice():
    sizes = SIZES["width_height_html_tokens"]
    drawn = make_pages_like_real.draw(sizes, 100, seed=3)
    assert sorted(drawn[:43]) == sorted(drawn[43:86]) == sorted(sizes) and len(drawn) == 100
    assert drawn == make_pages_like_real.draw(sizes, 100, seed=3) != make_pages_like_real.draw(sizes, 100, seed=4)


@pytest.mark.parametrize("wanted", [300, 881, 4096])
def test_a_page_has_the_wanted_tokens_and_nothing_to_clean(wanted):
    pages = [make_pages_like_real.make_html(random.Random(seed), wanted, count) for seed in (0, 1)]
    assert all(0.98 * wanted <= count(page) <= wanted for page in pages)
    assert pages[0] != pages[1]
    assert [clean_html(page, CLEANING_STEPS).strip() for page in pages] == pages


def test_a_page_shorter_than_any_is_refused():
    with pytest.raises(ValueError, match="no page of 5 tokens"):
        make_pages_like_real.make_html(random.Random(0), 5, count)


def test_written_pages_are_a_dataset_of_different_pages(tmp_path):
    tokens = make_pages_like_real.write_pages(tmp_path, [[320, 200, 400], [320, 640, 500]], count, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    pictures = [(tmp_path / row["file_name"]).read_bytes() for row in rows]
    assert [screenshot_size(picture) for picture in pictures] == [(320, 200), (320, 640)]
    assert [count(row["text"]) for row in rows] == tokens


# -----------------------------------------------------------------------------
# Weights


def test_random_weights_have_a_published_checkpoints_keys_and_leave_the_rest_alone(tiny_base, tmp_path):
    make_base(tmp_path, weights=False)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    random_weights.write_weights(tmp_path, seed=0)
    written, known = weights(tmp_path), weights(tiny_base)
    assert {key: (value.shape, value.dtype) for key, value in written.items()} == {
        key: (value.shape, value.dtype) for key, value in known.items()
    }
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    with pytest.raises(SystemExit, match="has weights"):
        random_weights.write_weights(tmp_path, seed=1)


# -----------------------------------------------------------------------------
# Cost


@pytest.fixture(scope="module")
def shape():
    class Tokenizer:
        @staticmethod
        def convert_tokens_to_ids(name: str) -> int:
            return 151_643 + len(name)

    return family_of("qwen2_5_vl").shape(make_shapes.make_config("3b", Tokenizer))


@pytest.mark.parametrize(
    ("name", "billions"), [("3b", 3.75), ("7b", 8.29), ("qwen3-vl-4b", 4.44), ("qwen3.5-4b", 4.54)]
)
def test_shapes_have_the_parameters_of_what_they_are_called(name, billions):
    config = make_shapes.make_config(name, make_tokenizer())
    weights = sum(page_costs.weights_of(family_of(config).shape(config)))
    assert weights / 1e9 == pytest.approx(billions, rel=0.003)


def test_the_operations_of_a_page_are_those_of_the_published_formula(shape):
    tokens, supervised, patches = 2_900, 1_500, 5_000
    formula = 6 * (2.775e9 * tokens + 3.11e8 * supervised) + 6 * 0.63e9 * patches + 12 * 36 * 2048 * tokens**2 / 2
    vision_attention = 12 * 1280 * patches * (4 * patches + 28 * 64)
    flops = page_costs.page_flops(shape, tokens, supervised, patches)
    # The rest is the merger, which the short formula leaves out.
    assert flops == pytest.approx(formula + vision_attention, rel=0.005)


def test_pages_per_second_and_mfu_fit_the_published_rows(shape):
    """4.35 pages/s were 36.0 % and 5.05 pages/s 41.7 % of 989 TFLOP/s: 82 TFLOP a page. How long those pages were is
    not published; screenshots at the limit (1,280 tokens) and answers of about 1,800 tokens cost as much."""
    rows = [0.360 * 989e12 / 4.35, 0.417 * 989e12 / 5.05]
    assert rows == pytest.approx([81.75e12] * 2, rel=0.002)
    costs = [page_costs.page_flops(shape, answer + 1_320, answer, 5_120) for answer in (1_500, 2_100)]
    assert costs[0] < rows[1] < costs[1]


@pytest.mark.parametrize("name, billions", [("7b", 8.29), ("qwen3-vl-4b", 4.44), ("qwen3.5-4b", 4.54)])
def test_the_shapes_have_as_many_parameters_as_the_published_models(name, billions):
    """On no device: nothing is allocated."""
    tokenizer = make_tokenizer()
    for tiny in (True, False):
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(make_shapes.make_config(name, tokenizer, tiny))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
    template = make_shapes.CHAT_TEMPLATES[make_shapes.SHAPES[name]["family"]]
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    asked = tokenizer.apply_chat_template(
        turns, chat_template=template, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    user = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>?<|im_end|>\n<|im_start|>assistant\n"
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    expected = {"7b": system + user, "qwen3-vl-4b": user, "qwen3.5-4b": user + "<think>\n\n</think>\n\n"}
    assert asked == expected[name]


# -----------------------------------------------------------------------------
# Order


def test_another_order_trains_each_step_on_the_same_pages(monkeypatch):
    args = SimpleNamespace(seed=3, data_seed=None, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    sampler = PageSampler([float(cost) for cost in range(1, 21)], args)
    usual = list(sampler.steps())
    monkeypatch.setattr(page_costs, "deal", other_order.deal_in_reverse)
    assert list(sampler.steps()) == [step[::-1] for step in usual] != usual


# -----------------------------------------------------------------------------
# Reading

LINE = "step 3/8  loss 12.3400  lr 1.0e-05  3.41 pages/s  MFU 30 %  wait 3 %  71.9 GiB  0:12 min left\n"


def test_curves_that_are_there_are_compared_and_not_run_again(tmp_path, monkeypatch, capsys):
    out = tmp_path / "curves"
    argv = ["--base_model", "base", "--pages", "pages", "--out", str(out), "--steps", "12", "--ways", "ours,ours-8bit"]
    monkeypatch.setattr(same_curve, "losses", lambda *unused: pytest.fail("a way was run again"))
    earlier = {"settings": same_curve.settings_of(same_curve.parse(argv)), "seconds": {}}
    curve = [12.0 - step for step in range(12)]
    earlier["losses"] = {"ours": curve, "ours-8bit": [*curve[:4], curve[4] + 0.5, *curve[5:11], curve[11] - 0.2]}
    out.with_suffix(".json").write_text(json.dumps(earlier))
    assert same_curve.main(argv) == 0 and out.with_suffix(".png").stat().st_size > 10_000
    apart = json.loads(out.with_suffix(".json").read_text())["beside"]["ours"]["ours-8bit"]
    assert apart == pytest.approx({"worst": 0.5, "mean": 0.7 / 12, "end": -0.1})
    assert "a step differs by at most 0.5000, the end by -0.1000" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"other settings \(learning_rate 1e-5, here 1e-4"):
        same_curve.main([*argv, "--learning_rate", "1e-4"])
    # One that cannot be had is said, and the others stay.
    monkeypatch.setattr(same_curve, "losses", lambda *unused: ([], "played: no such flag"))
    assert same_curve.main([*argv[:-1], "ours,ours-8bit,ours-fp8"]) == 1
    assert "missing: ours-fp8" in capsys.readouterr().out
    assert json.loads(out.with_suffix(".json").read_text())["losses"] == earlier["losses"]


def test_the_figures_of_our_line_are_read():
    assert step_speed.read_step(LINE) == {
        "step": 3,
        "loss": 12.34,
        "logged_pages_per_second": 3.41,
        "logged_mfu": 0.3,
        "data_wait_share": 0.03,
        "peak_gib": 71.9,
    }


def test_a_figure_that_the_line_lacks_is_left_out():
    short = step_speed.read_step("step 1/2  loss 5.8664  lr 0.0e+00  22.5 pages/s  0.9 GiB\n")
    assert short.keys() == {"step", "loss", "logged_pages_per_second", "peak_gib"}


def test_the_line_of_the_real_trainer_is_read():
    from training.progress import log_line

    names = "pages_per_second supervised_tokens_per_second image_tokens_per_second seconds_per_step".split()
    logs = dict.fromkeys([*names, "data_wait_share", "peak_gib", "mfu"], 0.5) | {"loss": 1.25, "learning_rate": 1e-5}
    state = type("State", (), {"global_step": 4, "max_steps": 9})
    figures = step_speed.read_step(log_line(logs, state))
    assert (figures["step"], figures["loss"], figures["logged_mfu"], figures["peak_gib"]) == (4, 1.25, 0.5, 0.5)


@pytest.mark.parametrize("line", ["", "8 pages per step\n", "saved at step 3/8\n", "before training, loss 3\n"])
def test_other_lines_are_no_steps(line):
    assert step_speed.read_step(line) is None


def test_a_rivals_line_is_read_as_it_is():
    assert step_speed.read_step('STEP {"step": 1, "loss": 2.5}\n') == {"step": 1, "loss": 2.5}


def test_the_plan_stands_beside_the_measured_peak():
    told = "peak: 63.2 GiB measured, 65.1 planned for the fullest batch, +3.0%; it had recomputed 0%"
    row = step_speed.planned_beside_measured(re.search(step_speed.PLAN, told))
    assert row["planned_gib"] == 65.1 and row["heaviest_gib"] == 63.2
    assert row["notes"] == ["65.1 GiB planned for the fullest batch, 63.2 measured (+3.0%)"]


def test_the_order_of_ours_is_taken_only_when_it_is_whole(tmp_path):
    file, names = tmp_path / "page_order.jsonl", ["a", "b", "c", "d"]
    assert step_speed.read_order(file, names, 2, 2) is None
    rows = [{"step": 1, "pages": ["c", "a"]}, {"step": 2, "pages": ["d", "b"]}, {"step": 1, "pages": ["a", "b"]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert step_speed.read_order(file, names, 2, 2) == [[2, 0], [3, 1]]
    assert step_speed.read_order(file, names, 2, 3) is None
    assert step_speed.read_order(file, names[:3], 2, 2) is None


@pytest.mark.parametrize(("ending", "limit_s"), [("SIGTERM", 60.0), ("time limit of 1 s", 1.0)])
def test_a_way_that_is_ended_leaves_no_process_and_keeps_its_steps(monkeypatch, tmp_path, ending, limit_s):
    kept, ways = [signal.getsignal(number) for number in step_speed.ENDED_BY], []
    way = step_speed.Way
    monkeypatch.setattr(step_speed, "Way", lambda *options: ways.append(way(*options)) or ways[0])
    monkeypatch.setattr(step_speed, "read_step", lambda line: read_and_end(line, ending))
    signal.signal(signal.SIGTERM, step_speed.end_by_signal)
    args = argparse.Namespace(work=tmp_path, steps=3)
    command = [sys.executable, "-S", str(ROOT / "tests" / "programs" / "logs_two_steps.py")]
    try:
        steps, ended, more = step_speed.run_way("plain", command, args, dict(os.environ), None, limit_s)
    finally:
        for number, handler in zip(step_speed.ENDED_BY, kept):
            signal.signal(number, handler)
    assert (ended, [step["loss"] for step in steps]) == (ending, [2.5, 2.25]) and "STEP" in more["log_tail"]
    assert ways[0].members() == []  # nor the child that has a session of its own


def read_and_end(line: str, ending: str, read=step_speed.read_step):
    """Of one line; where the signal is to come, it comes while the process waits for the line after the second."""
    if "2.25" in line and ending == "SIGTERM":
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    return read(line)


@pytest.mark.parametrize(("way", "spent_s", "limit_s"), [("ours", 0, 230), ("ours", 100, 180), ("plain", 400, 100)])
def test_the_ways_share_what_is_left_of_their_time(way, spent_s, limit_s):
    args = argparse.Namespace(ways=["ours", "plain"], total_s=540.0, limit_s=300.0)
    assert step_speed.limit_of(way, args, time.monotonic() - spent_s) == pytest.approx(limit_s, abs=1)


# -----------------------------------------------------------------------------
# Results


def test_rates_are_means_over_steps_three_to_the_last():
    steps = [{"step": n, "loss": 9.0 - n, "seconds": s, "peak_gib": 10.0 + n} for n, s in enumerate((60, 9, 2, 4), 1)]
    row = step_speed.summarise(steps, "all steps", 8, 2, [1e15, 1e15, 3e15, 6e15], 1000.0)
    assert row["pages_per_second"] == pytest.approx(16 / 6) and row["seconds_per_step"] == 3
    assert row["mfu"] == pytest.approx(9e15 / 6 / 2 / 1e15)
    assert (row["first_step_loss"], row["last_step_loss"], row["peak_gib"]) == (8.0, 5.0, 14.0)
    assert row["measured_steps"] == [3, 4] and row["seconds"] == [60, 9, 2, 4] and row["data_wait_share"] is None


def test_a_way_that_was_ended_after_its_first_step_has_no_rate():
    steps = [{"step": 1, "loss": 8.0, "data_wait_share": 0.1}]  # and no seconds, which are from line to line
    row = step_speed.summarise(steps, "time limit of 270 s", 8, 1, [1e15], 1000.0)
    assert row["first_step_loss"] == 8.0 and row["pages_per_second"] is row["seconds_per_step"] is row["mfu"] is None


def test_a_way_that_never_came_to_a_step_has_a_row_without_figures():
    row = step_speed.summarise([], "exit code 83", 8, 1, [], None)
    assert row == {"ended": "exit code 83", "steps_seen": 0}
    results = {"ways": {"trl": row}, "gpus": 1, "gpu": None, "base_model": "b", "pages_per_step": 8, "date": "today"}
    table = step_speed.table(results | {"first_step_comparable": True})
    assert table.splitlines()[-1] == "| trl | – | – | – | – | – | – | – | exit code 83 |"


def first_fit(lengths: list[int], room: int) -> list[list[int]]:
    rows = []
    for length in sorted(lengths, reverse=True):
        row = next((row for row in rows if sum(row) + length <= room), None)
        rows.append([length]) if row is None else row.append(length)
    return rows


@pytest.mark.parametrize(
    ("tokens", "rows", "wanted"),
    [
        ([38, 28, 18, 8, 48, 8, 8, 8], 2, (56, 4)),  # 40 + 10 and 30 + 20, 50 and 3 x 10
        ([38, 8, 8, 8, 28, 28, 28, 28], 2, (64, 4)),
        ([38, 38, 38, 38, 8, 8, 8, 8], 4, (48, 1)),  # no length makes four rows of both steps
    ],
)
def test_rows_of_a_rival_that_packs_hold_the_pages_of_their_step(tokens, rows, wanted, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    job = SimpleNamespace(tokens=tokens, pages_per_step=4, rows_per_step=rows)
    room, together = rivals.row_size(job, first_fit)
    assert (room, together) == wanted
    lengths = [count + rivals.END for count in tokens]
    packed = [row for at in range(0, 8, together) for row in first_fit(lengths[at : at + together], room - 1)]
    masks = [[n for n, length in enumerate(row, 1) for _ in range(length)] + [0] * (room - sum(row)) for row in packed]
    rivals.check_rows(job, {"attention_mask": masks}, 4)
    share = sum(lengths) / room / len(masks)
    assert f"rows: {len(masks)} of {room} tokens, {share:.1%} of them pages'" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="packed rows hold pages of"):
        rivals.check_rows(job, {"attention_mask": masks[rows:] + masks[:rows]}, 4)


def test_too_few_pages_are_refused_before_anything_runs(tiny_base, pages_folder, tmp_path, capsys):
    flags = ["--base_model", str(tiny_base), "--pages", str(pages_folder), "--out", str(tmp_path / "r.json")]
    with pytest.raises(SystemExit):
        step_speed.read_command_line([*flags, "--steps", "3"])
    assert "has 24 pages, 26 are needed" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# A whole run and its evaluation

LOG = [
    (2.0, "quantisation: none (DeepSpeed shards full-precision weights)"),
    (3.0, "1,000 training and 32 held-out pages in 0.9 s; memory 0.9 GiB"),
    (13.0, "holo1_3b_shapes: 3,754.6 M parameters in 9.9 s; memory 9.0 GiB"),
    (20.0, "step 1/125  loss 12.3046  lr 0.0e+00  3.81 pages/s"),
    (22.0, "step 12/125  loss 12.3046  lr 0.0e+00  3.81 pages/s"),
    (90.0, "step 125/125  loss 9.3046  lr 0.0e+00  3.81 pages/s"),
    (99.0, "after: 32 held-out pages: exact 0.0 %"),
]


def test_a_part_lasts_from_line_to_line_and_one_without_its_line_is_in_the_next():
    found = default_run.seconds_of_parts(LOG, 1.0, 101.5)
    assert [*found.values()] == [1.0, 1.0, 10.0, 7.0, 70.0, 9.0, 2.5]
    assert {*default_run.PARTS} - {*found} == {"rehearsal", "saving"}
    assert sum(found.values()) == 100.5


@pytest.mark.parametrize("drafts", [True, False])
def test_what_is_dictated_is_written_to_its_end_whatever_the_weights_prefer(tiny_base, monkeypatch, drafts):
    """More pages than slots: some are moved and some slots filled again."""
    recipe = use.Recipe(max_html_tokens=60)
    model, processor = use.load_model(str(tiny_base), recipe)
    pages = [[65 + place] * 5 + [*range(70, 80 + 9 * place)] for place in range(5)]
    monkeypatch.setattr(writing.engine, "Step", writing.engine.Step)  # dictating puts its own there
    kind = dictation.dictating(writing.engine.Engine, lambda request: pages[request.place])
    engine = kind(model, processor, recipe, wanted=2, drafts=drafts)
    shot = Image.new("RGB", (56, 56), "white")
    written = dict(engine.write(use.Request(place, lambda: shot) for place in range(5)))
    assert {request.place: page.raw for request, page in written.items()} == {
        place: processor.tokenizer.decode(ids, skip_special_tokens=True) for place, ids in enumerate(pages)
    }
    assert not any(page.cut_off for page in written.values())
    # Another engine of the same process writes what its own weights prefer.
    own = dict(writing.engine.Engine(model, processor, recipe, wanted=1).write([(use.Request(0, lambda: shot))]))
    assert [page.raw for page in own.values()] != [written[request].raw for request in written if request.place == 0]


# -----------------------------------------------------------------------------
# The whole


@pytest.mark.first
@pytest.mark.slow
def test_all_ways_train_the_same_pages_from_the_same_weights(tiny_base, pages_folder, tmp_path):
    ways = ["ours", "plain", *["trl"] * (importlib.util.find_spec("trl") is not None)]
    if "trl" not in ways:
        print("trl is not installed, and its way is not tested")
    out = tmp_path / "results" / "tiny.json"
    flags = {"base_model": tiny_base, "pages": pages_folder, "out": out, "ways": ",".join(ways), "steps": 2}
    flags |= {"pages_per_step": 4, "max_pixels": 280 * 280, "max_html_tokens": 120, "work": tmp_path / "work"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = run_script(str(ROOT / "benchmarks" / "step_speed.py"), *words, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, output(done)
    results = json.loads(out.read_text())
    assert [(way, row["ended"], row["steps_seen"]) for way, row in results["ways"].items()] == [
        (way, "all steps", 2) for way in ways
    ], output(done)
    assert all(row["pages_per_second"] > 0 and row["peak_gib"] > 0 for row in results["ways"].values())
    losses = {way: [step["loss"] for step in row["steps"]] for way, row in results["ways"].items()}
    if results["first_step_comparable"]:
        assert losses["plain"] == pytest.approx(losses["ours"], abs=1e-4)
        # One token more per page, of some forty here: near, not equal.
        assert losses.get("trl", losses["ours"]) == pytest.approx(losses["ours"], abs=1e-2)
    assert step_speed.table(results) in done.stdout


# -----------------------------------------------------------------------------
# make_pages.py


def test_pages_for_its_speed_have_the_sizes_of_real_ones(tmp_path):
    files = sorted(make_pages_speed.write_real_sizes(tmp_path / "pages", 43).iterdir())
    tokens = sorted(tokens for _, _, tokens in SIZES["width_height_html_tokens"])
    lengths = sorted(len(file.read_text()) // 4 for file in files)
    assert all(0.9 * wanted < length <= wanted for length, wanted in zip(lengths, tokens, strict=True))


@pytest.mark.slow
def test_make_pages_is_measured_by_its_real_main(tmp_path):
    need_browser()
    small = make_pages_speed.write_small(tmp_path / "small", 3)
    run = make_pages_speed.measure(small, tmp_path / "out", 1, make_pages_speed.SMALL, marks=(1,))
    assert run.pages == 3 and run.line.startswith("3 asked, 3 written") and 0 < run.pages_per_second < 100
    assert 20 < run.parent_peak_mib < 100 < run.worker_peak_mib + 60
    shown = make_pages_speed.table([run, run], run)
    assert f"| 1 | 3 | {run.seconds:.1f} | {run.pages_per_second:.2f} | 1.00 |" in shown
    assert "MiB each after" in shown and min(run.parent_mib_at.values()) > 20


# -----------------------------------------------------------------------------
# Writing


def test_tokens_are_held_against_the_plain_model_as_they_were_chosen(tiny_base, monkeypatch):
    """In fp32 each is the best one, under a penalty by the logits that have it; watching ends no page, and is timed."""
    recipe = use.Recipe(prompt="write", max_html_tokens=24, max_pixels=140 * 140)
    model, processor = use.load_model(str(tiny_base), recipe)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(10)  # as they are made, all answers are the same
    punished = use.Recipe(**{**vars(recipe), "repetition_penalty": 1.3})
    for asked in (recipe, punished):
        found = write_speed.hold_against_plain(model, processor, asked, 2, 24, drafts=False)
        assert found["argmax"] == 1 and found["tokens"] > 24 and found["most_behind_in_roundings"] == 0
    found, real = write_speed.hold_against_fp32(model, processor, recipe, 3, 24), write_speed.dictated_logits
    assert found["engine_argmax_of_fp32"] == found["plain_argmax_of_fp32"] == 1 and found["tokens"] > 24
    assert found["plain_to_fp32"] == 0 and found["engine_to_fp32"] == found["engine_to_plain"] < 1e-5
    worse = lambda *given: [1.25 * logits for logits in real(*given)]  # noqa: E731
    monkeypatch.setattr(write_speed, "dictated_logits", worse)
    assert write_speed.hold_against_fp32(model, processor, recipe, 1, 24)["engine_to_fp32"] == pytest.approx(0.25, 1e-3)
    monkeypatch.setattr(write_speed, "processed", lambda logits, *unused: logits)
    assert write_speed.hold_against_plain(model, processor, punished, 2, 24, drafts=False)["argmax"] < 1
    pages = write_speed.pages_like_real(processor.tokenizer, 2, 300)
    found = write_speed.with_endings(model, processor, recipe, [write_speed.noise(0)] * 2, pages)
    assert found["would_have_ended"] == 0 and 0 < found["with_over_without"] < float("inf")  # of two times by the clock


@pytest.mark.slow
def test_tiles_are_proved_in_processes_of_their_own_and_wrong_ones_tried_no_more(tiny_base, monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    right, wrong = (64, 32, 4, 3, 1), (64, 24, 4, 3, 1)  # no power of two
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # of the processes, which have not read it yet
    tried = {
        kind: {16: [right, wrong] if kind == "down" else [right]} for kind in ("qkv", "out", "gated", "down", "head")
    }
    monkeypatch.setattr(write_speed, "BROAD", tried)
    model, _ = use.load_model(str(tiny_base), use.Recipe())
    found = write_speed.compile_beside(model.half(), [8])
    assert len(found) == 9, "what is added is scaled for the norm that follows, or not"
    assert all((way == "plain") == (str(right) in name) for name, way in found.items()), found
    assert all(tiles == {16: [right]} for tiles in tried.values())


def test_tuning_leaves_the_fastest_tile_and_says_what_it_saves_in_a_layer(monkeypatch):
    """A tile that fails is told as one, and attention goes back to what was the fastest of all that was tried."""
    from kernels import skinny_products as skinny
    from kernels import slot_attention

    monkeypatch.setattr(skinny, "TILES", {kind: dict(tiles) for kind, tiles in skinny.TILES.items()})
    monkeypatch.setattr(slot_attention, "SHAPES", dict(slot_attention.SHAPES))
    monkeypatch.setattr(slot_attention, "PROGRAMS", slot_attention.PROGRAMS)
    fastest, failing = skinny.Broad(128, 512, 8, 1, 4), skinny.Broad(64, 128, 4, 3, 6)

    def step_ms(engine, slots, spread=0.0):
        skinny.tile_of("another", torch.zeros(8, 32), torch.zeros(16, 32), parts=1, biased=True)  # as a step asks
        tile = skinny.TILES["qkv"][64]
        if tile == failing:
            raise RuntimeError("out of resource: shared memory")
        if slot_attention.SHAPES[1] == (64, 8, 5):
            raise RuntimeError("no such")
        wide = 4 * slots == slot_attention.PROGRAMS and slot_attention.SHAPES[2] == (64, 8, 3)
        return {None: 5.0, fastest: 4.0}.get(tile, 4.5) - 0.5 * wide + spread

    monkeypatch.setattr(write_speed, "step_ms", step_ms)
    mixer = SimpleNamespace(takes_back=True, fewer=2)
    engine = SimpleNamespace(captured=SimpleNamespace(layers=[SimpleNamespace(mixer=mixer)] * 10))
    found = write_speed.tune(engine, 64, narrow=False)
    assert skinny.TILES["qkv"][64] == fastest and json.dumps(failing) not in found["qkv"]
    assert found["qkv"]["failed"] == {json.dumps(failing): "RuntimeError: out of resource: shared memory"}
    assert found["down"]["failed"] == {}
    assert next(iter(found["qkv"].values())) == {"step_ms": 4.0, "us_a_layer_under_torch": 100.0}
    assert found["qkv"]["null"]["us_a_layer_under_torch"] == 0
    shapes = write_speed.tune_attention(engine, 64)
    assert next(iter(shapes.items())) == ("2 parts, (64, 8, 3)", {"step_ms": 3.5, "spread_step_ms": 4.0})
    assert slot_attention.PROGRAMS == 256 and shapes.pop("failed") == {"1 parts, (64, 8, 5)": "RuntimeError: no such"}
    assert len(shapes) == len(write_speed.WHOLE_SHAPES)
    monkeypatch.setattr(write_speed, "step_ms", lambda engine, slots, spread=0.0: 2.5)
    assert all(name.startswith(("32 parts", "16 parts", "failed")) for name in write_speed.tune_attention(engine, 1))
    real = skinny.tile_of
    monkeypatch.setattr(write_speed, "step_ms", lambda engine, slots: {}["nothing can be measured"])
    with pytest.raises(KeyError, match="nothing can be measured"):
        write_speed.tune(engine, 64, narrow=False)
    assert skinny.tile_of is real


def test_pages_that_end_by_themselves_are_compared_to_the_byte():
    whole, cut = "<html><head></head><body>a</body></html>", "<html><body>a"
    alone = [
        use.Written(whole, whole, 9, False),
        use.Written(whole, whole, 9, False),
        use.Written(cut, "", 9, True),
    ]
    helped = [alone[0], use.Written(whole, whole + " ", 9, False), use.Written(whole, whole, 9, True, False, 3)]
    found = endings_write.compared(alone, helped, [whole, "b", "c"])
    assert (found["ended_by_themselves"], found["of_these_the_same_to_the_byte"], found["closed"]) == (2, 1, 1)
    assert (found["whole_without"], found["whole_with"], found["exact"], found["tokens"]) == (2, 3, 1, 27)


def test_linear_attention_that_fails_is_told_and_the_torch_way_is_measured_alone(monkeypatch):
    def refuses(*unused):
        raise RuntimeError("upgrade Triton to >= 3.7.1")

    monkeypatch.setattr(linear_attention, "timed", lambda run: (len(run()), 0.5))
    torch_way = {gated_delta.PAGES: {"ms": 7, "gib": 0.5}}
    assert linear_attention.measure(16, (5, 3), "cpu") == {"failed": f"{gated_delta.FLA}: no GPU", **torch_way}
    monkeypatch.setattr(gated_delta, "obstacle", lambda *unused, **also: "")
    monkeypatch.setitem(gated_delta.WAYS, gated_delta.FLA, refuses)
    failed = f"{gated_delta.FLA}: upgrade Triton to >= 3.7.1"
    assert linear_attention.measure(16, (5, 3), "cpu") == {"failed": failed, **torch_way}
    monkeypatch.setitem(gated_delta.WAYS, gated_delta.FLA, gated_delta.page_by_page)
    found = linear_attention.measure(16, (5, 3), "cpu")
    assert found["agrees"] and {*found} == {"errors", "agrees", gated_delta.FLA, gated_delta.PAGES}


def test_a_profile_tells_what_a_gpu_waited_for(monkeypatch, capsys):
    """A kernel launched in time, one behind a copy, one that the CPU launched late, since it loaded it before."""

    def event(kind, name, start, length, number=None, stream=None):
        arguments = {"correlation": number} | ({} if stream is None else {"stream": stream})
        return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": length, "args": arguments}

    events = [
        {"ph": "M", "name": "process_name"},
        event("cuda_runtime", "cudaLaunchKernel", 0, 5, 1),
        event("cuda_runtime", "cudaMemcpyAsync", 6, 5, 2),
        event("cuda_runtime", "cudaLaunchKernel", 12, 5, 3),
        event("cuda_runtime", "cudaDeviceSynchronize", 20, 4_000),
        event("cuda_runtime", "cudaMemsetAsync", 9_000, 4, 4),
        event("cuda_driver", "cuLaunchKernelEx", 9_005, 5, 5),
        event("kernel", "nvjet_sm90_64x8", 10, 1_000, 1, 7),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 20, 3_000, 2, 9),
        event(
            "kernel",
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
            3_010,
            990,
            3,
            7,
        ),
        event("gpu_memset", "Memset (Device)", 9_010, 1, 4, 7),
        event("kernel", "nvjet_sm90_128x8", 9_011, 2_000, 5, 7),
    ]
    found = step_profile.analyse(events)
    assert found == {
        "span_ms": 11.0,
        "busy_ms": 4.0,
        "idle_until_the_cpu_launched_ms": 5.0,
        "idle_otherwise_ms": 2.0,
        "first_uses_ms": 5.0,
        "device_synchronisations_ms": [4.0],
        "kernels_ms": {"products": 3.0, "sums": 1.0, "Memset": 0.0},
    }
    assert step_profile.kind_of("triton_poi_fused_mul_silu_0") == "triton_poi_fused_mul_silu"
    assert step_profile.main() == 2 and "--out" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["step_profile.py", "--out", "found.json"])
    assert step_profile.main() == 2 and "needs a GPU" in capsys.readouterr().err


def test_a_step_of_the_optimizer_is_measured_beside_deepspeeds(monkeypatch):
    """On a CPU by torch's functions, twice; 26 bytes of each of 100,000 numbers in half a ms."""
    taken = []
    monkeypatch.setattr(optimizer_step, "timed", lambda run: (0.5, taken.append(run()) or 0.25))
    found = optimizer_step.measure(100_000, "cpu")
    assert found["largest_difference"] < 1e-7 and found["masters_equal"] > 0.5 and found["weights_equal"] > 0.999
    row = {"ms": 0.5, "gb_s": 5, "gib": 0.25}
    assert [found[name] for name in ("deepspeed", "ours", "torch")] == [row, row, row] and len(taken) == 3


@pytest.mark.parametrize("shape", [(4, 2, 16, True, (9, 9)), (2, 2, 16, False, (4, 4, 1))], ids=["pages", "windows"])
def test_kernels_of_attention_are_measured_and_what_fails_is_told(monkeypatch, shape):
    """A GPU's kernels are played by SDPA, their times by what was run."""

    def refuses(*unused):
        raise RuntimeError("no wgmma here")

    def wrong(query, *rest):  # as flash-attn 4 beta 36 for heads of 80
        return attention.segment_by_segment(0 * query + query.detach(), *rest)

    plays = {attention.VARLEN: attention.segment_by_segment, attention.FLASH: wrong, attention.FLASH_4: refuses}
    for name, kernel in (plays | {attention.WINDOWS: attention.segment_by_segment}).items():
        monkeypatch.setitem(attention.KERNELS, name, kernel)
    monkeypatch.setattr(attention_speed, "timed", lambda run: 4.0 if isinstance(run(), list) else 1.0)
    attention.agrees.cache_clear()
    shape = attention_speed.Shape(*shape)
    with pytest.warns(UserWarning, match="flash-attn differs from torch's"):
        found = {name: attention_speed.measure(name, shape, "cpu") for name in [*plays, attention.WINDOWS]}
    attention.agrees.cache_clear()
    right, bad = found[attention.VARLEN], found[attention.FLASH]
    assert (right["forward_ms"], right["both_ms"]) == (1, 4) and "agrees" not in right
    assert all(0 < error < 0.01 for error in right["errors"].values())
    assert bad["errors"]["values"] < 0.01 and bad["errors"]["to queries"] == 1 and bad["agrees"] is False
    assert found[attention.FLASH_4] == {"failed": "RuntimeError: no wgmma here"}
    windows = found[attention.WINDOWS]
    assert windows == {} if shape.causal else windows["agrees"] and windows["errors"] == right["errors"]


def test_operations_of_attention_are_those_of_its_two_products():
    shape = attention_speed.Shape(3, 1, 16, False, (5, 2))
    assert shape.operations() == sum(2 * 2 * length * length * 16 * 3 for length in (5, 2))
    assert shape._replace(causal=True).operations() * 2 == shape.operations()


# -----------------------------------------------------------------------------
# Text without a pixel


def test_text_without_a_pixel_is_counted_to_the_character():
    need_browser()
    ghost = len(GHOST.replace(" ", ""))
    unseen = {
        "covered": 2 * ghost,
        "transparent in a sentence": ghost,
        "right of the page": ghost,
        "closed details": 3 * ghost,
    }
    with Renderer(1, 60.0) as renderer:
        facts, image = unseen_text.measure(document(unseen), 1280, 720, renderer)
        assert facts["unseen"] == sum(unseen.values()) and image.shape == (720, 1280, 3)
        facts, _ = unseen_text.measure(
            document(["shadow", "stroke", "gradient", "drawing", "emoji"]), 1280, 720, renderer
        )
        assert facts["unseen"] == 0 < facts["characters"]


def test_without_a_gpu_no_speed_of_an_optimizer_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["optimizer_speed.py", "--out", str(tmp_path / "told.json")])
    with pytest.raises(SystemExit, match="there is no GPU"):
        optimizer_speed.main()
    assert not list(tmp_path.iterdir())
