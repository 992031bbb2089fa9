"""Gradients of two real gloo ranks, sent as they lie, beside DeepSpeed's buckets; and a GPU's streams, which
are played: there is no GPU here."""

import contextlib
import os
import re
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import call_in_processes, free_port
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

from training import memory_plan, scattering, split_masters, zero3
from training.errors import PipelineError

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "zero_optimization": {"stage": 3, "sub_group_size": 6_000, "stage3_param_persistence_threshold": 10**11},
    "steps_per_print": 1_000_000,
}
BF16 = {"bf16": {"enabled": True}}
KINDS = {"fp32": {}, "bf16": BF16, "bf16 added in fp32": BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}}
LARGE, WIDE, ODD = 1_000, 60, 61


class Layer(torch.nn.Module):
    """One of ZeRO's leaf modules: two large weights, and small ones of which two ranks have the same shares."""

    def __init__(self):
        super().__init__()
        self.norm, self.up = torch.nn.LayerNorm(WIDE), torch.nn.Linear(WIDE, 2 * WIDE)
        self.down = torch.nn.Linear(2 * WIDE, WIDE, bias=False)

    def forward(self, hidden):
        return hidden + self.down(torch.nn.functional.gelu(self.up(self.norm(hidden))))


def model_of_all_kinds() -> torch.nn.Module:
    """Outside of layers a large weight that two do not share evenly, small ones of both kinds, and a frozen one."""
    frozen = torch.nn.Linear(WIDE, WIDE).requires_grad_(False)
    first = [torch.nn.Linear(8, ODD), torch.nn.Linear(ODD, ODD), torch.nn.Linear(ODD, WIDE)]
    return torch.nn.Sequential(*first, Layer(), frozen, Layer(), torch.nn.Linear(WIDE, 1))


