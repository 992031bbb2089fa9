"""A page that needs no other file any more: its style sheets and scripts in it, its pictures empty, but of their size.

    files = LocalFiles(root, renderer)
    html = inline_files(Page(html), folder, files, scripts=False)
    files.notes                                     # Counter({"style sheets remote": 2})

A browser's parser reads the page (references.js) and says what it wants. No file outside `root` is read, wherever `..`
and links lead; an address that begins with a slash begins there, as on a server.
"""

from __future__ import annotations

import base64
import hashlib
import html as entities
import io
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, unquote_to_bytes, urljoin, urlsplit
from xml.etree import ElementTree

from making.browser_steps import step
from making.decoding import decode_sheet
from making.drops import PageDropped
from making.style_sheets import grey_declarations, grey_sheet, imports_of, in_style_element, parse_css, write_css
from scoring.renders import PLACE, Job, Renderer
from use_model_from_hub import upright

if TYPE_CHECKING:
    from PIL import Image

MAX_FILE_BYTES = 20 * 2**20
MAX_CSS_CHARACTERS = 5_000_000  # of all style sheets of a page
MAX_IMPORTS = 8  # style sheets in style sheets; a browser has no such limit, a circle of them no end
TURNED = ("JPEG", "MPO", "PNG", "AVIF")  # formats in which Chromium 156 follows EXIF's orientation; not in WebP
IMPORT = re.compile(r"@(?:import|[impor]{0,5}\\)", re.I)  # it may be written with escapes
SIZING = ("width", "height", "viewBox", "preserveAspectRatio")  # an SVG's attributes
EARLY = "early "  # what stands above the <base>, and counts from the page
DOCUMENTS = (".html", ".htm", ".xhtml", ".xht", ".svg", ".xml", ".txt", ".pdf")  # that an <object> shows, as pictures
UNITS = {"": 1, "px": 1, "in": 96, "cm": 96 / 2.54, "mm": 9.6 / 2.54, "q": 2.4 / 2.54, "pt": 4 / 3, "pc": 16, "em": 16}
NOTED = {"sheet": "style sheets", "script": "scripts"}  # anything else that is wanted is a picture


@dataclass(frozen=True)
class Page:
    """A page's text. `encoding` is the one it was in, which its style sheets are in, too, if they declare none."""

    html: str
    encoding: str = "utf-8"
    xml: bool = False


def joined_address(reference: str, base: str) -> str:
    """The absolute address, as the URL standard makes it of what stands in an attribute; "" where it makes none."""
    reference = re.sub(r"[\t\n\r]", "", reference.strip("".join(map(chr, range(33)))))
    path, rest = re.match(r"([^?#]*)(.*)", reference, re.S).groups()
    if not re.match(r"(?!https?:)[a-z][a-z0-9+.-]*:", path, re.I):
        path = path.replace("\\", "/")
    try:
        return urljoin(base, path + rest)
    except ValueError:  # brackets that hold no address of a machine
        return ""


