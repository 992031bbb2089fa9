"""The pages of a run: read once, checked, and the same for every rank."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import call_in_processes, free_port, make_pages, make_processor

from training.errors import DataError
from training.families import family_of
from training.preparation import prepare_pages
from training.prompt_and_mask import PageEncoder
from training.settings import PageSettings


def prepare(pages: Path, output: Path, **changes):
    processor = make_processor()
    wanted = {"dataset": str(pages), "num_samples": 6, "eval_pages": 2, "max_html_tokens": 120} | changes
    encoder = PageEncoder(processor, "Write the page.", family_of("qwen2_5_vl"))
    args = SimpleNamespace(output_dir=str(output), seed=3)
    return prepare_pages(PageSettings(**wanted), args, encoder, processor), processor, encoder


@pytest.fixture(scope="module")
def twelve_pages(tmp_path_factory) -> Path:
    return make_pages(tmp_path_factory.mktemp("pages"), 12)


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_pages_are_read_checked_counted_and_told(twelve_pages, alone, tmp_path, capsys):
    pages, processor, encoder = prepare(twelve_pages, tmp_path)
    assert (len(pages.training), len(pages.held_out), pages.report) == (6, 2, "8 asked, 8 kept")
    assert not {page["name"] for page in pages.training} & {page["name"] for page in pages.held_out}
    rows = [json.loads(line) for line in (twelve_pages / "metadata.jsonl").read_text().splitlines()]
    texts = {row["file_name"]: row["text"] for row in rows}
    for page in [*pages.training, *pages.held_out]:
        assert page["html"] == texts[page["name"]] and page["html_tokens"] == encoder.html_tokens(page["html"])
        assert page["image_tokens"] == encoder.family.image_tokens(processor, page["width"], page["height"])
    first, second = capsys.readouterr().out.splitlines()
    assert first == "8 asked, 8 kept" and second.startswith("6 training and 2 held-out pages")


def test_another_reading_leaves_its_own_mark_alone(twelve_pages, alone, tmp_path):
    """By which another machine sees that this run, and not an earlier one, has read the pages on a shared disk."""
    marks = []
    for _ in range(2):
        prepare(twelve_pages, tmp_path)
        (mark,) = (tmp_path / "pages").glob("prepared-*")
        marks.append(mark.name)
    assert marks[0] != marks[1]


def test_data_that_cannot_be_trained_on_ends_the_run(twelve_pages, alone, tmp_path):
    with pytest.raises(DataError, match="no column html; there are: file_name, text"):
        prepare(twelve_pages, tmp_path, html_column="html")


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
