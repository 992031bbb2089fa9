"""Style sheets: read into rules, shortened, written again.

    rules = parse_css("a{color:red}")           # [Rule("a", "color:red")]
    write_css(rules)
    grey_sheet(css, size_of)                    # pictures become grey boxes, web fonts go

Text in, text out, with tinycss2 between, which reads by the rules of the standard (https://www.w3.org/TR/css-syntax-3).
What matches, and what shows, only a browser knows (reductions asks it).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import tinycss2
from tinycss2.ast import Node

GREY = "linear-gradient(#ccc,#ccc)"  # a picture in CSS that has no size of its own
PICTURES = re.compile(r"url\(|image-set\(", re.I)
GROUPS = {"media", "supports", "layer", "container", "scope", "starting-style", "document", "-moz-document"}
MAX_DEPTH = 16  # of groups in groups
UNSEEN_PSEUDO = re.compile(r"::?-?(?:webkit-|moz-)?(?:selection|scrollbar[\w-]*|resizer|backdrop)\b", re.I)
UNSEEN_PROPERTY = re.compile(  # no screenshot shows them; the pixels are compared all the same
    r"-(?:moz|ms|o|khtml|epub)-|\*|_|(?:-webkit-)?(?:transition|user-select|tap-highlight|overflow-scrolling)|cursor$"
    r"|pointer-events$|will-change$|touch-action$|scroll-behavior$|(?:-webkit-)?text-size-adjust$|-webkit-font-smooth"
    r"|(?:-webkit-)?print-color|orphans$|widows$|page-break|caret-color$|-webkit-touch|overscroll|behavior$",
    re.I,
)
PRIVATE = re.compile(  # characters that only an icon font draws, as escapes or as they are
    r"\\(?:0?[ef][0-9a-f]{3}|f[0-9a-f]{4}|10[0-9a-f]{4})(?![0-9a-f])\s?|[\ue000-\uf8ff\U000f0000-\U0010ffff]", re.I
)
REMEMBERED = 20_000  # texts whose reading is kept: a page's rules are read again for each candidate


SizeOf = Callable[[str], tuple[float, float] | None]  # a picture's address -> (width, height) in px, where known


@dataclass
class Rule:
    """`body` is the text between a rule's braces, None of a statement; `rules` those of a group, such as @media."""

    prelude: str
    body: str | None = None
    rules: list[Rule] | None = None
    number: int = -1

    @property
    def name(self) -> str:
        """@media and the like; nothing for a rule with selectors."""
        return re.match(r"(@[\w-]+)?", self.prelude)[0].lower()


# -----------------------------------------------------------------------------
# Read and written


def parse_css(css: str) -> list[Rule]:
    """The rules of a style sheet, comments dropped; what no rule holds is lost, as in a browser."""
    return rules_of(tinycss2.parse_stylesheet(css, skip_comments=True, skip_whitespace=True))


def rules_of(nodes: Iterable[Node], depth: int = 0) -> list[Rule]:
    """The rules among what tinycss2 has read; those of a group are read in turn."""
    rules = []
    for node in nodes:
        if node.type == "error":
            continue
        prelude = text_of(node.prelude)
        if node.type == "at-rule":
            prelude = f"@{node.at_keyword} {prelude}"
        if node.content is None:
            rules.append(Rule(prelude.strip()))
        elif node.type == "at-rule" and node.lower_at_keyword in GROUPS and depth < MAX_DEPTH:
            inner = tinycss2.parse_rule_list(node.content, skip_comments=True, skip_whitespace=True)
            rules.append(Rule(prelude.strip(), None, rules_of(inner, depth + 1)))
        else:
            rules.append(Rule(prelude.strip(), text_of(node.content)))
    return rules


def text_of(nodes: Iterable[Node]) -> str:
    """What tinycss2 has read as text, without comments."""
    return tinycss2.serialize(without_comments(nodes)).strip()


def without_comments(nodes: Iterable[Node]) -> list[Node]:
    """The nodes, and what is in their brackets, without comments."""
    kept = [node for node in nodes if node.type != "comment"]
    for node in kept:
        if (inner := inside(node)) is not None:
            inner[:] = without_comments(inner)
    return kept


def inside(node: Node) -> list[Node] | None:
    """What is in a function's or a block's brackets, to be read or changed; None of anything else."""
    return node.arguments if node.type == "function" else getattr(node, "content", None)