class LocalFiles:
    """What a page asks for: files under `root` are read, anything else is counted in `notes` and left out."""

    def __init__(self, root: Path | None, renderer: Renderer | None = None) -> None:
        self.root, self.renderer, self.notes = root, renderer, Counter()
        self.css_left = MAX_CSS_CHARACTERS

    def base_of(self, folder: Path | None) -> str:
        """The address of a folder under the root, with a slash at its end; "" where it is none."""
        if self.root is None or folder is None or not folder.is_relative_to(self.root):
            return ""
        inner = folder.relative_to(self.root).as_posix()
        return PLACE if inner == "." else f"{PLACE}{quote(inner)}/"

    def _served(self, address: str) -> str:
        """The address, or that of a file under the root which it names by its whole path, file:///..."""
        if self.root is None or not address.lower().startswith("file:///"):
            return address
        path = Path(unquote(urlsplit(address).path).replace("\0", ""))
        return PLACE + quote(path.relative_to(self.root).as_posix()) if path.is_relative_to(self.root) else address

    def find(self, reference: str, base: str, kind: str) -> Path | None:
        """The file behind a reference from the address `base`; None, and a note, when there is none to be had."""
        address = self._served(joined_address(reference, base or PLACE))
        problem = "remote"
        if address.startswith(PLACE):
            problem = "outside the source"
            try:
                path = unquote(urlsplit(address).path).replace("\0", "").lstrip("/")
                file = (self.root / path).resolve() if self.root and base else None
                if file is not None and file.is_relative_to(self.root):
                    problem = "missing"
                    if (
                        not path.endswith("/")
                        and file.is_file()
                        and file.stat().st_size <= MAX_FILE_BYTES
                        and os.access(file, os.R_OK)
                    ):
                        return file
            except (OSError, RuntimeError, ValueError):  # too long a name, links in a circle
                problem = "missing"
        self.notes[f"{kind} {problem}"] += 1
        return None

    def css(self, text: str, base: str, encoding: str = "utf-8", above: tuple[Path, ...] = ()) -> str:
        """A style sheet with its local imports in place, and its pictures grey."""
        kept, rules = [], None
        if IMPORT.search(text):
            head, rules = imports_of(text)
            for found in head:
                kept.append(found if isinstance(found, str) else self._imported(*found, base, encoding, above))
        elif above:  # what is left open must not reach beyond it
            rules = parse_css(text)
        text = text if rules is None else write_css(rules)
        return "".join(kept) + grey_sheet(text, lambda url: self.size_of(url, base))

    def _imported(
        self, reference: str, conditions: list[str], base: str, encoding: str, above: tuple[Path, ...]
    ) -> str:
        """The sheet behind an @import, in a block for each of its conditions (`@layer a`), innermost first."""
        if reference.lower().startswith("data:"):
            css = self.css(_data(reference).decode("utf-8", "replace"), "", encoding, (*above, Path()))
        else:
            file = self.find(reference, base, "style sheets")
            if file is None or file in above or len(above) > MAX_IMPORTS:
                return ""
            text, encoding = self.read(file, encoding)
            css = self.css(text, self.base_of(file.parent), encoding, (*above, file))
        for condition in conditions:
            css = f"{condition}{{{css}}}"
        return css + "\n"

    def read(self, file: Path, encoding: str) -> tuple[str, str]:
        """(its text, its encoding); no text when the page's style sheets are too large together."""
        text, encoding = decode_sheet(file.read_bytes(), encoding, self.renderer)
        self.css_left -= len(text)
        if self.css_left < 0:
            self.notes["style sheets too large"] += 1
            return "", encoding
        return text, encoding

    def size_of(self, url: str, base: str) -> tuple[float, float] | None:
        """(width, height) in px of the picture behind a url() of `base`; None where there is none to be had."""
        if (data := self.picture(url, base)) is None or (sides := picture_sides(data)) is None:
            return None
        return px_of(sides)

    def picture(self, url: str, base: str) -> bytes | None:
        """What is behind an address of a picture; None where that is not to be had."""
        if url.lower().startswith("data:"):
            return _data(url)
        file = self.find(url, base, "pictures")
        return file.read_bytes() if file else None


def inline_files(page: Page, folder: Path | None, files: LocalFiles, scripts: bool, width: int = 1280) -> str:
    """The page with what its local files hold: style sheets (scripts, too, where they run), the sizes of pictures.

    Without scripts, what <noscript> holds is what a visitor without them sees, so its tags go and its content stays.
    Of a picture in several sizes the one for a viewport of `width` px stays.
    Raises PageDropped for what is no page with a body of its own.
    """
    token = f"file-{hashlib.sha256(page.html.encode('utf-8', 'replace')).hexdigest()[:16]}-"
    options = {"html": page.html, "xml": page.xml, "token": token, "scripts": scripts}
    render = files.renderer.render(Job("", width, steps=(step("references", **options),), pictures=False))
    if render.failure:
        raise PageDropped("render", render.failure)
    read = render.values[0]
    if "broken" in read:
        raise PageDropped("unreadable", " ".join(read["broken"].split())[:220])
    if read["frames"]:
        raise PageDropped("frames", "a frameset, whose frames are pages of their own")
    if read["shadow"]:
        raise PageDropped("shadow", "a part of it is in a shadow root")
    own = files.base_of(folder)
    base = joined_address(read["base"], own or PLACE) if read["base"] and own else own
    found = [
        _wanted(kind.removeprefix(EARLY), values, own if kind.startswith(EARLY) else base, page, files)
        for kind, *values in read["wants"]
    ]
    return re.sub(rf"{token}(\d+);", lambda mark: found[int(mark[1])], read["html"])


def _wanted(kind: str, values: list[str], base: str, page: Page, files: LocalFiles) -> str:
    """What comes into the page at the place of something that references.js wants, as it is written there."""
    if kind in ("style", "vector style"):
        css = files.css(values[0], base, page.encoding)
        return in_style_element(css) if kind == "style" else entities.escape(css, quote=False)
    if kind == "declarations":
        return entities.escape(grey_declarations(values[0], lambda url: files.size_of(url, base)))
    if kind in ("sheet", "script"):
        address, encoding = values[0], values[1] or page.encoding
        if address.strip().lower().startswith("data:"):
            text, base = _data(address.strip()).decode("utf-8", "replace"), ""
        else:
            file = files.find(address, base, NOTED[kind])
            (text, encoding), base = (
                (files.read(file, encoding), files.base_of(file.parent)) if file else (("", ""), "")
            )
        if kind == "script":
            return re.sub(r"<(?=/script|!--)", r"\\x3c", text, flags=re.I)
        return in_style_element(files.css(text, base, encoding, (file,) if base else ()))
    if kind == "object" and not values[0].lower().startswith("data:"):
        file, address = files.find(values[0], base, "pictures"), joined_address(values[0], base or PLACE)
        if file is None and not address.startswith((PLACE, "file:")):
            return entities.escape(values[0])  # from elsewhere: who knows
        if file is None or (file.suffix.lower() not in DOCUMENTS and picture_sides(file.read_bytes()) is None):
            return ""
        return entities.escape(values[0])
    data = files.picture(values[0], base)
    sides = picture_sides(data) if data is not None else None
    if kind in ("width", "height"):
        return f"{dict(zip(('width', 'height'), size))[kind]:.0f}" if sides and (size := px_of(sides)) else ""
    return entities.escape(grey_picture(sides) if sides is not None else values[0])


