"""Scoring: blocks by rendering, their matching, the proof before every run, comparisons, the command line."""

import difflib
import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from scipy.optimize import linear_sum_assignment

import page_scores as scores
from page_scores import Block, Pair
from scoring import renders

WHITE = "<!DOCTYPE html>\n<html><head><title>t</title></head><body>{}</body></html>\n"


@pytest.fixture(scope="module")
def renderer():
    try:
        renders.find_chromium()
    except renders.BrowserMissing as error:
        pytest.skip(str(error))
    with renders.Renderer() as renderer:
        yield renderer


class Recorded:
    """The renders of the proof's pages, taken once: what is planted below is in the scorer, not in the browser."""

    def __init__(self, renderer):
        self.renderer, self.known = renderer, {}

    def map(self, jobs):
        for job in jobs:
            if job not in self.known:
                self.known[job] = self.renderer.render(job)
            yield self.known[job]


@pytest.fixture(scope="module")
def recorded(renderer):
    return Recorded(renderer)


# -----------------------------------------------------------------------------
# Blocks


def test_a_block_is_where_its_text_is_and_has_its_colour(renderer):
    body = (
        '<p style="position:absolute;left:100px;top:200px;margin:0;color:#f00">Hello</p>'
        '<div style="position:absolute;left:0;top:400px;background:#000;color:#0f0">Second <b>text</b></div>'
    )
    page = scores.page_of(renderer.render(scores.job_for(WHITE.format(body), 1000, 500)))
    assert [block.text for block in page.blocks] == ["hello", "second", "text"]
    first = page.blocks[0]
    assert first.x == pytest.approx(0.1, abs=0.003) and first.y == pytest.approx(0.405, abs=0.02)
    assert first.color[0] > 200 and max(first.color[1:]) < 120
    assert page.blocks[1].color[1] > 100 > page.blocks[1].color[0]
    assert {"html(head, body)", "div(b)"} <= page.subtrees


def test_texts_of_one_element_are_one_block_and_unseen_text_is_none(renderer):
    body = "<p>one <br> two</p><script>three</script><style>p{}</style><p style='display:none'>four</p>five"
    page = scores.page_of(renderer.render(scores.job_for(WHITE.format(body))))
    assert [block.text for block in page.blocks] == ["one two"], "text directly in the body is not seen, by definition"


def test_a_forms_field_cannot_stand_in_for_the_document(renderer):
    fields = "".join(f"<input name={name}>" for name in ("style", "parentNode", "children", "body", "querySelectorAll"))
    body = f"<form name=body><p>inside</p>{fields}</form><img name=querySelectorAll><form name=createTreeWalker></form>"
    page = scores.page_of(renderer.render(scores.job_for(WHITE.format(body))))
    assert page.failure is None and [block.text for block in page.blocks] == ["inside"]


def test_more_texts_than_colours_are_told_apart(renderer):
    body = "<div style='font:bold 14px sans-serif'>" + "".join(f"<span>{n}</span> " for n in range(4200)) + "</div>"
    job = scores.job_for(WHITE.format(body))
    assert sum(step == renders.SHOT for step in job.steps) == 5
    page = scores.page_of(renderer.render(job))
    assert len(page.blocks) > 4100


def test_texts_that_cannot_be_told_apart_are_a_failure_and_not_forgotten(renderer):
    """Browsers repeat formatting that is left open in each paragraph: 1,504 tags become 6,004 elements."""
    html = WHITE.format("<p><b class=a><b class=b><b class=c>0" + "".join(f"<p>{n}" for n in range(1, 1501)))
    page = scores.page_of(renderer.render(scores.job_for(html)))
    assert "text elements, more than colours" in page.failure
    assert scores.compare(page, page, html).overall == 0


# -----------------------------------------------------------------------------
# Matching


def words(rng: random.Random) -> str:
    return " ".join(rng.choice("home about news price cart login help more".split()) for _ in range(rng.randint(1, 4)))


def blocks(rng: random.Random, count: int) -> list[Block]:
    return [
        Block(words(rng), *(rng.random() / 2 for _ in range(4)), tuple(rng.randrange(256) for _ in range(3)))
        for _ in range(count)
    ]


