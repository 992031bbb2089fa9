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
    pages = [{"name": f"page {n}", "screenshot": screenshot, "html": f"<p>{n}</p>", "html_tokens": 9} for n in range(4)]
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
