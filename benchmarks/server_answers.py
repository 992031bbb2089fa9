"""Whether a server writes what is written here: the same pages both ways, answer beside answer.

    vllm serve ./holo1_dom_finetune_final --generation-config vllm \\
        --limit-mm-per-prompt '{"image": 1, "video": 0}' --max-model-len 8192
    python benchmarks/server_answers.py --model ./holo1_dom_finetune_final --server http://localhost:8000 \\
        --pages demo/pages --out benchmarks/results/server_answers.json

Here transformers' generate() writes, greedily; there whatever the server runs. Where two answers part, it prints both
texts, and how much likelier the model here holds its own next token than the server's, teacher-forced: in bf16 other
kernels round otherwise, so a gap of some hundredths is a tie that fell the other way. A gap of one or more, or answers
that part at their first token, mean another question, another picture, or other weights. An answer that parted once
goes its own way: only the first difference says something.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
AROUND = 60  # characters shown on each side of a difference


def pictures_in(folder: Path, count: int) -> list[Path]:
    """The first `count` screenshots of a folder, by name."""
    import use_model_from_hub as use

    kinds = {f".{kind.lower()}" for kind in (*use.PICTURE_FORMATS, "jpg")}
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in kinds)[:count]
    if not found:
        raise use.UseError(f"--pages {folder}: no PNG, JPEG or WebP in it", code=80)
    return found


def parting(here: str, there: str) -> int | None:
    """The first character at which two texts differ; None where they are equal."""
    if here == there:
        return None
    pairs = enumerate(zip(here, there))
    return next((place for place, (one, other) in pairs if one != other), min(len(here), len(there)))


def gap(model, processor, screenshot, recipe, here: str, there: str) -> float | None:
    """How much likelier the model holds the next token of `here` than that of `there`, where they part, in units of the
    natural logarithm; None where both are the same tokens."""
    import torch

    import use_model_from_hub as use

    end = processor.tokenizer.eos_token_id
    ids = [[*processor.tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in (here, there)]
    first = next((place for place, (one, other) in enumerate(zip(*ids)) if one != other), None)
    if first is None:
        return None
    inputs = use.encode_questions(processor, [screenshot], recipe.prompt).to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    common = torch.tensor([ids[0][:first]], dtype=torch.long, device=model.device)
    for name, value in (("input_ids", common), ("attention_mask", torch.ones_like(common))):
        inputs[name] = torch.cat([inputs[name], value], dim=1)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(common)], dim=1)
    with torch.inference_mode():
        logits = model(**inputs).logits[0, -1].float()
    return (logits[ids[0][first]] - logits[ids[1][first]]).item()


def written_here(model, processor, paths: list[Path], recipe, batch: int) -> list:
    import use_model_from_hub as use

    pages = []
    for start in range(0, len(paths), batch):
        screenshots = [use.open_screenshot(path.read_bytes()) for path in paths[start : start + batch]]
        pages += use.write_pages(model, processor, screenshots, recipe)
        use.say(f"  here: {len(pages)} of {len(paths)} pages written")
    return pages


def written_there(server, paths: list[Path]) -> list:
    """In the order of `paths`; raises the first failure."""
    import use_model_from_hub as use
    from writing.server import Failed

    requests = [
        use.Request(place, lambda path=path: use.open_screenshot(path.read_bytes())) for place, path in enumerate(paths)
    ]
    pages = {}
    for request, outcome in server.write(requests):
        if isinstance(outcome, Failed):
            raise use.UseError(f"{paths[request.place]}: {outcome.error}", outcome.error.code)
        pages[request.place] = outcome
    return [pages[place] for place in range(len(paths))]


def compare(model, processor, recipe, paths: list[Path], pages_here: list, pages_there: list) -> list[dict[str, Any]]:
    """Each page's outcome, printed."""
    import use_model_from_hub as use

    rows = []
    for path, here, there in zip(paths, pages_here, pages_there):
        row = {"page": path.name, "characters_here": len(here.raw), "characters_there": len(there.raw)}
        row |= {"tokens_here": here.tokens, "tokens_there": there.tokens, "parts_at": parting(here.raw, there.raw)}
        # Where an answer ended is not in its text.
        row["equal"] = row["parts_at"] is None and here.cut_off == there.cut_off
        print(f"{path.name}: {'equal' if row['equal'] else 'differs'}, {len(here.raw):,} characters here", end="")
        if row["parts_at"] is not None:
            place, screenshot = row["parts_at"], use.open_screenshot(path.read_bytes())
            row["gap"] = gap(model, processor, screenshot, recipe, here.raw, there.raw)
            told = "the same tokens" if row["gap"] is None else f"{row['gap']:.3f} likelier here"
            print(f", {len(there.raw):,} there, first at character {place:,} ({told})")
            for name, page in (("here", here), ("there", there)):
                row[f"text_{name}"] = page.raw[max(0, place - AROUND) : place + AROUND]
                print(f"  {name:>5}: {row[f'text_{name}']!r}", end="\n" if name == "here" else "")
        elif not row["equal"]:
            print(f", and the limit of tokens cut it off {'here' if here.cut_off else 'there'} alone", end="")
        print()
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    equal = sum(row["equal"] for row in rows)
    shares = [1.0 if row["parts_at"] is None else row["parts_at"] / max(1, row["characters_here"]) for row in rows]
    gaps = [row["gap"] for row in rows if row.get("gap") is not None]
    widest = f"; where they part, the server's token is at most {max(gaps):.3f} less likely here" if gaps else ""
    return (
        f"{equal} of {len(rows)} answers equal; {100 * sum(shares) / len(rows):.1f} % the same from the start{widest}"
    )


def run(args: argparse.Namespace) -> None:
    import torch
    import transformers

    import use_model_from_hub as use
    from writing.server import Server

    paths = pictures_in(args.pages, args.count)
    source = use.resolve_model(args.model)
    recipe = replace(use.load_recipe(source), temperature=0.0)  # drawn answers have other chances there
    server = Server(args.server, recipe, args.served_model, source=source)
    start = time.monotonic()
    pages_there = written_there(server, paths)
    there_s = time.monotonic() - start
    model, processor = use.load_model(source, recipe)
    start = time.monotonic()
    pages_here = written_here(model, processor, paths, recipe, args.batch)
    here_s = time.monotonic() - start
    rows = compare(model, processor, recipe, paths, pages_here, pages_there)
    print(summary(rows))
    if args.out:
        device = torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU"
        where = {"here": f"{device}, {model.dtype}", "server": f"{server.model}, owned by {server.owner}"}
        where |= {"torch": torch.__version__, "transformers": transformers.__version__, "batch": args.batch}
        found = {"summary": summary(rows), "where": where, "seconds_here": here_s, "seconds_there": there_s}
        found |= {"recipe": asdict(recipe), "pages": rows}
        args.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--server", required=True, help="address of the server, like http://localhost:8000")
    parser.add_argument("--model", help="folder or Hub repository of the model that it serves")
    parser.add_argument("--served_model", help="its name there, where the server has several")
    parser.add_argument("--pages", type=Path, default=ROOT / "demo" / "pages", help="folder with screenshots")
    parser.add_argument("--count", type=int, default=8, help="how many of them")
    parser.add_argument("--batch", type=int, default=8, help="pages written at once here")
    parser.add_argument("--out", type=Path, help="JSON file for what was found")
    args = parser.parse_args(argv)
    from use_model_from_hub import UseError, say

    try:
        run(args)
    except UseError as error:
        say(f"error: {error}")
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
