"""What is known of DeepSpeed's insides holds for the version that is installed."""

import contextlib
import functools
import inspect
import re
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from conftest import GATHERED, PROGRAMS, output, small_run, start_zero_3, weights
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

from training import zero3
from training.errors import PipelineError

WHERE_THE_COUNT_IS = [({"fused": True}, "meta"), ({"capturable": True}, "meta"), ({}, "cpu")]


@pytest.mark.parametrize(("options", "device"), WHERE_THE_COUNT_IS)
def test_steps_are_counted_where_torchs_own_loading_would_put_the_count(options, device):
    """A fused step on a GPU refuses one in the CPU's memory, where DeepSpeed leaves that of a converted checkpoint. No
    GPU here: a tensor without memory stands for one on another device."""
    weights = [torch.nn.Parameter(torch.empty(3, device="meta")) for _ in range(2)]
    inner, shared = torch.optim.AdamW(weights), torch.tensor(7.0)
    inner.param_groups[0] |= options
    for tensor in weights:
        inner.state[tensor] = {"step": shared}
    zero3.count_steps_apart(SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner)))
    counts = [inner.state[tensor]["step"] for tensor in weights]
    assert [(count.device.type, count.dtype) for count in counts] == [(device, torch.float32)] * 2
    assert counts[0] is not counts[1] and not any(count is shared for count in counts)


def test_pages_are_written_with_torchs_own_linear_function(monkeypatch):
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    with zero3.plain_linear():
        assert torch.nn.functional.linear is torch._C._nn.linear
    assert torch.nn.functional.linear is zero3_linear_wrap


def test_deepspeed_has_what_is_replaced_or_asked_by_name():
    """A release that renames one of these would otherwise go its own, slower way, or stop an hour later."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero

    replaced = ["get_grad_norm_direct", "reduce_independent_p_g_buckets_and_remove_grads", "step"]
    asked = ["_partition_all_parameters", "_get_param_partition_group"]
    assert [name for name in replaced + asked if not callable(getattr(Zero, name, None))] == []
    assert callable(DeepSpeedEngine.was_step_applied) and callable(DeepSpeedZeRoOffload.partition_all_parameters)


def test_a_model_that_was_loaded_whole_is_refused():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(PipelineError, match="not sharded while loading"):
        zero3.check_sharded(model)
    with zero3.gathered([*model.parameters()], writer=0):  # needs no process group where nothing is sharded
        assert model.weight.shape == (2, 2)
    for parameter in model.parameters():
        parameter.ds_id = 0
    zero3.check_sharded(model)


def test_models_are_whole_inside_and_sharded_again_after():
    from transformers.integrations import deepspeed as integration

    config = integration.HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert zero3.is_on()
    with pytest.raises(KeyError, match="inside"), zero3.without_zero3():
        assert not zero3.is_on()
        raise KeyError("inside")
    assert zero3.is_on()
    del config  # known by a weak reference alone
    assert not zero3.is_on()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_lean_steps_learn_what_deepspeeds_own_do(processes, exact_base, pages_folder, tmp_path):
    """On one process whose weights stay gathered they are never released, and gradients need no bucket; two gather what
    a step has changed when it has ended, and a layer's weights travel while the layers before it compute at first."""
    flags = small_run(exact_base, pages_folder, max_steps=4, learning_rate=1e-2, max_grad_norm=0.1, eval_every=2)
    final, released, whole, coming, beside = {}, {}, {}, {}, {}
    for plain in (True, False):
        place = tmp_path / str(plain)
        place.mkdir()
        zero = GATHERED["zero_optimization"] | ({"reduce_bucket_size": 10} if processes == 1 and not plain else {})
        options = {
            "config": GATHERED | {"zero_optimization": zero},
            "script": str(PROGRAMS / "lean_steps.py"),
            "env": {"PLAIN_STEPS": str(int(plain))},
        }
        done = start_zero_3(flags, place, processes=processes, **options)
        assert done.returncode == 0, output(done)
        final[plain] = weights(place / "holo1_dom_finetune_final")
        told = re.search(r"^released (\d+) times, whole \[(.*)\], coming \[(.*)\], beside \[(.*)\]$", done.stdout, re.M)
        released[plain], whole[plain], coming[plain], beside[plain] = told.groups()
    assert max((final[True][name] - final[False][name]).abs().max() for name in final[True]) <= 1e-6
    assert int(released[True]) - int(released[False]) == 4, released  # one for each step
    assert set(whole[True].split(", ")) != {"0"} and len(whole[True].split(", ")) == 4
    assert whole[False] == whole[True], whole
    assert coming[True] == "", "DeepSpeed's own"
    gathered = [int(number) for number in filter(None, coming[False].split(", "))]
    # The proof of the fast path gathers what the first step trains with, two calls ahead, as does the pass after an
    # evaluation; a step asks for all.
    assert gathered == ([10, 20, 10, 20] if processes == 2 else []), coming
    assert len(beside[False]) > 2 and (set(beside[False].split(", ")) == {"0"}) == (processes == 2), beside


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Where no group was made; two real ones are started elsewhere. Each layer's weights are enough for a call."""
    monkeypatch.setattr(zero3.dist, "get_world_size", lambda group=None: 1)
    monkeypatch.setattr(zero3, "GATHERED_AT_ONCE", 1)


