"""Evaluation: the model is judged by the weights that are saved, through the functions that users run."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_pages

import use_model_from_hub as use
from scoring.many_pages import Progress, run_pairs
from scoring.metrics import CHOOSING
from scoring.renders import marked
from training import evaluation
from training.base_model import base_tensors
from training.errors import DataError, StoppedError, exit_code
from training.evaluation import (
    Parts,
    Rendering,
    failure_of_another,
    keep_outputs,
    parts_of,
    score_held_out,
    write_held_out,
)
from training.final_folder import save_final, whole_copy
from training.results import compare_results
from training.settings import PageSettings

ROW = {"raw": "", "tokens": 10, "seconds": 2.0, "cut_off": False}
PAGE = "<!DOCTYPE html>\n<html><head><title>{0}</title></head><body><p>{0}</p></body></html>"


def rows_and_pages(written: list[str], wanted: list[str], **changes):
    rows = [{**ROW, "html": html, "raw": html, "place": place, **changes} for place, html in enumerate(written)]
    pages = [{"name": f"{place}.png", "html": html, "html_tokens": 12} for place, html in enumerate(wanted)]
    return rows, pages


def test_shares_are_counted_over_all_pages():
    wanted = [PAGE.format(word) for word in ("river", "stone", "lake", "maple")]
    written = [wanted[0], wanted[1].replace("\n", "   \n"), "<html><body>open", ""]
    result = score_held_out(*rows_and_pages(written, wanted))
    assert (result["n"], result["exact"], result["valid"]) == (4, 0.5, 0.5)
    assert result["shuffled_exact"] == 0
    assert result["tokens_per_second"] == 20
    assert [page["exact"] for page in result["pages"]] == [True, True, False, False]


def test_a_model_that_ignores_the_screenshot_shows_in_the_shuffled_share():
    same = [PAGE.format("river")] * 3
    assert score_held_out(*rows_and_pages(same, same))["shuffled_exact"] == 1


def test_a_page_that_was_cut_off_is_not_valid():
    page = [PAGE.format("river")]
    result = score_held_out(*rows_and_pages(page, page, cut_off=True))
    assert (result["valid"], result["truncated"], result["pages"][0]["reason"]) == (0, 1, "cut off")


@pytest.fixture(scope="module")
def loaded(tiny_base):
    return use.load_model(str(tiny_base), use.Recipe(max_pixels=280 * 280))


def test_evaluation_uses_the_very_weights_that_saving_writes(tiny_base, tmp_path, loaded):
    """A model in fp32 with changes too small for bf16: the copy equals what a user loads, not what trains."""
    settings = PageSettings(base_model=str(tiny_base), max_pixels=280 * 280)
    plan = base_tensors(tiny_base, settings)
    model, processor = use.load_model(str(tiny_base), use.Recipe(max_pixels=280 * 280))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    folder = tmp_path / "final"
    save_final(model, plan, tiny_base, processor, {"trust_remote_code": False}, folder)
    copy = whole_copy(model, plan, tiny_base, settings, torch.device("cpu"))
    reloaded, _ = use.load_model(str(folder), use.Recipe())
    for (name, first), second in zip(copy.state_dict().items(), reloaded.state_dict().values()):
        assert torch.equal(first, second), name
    from PIL import Image

    inputs = use.encode_questions(processor, [Image.new("RGB", (112, 84), "gold")], "write")
    with torch.no_grad():
        assert torch.equal(copy(**inputs).logits, reloaded(**inputs).logits)


def test_pages_written_together_equal_pages_written_alone(loaded):
    from PIL import Image

    model, processor = loaded
    recipe = use.Recipe(prompt="write", max_html_tokens=12)
    shots = [Image.new("RGB", size, "pink") for size in ((84, 84), (140, 84), (84, 196))]
    together = use.write_pages(model, processor, shots, recipe)
    alone = [use.write_pages(model, processor, [shot], recipe)[0] for shot in shots]
    assert [page.raw for page in together] == [page.raw for page in alone]
    assert [page.cut_off for page in together] == [True] * 3 and [page.tokens for page in together] == [12] * 3


def test_generation_halves_its_batch_when_memory_runs_out(loaded, tmp_path, monkeypatch):
    import datasets

    model, processor = loaded
    folder = make_pages(tmp_path / "pages", 5)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pages = [{"screenshot": (folder / row["file_name"]).read_bytes(), "html": row["text"]} for row in rows]
    real, sizes = use.write_pages, []

    def limited(model, processor, screenshots, recipe, *options):
        sizes.append(len(screenshots))
        if len(screenshots) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, processor, screenshots, recipe, *options)

    monkeypatch.setattr(use, "write_pages", limited)
    recipe = use.Recipe(max_html_tokens=4)
    rows = write_held_out(model, processor, datasets.Dataset.from_list(pages), recipe, batch=4)
    assert [row["place"] for row in rows] == [0, 1, 2, 3, 4]
    assert sizes == [4, 2, 1, 1, 1, 1, 1]


def test_a_page_that_was_rendered_is_a_place_to_stop(monkeypatch):
    kept = []
    monkeypatch.setattr(Progress, "keep", lambda self, *given: kept.append(given))
    progress, asked = evaluation.MarkedProgress(None, pictures=False), SimpleNamespace(wanted=False)
    monkeypatch.setattr(evaluation, "stop", asked)
    progress.keep("one")
    asked.wanted = True
    with pytest.raises(StoppedError):
        progress.keep("two")
    assert kept == [("one",), ("two",)]


def test_the_pages_that_choose_the_weights_do_not_compare_them():
    """The best of several evaluations is too good by chance, on the pages that chose it."""
    wanted = [PAGE.format(word) for word in ("river", "stone", "lake", "maple", "coral")]
    rows, pages = rows_and_pages([*wanted[:4], "<p>"], wanted)
    scores = [{"page": str(place), CHOOSING: score} for place, score in enumerate((0.1, 0.9, 0.2, 0.7, 0.6))]
    parts = parts_of(5, weights_are_chosen=True)
    assert (parts.choosing, parts.comparing, parts.apart) == ((0, 2, 4), (1, 3), True)
    result = score_held_out(rows, pages, scores, parts)
    assert result["n"] == 2 and result["exact"] == 1 and result[CHOOSING] == pytest.approx(0.8)
    assert result["choosing"] == {"n": 3, CHOOSING: pytest.approx(0.3), "apart": True}
    comparison = compare_results(result, score_held_out(rows, pages, [{**s, CHOOSING: 0.95} for s in scores], parts))
    assert comparison["n"] == 2 and comparison["apart"]
    assert comparison["metrics"][CHOOSING]["before"] == pytest.approx(0.8)


def test_a_single_page_that_both_chooses_and_compares_is_told():
    rows, pages = rows_and_pages([PAGE.format("river")], [PAGE.format("river")])
    parts = parts_of(1, weights_are_chosen=True)
    result = score_held_out(rows, pages, [{"page": "0", CHOOSING: 0.5}], parts)
    assert not parts.apart and result["choosing"] == {"n": 1, CHOOSING: 0.5, "apart": False}
    assert compare_results(result, result)["apart"] is False


def test_without_a_choice_every_page_compares():
    assert parts_of(3, weights_are_chosen=False) == Parts((), (0, 1, 2))


def test_folders_of_pages_that_are_no_more_go(tmp_path, pages_folder):
    picture = next(pages_folder.glob("*.png")).read_bytes()
    rows, pages = rows_and_pages(["<p>a</p>", "<p>b</p>"], ["<p>a</p>", "<p>c</p>"])
    pages = [page | {"screenshot": picture} for page in pages]
    for name in ("page-0002", "page-0003", "page-notes"):
        (tmp_path / name).mkdir()
    keep_outputs(rows, pages, tmp_path, "written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page-0001", "page-0002", "page-notes"]
    assert (tmp_path / "page-0002" / "written.html").read_text() == "<p>b</p>"


def test_without_a_browser_nothing_chooses_and_every_page_compares():
    rows, pages = rows_and_pages(["<p>"] * 4, [PAGE.format("river")] * 4)
    result = score_held_out(rows, pages, None, parts_of(4, weights_are_chosen=True))
    assert result["n"] == 4 and "choosing" not in result and not any("chooses" in page for page in result["pages"])


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory"), 83),
        (MemoryError(), 83),
        (OSError(28, "No space left on device"), 81),
        (DataError("no page can be read"), 80),
        (KeyError("bug"), 1),
    ],
)
def test_another_ranks_failure_keeps_its_exit_code(failure, code):
    error = failure_of_another(3, exit_code(failure), str(failure))
    assert exit_code(error) == code and "rank 3" in str(error) and str(failure) in str(error)


@pytest.mark.slow
def test_pages_are_scored_beside_the_writing(loaded, renderer, tmp_path, monkeypatch):
    """The last page is not written before the first one has been scored."""
    import datasets

    model, processor = loaded
    folder = make_pages(tmp_path / "pages", 3)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pages = [
        {"name": row["file_name"], "screenshot": (folder / row["file_name"]).read_bytes(), "html": row["text"]}
        | {"width": 640, "height": 480, "html_tokens": 9}
        for row in rows
    ]
    pages, rendering, shown, first = datasets.Dataset.from_list(pages), Rendering(tmp_path), [], []
    rendering.proved, open_screenshot = True, use.open_screenshot

    def open_slowly(screenshot):
        shown.append(screenshot)
        assert (rendering.scorers is None) == (len(shown) == 1), "they start once tokens are written"
        while len(shown) == len(pages) and not rendering.scorers.done:
            rendering.scorers.look()
        first.extend(rendering.scorers.done if len(shown) == len(pages) else ())
        return open_screenshot(screenshot)

    monkeypatch.setattr(use, "open_screenshot", open_slowly)
    monkeypatch.setattr(evaluation, "scorers_for", lambda count: 1)
    with rendering.beside("after 1", pages) as scoring:
        rows = write_held_out(model, processor, pages, use.Recipe(max_html_tokens=4), 1, *scoring)
        scorer = rendering.scorers.scorers[0]
    assert first[0][0] == evaluation.pair_of(rows[0], pages[0]).key and len(shown) == 3
    assert first[0][0] in rendering.progress("after 1").rows, "kept before the writing has ended"
    assert rendering.texts == {row["place"]: evaluation.text_scores(row, pages[row["place"]]) for row in rows}
    scores = rendering.score("after 1", rows, pages)
    rendering.ending.join()
    assert rendering.scorers is None and not marked(scorer.mark)
    assert scores == run_pairs(evaluation.pairs_of(rows, pages), renderer, Progress(None, pictures=False))
    assert rendering.facts["browser"].startswith(renderer.version)
    with pytest.raises(StoppedError), rendering.beside("after 2", pages) as (_, begun):
        begun()
        scorer = rendering.scorers.scorers[0]
        raise StoppedError("asked to")
    rendering.ending.join()
    assert rendering.scorers is None and scorer.process.returncode == 0
