"""Whether `--best_of` chooses well, by the scorer: the chosen one of four samples beside the first, page by page.

    python holo1_dom_finetune.py --demo --max_steps 50 --compare_base False     # stopped early: it still errs
    python benchmarks/best_of.py --model ./holo1_dom_finetune_final --out benchmarks/results/best_of_write.json
    python benchmarks/best_of.py --real real_pages --out benchmarks/results/best_of_real_write.json

The first samples pages of the demo's kind that are in none of its data. Their screenshots are all that the choice sees;
the scorer's `likeness` to the reference judges it afterwards, and says what greedy decoding would have scored and what
a choice by the scorer itself (the best there is among the samples). The second needs no model: real pages in folders
(clean.html, clean.webp) are spoilt in seven ways, and it tells how often the choice ranks two of them as `likeness`
does, with a screenshot from here and with the stored one, whose fonts may be others.

Sections: Samples of a model, Spoilt pages, Telling.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import random
import string
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree.ElementTree import Element

import html5lib
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

import make_demo_pages  # noqa: E402

import use_model_from_hub as use  # noqa: E402
from scoring.blocks import Page, job_for, page_of  # noqa: E402
from scoring.many_pages import window_of  # noqa: E402
from scoring.metrics import Compared, compare, likeness, ssim  # noqa: E402
from scoring.renders import Job, Renderer  # noqa: E402
from scoring.statistics import paired_comparison  # noqa: E402
from training.settings import DEMO  # noqa: E402
from writing import best_of  # noqa: E402

# -----------------------------------------------------------------------------
# Samples of a model

WINDOW = 224, 112  # px; the demo pages' own
SEED = 8  # of the pages; the bundled ones are of another


def held_out(count: int, renderer: Renderer) -> Iterator[tuple[str, Image.Image]]:
    """(HTML, screenshot) of pages of the demo's kind that are not among the bundled ones."""
    lines = (ROOT / "demo" / "pages" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    known = {json.loads(line)["text"] for line in lines}
    htmls = []
    for html, _ in make_demo_pages.generate("demo", seed=SEED):
        if html not in known:
            known.add(html)
            htmls.append(html)
        if len(htmls) == count:
            break
    for html, render in zip(htmls, renderer.map([Job(html, *WINDOW) for html in htmls]), strict=True):
        yield html, Image.fromarray(render.image)


def written(
    model: object, processor: object, screenshots: Sequence[Image.Image], recipe: use.Recipe, samples: int, batch: int
) -> list[list[str]]:
    """For each screenshot the HTML of each of its samples."""
    places = [(place, sample) for place in range(len(screenshots)) for sample in range(samples)]
    found: list[list[str]] = [[] for _ in screenshots]
    for start in range(0, len(places), batch):
        some = places[start : start + batch]
        pictures = [screenshots[place] for place, _ in some]
        answers = use.write_pages(model, processor, pictures, recipe, samples=[sample for _, sample in some])
        for (place, _), answer in zip(some, answers):
            found[place].append(answer.html)
        print(f"  {start + len(some)} of {len(places)} answers", file=sys.stderr, flush=True)
    return found


def scored(reference: str, htmls: Sequence[str], renderer: Renderer) -> list[float]:
    """The scorer's likeness of each page to the reference."""
    different = list(dict.fromkeys([reference, *htmls]))
    renders = renderer.map([job_for(html, *WINDOW) for html in different])
    pages = {html: page_of(render, html) for html, render in zip(different, renders)}
    return [compare(pages[reference], pages[html])["likeness"] for html in htmls]


def sampled(args: argparse.Namespace) -> dict:
    """Each page's likenesses and the choice, and the comparisons over all of them."""
    recipe = use.load_recipe(args.model)
    # A checkpoint of a stopped run has no recipe of its own beside it.
    recipe = replace(recipe, max_pixels=DEMO["max_pixels"], max_html_tokens=DEMO["max_html_tokens"])
    model, processor = use.load_model(args.model, recipe)
    drawing = replace(recipe, temperature=args.temperature)
    rows = []
    with Renderer() as renderer:
        pages = list(held_out(args.pages, renderer))
        screenshots = [screenshot for _, screenshot in pages]
        start = time.monotonic()
        samples = written(model, processor, screenshots, drawing, args.samples, args.batch)
        greedy = written(model, processor, screenshots, recipe, 1, args.batch)
        seconds = time.monotonic() - start
        choosing_s = 0.0
        for (html, screenshot), some, (plain,) in zip(pages, samples, greedy):
            start = time.monotonic()
            choice = best_of.choose(screenshot, some, renderer)
            choosing_s += time.monotonic() - start
            *found, of_greedy = scored(html, [*some, plain], renderer)
            rows.append({"likeness": found, "scores": choice.scores, "chosen": choice.index, "greedy": of_greedy})
            print(f"  {len(rows)} of {len(pages)} pages scored", file=sys.stderr, flush=True)
        browser = renderer.version
    ways = {
        "first sample": [row["likeness"][0] for row in rows],
        "mean of the samples": [float(np.mean(row["likeness"])) for row in rows],
        "chosen by its render": [row["likeness"][row["chosen"]] for row in rows],
        "chosen by the scorer": [max(row["likeness"]) for row in rows],
        "greedy decoding": [row["greedy"] for row in rows],
    }
    return {
        "model": args.trained or args.model,
        "decoding": asdict(drawing),
        "samples": args.samples,
        "ways": {name: float(np.mean(values)) for name, values in ways.items()},
        "chosen_against_first": paired_comparison(ways["first sample"], ways["chosen by its render"]),
        "chosen_against_greedy": paired_comparison(ways["greedy decoding"], ways["chosen by its render"]),
        "best_chosen": sum(row["likeness"][row["chosen"]] >= max(row["likeness"]) for row in rows) / len(rows),
        "all_samples_alike": sum(max(row["likeness"]) - min(row["likeness"]) < 1e-9 for row in rows) / len(rows),
        "seconds_written": seconds,
        "seconds_chosen_per_page": choosing_s / len(rows),
        "versions": versions(browser),
        "pages": rows,
    }


# -----------------------------------------------------------------------------
# Spoilt pages

SPOILT = ("texts", "dropped", "order", "colours", "sizes", "font", "moved")
SHARES = (0.1, 0.3, 0.7)  # of the page's texts, or elements
MAX_HEIGHT = 2600  # px; longer screenshots would take most of the time


def spoilt(html: str, kind: str, share: float, rng: random.Random) -> str:
    """The page with a share of its texts, elements or styles changed in one way of `SPOILT`."""
    tree = html5lib.parse(html, treebuilder="etree", namespaceHTMLElements=False)
    body = tree.find("body")
    texts = [node for node in body.iter() if isinstance(node.tag, str) and (node.text or "").strip()]
    texts = [node for node in texts if node.tag not in ("style", "script", "title")]
    some = [node for node in texts if rng.random() < share] or texts[:1]
    styles = {
        "colours": lambda: f"{rng.choice(('color', 'color', 'background'))}:#{''.join(rng.choices('0369cf', k=3))}",
        "sizes": lambda: f"font-size:{rng.choice((75, 85, 120, 150))}%",
        "font": lambda: f"font-family:{rng.choice(('serif', 'monospace'))}",
        "moved": lambda: f"padding-left:{rng.choice((8, 24, 60))}px!important;margin-top:{rng.choice((4, 16, 40))}px",
    }
    if kind in styles:
        for node in some:
            node.set("style", f"{node.get('style') or ''};{styles[kind]()}!important".lstrip(";"))
    elif kind == "texts":
        for node in some:
            letters = (rng.choice(string.ascii_lowercase) if letter.isalpha() else letter for letter in node.text)
            node.text = "".join(letters)
    elif kind == "order":
        for parent in [node for node in body.iter() if len(node) > 1 and rng.random() < share]:
            place = rng.randrange(len(parent) - 1)
            parent[place], parent[place + 1] = parent[place + 1], parent[place]
    else:
        drop(body, share, rng)
    return html5lib.serialize(tree, omit_optional_tags=False, quote_attr_values="always")


def drop(body: Element, share: float, rng: random.Random) -> None:
    """Removes elements until that share of the letters is gone."""
    parents = {child: parent for parent in body.iter() for child in parent}
    letters = {node: sum(len(text.strip()) for text in node.itertext()) for node in body.iter()}
    left = share * letters[body]
    nodes = [node for node in parents if letters[node]]
    rng.shuffle(nodes)
    for node in nodes:
        if letters[node] <= left and node in list(parents[node]):
            parents[node].remove(node)
            left -= letters[node]


def ranked(pictures: Sequence[np.ndarray], target: np.ndarray) -> dict[str, list[float]]:
    """By its name each measure of every picture's likeness to `target`."""
    wanted, seen = best_of.Seen(target), [best_of.Seen(picture) for picture in pictures]
    shapes = [best_of.shapes_alike(wanted.shapes, one.shapes, target.shape) or 0.0 for one in seen]
    return {
        "chosen by": [round(best_of.likeness_of(wanted, one), 6) for one in seen],
        "its shapes alone": shapes,
        "its pictures alone": [best_of.pictures_alike(target, one.image) for one in seen],
        "SSIM of the scorer": [ssim(target, one.image) for one in seen],
    }


def ranking(args: argparse.Namespace) -> dict:
    """Of each measure, by which screenshot it had: how it agrees with the scorer's likeness."""
    found: dict[str, dict[str, list]] = {"screenshot from here": {}, "stored screenshot": {}}
    likenesses, kinds = [], []
    with Renderer(1, 60.0) as renderer:
        for folder in sorted(place.parent for place in args.real.glob("*/clean.html"))[1 :: args.every]:
            with Image.open(folder / "clean.webp") as picture:
                screenshot = np.asarray(picture.convert("RGB"))
            if len(screenshot) > MAX_HEIGHT:
                continue
            html, rng = (folder / "clean.html").read_text(encoding="utf-8"), random.Random(folder.name)
            ways = [(kind, rng.choice(SHARES)) for kind in SPOILT]
            htmls = [html, *(spoilt(html, kind, share, rng) for kind, share in ways)]
            window = window_of(screenshot.shape[1], screenshot.shape[0])
            renders = renderer.map([job_for(one, *window) for one in htmls])
            pages: list[Page] = [page_of(render, one) for render, one in zip(renders, htmls, strict=True)]
            if any(page.failure for page in pages):
                print(f"  {folder.name} left out: {[page.failure for page in pages]}", file=sys.stderr)
                continue
            likenesses.append([likeness(Compared(pages[0], page)) for page in pages])
            kinds.append([("itself", 0.0), *ways])
            for name, target in zip(found, (pages[0].image, screenshot)):
                for measure, values in ranked([page.image for page in pages], target).items():
                    found[name].setdefault(measure, []).append(values)
            print(f"  {folder.name}: {likenesses[-1]}", file=sys.stderr, flush=True)
        browser = renderer.version
    agreements = {
        name: {measure: agreement(likenesses, values) for measure, values in measures.items()}
        for name, measures in found.items()
    }
    rows = [{"ways": one, "likeness": two} for one, two in zip(kinds, likenesses)]
    for name, measures in found.items():
        for row, values in zip(rows, measures["chosen by"]):
            row[name] = values
    return {"agreement": agreements, "versions": versions(browser), "pages": rows}


def agreement(likenesses: Sequence[Sequence[float]], scores: Sequence[Sequence[float]]) -> dict[str, float | int]:
    """Over pages, the first of each being unspoilt: Kendall's tau (mean), the share of pairs ranked as by likeness
    where that tells them apart by 0.01, how often the unspoilt one wins, and how much likeness the winner lacks."""
    from scipy.stats import kendalltau

    pairs, right = 0, 0
    for ours, theirs in zip(scores, likenesses):
        for one in range(len(ours)):
            for two in range(one):
                apart = abs(theirs[one] - theirs[two]) >= 0.01
                pairs += apart
                right += apart and (ours[one] - ours[two]) * (theirs[one] - theirs[two]) > 0
    winners = [int(np.argmax(ours)) for ours in scores]
    return {
        "pages": len(winners),
        "kendall_tau": float(np.nanmean([kendalltau(*both).statistic for both in zip(scores, likenesses)])),
        "pairs": pairs,
        "pairs_right": right / max(1, pairs),
        "unspoilt_wins": winners.count(0) / len(winners),
        "likeness_lacked": float(np.mean([max(one) - one[place] for one, place in zip(likenesses, winners)])),
    }


# -----------------------------------------------------------------------------
# Telling


def versions(browser: str) -> dict[str, str]:
    """Of what the numbers depend on."""
    names = ("torch", "transformers", "scikit-image", "opencv-python-headless", "scipy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), "chromium": browser, **found}


def lines(result: dict) -> Iterator[str]:
    """The table."""
    for name, value in result.get("ways", {}).items():
        yield f"{value:>10.3f}  likeness, {name}"
    for name in ("first", "greedy"):
        if found := result.get(f"chosen_against_{name}"):
            interval = f"[{found['low']:+.3f}, {found['high']:+.3f}]"
            yield f"{found['difference']:>+10.3f}  chosen against {name} {interval}, p {found['p']:.4f}"
    for name, measures in result.get("agreement", {}).items():
        for measure, found in measures.items():
            yield (
                f"{name}, {measure:<20} tau {found['kendall_tau']:.2f}  pairs {found['pairs_right']:.2f} of "
                f"{found['pairs']}  unspoilt wins {found['unspoilt_wins']:.2f}  lacks {found['likeness_lacked']:.4f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="the demo's final folder, or a checkpoint of a demo that was stopped")
    parser.add_argument("--trained", help="how it was trained, for the record")
    parser.add_argument("--pages", type=int, default=48)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--real", type=Path, help="a folder of folders with clean.html and clean.webp")
    parser.add_argument("--every", type=int, default=4, help="of the real pages take each so many'th")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    if (args.model is None) == (args.real is None):
        parser.error("give either --model or --real")
    result = sampled(args) if args.model else ranking(args)
    print("\n".join(lines(result)))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
