"""Writes small pages that a tiny model can learn to read, with their screenshots, as an imagefolder.

    python demo/make_demo_pages.py --family demo --pages 360 --seed 7 --html site   # demo/pages, made by make_pages.py
    python make_pages.py site --out demo/pages --widths 224 --height 112
    python demo/make_demo_pages.py --family base --pages 40000 --seed 1 --out base_pages --verify 50

A tiny model reads these pages because they keep to a grid: 224 px wide, one text row every 28 px (one
row of merged patches), a palette of twelve looks, and words from a closed list, drawn uniformly so that
no word can be guessed. The base families teach structure and colours; the demo family shares grid and
looks with them, but none of its tags, rules or structure, so it is what fine-tuning has to teach.

Sections, in order: words and colours, families, rendering, writing, command line.
"""

import argparse
import hashlib
import html as html_escapes
import io
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

# -----------------------------------------------------------------------------
# Words and colours

WORDS = (
    "acre amber apple april arrow aunt autumn baker basin beach berry bird blade bread brick bridge "
    "cabin camel candle castle cedar chalk cherry cloud clover coast copper coral cotton cousin crane "
    "crow daisy dawn deer delta desert dove dragon dream eagle earth echo ember engine falcon farmer "
    "fern field finch fish flame flint flute forest fox frost garden ghost ginger goat grape grove "
    "guitar hammer harbor hazel hill honey horse indigo iron island ivy jacket jungle kettle king kite "
    "ladder lake lamp lemon lily lion maple marble meadow melon mirror moon mouse nest night north "
    "oak ocean olive onion otter owl panda pearl pepper piano pilot pine planet plum pony queen rabbit "
    "raven river robin rocket rose sailor salmon sand shark silk snow spark stone sugar sun tiger"
).split()
INKS = ("red", "blue", "green", "purple")  # text on white, or a ground for white text
GROUNDS = ("gold", "pink", "aqua", "silver")  # a ground for black text
WIDTH, ROW, MIN_ROWS, MAX_ROWS = 224, 28, 4, 7  # px, px, rows, rows


def paint(rng: random.Random) -> str:
    """One of twelve looks as CSS, every one of them visible in the screenshot."""
    ink = rng.choice(INKS)
    return rng.choice((f"color:{ink}", f"background:{ink};color:white", f"background:{rng.choice(GROUNDS)}"))


def document(rules: list[str], lines: list[str]) -> str:
    """A complete page: what every family returns, with margins off so that text stays on the grid."""
    css = "\n".join(["body{margin:0;font:16px/28px sans-serif}", *rules])
    body = "\n".join(lines)
    return f"<!DOCTYPE html>\n<html><head><style>\n{css}\n</style></head>\n<body>{body}</body></html>\n"


# -----------------------------------------------------------------------------
# Families: each draws a page (its html and its rows) with `word()` for every text. Whatever a page's
# html leaves open must show in its screenshot: two different pages that look alike cannot be learned.


def article(rng: random.Random, word: Callable[[], str]) -> tuple[str, int]:
    parts = [rng.choice(("h2", "p", "p")) for _ in range(rng.randint(1, 6))]
    rules = [f"h1{{margin:0;font-size:18px;padding-left:4px;{paint(rng)}}}"]
    if "h2" in parts:
        rules.append(f"h2{{margin:0;font-size:16px;padding-left:32px;{paint(rng)}}}")
    if "p" in parts:
        rules.append("p{margin:0;padding-left:32px}")
    lines = [f"<h1>{word()}</h1>", *(f"<{tag}>{word()}</{tag}>" for tag in parts)]
    return document(rules, lines), len(lines)


def bullets(rng: random.Random, word: Callable[[], str]) -> tuple[str, int]:
    tag = rng.choice(("ul", "ol"))
    rules = [f"{tag}{{margin:0;padding-left:32px;{paint(rng)}}}", f"h3{{margin:0;padding-left:4px;{paint(rng)}}}"]
    items = [f"<li>{word()}</li>" for _ in range(rng.randint(1, 6))]
    return document(rules, [f"<h3>{word()}</h3><{tag}>", *items, f"</{tag}>"]), 1 + len(items)


