"""The pages of a run: read once, checked, and the same for every rank."""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, call_in_processes, free_port, make_pages, make_processor

from families import family_of
from training import collecting, preparation, prepared
from training.errors import DataError, DiskError
from training.preparation import how_to_count, prepare_pages
from training.prepared import ROOMS
from training.prompt_and_mask import PageEncoder
from training.reading import read_pages
from training.settings import PageSettings


def prepare(pages: Path | str, output: Path, known: dict | None = None, **changes):
    processor = make_processor()
    wanted = {"dataset": str(pages), "num_samples": 6, "eval_pages": 2, "max_html_tokens": 120} | changes
    encoder = PageEncoder(processor, "Write the page.", family_of("qwen2_5_vl"))
    seed = wanted.pop("seed", 3)
    args = SimpleNamespace(output_dir=str(output), seed=seed)
    return prepare_pages(PageSettings(**wanted), args, encoder, processor, known), processor, encoder


@pytest.fixture(scope="module")
def twelve_pages(tmp_path_factory) -> Path:
    return make_pages(tmp_path_factory.mktemp("pages"), 12)


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_pages_are_read_checked_counted_and_told(twelve_pages, alone, tmp_path, capsys):
    pages, processor, encoder = prepare(twelve_pages, tmp_path / "out")
    assert (len(pages.training), len(pages.held_out), pages.report) == (6, 2, "8 asked, 8 kept")
    assert not {page["name"] for page in pages.training} & {page["name"] for page in pages.held_out}
    rows = [json.loads(line) for line in (twelve_pages / "metadata.jsonl").read_text().splitlines()]
    texts = {row["file_name"]: row["text"] for row in rows}
    for page in [*pages.training, *pages.held_out]:
        assert page["html"] == texts[page["name"]] and page["html_tokens"] == encoder.html_tokens(page["html"])
        assert page["image_tokens"] == encoder.family.image_tokens(processor, page["width"], page["height"])
    where, first, second = capsys.readouterr().out.splitlines()
    assert first == "8 asked, 8 kept" and second.startswith("6 training and 2 held-out pages")
    assert where == f"pages: in {found_in(tmp_path)}, where a later run with the same settings finds them"


def test_another_reading_leaves_its_own_mark_alone(twelve_pages, alone, tmp_path):
    """By which another machine sees that this run, and not an earlier one, has read the pages on a shared disk."""
    marks = []
    for _ in range(2):
        prepare(twelve_pages, tmp_path / "out")
        (mark,) = (tmp_path / "out" / "pages").glob("prepared-*")
        marks.append(mark.name)
    assert marks[0] != marks[1]


def test_data_that_cannot_be_trained_on_ends_the_run(twelve_pages, alone, tmp_path):
    with pytest.raises(DataError, match="no column html; there are: file_name, text"):
        prepare(twelve_pages, tmp_path / "out", html_column="html")


# -----------------------------------------------------------------------------
# Found again


def found_in(folder: Path) -> Path:
    """The one set of prepared pages beside the output folders in `folder`."""
    (place,) = (folder / "holo1_dom_finetune_pages").iterdir()
    return place


@pytest.fixture
def reads(monkeypatch) -> list:
    """What is read from now on."""
    read = []

    def noted(*arguments):
        read.append(arguments)
        return read_pages(*arguments)

    monkeypatch.setattr(collecting, "read_pages", noted)
    return read


def test_a_run_with_another_output_folder_finds_the_pages_of_the_first(twelve_pages, alone, tmp_path, reads, capsys):
    first, *_ = prepare(twelve_pages, tmp_path / "first")
    assert len(reads) == 1 and "found" not in capsys.readouterr().out
    second, *_ = prepare(twelve_pages, tmp_path / "second", max_bad_share=0.5)
    assert len(reads) == 1 and f"pages: found in {found_in(tmp_path)}, prepared 20" in capsys.readouterr().out
    assert [*first.training, *first.held_out] == [*second.training, *second.held_out]
    assert first.known == second.known
    files = [tmp_path / each / "pages" / "train.arrow" for each in ("first", "second")]
    assert os.path.samefile(*files), "they lie on the disk once"
    assert (tmp_path / "second" / "dropped_pages.jsonl").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": 5},
        {"eval_pages": 3},
        {"max_html_tokens": 119},
        {"clean": "none"},
        {"seed": 4},
        {"html_column": "x"},
    ],
    ids=str,
)
def test_other_settings_are_other_pages(twelve_pages, alone, tmp_path, reads, change):
    prepare(twelve_pages, tmp_path / "first")
    with contextlib.suppress(DataError):  # there is no column x
        prepare(twelve_pages, tmp_path / "second", **change)
    assert len(reads) == 2


