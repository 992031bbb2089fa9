"""What a run tells of itself while it trains."""

import contextlib
import logging
import warnings
from types import SimpleNamespace

import pytest
import torch

from training import processes, progress
from training.processes import DEPRECATED, SAID_IN_VAIN, in_columns, matters
from training.progress import Meter, draw_loss, judge_segments, log_line, segment_words


def test_loss_picture_survives_an_empty_history(tmp_path):
    draw_loss([], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def line(steps: int = 1000, **changed: float) -> str:
    logs = {"loss": 0.4321, "learning_rate": 9.1e-6, "pages_per_second": 4.354, "seconds_per_step": 1.84, "mfu": 0.417}
    logs |= {"data_wait_share": 0.004, "peak_gib": 71.94} | changed
    return log_line(logs, SimpleNamespace(global_step=250, max_steps=steps))


def test_a_steps_line_tells_what_matters_in_100_columns():
    said = "step 250/1000  loss 0.4321  lr 9.1e-06  4.35 pages/s  MFU 42 %  wait 0 %  71.9 GiB  23:00 min left"
    assert line() == said
    longest = {"loss": 12.3456, "pages_per_second": 128.4, "data_wait_share": 0.99, "peak_gib": 139.6}
    assert len(line(99_999, seconds_per_step=3, **longest)) <= 100, line(99_999, seconds_per_step=3, **longest)


@pytest.mark.parametrize(
    ("seconds_per_step", "left"), [(0.001, "0:01 min"), (0.0796, "1:00 min"), (4.799, "59:59 min"), (96, "20:00 h")]
)
def test_the_time_left_is_told_in_hours_or_minutes(seconds_per_step, left):
    assert line(seconds_per_step=seconds_per_step).endswith(f"  {left} left")


def test_long_lines_are_folded_and_paths_are_not():
    path = "/" + "a-b/" * 40
    assert in_columns(f"saved in {path} at last").splitlines() == ["saved in", f"  {path}", "  at last"]
    assert max(map(len, in_columns("word " * 100).splitlines())) <= 100


@pytest.mark.parametrize("name", SAID_IN_VAIN)
def test_of_a_library_only_the_line_that_is_said_in_vain_is_left_out(name):
    def record(text: str) -> logging.LogRecord:
        return logging.LogRecord(name, logging.WARNING, "", 0, text, (), None)

    assert not matters(record(f"[RANK 0] {SAID_IN_VAIN[name]} and so on"))
    assert matters(record("the optimizer is not what you think"))


def test_only_the_deprecations_that_deepspeed_causes_are_left_out():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", DEPRECATED, FutureWarning)
        warnings.warn(
            "`torch.distributed.reduce_scatter_tensor` is deprecated. Use another", FutureWarning, stacklevel=1
        )
        warnings.warn("`torch.load` is deprecated. Use another", FutureWarning, stacklevel=1)
    assert [str(one.message)[:12] for one in heard] == ["`torch.load`"]


def test_a_hub_that_does_not_answer_is_told_once_with_the_remedy(monkeypatch, caplog):
    """By the real client against a port at which nobody listens; its waits are as long as here is patience."""
    from huggingface_hub import constants
    from huggingface_hub.utils import http_backoff

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # as it is in CI, where nobody would be asked
    monkeypatch.setattr(processes, "told_of_hub", [])
    processes.hush_libraries()
    with caplog.at_level("WARNING"), pytest.raises(Exception, match="refused"):
        http_backoff("HEAD", "http://127.0.0.1:9/x", max_retries=2, base_wait_time=0.01)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("the Hub does not answer (") and "HF_HUB_OFFLINE=1" in said and "refused" in said


def test_a_line_has_the_highest_plan_of_its_batches_where_they_are_planned():
    meter, args = Meter(), SimpleNamespace(device="cpu")
    assert "planned_gib" not in meter.read(args)
    meter.planned_gib = 74.5
    assert meter.read(args)["planned_gib"] == 74.5
    assert "planned_gib" not in meter.read(args), "of the next line there is none yet"


def test_a_gpu_does_not_wait_until_other_ranks_have_sent_what_their_lines_tell(monkeypatch):
    """Streams are played: there is no GPU here. The sums of all ranks are asked for on a stream of their own, behind
    what has computed the loss, and the stream that computes is told to wait for nothing."""
    done, streams = [], [SimpleNamespace(wait_stream=lambda other: pytest.fail("the stream that computes waits"))]

    def another(device):
        return SimpleNamespace(wait_stream=lambda other: done.append(f"behind {streams.index(other)}"))

    @contextlib.contextmanager
    def on(stream):
        streams.append(stream)
        yield
        streams.pop()

    monkeypatch.setattr(progress, "_beside", [])
    monkeypatch.setattr(torch.cuda, "Stream", another)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: done.append(f"on {len(streams)}")))
    monkeypatch.setattr(progress, "on_device", lambda numbers, device, dtype: torch.tensor(numbers, dtype=dtype))
    for name in ("add_up", "take_largest"):
        monkeypatch.setattr(progress, name, lambda numbers: done.append(f"all ranks on {len(streams)}"))
    meter = Meter()
    meter.add(torch.tensor(2.0))
    for _ in range(2):  # one stream for all steps
        meter.send(torch.device("cuda"))
    assert done == 2 * ["behind 0", "all ranks on 2", "all ranks on 2", "on 2"] and len(progress._beside) == 1
    assert meter.sent[0].tolist() == [2.0, 0.0, 0.0, 0.0, 0.0]
    # What is read there is kept until it has been.
    loss = SimpleNamespace(is_cuda=True, record_stream=lambda stream: done.append(stream is progress._beside[0]))
    with progress.beside(torch.device("cuda"), [loss, torch.ones(())]):
        assert len(streams) == 2 and streams[1] is progress._beside[0]
    assert done[-1] is True


