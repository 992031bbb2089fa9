"""The scorer proves itself before every run, on pages whose scores are known; no number is given without that.

    with Renderer() as renderer:
        prove(renderer)                                                      # raises ScorerError
        score(reference_html, prediction_html, renderer).overall

What is broken in the scorer shows as a score that does not fall where it must, or falls where it may not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from scoring.blocks import Page, job_for, page_of
from scoring.clip import Clip
from scoring.metrics import METRICS, PageScore, compare
from scoring.renders import Renderer

PROOF = [  # (tag, left, top, colour, text), in pixels of a page of 640 by 480
    ("h1", 20, 10, "#102030", "Harbour timetable"),
    ("p", 20, 70, "#803010", "Ferries leave every morning"),
    ("p", 330, 70, "#106030", "Return before the evening tide"),
    ("div", 20, 130, "#1040a0", "Island of birds"),
    ("div", 330, 130, "#a01060", "Lighthouse and museum"),
    ("span", 20, 190, "#505050", "Tickets at the quay"),
    ("a", 330, 190, "#0060c0", "Ask the captain"),
    ("li", 60, 250, "#604000", "Bring warm clothes"),
    ("button", 330, 250, "#000000", "Reserve two seats"),
    ("footer", 20, 420, "#203040", "Closed on stormy days"),
]


class ScorerError(RuntimeError):
    """The scorer does not score what it should; no number of it can be trusted."""


def proof_page(items: Sequence[Sequence]) -> str:
    lines = (
        f'<{tag} style="position:absolute;margin:0;left:{left}px;top:{top}px;color:{color}">{text}</{tag}>'
        for tag, left, top, color, text in items
    )
    return f"<!DOCTYPE html>\n<html><head><title>proof</title></head><body>{''.join(lines)}</body></html>"


def proof_cases() -> dict[str, str]:
    """Changed copies of the page; of each pair the second is changed more."""
    turned = [item[4] for item in PROOF]
    turned = [*turned[1:], turned[0]]
    colors = ["#f0e010", "#10e0f0"] * 5

    def changed(count: int, change: Callable[[int, Sequence], Sequence]) -> str:
        return proof_page([change(n, item) if n < count else item for n, item in enumerate(PROOF)])

    return {
        "itself": proof_page(PROOF),
        "blank": proof_page([]),
        "3 moved": changed(3, lambda n, item: (item[0], item[1] + 150, item[2] + 100, *item[3:])),
        "6 moved": changed(6, lambda n, item: (item[0], item[1] + 150, item[2] + 100, *item[3:])),
        "3 recoloured": changed(3, lambda n, item: (*item[:3], colors[n], item[4])),
        "9 recoloured": changed(9, lambda n, item: (*item[:3], colors[n], item[4])),
        "3 shortened": changed(3, lambda n, item: (*item[:4], item[4][: len(item[4]) * 2 // 3])),
        "9 shortened": changed(9, lambda n, item: (*item[:4], item[4][: len(item[4]) * 2 // 3])),
        "2 removed": proof_page(PROOF[:-2]),
        "6 removed": proof_page(PROOF[:-6]),
        "another page": "<!DOCTYPE html>\n<html><body><main><p>Nothing of the kind</p></main></body></html>",
        "texts shuffled": changed(10, lambda n, item: (*item[:4], turned[n])),
    }


def prove(renderer: Renderer, cases: Mapping[str, str] | None = None, clip: Clip | None = None) -> dict[str, PageScore]:
    """Raise `ScorerError`, naming the case, unless known pages score as they must. Returns their scores."""
    known = dict(cases or proof_cases())
    html = known["itself"]
    pages = dict(zip(known, map(page_of, renderer.map(job_for(page, width=640) for page in known.values()))))
    found = {name: compare(pages["itself"], page, known[name], clip) for name, page in pages.items()}
    failed = Page(None, failure="on purpose")
    found["not rendered"] = compare(pages["itself"], failed, html, clip)
    found["both not rendered"] = compare(failed, failed, html, clip)

    def claim(true: bool, text: str, *names: str) -> None:
        if not true:
            seen = "; ".join(f"{name}: {found[name].as_json()}" for name in names)
            raise ScorerError(f"the scorer is broken: {text}. {seen}")

    for name in known:
        claim(found[name].failure is None, f"{name!r} could not be rendered", name)
    for metric in (*METRICS, *(["clip"] if clip else [])):
        value = getattr(found["itself"], metric)
        claim(abs(value - 1) < 1e-5, f"{metric} of a page against itself is {value}, not 1", "itself")
        for name in ("not rendered", "both not rendered"):
            claim(getattr(found[name], metric) == 0, f"{metric} of a failed render is not 0", name)
    for metric in ("block", "text", "position", "color", "likeness", *([] if clip else ["overall"])):
        claim(getattr(found["blank"], metric) == 0, f"{metric} of a blank page is not 0", "blank")
    claim(found["itself"].blocks_reference == len(PROOF), f"{len(PROOF)} texts give another number of blocks", "itself")
    for metric, few, many in (
        ("position", "3 moved", "6 moved"),
        ("color", "3 recoloured", "9 recoloured"),
        ("text", "3 shortened", "9 shortened"),
        ("block", "2 removed", "6 removed"),
        ("tree_bleu", "2 removed", "another page"),
        ("ssim", "3 moved", "6 moved"),
    ):
        values = [getattr(found[name], metric) for name in ("itself", few, many)]
        claim(
            values[0] > values[1] > values[2], f"{metric} does not fall from {few!r} to {many!r}: {values}", few, many
        )
    for name, kept in (("6 moved", ("text", "color")), ("9 recoloured", ("text", "position", "block"))):
        for metric in kept:
            claim(getattr(found[name], metric) > 0.99, f"{metric} has fallen where only others may: {name!r}", name)
    claim(found["another page"].likeness < 0.2, "another page looks half right", "another page")
    claim(found["texts shuffled"].position < 0.9, "position does not see that texts were shuffled", "texts shuffled")
    return found


def score(
    reference: str, prediction: str, renderer: Renderer | None = None, width: int = 1280, clip: Clip | None = None
) -> PageScore:
    """How alike two pages are, given as HTML. Raises `renders.BrowserMissing` without Chromium.

    With a `renderer` of one's own many pages share a browser; the proof is the caller's then.
    """
    if renderer is None:
        with Renderer() as own:
            prove(own, clip=clip)
            return score(reference, prediction, own, width, clip)
    wanted, written = map(page_of, renderer.map([job_for(reference, width), job_for(prediction, width)]))
    return compare(wanted, written, prediction, clip)
