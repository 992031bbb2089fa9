"""The scorer proves itself before every run, on pages whose scores are known; no number is given without that.

    with Renderer() as renderer:
        prove(renderer)                                                      # raises ScorerError
        score(reference_html, prediction_html, renderer)["overall"]

What is broken in the scorer shows as a score that does not fall where it must, or falls where it may not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from scoring import metrics
from scoring.blocks import Page, job_for, page_of
from scoring.clip import Clip
from scoring.metrics import PageScore, compare
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


KINDS = {  # of text, most of which Design2Code's definition does not see: (markup around it, the text, other words)
    "definition list": ("<dl><dt>{}</dt></dl>", "Ferry north", "Bridge south"),
    "preformatted": ("<pre>{}</pre>", "departs 07:15", "sails at noon"),
    "straight in the body": ("{}", "weather permitting", "until further notice"),
    "beside a block": ("<article>{}<div>inner</div></article>", "Island museum", "Harbour school"),
    "label": ("<label>{}</label>", "Your surname", "Old address"),
    "coloured emphasis": ('<p><em style="color:#c03010">{}</em></p>', "sold out", "few seats"),
    "drawing": ('<svg width="300" height="30"><text x="5" y="20">{}</text></svg>', "Sea chart", "Tide table"),
    "form value": ('<input size="30" value="{}">', "two adults", "one child"),
    "placeholder": ('<input size="30" placeholder="{}">', "Search quays", "Find boats"),
    "closed list": ("<select><option>{}</option></select>", "First class", "Deck only"),
    "generated": (
        '<b data-text="{}"></b><style>b::before{{content:attr(data-text)}}</style>',
        "New route",
        "Closed pier",
    ),
    "faded": ('<section style="opacity:.5"><i>{}</i></section>', "since 1902", "no longer"),
    "gradient": (
        '<h2 style="background:linear-gradient(#a00,#00a);background-clip:text;color:transparent">{}</h2>',
        "Lighthouse",
        "Warehouse",
    ),
    "shadow root": ("<div><template shadowrootmode=open><i>{}</i></template></div>", "Tickets here", "Ask aboard"),
    "frame": ('<iframe height="40" srcdoc="{}"></iframe>', "Live ferries", "Old photos"),
    "right to left": ('<p dir="rtl"><i>{}</i></p>', "ميناء هادئ", "سوق صاخب"),
    "without spaces": ("<main>{}</main>", "安静的港口", "喧闹市场"),
}


class ScorerError(RuntimeError):
    """The scorer does not score what it should; no number of it can be trusted."""


def proof_page(items: Sequence[tuple[str, int, int, str, str]]) -> str:
    """`items` as in PROOF."""
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

    def changed(count: int, change: Callable[[int, tuple], tuple]) -> str:
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


def kinds_page(words: int) -> str:
    """A page with every kind of text; `words` 0: as it should be, 1: each kind's other words."""
    lines = "".join(f"<div>{kind[0].format(kind[1 + words])}</div>\n" for kind in KINDS.values())
    return f"<!DOCTYPE html>\n<html><head><title>kinds</title></head><body>{lines}</body></html>"


def prove_kinds(renderer: Renderer) -> None:
    """Raise `ScorerError` unless every kind of text is seen, a copy is alike, and other words are not."""
    html = [kinds_page(words) for words in (0, 1)]
    page, other = map(page_of, renderer.map(job_for(one, width=640) for one in html), html)
    found = {"every kind of text": compare(page, page), "other words": compare(page, other)}
    for name, score in found.items():
        claim(found, score.failure is None, f"{name!r} could not be rendered", name)
    for words, seen in enumerate((page, other)):
        texts = [text.text for text in seen.texts]
        unseen = [name for name, kind in KINDS.items() if kind[1 + words] not in texts]
        claim(found, not unseen, f"texts that are not seen: {', '.join(unseen)}")
    copy = found["every kind of text"]["likeness"]
    claim(found, copy == 1, f"likeness of a copy with every kind of text is {copy}, not 1", "every kind of text")
    wrong = {one.text for one, two in found["other words"].matched if one.text == two.text} - {"inner"}
    alike = found["other words"]["likeness"] < 0.5
    claim(found, not wrong and alike, "likeness does not see other words", "other words")


def prove(renderer: Renderer, cases: Mapping[str, str] | None = None, clip: Clip | None = None) -> dict[str, PageScore]:
    """Raise `ScorerError`, naming the case, unless known pages score as they must. Returns their scores."""
    try:
        metrics.check_table()
    except ValueError as error:
        raise ScorerError(str(error)) from error
    known = dict(cases or proof_cases())
    renders = renderer.map(job_for(page, width=640) for page in known.values())
    pages = {name: page_of(render, known[name]) for name, render in zip(known, renders)}
    found = {name: compare(pages["itself"], page, clip) for name, page in pages.items()}
    failed = Page(None, failure="on purpose", html=known["itself"])
    found["not rendered"] = compare(pages["itself"], failed, clip)
    found["both not rendered"] = compare(failed, failed, clip)
    for name in known:
        claim(found, found[name].failure is None, f"{name!r} could not be rendered", name)
    blocks = found["itself"].blocks_reference
    claim(found, blocks == len(PROOF), f"{len(PROOF)} texts give another number of blocks", "itself")
    for metric in metrics.METRICS:
        if metric.name in found["itself"].values:  # else it cannot be measured here
            prove_metric(metric, found)
    blank = clip or found["blank"]["overall"] == 0  # CLIP finds two white pages alike
    claim(found, blank, "overall of a blank page is not 0", "blank")
    for name, kept in (("6 moved", ("text", "color")), ("9 recoloured", ("text", "position", "block"))):
        for metric in kept:
            claim(found, found[name][metric] > 0.99, f"{metric} has fallen where only others may: {name!r}", name)
    claim(found, found["another page"]["likeness"] < 0.2, "another page looks half right", "another page")
    shuffled = "texts shuffled"
    claim(found, found[shuffled]["position"] < 0.9, "position does not see that texts were shuffled", shuffled)
    if cases is None:
        prove_kinds(renderer)
    return found


def prove_metric(metric: metrics.Metric, found: Mapping[str, PageScore]) -> None:
    """What the table says of a metric must be true of the known pages. Raises `ScorerError`."""
    name, worst = metric.name, f"{metric.worst:g}"
    value = found["itself"][name]
    claim(
        found,
        abs(value - metric.best) < 1e-5,
        f"{name} of a page against itself is {value}, not {metric.best:g}",
        "itself",
    )
    for case in ("not rendered", "both not rendered"):
        claim(found, found[case][name] == metric.worst, f"{name} of a failed render is not {worst}", case)
    if metric.needs_text:
        claim(found, found["blank"][name] == metric.worst, f"{name} of a blank page is not {worst}", "blank")
    if metric.falls:
        few, many = metric.falls
        values = [found[case][name] for case in ("itself", few, many)]
        falls = all(metric.is_better(one, than=two) for one, two in zip(values, values[1:]))
        claim(found, falls, f"{name} does not fall from {few!r} to {many!r}: {values}", few, many)


def claim(found: Mapping[str, PageScore], true: bool, text: str, *names: str) -> None:
    """Raises `ScorerError` with the scores of the named cases unless it is true."""
    if not true:
        seen = "; ".join(f"{name}: {found[name].as_json()}" for name in names)
        raise ScorerError(f"the scorer is broken: {text}. {seen}")


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
    renders = renderer.map([job_for(html, width) for html in (reference, prediction)])
    wanted, written = map(page_of, renders, (reference, prediction))
    return compare(wanted, written, clip)
