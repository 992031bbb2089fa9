"""The pages of a run: what is kept, what is dropped for the reason that is told, and the split."""

import multiprocessing
from pathlib import Path

import pytest
import small_pages
from conftest import need_shared
from small_pages import dropped, good_pages, load, page_html, picture, write_folder

from training import collecting
from training.errors import DataError


def test_asked_is_enough_when_the_dataset_has_more(tmp_path):
    folder = write_folder(tmp_path / "in", good_pages(30))
    training, held_out, report = load(folder, tmp_path / "out", num_samples=10, eval_pages=5)
    assert (len(training), len(held_out), str(report)) == (10, 5, "15 asked, 15 kept")


def order_of(folder: Path, output: Path, seed: int) -> list[list[str]]:
    training, held_out, _ = load(folder, output, seed)
    return [held_out["name"][:], training["name"][:]]


def test_the_seed_alone_decides_the_pages_and_their_order(tmp_path):
    folder = write_folder(tmp_path / "in", good_pages(30))
    orders = []
    for number, seed in enumerate((0, 0, 1)):
        orders.append(order_of(folder, tmp_path / f"out{number}", seed))
    assert orders[0] == orders[1] != orders[2]
    with multiprocessing.get_context("spawn").Pool(1) as another:  # its own hashes, its own random numbers
        assert another.apply(order_of, (folder, tmp_path / "other", 0)) == orders[0]


def test_loading_again_leaves_pages_that_are_in_use_alone(tmp_path):
    folder = write_folder(tmp_path / "in", good_pages(30))
    first, _, _ = load(folder, tmp_path / "out", seed=0)
    before = list(first)
    load(folder, tmp_path / "out", seed=1)
    assert list(first) == before


def test_too_many_broken_pages_are_refused_by_name(tmp_path):
    pages = [*good_pages(49), ("a.png", b"x", page_html(50))]
    _, _, report = load(write_folder(tmp_path / "in", pages), tmp_path / "out")
    assert str(report) == "104 asked, 1 unreadable, 49 kept; the dataset ended after 50 pages"  # 2 % are borne
    pages[7] = ("b.png", picture(7), "")
    with pytest.raises(DataError) as error:
        load(write_folder(tmp_path / "in", pages), tmp_path / "out")
    assert "2 of 50 pages are broken, more than --max_bad_share 0.02: " in str(error.value)
    assert all(part in str(error.value) for part in ("a.png (unreadable: 1 b", "b.png (empty", "dropped_pages.jsonl"))


def test_drops_are_counted_by_reason_and_told_in_one_line(tmp_path):
    pages = good_pages(100) + [(f"long{n}.png", picture(200 + n), page_html(200 + n, words=1200)) for n in range(3)]
    pages += [("bad.png", b"", page_html(300)), ("twin.png", picture(301), page_html(5).replace("><", ">\n  <"))]
    pages += [("shot.png", picture(6), page_html(302))]
    _, _, report = load(write_folder(tmp_path / "in", pages), tmp_path / "out", num_samples=996)
    assert str(report) == (
        "1,000 asked, 3 too long, 1 unreadable, 2 duplicate, 100 kept; the dataset ended after 106 pages"
    )
    names = dropped(tmp_path / "out")
    assert sorted(names.values()) == ["duplicate", "duplicate", "too long", "too long", "too long", "unreadable"]


def test_a_budget_that_no_page_meets_does_not_read_for_ever(tmp_path):
    folder = write_folder(tmp_path / "in", [("p.png", picture(0), page_html(0))])
    line = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(line * 3000)
    with pytest.raises(DataError, match="2 asked, 1,020 too long, 0 kept; gave up after 1,020 pages: too few"):
        load(folder, tmp_path / "out", max_html_tokens=2, num_samples=1, eval_pages=1)


def test_a_dataset_smaller_than_asked_gives_a_fifth_at_most_to_the_held_out_part(tmp_path):
    training, held_out, report = load(write_folder(tmp_path / "in", good_pages(20)), tmp_path / "out", eval_pages=64)
    assert (len(training), len(held_out)) == (16, 4)
    assert str(report) == "164 asked, 20 kept; the dataset ended after 20 pages; 4 held out instead of 64"


@pytest.mark.parametrize(("count", "expected"), [(0, "0 kept"), (1, "1 kept"), (2, None)])
def test_too_few_pages_for_a_split(tmp_path, count, expected):
    folder = write_folder(tmp_path / "in", good_pages(count))
    if expected is None:
        training, held_out, _ = load(folder, tmp_path / "out")
        assert (len(training), len(held_out)) == (1, 1)
    else:
        with pytest.raises(DataError, match=expected if count else "no column file_name and text; there are: none"):
            load(folder, tmp_path / "out")


def test_no_held_out_page_is_needed_when_none_is_asked(tmp_path):
    training, held_out, _ = load(write_folder(tmp_path / "in", good_pages(1)), tmp_path / "out", eval_pages=0)
    assert (len(training), len(held_out)) == (1, 0)


def test_the_shared_pages_load_with_the_real_tokenizer(tmp_path, monkeypatch):
    pages = need_shared("pages")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(need_shared("qwen_tokenizer"))
    monkeypatch.setattr(small_pages, "count_tokens", lambda html, *size: (len(tokenizer(html).input_ids), 1))
    training, held_out, report = load(pages, tmp_path, num_samples=1000, eval_pages=8, max_html_tokens=8192)
    assert str(report) == "1,008 asked, 8 too long, 66 kept; the dataset ended after 74 pages"
    assert (len(training), len(held_out)) == (58, 8)
    assert max(training["html_tokens"]) <= 8192


@pytest.mark.parametrize(
    ("pages", "asked", "said"), [(24, 1000, ["24/24", "24/24"]), (24, 6, ["10/10"]), (None, 1000, ["24page ["] * 2)]
)
def test_the_bar_counts_to_what_there_is(tmp_path, monkeypatch, capfd, pages, asked, said):
    """It said 1/1004 and hours of a folder of 24 pages; of a dataset that does not say how many it has, it says none.

    A folder of fewer pages than asked is read twice, the second time for fewer held-out ones."""
    folder = write_folder(tmp_path / "in", [*good_pages(22), ("a.png", b"x", "<p>"), ("b.png", picture(7), "")])
    if pages is None:
        read = collecting.read_pages
        monkeypatch.setattr(collecting, "read_pages", lambda *args: read(*args[:4]))
    load(folder, tmp_path / "out", num_samples=asked, eval_pages=4 if asked == 6 else 16, max_bad_share=0.5)
    bars = [line.split("\r")[-1] for line in capfd.readouterr().err.split("\n") if "page" in line]
    assert [part in bar for part, bar in zip(said, bars, strict=True)] == [True] * len(said), bars


def anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status, which only Linux has")
def test_pages_are_stored_on_disk_and_not_in_memory(tmp_path, monkeypatch):
    shot = picture(0, size=(400, 300))
    rows = ((f"p{n}", shot + n.to_bytes(4, "big"), page_html(n)) for n in range(3_000))
    monkeypatch.setattr(collecting, "read_pages", lambda *args: rows)
    load("any/name", tmp_path, num_samples=100, eval_pages=50)  # what is imported and allocated once
    before = anonymous_mib()
    training, _, _ = load("any/name", tmp_path, num_samples=2_700, eval_pages=50)
    assert len(training) == 2_700 and training[2_699]["width"] == 400
    assert anonymous_mib() - before < 100  # the pages are 1 GB
