"""The real training script, but for what pages score: PLANNED maps each evaluation's label to the metric that chooses.

With UNRENDERED set, nothing is rendered either. OUT_OF_MEMORY names an evaluation in which rank 1's memory runs out
(rank 0's, where it is alone).
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import holo1_dom_finetune as training
from scoring.metrics import CHOOSING
from training import evaluation
from training.processes import rank, world_size

score, evaluate, write_pages = training.Evaluator.score, training.Evaluator.evaluate, evaluation.use.write_pages
known = json.loads(os.environ["PLANNED"])


def planned(self, label, rows, recipe):
    result = score(self, label, rows, recipe)
    return result | {CHOOSING: known[label], "choosing": {"n": 1, CHOOSING: known[label], "apart": True}}


def without_memory(*unused, **options):
    raise torch.OutOfMemoryError("CUDA out of memory, as planned by the test")


def evaluate_as_planned(self, label):
    fails = label == os.environ.get("OUT_OF_MEMORY") and rank() == world_size() - 1
    evaluation.use.write_pages = without_memory if fails else write_pages
    return evaluate(self, label)


training.Evaluator.score, training.Evaluator.evaluate = planned, evaluate_as_planned
if os.environ.get("UNRENDERED"):
    evaluation.Rendering.score = lambda *unused: None
training.leave(training.main(sys.argv[1:]))