def parts_of(nodes: Iterable[Node], mark: str = ",") -> list[list[Node]]:
    """What lies between the marks outside brackets."""
    parts: list[list[Node]] = [[]]
    for node in nodes:
        if node == mark:
            parts.append([])
        else:
            parts[-1].append(node)
    return parts


@lru_cache(REMEMBERED)
def declarations(body: str) -> tuple[tuple[str, str], ...]:
    """(property, value) of each declaration in a rule's body."""
    return tuple(
        (
            node.name if node.name.startswith("--") else node.lower_name,
            text_of(node.value) + ("!important" if node.important else ""),
        )
        for node in tinycss2.parse_blocks_contents(body, skip_comments=True, skip_whitespace=True)
        if node.type == "declaration"
    )


@lru_cache(REMEMBERED)
def split_selectors(prelude: str) -> tuple[str, ...]:
    """The selectors of a list, by its commas outside brackets and strings."""
    return tuple(text_of(part) for part in parts_of(tinycss2.parse_component_value_list(prelude)))


@lru_cache(REMEMBERED)
def squeeze(css: str, around: str = ",") -> str:
    """Without needless white space, strings left alone; `around`: characters that need none beside them."""
    return tinycss2.serialize(tight(tinycss2.parse_component_value_list(css, skip_comments=True), around))


def tight(nodes: Iterable[Node], around: str) -> list[Node]:
    """The nodes without white space at the ends and beside `around`, and a single space elsewhere."""
    kept: list[Node] = []
    for node in without_comments(nodes):
        if node.type == "whitespace":
            if kept and not hugs(kept[-1], around):
                node.value = " "
                kept.append(node)
            continue
        if kept and kept[-1].type == "whitespace" and hugs(node, around):
            kept.pop()
        if (inner := inside(node)) is not None:
            inner[:] = tight(inner, around)
        kept.append(node)
    return kept[:-1] if kept and kept[-1].type == "whitespace" else kept


def hugs(node: Node, around: str) -> bool:
    """Whether it needs no white space beside it."""
    if node.type == "{} block":
        return "{" in around
    return node.type == "whitespace" or (node.type == "literal" and node.value in around)


def in_style_element(css: str) -> str:
    """`css` as the text of a <style>, which nothing in it may end."""
    return re.sub(r"</(?=style)", r"<\\/", css, flags=re.I)


def write_css(rules: Iterable[Rule]) -> str:
    """The rules as text, one a line."""
    return "\n".join(
        f"{rule.prelude};"
        if rule.body is None and rule.rules is None
        else f"{rule.prelude}{{{write_css(rule.rules) if rule.rules is not None else rule.body}}}"
        for rule in rules
    )


def every_rule(rules: Iterable[Rule]) -> Iterator[Rule]:
    """Each rule, those in groups, too, in the order of the sheet."""
    for rule in rules:
        yield rule
        yield from every_rule(rule.rules or [])


def imports_of(css: str) -> tuple[list[str | tuple[str, list[str]]], list[Rule]]:
    """(what a sheet begins with, its other rules): an @layer statement's text, or an @import as `import_of` gives it.
    An @import that comes later counts for nothing."""
    head: list[str | tuple[str, list[str]]] = []
    nodes = tinycss2.parse_stylesheet(css, skip_comments=True, skip_whitespace=True)
    place, last = 0, 0
    for place, node in enumerate(nodes):
        name = node.lower_at_keyword if node.type == "at-rule" and node.content is None else ""
        if name == "import" and (found := import_of(without_comments(node.prelude))):
            head.append(found)
            last = place + 1
        elif name == "layer":
            head.append(f"@layer {text_of(node.prelude)};\n")
        elif name not in ("import", "charset") and node.type != "error":
            break
    while head and isinstance(head[-1], str):  # they stand among the other rules just as well
        head.pop()
    return head, [rule for rule in rules_of(nodes[last:]) if rule.name not in ("@import", "@charset")]


