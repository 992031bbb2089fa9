"""All that is known of DeepSpeed's insides.

    zero3.bucket_size(deepspeed), zero3.may_be_whole(deepspeed, config)     # what its JSON leaves open
    zero3.tune_zero(deepspeed["zero_optimization"], way)                    # fills that in

A room about torch: whoever has to answer --help without it imports this inside a function.
"""

from __future__ import annotations

from training import memory_plan

# -----------------------------------------------------------------------------
# Configuration

THRESHOLD = "stage3_param_persistence_threshold"
REDUCED_AT_ONCE = 200_000_000  # weights: transformers' own choice, 4 M for 3B, sends each gradient by itself


def bucket_size(deepspeed: dict | None) -> int:
    """Weights in one of DeepSpeed's buckets; `auto` is left to us (`tune_zero`)."""
    asked = (deepspeed or {}).get("zero_optimization", {}).get("reduce_bucket_size", "auto")
    return REDUCED_AT_ONCE if asked == "auto" else int(asked)


def may_be_whole(deepspeed: dict | None, config) -> tuple[bool, ...]:
    """Whether weights may be gathered once per step, or by layers: both where the threshold is left to us."""
    asked = (deepspeed or {}).get("zero_optimization", {}).get(THRESHOLD, "auto")
    largest = config.get_text_config().vocab_size * config.get_text_config().hidden_size
    return (True, False) if asked == "auto" else (int(asked) >= largest,)


def tune_zero(zero: dict, way: memory_plan.Way) -> None:
    """What DeepSpeed's configuration leaves to us ("auto", or nothing), by measurement (benchmarks/README.md)."""
    wanted = {"reduce_bucket_size": REDUCED_AT_ONCE}
    if way.whole:
        wanted |= {THRESHOLD: 10**11, "stage3_max_live_parameters": 10**11}
    elif zero.get("stage") == 3:
        wanted["stage3_prefetch_bucket_size"] = REDUCED_AT_ONCE // 2  # a layer of 3B has 77 M: fetched one ahead
    for name, value in wanted.items():
        if zero.get(name, "auto") == "auto":
            zero[name] = value