class Played(torch.nn.Module):
    """Layers of one weight each, as ZeRO-3 has them between steps: a shard that only `Gathering.gather` makes
    whole. The second is called as a module or not."""

    def __init__(self, called: bool, layers: int = 2):
        super().__init__()
        self.called = called
        self.layers = torch.nn.ModuleList([torch.nn.Linear(1, 1, bias=False) for _ in range(layers)])
        for layer in self.layers:
            layer._z3_leaf, layer.weight.ds_numel = True, zero3.WORTH_A_CALL
            layer.weight.ds_status, layer.weight.ds_tensor = ZeroParamStatus.NOT_AVAILABLE, torch.zeros(1)
            layer.weight.ds_secondary_tensor = layer.weight.ds_process_group = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        first, second = self.layers
        if hidden.isnan():
            raise ValueError("before any layer")
        return (second if self.called else second.forward)(first(hidden))


@pytest.mark.parametrize(
    ("order", "wanted"), [([0, 1, 2, 3], [[0, 1, 2], [0, 1, 2, 3]]), ([3, 0, 1, 2], [[0, 1, 2, 3]] * 2)]
)
def test_weights_are_asked_for_some_layers_before_their_turn(order, wanted, monkeypatch):
    """Not all at the beginning, for which a GPU would wait; a layer that comes before its turn has its own."""
    monkeypatch.setattr(zero3, "CALLS_AHEAD", 2)
    model, asked, seen = Played(called=True, layers=4), [], []

    def gather(self, places):
        ((parameter, _),) = places
        asked.append([*model.parameters()].index(parameter))
        parameter.ds_status = ZeroParamStatus.INFLIGHT
        return SimpleNamespace(wait=lambda: None)

    model.forward = lambda hidden: [model.layers[number](hidden) for number in order]
    monkeypatch.setattr(zero3.Gathering, "gather", gather)
    zero3.Gathering(model)
    for layer in model.layers:
        layer.register_forward_hook(lambda *unused: seen.append([*asked]))
    model(torch.zeros(1))
    assert seen[:2] == wanted and seen[-1] == [0, 1, 2, 3]
    assert zero3.missing_of([*model.parameters()]) == []


def test_small_layers_come_together_and_the_first_called_waits(monkeypatch):
    """Two of them are enough for a call; those of no layer come by themselves, since nobody is at work meanwhile."""
    monkeypatch.setattr(zero3, "GATHERED_AT_ONCE", 2)
    monkeypatch.setattr(zero3, "CALLS_AHEAD", 2)
    model, done = Played(called=True, layers=5), []
    model.layers[0]._z3_leaf = False
    names = {parameter: number for number, parameter in enumerate(model.parameters())}

    def gather(self, places):
        came = [names[parameter] for parameter, _ in places]
        done.append(f"asked for {came}")
        for parameter, _ in places:
            parameter.ds_status = ZeroParamStatus.INFLIGHT
        return SimpleNamespace(wait=lambda: done.append(f"there are {came}"))

    def work(number):
        return lambda *unused: done.append(f"{number} is done")

    model.forward = lambda hidden: [model.layers[number](hidden) for number in (0, 2, 1, 3, 4)]
    monkeypatch.setattr(zero3.Gathering, "gather", gather)
    zero3.Gathering(model)
    for number, layer in enumerate(model.layers):
        layer.register_forward_hook(work(number))
    model(torch.zeros(1))
    begun = ["asked for [0]", "asked for [1, 2]", "there are [0]", "asked for [3, 4]", "0 is done"]
    rest = ["there are [1, 2]", "2 is done", "1 is done", "there are [3, 4]", "3 is done", "4 is done"]
    assert done == begun + rest
    assert zero3.missing_of([*model.parameters()]) == []


