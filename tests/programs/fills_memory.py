"""The real training, planned for a GPU on which the longest batch just fits and others have room; KEPT=1 plans one that
keeps everything. There is no GPU here: what it has is told, the decision and the training are real. Each rank says how
its batches were treated.
"""

import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import holo1_dom_finetune as pipeline
from training import memory_fit
from training.memory_plan import Hardware, MemoryPlan
from training.processes import rank, say, world_size
from training.treatment import Batches

treat, ways = Batches.treat, Counter()


def choose(args, settings, config, pages, encoder) -> MemoryPlan:
    deepspeed = args.hf_deepspeed_config.config if args.deepspeed else None
    scope = memory_fit.scope_of(settings, vars(args), deepspeed, config)
    loads, mean = memory_fit.longest_loads(pages, encoder, scope), memory_fit.mean_load(pages, encoder, scope)

    def decide(gib: float) -> memory_fit.Decision:
        hardware = Hardware(gib, 989, link_gb_s=1e9)
        return memory_fit.decide(scope, lambda size: loads[size - 1], mean, world_size(), hardware)

    everything = decide(1e9)
    plan = everything.chosen
    if os.environ["KEPT"] == "0":
        # Of what the layers of the longest batch keep, a tenth more than the least.
        most, least = plan.total_gib, everything.smallest.total_gib
        decision = decide(least + (most - least) / 10)
        plan = decision.chosen
        say(memory_fit.plan_words(plan, decision.mean, plan.rungs.limit_gib))
    return plan


def watched(self, inputs) -> float:
    planned = treat(self, inputs)
    assert planned <= self.rungs.limit_gib
    ways[self.way] += 1
    return planned


if __name__ == "__main__":
    pipeline.choose_micro_batch, Batches.treat = choose, watched
    memory_fit.FILLED_SHARE = 1.0  # of so small a model the gaps that are left free are more than all activations
    torch.cuda.max_memory_allocated = lambda: 0
    code = pipeline.main(sys.argv[1:])
    Path(f"ways-{rank()}").write_text(
        "".join(f"{n} {way.recomputed} {way.recomputed_vision} {way.offloaded}\n" for way, n in ways.items())
    )
    pipeline.leave(code)
