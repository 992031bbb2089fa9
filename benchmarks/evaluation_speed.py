"""How long evaluation takes, and how many tokens a second it writes.

    python benchmarks/evaluation_speed.py --real_lengths --num_gpus 1 --base_model ./holo1_3b_shapes \\
        --dataset ./pages_like_real --num_samples 16 --eval_pages 32 --out benchmarks/results/h100_3b_eval_write.json
    python benchmarks/evaluation_speed.py --num_gpus 2 --base_model ./holo1_3b_shapes --dataset ./pages_like_real \\
        --num_samples 16 --eval_pages 16 --out benchmarks/results/h200_x2_evaluation.json

Takes the training's own flags. Everything up to the first step is the real run's, under the real launcher and ZeRO-3;
then, instead of the training, comes what is measured.

With `--real_lengths` it is one whole evaluation by the training's own code, part by part. Random weights never end an
answer, and what they write is no page: so the pages' own HTML is dictated (dictation.py), with all the work of writing
it, its drafts and its end, and that is rendered and scored. On several GPUs every rank writes the same `--eval_pages`
pages, which therefore count as many times: twice as many tokens a second on two GPUs are twice the speed. Without a
GPU, where no one would, the engine writes as well: to try this out.

Without it, each rank writes its share of the held-out pages with the gathered copy, 200 tokens each, and one page with
the sharded model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TOKENS, SLOW_TOKENS = 200, 8  # written of each page: random weights never end one
REAL_LENGTHS = "--real_lengths"

# -----------------------------------------------------------------------------
# Gathered and sharded


def measure(judge, trainer) -> dict:
    """(all ranks) Tokens per second over all ranks, both ways, and what gathering takes."""
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


# -----------------------------------------------------------------------------
# Real lengths


def settled() -> float:
    """The time once the GPU has done what it was told."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


class Timed:
    """Before `writing.engine.Engine`: seconds in `times`: "made" and "last", when it was made and gave its last answer,
    and the sums "start" (until it could write), by the number of slots from "cache" on in "starts", and "reading"
    (screenshots); in "blocks" how many blocks were fetched of how many slots, and after which seconds."""

    times: dict  # of the class that is made of this one

    def __init__(self, *arguments, **options):
        made = self.times["made"] = time.monotonic()
        super().__init__(*arguments, **options)
        self.times.update(start=settled() - made, reading=0.0, slots=self.count, blocks={})
        self.times["starts"], self.fetched = {"cache": self.times["start"]}, time.monotonic()

    def fill(self, *arguments):
        start, before = time.monotonic(), [*self.slots]
        super().fill(*arguments)
        if before != self.slots:
            self.apart("reading", start)

    def step(self, width):
        start, known = time.monotonic(), width in self.steps
        step = super().step(width)
        if not known:
            self.times["starts"][width] = self.apart("start", start)
        return step

    def apart(self, name, start):
        """Seconds since `start`, which are none of the block's that is fetched next."""
        seconds = settled() - start
        self.times[name] += seconds
        self.fetched += seconds
        return seconds

    def fetch(self, width):
        found, before = super().fetch(width), self.fetched
        self.fetched = time.monotonic()
        blocks, seconds = self.times["blocks"].get(width, (0, 0.0))
        self.times["blocks"][width] = blocks + 1, seconds + self.fetched - before
        return found

    def write(self, *arguments):
        for written in super().write(*arguments):
            self.times["last"] = time.monotonic()
            yield written


def measure_real_lengths(judge, trainer) -> dict:
    """(all ranks) The seconds of one evaluation, in all and by its parts on this rank, and tokens per second."""
    import torch
    from datasets import concatenate_datasets
    from dictation import dictating

    import holo1_dom_finetune as training
    from writing import engine, writer

    times, count = {}, training.world_size()
    judge.pages = concatenate_datasets([judge.pages] * count)
    if not torch.cuda.is_available():
        writer.obstacle = lambda model: ""

    def ids_of(request) -> list[int]:
        return judge.processor.tokenizer(judge.pages[request.place]["html"], add_special_tokens=False)["input_ids"]

    engine.Engine = dictating(type("TimedEngine", (Timed, engine.Engine), {"times": times}), ids_of)
    render, waited = judge.rendering.score, []

    def score(*arguments):
        begun = time.monotonic()
        try:
            return render(*arguments)
        finally:
            waited.append(time.monotonic() - begun)

    judge.rendering.score = score
    start = time.monotonic()
    result = judge.evaluate("after")
    end = time.monotonic()
    writing = times["last"] - times["made"] - times["start"] - times["reading"]
    tokens = [page["tokens"] for page in result["pages"]]
    return {
        "gpus": count,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "pages": len(judge.pages),
        "slots": times["slots"],
        "tokens": sum(tokens),
        "longest_page_tokens": max(tokens),
        "rendered": judge.rendering.obstacle or "all pages, and scored",
        "seconds": end - start,
        "parts_seconds": {
            "copy of the weights": times["made"] - start,
            "start: cache, capture": times["start"],
            "reading screenshots": times["reading"],
            "writing, with what is done meanwhile": writing,
            "after the last token: rendering, scoring": end - times["last"],
        },
        "start_seconds_by_slots": times["starts"],
        "writing_blocks_and_seconds_by_slots": times["blocks"],
        "waiting_for_scores_seconds": sum(waited),
        "tokens_per_second": result["tokens_per_second"],
    }


# -----------------------------------------------------------------------------
# Main


def inside(argv: list[str], out: Path) -> None:
    """(all ranks) The training's main, which ends with the measurement where the first step would begin."""
    import holo1_dom_finetune as training
    from training.processes import rank

    real_lengths = REAL_LENGTHS in os.environ.get("EVALUATION_SPEED", "")
    judges, init = [], training.Evaluator.__init__

    def remember(self, *arguments):
        init(self, *arguments)
        judges.append(self)

    def stop(self, trainer, *unused):
        result = (measure_real_lengths if real_lengths else measure)(judges[0], trainer)
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
    way = REAL_LENGTHS if REAL_LENGTHS in argv else ""
    argv = [word for word in argv if word != REAL_LENGTHS]
    wrapper = [sys.executable, str(ROOT / "run_deepspeed_training.py"), "--script", __file__, *argv]
    wrapper += ["--save_strategy", "no", "--report_to", "none"]
    wrapper += [] if way else ["--fast", "False"]  # the sharded model generates, too
    environment = {**os.environ, "EVALUATION_SPEED_OUT": str(out), "EVALUATION_SPEED": way}
    return subprocess.run(wrapper, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
