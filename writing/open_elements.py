"""What is open where a document breaks off, and the text that closes it.

    page = OpenElements()
    page.feed('<html><body><table><tr><td class="a')
    page.closing()                              # '"></table></body></html>', what HTML asks for and no more
    page.closing(optional=True)                 # '"></td></tr></tbody></table></body></html>'

The tree is built by html5lib's own rules (its phases: implied ends, formatting elements that open again, tables,
select, SVG and MathML), so that what is open here is open for `scoring.validity`; only the tags are found here, since
html5lib's tokenizer wants the whole text at once, and no node has children.
"""

from __future__ import annotations

import html
import re
from functools import cache
from typing import Any

from html5lib import HTMLParser
from html5lib.constants import namespaces, tokenTypes
from html5lib.treebuilders import base

from scoring.validity import MAX_ATTRIBUTES, MAX_DEPTH, SEEN_WITHOUT_TEXT, UNSEEN

SPARE_DEPTH = 8  # elements that closing may open on the way (a document's own, formatting ones again)
# Their end tags may be left out (HTML, "Optional tags"), and html5lib lets them be open where the body ends.
OPTIONAL = frozenset("dd dt li optgroup option p rp rt tbody td tfoot th thead tr".split())
MARK = "\u2026"  # stands in a body in which nothing was written: the page broke off before it
DOCTYPE = "<!doctype html>"
START, END, TEXT, SPACE = (tokenTypes[name] for name in ("StartTag", "EndTag", "Characters", "SpaceCharacters"))

_TAG_NAME = re.compile(r"<(/?)([a-zA-Z][^\t\n\f\r />]*)")
_GAP = re.compile(r"[\t\n\f\r /]*")
_ATTRIBUTE = re.compile(r"([^\t\n\f\r />][^\t\n\f\r />=]*)[\t\n\f\r ]*(=?)[\t\n\f\r ]*")
_VALUE = re.compile(r""""([^"]*)"|'([^']*)'|([^\t\n\f\r >"'][^\t\n\f\r >]*)(?=[\t\n\f\r >])|(?=>)""")
_COMMENT_END = re.compile(r"--!?>")
_SCRIPT_PART = re.compile(r"<!--|-->|<(/?)script(?=[\t\n\f\r />])", re.IGNORECASE)
# What can become such a part with more text behind it, and must be kept till then.
_PART_OF_SCRIPT_PART = re.compile(r"(?:<!?-?|--?|</?[a-zA-Z]*)\Z")
_PART_OF_REFERENCE = re.compile(r"(?:&#?[a-zA-Z0-9]{0,32})?\Z")
_LEADING_SPACE = re.compile(r"[\t\n\f\r ]*")


@cache
def _end_of(name: str) -> re.Pattern[str]:
    """The end tag of an element whose text is read as such: html5lib knows some ten of them."""
    return re.compile(rf"</{re.escape(name)}(?=[\t\n\f\r />])", re.IGNORECASE)


class Unclosable(Exception):
    """Nothing that can be written makes a whole document of this."""


class Bare(base.Node):
    """A node without children: only which ones are open counts."""

    def __init__(self, name: str = "", namespace: str | None = None):
        self.name, self.namespace, self.parent, self.attributes = name, namespace, None, {}
        self.nameTuple = (namespace or namespaces["html"], name)

    def appendChild(self, node: Bare, *where: Any) -> None:
        node.parent = self

    insertBefore = appendChild

    def insertText(self, data: str, insertBefore: Bare | None = None) -> None:
        pass

    def removeChild(self, node: Bare) -> None:
        node.parent = None

    def reparentChildren(self, newParent: Bare) -> None:
        pass

    def cloneNode(self) -> Bare:
        node = Bare(self.name, self.namespace)
        node.attributes = dict(self.attributes)
        return node

    def hasContent(self) -> bool:
        return True


class BareTree(base.TreeBuilder):
    documentClass = elementClass = commentClass = Bare

    def insertDoctype(self, token: dict[str, Any]) -> None:
        pass

    def insertComment(self, token: dict[str, Any], parent: Bare | None = None) -> None:
        pass


