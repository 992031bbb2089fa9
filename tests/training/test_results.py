"""What a run has reached: which weights its results speak of."""

import numpy as np
from PIL import Image

import use_model_from_hub as use
from scoring.metrics import CHOOSING, PageScore
from training.evaluation import Parts, Rendering, pairs_of, score_held_out
from training.results import Results


def test_the_chosen_weights_results_become_the_final_ones_and_the_ends_stay_known(tmp_path):
    results = Results(tmp_path, use.Recipe(), pages=[], rendering=None)
    for label, likeness in (("before", 0.1), ("step 1", 0.5), ("after", 0.2)):
        results.add(label, {"likeness": likeness}, [{"html": f"<p>{label}</p>"}])
    assert results.final == "after"
    results.choose("step 1")
    assert results.final == "step 1"
    likenesses = {label: result["likeness"] for label, result in results.by_label.items()}
    assert likenesses == {"before": 0.1, "step 1": 0.5, "after": 0.5, "last": 0.2}
    assert results.rows["after"] == [{"html": "<p>step 1</p>"}] and results.rows["last"] == [{"html": "<p>after</p>"}]


def test_the_report_leaves_out_the_pages_that_chose_the_weights_as_the_results_do(tmp_path):
    """Both tell the mean of the same two pages, and the report shows all four. The scores are given, so that no browser
    is needed."""
    Image.new("RGB", (64, 64)).save(tmp_path / "screenshot.png")
    screenshot = (tmp_path / "screenshot.png").read_bytes()
    shown = {"screenshot": screenshot, "width": 64, "height": 64, "html_tokens": 9}
    pages = [{"name": f"page {n}", "html": f"<p>{n}</p>", **shown} for n in range(4)]
    rows = [
        {"place": n, "html": f"<p>{n}", "raw": f"<p>{n}", "tokens": 8, "cut_off": False, "seconds": 1.0}
        for n in range(4)
    ]
    rendering, recipe = Rendering(tmp_path), use.Recipe()
    progress = rendering.progress(f"after {recipe.repetition_penalty}")
    likenesses = [0.9, 0.2, 0.8, 0.4]
    for pair, likeness in zip(pairs_of(rows, pages), likenesses):
        progress.keep(pair.key, PageScore({CHOOSING: likeness}, valid=True), [np.zeros((64, 64, 3), np.uint8)] * 2)
    rendering.facts = {"browser": "none"}
    scores = [{"page": page["name"], CHOOSING: value} for page, value in zip(pages, likenesses)]
    results = Results(tmp_path, recipe, pages, rendering)
    results.add("after", score_held_out(rows, pages, scores, Parts(choosing=(0, 2), comparing=(1, 3))), rows)
    results.write({"model": "tiny"})
    told, report = results.by_label["after"][CHOOSING], (tmp_path / "report.html").read_text(encoding="utf-8")
    assert abs(told - 0.3) < 1e-9 and f"<dt>likeness</dt><dd>{told:.3f}</dd>" in report
    assert report.count("<article") == 4 and report.count('<li class="chooses">') == 2
    assert "2 of 4 pages chose the weights" in report


def test_the_report_shows_what_the_base_wrote_and_how_the_training_went(tmp_path):
    """The scores are given, so that no browser is needed."""
    Image.new("RGB", (64, 64)).save(tmp_path / "screenshot.png")
    screenshot = (tmp_path / "screenshot.png").read_bytes()
    shown = {"screenshot": screenshot, "width": 64, "height": 64, "html_tokens": 9}
    pages = [{"name": f"page {n}", "html": f"<p>{n}</p>", **shown} for n in range(2)]
    rendering, recipe = Rendering(tmp_path), use.Recipe()
    results = Results(tmp_path, recipe, pages, rendering)
    for label, likeness in (("before", 0.25), ("after", 0.75)):
        rows = [
            {"place": n, "html": f"{label} {n}", "raw": "", "tokens": 8, "cut_off": False, "seconds": 1.0}
            for n in range(2)
        ]
        progress = rendering.progress(f"{label} {recipe.repetition_penalty}")
        for pair in pairs_of(rows, pages):
            picture = np.zeros((64, 64, 3), np.uint8)
            progress.keep(pair.key, PageScore({CHOOSING: likeness}, valid=True), [picture, picture])
        scores = [{"page": page["name"], CHOOSING: likeness} for page in pages]
        results.add(label, score_held_out(rows, pages, scores), rows)
    results.add("step 10", {CHOOSING: 0.5}, [])
    results.losses = [(step, 3 / step) for step in range(1, 21)]
    rendering.facts = {"browser": "none"}
    assert results.evaluations() == [(0, 0.25), (10, 0.5), (20, 0.75)]
    results.write({"model": "tiny"})
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert report.count("<b>Before training</b>") == 2 + 2, "in each card, and on the first screen"
    assert "mean likeness 0.750, 0.250 before training" in report and "before 1</code>" in report
    assert "<title>step 10: 0.500</title>" in report and "Training loss" in report
    assert not [*tmp_path.glob("rendered_*")]


def test_the_last_words_say_where_pages_are_too_few(tmp_path, capsys):
    results = Results(tmp_path, use.Recipe(), pages=[], rendering=None)
    found = {"n": 3, "before": 0.1, "after": 0.5, "difference": 0.4, "low": 0.3, "high": 0.5, "p": 0.25}
    run = {"n": 3, "exact": 0.0, "valid": 1.0, "shuffled_exact": None}
    results.add("before", run, [])
    for count, few in ((3, True), (10, False)):
        results.add("after", run | {"comparison": {"metrics": {CHOOSING: found | {"n": count}}}}, [])
        results.say_difference()
        told = " ".join(capsys.readouterr().out.split())
        assert ("p = 0.2500); 3 pages are too few for it to mean much" in told) == few