def matched_by_definition(first: list[Block], second: list[Block]):
    """Everything worked out anew at every step, as the definition reads."""

    def ratio(one, two):
        return difflib.SequenceMatcher(None, one.text, two.text).ratio()

    def costs(first, second):
        return np.array([[-ratio(one, two) for two in second] for one in first])

    def current(first, second):
        table = costs(first, second)
        return table[linear_sum_assignment(table)].tolist()

    def better(old, new):
        one, two = Counter(old), Counter(new)
        for value in set(old) & set(new):
            common = min(one[value], two[value])
            one[value] -= common
            two[value] -= common
        one, two = list(one.elements()), list(two.elements())
        means = [sum(values) / len(values) if values else 0 for values in (one, two)]
        return means[0] - means[1] if means[0] <= means[1] or min(one) > min(two) else 0.0

    def merge_pass(blocks, evaluate):
        start, found = evaluate(blocks), []
        for n in range(len(blocks) - 1):
            changed = [*blocks[:n], scores.merged(blocks[n], blocks[n + 1]), *blocks[n + 2 :]]
            gain = better(start, evaluate(changed))
            if gain > 0.05:
                found.append([n, gain])
        found.sort(key=lambda item: item[1], reverse=True)
        gone = set()
        while found:
            n = found.pop(0)[0]
            blocks = [*blocks[:n], scores.merged(blocks[n], blocks[n + 1]), *blocks[n + 1 :]]
            gone.add(n + 1)
            found = [item for item in found if not {item[0], item[0] + 1} & {n, n + 1}]
        return [block for n, block in enumerate(blocks) if n not in gone]

    while True:
        sizes = len(first), len(second)
        first = merge_pass(first, lambda blocks, second=second: current(blocks, second))
        second = merge_pass(second, lambda blocks, first=first: current(first, blocks))
        if (len(first), len(second)) == sizes:
            return first, second


def test_the_merge_search_gives_what_the_definition_gives(monkeypatch):
    ruled_out, real = [], scores.Bound.rules_out
    monkeypatch.setattr(scores.Bound, "rules_out", lambda *a: ruled_out.append(real(*a)) or ruled_out[-1])
    for seed in range(200):
        rng = random.Random(seed)
        one = blocks(rng, rng.randint(1, 9))
        two = [replace(block) for block in one if rng.random() < 0.8] + blocks(rng, rng.randint(0, 3))
        if len(two) > 1 and rng.random() < 0.7:  # what one page has in two blocks the other has in one
            place = rng.randrange(len(two) - 1)
            two[place : place + 2] = [scores.merged(two[place], two[place + 1])]
        if not two:
            continue
        one, two = (one, two) if seed % 2 else (two, one)
        first, second, pairs = scores.match(one, two)
        assert (first, second) == matched_by_definition(one, two), seed
        assert all(similarity >= 0.5 for *_, similarity in pairs)
    assert 100 < sum(ruled_out) < len(ruled_out), "merges that cannot gain are told without solving"


def test_neighbours_that_match_make_a_pair_dearer():
    costs = np.array([[-0.9, -0.1, 0.0], [0.0, -0.6, -0.2], [0.0, -0.4, -0.5]])
    wanted = costs.copy()
    wanted[0, 0] += 0.1 * (-0.6 - 0.1)
    wanted[1, 1] += 0.1 * (-0.9 - 0.5)
    assert scores.with_context(costs) == pytest.approx(wanted), "-0.5 itself gets no bonus"


def test_colours_differ_by_ciede2000():
    pairs = [((0, 0, 0), (0, 0, 0)), ((255, 255, 255), (0, 0, 0)), ((50, 100, 150), (50, 100, 160))]
    same, opposite, near = scores.color_likeness(pairs)
    assert same == 1 and opposite == pytest.approx(0, abs=1e-6) and 0.95 < near < 1


def test_without_a_match_all_four_are_0(renderer):
    some = blocks(random.Random(1), 3)
    for one, two in (([], []), ([], some), (some, [])):
        assert scores.block_scores(one, two)["overall"] == scores.block_scores(one, two)["likeness"] == 0
    nothing = scores.score("<!DOCTYPE html><html><body>No element of texts</body></html>", "", renderer)
    assert nothing.overall == nothing.likeness == 0 and nothing.causes == ("no text to compare",)


