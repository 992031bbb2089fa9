"""What of a page can go. Each reduction is an item of a set, so that many can be tried at once or halved.

    draft = draft_of(extract)                           # what extract.js says
    learn(draft, asked := questions(draft), answer)     # what analyse.js says, and of what nobody sees unseen.js
    compose(draft, dropped=set(reducible_items(draft)[0]))     # a complete document without those

Nothing here decides: one_page renders what is left, and compares pixels.
"""

from __future__ import annotations

import html as entities
import itertools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from making.style_sheets import (
    UNSEEN_PSEUDO,
    Rule,
    declarations,
    every_rule,
    in_style_element,
    joined,
    minified,
    parse_css,
    reduced_body,
    short_declarations,
    split_selectors,
    without_unused_names,
    write_css,
)

# ("rule", its number), ("attribute", its name), ("text", what is done to it), ("element", its number in unseen.js) or,
# where that must stay, ("shell", the same number): its content alone
Item = tuple[str, Any]
_PIECE = re.compile(r"<!--drop (\d+)-->(.*?)<!--/drop \1-->", re.S)
_TAG = re.compile(r"""<([a-zA-Z][^\s/>]*)((?:\s+[^\s=>]+(?:="[^"]*")?)*)\s*/?>""")
_PAIR = re.compile(r"""\s+([^\s=>]+)(?:="([^"]*)")?""")
NEEDLESS_ATTRIBUTES = set(
    """
    aria role title alt target rel name tabindex action method autocomplete autocapitalize autocorrect enctype
    novalidate accept accept-charset download ping integrity crossorigin referrerpolicy loading decoding
    fetchpriority itemscope itemtype itemprop itemid property typeof about resource vocab prefix cite datetime
    summary scope headers accesskey maxlength minlength pattern required for form spellcheck translate xmlns
    version profile content media hreflang charset focusable inputmode longdesc is nonce manifest formaction
    usemap ismap jsaction jsname jscontroller contenteditable draggable
    """.split()
)
NEEDLESS_FAMILY = re.compile(r"(?:data|aria|ng|v|x|wire|hx|js|on|item|xmlns|xml|slot|part|epub)[-:].*|[:@*#(\[_].*")


@dataclass
class Draft:
    """A normalised page, and what the browser has said of it."""

    doctype: str
    quirks: bool
    plain: str  # HTML with marks for its style sheets, and around what nobody sees
    sheets: list[list[Rule]]
    spaced: str = ""
    replacements: list[str] = field(default_factory=list)  # of what nobody sees, each piece's own, mostly ""
    shells: list[str | None] = field(default_factory=list)  # the pieces without their content
    matched: dict[str, int] = field(default_factory=dict)  # selector: 1 matches, 0 does not, -1 is no selector
    media: dict[str, bool] = field(default_factory=dict)
    supports: dict[str, bool] = field(default_factory=dict)
    declared: dict[tuple[str, str], bool] = field(default_factory=dict)


def draft_of(extract: Mapping[str, Any]) -> Draft:
    """The page that extract.js has taken apart, each rule of its style sheets numbered."""
    numbers = itertools.count()

    def numbered(rules: list[Rule]) -> list[Rule]:
        for rule in rules:
            rule.number = next(numbers)
            numbered(rule.rules or [])
        return rules

    sheets = []
    for css, media in extract["sheets"]:
        rules = parse_css(css)
        sheets.append(numbered([Rule(f"@media {media}", None, rules)] if media.strip() else rules))
    return Draft(extract["doctype"], extract["quirks"], extract["html"], sheets)


def questions(draft: Draft) -> dict[str, list]:
    """What analyse.js is to find out."""
    asked: dict[str, dict] = {"selectors": {}, "media": {}, "supports": {}, "declared": {}}
    for rule in every_rule(itertools.chain(*draft.sheets)):
        if rule.name in ("@media", "@supports"):
            asked[rule.name[1:]][rule.prelude.partition(rule.name)[2].strip()] = None
        elif not rule.name:
            asked["selectors"] |= dict.fromkeys(split_selectors(rule.prelude))
            if "{" not in rule.body:
                asked["declared"] |= {pair: None for pair in declarations(rule.body) if "var(" not in pair[1]}
    return {name: list(values) for name, values in asked.items()}


