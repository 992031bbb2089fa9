"""Pages checked by several processes: what a process alone would have made of them, whatever happens to a worker."""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import small_pages
from conftest import make_processor
from small_pages import count_tokens, good_pages, header_bomb, load, page_html, picture, wanted, write_folder

from families import family_of
from training import collecting, page_workers
from training.errors import DataError
from training.page_workers import Job, PagePool, TokenizerCount, job_of
from training.prompt_and_mask import PageEncoder


@pytest.fixture
def at_once(monkeypatch):
    """Workers start after the first page."""
    monkeypatch.setattr(page_workers, "ALONE_S", 0.0)
    monkeypatch.setattr(page_workers, "WORTH_S", 0.0)


def pool_of(folder: Path, workers: int, count=count_tokens, **changes) -> PagePool:
    return PagePool(
        job_of(wanted(folder, **changes), count), count_tokens, workers, lambda *size: count_tokens("", *size)[1]
    )


def everything(output: Path) -> list:
    pages = [list(split) for split in collecting.load_pages_from_disk(output)]
    return [pages, (output / "dropped_pages.jsonl").read_text()]


def note_start(pool: PagePool, start: Callable[[int], None], count: int) -> None:
    pool.noted = [*getattr(pool, "noted", []), count]
    start(count)


def pages_of_all_kinds() -> list:
    pages = good_pages(90)
    pages += [(f"long{n}.png", picture(200 + n), page_html(200 + n, words=1200)) for n in range(3)]
    pages += [("twin.png", picture(301), page_html(5)), ("shot.png", picture(6), page_html(302))]
    pages += [("bad.png", b"", page_html(300)), ("bomb.png", header_bomb(), page_html(303)), ("gone.png", None, "<p>x")]
    return [*pages, ("number.png", picture(304), 7), ("empty.png", picture(305), "")]


@pytest.mark.slow
def test_workers_give_the_pages_of_a_process_alone_in_its_order(tmp_path, at_once, monkeypatch):
    folder = write_folder(tmp_path / "in", pages_of_all_kinds())
    changes = {"max_bad_share": 0.2, "eval_pages": 8}
    _, _, alone = load(folder, tmp_path / "alone", **changes)
    for workers in (2, 3):
        pool = pool_of(folder, workers, **changes)
        monkeypatch.setattr(pool, "start", partial(note_start, pool, pool.start))
        _, _, report = load(folder, tmp_path / str(workers), pool=pool, **changes)
        assert str(report) == str(alone) and pool.noted == [workers]
        assert everything(tmp_path / str(workers)) == everything(tmp_path / "alone")
        assert not pool.workers


@pytest.mark.slow
def test_a_page_that_kills_a_worker_twice_is_named_and_one_that_does_once_is_kept(tmp_path, at_once, capfd):
    pages = good_pages(40)
    pages[11] = ("deadly.png", picture(500), f"{page_html(500)} deadly ")
    pages[25] = ("once.png", picture(501), f"{page_html(501)} once:{tmp_path / 'mark'} ")
    folder = write_folder(tmp_path / "in", pages)
    pool = pool_of(folder, 2, small_pages.deadly_count, max_bad_share=0.1)
    training, held_out, report = load(folder, tmp_path / "out", pool=pool, max_bad_share=0.1)
    assert "once.png" in {*training["name"], *held_out["name"]} and (tmp_path / "mark").exists()
    assert report.broken == ["deadly.png (unreadable: the worker that checked it was killed twice (out of memory?))"]
    assert report.kept == 39


@pytest.mark.slow
def test_no_page_is_lost_where_workers_are_signalled(tmp_path, at_once, capfd):
    """Their parent decides what a signal to all of them means: each page would be said to have killed a worker."""
    folder = write_folder(tmp_path / "in", good_pages(20))
    pool = pool_of(folder, 2, small_pages.signalled_count, max_bad_share=1.0)
    assert load(folder, tmp_path / "out", pool=pool, max_bad_share=1.0)[2].kept == 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["executable", "path"])
def test_workers_that_cannot_start_are_done_without(tmp_path, at_once, capsys, monkeypatch, name):
    """The program is another one; it does not find the room of the function that counts."""
    folder = write_folder(tmp_path / "in", good_pages(40))
    load(folder, tmp_path / "alone")
    without_tests = [place for place in sys.path if "tests" not in place]
    monkeypatch.setattr(sys, name, "/bin/false" if name == "executable" else without_tests)
    load(folder, tmp_path / "out", pool=pool_of(folder, 2))
    assert "a worker cannot start (exit code 1); this process checks them alone" in capsys.readouterr().out
    assert everything(tmp_path / "out") == everything(tmp_path / "alone")


@pytest.mark.slow
def test_what_fails_in_a_worker_ends_the_run(tmp_path, at_once):
    folder = write_folder(tmp_path / "in", good_pages(10))
    pool = PagePool(Job(wanted(folder), small_pages.page_html), count_tokens, 2)  # counts with one argument
    with pytest.raises(TypeError, match="positional"):
        load(folder, tmp_path / "out", pool=pool)
    assert not pool.workers


@pytest.mark.slow
def test_a_reading_that_breaks_off_is_an_error_only_where_it_is_reached(tmp_path, at_once, monkeypatch):
    def rows(*unused):
        yield from good_pages(20)
        raise DataError("the cable was cut")

    monkeypatch.setattr(collecting, "read_pages", rows)
    with pytest.raises(DataError, match="cut"):
        load("a/b", tmp_path / "out", pool=pool_of("a/b", 2), num_samples=17)
    training, _, _ = load("a/b", tmp_path / "out", pool=pool_of("a/b", 2), num_samples=16)
    assert len(training) == 16


def test_few_pages_start_no_worker(tmp_path):
    folder = write_folder(tmp_path / "in", good_pages(30))
    pool = pool_of(folder, 4)
    pool.start = None
    start = time.monotonic()
    load(folder, tmp_path / "out", pool=pool)
    assert pool.here == 30 and time.monotonic() - start > pool.here_s > 0


def test_workers_count_as_the_encoder_does():
    processor = make_processor()
    encoder = PageEncoder(processor, "Write the page.", family_of("qwen2_5_vl"))
    texts = [page_html(1), "<p><|im_end|> <|image_pad|></p>", "<p>a\u0301 \U0001f600 漢字</p>\r\n\t", "x" * 5000]
    processor.tokenizer(texts[:2], padding=True, truncation=True, max_length=8)  # what is left over from other calls
    count = TokenizerCount(processor.tokenizer.backend_tokenizer.to_str(), encoder.lead)
    assert [count(text, 1, 1)[0] for text in texts] == [encoder.html_tokens(text) for text in texts]
