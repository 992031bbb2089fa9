"""Drops from a page's HTML what no screenshot shows; what is left looks as before, but for its pictures.

    steps = cleaning_steps("comments,scripts")          # of --clean; SettingsError for an unknown one
    clean_html(html, steps)

A second cleaning changes nothing, and either takes time that grows with the length of the page alone. What comes out is
what the tokenizer gives back of it, or no answer could ever equal it.
"""

from __future__ import annotations

import html as entities
import re
import unicodedata
from collections.abc import Collection

from training.errors import SettingsError

# Every pattern may also end where the text ends, so none fails after a long scan: cleaning takes linear time.
CLEANING_STEPS = ("comments", "scripts", "tracking", "base64")
_ATTRIBUTES = r"""((?:=\s*"[^"]*"?|=\s*'[^']*'?|[^>=]+|=)*)(>?)"""
_MARKUP = re.compile(  # a comment; an element that holds text only: name, attributes, >, content, end; any other tag
    r"<!--(?:-?>|.*?(?:--!?>|\Z))|<[!?](?!doctype|\[CDATA\[)[^>]*>?|"
    rf"<(script|style|title|textarea|noscript|iframe|xmp)(?=[\s/>]){_ATTRIBUTES}(.*?)(</\1\s*>|\Z)|"
    rf"<(/?[a-z][^\s/>]*){_ATTRIBUTES}",
    re.I | re.S,
)
_ATTRIBUTE = re.compile(r"""(?<![\s/])[\s/]*([^\s/=]+)(?:\s*=\s*("[^"]*"|'[^']*'|[^\s"'][^\s]*))?""")
_CSS = re.compile(  # strings and url(…) first: a /* in them is no comment
    r""""(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?|url\(\s*[^"'()\s][^()]*\)?|/\*.*?(?:\*/|\Z)""", re.I | re.S
)
_BLOB = re.compile(  # data:text/… stays: a style sheet or a frame is no picture
    r"""(url\(\s*)(?:"data:(?!text/)[^"]{90,}"|'data:(?!text/)[^']{90,}'|data:(?!text/)[^()"'\s]{90,}"""
    r"""|&quot;data:(?!text/)(?:(?!&quot;).){90,}&quot;)(?=\s*\))"""
    r"""|data:(?!text/)[\w/.;=+-]{0,80};base64,[\w+/=%-]{70,}""",
    re.I | re.S,
)
_TRACKER = re.compile(
    r"//[\w.-]*(?:google-analytics|googletagmanager|doubleclick|facebook\.com/tr|hotjar|clarity\.ms"
    r"|scorecardresearch|quantserve|bat\.bing|mc\.yandex|matomo|piwik)",
    re.I,
)
_TRACKING_RELS = {"preconnect", "dns-prefetch", "prefetch", "prerender", "modulepreload", "pingback"}
_TRACKING_META = re.compile(r"verif|^csrf-|^msvalidate|^fb:|analytics|^x-dns-prefetch", re.I)
_GONE = "\0"  # stands where something was dropped, until the lines that held nothing else are dropped, too


def clean_html(html: str, steps: Collection[str]) -> str:
    """`html` without what `steps`, some of CLEANING_STEPS, drop; as it was where there are none, but as
    `as_tokenizers_read_it`.

    comments: also those of style sheets. scripts: with <noscript>, on... attributes and javascript: links. tracking:
    pixels, frames and hints that fetch ahead. base64: long data: URLs that hold no text become empty ones.
    """

    def cleaned(markup: re.Match[str]) -> str:
        raw, raw_attributes, raw_close, content, end, name, attributes, close = markup.groups()
        if not raw and not name:
            return _GONE if "comments" in steps else markup[0]
        tag = (raw or name).lower()
        kept = _clean_attributes(tag, attributes or raw_attributes or "", steps)
        if kept is None:  # a <script> without an end stays: what follows may be the rest of the page
            return _GONE if name or end else markup[0]
        content = _clean_css(content, steps) if tag == "style" else content
        return f"<{raw}{kept}{raw_close}{content}{end}" if raw else f"<{name}{kept}{close}"

    if not steps:
        return as_tokenizers_read_it(html)
    html = _MARKUP.sub(cleaned, html.replace(_GONE, ""))
    html = re.sub(rf"(<pre[^<>]*>){_GONE}+(?=\n)", r"\1\n", html, flags=re.I)  # <pre> swallows one newline
    parts = re.split(r"(<pre\b.*?(?:</pre|\Z))", html, flags=re.I | re.S)  # where each line counts
    parts[::2] = [re.sub(rf"\n[ \t]*{_GONE}[ \t{_GONE}]*(?=\r?\n)", "", part) for part in parts[::2]]
    return as_tokenizers_read_it("".join(parts).replace(_GONE, ""))


