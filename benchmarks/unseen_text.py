"""How much of the targets' text has no pixel in the screenshot: every word made transparent, and the pixels compared.

    python make_pages.py site --out pages --tokenizer TOKENIZER_FOLDER
    python benchmarks/unseen_text.py pages --out benchmarks/results/unseen_text.json

A word has a pixel where the screenshot changes inside its box once it is transparent. So clipped, covered and hidden
words have none, nor has one in the colour of what is behind it. Words whose boxes overlap take turns. Text is what
stands in the body, white space apart: no title, no attribute (alt, placeholder, value), no style sheet. Each target is
rendered anew, and whether that gives its stored screenshot is told, too. Nothing here is shared with making/.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from scoring.renders import SHOT, Job, Renderer, step  # noqa: E402

MOST_GROUPS = 12  # further words that overlap share the last turn, where one may be taken for seen


def words_step(group: int | None = None) -> str:
    """The step that lists the words, or makes one group of them transparent."""
    return step("unseen_text", HERE, most_groups=MOST_GROUPS, **({} if group is None else {"group": group}))


def has_pixel(boxes: list[list[int]], changed: np.ndarray) -> bool:
    """Whether a pixel of `changed` (H, W) bool is set in one of the boxes [left, top, right, bottom], px."""
    sides = ([max(0, side) for side in box] for box in boxes)
    return any(changed[top:bottom, left:right].any() for left, top, right, bottom in sides)


def measure(html: str, width: int, height: int, renderer: Renderer) -> tuple[dict, np.ndarray]:
    """({characters, unseen, title}, screenshot (height, W, 3) uint8) of a target."""
    found = renderer.render(Job(html, width, steps=(words_step(),)))
    if found.failure:
        raise RuntimeError(found.failure)
    words = found.values[0]["words"]
    groups = sorted({group for _, boxes, group in words if boxes})
    passes = [one for group in groups for one in (words_step(group), SHOT)]
    shown = renderer.render(Job(html, width, steps=(SHOT, *passes)))
    if shown.failure:
        raise RuntimeError(shown.failure)
    image = shown.image[:height]
    changed = {
        group: (shot[:height] != image).any(axis=-1) for group, shot in zip(groups, shown.values[2::2], strict=True)
    }
    unseen = sum(length for length, boxes, group in words if not boxes or not has_pixel(boxes, changed[group]))
    facts = {"characters": sum(length for length, _, _ in words), "unseen": unseen}
    return facts | {"title": found.values[0]["title"], "turns": len(groups)}, image


def measured(folder: Path, renderer: Renderer) -> Iterator[dict]:
    """A row for each page of a folder that make_pages.py wrote."""
    for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        facts, image = measure(row["text"], row["viewport"], row["height"], renderer)
        with Image.open(folder / row["file_name"]) as stored:
            again = np.array_equal(np.asarray(stored.convert("RGB")), image)
        tokens = {"tokens": row["tokens"][2]} if "tokens" in row else {}
        yield {"page": row["page"], **facts, **tokens, "renders": row["renders"], "rendered_again_identical": again}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("pages", type=Path, help="a folder that make_pages.py wrote")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    rows = []
    with Renderer(1, 120.0) as renderer:
        for row in measured(args.pages, renderer):
            rows.append(row)
            share = row["unseen"] / max(1, row["characters"])
            again = "" if row["rendered_again_identical"] else "  not the stored screenshot"
            print(f"{row['characters']:>8,} {row['unseen']:>8,} {share:>7.2%}  {row['page']}{again}", flush=True)
    total = {name: sum(row.get(name, 0) for row in rows) for name in ("characters", "unseen", "tokens", "title")}
    total |= {"pages": len(rows), "share": total["unseen"] / max(1, total["characters"])}
    total["renders_per_page"] = sum(row["renders"] for row in rows) / max(1, len(rows))
    total["rendered_again_identical"] = sum(row["rendered_again_identical"] for row in rows)
    total["browser"] = renderer.version
    print(f"{total['characters']:>8,} {total['unseen']:>8,} {total['share']:>7.2%}  {len(rows)} pages; {total}")
    if args.out:
        args.out.write_text(json.dumps({"total": total, "pages": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
