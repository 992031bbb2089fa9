"""How many tokens a second evaluation writes: on gathered weights, as the training does it, and on partitioned ones.

    python benchmarks/evaluation_speed.py --num_gpus 2 --base_model ./holo1_3b_shapes --dataset ./pages_like_real \\
        --num_samples 16 --eval_pages 16 --out benchmarks/results/h200_x2_evaluation.json

Takes the training's own flags. Everything up to the first step is the real run's, under the real launcher and ZeRO-3;
then each rank writes its share of the held-out pages with the gathered copy, and one page with the sharded model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TOKENS, SLOW_TOKENS = 200, 8  # written of each page: random weights never end one


def measure(judge, trainer) -> dict:
    """(all ranks) Tokens per second over all ranks, both ways, and what gathering takes."""
    from dataclasses import replace

    import torch
    import torch.distributed as dist

    import holo1_dom_finetune as training
    import use_model_from_hub as use
    from training.processes import rank

    model, count = trainer.model, training.world_size()
    start = time.monotonic()
    copy = judge.copy()
    gathering = time.monotonic() - start
    short = replace(judge.decoding, max_html_tokens=TOKENS)
    rows = training.write_held_out(copy, judge.processor, judge.pages, short, trainer.args.per_device_eval_batch_size)
    gathered = sum(row["tokens"] for row in rows) / rows[0]["seconds"]
    del copy
    training.release_memory()
    model.eval()  # or checkpointing would keep the cache from it
    screenshot = use.open_screenshot(judge.pages[rank() % len(judge.pages)]["screenshot"])
    dist.barrier()
    start = time.monotonic()
    with torch.no_grad():
        (page,) = use.write_pages(
            model, judge.processor, [screenshot], replace(judge.decoding, max_html_tokens=SLOW_TOKENS)
        )
    dist.barrier()
    partitioned = count * page.tokens / (time.monotonic() - start)
    return {
        "gpus": count,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "pages": len(rows),
        "tokens_per_page": TOKENS,
        "gathering_seconds": gathering,
        "gathered_tokens_per_second": gathered,
        "partitioned_tokens_per_second": partitioned,
        "ratio": gathered / partitioned,
    }


def inside(argv: list[str], out: Path) -> None:
    """(all ranks) The training's main, which ends with the measurement where the first step would begin."""
    import holo1_dom_finetune as training
    from training.processes import rank

    judges, init = [], training.Evaluator.__init__

    def remember(self, *arguments):
        init(self, *arguments)
        judges.append(self)

    def stop(self, trainer, *unused):
        result = measure(judges[0], trainer)
        training.say(json.dumps(result))
        if rank() == 0:
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        training.report_end(0)
        training.leave(0)

    training.Evaluator.__init__, training.Fit.__call__ = remember, stop
    training.leave(training.main(argv))


def main() -> int:
    if "EVALUATION_SPEED_OUT" in os.environ:
        inside(sys.argv[1:], Path(os.environ["EVALUATION_SPEED_OUT"]))
    argv = sys.argv[1:]
    if "--out" not in argv or {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0 if {"-h", "--help"} & set(argv) else 2
    place = argv.index("--out")
    out = Path(argv[place + 1]).resolve()
    del argv[place : place + 2]
    out.parent.mkdir(parents=True, exist_ok=True)
    wrapper = [sys.executable, str(ROOT / "run_deepspeed_training.py"), "--script", __file__, *argv]
    wrapper += ["--fast", "False", "--save_strategy", "no", "--report_to", "none"]  # the sharded model generates, too
    return subprocess.run(wrapper, env={**os.environ, "EVALUATION_SPEED_OUT": str(out)}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
