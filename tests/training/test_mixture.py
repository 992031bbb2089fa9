"""The datasets of a run: their shares, their columns, whose turn it is; what cannot be meant is refused by name."""

import json
import random
from types import SimpleNamespace

import pytest
from conftest import make_pages, small_run, start_plain, start_torchrun

from training.collecting import load_pages_from_disk
from training.mixture import FLAGS, Turns, asked_datasets, dealt_out, split_share
from training.settings import Machine, find_problems, resolve


def asked(*datasets: str, **flags: list[str]):
    return asked_datasets(SimpleNamespace(dataset=list(datasets), **(dict.fromkeys(FLAGS) | flags)))


@pytest.mark.parametrize(
    ("text", "name", "share"),
    [
        ("A/B:0.7", "A/B", "0.7"),
        ("A/B:70%", "A/B", "70%"),
        ("./pages:1", "./pages", "1"),
        ("A/B", "A/B", ""),
        ("C:\\pages", "C:\\pages", ""),
        ("C:\\pages:.5", "C:\\pages", ".5"),
        ("./a:b", "./a:b", ""),
        ("a:0.5:0.25", "a:0.5", "0.25"),
        ("hf://datasets/a/b@v1:x", "hf://datasets/a/b@v1:x", ""),
        (":0.7", ":0.7", ""),
    ],
)
def test_a_number_behind_the_last_colon_is_a_share(text, name, share):
    assert split_share(text) == (name, share)


def test_what_exists_by_its_whole_name_is_that(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "at_12:30").mkdir()
    assert split_share("at_12:30") == ("at_12:30", "") and split_share("at_12:30:0.5") == ("at_12:30", "0.5")


