"""The command line of the scores: a page, folders, CLIP's weights, and what is refused."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

import page_scores
from scoring.metrics import names

NOTHING_LEFT = {"references_failed": [], "words_in_blocks": None}
WHITE = "<!DOCTYPE html>\n<html><head><title>t</title></head><body>{}</body></html>\n"


def run_scores(*arguments, cwd):
    command = [sys.executable, str(ROOT / "page_scores.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_the_command_line_scores_a_page_or_folders(renderer, tmp_path):
    for folder, body in (("references", "<p>Hello there</p>"), ("predictions", "<p>Hello</p>")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.html").write_text(WHITE.format(body))
    (tmp_path / "references" / "b.html").write_text(WHITE.format("<p>x</p>"))
    done = run_scores("references/a.html", "predictions/a.html", "--json", "-", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wanted = {"block", "text", "position", "color", "overall", "tree_bleu", "ssim", "valid"}
    assert wanted | {"blocks_reference", "blocks_prediction"} <= json.loads(done.stdout).keys()
    done = run_scores("references", "predictions", "--json", "s.json", "--report", "out/r.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "s.json").read_text())
    missing = ("b", "the written page: there is none")
    assert [(row["page"], row["failure"]) for row in found["pages"]] == [("a", None), missing]
    assert found["summary"]["failures"] == 1 and found["summary"]["valid"] == 0.5 and "fonts" in found["facts"]
    assert "2 pages, 50.0 % valid, 1 failure," in done.stderr
    report = (tmp_path / "out" / "r.html").read_text()
    assert report.rstrip().endswith("</html>") and "there is none" in report
    assert not list(tmp_path.glob("**/*.partial"))


def test_arguments_that_cannot_work_are_refused_before_anything_is_rendered(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(page_scores, "Renderer", None)
    for name in ("a.html", "pages/a.html", "pages/b.html", "evaluation/page-0001/reference.html"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "empty").mkdir()
    for arguments, says in (
        (("nowhere.html", "a.html"), "nowhere.html: no such file"),
        (("a.html",), "give a reference and a prediction"),
        (("a.html", "empty"), "two files, or two folders"),
        (("empty",), "no pages there"),
        (("pages", "empty"), "empty: none of its files has the name of a reference (2 looked for, e.g. a.html)"),
        (("evaluation",), "evaluation: none of its 1 page has a written.html"),
    ):
        assert page_scores.main([*arguments]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ") and told.count("\n") == 1 and says in told


@pytest.mark.slow
def test_clip_is_scored_by_the_weights_that_are_named(renderer, tiny_clip, tmp_path, capsys):
    (tmp_path / "a.html").write_text("<!DOCTYPE html><html><body><p>A</p></body></html>")
    pair = [str(tmp_path / "a.html")] * 2
    assert page_scores.main([*pair, "--clip", tiny_clip, "--json", "-"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["clip"] == pytest.approx(1) and f"CLIP: {tiny_clip}" in told.err
    assert page_scores.main([*pair, "--clip", str(tmp_path)]) == 2
    assert "not at hand" in capsys.readouterr().err


def test_what_the_base_wrote_is_found_in_what_a_training_has_left(tmp_path):
    for number in (1, 2):
        place = tmp_path / f"page-000{number}"
        place.mkdir()
        for name in ("reference", "written"):
            (place / f"{name}.html").write_text(name)
    assert page_scores.written_before(tmp_path, 1280) == []
    (place / "written_before.html").write_text("before")
    found = page_scores.written_before(tmp_path, 1280)
    assert [(pair.name, pair.prediction) for pair in found] == [("page-0001", None), ("page-0002", "before")]


def test_the_last_line_names_ten_failed_pages_in_lines_that_a_terminal_shows_whole():
    scores = dict.fromkeys(names(), 0.0) | {f"{metric}_without_failures": None for metric in names()}
    failed = [f"folder--{number}" for number in range(12)]
    told = page_scores.summary_line(scores | {"n": 12, "failures": 12, "failed": failed, "valid": 0.0} | NOTHING_LEFT)
    assert max(map(len, told.split("\n"))) <= 100
    told = " ".join(told.split())
    assert told.startswith("12 pages, 0.0 % valid, 12 failures, ") and told.endswith("folder--9 and 2 more")


@pytest.mark.slow
@pytest.mark.parametrize("place", ("prove", "run_pairs"))
def test_ctrl_c_ends_in_one_line_that_says_how_far_it_came(place, renderer, tmp_path, monkeypatch, capsys):
    """Browsers are sessions of their own, which a terminal does not reach: what comes, comes here."""
    for name in ("a.html", "b.html"):
        (tmp_path / name).write_text(WHITE.format(name))
    real = getattr(page_scores, place)

    def interrupted(first, *more, **options):
        if place == "run_pairs":
            real(first[:1], *more, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(page_scores, place, interrupted)
    assert page_scores.main([str(tmp_path), str(tmp_path), "--json", str(tmp_path / "s.json")]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    kept = f"; the same command goes on with them, kept in {tmp_path / 's.json.partial'}"
    assert last == ("stopped after 0 of 2 pages" if place == "prove" else f"stopped after 1 of 2 pages{kept}")
