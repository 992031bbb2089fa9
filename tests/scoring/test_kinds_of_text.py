"""`likeness` sees every text that a person sees, whatever element, style or script it is in."""

from dataclasses import replace

import pytest

from scoring import blocks, proof
from scoring.blocks import Page, job_for, page_of
from scoring.metrics import compare
from scoring.proof import KINDS, ScorerError, prove_kinds

KINDS_MORE = {  # {} is where the words go
    "dd": "<dl><dd>{}</dd></dl>",
    "main": "<main>{}</main>",
    "legend": "<fieldset><legend>{}</legend></fieldset>",
    "blockquote": "<blockquote>{}</blockquote>",
    "summary": "<details><summary>{}</summary>closed</details>",
    "open details": "<details open><summary>s</summary>{}</details>",
    "code": "<code>{}</code>",
    "small": "<small>{}</small>",
    "strong": "<section><strong>{}</strong></section>",
    "address": "<address>{}</address>",
    "caption": "<table><caption>{}</caption><tr><td>cell</td></tr></table>",
    "tspan": "<svg width=300 height=40><text x=10 y=25><tspan fill=blue>{}</tspan></text></svg>",
    "foreignObject": "<svg width=300 height=40><foreignObject width=300 height=40><i>{}</i></foreignObject></svg>",
    "textarea": "<textarea cols=40>{}</textarea>",
    "textarea's placeholder": "<textarea placeholder='{}' cols=40></textarea>",
    "chosen option": "<select><option>other<option selected>{}</select>",
    "list box": "<select size=2><option>{}</option><option>other</option></select>",
    "group of options": "<select size=3><optgroup label='{}'><option>a</optgroup></select>",
    "button": "<input type=submit value='{}'>",
    "before": "<style>.b::before{{content:'{}'}}</style><div class=b></div>",
    "badge beside its element": "<style>.b{{position:relative;width:20px;height:20px;margin-left:150px}}"
    ".b::after{{content:'{}';position:absolute;left:40px;white-space:nowrap}}</style><div class=b></div>",
    "with a counter": "<style>li::before{{content:'{} ' counter(c);counter-increment:c}}li{{list-style:none}}</style>"
    "<ol><li></li></ol>",
    "marker": "<style>li::marker{{content:'{}'}}</style><ul style='margin-left:200px'><li></li></ul>",
    "list-style-type": "<ul style='margin-left:200px;list-style-type:\"{}\"'><li>b</li></ul>",
    "outlined": "<h2 style='-webkit-text-fill-color:transparent;-webkit-text-stroke:1px red'>{}</h2>",
    "shadow of letters": "<h2 style='color:transparent;text-shadow:0 0 2px black'>{}</h2>",
    "important": "<style>.g{{-webkit-text-fill-color:#0a0!important}}</style><i class=g>{}</i>",
    "filtered": "<i style='filter:hue-rotate(90deg);color:red'>{}</i>",
    "blended": "<i style='mix-blend-mode:difference;color:white;background:black'>{}</i>",
    "white on black": "<aside style='background:#000;color:#fff'>{}</aside>",
    "closed shadow root": "<div><template shadowrootmode=closed><i>{}</i></template></div>",
    "slotted": "<div><template shadowrootmode=open><b>x</b><slot></slot></template>{}</div>",
    "vertical": "<div style='writing-mode:vertical-rl;height:150px'>{}</div>",
    "rotated": "<i style='display:inline-block;transform:rotate(10deg)'>{}</i>",
    "ruby": "<ruby>x<rt>{}</rt></ruby>",
    "formula": "<math><mtext>{}</mtext></math>",
    "drop cap": "<style>q::first-letter{{color:red}}q{{display:block}}</style><q>{}</q>",
    "tiny": "<i style='font-size:7px;font-weight:100'>{}</i>",
    "upper case": "<i style='text-transform:uppercase'>{}</i>",
    "columns": "<section style='columns:2'>{}</section>",
    "display: contents": "<section style='display:contents'>{}</section>",
    "unknown element": "<my-tag>{}</my-tag>",
    "in a transparent element": "<nav style='color:transparent'><i style='color:#333'>{}</i></nav>",
    "in a hidden element": "<nav style='visibility:hidden'><i style='visibility:visible'>{}</i></nav>",
    "dialog": "<dialog open style='position:static'>{}</dialog>",
    "picture without a source": "<img alt='{}'>",
    "link in a drawing": "<svg width=300 height=40><text y=25><a fill=blue href=#>{}</a></text></svg>",
    "sandboxed frame": "<iframe sandbox height=50 srcdoc='{}'></iframe>",
    "generated in a frame": "<iframe style='border:9px solid;padding:9px' srcdoc='<style>"
    "b::before{{content:&quot;{}&quot;}}</style><b></b>'></iframe>",
    "important in its attribute": "<i style='-webkit-text-fill-color:red!important;transition:all 9s!important'>{}</i>",
    "important in a drawing": "<svg width=300 height=40><text y=25 style='fill:red!important'>{}</text></svg>",
    "important in a layer": "<style>@layer a{{i{{-webkit-text-fill-color:red!important}}}}</style><i>{}</i>",
    "gradient among backgrounds": "<h2 style='background:linear-gradient(red,blue) text,linear-gradient(#fff,#eee);"
    "color:transparent'>{}</h2>",
    "generated gradient": "<style>.b::before{{content:'{}';background:linear-gradient(red,blue);background-clip:text;"
    "color:transparent}}</style><div class=b></div>",
    "gradient of the first line": "<style>h2::first-line{{background:linear-gradient(red,blue);background-clip:text;"
    "color:transparent}}</style><h2>{}</h2>",
    "generated by an empty element": "<style>.b::before{{content:'{}';position:absolute}}</style><i class=b></i>",
    "generated by an element without a box": "<style>.b{{display:contents}}.b::before{{content:'{}'}}</style><div "
    "class=b></div>",
    "generated far from its element": "<style>.b{{position:relative}}.b::after{{content:'{}';position:absolute;"
    "top:260px}}</style><div class=b style='height:400px'></div>",
    "generated by a form with a field named nodeType": "<style>form::before{{content:'{}'}}</style><form><input "
    "type=hidden name=nodeType></form>",
    "counter style": "<style>@counter-style w{{system:cyclic;symbols:'{}';suffix:' '}}"
    "ul{{list-style:w;margin-left:200px}}</style><ul><li>b</ul>",
    "quotation mark": "<style>q{{quotes:'{}' ''}}</style><q>x</q>",
    "above a field with autofocus": "<label>{}</label><div style='height:900px'></div><input autofocus>",
    "wider than a page from right to left": "<style>html{{direction:rtl}}</style><dl style='width:900px'><dt>{}</dl>",
}
DIFFERENT = {  # pages that read differently where no text of their HTML does
    "numbers of a list": ("<ol start=3><li>a</ol>", "<ol start=8><li>a</ol>"),
    "number of an item": ("<ol><li value=3>a</ol>", "<ol><li value=8>a</ol>"),
    "reversed list": ("<ol><li>a<li>b</ol>", "<ol reversed><li>a<li>b</ol>"),
    "counter": tuple(
        f"<style>b::before{{content:counter(c)}}</style><p style='counter-reset:c {n}'><b></b></p>" for n in (3, 8)
    ),
    "quotation marks": ("<q>a</q>", '<q style=\'quotes:"*" "*"\'>a</q>'),
    "written backwards": ("<bdo dir=ltr>harbour</bdo>", "<bdo dir=rtl>harbour</bdo>"),
    "what a field lacks": ("<input type=date>", "<input type=time>"),
    "no file": ("<input type=file>", ""),
}
SCRIPTS = [
    ("Quiet harbour", "Loud market"),
    ("नमस्ते दुनिया", "कुछ और शब्द"),
    ("😀🎉🚀", "🐍🍕🎸"),
    ("שקט בנמל", "רעש בשוק"),
]
UNSEEN = {
    "closed list": "<select><option>first<option>{}</select>",
    "closed details": "<details><summary>s</summary>{}</details>",
    "transparent": "<p style='color:transparent'>{}</p>",
    "opacity 0": "<p style='opacity:0'>{}</p>",
    "white on white": "<p style='color:white'>{}</p>",
    "covered": "<p style='margin:0;height:20px'>{}</p><div style='background:white;height:30px;margin-top:-20px;"
    "position:relative'></div>",
    "clipped": "<div style='height:0;overflow:hidden'>{}</div>",
    "far away": "<p style='position:absolute;left:-9999px'>{}</p>",
    "template": "<template>{}</template>",
    "an icon font's letter": "<p>\ue001</p><!-- {} -->",
}
PAGE = "<!DOCTYPE html>\n<html><head><title>t</title></head><body><p>One right line</p>{}</body></html>"