def begin(rank: int, world: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    zero3.begin_on_cpu(60)


def engine_of(ours: bool, config: dict, optim: str = "adamw_torch"):
    """A lean one, with gradients sent by calls of their own or in DeepSpeed's buckets."""
    import deepspeed

    torch.manual_seed(0)
    model = model_of_all_kinds()
    zero3.set_leaves(model, ["Layer"])
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optim == "adamw_8bit":
        from bitsandbytes.optim import AdamW

        optimizer = AdamW(learning, lr=1e-2, optim_bits=8, min_8bit_size=256)
    else:
        optimizer = torch.optim.AdamW(learning, lr=1e-2)
    config = CONFIG | config | {"zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    split_masters.begin(engine, "bf16" in config)
    zero3.WORTH_A_CALL = LARGE if ours else 10**11
    engine.theirs = []  # what goes DeepSpeed's way
    take = engine.optimizer.reduce_independent_p_g_buckets_and_remove_grads
    engine.optimizer.reduce_independent_p_g_buckets_and_remove_grads = lambda parameter: (
        engine.theirs.append(parameter.ds_id) or take(parameter)
    )
    keep, scattering.begin = scattering.begin, scattering.begin if ours else lambda *unused: None
    zero3.lean_steps(engine)
    scattering.begin = keep
    return engine


def learn(engine, number: int, part: int) -> float:
    draw = torch.Generator().manual_seed(100 * number + 10 * part + torch.distributed.get_rank())
    inputs = torch.randn(2, 8, generator=draw).to(engine.optimizer.dtype)
    loss = (engine(inputs) - inputs.sum(-1, keepdim=True)).float().square().mean()
    engine.backward(loss)
    return loss.item()


def kept_by(engine) -> dict[str, torch.Tensor]:
    kept = engine.optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    return {name: kept[p.ds_id].clone() for name, p in engine.module.named_parameters() if p.requires_grad}


def send_both_ways(rank: int, world: int, port: int, kind: str, optim: str) -> None:
    begin(rank, world, port)
    ours, theirs = (engine_of(ours, KINDS[kind], optim) for ours in (True, False))
    scatters = ours.optimizer.independent_gradient_partition_epilogue.__self__
    calls, send = [], scatters.send
    scatters.send = lambda gradients, *rest: calls.append(len(gradients)) or send(gradients, *rest)
    if kind != "fp32":  # some are sent, and written over, while the backward pass goes on
        scatters.limit = 3 * 2 * WIDE * WIDE
    ids = {parameter.ds_id: name for name, parameter in ours.module.named_parameters()}
    told = {engine: [] for engine in (ours, theirs)}
    for number in range(3):
        for part in range(2):
            for engine in told:
                told[engine].append(learn(engine, number, part))
            kept = kept_by(ours)
            assert all(torch.equal(kept[name], wanted) for name, wanted in kept_by(theirs).items())
            assert all(gradient.any() for name, gradient in kept.items() if rank == 0 or gradient.numel() > 1)
            assert all(parameter.grad is None for parameter in ours.module.parameters())
            for engine in told:
                engine.step()
                assert engine.was_step_applied() or part == 0
    assert told[ours] == told[theirs] and told[ours][0] > told[ours][-1]
    # A last bias of one number, and what 61 numbers have: by buckets, in each of six backward passes.
    uneven = {f"{layer}.{part}" for layer in (0, 1) for part in ("weight", "bias")} - {"0.weight"} | {"6.bias"}
    found = sorted(ids[number] for number in ours.theirs)
    assert found == sorted(6 * [*uneven]), found
    assert len(theirs.theirs) == 6 * len(kept)
    assert calls == 6 * ([5, 1] if kind == "fp32" else [1, 1, 1, 1, 1, 1]), calls


@pytest.mark.parametrize(("kind", "optim"), [*((kind, "adamw_torch") for kind in KINDS), ("bf16", "adamw_8bit")])
def test_gradients_and_losses_are_those_of_deepspeeds_buckets(kind, optim, tmp_path):
    """To the bit, over gloo; on masters whole and split; large ones by one call at the end, and each by its own."""
    port = free_port()
    call_in_processes(send_both_ways, [[rank, 2, port, kind, optim] for rank in range(2)], tmp_path)


def send_in_order(rank: int, world: int, port: int) -> None:
    """What each rank sends, and when it is computed anew: layers one rank recomputes and the other does not."""
    begin(rank, world, port)
    engine = engine_of(True, {})
    ours = engine.optimizer.independent_gradient_partition_epilogue.__self__
    if rank:
        layer = engine.module[3]
        forward = layer.forward
        layer.forward = lambda hidden: torch.utils.checkpoint.checkpoint(forward, hidden, use_reentrant=False)
    up, small = 2 * WIDE * WIDE, 2 * (2 * WIDE + 2 * WIDE) + WIDE + 8 * ODD + WIDE
    sent, send, ours.limit = [], ours.send, 6 * up
    ours.send = lambda gradients, *rest: sent.append([*map(len, gradients)]) or send(gradients, *rest)
    learn(engine, 0, 0)
    assert sent == [[up, up], [up, up], [ODD * WIDE], [small]] and ours.order is None
    ours.order = [-1] * rank  # as if the first pass had been another one there
    with pytest.raises(PipelineError, match=r"different orders.*--fast False"):
        learn(engine, 0, 1)


def test_ranks_send_in_one_order_or_the_first_backward_pass_is_refused(tmp_path):
    port = free_port()
    call_in_processes(send_in_order, [[rank, 2, port] for rank in range(2)], tmp_path)


def stay_with_buckets(rank: int, world: int, port: int) -> None:
    begin(rank, world, port)
    zero = CONFIG["zero_optimization"]
    for config, why in (
        ({"zero_optimization": zero | {"reduce_scatter": False}}, "reduce_scatter is False"),
        (
            {"zero_optimization": zero | {"reduce_bucket_size": 4_000}},
            "4,932 numbers are of small ones, of no multiple of 2",
        ),
        ({"communication_data_type": "fp32"} | BF16, "37,392 numbers .* or travel otherwise"),
    ):
        engine = engine_of(True, config)
        told = []
        scattering.say = told.append
        assert scattering.begin(engine.optimizer, LARGE) is None
        assert len(told) == 1 and re.search(f"by DeepSpeed's own buckets, which takes longer: {why}", told[0]), told
        assert engine.optimizer.independent_gradient_partition_epilogue.__func__ is (
            Stage3.independent_gradient_partition_epilogue
        )
        learn(engine, 0, 0)
        assert len(engine.theirs) == len(kept_by(engine))


def test_what_a_users_json_asks_for_stays_with_deepspeed_and_is_said(tmp_path):
    port = free_port()
    call_in_processes(stay_with_buckets, [[rank, 2, port] for rank in range(2)], tmp_path)


@pytest.mark.parametrize("name", scattering.USUAL)
def test_each_unusual_setting_is_an_obstacle(name):
    optimizer = Stage3.__new__(Stage3)
    vars(optimizer).update(scattering.USUAL, communication_data_type=torch.bfloat16, ipg_buckets={torch.bfloat16: None})
    assert scattering.obstacle(optimizer) == ""
    setattr(optimizer, name, "played")
    assert scattering.obstacle(optimizer) == f"{name} is played"
    assert "SimpleNamespace has a way of its own" in scattering.obstacle(SimpleNamespace(**scattering.USUAL))


class Played:
    """A GPU of two ranks, this one being the second: `done` says what its streams were told, in order."""

    def __init__(self, monkeypatch, limit: int):
        self.done, self.calls, self.events, self.gradients = [], 0, 0, []
        self.layers = torch.nn.ModuleList([torch.nn.Identity() for _ in range(3)])
        for layer in self.layers:
            layer._z3_leaf = True
        monkeypatch.setattr(torch.cuda, "stream", self.aside)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_event=self.wait_event))
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        group = {
            "get_rank": lambda group: 1,
            "get_world_size": lambda group: 2,
            "get_backend": lambda group: "nccl",
            "reduce_scatter_single": self.call,
        }
        group |= {"distributed_c10d": SimpleNamespace(_coalescing_manager=self.together)}
        monkeypatch.setattr(scattering, "dist", SimpleNamespace(**group, ReduceOp=torch.distributed.ReduceOp))
        monkeypatch.setattr(scattering, "same_everywhere", lambda order: self.done.append("orders compared") or True)
        self.kept = {number: torch.zeros(20) for number in range(8)} | {8: torch.zeros(1), 9: torch.zeros(2)}
        self.optimizer = SimpleNamespace(
            reduce_bucket_size=limit,
            reduce_and_partition_stream=SimpleNamespace(device="cuda:1"),
            reduce_independent_p_g_buckets_and_remove_grads=None,
            independent_gradient_partition_epilogue=lambda: self.done.append("their end"),
            step=lambda closure=None: self.done.append("step"),
            module=self.layers,
            micro_step_id=0,
            _DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition=self.kept,
        )
        self.ours = scattering.Scattering(self.optimizer, "all", {number: number < 8 for number in self.kept})

    @contextlib.contextmanager
    def aside(self, stream):
        assert stream is self.optimizer.reduce_and_partition_stream
        self.done.append("aside")
        yield
        self.done.append("back")

    @contextlib.contextmanager
    def together(self, group, async_ops):
        assert (group, async_ops) == ("all", True)
        self.calls += 1
        number = self.calls
        self.shares = []
        yield SimpleNamespace(wait=lambda: self.done.append(f"there is {number}"))
        several = f", {len(self.shares)} at once" if len(self.shares) > 1 else ""
        self.done.append(f"send {number}{several}")

    def call(self, share, gradient, op, group):
        assert (op, group) == (torch.distributed.ReduceOp.AVG, "all")
        self.shares.append(share.copy_(gradient.view(2, -1)[1]))  # of two equal ones the average is each

    def event(self):
        self.events += 1
        number = self.events
        return SimpleNamespace(record=lambda: self.done.append(f"event {number}"), number=number)

    def wait_event(self, event):
        self.done.append(f"computing waits for {event.number}")

    def backward(self, *numbers: int) -> list[weakref.ref]:
        """Gradients of these parameters: as many ones as they have numbers, times 1 + their id."""
        left = []
        for number in numbers:
            gradient = torch.full((2, len(self.kept[number])), 1.0 + number)
            left.append(weakref.ref(gradient.untyped_storage()))
            self.gradients.append(SimpleNamespace(ds_id=number, grad=gradient))
            self.optimizer.reduce_independent_p_g_buckets_and_remove_grads(self.gradients[-1])
        return left

    def forward(self, *numbers: int) -> None:
        for number in numbers:
            self.layers[number](None)

    def end(self) -> None:
        self.optimizer.independent_gradient_partition_epilogue()

    def take_done(self) -> list[str]:
        done, self.done = self.done, []
        return done