def card(rng: random.Random, word: Callable[[], str]) -> tuple[str, int]:
    cards, lines, rows = rng.randint(1, 2), [], 0
    rules = [f".card{{border-left:28px solid {rng.choice(INKS)};{paint(rng)}}}", "h4,p{margin:0 4px}"]
    for _ in range(cards):
        texts = [f"<p>{word()}</p>" for _ in range(rng.randint(1, 2 if cards > 1 else 5))]
        lines += [f'<div class="card"><h4>{word()}</h4>', *texts, "</div>"]
        rows += 1 + len(texts)
    return document(rules, lines), rows


def navigation(rng: random.Random, word: Callable[[], str]) -> tuple[str, int]:
    links = [f"<a>{word()}</a>" for _ in range(2)]
    texts = [f"<p>{word()}</p>" for _ in range(rng.randint(0, 5))]
    rules = [f"nav{{display:flex;{paint(rng)}}}", "a{width:108px;padding-left:4px}"]
    if texts:
        rules.append(f"p{{margin:0;padding-left:{rng.choice((4, 32, 116))}px}}")
    return document(rules, ["<nav>" + "".join(links) + "</nav>", *texts]), 1 + len(texts)


def form(rng: random.Random, word: Callable[[], str]) -> tuple[str, int]:
    fields = [f'<label>{word()}</label><input value="{word()}">' for _ in range(rng.randint(1, 3))]
    rules = [
        f"label{{float:left;width:80px;padding-left:4px;{paint(rng)}}}",
        "input{width:140px;height:28px;padding:0 3px;border:1px solid;box-sizing:border-box;font:inherit}",
        f"button{{width:140px;height:28px;border:0;font:inherit;text-align:left;padding:0 4px;{paint(rng)}}}",
    ]
    lines = ["<form>", *fields, f"<button>{word()}</button></form>"]
    return document(rules, lines), 1 + len(fields)


def table(rng: random.Random, word: Callable[[], str]) -> tuple[str, int]:
    count = rng.randint(0, 3)
    rules = [f"table{{border-spacing:0;{paint(rng)}}}"] if count else ["table{border-spacing:0}"]
    rules.append("th,td{width:104px;padding:0 4px;text-align:left}")
    rules.append(f"tr:first-child{{{paint(rng)}}}")
    lines = [f"<table><tr><th>{word()}</th><th>{word()}</th></tr>"]
    lines += [f"<tr><td>{word()}</td><td>{word()}</td></tr>" for _ in range(count)]
    return document(rules, [*lines, "</table>"]), 1 + count


def quote(rng: random.Random, word: Callable[[], str]) -> tuple[str, int]:
    texts = [f"<p>{word()}</p>" for _ in range(rng.randint(1, 5))]
    side = rng.choice((28, 56))
    rules = [
        f"blockquote{{margin:0 0 0 {side}px;padding-left:4px;{paint(rng)}}}",
        "p{margin:0}",
        f"cite{{display:block;font:14px/28px sans-serif;padding-left:116px;{paint(rng)}}}",
    ]
    return document(rules, ["<blockquote>", *texts, f"</blockquote><cite>{word()}</cite>"]), 1 + len(texts)


def sidebar(rng: random.Random, word: Callable[[], str]) -> tuple[str, int]:
    side = [f"<i>{word()}</i>" for _ in range(rng.randint(1, 4))]
    main = [f"<p>{word()}</p>" for _ in range(rng.randint(1, 4))]
    rules = [
        f"aside{{float:left;width:84px;{paint(rng)}}}",
        "i{display:block;font-style:normal;padding-left:4px}",
        f"main{{margin-left:84px;{paint(rng)}}}",
        "p{margin:0 4px}",
    ]
    lines = ["<aside>", *side, "</aside><main>", *main, "</main>"]
    return document(rules, lines), max(len(side), len(main))