@pytest.mark.parametrize(
    ("datasets", "shares"),
    [
        (["a/b"], [1]),
        (["a/b", "c/d"], [0.5, 0.5]),
        (["a/b:0.7", "c/d"], [0.7, 0.3]),
        (["a/b:70%", "c/d:30%"], [0.7, 0.3]),
        (["a/b:0.33", "c/d:0.33", "e/f:0.33"], [1 / 3, 1 / 3, 1 / 3]),
        (["a/b:0.5", "c/d", "e/f"], [0.5, 0.25, 0.25]),
    ],
)
def test_shares(datasets, shares):
    assert [each.share for each in asked(*datasets)] == pytest.approx(shares)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--dataset", "a/b:7", "--dataset", "c/d"], "--dataset a/b:7: 7 is no share"),
        (["--dataset", "a/b:0", "--dataset", "c/d"], "--dataset a/b:0: 0 is no share"),
        (["--dataset", ""], "--dataset '' names nothing; give a name on the Hub"),
        (["--dataset", "a/b:-1", "--dataset", "c/d"], "--dataset a/b:-1: -1 is no share"),
        (["--dataset", "a/b:nan", "--dataset", "c/d"], "--dataset a/b:nan: nan is no share"),
        (["--dataset", "a/b:0.7", "--dataset", "c/d:0.7"], "the shares add up to 1.4; they must give 1"),
        (["--dataset", "a/b:0.7", "--dataset", "c/d:0.2"], "the shares add up to 0.9; they must give 1"),
        (["--dataset", "a/b:0.5"], "the shares add up to 0.5; they must give 1"),
        (["--dataset", "a/b:1", "--dataset", "c/d"], "the shares leave nothing for the dataset without one"),
        (["--dataset", "a/b", "--dataset", "A/B"], "--dataset A/B is given twice"),
        (["--dataset", "a/b", "--dataset", "./nowhere:0.5"], "--dataset ./nowhere: no such folder"),
        (["--dataset", "a/b", "--dataset", "salt-nlp/design2code-HF:0.1"], "a benchmark, never to be trained on"),
        (["--dataset", "a/b", "--dataset", "c/d", "--dataset_split", "x"], "--dataset_split x is given once for 2"),
        (["--dataset", "a/b", *["--html_column", "x"] * 3], "--html_column is given 3 times for 1 datasets"),
        (["--dataset", "a/b", "--dataset", "c/d", "--dataset"], "--dataset: its value is missing"),
        (["--dataset", "xcodemind/webcode2m", "--dataset", "HuggingFaceM4/WebSight", "--image_column", "x"], "by name"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(argv, said):
    problems = find_problems(resolve(argv, Machine(gpu=False)))
    assert [problem for problem in problems if said in problem], problems


def test_a_column_given_once_is_that_of_every_dataset_that_is_not_known():
    known, one, two = asked("HuggingFaceM4/WebSight", "a/b", "c/d", image_column=["shot"])
    assert [each.source.image_column for each in (known, one, two)] == ["image", "shot", "shot"]


def test_flags_given_as_often_as_datasets_are_theirs_in_order():
    flags = {"dataset_split": ["-", "mid"], "html_column": ["code", "-"], "dataset_revision": ["v1", "-"]}
    one, two = asked("a/b", "xcodemind/webcode2m_test", **flags)
    assert (one.source.split, one.source.html_column, one.revision) == ("train", "code", "v1")
    assert (two.source.split, two.source.html_column, two.revision) == ("mid", "text", None)


def test_one_dataset_twice_with_other_configurations_is_two():
    one, two = asked("HuggingFaceM4/WebSight", "HuggingFaceM4/WebSight", dataset_config=["v0.1", "v0.2"])
    assert (one.label, two.label) == ("WebSight", "WebSight-2")


def test_the_list_of_a_field_is_each_objects_own():
    first = resolve([], Machine(gpu=False)).settings
    first.dataset.append("a/b")
    assert resolve([], Machine(gpu=False)).settings.dataset == ["HuggingFaceM4/WebSight"]


@pytest.mark.parametrize("seed", range(20))
def test_after_every_page_each_has_its_share_to_within_one(seed):
    rng = random.Random(seed)
    parts = [rng.random() + 0.01 for _ in range(rng.randint(1, 7))]
    shares = [part / sum(parts) for part in parts]
    turns, kept = Turns(shares, seed), [0] * len(shares)
    for page in range(1, 300):
        kept[turns.next(kept, range(len(shares)))] += 1
        assert all(abs(share * page - count) < 1 for share, count in zip(shares, kept))


def test_the_rest_share_by_their_own_shares_once_one_has_ended():
    turns, kept = Turns([0.5, 0.3, 0.2], 0), [40, 24, 16]
    since = [*kept]
    for _ in range(50):
        kept[turns.next(kept, {1, 2}, since)] += 1
    assert kept == [40, 54, 36]


def test_the_seed_decides_who_is_first():
    assert {Turns([0.5, 0.5], seed).next([0, 0], {0, 1}) for seed in range(9)} == {0, 1}


@pytest.mark.parametrize(
    ("count", "shares", "parts"),
    [(32, [0.7, 0.3], [22, 10]), (3, [0.98, 0.01, 0.01], [1, 1, 1]), (10, [1 / 3] * 3, [4, 3, 3]), (5, [1.0], [5])],
)
def test_held_out_pages_are_dealt_out_at_least_one_each(count, shares, parts):
    assert dealt_out(count, shares, 1) == parts


# -----------------------------------------------------------------------------
# In the real training


@pytest.mark.slow
def test_two_datasets_train_on_two_ranks_and_are_told_everywhere(tiny_base, tmp_path):
    """With columns of their own; a second run goes on with the first."""
    one, two = make_pages(tmp_path / "one", 12), make_pages(tmp_path / "two", 12, seed=1)
    rows = (two / "metadata.jsonl").read_text().replace('"text"', '"code"')
    (two / "metadata.jsonl").write_text(rows.replace('"file_name": "003.png"', '"file_name": "gone.png"'))
    mixed = {"dataset": [f"{one}:0.75", two], "html_column": ["-", "code"], "max_bad_share": 0.2}
    flags = small_run(tiny_base, "", **mixed, num_samples=12, eval_pages=4, save_strategy="epoch", max_steps=1)
    done = start_torchrun(flags, tmp_path)
    assert done.returncode == 0, output(done)
    assert "; of one: 12 asked, 12 kept; of two: 4 asked, " in done.stdout
    training, held_out = load_pages_from_disk(tmp_path / "holo1_dom_finetune_output")
    for part, counts in ((training, [9, 3]), (held_out, [3, 1])):
        assert [sum(name.startswith(label) for name in part["name"]) for label in ("one/", "two/")] == counts
    final = tmp_path / "holo1_dom_finetune_final"
    recipe = json.loads((final / "dom_recipe.json").read_text())
    assert (recipe["dataset"], recipe["dataset_licence"]) == ("one and two", "unknown for one, unknown for two")
    assert [(each["dataset"], each["share"]) for each in recipe["datasets"]] == [("one", 0.75), ("two", 0.25)]
    record = json.loads((tmp_path / "holo1_dom_finetune_output" / "run.json").read_text())
    assert record["fixed"]["dataset"] == [f"{one}:0.75", str(two)]
    assert record["fixed"]["html_column"] == ["-", "code"]
    card = (final / "README.md").read_text()
    assert "| dataset 1: share | 0.75 |" in card and str(tmp_path) not in card
    resumed = start_torchrun(["--resume", "--max_steps", "2"], tmp_path)
    assert resumed.returncode == 0 and "pages: as they were when this run began" in resumed.stdout, output(resumed)
    refused = start_plain(["--resume", "--dataset", str(one)], tmp_path)
    assert refused.returncode == 2 and f"began with {one}:0.75 and {two}, and pages that" in refused.stderr


def output(done) -> str:
    return done.stdout[-3000:] + done.stderr[-3000:]
