"""Split masters under DeepSpeed itself, on CPUs: the same steps, the same checkpoints, the same ends."""

import importlib
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    GATHERED,
    PLAIN_JSON,
    PROGRAMS,
    ROOT,
    call_in_processes,
    free_port,
    output,
    small_run,
    start_zero_3,
    weights,
)
from torch.utils._python_dispatch import TorchDispatchMode

from training import split_masters
from training.settings import Machine, resolve

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "sub_group_size": 1_500, "stage3_param_persistence_threshold": 100},
    "steps_per_print": 1_000_000,
    "zero_allow_untested_optimizer": True,  # bitsandbytes'
}
EIGHT_BIT = ("adamw_8bit", KERNEL := "adamw_8bit by our kernel")
OPTIMS = ("adamw_torch", "adamw_torch_fused", *EIGHT_BIT)
INTERPRETED = dict.fromkeys(OPTIMS) | {KERNEL: {"TRITON_INTERPRET": "1"}}
ON_RESTS = []  # of each step that the kernel took in this process, whether masters were split
WIDE = 61  # shards that no power of two divides: the last one of two is padded


def begin(rank: int, world: int, port: int) -> None:
    from training import zero3

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    zero3.begin_on_cpu(60)
    zero3.trust_own_classes()


def engine_of(optim: str = "adamw_torch", whole: bool = False, **config):
    """DeepSpeed's, of a model whose weights fill several of its groups, with masters as asked for."""
    import deepspeed

    torch.manual_seed(0)
    middle = [torch.nn.Linear(WIDE, WIDE), torch.nn.LayerNorm(WIDE), torch.nn.GELU()]
    model = torch.nn.Sequential(
        torch.nn.Linear(8, WIDE), *middle, torch.nn.Linear(WIDE, WIDE), torch.nn.Linear(WIDE, 1)
    )
    groups = [[p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() == 1]]
    groups = [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}]
    if optim in EIGHT_BIT:
        from bitsandbytes.optim import AdamW

        optimizer = AdamW(groups, lr=1e-2, optim_bits=8, min_8bit_size=256)
        if optim == KERNEL:
            by_kernel()
    else:
        optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=optim == "adamw_torch_fused")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG | config)
    kept = split_masters.begin(engine, not whole)
    assert (kept is None) == whole
    return engine


def by_kernel() -> None:
    """As on a GPU, but interpreted: on whole masters in place of bitsandbytes' function, on split ones as such."""
    from bitsandbytes import functional

    from kernels import adamw_8bit_kernel

    if not hasattr(functional.optimizer_update_8bit_blockwise, "theirs"):
        functional.optimizer_update_8bit_blockwise = adamw_8bit_kernel.stand_in(
            functional.optimizer_update_8bit_blockwise, "cpu"
        )
        step = adamw_8bit_kernel.step
        adamw_8bit_kernel.step = lambda *given: ON_RESTS.append(len(given) > 6) or step(*given)
    split_masters.eight_bit.step_on_rests = lambda device: adamw_8bit_kernel


def train(engine, steps: int, first: int = 0, spoil: int | None = None) -> list[tuple]:
    """What is told of each step: the loss, the norm, whether it was taken; the gradients of step `spoil` are none."""
    told = []
    for number in range(first, first + steps):
        for part in range(2):
            draw = torch.Generator().manual_seed(100 * number + 10 * part + torch.distributed.get_rank())
            inputs = torch.randn(2, 8, generator=draw).bfloat16()
            loss = (engine(inputs) - inputs.sum(-1, keepdim=True)).float().square().mean()
            loss = loss * float("inf") if number == spoil else loss
            engine.backward(loss)
            engine.step()
        told.append((loss.item(), float(engine.get_global_grad_norm()), engine.was_step_applied()))
    return told


def masters_of(engine) -> list[torch.Tensor]:
    return real(engine, engine.optimizer.state_dict()["fp32_flat_groups"])


def real(engine, groups: list[torch.Tensor]) -> list[torch.Tensor]:
    """Without what pads the last rank's shards, which is whatever stood in memory (deepspeed 0.19.8)."""
    return [torch.cat(parts).detach() for parts in engine.optimizer.get_groups_without_padding(groups)]


def units_apart(one: torch.Tensor, other: torch.Tensor) -> int:
    """Of the last place of fp32, where signs are the same."""
    return int((one.view(torch.int32) - other.view(torch.int32)).abs().max())


