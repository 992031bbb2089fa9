"""How many tokens a step of writing gives with drafts (writing/drafts.py), where the answer is the page itself.

    python benchmarks/drafts_write.py --tokenizer demo/tiny_holo1
    python benchmarks/drafts_write.py --tokenizer TOKENIZER_FOLDER --pages real_pages --out drafts_write.json

A folder of pages is an imagefolder: `text` in metadata.jsonl is the answer. No model and no GPU is needed: a draft is
right where the page goes on like that. For 2, 4, 8 and 16 tokens a step, drafts included: all tokens by all steps, and
mean and quartiles over pages. Drafts are worked out for all places of a page together, and compared with what `drafts`
itself says at every `--check`th place. "before N": as many other pages, in a random order, stand before the question,
as answers written before it might.

Sections: Pages, Drafts of all places together, The function itself, Main.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
NEW = (2, 4, 8, 16)  # tokens a step


@dataclass(frozen=True)
class Way:
    """A way to guess: `longest` tokens are compared and `least` must match, of equal matches the latest or the first
    one counts, in the answer alone or in the question, too, and in `before` pages before it."""

    longest: int
    least: int = 1
    latest: bool = True
    question: bool = False
    before: int = 0


# -----------------------------------------------------------------------------
# Pages


def read_pages(folder: Path, tokenizer, most: int) -> list[np.ndarray]:
    """Token ids of each answer of at most `most` tokens, and its end token; in a random order."""
    rows = map(json.loads, (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    options = {"add_special_tokens": False, "split_special_tokens": True}
    pages = [tokenizer(row["text"], **options)["input_ids"] for row in rows]
    kept = [np.array([*page, tokenizer.eos_token_id]) for page in pages if len(page) <= most]
    random.Random(0).shuffle(kept)
    return kept


def question_ids(tokenizer) -> np.ndarray:
    """What stands before the answer, with one picture token for all of them, in Qwen2.5-VL's template."""
    import use_model_from_hub as use

    content = [{"type": "image"}, {"type": "text", "text": use.Recipe.prompt}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=(HERE.parent / "demo" / "tiny_holo1" / "chat_template.jinja").read_text(encoding="utf-8"),
        tokenize=False,
        add_generation_prompt=True,
    )
    return np.array(tokenizer(text)["input_ids"])


# -----------------------------------------------------------------------------
# Drafts of all places together


def best_matches(ids: np.ndarray, way: Way) -> np.ndarray:
    """For each place of `ids` (N,) the place before it where its longest match ends, -1 where there is none."""
    count, name = len(ids), np.zeros(len(ids), dtype=np.int64)
    place, best = np.arange(count), np.full(count, -1)
    for length in range(1, way.longest + 1):
        # Places with the same last `length` tokens get the same name; those that have fewer, one of their own.
        key = -1 - place
        key[length - 1 :] = name[length - 1 :] * (ids.max() + 1) + ids[: count - length + 1]
        name = np.unique(key, return_inverse=True)[1]
        order = np.argsort(name, kind="stable")
        again = np.diff(name[order], prepend=-1) == 0
        sources = np.roll(order, 1) if way.latest else order[np.maximum.accumulate(np.where(again, 0, place))]
        if length >= way.least:
            best[order[again]] = sources[again]
    return best


def right_drafts(ids: np.ndarray, best: np.ndarray, count: int) -> np.ndarray:
    """How many of `count` drafts are right after each place (N,)."""
    place, step, end = np.arange(len(ids))[:, None], np.arange(count), len(ids) - 1
    guessed = ids[best[:, None] + 1 + step % np.maximum(1, place - best[:, None])]
    right = (guessed == ids[np.minimum(place + 1 + step, end)]) & (place + 1 + step <= end) & (best >= 0)[:, None]
    return np.cumprod(right, axis=1).sum(axis=1)


def count_steps(right: Sequence[int], start: int, new: int) -> int:
    """Steps of `new` tokens at most that write what stands from `start` on."""
    place, steps = start - 1, 0  # of the last token that is known
    while place < len(right) - 1:
        place += 1 + min(right[place] if place >= 0 else 0, new - 1)
        steps += 1
    return steps


def contexts(pages: list[np.ndarray], question: np.ndarray, way: Way) -> list[np.ndarray]:
    """What is looked into before each page."""
    found = []
    for number in range(len(pages)):
        others = [pages[number - back] for back in range(min(way.before, len(pages) - 1), 0, -1)]
        found.append(np.concatenate([*others, question if way.question else question[:0]]).astype(np.int64))
    return found