def sent(number: int, several: str = "") -> list[str]:
    return [f"send {number}{several}", "aside", f"there is {number}", f"event {number}", "back"]


def test_memory_of_gradients_goes_back_behind_what_computes_and_python_waits_for_none(monkeypatch):
    """Two gradients of 40 numbers are under way at once where a bucket has 100; what computes waits for the oldest
    before it makes others, for the last in the middle of the next forward pass, and for all before the step."""
    played = Played(monkeypatch, limit=100)
    left = played.backward(0, 1)
    assert played.take_done() == [*sent(1), *sent(2)]
    left += played.backward(2)
    assert played.take_done() == ["computing waits for 1", *sent(3)]
    assert [storage() is None for storage in left] == [True, False, False]
    played.backward(9, 8)
    assert played.take_done() == [], "small ones wait for the end"
    played.forward(1)
    assert played.take_done() == [], "a layer is computed anew in this backward pass"
    played.end()
    assert played.take_done() == [*sent(4), "their end", "orders compared"]
    played.forward(0)
    assert played.take_done() == [] and [storage() is None for storage in left] == [True, False, False]
    played.forward(1, 2)
    assert played.take_done() == [f"computing waits for {number}" for number in (2, 3, 4)]
    assert [storage() is None for storage in left] == [True, True, True]
    assert all((kept == (1 + number) * (number in (0, 1, 2, 8, 9))).all() for number, kept in played.kept.items())
    played.optimizer.micro_step_id = 1
    played.backward(3, 0, 8)
    played.end()
    assert played.take_done() == [*sent(5), *sent(6), *sent(7), "their end"]
    there = {number: kept[0].item() for number, kept in played.kept.items() if kept.any()}
    assert there == {0: 1 + 1, 1: 2, 2: 3, 3: 4, 8: 9 + 9, 9: 10}
    played.optimizer.step()
    assert played.take_done() == [*(f"computing waits for {number}" for number in (5, 6, 7)), "step"]
    assert not played.ours.under_way and played.ours.numbers == 0
    played.forward(0, 1, 2)
    played.optimizer.step()
    assert played.take_done() == ["step"]


