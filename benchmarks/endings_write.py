"""Whether help with endings leaves alone what needs none: held-out pages of the demo, written with it and without.

    python holo1_dom_finetune.py --demo --compare_base False
    python benchmarks/endings_write.py --model ./holo1_dom_finetune_final --out benchmarks/results/endings_write.json

Without a GPU. The pages are of the demo's kind and in none of its data; each is written by the engine at the limit that
the model was trained with, at which all end by themselves, and at limits that cut many or all of them off. Beside it
what watching costs: microseconds a token, in blocks as the engine feeds them, of pages that are like real ones and of
the demo's.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import best_of  # noqa: E402
import make_pages_like_real  # noqa: E402

import use_model_from_hub as use  # noqa: E402
from scoring.renders import Renderer  # noqa: E402
from scoring.validity import validity  # noqa: E402
from writing.endings import Watch  # noqa: E402
from writing.engine import BLOCK, Engine  # noqa: E402


def written(model, processor, recipe: use.Recipe, shots: Sequence, watched: bool) -> tuple[list[use.Written], float]:
    """An answer for each of `shots`, and the seconds of CPU that all took."""
    watch = partial(Watch, processor.tokenizer, recipe.max_html_tokens) if watched else None
    engine = Engine(model, processor, recipe, wanted=16, watch=watch)
    requests = [use.Request(place, lambda shot=shot: shot) for place, shot in enumerate(shots)]
    start = time.process_time()
    found = {request.place: answer for request, answer in engine.write(requests)}
    return [found[place] for place in range(len(shots))], time.process_time() - start


def compared(alone: Sequence[use.Written], helped: Sequence[use.Written], wanted: Sequence[str]) -> dict:
    """What is whole with help and without, and what of the whole ones has changed."""
    whole = [page for page in zip(alone, helped) if validity(page[0].html).valid and not page[0].cut_off]
    return {
        "pages": len(alone),
        "tokens": sum(page.tokens for page in helped),
        "whole_without": sum(validity(page.html).valid for page in alone),
        "whole_with": sum(validity(page.html).valid for page in helped),
        "closed": sum(page.closing_tokens > 0 for page in helped),
        "looped": sum(page.looped for page in helped),
        "ended_by_themselves": len(whole),
        "of_these_the_same_to_the_byte": sum(one.raw == two.raw and one.html == two.html for one, two in whole),
        "exact": sum(page.html.strip() == html.strip() for page, html in zip(helped, wanted)),
    }


def watching_us(tokenizer, pages: Sequence[str], limit: int) -> dict:
    """Microseconds a token of what watches `pages`, and how many tokens these have."""
    every, took = [tokenizer(page)["input_ids"][:limit] for page in pages], []
    for _ in range(3):
        start = time.process_time()
        for ids in every:
            watch = Watch(tokenizer, limit)
            for place in range(0, len(ids), BLOCK):
                watch.feed(ids[place : place + BLOCK])
            watch.ended()
        took.append(time.process_time() - start)
    tokens = sum(map(len, every))
    return {"tokens": tokens, "us_a_token": 1e6 * statistics.median(took) / tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the final folder of a demo")
    parser.add_argument("--pages", type=int, default=200)
    parser.add_argument("--limits", default="145,60", help="tokens at most, besides the model's own limit")
    parser.add_argument(
        "--tokenizer", help="folder of a real tokenizer, for what watching costs (default: the model's)"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    recipe = use.load_recipe(args.model)
    model, processor = use.load_model(args.model, recipe)
    with Renderer() as renderer:
        pages = list(best_of.held_out(args.pages, renderer))
    packages = {name: version(name) for name in ("torch", "transformers", "html5lib")}
    result: dict = {"python": platform.python_version(), **packages}
    shots, wanted = [shot for _, shot in pages], [html for html, _ in pages]
    for limit in [recipe.max_html_tokens, *(int(limit) for limit in args.limits.split(",") if limit)]:
        asked = replace(recipe, max_html_tokens=limit)
        (alone, without_s), (helped, with_s) = (
            written(model, processor, asked, shots, watched) for watched in (False, True)
        )
        found = compared(alone, helped, wanted) | {"cpu_s_without": without_s, "cpu_s_with": with_s}
        result[f"limit {limit}"] = found
        print(limit, json.dumps(found), flush=True)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer) if args.tokenizer else processor.tokenizer
    like_real = [
        make_pages_like_real.make_html(random.Random(number), 1_500, lambda html: len(tokenizer(html)["input_ids"]))
        for number in range(8)
    ]
    for name, htmls in (("like real ones", like_real), ("the demo's", wanted[:64])):
        result[f"watching pages {name}"] = watching_us(tokenizer, htmls, 4_096)
        print(name, json.dumps(result[f"watching pages {name}"]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