def learn(draft: Draft, asked: Mapping[str, list], answer: Mapping[str, Any], unseen: Mapping[str, Any]) -> None:
    """Puts analyse.js's answer to `asked` into the draft, and unseen.js's."""
    draft.plain, draft.spaced = answer["plain"], answer["spaced"]
    draft.replacements, draft.shells = unseen["replacements"], unseen["shells"]
    draft.matched = dict(zip(asked["selectors"], answer["after"]))
    draft.media, draft.supports = (dict(zip(asked[name], answer[name])) for name in ("media", "supports"))
    draft.declared = dict(zip(asked["declared"], answer["declared"]))


def reducible_items(draft: Draft) -> list[list[Item]]:
    """Everything that may be dropped, in groups of a kind: what was likely to change nothing comes first."""
    rules = [("rule", rule.number) for rule in every_rule(itertools.chain(*draft.sheets))]
    names = {name.lower() for tag in _TAG.finditer(draft.plain) for name, _ in _PAIR.findall(tag[2])}
    attributes = [
        ("attribute", name) for name in sorted(names) if name in NEEDLESS_ATTRIBUTES or NEEDLESS_FAMILY.fullmatch(name)
    ]
    elements = [("element", number) for number in range(len(draft.replacements))]
    text = [("text", what) for what in ("spaces", "doctype", "merged", "minified")]
    attributes += [("attribute", name) for name in ("class", "id", "href", "style")]
    return [group for group in (rules, attributes, text, [("text", "unused names")], elements) if group]


def reduced_rule(rule: Rule, draft: Draft, inner: list[Rule]) -> list[Rule]:
    """What is left of a rule when what does nothing is dropped; `inner` are the rules in it, reduced already."""
    condition = rule.prelude.partition(rule.name)[2].strip() if rule.name else ""
    if rule.name in ("@media", "@supports"):
        applies = (draft.media if rule.name == "@media" else draft.supports).get(condition, True)
        return inner if applies else []
    if rule.rules is not None:
        return [Rule(rule.prelude, None, inner, rule.number)] if inner or rule.name == "@layer" else []
    if rule.name:
        return (
            [] if rule.name in ("@page", "@charset", "@import", "@font-face", "@-ms-viewport", "@viewport") else [rule]
        )
    answers = {selector: draft.matched.get(selector, 1) for selector in split_selectors(rule.prelude)}
    if -1 in answers.values():  # one that is none makes the browser ignore them all
        return []
    selectors = [one for one, matched in answers.items() if matched and not UNSEEN_PSEUDO.search(one)]
    body = rule.body if "{" in rule.body else reduced_body(rule.body, draft.declared)
    return [Rule(", ".join(selectors), body, None, rule.number)] if selectors and body.strip() else []


def sheet_texts(draft: Draft, dropped: Collection[Item], styles: str = "") -> list[str]:
    """The text of each style sheet without what is dropped; as many as the page has, since each has its mark there.
    `styles` is the text of its style attributes."""

    def reduced(rules: list[Rule]) -> list[Rule]:
        found: list[Rule] = []
        for rule in rules:
            inner = reduced(rule.rules) if rule.rules is not None else []
            if ("rule", rule.number) in dropped:
                found += reduced_rule(rule, draft, inner)
            else:
                found.append(rule if rule.rules is None else Rule(rule.prelude, None, inner, rule.number))
        return found

    sheets = [reduced(rules) for rules in draft.sheets]
    if ("text", "merged") in dropped:
        sheets = [list(itertools.chain(*sheets)), *([] for _ in sheets[1:])]
    if ("text", "unused names") in dropped:
        sheets = without_unused_names(sheets, styles)
    if ("text", "minified") in dropped:
        sheets = [minified(joined(rules)) for rules in sheets]
    return [write_css(rules) for rules in sheets]