@pytest.mark.parametrize("called", [True, False])
def test_a_layer_waits_for_its_weights_or_the_forward_pass_is_refused(called, monkeypatch):
    done, model = [], Played(called)

    def gather(self, places):
        ((parameter, _),) = places
        parameter.ds_status, name = ZeroParamStatus.INFLIGHT, [*model.parameters()].index(parameter)
        done.append(f"asked for {name}")
        return SimpleNamespace(wait=lambda: done.append(f"there is {name}"))

    monkeypatch.setattr(zero3.Gathering, "gather", gather)
    zero3.Gathering(model)
    model.layers[0].register_forward_hook(lambda *unused: done.append("0 is done"))
    with contextlib.nullcontext() if called else pytest.raises(PipelineError, match="1 layers were not called"):
        model(torch.zeros(1))
    assert done == ["asked for 0", "asked for 1", "there is 0", "0 is done", "there is 1"]
    assert zero3.missing_of([*model.parameters()]) == []
    model(torch.zeros(1))
    assert len(done) == 6, "nothing is gathered twice"


class Stepped(Played):
    """With what `stay_gathered` touches of DeepSpeed's optimizer of two processes; `done` says in order what was."""

    def __init__(self, monkeypatch):
        super().__init__(called=True, layers=4)
        self.forward = lambda hidden: [layer(hidden) for layer in self.layers]
        self.done, names = [], {parameter: number for number, parameter in enumerate(self.parameters())}

        def gather(gathering, places):
            for parameter, whole in places:
                parameter.ds_status, parameter.data = ZeroParamStatus.INFLIGHT, whole.view(1, 1)
            came = [names[parameter] for parameter, _ in places]
            self.done.append(f"asked for {came}")
            return SimpleNamespace(wait=lambda: self.done.append(f"there are {came}"))

        def step(closure):
            self.done.append("step")
            self.optimizer._partition_all_parameters()

        hooks = SimpleNamespace(forward_hooks=[], backward_hooks=[])
        release = functools.partial(self.done.append, "all released")
        self.optimizer = SimpleNamespace(
            parameter_offload=hooks, partition_count=2, step=step, _partition_all_parameters=release
        )
        monkeypatch.setattr(zero3.Gathering, "gather", gather)
        zero3.stay_gathered(self, self.optimizer)

    def take_done(self) -> list[str]:
        done = [*self.done]
        self.done.clear()
        return done


def asked(*numbers: int) -> list[str]:
    return [f"asked for [{number}]" for number in numbers]


def test_what_a_step_has_changed_is_asked_for_when_it_has_ended(monkeypatch):
    """Layers wait for it in the forward pass after it, which asks for nothing; frozen weights stay where they are."""
    model = Stepped(monkeypatch)
    model.layers[1].requires_grad_(False)
    model(torch.zeros(1))
    model.take_done()
    model.optimizer.step()
    assert model.take_done() == ["step", *asked(0, 2, 3)]
    for number, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *unused, number=number: model.done.append(f"{number} is done"))
    model(torch.zeros(1))
    seen = ["there are [0]", "0 is done", "1 is done", "there are [2]", "2 is done", "there are [3]", "3 is done"]
    assert model.take_done() == seen and zero3.missing_of([*model.parameters()]) == []


@pytest.mark.parametrize("who", ["theirs", "gathered", "release_whole", "reader"])
def test_nobody_reads_or_releases_weights_that_are_on_their_way(who, monkeypatch):
    model = Stepped(monkeypatch)
    model(torch.zeros(1))
    model.optimizer.step()
    model.take_done()
    if who == "theirs":
        model.optimizer._partition_all_parameters()
    elif who == "gathered":
        model.layers[0].weight.ds_id = 0
        with contextlib.suppress(Exception):  # DeepSpeed's own, of which there is no engine here
            zero3.gathered([model.layers[0].weight])
    elif who == "release_whole":
        zero3.release_whole(model)
    else:
        zero3.settled(lambda: model.done.append("read"))()
    told = {"theirs": ["all released"], "reader": ["read"]}
    assert model.take_done() == [f"there are [{number}]" for number in range(4)] + told.get(who, [])
    assert zero3.missing_of([*model.parameters()]) == []
    model(torch.zeros(1))
    assert model.take_done() == [], "nor is a layer late that has nothing to wait for"


def test_memory_that_runs_out_between_places_leaves_none_of_them(monkeypatch):
    """Or the rank would send what others do not wait for, and keep a part of a model from the next try."""
    model, made = Stepped(monkeypatch), []
    empty = torch.empty

    def full(*given, **named):
        made.append(1)
        if len(made) > 2:
            raise torch.OutOfMemoryError("no room for the third")
        return empty(*given, **named)

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(torch.OutOfMemoryError, match="no room for the third"):
        model(torch.zeros(1))
    assert model.take_done() == []
    assert not any(one.later or one.coming for one in zero3.GATHERINGS)