class TextKinds:
    """Stands where html5lib's phases expect its tokenizer: they say here how the text of an element is to be read."""

    rcdataState, rawtextState, scriptDataState, plaintextState = "rcdata", "rawtext", "script", "plaintext"
    state = None  # None: tags and text

    class stream:
        """<meta charset> asks its own document's: text has none that could change."""

        charEncoding = ("utf-8", "certain")


class Phases(HTMLParser):
    """html5lib's parser, driven token by token."""

    def __init__(self) -> None:
        super().__init__(tree=BareTree, namespaceHTMLElements=False)
        self.innerHTMLMode, self.scripting, self.container = False, False, None
        self.tokenizer = TextKinds()
        self.left_open = False  # a body that ended before what was open in it
        self.reset()

    def parseError(self, errorcode: str = "", datavars: dict[str, Any] | None = None) -> None:
        """None is kept but the one that nothing can mend: something was open when the body ended."""
        if errorcode == "expected-one-end-tag-but-got-another" and datavars.get("gotName") in ("body", "html"):
            self.left_open = True

    def take(self, token: dict[str, Any]) -> None:
        """A token through the phases: the inner part of html5lib's `mainLoop`, which draws its tokens itself."""
        kind, tree, left = token["type"], self.tree, token
        while left is not None:
            node = tree.openElements[-1] if tree.openElements else None
            if node is None or node.namespace is None or self._as_html(node, kind, token):
                phase = self.phase
            else:
                phase = self.phases["inForeignContent"]
            if kind == START:
                left = phase.processStartTag(left)
            elif kind == END:
                left = phase.processEndTag(left)
            elif kind == SPACE:
                left = phase.processSpaceCharacters(left)
            else:
                left = phase.processCharacters(left)

    def _as_html(self, node: Bare, kind: int, token: dict[str, Any]) -> bool:
        """Whether a token inside of a foreign element is read as HTML is: integration points."""
        text = kind in (TEXT, SPACE)
        if self.isMathMLTextIntegrationPoint(node) and (
            text or (kind == START and token["name"] not in ("mglyph", "malignmark"))
        ):
            return True
        if node.name == "annotation-xml" and kind == START and token["name"] == "svg":
            return node.namespace == namespaces["mathml"]
        return (text or kind == START) and self.isHTMLIntegrationPoint(node)