def test_every_room_that_decides_what_pages_come_out_is_known():
    """All that collecting imports, and what that imports, but for words and errors."""
    rooms, found = ["collecting"], set()
    while rooms:
        text = (ROOT / "training" / f"{rooms[-1]}.py").read_text()
        found.add(rooms.pop())
        rooms += {*re.findall(r"from training\.(\w+) import", text)} - found - {"errors", "processes"}
    assert found == {*ROOMS}


@pytest.mark.parametrize("name", ["training/prompt_and_mask.py", "families/qwen2_5_vl.py", "training/page_checks.py"])
def test_code_that_decides_or_counts_pages_makes_them_others_where_it_changes(name, tmp_path, monkeypatch):
    for folder in ("training", "families"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(prepared, "__file__", str(tmp_path / "training" / "prepared.py"))
    before = prepared.describe(PageSettings(), [], 3, "counted so", [])
    assert prepared.describe(PageSettings(), [], 3, "counted so", []) == before
    (tmp_path / name).write_text((tmp_path / name).read_text() + "# another\n")
    assert prepared.describe(PageSettings(), [], 3, "counted so", []) != before


def test_another_tokenizer_or_picture_size_counts_otherwise():
    processor = make_processor()
    encoder = PageEncoder(processor, "Write the page.", family_of("qwen2_5_vl"))
    digests = [how_to_count(encoder, processor)[0]]
    processor.tokenizer(["a", "b c"], padding=True)
    assert how_to_count(encoder, processor)[0] == digests[0], "what was tokenised last does not matter"
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 252 * 252}
    digests.append(how_to_count(encoder, processor)[0])
    processor.tokenizer.add_tokens(["<new>"])
    digests.append(how_to_count(encoder, processor)[0])
    encoder.lead = " "
    digests.append(how_to_count(encoder, processor)[0])
    assert len({*digests}) == 4


@pytest.mark.parametrize("what", ["a picture", "the rows", "a new file"])
def test_a_folder_that_was_changed_is_prepared_anew(alone, tmp_path, reads, what):
    pages = make_pages(tmp_path / "pages", 12)
    prepare(pages, tmp_path / "first")
    if what == "a picture":
        (pages / "003.png").write_bytes((pages / "004.png").read_bytes() + b" ")
    elif what == "the rows":
        rows = pages / "metadata.jsonl"
        rows.write_text(rows.read_text().replace("<p>", "<p>a "))
    else:
        (pages / "new.png").write_bytes(b"")
    prepare(pages, tmp_path / "second")
    assert len(reads) == 2


def test_pages_in_a_folder_that_is_linked_to_are_looked_at_too(alone, tmp_path, reads):
    """Of a split, say, that lies on another disk; a link back ends."""
    elsewhere, pages = make_pages(tmp_path / "elsewhere", 12), tmp_path / "pages"
    pages.mkdir()
    (pages / "train").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(pages)
    for place in ("first", "second"):
        prepare(pages, tmp_path / place)
    assert len(reads) == 1
    (elsewhere / "003.png").write_bytes((elsewhere / "004.png").read_bytes() + b" ")
    prepare(pages, tmp_path / "third")
    assert len(reads) == 2


def test_what_runs_leave_in_a_folder_of_pages_does_not_change_it(alone, tmp_path, reads, monkeypatch):
    pages = make_pages(tmp_path / "pages", 12)
    monkeypatch.chdir(pages)
    for name in ("one", "two"):
        prepare(pages, pages / "holo1_dom_finetune_output")
        (pages / "holo1_dom_finetune_output" / name).touch()
        (pages / "holo1_dom_finetune_final").mkdir(exist_ok=True)
        (pages / "holo1_dom_finetune_final" / name).touch()
    assert len(reads) == 1


def test_prepared_pages_that_were_changed_are_made_anew(twelve_pages, alone, tmp_path, reads):
    first, *_ = prepare(twelve_pages, tmp_path / "first")
    names = first.training["name"][:]
    file = tmp_path / "first" / "pages" / "train.arrow"  # the same file under another name
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(b"damage")
    second, *_ = prepare(twelve_pages, tmp_path / "second")
    assert len(reads) == 2 and second.training["name"][:] == names


