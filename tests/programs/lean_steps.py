"""The training script, which says at its end how often DeepSpeed released all weights, how many numbers of them were
whole after each step, how many weights were on their way to layers when the first of these began, in the forward
passes that gathered any, and how many weights were whole beside each copy that writes pages while it trains.
PLAIN_STEPS=1 leaves its steps as DeepSpeed makes them."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Zero

import holo1_dom_finetune as pipeline
from training import final_folder, zero3

release, calls = Zero._partition_all_parameters, []
lean, whole = zero3.lean_steps, []
wait_for, begin, coming = zero3.Gathering.wait_for, zero3.Gathering.begin, []
make_room, engines, beside = final_folder.unset_on, [], []


def watched_release(self) -> None:
    calls.append(1)
    release(self)


def watched_steps(engine) -> None:
    if os.environ["PLAIN_STEPS"] == "0":
        lean(engine)
    step = engine.optimizer.step
    engines.append(engine)

    def watch(*unused) -> None:
        step()
        whole.append(sum(weight.numel() for weight in engine.module.parameters()))

    engine.optimizer.step = watch


def watched_begin(self, model, inputs) -> None:
    begin(self, model, inputs)
    if self.coming:
        coming.append(sum(len(parameters) for parameters, _ in self.coming.values()))
    on_their_way = [parameter for parameters, _ in self.coming.values() for parameter in parameters]
    on_their_way += [parameter for places in self.later.values() for parameter, _ in places]
    assert zero3.missing_of(self.parameters) == on_their_way, "of no layer, and not waited for"


def watched_copy(*given):
    if engines:
        parts = [*engines[0].module.parameters()]
        beside.append(len(parts) - len(zero3.missing_of(parts)))
    return make_room(*given)


def watched_wait(self, layer) -> None:
    wait_for(self, layer)
    assert layer is None or not zero3.missing_of([*layer.parameters()]), "a layer begins without its weights"


if __name__ == "__main__":
    zero3.Gathering.begin, zero3.Gathering.wait_for = watched_begin, watched_wait
    Zero._partition_all_parameters, final_folder.unset_on = watched_release, watched_copy
    zero3.WORTH_A_CALL = 1_000  # some of the tiny weights are large, then
    zero3.GATHERED_AT_ONCE, zero3.CALLS_AHEAD = 10_000, 2
    zero3.KEPT_AT_ONCE = 50_000  # of which a backward pass of the tiny model makes many
    zero3.lean_steps = watched_steps
    code = pipeline.main(sys.argv[1:])
    if os.environ["RANK"] == "0":  # two ranks may write into one line
        print(f"released {len(calls)} times, whole {whole}, coming {coming}, beside {beside}")
    pipeline.leave(code)
