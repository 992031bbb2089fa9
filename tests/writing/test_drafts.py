"""writing/drafts.py against its definition in plain Python, and benchmarks/drafts_write.py against counting by hand."""

import json
import random
import sys

import pytest
import torch
from conftest import ROOT, make_tokenizer

from writing import drafts as room
from writing.drafts import LONGEST, drafts

sys.path.insert(0, str(ROOT / "benchmarks"))
import drafts_write

QUESTION = [90 + number for number in range(LONGEST)]


def plain(history: list[int], place: int, start: int, count: int) -> list[int] | None:
    """The definition: what came after the longest match, the latest among equals; None where there is none."""
    longest, best = 0, None
    for end in range(start, place):
        length = 0
        while length < min(LONGEST, end - start + 1) and history[end - length] == history[place - length]:
            length += 1
        if length and length >= longest:
            longest, best = length, end
    if best is None:
        return None
    guessed = history[: place + 1]
    for number in range(count):
        guessed = [*guessed, guessed[best + 1 + number]]
    return guessed[place + 1 :]


def guess(answer: list[int], count: int, question: list[int] = QUESTION, spare: list[int] = [1, 2] * 8) -> list[int]:
    """Drafts after the last token of `answer`, where `spare` is what was left behind it."""
    history = torch.tensor([question + answer + spare])
    place, start = torch.tensor([len(question) + len(answer) - 1]), torch.tensor([len(question)])
    return drafts(history, place, start, count)[0].tolist()


def test_drafts_are_those_of_the_definition_on_random_histories():
    rng, compared = random.Random(0), 0
    for _ in range(60):
        slots, capacity, tokens = 8, rng.randint(LONGEST + 2, 60), rng.randint(1, 5)
        history = [[rng.randint(0, tokens) for _ in range(capacity)] for _ in range(slots)]
        for row in history:  # repeated pieces, as pages have
            first, size = rng.randrange(capacity), rng.randint(1, 20)
            row[rng.randrange(capacity) :][:size] = row[first : first + size]
        starts = [rng.randint(LONGEST, capacity - 1) for _ in range(slots)]
        places = [rng.randint(start - 1, capacity - 1) for start in starts]
        found = drafts(torch.tensor(history), torch.tensor(places), torch.tensor(starts), 7).tolist()
        wanted = [plain(*row, 7) for row in zip(history, places, starts)]
        for one, other in zip(found, wanted):
            assert other is None or one == other
        compared += sum(other is not None for other in wanted)
    assert compared > 250


def test_the_longest_match_wins_over_a_later_one():
    assert guess([1, 2, 3, 50, 51, 9, 3, 60, 61, 1, 2, 3], 2) == [50, 51]


def test_of_equal_matches_the_latest_one_wins():
    assert guess([2, 3, 50, 51, 2, 3, 60, 61, 2, 3], 2) == [60, 61]


def test_matches_longer_than_the_most_that_is_compared_are_equal():
    piece = list(range(10, 10 + LONGEST))
    assert guess([5, *piece, 50, 6, *piece, 60, 5, *piece], 1) == [60]


def test_nothing_before_the_answer_is_taken():
    question = [*QUESTION, 1, 2, 3, 50]
    assert guess([7, 3, 60, 8, 1, 2, 3], 1, question) == [60]
    assert guess([3, 60, 1, 2, 3], 1, [*QUESTION, 1, 2]) == [60]  # nor does a match reach into it


@pytest.mark.parametrize(("answer", "wanted"), [([7, 7], [7] * 7), ([1, 2, 3, 1], [2, 3, 1, 2, 3, 1, 2])])
def test_a_repetition_goes_on_beyond_the_last_token(answer, wanted):
    assert guess(answer, 7) == wanted


def test_what_is_left_behind_the_last_token_makes_no_difference():
    answer = [1, 2, 3, 4, 1, 2]
    assert guess(answer, 7) == guess(answer, 7, spare=answer * 4) == [3, 4, 1, 2, 3, 4, 1]


def test_every_place_of_a_slot_may_be_the_last_one():
    capacity = LONGEST + 10
    history = torch.arange(capacity).expand(capacity, -1) % 3
    for start in (LONGEST, capacity - 1):  # place 0 is a slot that stands still
        found = drafts(history, torch.arange(capacity), torch.full((capacity,), start), 15)
        assert found.shape == (capacity, 15) and set(found.flatten().tolist()) <= {0, 1, 2}


# -----------------------------------------------------------------------------
# The measurement


def test_steps_are_counted_as_by_hand():
    ids = drafts_write.np.array([1, 2, 3, 4, 1, 2, 3, 4, 9])
    right = drafts_write.right_drafts(ids, drafts_write.best_matches(ids, drafts_write.Way(8)), 7)
    # After the second 1 come three right drafts, after the second 2 two, and 9 no draft foresees.
    assert right.tolist() == [0, 0, 0, 0, 3, 2, 1, 0, 0]
    # 1 | 2 | 3 | 4 | 1 | 2 3 4 9, or with one draft 2 3 | 4 9
    assert [drafts_write.count_steps(right, 0, new) for new in (1, 2, 4, 8)] == [9, 7, 6, 6]


def test_the_measurement_guesses_as_the_engine_does():
    rng = random.Random(1)
    pages = [drafts_write.np.array([rng.randint(0, 3) for _ in range(150)]) for _ in range(3)]
    question = drafts_write.np.array(QUESTION)
    assert drafts_write.check(pages, question, every=1) == 450


def test_a_guess_that_differs_from_the_engines_is_named(monkeypatch):
    monkeypatch.setattr(drafts_write, "best_matches", lambda ids, way: drafts_write.np.arange(len(ids)) - 1)
    with pytest.raises(SystemExit, match="at place"):
        drafts_write.check([drafts_write.np.array([1, 1, 2, 2, 1, 1, 2, 2])], drafts_write.np.array(QUESTION), every=1)


def test_a_folder_is_measured(tmp_path, capsys):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "pages").mkdir()
    row = json.dumps({"text": "<p>one</p>" * 20})
    (tmp_path / "pages" / "metadata.jsonl").write_text(f"{row}\n{row}\n")
    out = tmp_path / "result.json"
    drafts_write.main(
        ["--tokenizer", str(tmp_path / "tokenizer"), "--pages", str(tmp_path / "pages"), "--out", str(out)]
    )
    (folder,) = json.loads(out.read_text())["folders"]
    assert folder["pages"] == 2 and folder["places_checked"] > 0
    assert folder["tokens_a_step"]["as it is"]["8"]["all"] > 4
    assert "before 16" in capsys.readouterr().out


def test_the_figures_in_the_room_are_those_that_were_measured():
    real = json.loads((ROOT / "benchmarks/results/drafts_write.json").read_text())["folders"][0]["tokens_a_step"]
    figures = [f"{real['as it is'][new]['all']:.2f}" for new in ("2", "4", "8", "16")]
    text = " ".join(room.__doc__.split())
    assert real["as it is"] == real[f"longest {LONGEST}"]
    assert "{} tokens a step with one draft, {} with 3, {} with 7 and {} with 15".format(*figures) in text
