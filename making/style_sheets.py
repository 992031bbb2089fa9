"""Style sheets: read into rules, shortened, written again.

    rules = parse_css("a{color:red}")           # [Rule("a", "color:red")]
    write_css(rules)
    grey_sheet(css, size_of)                    # pictures become grey boxes, web fonts go

Text in, text out: what matches, and what shows, only a browser knows (reductions asks it).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

_URL = re.compile(r"""url\(\s*(?:"((?:\\.|[^"\\])*)"|'((?:\\.|[^'\\])*)'|([^"')]*))\s*\)""", re.I | re.S)
GREY = "linear-gradient(#ccc,#ccc)"  # a picture in CSS that has no size of its own


_CSS = re.compile(  # comment, string, url, escape; a bracket or the end of a declaration; anything else
    r"""/\*.*?(?:\*/|\Z)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?|url\(\s*[^"'()\s][^()]*\)|\\."""
    r"""|[{}()\[\];]|[^{}()\[\];"'\\/u]+|.""",
    re.I | re.S,
)
GROUPS = {"@media", "@supports", "@layer", "@container", "@scope", "@starting-style", "@document", "@-moz-document"}
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


def parse_css(css: str, depth: int = 0) -> list[Rule]:
    """The rules of a style sheet, comments dropped; what no rule holds is lost, as in a browser."""
    rules: list[Rule] = []
    prelude, opened, start, level = "", 0, 0, 0
    for token in _CSS.finditer(css):
        text = token[0]
        if text.startswith("/*") and len(text) > 1:
            continue
        if level == 0:
            if text == "{":
                start, level = token.end(), 1
            elif text == ";" and not opened:
                if prelude.lstrip().startswith("@"):
                    rules.append(Rule(prelude.strip()))
                    prelude = ""
                else:
                    prelude += text
            elif text != "}":
                opened += (text in "([") - (text in ")]" and opened > 0)
                prelude += text
            continue
        level += (text == "{") - (text == "}")
        if level == 0:
            rules.append(_block(prelude.strip(), css[start : token.start()], depth))
            prelude, opened = "", 0
    if level and prelude.strip():  # the sheet ends inside a rule, which a browser closes
        rules.append(_block(prelude.strip(), css[start:] + "}" * (level - 1), depth))
    return rules


def _block(prelude: str, body: str, depth: int) -> Rule:
    rule = Rule(prelude, body)
    if rule.name in GROUPS and depth < 16:
        return Rule(prelude, None, parse_css(body, depth + 1))
    return rule


def declarations(body: str) -> list[tuple[str, str]]:
    """[(property, value)] of a rule's body."""
    found, text, opened = [], "", 0
    for token in itertools.chain((match[0] for match in _CSS.finditer(body)), ";"):
        if token.startswith("/*") and len(token) > 1:
            continue
        if token == ";" and not opened:
            name, colon, value = text.partition(":")
            if colon and name.strip():
                found.append((name.strip() if name.strip().startswith("--") else name.strip().lower(), value.strip()))
            text = ""
            continue
        opened += (token in "([{") - (token in ")]}" and opened > 0)
        text += token
    return found


def squeeze(css: str, around: str = ",") -> str:
    """Without needless white space, strings left alone; `around`: characters that need none beside them."""
    parts = re.split(r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')""", css)
    parts[::2] = [re.sub(rf"\s*([{re.escape(around)}])\s*", r"\1", re.sub(r"\s+", " ", part)) for part in parts[::2]]
    return "".join(parts).strip()


def split_selectors(prelude: str) -> list[str]:
    """The selectors of a list, by its commas outside brackets and strings."""
    found, text, opened = [], "", 0
    for token in re.findall(r"""\\.|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|.""", prelude, re.S):
        if token == "," and not opened:
            found.append(text.strip())
            text = ""
            continue
        opened += (token in "([") - (token in ")]")
        text += token
    return [*found, text.strip()]


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


def grey_sheet(css: str, size_of: SizeOf) -> str:
    """A style sheet whose pictures are grey boxes, without web fonts: neither can be part of a target."""

    def grey(rules: list[Rule]) -> None:
        for rule in rules:
            if rule.rules is not None:
                grey(rule.rules)
            elif rule.body and ("url(" in rule.body.lower() or PRIVATE.search(rule.body)):
                rule.body = grey_declarations(rule.body, size_of)
        rules[:] = [rule for rule in rules if rule.name != "@font-face" or "url(" not in rule.body.lower()]

    rules = parse_css(css)
    grey(rules)
    return write_css(rules)


def grey_declarations(body: str, size_of: SizeOf) -> str:
    """A rule's body with grey for its pictures, each of the size it had where that is known: an icon's box, say."""
    if "{" in body:  # rules in a rule
        return _URL.sub(lambda url: url[0] if (url[1] or url[2] or url[3] or "").startswith("#") else GREY, body)
    kept = []
    for name, value in declarations(body):
        urls = [(one[1] or one[2] or one[3] or "").strip() for one in _URL.finditer(value)]
        urls = [url for url in urls if not url.startswith("#")]
        if name in ("content", "quotes") or name.startswith("--"):
            value = PRIVATE.sub("\u25a0", value)
        if not urls or name == "src":
            kept.append((name, value))
        elif name in ("content", "list-style-image", "list-style"):
            kept.append((name, _URL.sub('""' if name == "content" else "none", value)))
        elif name.startswith("--") or re.search("background|mask", name):
            kept.append((name, _URL.sub(GREY, value)))
            layer, size = name.removesuffix("-image"), size_of(urls[0])
            alone = len(split_selectors(value)) == 1 and "/" not in _URL.sub("", value)
            if size and alone and layer in ("background", "mask", "-webkit-mask"):
                important = "!important" if "!important" in value else ""
                kept.append((f"{layer}-size", "{:g}px {:g}px{}".format(*size, important)))
    return ";".join(f"{name}:{value}" for name, value in kept)


def every_rule(rules: Iterable[Rule]) -> Iterator[Rule]:
    """Each rule, those in groups, too, in the order of the sheet."""
    for rule in rules:
        yield rule
        yield from every_rule(rule.rules or [])


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


def without_unused_names(css: str, styles: str) -> str:
    """Without custom properties that no var() reads, and without @keyframes that no animation names."""
    while True:
        read = set(re.findall(r"var\(\s*(--[\w-]+)", css + styles))
        shorter = re.sub(
            r"(?<=[{;])\s*(--[\w-]+)\s*:((?:\"[^\"]*\"|'[^']*'|\([^()]*(?:\([^()]*\)[^()]*)*\)|[^;{}\"'()])*)(;|(?=\}))",
            lambda match, read=read: match[0] if match[1] in read else "",
            css,
        )
        if shorter == css:
            break
        css = shorter
    css = re.sub(r"(?:^|(?<=[}\n]))[^{}@;\n]*\{\s*\}\n?", "", css)
    rules = parse_css(css)
    moving = (
        " ".join(
            value
            for rule in every_rule(rules)
            if rule.body and "{" not in rule.body
            for name, value in declarations(rule.body)
            if "animation" in name
        )
        + styles
    )
    kept = [rule for rule in rules if "keyframes" not in rule.name or rule.prelude.split()[-1].strip("\"'") in moving]
    return css if len(kept) == len(rules) else write_css(kept)