def measure(pages: list[np.ndarray], question: np.ndarray, way: Way) -> dict:
    """Tokens a step, for each of `NEW`."""
    steps = []
    for page, before in zip(pages, contexts(pages, question, way)):
        ids = np.concatenate([before, page])
        right = right_drafts(ids, best_matches(ids, way), NEW[-1] - 1).tolist()
        steps.append([count_steps(right, len(before), new) for new in NEW])
    sizes, counts = np.array([len(page) for page in pages]), np.array(steps)
    rates = sizes[:, None] / counts
    result = {}
    for column, new in enumerate(NEW):
        low, middle, high = np.quantile(rates[:, column], (0.25, 0.5, 0.75))
        numbers = {"all": sizes.sum() / counts[:, column].sum(), "mean": rates[:, column].mean()}
        numbers |= {"quartile_1": low, "median": middle, "quartile_3": high}
        result[new] = {name: round(float(number), 3) for name, number in numbers.items()}
    return result


# -----------------------------------------------------------------------------
# The function itself


def check(pages: list[np.ndarray], question: np.ndarray, every: int) -> int:
    """Compares with `drafts` at every `every`th place and returns how many those were; exits where they differ."""
    import torch

    from writing.drafts import LONGEST, drafts

    compared = 0
    for page in pages:
        right = right_drafts(page, best_matches(page, Way(LONGEST)), NEW[-1] - 1)
        history = torch.from_numpy(np.concatenate([question, page, np.zeros(NEW[-1], dtype=np.int64) - 1]))
        for first in range(0, len(page), 64 * every):
            place = torch.arange(first, min(first + 64 * every, len(page)), every)
            start = torch.full_like(place, len(question))
            guessed = drafts(history.expand(len(place), -1), place + start, start, NEW[-1] - 1)
            after = history[(place + start + 1)[:, None] + torch.arange(NEW[-1] - 1)]
            found = (guessed == after).long().cumprod(-1).sum(-1).numpy()
            # Without a match any tokens are drafted, which may be right by chance.
            wrong = (found != right[place]) & (right[place] > 0)
            if wrong.any():
                sys.exit(f"at place {place[wrong.argmax()]} `drafts` has {found} drafts right, not {right[place]}")
            compared += len(place)
    return compared


# -----------------------------------------------------------------------------
# Main


def ways() -> dict[str, Way]:
    from writing.drafts import LONGEST

    ours = Way(LONGEST)
    found = {"as it is": ours} | {f"longest {count}": replace(ours, longest=count) for count in (1, 2, 4, 8, 16)}
    found |= {"first instead of latest": replace(ours, latest=False)}
    found |= {f"at least {least}": replace(ours, least=least) for least in (2, 3)}
    found |= {"question, too": replace(ours, question=True)}
    found |= {f"before {count}": replace(ours, question=True, before=count) for count in (1, 4, 16)}
    return found | {"before 16, longest 4": replace(ours, longest=4, question=True, before=16)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a Qwen2.5-VL tokenizer")
    parser.add_argument("--pages", type=Path, nargs="+", default=[HERE.parent / "demo" / "pages"], help="imagefolders")
    parser.add_argument("--max_html_tokens", type=int, default=4_096, help="longer pages are left out, as in training")
    parser.add_argument("--check", type=int, default=8, help="compare with the function itself at every so many places")
    parser.add_argument("--out", type=Path, help="the JSON")
    args = parser.parse_args(argv)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    question = question_ids(tokenizer)
    versions = {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}
    result: dict = {"versions": versions | {"python": platform.python_version()}, "vocabulary": len(tokenizer)}
    result |= {"max_html_tokens": args.max_html_tokens, "folders": []}
    for folder in args.pages:
        pages = read_pages(folder, tokenizer, args.max_html_tokens)
        if not pages:
            sys.exit(f"{folder} has no page of at most {args.max_html_tokens} tokens: raise --max_html_tokens")
        one = {"folder": "/".join(folder.resolve().parts[-2:]), "pages": len(pages), "tokens": sum(map(len, pages))}
        one |= {"places_checked": check(pages, question, args.check), "tokens_a_step": {}}
        print(f"{folder}: {one['pages']} pages, {one['tokens']:,} tokens, {one['places_checked']:,} places checked")
        for name, way in ways().items():
            one["tokens_a_step"][name] = found = measure(pages, question, way)
            print(f"  {name:24}", *(f"{new}: {numbers['all']:.3f}" for new, numbers in found.items()), flush=True)
        result["folders"].append(one)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