def test_gradients_of_a_layer_go_by_one_call_and_the_last_ones_at_the_end(monkeypatch):
    """A third of a bucket at least; what waits counts as under way, and is sent before the bucket would be full."""
    played = Played(monkeypatch, limit=240)
    played.backward(0)
    assert played.take_done() == []
    played.backward(1, 2)
    assert played.take_done() == sent(1, ", 2 at once"), "the third one waits"
    played.backward(3, 4, 5, 6)
    assert played.take_done() == [*sent(2, ", 2 at once"), *sent(3, ", 2 at once"), "computing waits for 1"]
    played.end()
    assert played.take_done() == [*sent(4), "their end", "orders compared"]
    assert all((played.kept[number] == 1 + number).all() for number in range(7)) and not played.kept[7].any()
    played.optimizer.micro_step_id = 1
    played.backward(0, 1, 7)
    played.end()
    there = [played.kept[number][0].item() for number in range(8)]
    assert there == [2, 4, 3, 4, 5, 6, 7, 8] and not played.ours.waiting and played.ours.waiting_numbers == 0


def test_what_waits_for_its_call_counts_as_under_way(monkeypatch):
    """Of a bucket of 200 numbers two calls of 80 leave 40: the sixth gradient has no room beside the fifth."""
    played = Played(monkeypatch, limit=200)
    played.backward(0, 1, 2, 3, 4)
    assert played.take_done() == [*sent(1, ", 2 at once"), *sent(2, ", 2 at once")]
    played.backward(5)
    assert played.take_done() == ["computing waits for 1", *sent(3, ", 2 at once")]


def test_a_large_gradient_behind_others_that_wait_does_not_make_more_than_a_bucket(monkeypatch):
    played = Played(monkeypatch, limit=240)
    played.kept[1] = torch.zeros(110)  # of 220 numbers
    played.backward(0, 1)
    assert played.take_done() == [*sent(1), "computing waits for 1", *sent(2)]


def test_a_gradient_larger_than_a_bucket_travels_alone(monkeypatch):
    played = Played(monkeypatch, limit=30)
    played.backward(0, 1)
    assert played.take_done() == [*sent(1), "computing waits for 1", *sent(2)]


def test_a_gradient_that_comes_in_two_parts_is_refused(monkeypatch):
    """In any backward pass: the one before has been looked at as well."""
    played = Played(monkeypatch, limit=100)
    played.backward(0, 1)
    played.end()
    with pytest.raises(PipelineError, match=r"has come twice in one backward pass.*--fast False"):
        played.backward(0, 1, 0)


@pytest.mark.parametrize("limit", [100, 1_000])
def test_gradients_under_way_stay_within_what_plans_have_room_for(limit, monkeypatch):
    """Counted at each call: DeepSpeed's bucket, those under way, and small ones, as they are or joined."""
    played, most = Played(monkeypatch, limit), [0]
    send = played.ours.send

    def watched(*given) -> None:
        send(*given)
        waiting = sum(parameter.grad.numel() for parameter in played.gradients if parameter.grad is not None)
        most.append(limit + played.ours.numbers + played.ours.waiting_numbers + waiting)

    played.ours.send = watched
    for step in range(12):
        played.optimizer.micro_step_id = step % 3
        played.backward(9, *range(8), 8)
        played.end()
        played.forward(0, 1, 2)
        assert played.ours.numbers == 0
    assert min(2 * limit, limit + 8 * 40) - 40 < max(most) <= memory_plan.BUCKETS * limit
