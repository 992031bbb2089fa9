"""Where a rank is, and when it hangs: by real threads, signals, and real ranks that are stuck."""

import json
import os
import signal
import time

import pytest

from training import heartbeat
from training.heartbeat import FIRST_STEP_S, LEAST_STEP_S, WRITTEN_BATCH_S, Heart


def read_beat(folder, wanted=lambda beat: True, seconds: float = 20) -> dict:
    """The first beat that is as wanted."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (folder / "beat-0").exists() and wanted(beat := json.loads((folder / "beat-0").read_text())):
            return beat
        time.sleep(0.05)
    raise AssertionError("no such beat")


@pytest.fixture
def status(tmp_path, monkeypatch):
    folder = tmp_path / "status"
    folder.mkdir()
    monkeypatch.setenv("HOLO1_STATUS_DIR", str(folder))
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.05)
    return folder


def test_the_wrapper_reads_where_a_rank_is(status, tmp_path):
    with Heart() as heart:
        assert read_beat(status)["stage"] == "loading"
        heart.knows(tmp_path / "out", collective_s=7200, hang_timeout=None)
        heart.enter("training")
        heart.trains_on(["page 1", "page 2"], 2)
        beat = read_beat(status, lambda beat: beat["pages"])
        assert {name: beat[name] for name in ("stage", "step", "limit_s", "pages", "micro_batch", "output_dir")} == {
            "stage": "training",
            "step": 0,
            "limit_s": FIRST_STEP_S,
            "pages": ["page 1", "page 2"],
            "micro_batch": 2,
            "output_dir": str(tmp_path / "out"),
        }
        assert beat["stacks"] == str(tmp_path / "out" / "stacks" / "rank-0.txt")
        assert time.time() - 20 < beat["since"] <= beat["time"] <= time.time()
        heart.step_ends(1)
        later = read_beat(status, lambda beat: beat["step"] == 1)
        assert later["since"] > beat["since"] and later["limit_s"] == LEAST_STEP_S
        with heart.stage("saving"):
            assert read_beat(status, lambda beat: beat["stage"] == "saving")["limit_s"] == 7200
        assert read_beat(status, lambda beat: beat["stage"] == "training")["since"] >= later["since"]
    assert not [path for path in status.iterdir() if path.name != "beat-0"], "written aside, and renamed"


def test_a_rank_that_becomes_another_program_has_no_beat_until_that_begins(status):
    with Heart() as heart:
        read_beat(status)
        heart.falls_silent()
        time.sleep(0.2)
        assert not (status / "beat-0").exists()


def test_a_signal_writes_the_stacks_of_all_threads_into_a_file(status, tmp_path):
    with Heart() as heart:
        heart.knows(tmp_path, collective_s=7200, hang_timeout=None)
        os.kill(os.getpid(), signal.SIGUSR2)
        text = (tmp_path / "stacks" / "rank-0.txt").read_text()
    assert "test_heartbeat.py" in text and text.count("hread 0x") >= 2, text
    with Heart() as heart:
        heart.knows(tmp_path / "other", collective_s=7200, hang_timeout=None)
    assert not (tmp_path / "other" / "stacks").exists(), "a run that never hung leaves none"


def test_each_stage_has_a_limit_of_its_own(tmp_path):
    heart = Heart()

    def limit(stage: str) -> float | None:
        heart.enter(stage)
        return heart.limit_s(heart.place)

    heart.collective_s = 7200.0
    assert [limit(stage) for stage in ("loading", "reading pages", "publishing")] == [None] * 3, "no hang, however long"
    assert (limit("saving"), limit("judging"), limit("training")) == (7200, WRITTEN_BATCH_S, FIRST_STEP_S)
    heart.longest_s = 2.0
    assert limit("training") == LEAST_STEP_S
    heart.longest_s = 100.0
    assert limit("training") == 1000
    heart.hang_timeout = 60.0
    assert (limit("training"), limit("judging")) == (60, WRITTEN_BATCH_S)
    heart.hang_timeout = 5000.0
    assert limit("judging") == 5000
    with heart.waiting():
        assert heart.limit_s(heart.place) == 7200, "who waits for others leaves it to them"
    with heart.waiting(False):
        assert heart.limit_s(heart.place) == 5000


def test_a_process_that_was_stopped_for_a_while_has_not_hung(monkeypatch):
    """As after Ctrl-Z and fg; the clock is played."""
    monkeypatch.delenv("HOLO1_STATUS_DIR", raising=False)
    heart, ended, now = Heart(), [], time.monotonic()
    monkeypatch.setattr(Heart, "end_hanging", lambda self, place, quiet_s, limit_s: ended.append(quiet_s))
    heart.hang_timeout = 30.0
    heart.enter("training")
    for second in (1, 2, 3, 1000, 1001, 1020):
        monkeypatch.setattr(heartbeat.time, "monotonic", lambda second=second: now + second)
        heart.last_beat = max(heart.last_beat, now + second - 1) if second != 1000 else heart.last_beat
        heart.beat()
    assert not ended
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now + 1031)
    heart.last_beat = now + 1030
    heart.beat()
    assert ended == [pytest.approx(31, abs=0.5)]
