"""What is done to a page in the browser: steps of a renders.Job, each a function expression in a .js file here.

    Job(html, steps=(step("cut", limit=2000), step("extract")))

decode      {base64, label, second} -> {encoding, text, agreed} of bytes that the document holds, too; or null
references  {html, xml, token, scripts} -> {html, wants: [[kind, ...]], base, shadow, frames}, or {broken: why}; html
            has `token`, a number and a semicolon at the place of each thing wanted
normalise   {scripts, grey, most_tried, most_svg_characters} -> how many pictures are grey now; scripts, pictures,
            comments and metadata are gone
cut         {limit}, px from the top -> how many elements and texts that began below it are gone
extract     {} -> {html, sheets: [[css, media]], doctype, quirks, shadow, text}
analyse     {selectors, media, supports, declared[, gone]} -> {media, supports, declared: [bool], after: [1, 0 or -1 for
            each selector], plain, spaced: HTML, dropped: how many elements nobody sees}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scoring import renders

FOLDER = Path(__file__).parent


def step(name: str, /, **options: Any) -> str:
    """A step of a `renders.Job` that calls the function of `name`.js in this folder with the options as one object."""
    return renders.step(name, FOLDER, **options)