class OpenElements:
    """A document up to some place in it. `tail` is what was fed last and may yet become anything: part of a tag, a
    comment, a character reference's `<`."""

    def __init__(self) -> None:
        self.parser = Phases()
        self.tail = ""
        self.starts: set[str] = set()  # start tags that stand in the source, of html and body
        self.shown = False  # whether the body has anything that is seen
        self.last = ""  # the end tag behind which nothing more has come, as scoring.validity has it
        self.raw = ""  # the element whose text is being read as such
        self.escaped = 0  # in a script: 1 after "<!--", 2 after a "<script" behind it
        self.broken = ""  # why nothing can make a whole document of it any more

    def feed(self, text: str) -> None:
        """More of the document."""
        text, self.tail, place = self.tail + text, "", 0
        try:
            while place < len(text) and not self.broken:
                after = self._raw_text(text, place) if self.raw else self._piece(text, place)
                if after is None:
                    break
                place = after
        except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            self.broken = f"html5lib cannot read it: {error!r}"  # see scoring.validity
        self.tail = text[place:]

    @property
    def stack(self) -> list[Bare]:
        return self.parser.tree.openElements

    @property
    def complete(self) -> bool:
        """Whether it is a whole document as it stands."""
        ended = self.last == "html" and self.parser.phase is self.parser.phases["afterAfterBody"]
        return ended and self.starts >= {"html", "body"} and not (self.tail or self.raw or self.broken)

    @property
    def body_ended(self) -> bool:
        """Whether the body's end tag has come, and nothing after it that opens it again."""
        return self.parser.phase in (self.parser.phases["afterBody"], self.parser.phases["afterAfterBody"])

    def formatting(self) -> list[Bare]:
        """Formatting elements that text would open again."""
        opened = self.stack
        return [node for node in self.parser.tree.activeFormattingElements if node is not None and node not in opened]

    # Reading

    def _piece(self, text: str, place: int) -> int | None:
        """Reads text, a tag, a comment or the like at `place`; where it ends, or None if that is not there yet."""
        if text[place] != "<":
            end = text.find("<", place)
            if end < 0:  # a character reference may go on
                end = max(place, _PART_OF_REFERENCE.search(text).start())
            if end > place:
                self._text(text[place:end])
            return end if end > place else None
        tag = _TAG_NAME.match(text, place)
        if tag:
            return self._tag(text, tag)
        following = text[place + 1 : place + 2]
        if following == "":
            return None
        if following not in "!?/":
            self._text("<")
            return place + 1
        if following == "/" and len(text) < place + 3:
            return None
        if text.startswith("</>", place):
            return place + 3
        if text.startswith("<!--", place):
            end = _COMMENT_END.search(text, place + 2 if text.startswith(("<!-->", "<!--->"), place) else place + 4)
            return end and end.end()
        if text.startswith("<![CDATA[", place) and self.stack and self.stack[-1].namespace is not None:
            end = text.find("]]>", place)
            return None if end < 0 else end + 3
        if "<![CDATA[".startswith(text[place:]) or "<!--".startswith(text[place:]):
            return None
        end = text.find(">", place)
        if end >= 0 and text[place : place + len("<!doctype")].lower() == "<!doctype":
            self.last = ""
        return None if end < 0 else end + 1

    def _text(self, text: str) -> None:
        if "&#" in text or ("&" in text and not self.shown):
            text = html.unescape(text)
        space = _LEADING_SPACE.match(text).end()
        if space:
            self.parser.take({"type": SPACE, "data": text[:space]})
        if space < len(text):
            self.parser.take({"type": TEXT, "data": text[space:]})
            self.last = ""
            if not self.shown and text.strip():
                self._see(None)

    def _see(self, name: str | None) -> None:
        """Text, or an element that is seen without any, has come: is it where a reader sees it?"""
        names = [node.name for node in self.stack]
        if "body" in names and not UNSEEN & set(names):
            self.shown = name is None or name in SEEN_WITHOUT_TEXT

    def _attributes(self, text: str, place: int) -> tuple[dict[str, str], bool, int] | None:
        """(attributes, whether a solidus stands before the end, where the tag ends); None if it does not end."""
        found: dict[str, str] = {}
        if text.startswith(">", place):  # most tags
            return found, False, place + 1
        while True:
            gap = _GAP.match(text, place)
            if gap.end() == len(text):
                return None
            if text[gap.end()] == ">":
                return found, text[gap.end() - 1] == "/" and gap.end() > place, gap.end() + 1
            name = _ATTRIBUTE.match(text, gap.end())
            place, value = name.end(), ""
            if place == len(text):
                return None
            if name[2]:
                given = _VALUE.match(text, place)
                if given is None:
                    return None
                place, value = given.end(), given[given.lastindex] if given.lastindex else ""
            found.setdefault(name[1].lower(), value)
            if len(found) > MAX_ATTRIBUTES:
                raise ValueError(f"a tag of over {MAX_ATTRIBUTES} attributes")

    def _tag(self, text: str, tag: re.Match[str]) -> int | None:
        read = self._attributes(text, tag.end())
        if read is None:
            return None
        attributes, empty, end = read
        name = tag[2].lower()
        if tag[1]:
            self._end_tag(name)
        else:
            self._start_tag(name, attributes, empty)
        return end

    def _start_tag(self, name: str, attributes: dict[str, str], empty: bool) -> None:
        token = {"type": START, "name": name, "data": attributes, "selfClosing": empty}
        self.parser.take(token | {"selfClosingAcknowledged": False})
        self.starts |= {name} & {"html", "body"}
        self.last = ""
        if len(self.stack) > MAX_DEPTH - SPARE_DEPTH:
            self.broken = f"nested deeper than {MAX_DEPTH - SPARE_DEPTH}"
        if not self.shown and (name in SEEN_WITHOUT_TEXT) and attributes.get("type", "").lower() != "hidden":
            self._see(name)
        if state := self.parser.tokenizer.state:
            self.raw, self.escaped, self.parser.tokenizer.state = name, 0, None
            if state == "plaintext":
                self.broken = "plaintext cannot be closed"
        elif "rameset" in type(self.parser.phase).__name__:
            self.broken = "a frameset has no body"

    def _end_tag(self, name: str) -> None:
        self.parser.take({"type": END, "name": name, "data": {}, "selfClosing": False})
        if self.parser.left_open:
            self.broken = "the body ended before what was open in it"
        self.last = name

    def _raw_text(self, text: str, place: int) -> int | None:
        """Reads on in a script, style sheet, title or the like: to its end tag, or as far as it is clear."""
        if self.raw == "script":
            return self._script(text, place)
        found = _end_of(self.raw).search(text, place)
        if found:
            return self._raw_end(text, place, found)
        start = text.rfind("<", place)
        if start < 0 or not f"</{self.raw}".startswith(text[start:].lower()):
            start = len(text)
        return self._raw_data(text, place, start)

    def _script(self, text: str, place: int) -> int | None:
        found = _SCRIPT_PART.search(text, place)
        if found is None:
            part = _PART_OF_SCRIPT_PART.search(text, place)
            return self._raw_data(text, place, part.start() if part else len(text))
        if found[0] == "<!--":
            self.escaped = max(self.escaped, 1)
            return found.end() - 2  # its dashes may be those of "-->" as well
        if found[0] == "-->":
            self.escaped = 0
        elif not found[1]:
            self.escaped = 2 if self.escaped else 0
        elif self.escaped == 2:
            self.escaped = 1
        else:
            return self._raw_end(text, place, found)
        return found.end()

    def _raw_data(self, text: str, place: int, end: int) -> int | None:
        if end == place:
            return None
        if self.raw not in UNSEEN:
            self._text(text[place:end])
        return end

    def _raw_end(self, text: str, place: int, found: re.Match[str]) -> int | None:
        if found.start() > place:
            return self._raw_data(text, place, found.start())
        read = self._attributes(text, found.end())
        if read is None:
            return None
        name, self.raw = self.raw, ""
        self._end_tag(name)
        return read[-1]

    # Closing

    def snapshot(self) -> tuple[Any, ...]:
        """All that feeding changes, to come back to."""
        parser, tree = self.parser, self.parser.tree
        table_text = parser.phases["inTableText"]
        own = (self.tail, set(self.starts), self.shown, self.last, self.raw, self.escaped, self.broken)
        lists = (list(tree.openElements), list(tree.activeFormattingElements), list(table_text.characterTokens))
        phases = (parser.phase, getattr(parser, "originalPhase", None), table_text.originalPhase, parser.framesetOK)
        return own, lists, phases, (tree.headPointer, tree.formPointer, tree.insertFromTable, parser.left_open)

    def restore(self, kept: tuple[Any, ...]) -> None:
        own, lists, phases, pointers = kept
        parser, tree = self.parser, self.parser.tree
        table_text = parser.phases["inTableText"]
        self.tail, starts, self.shown, self.last, self.raw, self.escaped, self.broken = own
        self.starts = set(starts)
        tree.openElements[:], tree.activeFormattingElements[:] = lists[0], lists[1]
        table_text.characterTokens = list(lists[2])
        parser.phase, parser.originalPhase, table_text.originalPhase, parser.framesetOK = phases
        tree.headPointer, tree.formPointer, tree.insertFromTable, parser.left_open = pointers
        parser.tokenizer.state = None

    def closing(self, optional: bool = False) -> str:
        """The text that makes a whole document of this one; with `optional` also the end tags that HTML lets one leave
        out. Raises `Unclosable` where there is none."""
        kept = self.snapshot()
        try:
            return self._closing(optional)
        finally:
            self.restore(kept)

    def _closing(self, optional: bool) -> str:
        written: list[str] = []
        # By node: those whose end tag must be written though HTML lets one leave it out, and those that do not hear it.
        explicit, deaf = set(self.stack if optional else ()), set()
        begun = self._rest_of_tail(self._next(explicit, deaf)[0])
        while not self.complete:
            if len(written) > 3 * MAX_DEPTH:
                raise Unclosable("it opens as much as is closed")
            rest, node = (begun, None) if begun is not None else self._next(explicit, deaf)
            begun = None
            inner = node is not None and node is not self.stack[-1] and self.snapshot()
            depth = len(self.stack)
            self.feed(rest)
            if self.broken:
                raise Unclosable(self.broken)
            if node is not None and len(self.stack) >= depth:
                # A special element in between, which must be closed first; or it is not closed by its end tag at all.
                last = self.stack[-1]
                if inner:
                    self.restore(inner)
                deaf_one = node if not inner or last in explicit or last in deaf else None
                (explicit if deaf_one is None else deaf).add(last if deaf_one is None else deaf_one)
                if inner:
                    continue
            written.append(rest)
        return "".join(written)

    def _next(self, explicit: set[Bare], deaf: set[Bare]) -> tuple[str, Bare | None]:
        """What to write next where no tag is begun, and the element that it closes."""
        if self.raw:
            return f"</{self.raw}>", None
        stack = self.stack
        if "html" not in self.starts and len(stack) < 2:
            return "<html>", None
        in_body = len(stack) > 1 and stack[1].name == "body"
        if len(stack) == 2 and stack[1].name == "head":
            return "</head>", None
        for node in () if self.body_ended else reversed(stack[2 if in_body else 1 :]):
            left_out = node.namespace is None and node.name in OPTIONAL and node not in explicit
            if not left_out and node not in deaf:
                return f"</{node.name}>", node
        if missing := [name for name in ("html", "body") if name not in self.starts]:
            return f"<{missing[0]}>", None
        if self.body_ended:
            return "</html>", None
        return ("</body>" if self.shown else MARK), None

    def _rest_of_tail(self, following: str) -> str | None:
        """What ends the tag, comment or the like that is begun; None where there is nothing begun. Of an end tag that
        would be written next, `following`, it is the rest."""
        tail = self.tail
        if not tail:
            return None
        if following.startswith(tail.lower()) and tail != "<" * (following[1:2] != "/"):
            return following[len(tail) :]
        if self.raw:
            return self._rest_of_tag(tail) if _TAG_NAME.match(tail) and len(tail) > len(self.raw) + 2 else following
        if tail.startswith("<!--"):
            known = "-->" if len(tail) < 5 else "--!>" if tail.endswith("--!") else "-->"
            return next(known[size:] for size in range(len(known) - 1, -1, -1) if tail.endswith(known[:size]))
        if tail.startswith("<![CDATA[") and self.stack and self.stack[-1].namespace is not None:
            return next("]]>"[size:] for size in (2, 1, 0) if tail.endswith("]]>"[:size]))
        if len(tail) > 2 and DOCTYPE.startswith(tail.lower()):
            rest = DOCTYPE[len(tail) :]
            return rest[: -len(" html>")].upper() + " html>" if tail[2:3].isupper() and len(rest) > 6 else rest
        return self._rest_of_tag(tail) if _TAG_NAME.match(tail) else ">" if tail != "<" else following

    def _rest_of_tag(self, tail: str) -> str:
        """Ends a tag that is begun: within quotes by the quote that is open, and in SVG and MathML the element, too."""
        tag = _TAG_NAME.match(tail)
        empty = not tag[1] and ((self.stack and self.stack[-1].namespace) or tag[2].lower() in ("svg", "math"))
        for rest in ("/>", '"/>', "'/>", ">", '">', "'>")[0 if empty else 3 :]:
            read = self._attributes(tail + rest, tag.end())
            if read is not None and read[-1] == len(tail + rest) and read[1] >= rest.endswith("/>"):
                return rest
        raise Unclosable("a tag that does not end")