def import_of(prelude: list[Node]) -> tuple[str, list[str]] | None:
    """(address, heads of blocks, innermost first) of an @import; None where it names no sheet."""
    nodes = [node for node in prelude if node.type != "whitespace"]
    if not nodes or (address := address_of(nodes[0])) is None:
        return None
    rest, heads = nodes[1:], []
    if rest and rest[0].type == "ident" and rest[0].lower_value == "layer":
        heads.append("@layer ")
        rest = rest[1:]
    elif rest and rest[0].type == "function" and rest[0].lower_name == "layer":
        heads.append(f"@layer {text_of(rest[0].arguments)}")
        rest = rest[1:]
    if rest and rest[0].type == "function" and rest[0].lower_name == "supports":
        heads.append(f"@supports ({text_of(rest[0].arguments)})")
        rest = rest[1:]
    if rest:
        heads.append(f"@media {text_of(prelude[prelude.index(rest[0]) :])}")
    return address, heads


def address_of(node: Node) -> str | None:
    """What a string or a url() names; None of anything else."""
    if node.type in ("string", "url"):
        return node.value
    if node.type == "function" and node.lower_name in ("url", "src"):
        return next((inner.value for inner in node.arguments if inner.type == "string"), None)
    return None


# -----------------------------------------------------------------------------
# Greyed


def grey_sheet(css: str, size_of: SizeOf) -> str:
    """A style sheet whose pictures are grey boxes, without web fonts: neither can be part of a target."""
    if not PICTURES.search(css) and not PRIVATE.search(css):
        return css

    def grey(rules: list[Rule]) -> None:
        for rule in rules:
            if rule.rules is not None:
                grey(rule.rules)
            elif rule.body and (PICTURES.search(rule.body) or PRIVATE.search(rule.body)):
                rule.body = grey_declarations(rule.body, size_of)
        rules[:] = [rule for rule in rules if rule.name != "@font-face" or "url(" not in rule.body.lower()]

    rules = parse_css(css)
    grey(rules)
    return write_css(rules)


def grey_declarations(body: str, size_of: SizeOf) -> str:
    """A rule's body with grey for its pictures, each of the size it had where that is known: an icon's box, say."""
    if "{" in body:  # rules in a rule
        return replaced_pictures(body, GREY)[0]
    kept = []
    for name, value in declarations(body):
        if name in ("content", "quotes") or name.startswith("--"):
            value = PRIVATE.sub("\u25a0", value)
        picture = GREY
        if name in ("content", "list-style-image", "list-style"):
            picture = '""' if name == "content" else "none"
        greyed, found = replaced_pictures(value, picture) if PICTURES.search(value) else (value, [])
        if not found or name == "src":
            kept.append((name, value))
        elif picture != GREY:
            kept.append((name, greyed))
        elif name.startswith("--") or re.search("background|mask", name):
            kept.append((name, greyed))
            layer, (address, density) = name.removesuffix("-image"), found[0]
            alone = len(split_selectors(value)) == 1 and "/" not in greyed
            if alone and layer in ("background", "mask", "-webkit-mask") and (size := size_of(address)):
                important = "!important" if value.endswith("!important") else ""
                sides = " ".join(f"{side / density:g}px" for side in size)
                kept.append((f"{layer}-size", sides + important))
    return ";".join(f"{name}:{value}" for name, value in kept)


def replaced_pictures(css: str, picture: str) -> tuple[str, list[tuple[str, float]]]:
    """`css` with something else for its pictures, and (address, density in image pixels per px) of each that it names:
    of an image-set() the one that a screen of ordinary density gets. What is in this document stays."""
    found: list[tuple[str, float]] = []
    stand_in = tinycss2.parse_component_value_list(picture)

    def replaced(nodes: Iterable[Node]) -> list[Node]:
        kept = []
        for node in nodes:
            one = None
            if node.type == "function" and node.lower_name in ("image-set", "-webkit-image-set"):
                one = candidate_of(node)
            elif node.type == "url" or (node.type == "function" and node.lower_name in ("url", "src")):
                one = (address_of(node) or "", 1.0)
            if one is not None and not one[0].startswith("#"):
                found.append(one)
                kept += stand_in
                continue
            if (inner := inside(node)) is not None:
                inner[:] = replaced(inner)
            kept.append(node)
        return kept

    return tinycss2.serialize(replaced(tinycss2.parse_component_value_list(css))), found