# What memory_snapshot of torch 2.14 says of a segment, but for its blocks: written by its sources, as no GPU is here.
SEGMENT = {"device": 0, "address": 139_955_120_799_744, "allocated_size": 512, "active_size": 512, "requested_size": 4}
SEGMENT |= {"stream": 0, "segment_type": "large", "segment_pool_id": (0, 0), "frames": [], "blocks": []}
OLD, NEW = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


def segments(grown: float, fixed: float) -> list[dict]:
    """Two of each kind, that many GiB of each."""
    sizes = [(grown / 2, True), (fixed / 2, False)] * 2
    return [SEGMENT | {"total_size": int(gib * 2**30), "is_expandable": grows} for gib, grows in sizes if gib]


@pytest.mark.parametrize(
    ("grown", "fixed", "told"),
    [
        (70.0, 0.0, "torch's memory grows in segments, 70.0 GiB so far"),
        (70.0, 0.5, "torch's memory grows in segments, 70.0 GiB so far; 0.5 do not"),
    ],
)
def test_segments_that_grow_are_told(grown, fixed, told):
    assert judge_segments(segments(grown, fixed), {OLD: "expandable_segments:True"}) == told


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({}, f"because {OLD} is empty: give it expandable_segments:True. 12.0 GiB lie in fixed ones"),
        ({OLD: "max_split_size_mb:40"}, f"because {OLD} is max_split_size_mb:40: add expandable_segments:True. "),
        ({NEW: "expandable_segments:False"}, f"because {NEW} is expandable_segments:False: add "),
        ({OLD: "", NEW: "expandable_segments:True"}, f"because {OLD} is empty: give it "),
        ({OLD: "max_split_size_mb:40", NEW: "expandable_segments:True"}, f"because {OLD} is max_split_size_mb:40: "),
        ({OLD: "expandable_segments: True"}, f"though {OLD} is expandable_segments: True: this GPU's driver, "),
    ],
    ids=str,
)
def test_segments_that_do_not_grow_are_told_by_the_setting_that_torch_goes_by(environment, why):
    """Of two names the older one, even if it is empty; what it asks for need not be what the driver does."""
    told = judge_segments(segments(0.0, 12.0), environment)
    assert told.startswith(f"torch's memory does not grow in segments, {why}") and "memory may run out" in told


def test_a_machine_without_a_gpu_has_no_segments(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert segment_words() == ""


def test_an_allocator_that_cannot_be_asked_is_named_with_what_chose_it(monkeypatch):
    """What torch says of a GPU is played: there is none here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: pytest.fail("it has none"))
    assert "CUDA's own allocator" in segment_words() and f"leave `backend` out of {OLD} and {NEW}" in segment_words()


def test_a_run_tells_how_often_torch_gave_its_cache_back(monkeypatch):
    """And what no peak counts. What torch says of a GPU is played: there is none here."""
    told = {"active_bytes.all.peak": 3 * 2**29, "num_alloc_retries": 2}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: told)
    assert progress.cache_words().startswith("torch gave its cache back 2 times; at most 1.5 GiB")