def compose(draft: Draft, dropped: Collection[Item]) -> str:
    """The page without what is dropped: a complete document."""
    html = draft.spaced if ("text", "spaces") in dropped else draft.plain

    def piece(found: re.Match[str]) -> str:
        number = int(found[1])
        if ("element", number) in dropped:
            return draft.replacements[number]
        return draft.shells[number] if ("shell", number) in dropped else found[2]

    html = _PIECE.sub(piece, html)
    if ("text", "spaces") in dropped:
        html = re.sub(r"\n[ \n]+(?=<)", "\n", html) if "<pre" not in html and "<textarea" not in html else html
        html = re.sub(r"\s+(?=</body>)", "", html)
    sheets = sheet_texts(draft, dropped, " ".join(re.findall(r'\sstyle="([^"]*)"', html)))
    html = without_attributes(html, "\n".join(sheets), {name for kind, name in dropped if kind == "attribute"})
    for number, css in enumerate(sheets):
        empty = not css.strip() and ("text", "merged") in dropped
        html = html.replace(
            f"<style>/*sheet {number}*/</style>",
            "" if empty else f"<style>\n{in_style_element(css).strip()}\n</style>",
            1,
        )
    doctype = draft.doctype
    if ("text", "doctype") in dropped and doctype and not draft.quirks:
        doctype = "<!DOCTYPE html>"
    if html.isascii():  # the same in every encoding that the web knows
        html = html.replace('<meta charset="utf-8">', "", 1)
    return f"{doctype}\n{html}\n".lstrip()


def without_attributes(html: str, css: str, names: Collection[str]) -> str:
    """Drops attributes by name, but for those that `css` asks for; of classes and ids those that it does not name."""
    asked = {name.lower() for name in re.findall(r"\[\s*([\w:-]+)", css)}
    parts = set(re.findall(r"\[\s*(?:class|id)\s*[~|^$*]?=\s*[\"']?([^\"'\]]+)", css, re.I))
    classes = {re.sub(r"\\(.)", r"\1", name) for name in re.findall(r"\.((?:\\.|[\w-]|[^\x00-\x7f])+)", css)}
    ids = {re.sub(r"\\(.)", r"\1", name) for name in re.findall(r"#((?:\\.|[\w-]|[^\x00-\x7f])+)", css)}
    ids |= set(re.findall(r"""(?:href|fill|filter|mask|clip-path|stroke|style)="[^"]*#([^")'&]+)""", html)) - {"#"}

    def kept(name: str, value: str, tag: str) -> str | None:
        key = name.lower()
        if key == "class" and "class" in names:
            tokens = [
                one for one in entities.unescape(value).split() if one in classes or any(part in one for part in parts)
            ]
            value = entities.escape(" ".join(tokens))
            return f' class="{value}"' if tokens else None
        if key == "id" and "id" in names:
            one = entities.unescape(value)
            return None if one not in ids and not any(part in one for part in parts) else f' id="{value}"'
        if key == "href" and "href" in names and tag in ("a", "area") and "href" not in asked:
            return ' href="#"'
        if key == "style" and "style" in names:
            value = entities.escape(short_declarations(reduced_body(entities.unescape(value), {})))
            return f' style="{value}"' if value else None
        if key in names and key not in asked and key not in ("class", "id", "href", "style"):
            return None
        return f' {name}="{value}"' if value or key in ("value", "href", "src") else f" {name}"

    def replaced(tag: re.Match[str]) -> str:
        if tag[1].lower() == "meta":
            return tag[0]
        pairs = (kept(name, value, tag[1].lower()) for name, value in _PAIR.findall(tag[2]))
        return f"<{tag[1]}{''.join(filter(None, pairs))}>"

    return _TAG.sub(replaced, html) if names else html
