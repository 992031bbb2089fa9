"""benchmarks/server_answers.py: the same small model here and behind the stand-in."""

import json
import sys
from dataclasses import asdict, replace

import pytest
from conftest import ROOT
from fake_openai import FakeOpenAI

import use_model_from_hub as use

sys.path.insert(0, str(ROOT / "benchmarks"))
import server_answers

RECIPE = use.Recipe(max_html_tokens=119)  # of the two pages one ends within them, and one does not


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(folder of the demo's model, folder of two pages). What it writes depends on what it sees."""
    folder, pages = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("pages")
    for path in (ROOT / "demo/tiny_holo1").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / use.RECIPE_FILE).write_text(json.dumps(asdict(RECIPE)))
    for number in range(2):
        (pages / f"{number}.webp").symlink_to(ROOT / f"demo/pages/{number:06d}.html.webp")
    return folder, pages


@pytest.fixture(scope="module")
def loaded(folders):
    """(model, processor, screenshots)"""
    paths = server_answers.pictures_in(folders[1], 8)
    screenshots = [use.open_screenshot(path.read_bytes()) for path in paths]
    return *use.load_model(str(folders[0]), RECIPE), screenshots


def run(folders, server: FakeOpenAI, *more: str) -> int:
    folder, pages = (str(path) for path in folders)
    return server_answers.main(["--model", folder, "--pages", pages, "--server", server.url, *more])


@pytest.mark.slow
def test_the_same_model_gives_the_same_answers_here_and_there(folders, loaded, tmp_path, capsys):
    model, processor, screenshots = loaded
    # In this thread: by the very picture that a request brings.
    answers = {shown.tobytes(): use.write_pages(model, processor, [shown], RECIPE)[0] for shown in screenshots}

    def answer(picture, asked: dict) -> tuple[str, str]:
        assert asked["messages"][0]["content"][1]["text"] == RECIPE.prompt and asked["max_tokens"] == 119
        page = answers[picture.tobytes()]
        return page.raw, "length" if page.cut_off else "stop"

    with FakeOpenAI(answer) as server:
        assert run(folders, server, "--out", str(tmp_path / "out.json")) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    printed = capsys.readouterr().out
    assert [(row["equal"], row["parts_at"]) for row in found["pages"]] == [(True, None)] * 2, printed
    assert found["summary"] == "2 of 2 answers equal; 100.0 % the same from the start"
    assert [row["tokens_here"] for row in found["pages"]] == [119, 115] and "0.webp: equal" in printed


def test_the_first_difference_is_shown_with_its_weight(folders, loaded, capsys):
    model, processor, screenshots = loaded
    start = "<!DOCTYPE html>\n<html><head><style>\nbody{margin:0;font:16px/28px "
    here, there, short = (use.Written(text, text, 9, False) for text in (start + "sans-serif}", start + "<p>", start))
    paths = server_answers.pictures_in(folders[1], 2)
    rows = server_answers.compare(model, processor, RECIPE, paths, [here, here], [there, short])
    assert [(row["equal"], row["parts_at"]) for row in rows] == [(False, len(start))] * 2
    assert all(row["gap"] > 1 for row in rows)  # the model was trained on pages that go on as `here` does
    other_way = server_answers.gap(model, processor, screenshots[0], RECIPE, there.raw, here.raw)
    assert other_way == pytest.approx(-rows[0]["gap"])
    printed = capsys.readouterr().out
    assert f"0.webp: differs, {len(here.raw)} characters here, {len(there.raw)} there, first at character" in printed
    assert f"{rows[0]['gap']:.3f} likelier here" in printed and "28px sans-serif}'" in printed and "<p>'" in printed
    assert server_answers.summary(rows).startswith("0 of 2 answers equal; ")


def test_the_gap_is_that_of_the_models_own_choice(loaded):
    """Teacher-forced behind the answer that the model has written: its own next token is likelier than any other."""
    model, processor, screenshots = loaded
    (page,) = use.write_pages(model, processor, screenshots[:1], replace(RECIPE, max_html_tokens=20))
    for place in (10, 25, len(page.raw) - 1):
        assert server_answers.gap(model, processor, screenshots[0], RECIPE, page.raw, page.raw[:place] + "\u4e2d") > 0


def test_a_page_that_the_server_cuts_off_alone_is_no_equal_answer(folders, capsys):
    here = use.Written("<p>", "<p>", 3, cut_off=False)
    paths = server_answers.pictures_in(folders[1], 1)
    (row,) = server_answers.compare(None, None, RECIPE, paths, [here], [replace(here, cut_off=True)])
    assert not row["equal"] and row["parts_at"] is None and "cut it off there alone" in capsys.readouterr().out


def test_a_page_without_an_answer_ends_it_by_name(folders, capsys):
    with FakeOpenAI(lambda picture, asked: "", chance=lambda name, attempt: "413") as server:
        assert run(folders, server) == 2
    assert ".webp: the server refuses it: 413" in capsys.readouterr().err