def _data(url: str) -> bytes:
    """What a data: URL holds; nothing when it is broken."""
    head, _, content = url.partition(",")
    raw = unquote_to_bytes(content)
    try:
        return base64.b64decode(raw + b"==") if head.lower().rstrip().endswith("base64") else raw
    except ValueError:
        return b""


def grey_picture(sides: dict[str, str]) -> str:
    """The address of an empty picture with these attributes, without a space: it may stand in a srcset."""
    attributes = "".join(f" {name}='{entities.escape(value)}'" for name, value in sides.items())
    return "data:image/svg+xml," + quote(f"<svg xmlns='http://www.w3.org/2000/svg'{attributes}/>", safe="/:='<>")


def picture_sides(data: bytes) -> dict[str, str] | None:
    """What decides its size as attributes of an SVG picture: width and height in px by the file's head, an SVG's own
    as they are, and its viewBox; None where it is no picture."""
    from PIL import Image

    if re.match(rb"(?:\xef\xbb\xbf)?\s*<|\xff\xfe<\0|\xfe\xff\0<", data[:100]):
        parser, root = ElementTree.XMLPullParser(["start"]), None
        try:
            for start in range(0, len(data), 20_000):
                parser.feed(data[start : start + 20_000])
                if (root := next((element for _, element in parser.read_events()), None)) is not None:
                    break
        except (ElementTree.ParseError, ValueError, LookupError):
            return None
        if root is None or root.tag.rpartition("}")[2] != "svg":
            return None
        return {name: root.attrib[name] for name in SIZING if name in root.attrib}
    try:
        with Image.open(io.BytesIO(data)) as picture:
            turn = upright(picture) if picture.format in TURNED else None
            width, height = turned_size(_dense_size(picture) or picture.size, turn)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, EOFError, Image.DecompressionBombError):
        return None
    return {"width": str(width), "height": str(height)}


def turned_size(size: tuple[int, int], turn: Image.Transpose | None) -> tuple[int, int]:
    """(width, height) after `turn`, as `upright` gives it."""
    sideways = turn is not None and turn.name in ("ROTATE_90", "ROTATE_270", "TRANSPOSE", "TRANSVERSE")
    return size[::-1] if sideways else size


def px_of(sides: Mapping[str, str]) -> tuple[float, float] | None:
    """(width, height) in px by what picture_sides gives, one side by the viewBox where it lacks; None where unknown."""
    found: dict[str, float] = {}
    for name in ("width", "height"):
        number = re.fullmatch(r"\s*([\d.]+)\s*(px|in|cm|mm|q|pt|pc|em|)\s*", sides.get(name, "").lower())
        if number and number[1].count(".") < 2 and number[1] != ".":
            found[name] = float(number[1]) * UNITS[number[2]]
    box = re.findall(r"-?[\d.]+", sides.get("viewBox", ""))
    if len(found) == 1 and len(box) == 4 and "." not in box and float(box[2]) and float(box[3]):
        ratio = float(box[2]) / float(box[3])
        (name, value), *_ = found.items()
        return (value, value / ratio) if name == "width" else (value * ratio, value)
    return (found["width"], found["height"]) if len(found) == 2 else None


def _dense_size(picture: Image.Image) -> tuple[int, int] | None:
    """(width, height) in px that a JPEG's EXIF gives together with a resolution that agrees, at 72 dots per inch: this
    is what Chromium draws; None where it says nothing."""
    if picture.format not in ("JPEG", "MPO") or not (exif := picture.getexif()) or exif.get(0x0128) != 2:
        return None
    inner, size = exif.get_ifd(0x8769), []
    for side, resolution, written in ((picture.width, 0x011A, 0xA002), (picture.height, 0x011B, 0xA003)):
        dots, px = float(exif.get(resolution) or 0), inner.get(written)
        if dots <= 0 or not isinstance(px, int) or round(side * 72 / dots) != px:
            return None
        size.append(px)
    return size[0], size[1]
