"""The real training script, but for the third backward pass of the rank POISONED: it gives a gradient of NaN there."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import holo1_dom_finetune as pipeline
from training.processes import rank

load = pipeline.load_model


def load_and_poison(*arguments):
    model, calls = load(*arguments), []

    def poison(gradient):
        calls.append(None)
        return gradient * float("nan") if len(calls) == 3 and rank() == int(os.environ["POISONED"]) else gradient

    model.model.language_model.norm.weight.register_hook(poison)
    return model


pipeline.load_model = load_and_poison
pipeline.leave(pipeline.main(sys.argv[1:]))