def prices(rng: random.Random, word: Callable[[], str]) -> tuple[str, int]:
    items = [f"<div><span>{word()}</span><em>{word()}</em></div>" for _ in range(rng.randint(1, 4))]
    wide = rng.choice((80, 108))
    rules = ["div{display:flex}", f"span{{width:{wide}px;padding-left:4px;{paint(rng)}}}"]
    rules.append(f"em{{flex:1;font-style:normal;padding-left:4px;{rng.choice(('', 'font-weight:bold;'))}{paint(rng)}}}")
    return document(rules, items), len(items)


def chat(rng: random.Random, word: Callable[[], str]) -> tuple[str, int]:
    rules = [f".me{{padding-left:116px;{paint(rng)}}}", f".you{{padding-left:4px;{paint(rng)}}}"]
    lines = [f'<div class="{rng.choice(("me", "you"))}">{word()}</div>' for _ in range(rng.randint(1, 6))]
    return document(rules, lines), len(lines)


def alerts(rng: random.Random, word: Callable[[], str]) -> tuple[str, int]:
    looks = [paint(rng) for _ in range(rng.randint(1, 3))]
    rules = [f"header{{font-size:18px;padding-left:32px;{paint(rng)}}}"]
    lines = [f"<header>{word()}</header>"] if rng.random() < 0.7 else []
    for look in looks:
        lines += [f'<p style="{look}">{word()}</p>' for _ in range(rng.randint(1, 2))]
    rules = [*rules[: len(lines) - sum("<p" in line for line in lines)], "p{margin:0;padding-left:4px}"]
    return document(rules, lines), len(lines)


def board(rng: random.Random, word: Callable[[], str]) -> tuple[str, int]:
    """The demo family: a board of tasks. None of its tags or rules occurs in a base family; its three captions are
    always the same, so that everything that differs between two pages is layout and colour."""
    count, closing = rng.randint(1, 5), rng.random() < 0.5
    rules = [
        f"b{{display:block;padding-left:32px;{paint(rng)}}}",
        f"dl{{margin:0;padding-left:32px;{paint(rng)}}}",
    ]
    lines = ["<section><b>Today</b><dl>", "<dt>task</dt>" * count + "</dl></section>"]
    if closing:
        rules.append(f"footer{{padding-left:88px;{paint(rng)}}}")
        lines.append("<footer>Total</footer>")
    return document(rules, lines), 1 + count + closing


FAMILIES = {
    "base": (article, bullets, card, navigation, form, table, quote, sidebar, prices, chat, alerts),
    "demo": (board,),
}


def generate(family: str, seed: int) -> Iterator[tuple[str, int]]:
    """Endless pages (html, height in px), no html twice; the same for the same family and seed."""
    rng, seen = random.Random(f"{family}-{seed}"), set()
    while True:
        html, rows = rng.choice(FAMILIES[family])(rng, lambda: rng.choice(WORDS))
        digest = hashlib.sha1(html.encode()).digest()
        if rows <= MAX_ROWS and digest not in seen:
            seen.add(digest)
            yield html, ROW * max(rows, MIN_ROWS)


# -----------------------------------------------------------------------------
# Rendering

CHROMIUM_FLAGS = (
    "--force-device-scale-factor=1 --font-render-hinting=none --disable-lcd-text "
    "--disable-font-subpixel-positioning --force-color-profile=srgb --hide-scrollbars "
    "--run-all-compositor-stages-before-draw --disable-threaded-animation "
    "--disable-threaded-scrolling --disable-checker-imaging --no-sandbox"  # our own pages: no sandbox is needed
).split()
COLUMNS, PAGES_PER_SHEET = 8, 320