def candidate_of(image_set: Node) -> tuple[str, float]:
    """(address, density) that is chosen where a px is one pixel: the least dense that suffices, else the densest."""
    found = []
    for part in parts_of(image_set.arguments):
        address = next((one for node in part if (one := address_of(node)) is not None), None)
        density = 1.0
        for node in part:
            if node.type == "dimension" and node.value > 0:
                density = node.value / {"dpi": 96, "dpcm": 96 / 2.54}.get(node.lower_unit, 1)
        if address is not None:
            found.append((address, density))
    enough = [one for one in found if one[1] >= 1]
    return min(enough, key=lambda one: one[1]) if enough else max(found, key=lambda one: one[1], default=("", 1.0))


# -----------------------------------------------------------------------------
# Shortened


def reduced_body(body: str, declared: Mapping[tuple[str, str], bool]) -> str:
    """Without declarations that the browser does not know, that show nowhere, or that a later one overrules."""
    kept: dict[str, str] = {}
    for name, value in declarations(body):
        if UNSEEN_PROPERTY.match(name) or not declared.get((name, value), True):
            continue
        if name in kept and "!important" in kept[name] and "!important" not in value:
            continue
        if name in kept and "var(" not in value:
            del kept[name]
        elif name in kept:  # whether it holds is known only when the variable is
            name = f"{name} "
        kept[name] = value
    for name in [name for name in kept if name.startswith("-webkit-")]:
        if kept.get(name.removeprefix("-webkit-")) == kept[name]:
            del kept[name]
    return ";".join(f"{name.strip()}:{value}" for name, value in kept.items())


def joined(rules: list[Rule]) -> list[Rule]:
    """Neighbours with the same declarations become one rule; those with the same selectors, too."""
    found: list[Rule] = []
    for rule in rules:
        last = found[-1] if found else None
        if last and rule.body and last.body and not rule.name and not last.name and "{" not in rule.body + last.body:
            if rule.body == last.body and "::-" not in rule.prelude + last.prelude:
                found[-1] = Rule(f"{last.prelude},{rule.prelude}", last.body, None, last.number)
                continue
            if rule.prelude == last.prelude:
                found[-1] = Rule(last.prelude, f"{last.body};{rule.body}", None, last.number)
                continue
        found.append(rule)
    return found


def minified(rules: Iterable[Rule]) -> list[Rule]:
    """The rules without needless white space, neighbours in groups joined."""
    found = []
    for rule in rules:
        prelude = squeeze(rule.prelude, "," if rule.name else ",>")
        if rule.rules is not None:
            found.append(Rule(prelude, None, minified(joined(rule.rules)), rule.number))
        elif rule.body is None or "{" in rule.body:
            found.append(Rule(prelude, rule.body and squeeze(rule.body, "{};"), None, rule.number))
        else:
            found.append(Rule(prelude, short_declarations(rule.body), None, rule.number))
    return found


def short_declarations(body: str) -> str:
    """A rule's body without needless white space; what is no declaration goes."""
    return ";".join(f"{name}:{squeeze(value)}" for name, value in declarations(body))


def without_unused_names(sheets: list[list[Rule]], styles: str) -> list[list[Rule]]:
    """Without custom properties that no var() reads, in the sheets or in `styles`, the text of style attributes, and
    without @keyframes that no animation names."""
    while True:
        css = "".join(map(write_css, sheets)) + styles
        read = set(re.findall(r"var\(\s*(--(?:\\.|[^\s,)\\])+)", css, re.I))
        shorter = [reading_only(rules, read) for rules in sheets]
        if shorter == sheets:
            break
        sheets = shorter
    moving = styles
    for rule in every_rule(rule for rules in sheets for rule in rules):
        if rule.body and "animation" in rule.body:
            moving += f" {rule.body}"
    return [
        [rule for rule in rules if "keyframes" not in rule.name or rule.prelude.split()[-1].strip("\"'") in moving]
        for rules in sheets
    ]


def reading_only(rules: list[Rule], read: set[str]) -> list[Rule]:
    """The rules with custom properties of these names alone; a rule that held nothing else goes."""
    kept = []
    for rule in rules:
        if rule.rules is not None:
            kept.append(Rule(rule.prelude, None, reading_only(rule.rules, read), rule.number))
            continue
        body = rule.body
        if body and "--" in body and "{" not in body:
            pairs = declarations(body)
            if any(name.startswith("--") and name not in read for name, _ in pairs):
                body = ";".join(f"{name}:{value}" for name, value in pairs if name[:2] != "--" or name in read)
        if body or body is None or rule.name:
            kept.append(Rule(rule.prelude, body, None, rule.number))
    return kept