def rendered(renderer, markups: list[str], width: int = 400) -> list[Page]:
    html = [PAGE.format(markup) for markup in markups]
    return [page_of(render, page) for render, page in zip(renderer.map(job_for(p, width, 200) for p in html), html)]


def check(renderer, kinds: dict[str, str], pairs: list[tuple[str, str]]) -> None:
    cases = [(name, markup, words) for name, markup in kinds.items() for words in pairs]
    pages = rendered(renderer, [markup.format(text) for _, markup, words in cases for text in words])
    blind = []
    for (name, _, words), page, other in zip(cases, pages[::2], pages[1::2]):
        copy, wrong = compare(page, page)["likeness"], compare(page, other)["likeness"]
        if page.failure or copy != 1 or wrong >= 0.9:
            blind.append((name, words, page.failure, copy, wrong))
    assert not blind


def test_texts_of_other_scripts_are_seen(renderer):
    check(renderer, {"dt": "<dl><dt>{}</dt></dl>"}, SCRIPTS)


@pytest.mark.slow
def test_wrong_words_of_every_kind_are_seen_and_a_copy_is_alike(renderer):
    check(renderer, KINDS_MORE | {name: kind[0] for name, kind in KINDS.items()}, SCRIPTS[:1])


@pytest.mark.slow
def test_pages_that_read_differently_are_not_alike(renderer):
    pages = rendered(renderer, [markup for pair in DIFFERENT.values() for markup in pair])
    blind = [
        name for name, one, two in zip(DIFFERENT, pages[::2], pages[1::2]) if compare(one, two)["likeness"] > 0.999
    ]
    assert not blind