def render_sheet(browser, pages: list[tuple[str, int]]) -> list:
    """Screenshots of many pages at once, each in an iframe of its own viewport; PIL images in order.

    One page of a sheet costs about a sixth of a screenshot of its own, and its pixels are the same
    (`--verify` compares them).
    """
    from PIL import Image

    frame = '<iframe style="position:absolute;border:0;left:{}px;top:{}px;width:{}px;height:{}px" srcdoc="{}"></iframe>'
    cell = ROW * MAX_ROWS
    places = [(n % COLUMNS * WIDTH, n // COLUMNS * cell) for n in range(len(pages))]
    frames = [
        frame.format(left, top, WIDTH, height, html_escapes.escape(html))
        for (left, top), (html, height) in zip(places, pages, strict=True)
    ]
    size = {"width": COLUMNS * WIDTH, "height": places[-1][1] + cell}
    tab = browser.new_page(viewport=size)
    tab.set_content("<!DOCTYPE html><body>" + "".join(frames), wait_until="load")
    sheet = Image.open(io.BytesIO(tab.screenshot(animations="disabled"))).convert("RGB")
    tab.close()
    return [sheet.crop((x, y, x + WIDTH, y + h)) for (x, y), (_, h) in zip(places, pages, strict=True)]


def render_alone(browser, html: str, height: int):
    """The ordinary screenshot of one page, to hold the sheet against."""
    from PIL import Image

    tab = browser.new_page(viewport={"width": WIDTH, "height": height})
    tab.set_content(html, wait_until="load")
    image = Image.open(io.BytesIO(tab.screenshot(animations="disabled"))).convert("RGB")
    tab.close()
    return image


# -----------------------------------------------------------------------------
# Writing


def write_html(args: argparse.Namespace) -> None:
    args.html.mkdir(parents=True, exist_ok=True)
    for index, (html, _) in enumerate(itertools.islice(generate(args.family, args.seed), args.pages)):
        (args.html / f"{index:06d}.html").write_text(html, encoding="utf-8")


def write_pages(args: argparse.Namespace) -> None:
    """Renders sheet after sheet; a folder that is already begun is carried on after its last whole sheet."""
    from playwright.sync_api import sync_playwright
    from tqdm import tqdm

    metadata = args.out / "metadata.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    done = sum(1 for _ in metadata.open()) if metadata.exists() else 0
    source = generate(args.family, args.seed)
    for _ in range(done):
        next(source)
    with sync_playwright() as playwright, tqdm(total=args.pages, initial=done, unit="page") as bar:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=CHROMIUM_FLAGS)
        while done < args.pages:
            pages = [next(source) for _ in range(min(PAGES_PER_SHEET, args.pages - done))]
            records = []
            for index, (image, (html, _)) in enumerate(zip(render_sheet(browser, pages), pages, strict=True), done):
                name = f"{index // 1000:02d}/{index:06d}.webp"
                (args.out / name).parent.mkdir(exist_ok=True)
                image.save(args.out / name, lossless=True, quality=args.effort, method=4)
                records.append(json.dumps({"file_name": name, "text": html}) + "\n")
            with metadata.open("a") as file:
                file.writelines(records)
            done += len(pages)
            bar.update(len(pages))
        browser.close()


def verify(args: argparse.Namespace) -> None:
    """Holds a sample of the written screenshots against ordinary ones, pixel for pixel."""
    from PIL import Image, ImageChops
    from playwright.sync_api import sync_playwright

    records = [json.loads(line) for line in (args.out / "metadata.jsonl").open()]
    sample = random.Random(0).sample(records, min(args.verify, len(records)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=CHROMIUM_FLAGS)
        for record in sample:
            kept = Image.open(args.out / record["file_name"]).convert("RGB")
            box = ImageChops.difference(kept, render_alone(browser, record["text"], kept.height)).getbbox()
            if box:
                raise SystemExit(f"{record['file_name']} differs from its page's own screenshot in {box}")
        browser.close()
    print(f"{len(sample)} of {len(records)} screenshots compared with ordinary ones: all equal, pixel for pixel")


# -----------------------------------------------------------------------------
# Command line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES), required=True)
    parser.add_argument("--pages", type=int, default=360)
    parser.add_argument("--seed", type=int, default=1)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument(
        "--html", type=Path, help="folder for HTML files alone, from which make_pages.py makes a dataset"
    )
    place.add_argument("--out", type=Path, help="folder for metadata.jsonl and the images, faster for very many pages")
    parser.add_argument("--effort", type=int, default=50, help="0..100: smaller files against time")
    parser.add_argument("--verify", type=int, default=0, metavar="N", help="then compare N screenshots")
    parser.add_argument("--chromium", help="a browser's path; default: Playwright's own")
    args = parser.parse_args()
    if args.html:
        return write_html(args)
    write_pages(args)
    if args.verify:
        verify(args)


if __name__ == "__main__":
    main()