def test_a_layer_that_is_not_called_is_found_beside_others_that_come_with_it(monkeypatch):
    monkeypatch.setattr(zero3, "GATHERED_AT_ONCE", 10)
    model = Stepped(monkeypatch)
    model.forward = lambda hidden: [model.layers[0].forward(hidden)] + [layer(hidden) for layer in model.layers[1:]]
    with pytest.raises(PipelineError, match="1 layers were not called"):
        model(torch.zeros(1))


def test_whole_weights_give_way_where_their_shards_bring_them_back():
    """Not where a shard is the whole, as on one process, nor where DeepSpeed keeps some small ones whole."""
    model = Played(called=True, layers=3)
    shards = [layer.weight for layer in model.layers]
    for weight in shards:
        weight.ds_status, weight.ds_persist, weight.ds_tensor = ZeroParamStatus.AVAILABLE, True, torch.zeros(1)
    shards[1].ds_numel = 1
    shards[2].ds_persist = False
    zero3.release_whole(model)
    assert zero3.missing_of(shards) == []
    shards[2].ds_persist = True
    zero3.release_whole(model)
    assert zero3.missing_of(shards) == [shards[0], shards[2]] and [len(weight) for weight in shards] == [0, 1, 0]
    zero3.release_whole(torch.nn.Linear(1, 1))  # without ZeRO-3


def test_after_an_error_no_weights_are_on_their_way(monkeypatch):
    model, there = Played(called=True), []
    monkeypatch.setattr(
        zero3.Gathering, "gather", lambda self, places: SimpleNamespace(wait=lambda: there.append(places))
    )
    zero3.Gathering(model)
    with pytest.raises(ValueError, match="before any layer"):
        model(torch.full((1,), float("nan")))
    assert len(there) == 2 and zero3.missing_of([*model.parameters()]) == []


def test_a_rank_without_memory_left_still_sends_what_others_wait_for(monkeypatch):
    """Its memory runs out in the middle of a forward pass: the others stand in the same calls, or wait for ever."""
    monkeypatch.setattr(zero3, "CALLS_AHEAD", 1)
    model, asked = Played(called=True, layers=4), []

    def gather(self, places):
        asked.extend(len(place) for _, place in places)
        return SimpleNamespace(wait=lambda: None)

    def full(*given, **named):
        raise torch.OutOfMemoryError("no room for anything")

    def forward(hidden):
        model.layers[0](hidden)
        monkeypatch.setattr(torch, "empty", full)
        raise torch.OutOfMemoryError("of the second layer")

    monkeypatch.setattr(zero3.Gathering, "gather", gather)
    model.forward = forward
    zero3.Gathering(model)
    with pytest.raises(torch.OutOfMemoryError, match="of the second layer"):
        model(torch.zeros(1))
    assert asked == [1, 1, 1, 1] and zero3.missing_of([*model.parameters()]) == []


def test_python_goes_on_where_deepspeed_lets_it_wait_for_the_last_gradients(monkeypatch):
    """Streams are played: there is no GPU here. What has to wait for them is the step; of what has to travel Python
    leaves the newest bucket alone on its way, since the memory of all counts until it has."""
    done, computing = [], SimpleNamespace(wait_stream=lambda stream: done.append(("computing waits for", stream)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    reducing = SimpleNamespace(device="cuda:1", synchronize=lambda: done.append("Python waits for all"))
    events = deque(SimpleNamespace(synchronize=lambda bucket=bucket: done.append(bucket)) for bucket in range(3))
    optimizer = SimpleNamespace(model_parallel_group=None, partition_count=2, offload_optimizer=False)
    optimizer.reduce_and_partition_stream, optimizer.param_reduce_events = reducing, events
    optimizer.step = lambda closure=None: done.append("step")
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.ds_persist = False
    zero3.lean_steps(SimpleNamespace(optimizer=optimizer, module=module, train=None, training=True))
    reducing.synchronize()
    assert done == [0, 1] and len(events) == 1
    optimizer.step()
    assert done == [0, 1, ("computing waits for", reducing), "step"]
    # Which is what DeepSpeed calls there, and a name that it keeps events by.
    epilogue = inspect.getclosurevars(Stage3.independent_gradient_partition_epilogue).nonlocals["func"]
    assert "self.reduce_and_partition_stream.synchronize()" in inspect.getsource(epilogue)
    assert "self.param_reduce_events.append(event)" in inspect.getsource(Stage3)
    # All that touches what is kept is given to that stream.
    reduce = inspect.getsource(Stage3).split("def __reduce_and_partition_ipg_grads")[1].split("    def ")[0]
    before, behind = reduce.split("with get_accelerator().stream(self.reduce_and_partition_stream):")
    assert "self.partition_grads(" in behind and "self.partition_grads(" not in before
