"""Draws the README's picture: held-out demo pages as shown, as written before training, and as written after it.

python run_deepspeed_training.py --demo
python demo/draw_before_after.py --evaluation holo1_dom_finetune_output/evaluation --out demo/before_after.png
"""

import argparse
import base64
import html
import io
from pathlib import Path

from make_demo_pages import CHROMIUM_FLAGS, ROW, WIDTH

COLUMNS = {"screenshot": "shown", "written_before": "written before", "written": "written after"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluation", type=Path, required=True, help="evaluation folder of a demo run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pages", type=int, default=4)
    parser.add_argument("--chromium", help="a browser's path; default: Playwright's own")
    args = parser.parse_args()

    from PIL import Image
    from playwright.sync_api import sync_playwright

    height = args.pages * (ROW * 7 + 20) + 60  # frames below the viewport's end are not painted
    cells = [f"<th>{title}</th>" for title in COLUMNS.values()]
    rows = ["<tr>" + "".join(cells) + "</tr>"]
    for folder in sorted(args.evaluation.glob("page-*"))[: args.pages]:
        size = Image.open(folder / "screenshot.png").size
        frames = []
        for name in COLUMNS:
            if name == "screenshot":
                data = base64.b64encode((folder / "screenshot.png").read_bytes()).decode()
                frames.append(f'<img src="data:image/png;base64,{data}">')
            else:
                page = html.escape((folder / f"{name}.html").read_text(encoding="utf-8"))
                frames.append(f'<iframe sandbox="" width="{size[0]}" height="{size[1]}" srcdoc="{page}"></iframe>')
        rows.append("<tr>" + "".join(f"<td>{frame}</td>" for frame in frames) + "</tr>")
    style = "body{margin:12px;font:15px sans-serif}td,th{padding:8px;vertical-align:top;text-align:left}"
    style += "iframe,img{border:1px solid #999;display:block}"
    content = f"<!DOCTYPE html><style>{style}</style><table>{''.join(rows)}</table>"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=CHROMIUM_FLAGS)
        tab = browser.new_page(viewport={"width": 3 * (WIDTH + 20) + 24, "height": height})
        tab.set_content(content, wait_until="load")
        tab.wait_for_timeout(500)  # frames from srcdoc paint after the load event
        picture = Image.open(io.BytesIO(tab.locator("table").screenshot()))
        browser.close()
    picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(args.out, optimize=True)
    print(f"{args.out}: {picture.width} x {picture.height}")


if __name__ == "__main__":
    main()
