"""Load the families named, the costs of a page and the memory plan; none of them may need torch."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import families
from families import page_costs
from training import memory_plan

for name in sys.argv[1:]:
    families.family_of(name)
memory_plan.candidates(memory_plan.Way(), 8, 1.0, 4e9)
page_costs.peak_tflops("NVIDIA H200")
assert "torch" not in sys.modules