def learn_alike(rank: int, world: int, port: int, optim: str) -> None:
    begin(rank, world, port)
    whole, split = engine_of(optim, whole=True), engine_of(optim)
    groups = split.optimizer.fp16_groups
    assert len(groups) >= 4 and len({split.optimizer.sub_group_to_group_id[n] for n in range(len(groups))}) == 2
    for engine in (whole, split):
        engine.waits = waits_of(optim)
        engine.told = train(engine, 6, spoil=3)
    if optim in EIGHT_BIT:
        assert len(split.waits) == 1 < len(whole.waits), (len(split.waits), len(whole.waits))
    assert [step[2] for step in split.told] == [True, True, True, False, True, True]
    for one, other in zip(whole.told, split.told):
        assert one == pytest.approx(other, rel=1e-3, nan_ok=True)
    assert split.skipped_steps == whole.skipped_steps == 1
    for one, other in zip(masters_of(whole), masters_of(split)):
        apart = (one - other).abs()
        assert (apart <= 1e-6 + 1e-5 * one.abs()).all(), apart.max()
    weights = [real(engine, engine.optimizer.fp16_partitioned_groups_flat) for engine in (whole, split)]
    for one, other in zip(*weights):
        assert (one.view(torch.int16) - other.view(torch.int16)).abs().max() <= 1
    assert all(rests.dtype == torch.int16 and rests.any() for rests in split_of(split).rests)
    if optim in EIGHT_BIT:
        states = split.optimizer.optimizer.state.values()
        assert {state["state1"].dtype for state in states} == {torch.uint8, torch.float32}
        assert {*ON_RESTS} == ({True, False} if optim == KERNEL else set())
    tensors = split.optimizer.fp32_partitioned_groups_flat
    assert not any(tensor.grad is not None for tensor in tensors)
    assert all(tensor.isnan().all() and tensor.untyped_storage().nbytes() == 4 for tensor in tensors)
    with pytest.raises(RuntimeError, match="single memory location"):
        tensors[0].data.copy_(torch.ones(tensors[0].shape))


def waits_of(optim: str) -> list:
    """Where bitsandbytes waits for the GPU from here on, which on a CPU is no wait."""
    waits = []
    if optim in EIGHT_BIT:
        importlib.import_module("bitsandbytes.optim.optimizer").sync_gpu = waits.append
    return waits


def split_of(engine) -> split_masters.SplitMasters:
    return engine.optimizer.state_dict.__self__


def keep_and_go_on(rank: int, world: int, port: int, folder: str, optim: str) -> None:
    """Every way from one kind of masters to the other, by DeepSpeed's own checkpoints; all come to the same."""
    begin(rank, world, port)
    kinds = {"whole": True, "split": False}
    shapes, final = {}, {}
    for name, whole in kinds.items():
        engine = engine_of(optim, whole)
        train(engine, 3)
        engine.save_checkpoint(f"{folder}/{name}", tag="3")
        shapes[name] = saved(Path(folder, name, "3"), rank)
        train(engine, 2, first=3)
        final[name, name] = masters_of(engine)
    assert same_kinds(shapes["whole"]) == same_kinds(shapes["split"])
    for before in kinds:
        for after, whole in kinds.items():
            engine = engine_of(optim, whole)
            assert engine.load_checkpoint(f"{folder}/{before}", tag="3")[0]
            for one, other in zip(masters_of(engine), real(engine, shapes[before]["fp32_flat_groups"])):
                assert units_apart(one, other) <= 1
            train(engine, 2, first=3)
            for one, other in zip(masters_of(engine), final[before, before]):
                assert (one - other).abs().max() <= 1e-6, (before, after, (one - other).abs().max())
            if before == after:
                assert all(torch.equal(*both) for both in zip(masters_of(engine), final[before, before]))


def saved(folder: Path, rank: int) -> dict:
    (file,) = folder.glob(f"*zero_pp_rank_{rank}_*optim_states.pt")
    return torch.load(file, weights_only=True)["optimizer_state_dict"]


