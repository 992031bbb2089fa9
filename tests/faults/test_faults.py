"""A fault in one of two ranks: how all of them end, that nobody stays behind, and that what is on disk goes on."""

import json
import re
import signal

import pytest
from conftest import small_run
from fault_runs import End, run_with_fault

from training.checkpoints import newest_whole

pytestmark = pytest.mark.slow
WAYS = ["DDP", "ZeRO-3"]


def flags_of(base, pages, **changes) -> list[str]:
    step = {"max_steps": 6, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 2}
    return small_run(base, pages, **(step | changes))


def newest_step(folder) -> int:
    return int(newest_whole(folder / "holo1_dom_finetune_output").name.split("-")[1])


def words(end: End) -> str:
    return f"{end.codes} after {end.seconds:.1f} s, {end.left} left\n{end.said[-5000:]}"


def test_every_way_to_ask_for_a_stop_on_one_rank_saves_the_same_step(tiny_base, pages_folder, tmp_path):
    for kind in ("term", "int", "hup", "usr1"):
        place = tmp_path / kind
        place.mkdir()
        end = run_with_fault("DDP", flags_of(tiny_base, pages_folder), place, f"{kind}@1:3", ranks=2)
        assert (end.codes, end.left) == ([85, 85], []), words(end)
        assert newest_step(place) == 3


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_rank_ends_the_other_and_the_run_goes_on_from_the_last_checkpoint(
    way, tiny_base, pages_folder, tmp_path
):
    flags = flags_of(tiny_base, pages_folder)
    end = run_with_fault(way, flags, tmp_path, "kill@1:4", ranks=2, env={"TRAINED": str(tmp_path / "trained")})
    assert end.codes[1] == -signal.SIGKILL and end.codes[0] not in (0, None) and end.left == [], words(end)
    assert newest_step(tmp_path) == 2
    end = run_with_fault(way, [*flags, "--resume"], tmp_path, ranks=2, env={"TRAINED": str(tmp_path / "trained")})
    assert end.codes == [0, 0], words(end)
    trained = [json.loads(line) for line in (tmp_path / "trained" / "rank-0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in trained] == [1, 2, 3, 3, 4, 5, 6]
    assert trained[2] == trained[3], "the lost step is trained again on the same pages"


@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("way", WAYS)
def test_memory_that_runs_out_on_one_rank_ends_both_with_83(way, place, tiny_base, pages_folder, tmp_path):
    flags = flags_of(tiny_base, pages_folder)
    end = run_with_fault(way, flags, tmp_path, "oom@1:4", ranks=2, env={"FAULT_PLACE": place}, wrapped=True)
    assert (end.codes[1], end.reported["rank-1"], end.left) == (83, "83", []), words(end)
    assert end.reported.get("rank-0") in ("83", "1"), words(end)


def test_memory_of_the_machine_that_runs_out_is_83_too(tiny_base, pages_folder, tmp_path):
    end = run_with_fault("plain", flags_of(tiny_base, pages_folder), tmp_path, "oomhost@0:4")
    assert (end.codes, end.left) == ([83], []), words(end)


@pytest.mark.parametrize("way", ["plain", "ZeRO-3"])
def test_a_full_disk_while_saving_leaves_the_earlier_checkpoint_alone(way, tiny_base, pages_folder, tmp_path):
    ranks = 1 if way == "plain" else 2
    end = run_with_fault(way, flags_of(tiny_base, pages_folder), tmp_path, "full@0:4", ranks=ranks, wrapped=True)
    assert end.codes == [81] * ranks, words(end)
    assert newest_step(tmp_path) == 2
    assert not list((tmp_path / "holo1_dom_finetune_output").glob("*.partial")) and end.left == []


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_hangs_is_found_and_both_write_their_stacks(way, tiny_base, pages_folder, tmp_path):
    flags = flags_of(tiny_base, pages_folder, hang_timeout=5, ddp_timeout=60)
    end = run_with_fault(way, flags, tmp_path, "hang@1:4", ranks=2, timeout=60)
    assert (end.codes, end.left) == ([84, 84], []), words(end)
    told = re.findall(r"^rank 1 hangs: training, 3 steps done, no progress for .*pages: .*", end.said, re.MULTILINE)
    assert told and "--hang_timeout SECONDS" in told[0], words(end)
    stacks = sorted((tmp_path / "holo1_dom_finetune_output" / "stacks").iterdir())
    assert [file.name for file in stacks] == ["rank-0.txt", "rank-1.txt"]
    assert "in hang" in stacks[1].read_text()


def test_a_slow_step_is_no_hang(tiny_base, pages_folder, tmp_path):
    flags = flags_of(tiny_base, pages_folder, max_steps=4)
    end = run_with_fault("DDP", flags, tmp_path, "slow@1:4", ranks=2)
    assert (end.codes, end.left) == ([0, 0], []), words(end)