def as_tokenizers_read_it(html: str) -> str:
    """Without a byte order mark at its start, which is the file's and not the page's, and composed (Unicode's NFC): the
    tokenizers of Qwen and Holo1 compose what they read, so that no answer holds an accent apart from its letter."""
    html = html.removeprefix("\ufeff")
    if html.isascii():
        return html
    # A stroke after markup would become one character with it: > and U+0338 are a ≯, and the tag is none any more.
    html = re.sub("(?<=[<>=])\u0338", "&#x338;", html)
    return unicodedata.normalize("NFC", html)


def _clean_attributes(tag: str, attributes: str, steps: Collection[str]) -> str | None:
    """The attributes that stay; None when the whole element goes."""

    def cleaned(attribute: re.Match[str]) -> str:
        key, quoted, text = attribute[1].lower(), attribute[2] or "", attribute[0]
        value = new = quoted.strip("\"'")
        if ("scripts" in steps and re.match("on[a-z]{3}", key)) or ("tracking" in steps and key == "ping"):
            return "" if attributes[attribute.end() : attribute.end() + 1] in ("", *" \t\r\n\f/") else " "
        if (
            "scripts" in steps
            and key in ("href", "src", "action", "formaction", "xlink:href")
            and (entities.unescape(value[:99]).strip().lower().startswith("javascript:"))
        ):
            new = "#"  # a link stays a link
        elif "base64" in steps and len(value) > 100:
            picture = key != "srcset" and re.match(r"\s*data:(?!text/)", value, re.I)
            new = "data:," if picture else _BLOB.sub(r"\1data:,", value)
        return text if new == value else text.replace(quoted, quoted.replace(value, new))

    if "scripts" in steps and tag in ("script", "noscript"):
        return None
    if "tracking" in steps and tag in ("img", "iframe", "link", "meta") and _is_tracking(tag, attributes):
        return None
    return _ATTRIBUTE.sub(cleaned, attributes)


def _is_tracking(tag: str, attributes: str) -> bool:
    values = {key.lower(): value.strip("\"'").lower() for key, value in reversed(_ATTRIBUTE.findall(attributes))}
    if tag == "link":
        rels = set(values.get("rel", "").split())
        return bool(rels & _TRACKING_RELS) or ("preload" in rels and values.get("as") != "style")
    if tag == "meta":
        return bool(_TRACKING_META.search(values.get("name") or values.get("property") or values.get("http-equiv", "")))
    style = dict(re.findall(r"(?:^|;)\s*(width|height)\s*:\s*([^;]*)", values.get("style", "")))
    sizes = {style.get(side, values.get(side, "")).strip().removesuffix("px") for side in ("width", "height")}
    return sizes <= {"0", "1"} or bool(_TRACKER.search(values.get("src", "")))


def _clean_css(css: str, steps: Collection[str]) -> str:
    def cleaned(token: re.Match[str]) -> str:
        around = css[max(token.start() - 1, 0) : token.start()], css[token.end() : token.end() + 1]
        parting = all(side and side not in " \t\r\n{};:," for side in around)  # of two words: 1px/**/2px
        return token[0] if not token[0].startswith("/*") else "/**/" if parting else ""

    new = _CSS.sub(cleaned, css) if "comments" in steps else css
    new = _BLOB.sub(r"\1data:,", new) if "base64" in steps else new
    return css if new == css else re.sub(r"\n[ \t\r]*(?=\n)", "", new)


def cleaning_steps(clean: str) -> tuple[str, ...]:
    """The steps of a setting such as `comments,scripts` or `none`; SettingsError for an unknown one."""
    steps = tuple(step.strip() for step in clean.split(",") if step.strip() not in ("", "none"))
    if unknown := [step for step in steps if step not in CLEANING_STEPS]:
        raise SettingsError(f"--clean {', '.join(unknown)}: there are {', '.join(CLEANING_STEPS)} and none")
    return steps


def visible_text(html: str) -> str:
    """The text of a page, without its markup, scripts and styles; character references resolved."""
    return entities.unescape(_MARKUP.sub(" ", html))
