"""Checkpoints that are whole or not there, and what another training makes of an output folder."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import call_in_processes, free_port

from training import checkpoints, processes
from training.checkpoints import (
    MANIFEST,
    RESTARTED,
    Checkpoints,
    fault_of,
    keep_earlier_results,
    newest_whole,
    read_manifest,
    seal,
    write_manifest,
)
from training.errors import DiskError, PipelineError, SettingsError, exit_code

# -----------------------------------------------------------------------------
# Whole or not there


def fill(folder) -> None:
    """Files of each kind that the Trainer and DeepSpeed write."""
    for name in ("model.safetensors", "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest", "rng.pth"):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode() * 100)
    (folder / "trainer_state.json").write_text("{}")


def save(kept: Checkpoints, step: int) -> None:
    with kept.staged():
        fill(kept.staging / f"checkpoint-{step}")
    kept.settle()


def test_a_checkpoint_appears_whole_and_older_ones_go_after_it(tmp_path):
    kept = Checkpoints(tmp_path, 2, {"processes": 1})
    for step in (2, 4, 10):
        save(kept, step)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-10"}
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-10" and fault_of(tmp_path / "checkpoint-4") == ""
    manifest = read_manifest(tmp_path / "checkpoint-10")
    assert manifest["record"] == {"processes": 1} and len(manifest["files"]) == 5


def test_what_a_rank_writes_after_another_has_gone_is_not_left(tmp_path, monkeypatch):
    """The lost rank is a stand-in: really, gloo notices it only if it dies between two lines of `staged`."""

    kept = Checkpoints(tmp_path, 2, {})

    def gather_or_lose(value: object) -> list[object]:
        if kept.staging.exists():
            raise RuntimeError("Connection closed by peer")
        return [value]

    monkeypatch.setattr(checkpoints, "gather", gather_or_lose)
    with pytest.raises(RuntimeError, match="closed by peer"):
        save(kept, 2)
    assert not [*tmp_path.iterdir()]


def test_none_goes_while_there_are_fewer_than_may_stay(tmp_path):
    """Five of ten: the oldest went, counted from the wrong end of the list."""
    kept = Checkpoints(tmp_path, 10, {})
    for step in range(1, 7):
        save(kept, step)
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in range(1, 7)}


def write_on_two_ranks(rank: int, port: int, folder: str) -> None:
    """Rank 1 finds the disk full in its own part; it stays until rank 0 knows that, or for ten seconds."""
    places = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()} | {"OMP_NUM_THREADS": "1"})
    torch.distributed.init_process_group("gloo")
    processes.emergency_group()
    kept, told = Checkpoints(Path(folder) / "out", 2, {}), Path(folder) / "told-0"
    for fails in (False, True):
        try:
            with kept.staged():
                fill(kept.staging / "checkpoint-2") if rank == 0 else None
                if fails and rank == 1:
                    raise OSError(errno.ENOSPC, "No space left on device")
            kept.settle()
        except Exception as error:
            Path(folder, f"told-{rank}").write_text(f"{exit_code(error)} {type(error).__name__} {error}")
        both = processes.all_ranks_arrive(10)  # as for an emergency checkpoint
        Path(folder, f"both-{rank}").write_text(str(both))
    end = time.monotonic() + 10
    while not told.exists() and time.monotonic() < end:
        time.sleep(0.02)
    os._exit(0)


@pytest.mark.slow
def test_a_rank_that_cannot_write_its_part_tells_the_others(tmp_path):
    """They would wait for it in the next collective, and under NCCL long after it has gone."""
    port = free_port()
    call_in_processes(write_on_two_ranks, [[rank, port, tmp_path] for rank in range(2)], tmp_path)
    told = [(tmp_path / f"told-{rank}").read_text() for rank in range(2)]
    assert told[0] == "81 PipelineError another rank could not write its part of a checkpoint: 81, disk"
    assert told[1].startswith("81 DiskError") and "nothing half-written is left" in told[1]
    assert [(tmp_path / f"both-{rank}").read_text() for rank in range(2)] == ["True", "True"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]


def test_what_was_half_written_is_neither_a_checkpoint_nor_left(tmp_path):
    kept = Checkpoints(tmp_path, 2, {})
    fill(kept.staging / "checkpoint-2")  # a run that was killed while it wrote
    assert newest_whole(tmp_path) is None
    kept.clear()
    assert not [*tmp_path.iterdir()]
    save(kept, 2)
    with pytest.raises(RuntimeError, match="a bug"), kept.staged():
        fill(kept.staging / "checkpoint-4")
        raise RuntimeError("a bug")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_training_goes_on_while_the_manifest_is_written(tmp_path, monkeypatch):
    """The thread waits here until it is let go: what calls `staged` has long returned."""
    go_on, real = threading.Event(), write_manifest

    def slowly(folder, record):
        go_on.wait(30)
        real(folder, record)

    monkeypatch.setattr(checkpoints, "write_manifest", slowly)
    kept = Checkpoints(tmp_path, 2, {})
    with kept.staged():
        fill(kept.staging / "checkpoint-2")
    assert newest_whole(tmp_path) is None, "not vouched for yet"
    go_on.set()
    kept.settle()
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-2"


def test_a_failure_of_the_thread_is_raised_when_the_checkpoint_is_asked_for(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path, 2, {})
    save(kept, 2)

    def full(folder, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_manifest", full)
    with pytest.raises(DiskError, match="checkpoint-2 is untouched, and --resume goes on from it"):
        save(kept, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    monkeypatch.setattr(checkpoints, "write_manifest", lambda folder, record: 1 / 0)
    with pytest.raises(PipelineError, match="ZeroDivisionError"):
        save(kept, 4)


# -----------------------------------------------------------------------------
# Damage


def flip(path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def forge(folder, **changes) -> None:
    """A manifest that agrees with itself, and not with the files."""
    content = read_manifest(folder) | changes
    (folder / MANIFEST).write_text(json.dumps({**content, "seal": seal(content)}))


SHARD = "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt"
WAYS = {
    "a byte of the weights": (lambda f: flip(f / "model.safetensors"), "model.safetensors is damaged"),
    "a byte of a shard": (lambda f: flip(f / SHARD, 7), "optim_states.pt is damaged"),
    "a byte of the state": (lambda f: flip(f / "trainer_state.json", 0), "trainer_state.json is damaged"),
    "a byte of a random state": (lambda f: flip(f / "rng.pth"), "rng.pth is damaged"),
    "a byte of the manifest": (lambda f: flip(f / MANIFEST, 60), MANIFEST),
    "a shard cut off": (lambda f: os.truncate(f / SHARD, 10), "has 10 bytes of"),
    "weights cut off": (lambda f: os.truncate(f / "model.safetensors", 0), "has 0 bytes of"),
    "the manifest cut off": (lambda f: os.truncate(f / MANIFEST, 40), "cannot be read"),
    "an empty manifest": (lambda f: os.truncate(f / MANIFEST, 0), "cannot be read"),
    "an empty `latest`": (lambda f: os.truncate(f / "latest", 0), "latest has 0 bytes"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors missing"),
    "no shard": (lambda f: (f / SHARD).unlink(), "optim_states.pt missing"),
    "no state": (lambda f: (f / "trainer_state.json").unlink(), "trainer_state.json missing"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "has no manifest.json"),
    "a file of a stranger": (lambda f: (f / "optimizer.pt").write_bytes(b"x"), "nobody vouches for it"),
    "a link": (lambda f: ((f / "latest").unlink(), (f / "latest").symlink_to(f / "rng.pth")), "no plain file"),
    "another format": (lambda f: forge(f, format=99), "has format 99, this version reads 1"),
    "a manifest that is no object": (lambda f: (f / MANIFEST).write_text("[1]"), "is damaged"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_torn_checkpoint_is_named_and_passed_over_for_the_whole_older_one(way, tmp_path, capsys):
    kept = Checkpoints(tmp_path, 3, {})
    save(kept, 2)
    save(kept, 4)
    tear, words = WAYS[way]
    tear(tmp_path / "checkpoint-4")
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-2"
    said = capsys.readouterr().out
    assert said.startswith("passed over: checkpoint-4 ") and words in said
    save(kept, 4)  # trained again: the whole one takes the torn one's place
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-4"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}


def test_where_none_is_whole_nothing_is_begun_again_silently(tmp_path):
    kept = Checkpoints(tmp_path, 3, {})
    save(kept, 2)
    flip(tmp_path / "checkpoint-2" / "latest")
    with pytest.raises(SettingsError, match="none of the checkpoints"):
        newest_whole(tmp_path)


def test_a_folder_of_another_name_is_no_checkpoint(tmp_path):
    save(Checkpoints(tmp_path, None, {}), 2)
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-9.old"):
        fill(tmp_path / name)
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-2" and newest_whole(tmp_path / "nowhere") is None


# -----------------------------------------------------------------------------
# Earlier results


def test_what_an_earlier_run_left_moves_aside_and_a_resumed_one_keeps_its_own(tmp_path):
    for name in ("checkpoint-3", "evaluation/page-0001"):
        (tmp_path / name).mkdir(parents=True)
    keep_earlier_results(tmp_path, resumes=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", "evaluation"}
    keep_earlier_results(tmp_path, resumes=False)
    (place,) = tmp_path.iterdir()
    assert place.name.startswith("earlier-") and (place / "evaluation" / "page-0001").is_dir()
    assert (place / "checkpoint-3").is_dir()
    keep_earlier_results(tmp_path, resumes=False)
    assert [*tmp_path.iterdir()] == [place], "nothing to move, no folder"


def leave_results(folder, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)


def test_a_restarted_training_keeps_what_it_has_written_and_the_next_one_does_not(tmp_path, monkeypatch):
    leave_results(tmp_path, "evaluation/page-0001")
    monkeypatch.setenv(RESTARTED, "1")
    keep_earlier_results(tmp_path, resumes=False)
    assert (tmp_path / "evaluation" / "page-0001").is_dir() and RESTARTED not in os.environ
    keep_earlier_results(tmp_path, resumes=False)
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["evaluation"], "the evaluation of an earlier run\n"),
        (["checkpoint-3"], "1 checkpoint of an earlier run; --resume would go on from them\n"),
        (
            ["checkpoint-3", "checkpoint-6", "evaluation"],
            "2 checkpoints and the evaluation of an earlier run; --resume would go on from them\n",
        ),
    ],
    ids=["evaluation", "checkpoint", "both"],
)
def test_only_what_was_there_is_said_to_have_moved(names, said, tmp_path, capsys):
    leave_results(tmp_path, *names)
    keep_earlier_results(tmp_path, resumes=False)
    (place,) = tmp_path.iterdir()
    assert capsys.readouterr().out == f"moved to {place}: {said}"


def test_two_trainings_that_begin_in_one_second_move_to_two_folders(tmp_path, monkeypatch):
    now = time.localtime()
    monkeypatch.setattr(time, "strftime", lambda form, strftime=time.strftime: strftime(form, now))
    for number in range(3):
        leave_results(tmp_path, f"evaluation/page-{number}")
        keep_earlier_results(tmp_path, resumes=False)
    first, *others = sorted(tmp_path.iterdir())
    assert [place.name.removeprefix(first.name) for place in others] == ["-2", "-3"]
    assert [next((place / "evaluation").iterdir()).name for place in (first, *others)] == ["page-0", "page-1", "page-2"]