def test_a_marquee_stands_still(renderer):
    one, other = rendered(renderer, ["<marquee>Quiet harbour</marquee>"] * 2)
    assert (one.image == other.image).all() and one.texts == other.texts


def test_what_nobody_sees_is_no_text(renderer):
    pages = rendered(renderer, [markup.format("Quiet harbour") for markup in UNSEEN.values()])
    seen = {name: [text.text for text in page.texts] for name, page in zip(UNSEEN, pages)}
    extra = {"closed list": ["first"], "closed details": ["s"]}
    assert seen == {name: ["One right line", *extra.get(name, [])] for name in UNSEEN}


def test_a_copy_is_alike_where_equal_texts_stand_in_another_order(renderer):
    """By the order of the source alone the two would be paired crosswise."""
    spots = ["left:300px;top:20px", "left:20px;top:120px"]
    markups = [
        "".join(f"<b style='position:absolute;{spot}'>Read more</b>" for spot in order)
        for order in (spots, spots[::-1])
    ]
    one, other = rendered(renderer, markups)
    assert compare(one, other)["likeness"] == 1


def test_a_copy_is_1_in_every_score_and_one_with_other_words_is_not(renderer):
    """Also where Design2Code's definition sees none of the texts, or pairs equal ones crosswise."""
    spots = "".join(f"<b style='position:absolute;left:{x}px;top:{y}px'>More</b>" for x in (20, 200) for y in (60, 120))
    label, other, equal = rendered(renderer, ["<label>one two</label>", "<label>six ten</label>", spots])
    lone = replace(label, blocks=())  # as of a page whose texts all lie outside the 19 tags
    for page in (label, equal, lone):
        scores = compare(page, page)
        assert {name: scores[name] for name in scores.values} == {name: pytest.approx(1) for name in scores.values}
    assert compare(lone, replace(other, blocks=()))["block"] == 0


def test_case_and_place_and_colour_count(renderer):
    """Upper case by CSS reads as typed upper case does; another case does not."""
    same, upper, styled, moved, red = rendered(
        renderer,
        [
            "<dt>harbour",
            "<dt>HARBOUR",
            "<dt style='text-transform:uppercase'>harbour",
            "<dt style='padding-left:200px'>harbour",
            "<dt style='color:red'>harbour",
        ],
    )
    assert compare(upper, styled)["likeness"] == 1
    assert all(compare(same, other)["likeness"] < 0.95 for other in (upper, moved, red))


def test_what_the_original_saw_is_said(renderer):
    page, full = rendered(renderer, ["<dl><dt>one two three</dt></dl>", "<p>one two three</p>"])
    assert compare(page, page).words_in_blocks == 0.5 and compare(full, full).words_in_blocks == 1


@pytest.mark.parametrize("name", KINDS)
def test_each_blindness_stops_the_scorer(name, recorded, monkeypatch):
    real = blocks.texts_of

    def blind(*args: object) -> tuple:
        return tuple(text for text in real(*args) if text.text not in KINDS[name][1:])

    monkeypatch.setattr(blocks, "texts_of", blind)
    with pytest.raises(ScorerError, match=f"texts that are not seen: {name}"):
        prove_kinds(recorded)


def test_words_that_are_not_compared_stop_the_scorer(recorded, monkeypatch):
    real = proof.compare
    monkeypatch.setattr(proof, "compare", lambda one, two: real(one, one))
    with pytest.raises(ScorerError, match="likeness does not see other words"):
        prove_kinds(recorded)
