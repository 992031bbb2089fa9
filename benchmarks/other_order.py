"""The training, which takes the pages of each step in another order; same_curve.py starts it.

    python run_deepspeed_training.py --script benchmarks/other_order.py --fast False

Every other setting is holo1_dom_finetune.py's. The sums of a step are the same but for rounding.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from families import page_costs

in_order = page_costs.deal


def deal_in_reverse(costs: list[float], bins: int) -> list[list[int]]:
    """As page_costs.deal, the last group first."""
    return in_order(costs, bins)[::-1]


def main() -> int:
    import holo1_dom_finetune as pipeline

    page_costs.deal = deal_in_reverse
    return pipeline.main(sys.argv[1:])


if __name__ == "__main__":
    from holo1_dom_finetune import leave

    leave(main())
