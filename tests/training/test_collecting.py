"""The pages of a run: what is kept, what is dropped for the reason that is told, and the split."""

import json
import multiprocessing
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import small_pages
from conftest import need_shared
from small_pages import dropped, good_pages, load, page_html, picture, write_folder

from training import collecting, page_workers
from training.errors import DataError, DiskError


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
    assert str(report) == (
        "104 asked, 1 unreadable, 49 kept; the dataset ended after 50 pages: 45 to train on and 4 held out, of 100 and "
        "4 that were asked for"
    )  # 2 % are borne
    pages[7] = ("b.png", picture(7), "")
    with pytest.raises(DataError) as error:
        load(write_folder(tmp_path / "in", pages), tmp_path / "out")
    assert "2 of 50 pages are broken, more than --max_bad_share 0.02: " in str(error.value)
    assert "; repair them, leave them out, or give --max_bad_share 0.04; " in str(error.value)
    assert all(part in str(error.value) for part in ("a.png (unreadable: 1 b", "b.png (empty", "dropped_pages.jsonl"))


def test_drops_are_counted_by_reason_and_told_in_one_line(tmp_path):
    pages = good_pages(100) + [(f"long{n}.png", picture(200 + n), page_html(200 + n, words=1200)) for n in range(3)]
    pages += [("bad.png", b"", page_html(300)), ("twin.png", picture(301), page_html(5).replace("><", ">\n  <"))]
    pages += [("shot.png", picture(6), page_html(302))]
    _, _, report = load(write_folder(tmp_path / "in", pages), tmp_path / "out", num_samples=996)
    assert str(report) == (
        "1,000 asked, 3 too long, 1 unreadable, 2 duplicate, 100 kept; the dataset ended after 106 pages: "
        "96 to train on and 4 held out, of 996 and 4 that were asked for"
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
    assert str(report) == (
        "164 asked, 20 kept; the dataset ended after 20 pages: 16 to train on and 4 held out, of 100 and 64 that were "
        "asked for"
    )


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
    assert str(report).startswith("1,008 asked, 8 too long, 66 kept; the dataset ended after 74 pages: 58 to train on ")
    assert (len(training), len(held_out)) == (58, 8)
    assert max(training["html_tokens"]) <= 8192


@pytest.mark.parametrize(
    ("pages", "asked", "said"),
    [
        (24, 1000, ["read: 24 of 24 in", "read again, with 4 held out: 24 of 24 in"]),
        (24, 6, ["10 of 10 in"]),
        (None, 1000, ["read: 24 in", "held out: 24 in"]),
    ],
)
def test_the_bar_counts_to_what_there_is(tmp_path, monkeypatch, capfd, pages, asked, said):
    """It said 1/1004 and hours of a folder of 24 pages; of a dataset that does not say how many it has, it says none.

    A folder of fewer pages than asked is read twice, the second time for fewer held-out ones."""
    folder = write_folder(tmp_path / "in", [*good_pages(22), ("a.png", b"x", "<p>"), ("b.png", picture(7), "")])
    if pages is None:
        read = collecting.read_pages
        monkeypatch.setattr(collecting, "read_pages", lambda *args: read(*args[:4]))
    load(folder, tmp_path / "out", num_samples=asked, eval_pages=4 if asked == 6 else 16, max_bad_share=0.5)
    bars = [line for line in capfd.readouterr().err.split("\n") if "page" in line]
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


# -----------------------------------------------------------------------------
# Several datasets


def pages_from(first: int, count: int, kind: str) -> list[tuple[str, bytes, str]]:
    return [(f"{kind}{n}.png", picture(n), page_html(n)) for n in range(first, first + count)]


@pytest.fixture
def three(tmp_path) -> list[str]:
    """Datasets of 60 pages each, which share none, with shares of 0.5, 0.3 and 0.2."""
    for number, name in enumerate("abc"):
        write_folder(tmp_path / name, pages_from(1000 * number, 60, name))
    return [f"{tmp_path / name}:{share}" for name, share in zip("abc", (0.5, 0.3, 0.2))]


def counts_of(names: list[str]) -> list[int]:
    return [sum(name.startswith(f"{label}/") for name in names) for label in "abc"]


def test_datasets_are_mixed_by_their_shares_in_every_part(tmp_path, three):
    training, held_out, report = load(three, tmp_path / "out", num_samples=100, eval_pages=10)
    assert counts_of(held_out["name"]) == [5, 3, 2] and counts_of(training["name"]) == [50, 30, 20]
    for page in range(1, 101):
        for share, count in zip((0.5, 0.3, 0.2), counts_of(training["name"][:page])):
            assert abs(share * page - count) < 1
    assert str(report) == (
        "110 asked, 110 kept; of a: 55 asked, 55 kept; of b: 33 asked, 33 kept; of c: 22 asked, 22 kept"
    )
    again, _, _ = load(three, tmp_path / "again", num_samples=100, eval_pages=10)
    other, _, _ = load(three, tmp_path / "other", seed=1, num_samples=100, eval_pages=10)
    assert again["name"][:] == training["name"][:] != other["name"][:]


def test_each_dataset_has_a_held_out_page_however_small_its_share(tmp_path, three):
    mixed = [f"{three[0].rpartition(':')[0]}:0.98", *(f"{text.rpartition(':')[0]}:0.01" for text in three[1:])]
    _, held_out, _ = load(mixed, tmp_path / "out", num_samples=20, eval_pages=4)
    assert counts_of(held_out["name"]) == [2, 1, 1]
    _, held_out, _ = load(mixed, tmp_path / "fewer", num_samples=20, eval_pages=1)
    assert counts_of(held_out["name"]) == [1, 1, 1]


def test_a_dataset_that_ends_early_is_said_and_the_others_go_on(tmp_path, three):
    write_folder(tmp_path / "few", pages_from(5000, 12, "c"))
    mixed = [*three[:2], f"{tmp_path / 'few'}:0.2"]
    training, held_out, report = load(mixed, tmp_path / "out", num_samples=90, eval_pages=10)
    assert len(training) == 90 and len(held_out) == 10
    shares = "a 0.556 instead of 0.500, b 0.333 instead of 0.300, few 0.111 instead of 0.200"
    assert f"; not all had their share of pages: {shares}" in str(report)
    assert "of few: 20 asked, 12 kept; the dataset ended after 12 pages" in str(report)


def test_what_is_dropped_is_told_for_each_dataset(tmp_path, three):
    shutil.rmtree(tmp_path / "b")
    twins = [("twin.png", picture(3), page_html(1003)), ("long.png", picture(1500), page_html(1500, words=1200))]
    write_folder(tmp_path / "b", [*pages_from(1010, 20, "b"), *twins, ("bad.png", b"", page_html(1501))])
    _, _, report = load(three, tmp_path / "out", num_samples=1000, eval_pages=3, max_bad_share=0.1)
    told = "1 too long, 1 unreadable, 1 duplicate, 20 kept; the dataset ended after 23 pages"
    assert f"of b: 301 asked, {told}" in str(report)
    assert report.dropped == {"too long": 1, "unreadable": 1, "duplicate": 1}
    lines = [json.loads(line) for line in (tmp_path / "out" / "dropped_pages.jsonl").read_text().splitlines()]
    assert {line["dataset"] for line in lines} == {"b"} and {line["name"] for line in lines} == {
        "twin.png",
        "long.png",
        "bad.png",
    }
    # 1 of 23 is too much of b, though it is less than 1 % of all.
    with pytest.raises(DataError, match=r"1 of 23 pages of b are broken, more than --max_bad_share 0.04: bad.png"):
        load(three, tmp_path / "out2", num_samples=1000, eval_pages=3, max_bad_share=0.04)


def test_of_a_dataset_all_of_whose_pages_are_dropped_no_more_is_read_than_of_one_alone(tmp_path, three):
    write_folder(tmp_path / "long", [("p.png", picture(0), page_html(0, words=1200))])
    lines = (tmp_path / "long" / "metadata.jsonl").read_text()
    (tmp_path / "long" / "metadata.jsonl").write_text(lines * 2000)
    training, _, report = load([three[0], f"{tmp_path / 'long'}"], tmp_path / "out", num_samples=20, eval_pages=2)
    assert len(training) == 20
    assert "of long: 11 asked, 1,110 too long, 0 kept; gave up after 1,110 pages" in str(report)


@pytest.mark.slow
def test_several_datasets_and_workers_give_what_a_process_alone_gives(tmp_path, three, monkeypatch):
    monkeypatch.setattr(page_workers, "ALONE_S", 0.0)
    monkeypatch.setattr(page_workers, "WORTH_S", 0.0)
    write_folder(tmp_path / "few", pages_from(5000, 12, "c"))
    mixed = [*three[:2], f"{tmp_path / 'few'}:0.2"]
    job = page_workers.job_of(small_pages.wanted(mixed), small_pages.count_tokens)
    pool = page_workers.PagePool(job, small_pages.count_tokens, 3, lambda w, h: w * h // 100)
    found = [load(mixed, tmp_path / str(each), pool=each, num_samples=90, eval_pages=10) for each in (None, pool)]
    assert [list(part) for part in found[0][:2]] == [list(part) for part in found[1][:2]]
    assert str(found[0][2]) == str(found[1][2])


# -----------------------------------------------------------------------------
# Killed and started again


def prepare_slowly(datasets: list[str], output: str, place: str) -> None:
    """In a process of its own, which will be killed."""
    collecting.SEAL_ROWS = 10
    settings = small_pages.wanted(datasets, num_samples=140, eval_pages=10)
    page_workers.ALONE_S = page_workers.WORTH_S = 0.0
    pool = page_workers.PagePool(page_workers.Job(settings, small_pages.slow_count), small_pages.slow_count, 2)
    collecting.load_pages(settings, output, small_pages.slow_count, 0, pool, Path(place))


@pytest.mark.slow
def test_a_preparation_that_was_killed_goes_on_and_gives_what_it_would_have_given(tmp_path, three, monkeypatch):
    place = tmp_path / "place"
    process = multiprocessing.get_context("spawn").Process(
        target=prepare_slowly, args=(three, str(tmp_path / "killed"), str(place))
    )
    process.start()
    seal, until = place / "held_out_10" / "sealed.json", time.monotonic() + 60
    while not (seal.exists() and sealed_rows(seal) >= 60) and time.monotonic() < until:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "killed" / "pages").exists()
    _, left = psutil.wait_procs(workers, timeout=20)
    assert len(workers) == 2 and not left, "workers end with their parent"
    sealed, counted, counts = sealed_rows(seal), [], small_pages.count_tokens
    assert 60 <= sealed < 150

    def count(html: str, width: int, height: int) -> tuple[int, int]:
        counted.append(html)
        return counts(html, width, height)

    monkeypatch.setattr(small_pages, "count_tokens", count)
    found = load(three, tmp_path / "again", place=place, num_samples=140, eval_pages=10)
    assert len(counted) == 150 - sealed, "no page is checked twice"
    alone = load(three, tmp_path / "alone", num_samples=140, eval_pages=10)
    assert [list(part) for part in found[:2]] == [list(part) for part in alone[:2]]
    assert str(found[2]) == str(alone[2])
    names = [(tmp_path / name / "dropped_pages.jsonl").read_text() for name in ("again", "alone")]
    assert names[0] == names[1]


def sealed_rows(seal: Path) -> int:
    return sum(part["read"] for part in json.loads(seal.read_text())["state"]["parts"])


def test_pages_that_would_fill_the_disk_are_refused_once_their_size_is_known(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "in", good_pages(30))
    monkeypatch.setattr(collecting, "SEAL_ROWS", 10)
    free = SimpleNamespace(free=50_000)  # a full disk cannot be had here
    monkeypatch.setattr(collecting.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(DiskError, match=r"need 0\.0 GB more, and the disk of .* --pages_dir on another disk, or fewer"):
        load(folder, tmp_path / "out", num_samples=10_000)
