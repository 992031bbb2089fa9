"""Load the families named, the costs of a page and the memory plan; none of them may need torch."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import families
from families import page_costs
from training import memory_plan

for name in sys.argv[1:]:
    families.family_of(name)
tower, page = page_costs.Tower(2, 8, 8, 8, 16), memory_plan.Load(10, 10, 10)
shape = page_costs.Shape(tower, 100, True, tower, 8, 4, 64)
memory_plan.candidates(shape, memory_plan.Way(), 8, page, page.times, memory_plan.Hardware(1.0))
page_costs.peak_tflops("NVIDIA H200")
assert "torch" not in sys.modules