def same_kinds(value):
    """A checkpoint without its numbers."""
    if isinstance(value, dict):
        return {name: same_kinds(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [same_kinds(part) for part in value]
    if torch.is_tensor(value):
        return type(value), value.dtype, value.shape, value.stride(), value.requires_grad, sorted(vars(value))
    return type(value)


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("world", [1, 2])
def test_steps_are_those_of_whole_masters(world, optim, tmp_path):
    """Losses and norms as they are told, a step whose norm is no number left out, masters, weights."""
    port = free_port()
    call_in_processes(
        learn_alike, [[rank, world, port, optim] for rank in range(world)], tmp_path, env=INTERPRETED[optim]
    )


@pytest.mark.parametrize(
    ("world", "optim"), [(1, "adamw_torch"), (2, "adamw_torch_fused"), (2, "adamw_8bit"), (1, KERNEL)]
)
def test_checkpoints_are_deepspeeds_own_and_either_kind_goes_on_from_the_others(world, optim, tmp_path):
    port = free_port()
    given = [[rank, world, port, tmp_path, optim] for rank in range(world)]
    call_in_processes(keep_and_go_on, given, tmp_path, env=INTERPRETED[optim])


def go_on_converted(rank: int, world: int, port: int, folder: str, optim: str) -> None:
    """From a checkpoint as it is, and from the same one converted: either kind of masters counts its steps alike."""
    from training import zero3

    begin(rank, world, port)
    engine = engine_of(optim, whole=True)
    train(engine, 3)
    checkpoint = Path(folder, "checkpoint-3")
    engine.save_checkpoint(str(checkpoint), tag="3")
    train(engine, 2, first=3)
    if rank == 0:
        zero3.convert(checkpoint, Path(folder, "converted"))
    torch.distributed.barrier()
    places = {"as it is": (checkpoint, {}), "converted": (Path(folder, "converted", "checkpoint-3"), {})}
    zero3.expect_converted(places["converted"][1])
    for place, config in places.values():
        for whole in (True, False):
            other = engine_of(optim, whole, **config)
            assert other.load_checkpoint(str(place), tag="3")[0]
            zero3.count_steps_apart(other)
            other.optimizer.optimizer.param_groups[1]["weight_decay"] = 0.0  # resuming.honour_typed does it in a run
            states = other.optimizer.optimizer.state
            counts = [(tensor, states[tensor]["step"]) for tensor in other.optimizer.fp32_partitioned_groups_flat]
            found = {
                (count.item(), count.dtype, count.shape, count.device == tensor.device) for tensor, count in counts
            }
            assert found == {(3, torch.float32, torch.Size(), True)}, (place, whole, found)
            assert len({count.data_ptr() for _, count in counts}) == len(counts) > 1
            train(other, 2, first=3)
            for one, two in zip(masters_of(other), masters_of(engine)):
                assert (one - two).abs().max() <= 1e-6, (place, whole)


@pytest.mark.parametrize(("world", "optim"), [(1, "adamw_torch"), (2, "adamw_torch_fused")])
def test_steps_are_counted_alike_by_a_checkpoint_and_a_converted_one(world, optim, tmp_path):
    port = free_port()
    call_in_processes(go_on_converted, [[rank, world, port, tmp_path, optim] for rank in range(world)], tmp_path)


def fail_and_go_on(rank: int, world: int, port: int, folder: str) -> None:
    """A full disk, a full memory, a torn checkpoint: training goes on as if nothing had been."""
    begin(rank, world, port)
    engine, other = engine_of(), engine_of()
    kept = split_of(engine)
    for each in (engine, other):
        train(each, 3)
    save, join = torch.save, split_masters.masters.join
    torch.save = split_masters.masters.join = failing
    for what in (lambda: engine.save_checkpoint(folder, tag="3"), engine.optimizer.state_dict):
        with pytest.raises(OSError, match="played"):
            what()
    torch.save, split_masters.masters.join = save, join
    state = engine.optimizer.state_dict()
    torn = state | {"fp32_flat_groups": [*state["fp32_flat_groups"][:1], torch.ones(3)]}
    with pytest.raises(RuntimeError, match="must match the size"):
        engine.optimizer.load_state_dict([torn] * world)
    assert all(rests is not None for rests in kept.rests)
    engine.optimizer.load_state_dict([state] * world)
    assert train(engine, 2, first=3) == train(other, 2, first=3)
    assert all(torch.equal(*both) for both in zip(masters_of(engine), masters_of(other)))
    # Weights alone were loaded: masters are what these are.
    engine.optimizer.refresh_fp32_params()
    weights = real(engine, engine.optimizer.fp16_partitioned_groups_flat)
    assert all(torch.equal(wide, half.float()) for wide, half in zip(masters_of(engine), weights))


class Allocations(TorchDispatchMode):
    """Bytes of every storage that is made inside, in order."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        given = {value.untyped_storage()._cdata for value in arguments if torch.is_tensor(value)}
        for value in made if isinstance(made, list | tuple) else [made]:
            if torch.is_tensor(value) and value.untyped_storage()._cdata not in given:
                self.sizes.append(value.untyped_storage().nbytes())
        return made


def save_where_there_is_no_room(rank: int, world: int, port: int) -> None:
    """To the bit as on the GPU; a CPU stands for it, which has no room for even the first group."""
    begin(rank, world, port)
    engine = engine_of()
    train(engine, 3)
    lengths = [len(weights) for weights in engine.optimizer.fp16_partitioned_groups_flat]
    wanted = engine.optimizer.state_dict()["fp32_flat_groups"]
    split_masters.room_on, split_masters.AT_ONCE = lambda device: 4 * min(lengths) - 1, 50
    with Allocations() as made:
        found = [split_of(engine).copy_of(number) for number in range(len(lengths))]
    assert all(torch.equal(one.view(torch.int32), two.view(torch.int32)) for one, two in zip(found, wanted))
    assert [vars(one) for one in found] == [vars(two) for two in wanted]
    large = [size for size in made.sizes if size > 4 * 50]
    assert large == [4 * length for length in lengths], "nothing large but what is written, which is the CPU's"


def test_a_save_takes_no_memory_of_a_gpu_that_has_none_left(tmp_path):
    call_in_processes(save_where_there_is_no_room, [[0, 1, free_port()]], tmp_path)


@pytest.mark.parametrize(
    ("free", "share", "room"),
    [(1.0, 1.0, 1 + 9 - 2), (0.0, 1.0, 9 - 2), (70.0, 0.5, 40 - 30 - 2), (0.0, 0.3, 24 - 30 - 2)],
)
def test_what_a_save_may_take_is_asked_for(free, share, room, monkeypatch):
    """Of 80 GiB: torch holds 39 of which it uses 30."""
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30 * gib)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 39 * gib)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: share)
    assert split_masters.room_on(torch.device("cuda")) == pytest.approx(room * gib)
    assert split_masters.room_on(torch.device("cpu")) == float("inf")


def failing(*unused, **options):
    raise OSError("played: no space left on device")


def test_a_save_or_a_load_that_fails_leaves_masters_as_they_were(tmp_path):
    port = free_port()
    call_in_processes(fail_and_go_on, [[rank, 2, port, tmp_path] for rank in range(2)], tmp_path)


@pytest.mark.parametrize(
    ("argv", "planned"),
    [
        ("--deepspeed ds_z3.json", True),
        ("--deepspeed ds_z3.json --optim adamw_torch", True),
        ("--deepspeed ds_z3.json --optim adamw_8bit", True),
        ("--deepspeed ds_z3.json --optim adafactor", False),
        ("--deepspeed ds_z3.json --lora", False),
        ("--deepspeed ds_z3.json --fp16 --bf16 False", False),
        ("--deepspeed ds_z3_offload.json", False),
        ("", False),
    ],
)
def test_what_is_split_is_known_before_anything_is_loaded(argv, planned, monkeypatch):
    monkeypatch.chdir(ROOT)
    for machine in (Machine(True, True, "NVIDIA H100"), Machine(False)):
        resolved = resolve([*argv.split(), "--plan"], machine)
        assert split_masters.are_planned(resolved.settings, resolved.training, resolved.deepspeed) == planned
    resolved = resolve(argv.split(), Machine(False))  # trains in fp32
    assert not split_masters.are_planned(resolved.settings, resolved.training, resolved.deepspeed)


def test_the_names_that_are_replaced_are_deepspeeds():
    """A release that renames one would go its own way, with masters that are no numbers."""
    from deepspeed.checkpoint.constants import FP32_FLAT_GROUPS
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero

    names = "state_dict load_state_dict _restore_from_bit16_weights _prepare_sub_group unscale_and_clip_grads "
    names += "_optimizer_step _reassign_or_swap_out_partitioned_parameters _unflatten_partitioned_parameters"
    assert [name for name in [*names.split(), "_release_sub_group"] if not callable(getattr(Zero, name, None))] == []
    assert split_masters.FP32_GROUPS == FP32_FLAT_GROUPS


def test_without_triton_torch_takes_the_steps_and_that_is_said(monkeypatch, capsys):
    import kernels

    monkeypatch.setitem(sys.modules, "kernels.adamw_kernel", None)
    monkeypatch.delattr(kernels, "adamw_kernel", raising=False)  # where another test has imported it
    assert split_masters.step_on(torch.device("cuda")) is split_masters.masters.step_by_torch
    assert "masters: triton is missing" in capsys.readouterr().out


def test_neighbours_are_one_and_others_stay_apart():
    flat = torch.arange(10.0)
    (one,) = split_masters.neighbours([flat[2:5], flat[5:6], flat[6:9]])
    assert torch.equal(one, flat[2:9]) and one.data_ptr() == flat[2:].data_ptr()
    for parts in ([flat[2:5], flat[6:9]], [flat[5:6], flat[2:5]], [flat[:2], flat[2:].clone()], [flat[:4:2], flat[4:]]):
        assert [part.tolist() for part in split_masters.neighbours(parts)] == [part.tolist() for part in parts]


OUT, FINAL = "holo1_dom_finetune_output", "holo1_dom_finetune_final"


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "config"), [(2, PLAIN_JSON), (1, GATHERED)], ids=["two", "one, gathered"])
def test_a_training_is_that_of_whole_masters(processes, config, exact_base, pages_folder, tmp_path):
    """In bf16, through the training script: the losses that are printed, checkpoints, their ways to plain fp32 weights;
    goes on from a checkpoint of whole masters, and with another number of processes."""
    flags = {"max_steps": 4, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    flags |= {"learning_rate": 1e-3, "warmup_steps": 0, "save_total_limit": 9}
    options = {"script": str(PROGRAMS / "bf16_on_a_cpu.py"), "config": config}
    losses, final, plain = {}, {}, {}

    def end(name: str, typed: list[str], count: int, masters: str) -> str:
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        done = start_zero_3(typed, place, processes=count, env={"MASTERS": masters}, **options)
        assert done.returncode == 0, output(done)
        assert ("masters: bf16 weights and 16-bit rests" in done.stdout) == (masters == "split")
        steps = [line.split("loss ")[1].split()[0] for line in done.stdout.splitlines() if line.startswith("step ")]
        losses[name], final[name] = losses.get(name, [])[:2] + steps, weights(place / FINAL)
        return done.stdout

    for name in ("whole", "split"):
        end(name, small_run(exact_base, pages_folder, **flags), processes, name)
        plain[name] = plain_weights(tmp_path / name / OUT / "checkpoint-2")
    assert losses["whole"] == losses["split"] and len(set(losses["whole"])) == 4
    before = weights(exact_base)
    learned = length(final["split"], before)
    assert plain["whole"].keys() == plain["split"].keys()
    assert length(plain["whole"], plain["split"]) < 1e-3 * learned
    if processes == 1:  # how runs go on does not depend on what is gathered
        return
    # A checkpoint of whole masters goes on with split ones.
    shutil.rmtree(tmp_path / "whole" / OUT / "checkpoint-4")
    assert f"going on from {OUT}/checkpoint-2" in end("whole", ["--resume"], processes, "split")
    # And one of split masters on another number of processes, dealt out again by DeepSpeed.
    shutil.rmtree(tmp_path / "split" / OUT / "checkpoint-4")
    kept = final["split"]
    assert "processes in" in end("split", ["--resume"], 3 - processes, "split")
    assert losses["whole"][:3] == losses["split"][:3] and len(losses["split"]) == 4
    assert length(kept, final["whole"]) < 0.02 * learned and length(kept, final["split"]) < 0.02 * learned


def plain_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """By DeepSpeed's own script, which it leaves in each checkpoint."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))


def length(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of their difference."""
    parts = [(part.detach().float() - other[name].detach().float()).square().sum() for name, part in one.items()]
    return torch.stack(parts).sum().sqrt().item()


def test_shards_are_made_views_again_where_the_weights_were_moved():
    made = []
    weights = torch.arange(10, dtype=torch.bfloat16)
    optimizer = SimpleNamespace(fp16_partitioned_groups=[[weights[:4], weights[4:]]])
    optimizer._unflatten_partitioned_parameters = made.append
    split = SimpleNamespace(optimizer=optimizer, parts=lambda number: (None, weights))
    split_masters.SplitMasters.unflatten(split, 0)
    assert made == []
    optimizer.fp16_partitioned_groups[0][1] = weights[4:].clone()
    split_masters.SplitMasters.unflatten(split, 0)
    assert made == [0]
