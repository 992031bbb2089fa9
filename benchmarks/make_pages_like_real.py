"""Writes pages with invented content in the sizes of real ones: for measuring, where the real pages may not travel.

    python benchmarks/make_pages_like_real.py --base_model ./holo1_3b_shapes --pages 72 --out pages_like_real
    python benchmarks/make_pages_like_real.py --measure ../shared/pages --tokenizer ../shared/qwen_tokenizer

The second command makes real_page_sizes.json anew: width and height of each screenshot, and the tokens of its HTML
after this pipeline's default cleaning, of all pages of an imagefolder with at most 4,096 of them. The first draws from
that file, every size once before any comes twice, and writes an imagefolder: no two pages alike, each with its number
of tokens (or up to 2 % fewer) by the tokenizer of --base_model.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
SIZES = HERE / "real_page_sizes.json"
MOST_TOKENS = 4_096  # the training's default --max_html_tokens
TOLERANCE = 0.02

WORDS = (
    "account action album answer arrow autumn basket beach bottle branch bridge button camera candle carbon castle "
    "center chapter cherry choice circle client cloud coffee column contact copper corner cotton course credit dinner "
    "doctor double dragon editor effort engine estate export fabric family figure finger flight flower forest friend "
    "future garden gentle ground guitar hammer harbor height honest impact island jacket journal kitchen ladder "
    "language letter library machine magnet manager market master meadow member memory message metal minute mirror "
    "modern morning mountain museum nature needle network notebook number object office orange origin oxygen palace "
    "paper parent pencil people planet player pocket portal powder printer profile purple quarter random record "
    "region reply report rhythm river rocket sample school search season second section silver simple singer smooth "
    "socket spring stable station stone street studio summer switch symbol system table target theory ticket timber "
    "title travel tunnel update valley vector velvet village vision volume wallet weather window winter wonder yellow"
).split()

# -----------------------------------------------------------------------------
# Sizes


def measure(folder: Path, tokenizer_folder: Path) -> dict:
    """What `real_page_sizes.json` holds: one [width, height, html tokens] for each page that is short enough."""
    from PIL import Image
    from transformers import AutoTokenizer

    sys.path.insert(0, str(HERE.parent))
    from training.cleaning import CLEANING_STEPS, clean_html

    tokenizer, sizes, read = AutoTokenizer.from_pretrained(tokenizer_folder), [], 0
    for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row, read = json.loads(line), read + 1
        html = clean_html(row["text"], CLEANING_STEPS).strip()
        tokens = len(tokenizer(html, add_special_tokens=False)["input_ids"])
        if tokens <= MOST_TOKENS:
            with Image.open(folder / row["file_name"]) as picture:
                sizes.append([*picture.size, tokens])
    return {"pages_read": read, "most_html_tokens": MOST_TOKENS, "width_height_html_tokens": sorted(sizes)}


def draw(sizes: list[list[int]], count: int, seed: int) -> list[list[int]]:
    """`count` of the sizes in random order, each once before any comes twice."""
    rng, drawn = random.Random(seed), []
    while len(drawn) < count:
        drawn += rng.sample(sizes, len(sizes))
    return drawn[:count]


# -----------------------------------------------------------------------------
# HTML


def make_html(rng: random.Random, wanted: int, count: Callable[[str], int]) -> str:
    """A page of `wanted` tokens as `count` counts them, or up to 2 % fewer; ValueError where none is so short."""
    rules: list[str] = []
    blocks: list[str] = []

    def page(filler: list[str]) -> str:
        style = "<style>\n" + "".join(rules) + "</style>\n" if rules else ""
        body = "".join(blocks) + f"<p>{' '.join(filler)}</p>\n"
        return (
            f"<!DOCTYPE html>\n<html>\n<head>\n<title>{title}</title>\n{style}</head>\n<body>\n{body}</body>\n</html>"
        )

    title = " ".join(rng.choices(WORDS, k=3))
    left = wanted - count(page([])) - 20  # the last words fill what no block fits into
    while left > 0:
        new, place = (make_rule(rng), rules) if rng.random() < 0.3 else (make_block(rng), blocks)
        left -= count(new)
        if left > 0:
            place.append(new)
    filler: list[str] = []
    best = 0
    for _ in range(40):
        missing = wanted - (tokens := count(page(filler)))
        if best < tokens <= wanted:
            best, html = tokens, page(filler)
        if not missing or (missing < 0 and not filler):
            break
        step = max(1, abs(missing) // 4)  # a word is one token or several
        filler = filler + rng.choices(WORDS, k=step) if missing > 0 else filler[:-step]
    if best < (1 - TOLERANCE) * wanted:
        raise ValueError(f"no page of {wanted} tokens can be made, only of {best}; give larger sizes")
    return html


def make_rule(rng: random.Random) -> str:
    selector = rng.choice(["", "ul ", "nav ", "main "]) + f".{rng.choice(WORDS)}-{rng.randint(1, 99)}"
    declarations = [
        f"color:#{rng.randrange(16**6):06x}",
        f"padding:{rng.randint(1, 40)}px {rng.randint(1, 40)}px",
        f"margin-bottom:{rng.randint(1, 9)}rem",
        f"font-size:{rng.randint(10, 40)}px",
        f"border:1px solid #{rng.randrange(16**3):03x}",
        "display:flex",
    ]
    return f"{selector}{{{';'.join(rng.sample(declarations, rng.randint(1, 4)))}}}\n"


def make_block(rng: random.Random) -> str:
    def words(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    name = f"{rng.choice(WORDS)}-{rng.randint(1, 99)}"
    kind = rng.choice(["text", "list", "table", "form"])
    if kind == "text":
        return f'<div class="{name}">\n<h2>{words(2, 5)}</h2>\n<p>{words(10, 40)}.</p>\n</div>\n'
    if kind == "list":
        items = "".join(f'<li><a href="#">{words(1, 4)}</a></li>\n' for _ in range(rng.randint(3, 6)))
        return f'<ul class="{name}">\n{items}</ul>\n'
    if kind == "table":
        rows = "".join(f"<tr><td>{words(1, 3)}</td><td>{rng.randint(1, 9999)}</td></tr>\n" for _ in range(4))
        return f'<table class="{name}">\n{rows}</table>\n'
    return f'<form class="{name}">\n<label>{words(1, 3)}</label><input type="text">\n<button>Send</button>\n</form>\n'


# -----------------------------------------------------------------------------
# Picture


def make_picture(rng: random.Random, width: int, height: int):
    """A bar, boxes with frames, and lines of dark dashes where text would be."""
    from PIL import Image, ImageDraw

    def colour(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.randint(least, most) for _ in range(3))

    picture = Image.new("RGB", (width, height), colour(235, 255))
    pen = ImageDraw.Draw(picture)
    pen.rectangle([0, 0, width, min(60, height // 4)], fill=colour(20, 120))
    top = min(80, height // 3)
    while top < height:
        left, tall = rng.randint(0, width // 8), rng.randint(60, 260)
        pen.rectangle([left, top, width - left, top + tall], fill=colour(200, 255), outline=colour(90, 180))
        for line in range(top + 12, top + tall - 10, 18):
            place = left + 12
            while place < width - left - 90 and rng.random() < 0.95:
                dash = rng.randint(8, 80)
                pen.rectangle([place, line, place + dash, line + 8], fill=colour(0, 90))
                place += dash + 6
        top += tall + rng.randint(10, 40)
    return picture


# -----------------------------------------------------------------------------
# Main


def write_pages(folder: Path, sizes: list[list[int]], count: Callable[[str], int], seed: int) -> list[int]:
    """Writes the imagefolder and returns the tokens that its pages have."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, tokens = [], []
    for number, (width, height, wanted) in enumerate(sizes):
        rng = random.Random(seed * 1_000_003 + number)
        html, name = make_html(rng, wanted, count), f"{number:04d}.png"
        make_picture(rng, width, height).save(folder / name, compress_level=1)
        rows.append(json.dumps({"file_name": name, "text": html}))
        tokens.append(count(html))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", type=Path, help="folder whose tokenizer counts")
    parser.add_argument("--pages", type=int, default=72)
    parser.add_argument("--out", type=Path, help="folder for the pages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", type=Path, help="imagefolder of real pages: write real_page_sizes.json from it")
    parser.add_argument("--tokenizer", type=Path, help="with --measure: folder of a Qwen2.5-VL tokenizer")
    args = parser.parse_args()
    if args.measure:
        if not args.tokenizer:
            parser.error("--measure counts with --tokenizer FOLDER")
        found = measure(args.measure, args.tokenizer)
        text = json.dumps(found).replace("[[", "[\n[").replace("], [", "],\n[").replace("]]", "]\n]")
        SIZES.write_text(text + "\n", encoding="utf-8")
        return print(
            f"{SIZES}: {len(found['width_height_html_tokens'])} of {found['pages_read']} pages are short enough"
        )
    if not args.base_model or not args.out:
        parser.error("give --base_model FOLDER and --out FOLDER, or --measure FOLDER")

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.base_model)
    sizes = draw(json.loads(SIZES.read_text())["width_height_html_tokens"], args.pages, args.seed)
    tokens = write_pages(
        args.out, sizes, lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]), args.seed
    )
    mean = sum(tokens) / len(tokens)
    print(f"{args.out}: {len(tokens)} pages, {mean:,.0f} html tokens on average, {max(tokens):,} at most")


if __name__ == "__main__":
    main()