def test_a_run_goes_on_with_pages_that_are_found_where_its_own_are_gone(twelve_pages, alone, tmp_path, reads, capsys):
    first, *_ = prepare(twelve_pages, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    again, *_ = prepare(twelve_pages, tmp_path / "out", known=first.known)
    said = capsys.readouterr().out
    assert "pages: no longer on the disk, read again" in said and "pages: found in" in said
    assert len(reads) == 1 and again.known == first.known


def test_a_disk_that_is_full_is_told_with_what_to_do_and_the_pages_are_gone_on_with(twelve_pages, alone, tmp_path):
    """Files that may not grow, for want of a small disk (EFBIG instead of ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(DiskError, match=r"while pages are prepared in .* GB free; give a --pages_dir"):
            prepare(twelve_pages, tmp_path / "first")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    pages, *_ = prepare(twelve_pages, tmp_path / "first")
    assert len(pages.training) == 6


def test_pages_on_another_disk_are_linked_and_not_copied(twelve_pages, alone, tmp_path, monkeypatch):
    def another_disk(source, target):  # there is only one here
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(collecting.os, "link", another_disk)
    pages, *_ = prepare(twelve_pages, tmp_path / "out", pages_dir=str(tmp_path / "elsewhere"))
    assert (tmp_path / "out" / "pages" / "train.arrow").is_symlink() and len(pages.training) == 6
    assert not (tmp_path / "holo1_dom_finetune_pages").exists()


def test_of_a_hub_dataset_the_commit_decides(alone, tmp_path, reads, monkeypatch):
    """Where it is not known, because the Hub does not say it, nothing is found."""
    folder = make_pages(tmp_path / "in", 12)
    rows = [(f"r{n}", (folder / f"{n:03d}.png").read_bytes(), f"<p>page {n}") for n in range(12)]
    monkeypatch.setattr(collecting, "read_pages", lambda *arguments: (reads.append(arguments), iter(rows))[1])
    commits = iter(["c1", "c1", "c2", None, None, "main", "main", "c1"])
    monkeypatch.setattr(preparation, "dataset_revision", lambda name, asked: next(commits))
    for number in range(8):
        prepare("user/set", tmp_path / f"out{number}", dataset_revision="main" if number in (5, 6) else None)
    assert [arguments[3] for arguments in reads] == ["c1", "c2", None, None, "main", "main"]


def prepare_beside(pages: str, output: str) -> None:
    """One of two runs at once."""
    prepare(Path(pages), Path(output))


@pytest.mark.slow
def test_two_runs_at_once_prepare_the_same_pages_once(twelve_pages, tmp_path):
    outputs = [tmp_path / "a", tmp_path / "b"]
    call_in_processes(prepare_beside, [[twelve_pages, output] for output in outputs], tmp_path)
    said = "".join((tmp_path / f"said-{number}.log").read_text() for number in range(2))
    assert said.count("where a later run with the same settings finds them") == said.count("pages: found in") == 1
    assert os.path.samefile(*(output / "pages" / "train.arrow" for output in outputs))


def be_a_machine(rank: int, port: int, pages: str, folder: str) -> None:
    """One of two machines with a rank each, with disks of their own; leaves what came of it in `folder`."""
    import torch

    places = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in places.items()})
    torch.distributed.init_process_group("gloo")
    try:
        told = prepare(Path(pages), Path(folder) / f"disk-{rank}")[0].training["name"][:]
    except DataError as error:
        told = str(error)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


def what_machines_find(datasets: list[Path], folder: Path) -> list:
    port = free_port()
    call_in_processes(be_a_machine, [[number, port, pages, folder] for number, pages in enumerate(datasets)], folder)
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(2)]


@pytest.mark.slow
def test_machines_that_read_different_pages_do_not_train(twelve_pages, tmp_path):
    others = make_pages(tmp_path / "others", 12, seed=1)
    first, second = what_machines_find([twelve_pages, others], tmp_path)
    assert first == second and first.startswith("the machines have read different pages; give a --dataset_revision")


@pytest.mark.slow
def test_machines_that_read_the_same_pages_have_them_in_one_order(twelve_pages, tmp_path):
    first, second = what_machines_find([twelve_pages, twelve_pages], tmp_path)
    assert first == second and len(first) == 6