# -----------------------------------------------------------------------------
# CLIP


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory) -> str:
    """CLIP's true architecture with random weights: the real ones are 600 MB and on the Hub."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=small, vision_config=small, projection_dim=16)).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return str(folder)


def test_clip_does_not_see_texts_but_what_is_around_them(renderer, tiny_clip):
    import torch
    from transformers import CLIPImageProcessor, CLIPModel

    clip = scores.Clip(tiny_clip)
    page = "<!DOCTYPE html><html><body style='background:#fff'><p>{}</p><div style='{}'></div></body></html>"
    shape = "width:600px;height:400px;background:#c33"
    jobs = [scores.job_for(page.format(*parts)) for parts in (("One", shape), ("Two", shape), ("One", ""))]
    one, two, empty = map(scores.page_of, renderer.map(jobs))
    assert clip(one, one) == pytest.approx(1, abs=1e-6)
    assert clip(one, empty) < clip(one, two)
    assert np.asarray(clip.without_texts(one)).shape == (720, 720, 3)
    inked, left = empty.image.min(axis=2) < 200, np.asarray(clip.without_texts(empty)).min(axis=2) < 200
    assert inked.sum() > 50 and left.sum() <= inked.sum() / 5, "the text is painted over"
    with torch.no_grad():  # the library's own way, on the same pictures
        processor, model = CLIPImageProcessor.from_pretrained(tiny_clip), CLIPModel.from_pretrained(tiny_clip).eval()
        inputs = processor(images=[clip.without_texts(page) for page in (one, empty)], return_tensors="pt")
        features = model.get_image_features(**inputs)
        features = features if torch.is_tensor(features) else features.pooler_output
    wanted = torch.nn.functional.cosine_similarity(*features, dim=0)
    assert clip(one, empty) == pytest.approx(float(wanted), abs=1e-5)


def test_clip_is_a_fifth_of_the_mean_and_its_absence_is_said(recorded, tiny_clip, tmp_path, monkeypatch, capsys):
    assert "hf download nobody/nothing" in scores.find_clip("nobody/nothing")[1]
    clip = scores.Clip(tiny_clip)
    found = scores.prove(recorded, clip=clip)["6 moved"]
    four = [getattr(found, name) for name in ("block", "text", "position", "color")]
    assert found.overall == pytest.approx((sum(four) + found.clip) / 5) and found.as_json()["clip"] == found.clip
    assert "clip" not in scores.prove(recorded)["6 moved"].as_json()
    rows = [found.as_json() | {"page": "a"}, scores.prove(recorded, clip=clip)["not rendered"].as_json()]
    assert scores.means(rows)["clip"] == pytest.approx(found.clip / 2)
    (tmp_path / "a.html").write_text("<!DOCTYPE html><html><body><p>A</p></body></html>")
    pair = [str(tmp_path / "a.html")] * 2
    assert scores.main([*pair, "--clip", tiny_clip, "--json", "-"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["clip"] == pytest.approx(1) and f"CLIP: {tiny_clip}" in told.err
    monkeypatch.setattr(scores, "CLIP_MODEL", "nobody/nothing")
    assert scores.main([*pair, "--clip", str(tmp_path)]) == 2
    assert "not at hand" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# Proof


def test_the_scorer_proves_itself(recorded):
    found = scores.prove(recorded)
    assert found["itself"].overall == 1 and found["not rendered"].overall == 0


def white_instead_of_failure(compare):
    def planted(reference, prediction, *more):
        blank = scores.Page(np.full((480, 640, 3), 255, np.uint8))
        return compare(*(blank if page.failure else page for page in (reference, prediction)), *more)

    return planted


def without_unmatched(match):
    def planted(prediction, reference):
        _, _, pairs = match(prediction, reference)
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs], pairs

    return planted


PLANTED = {  # what is broken: (where, how, what the proof says)
    "colours are never compared": ("color_likeness", lambda _: lambda pairs: [1.0] * len(pairs), "color does not fall"),
    "blocks that match nothing are forgotten": ("match", without_unmatched, "block does not fall"),
    "texts are alike, whatever they say": (
        "Similarity.cost",
        lambda _: lambda self, text, column: -1.0,
        "text does not fall",
    ),
    "positions are all the same": (
        "Block.center",
        lambda _: property(lambda self: (0.5, 0.5)),
        "position does not fall",
    ),
    "a failed render is a white page": ("compare", white_instead_of_failure, "of a failed render is not 0"),
    "blocks are lost": ("blocks_of", lambda real: lambda *a: real(*a)[:5], "texts give another number of blocks"),
    "pictures are never compared": (
        "ssim",
        lambda _: lambda one, two: 1.0,
        "ssim of a failed render|ssim does not fall",
    ),
    "colours are the recoloured page's": (
        "blocks_of",
        lambda real: lambda image, first, second, texts: real(first, first, second, texts),
        "color does not fall",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_broken_in_the_scorer_stops_it(name, recorded, monkeypatch):
    where, plant, says = PLANTED[name]
    owner, _, attribute = where.rpartition(".")
    owner = getattr(scores, owner) if owner else scores
    monkeypatch.setattr(owner, attribute, plant(owner.__dict__[attribute]))
    with pytest.raises(scores.ScorerError, match=says):
        scores.prove(recorded)


# -----------------------------------------------------------------------------
# Comparison


def test_a_clear_difference_is_significant_and_none_is_not():
    rng = random.Random(0)
    before = [rng.random() * 0.5 for _ in range(40)]
    better = scores.paired_comparison(before, [value + 0.2 + rng.random() * 0.1 for value in before])
    assert better["low"] < better["difference"] < better["high"] and better["low"] > 0.2 and better["p"] < 0.001
    same = scores.paired_comparison(before, before)
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
    noise = scores.paired_comparison(before, [value + rng.uniform(-0.2, 0.2) for value in before])
    assert noise["low"] < 0 < noise["high"] and noise["p"] > 0.05
    with pytest.raises(ValueError, match="1 scores before and 2 after"):
        scores.paired_comparison([1], [1, 2])


def test_failures_count_as_zero_and_are_named():
    good = {"page": "a", "failure": None, "valid": True, "causes": (), **dict.fromkeys(scores.METRICS, 0.8)}
    bad = {
        "page": "b",
        "failure": "took over 15 s",
        "valid": False,
        "causes": ("not rendered",),
        **dict.fromkeys(scores.METRICS, 0.0),
    }
    found = scores.means([good, bad])
    assert (found["n"], found["failures"], found["failed"]) == (2, 1, ["b"])
    assert (found["block"], found["block_without_failures"]) == (0.4, 0.8)
    shares = scores.shares([good, bad])
    assert shares == {"valid": 0.5, "not rendered": 0.5}
    assert "50.0 % valid, 1 failures, counted as 0: block 0.400" in scores.summary_line(found | shares)


# -----------------------------------------------------------------------------
# Many pages


def test_pages_are_scored_in_order_and_a_failure_does_not_stop_the_others(renderer):
    wide = WHITE.format("<p>Hello</p>")
    pairs = [Pair("same", wide, wide), Pair("none", wide, None), Pair("other", wide, WHITE.format("<p>Bye</p>"))]
    found = [(pair.name, score) for pair, score, *_ in scores.score_pairs(pairs, renderer)]
    assert [name for name, _ in found] == ["same", "none", "other"]
    assert found[0][1].overall == 1
    assert found[1][1].failure == "the written page: there is none" and found[1][1].overall == 0
    assert found[2][1].overall == 0 and found[2][1].missing and found[2][1].invented


def test_an_interrupted_run_goes_on_where_it_was(renderer, tmp_path):
    pairs = [Pair(str(n), WHITE.format(f"<p>{n}</p>"), WHITE.format(f"<p>{n}</p>")) for n in range(4)]
    first = scores.run_pairs(pairs[:2], renderer, scores.Progress(tmp_path / "p", pictures=True))
    with (tmp_path / "p" / "scores.jsonl").open("a") as file:
        file.write('{"key": "torn')

    class Counted:
        jobs = 0

        def map(self, jobs):
            for job in jobs:
                Counted.jobs += 1
                yield renderer.render(job)

    again = scores.Progress(tmp_path / "p", pictures=True)
    found = scores.run_pairs(pairs, Counted(), again)
    assert Counted.jobs == 4, "two pages of two renders each"
    assert found[:2] == first and [row["page"] for row in found] == ["0", "1", "2", "3"]
    assert again.picture(pairs[0].key, "written").is_file()
    again.forget()
    assert not (tmp_path / "p").exists()


def run_scores(*arguments, cwd):
    command = [sys.executable, str(ROOT / "page_scores.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200)


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
    assert "2 pages, 50.0 % valid, 1 failures" in done.stderr
    report = (tmp_path / "out" / "r.html").read_text()
    assert report.rstrip().endswith("</html>") and "there is none" in report
    assert not list(tmp_path.glob("**/*.partial"))


def test_arguments_that_cannot_work_are_refused(tmp_path):
    (tmp_path / "a.html").write_text("x")
    (tmp_path / "empty").mkdir()
    for arguments, says in (
        (("nowhere.html", "a.html"), "nowhere.html: no such file"),
        (("a.html",), "give a reference and a prediction"),
        (("a.html", "empty"), "two files, or two folders"),
        (("empty",), "no pages there"),
    ):
        done = run_scores(*arguments, cwd=tmp_path)
        assert done.returncode == 2 and says in done.stderr
