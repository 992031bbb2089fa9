"""The real training script, but for what pages score: PLANNED maps each evaluation's label to the metric that chooses.

With UNRENDERED set, nothing is rendered either. OUT_OF_MEMORY names an evaluation in which rank 1's memory runs out
(rank 0's, where it is alone) while it writes, or, with IN_THE_COPY set, while it makes the copy that writes.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import holo1_dom_finetune as training
from scoring.metrics import CHOOSING
from training import evaluation, final_folder
from training.processes import rank, world_size

score, evaluate, write_pages = training.Evaluator.score, training.Evaluator.evaluate, evaluation.use.write_pages
empty_model = final_folder.empty_model
known = json.loads(os.environ["PLANNED"])


def planned(self, label, rows, recipe):
    result = score(self, label, rows, recipe)
    choosing = result.get("choosing", {"n": 1, "apart": True})  # there is none where nothing is rendered
    return result | {CHOOSING: known[label], "choosing": choosing | {CHOOSING: known[label]}}


def without_memory(*unused, **options):
    raise torch.OutOfMemoryError("CUDA out of memory, as planned by the test")


def evaluate_as_planned(self, label):
    fails = label == os.environ.get("OUT_OF_MEMORY") and rank() == world_size() - 1
    in_the_copy = bool(os.environ.get("IN_THE_COPY"))
    evaluation.use.write_pages = without_memory if fails and not in_the_copy else write_pages
    final_folder.empty_model = without_memory if fails and in_the_copy else empty_model
    return evaluate(self, label)


training.Evaluator.score, training.Evaluator.evaluate = planned, evaluate_as_planned
if os.environ.get("UNRENDERED"):
    evaluation.Rendering.score = lambda *unused: None
training.leave(training.main(sys.argv[1:]))
