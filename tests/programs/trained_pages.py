"""The real main, which also notes in trained-RANK.jsonl which pages each step of this rank really trains on."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import holo1_dom_finetune as pipeline
from training.processes import rank

collate, compute_loss = pipeline.PageCollator.__call__, pipeline.PageTrainer.compute_loss


def noting_collate(self, pages):
    return collate(self, pages) | {"noted": [page["name"] for page in pages]}


def noting_loss(self, model, inputs, *arguments, **options):
    line = {"step": self.state.global_step + 1, "rank": rank(), "pages": inputs.pop("noted")}
    with open(f"trained-{rank()}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    return compute_loss(self, model, inputs, *arguments, **options)


pipeline.PageTrainer.compute_loss = noting_loss
make = pipeline.make_trainer


def make_noting_trainer(*arguments):
    pipeline.PageCollator.__call__ = noting_collate  # only now: the rehearsal's batch goes right into the model
    return make(*arguments)


pipeline.make_trainer = make_noting_trainer
pipeline.leave(pipeline.main(sys.argv[1:]))
