"""A page that needs no other file any more: its style sheets and scripts in it, its pictures empty, but of their size.

    files = LocalFiles(root)
    html = inline_files(html, root, files, scripts=False)
    files.notes                                     # Counter({"style sheets remote": 2})

No file outside `root` is read, wherever `..` and links lead.
"""

from __future__ import annotations

import base64
import html as entities
import io
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

from making.style_sheets import SizeOf, grey_declarations, grey_sheet, in_style_element
from use_model_from_hub import turned_size, upright

MAX_FILE_BYTES = 20 * 2**20
MAX_CSS_CHARACTERS = 5_000_000  # of all style sheets of a page
MAX_IMPORTS = 8  # style sheets in style sheets; a browser has no such limit, a circle of them no end
_ATTRIBUTE = re.compile(r"""([^\s"'>/=]+)(?:\s*=\s*("[^"]*"|'[^']*'|[^\s"'>]+))?""")
_IN_TAG = r"""((?:=\s*"[^"]*"|=\s*'[^']*'|=(?!\s*["'])|[^>=])*)>"""  # no two ways to read a thing: linear time
_MARKUP = re.compile(  # comments and elements of text first: a tag in them is none
    rf"<!--.*?(?:-->|\Z)|<(script|style|textarea|title|xmp|iframe)\b{_IN_TAG}(.*?)(?:</\1\s*>|\Z)|<(/?[a-z][^\s/>]*){_IN_TAG}",
    re.I | re.S,
)
_IMPORT = re.compile(r"""@import\s+(?:url\(\s*)?("[^"]*"|'[^']*'|[^\s"');]+)\s*\)?\s*([^;]*)(?:;|\Z)""", re.I)


class LocalFiles:
    """What a page asks for: files under `root` are read, anything else is counted in `notes` and left out."""

    def __init__(self, root: Path | None) -> None:
        self.root, self.notes = root, Counter()
        self.css_left = MAX_CSS_CHARACTERS

    def find(self, reference: str, folder: Path | None, kind: str) -> Path | None:
        """The file behind a reference from a file in `folder`; None, and a note, when there is none to be had."""
        reference = entities.unescape(reference).strip()
        problem = ""
        if re.match(r"[a-z][a-z0-9+.-]*:|//|\\\\", reference, re.I):
            problem = "remote"
        elif self.root is None or folder is None or reference.startswith(("/", "\\")):
            problem = "outside the source"
        else:
            try:
                file = (folder / (unquote(re.split("[?#]", reference)[0]) or ".").replace("\0", "")).resolve()
                if not file.is_relative_to(self.root):
                    problem = "outside the source"
                elif not file.is_file() or file.stat().st_size > MAX_FILE_BYTES or not os.access(file, os.R_OK):
                    problem = "missing"
                else:
                    return file
            except (OSError, RuntimeError):  # too long a name, links in a circle
                problem = "missing"
        self.notes[f"{kind} {problem}"] += 1
        return None

    def css(self, text: str, folder: Path | None, above: tuple[Path, ...] = ()) -> str:
        """A style sheet with its local imports in place, and its pictures grey."""
        imported, place = [], 0
        while lead := re.compile(r"(?:\s|/\*.*?\*/|<!--|-->|@charset[^;]*;)*(?=@import)", re.I | re.S).match(
            text, place
        ):
            if not (match := _IMPORT.match(text, lead.end())):
                break
            imported.append(self._imported(match[1].strip("\"'"), match[2].strip(), folder, above))
            place = match.end()
        text = re.sub(r"^(?:\s|<!--)*@charset[^;]*;", "", text[place:], flags=re.I)
        return "".join(imported) + grey_sheet(text, lambda url: self.size_of(url, folder))

    def _imported(self, reference: str, conditions: str, folder: Path | None, above: tuple[Path, ...]) -> str:
        file = self.find(reference, folder, "style sheets")
        if file is None or file in above or len(above) > MAX_IMPORTS:
            return ""
        css = self.css(self.read(file), file.parent, (*above, file))
        layer = re.match(r"layer(?:\(([^)]*)\))?", conditions, re.I)
        conditions = conditions[layer.end() :].strip() if layer else conditions
        supports = re.match(r"supports\(((?:[^()]|\([^()]*\))*)\)", conditions, re.I)
        conditions = conditions[supports.end() :].strip() if supports else conditions
        css = f"@layer {layer[1] or ''}{{{css}}}\n" if layer else css
        css = f"@supports ({supports[1]}){{{css}}}\n" if supports else css
        return f"@media {conditions}{{{css}}}\n" if conditions else css + "\n"

    def read(self, file: Path) -> str:
        """Its text; nothing when the page's style sheets are too large together."""
        text = file.read_bytes().decode("utf-8-sig", "replace")
        self.css_left -= len(text)
        if self.css_left < 0:
            self.notes["style sheets too large"] += 1
            return ""
        return text

    def size_of(self, url: str, folder: Path | None) -> tuple[float, float] | None:
        """(width, height) in px of the picture behind a url() of a file in `folder`; None where it is not to be had."""
        if url.lower().startswith("data:"):
            return picture_size(_data(url))
        file = self.find(url, folder, "pictures")
        return picture_size(file.read_bytes()) if file else None


def inline_files(html: str, folder: Path | None, files: LocalFiles, scripts: bool) -> str:
    """The page with what its local files hold: style sheets (scripts, too, where they run), the sizes of pictures.

    Without scripts, what <noscript> holds is what a visitor without them sees, so its tags go and its content stays.
    """
    late: list[str] = []

    def replaced(markup: re.Match[str]) -> str:
        raw, raw_attributes, content, name, attributes = markup.groups()
        tag = (raw or name or "").lower()
        values = {
            key.lower(): value.strip("\"'") for key, value in _ATTRIBUTE.findall(raw_attributes or attributes or "")
        }
        if not tag:
            return ""  # a comment
        if tag == "style":
            return f"<style{raw_attributes}>{in_style_element(files.css(content, folder))}</style>"
        if tag == "script" and "src" in values and scripts:
            return _local_script(values, folder, files, late)
        if tag == "link" and "stylesheet" in values.get("rel", "").lower().split():
            return _linked_style(values, folder, files)
        if tag in ("noscript", "/noscript") and not scripts:
            return ""
        if tag in ("base", "meta") and (
            tag == "base" or ("http-equiv" in values and "charset" not in values.get("content", ""))
        ):
            return ""  # a policy or a redirect of the page's own would stand in our way
        text = markup[0]
        if tag in ("img", "input", "video", "embed") and (source := values.get("src") or values.get("poster")):
            text = _sized_picture(text, source, folder, files)
        return _grey_style(text, lambda url: files.size_of(url, folder)) if "url(" in text and not raw else text

    html = _MARKUP.sub(replaced, html)
    return html + "".join(late)


def _local_script(values: Mapping[str, str], folder: Path | None, files: LocalFiles, late: list[str]) -> str:
    file = files.find(values["src"], folder, "scripts")
    if file is None:
        return ""
    kind = ' type="module"' if values.get("type", "").lower() == "module" else ""
    code = re.sub(r"<(?=/script|!--)", r"\\x3c", files.read(file), flags=re.I)
    script = f"<script{kind}>{code}\n</script>"
    if "defer" in values and not kind:  # an inline script would not wait
        late.append(script)
        return ""
    return script


def _linked_style(values: Mapping[str, str], folder: Path | None, files: LocalFiles) -> str:
    if "alternate" in values.get("rel", "").lower().split() or "disabled" in values or "href" not in values:
        return ""
    if not values["href"].lower().startswith("data:"):
        file = files.find(values["href"], folder, "style sheets")
        if file is None:
            return ""
        return _style(values, files.css(files.read(file), file.parent, (file,)))
    return _style(values, files.css(_data(values["href"]).decode("utf-8", "replace"), None))


def _style(values: Mapping[str, str], css: str) -> str:
    media = f' media="{entities.escape(values["media"])}"' if values.get("media") else ""
    return f"<style{media}>{in_style_element(css)}</style>"


def _sized_picture(tag: str, source: str, folder: Path | None, files: LocalFiles) -> str:
    """A local picture becomes an empty one of its size: the layout needs no more of it."""
    if source.strip().lower().startswith("data:") or not (file := files.find(source, folder, "pictures")):
        return tag
    size = picture_size(file.read_bytes())
    grey = "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' width='{:g}' height='{:g}'/>"
    tag = re.sub(r"""\ssrcset\s*=\s*("[^"]*"|'[^']*'|[^\s"'>]+)""", "", tag, flags=re.I)
    return tag.replace(source, grey.format(*size).replace('"', "'"), 1) if size and "'" + source not in tag else tag


def _grey_style(tag: str, size_of: SizeOf) -> str:
    def replaced(match: re.Match[str]) -> str:
        css = entities.unescape(match[1].strip("\"'"))
        return f' style="{entities.escape(grey_declarations(css, size_of))}"'

    return re.sub(r"""\sstyle\s*=\s*("[^"]*"|'[^']*')""", replaced, tag, flags=re.I)


def _data(url: str) -> bytes:
    """What a data: URL holds; nothing when it is broken."""
    head, _, content = url.partition(",")
    raw = unquote_to_bytes(content)
    try:
        return base64.b64decode(raw + b"==") if head.lower().rstrip().endswith("base64") else raw
    except ValueError:
        return b""


def picture_size(data: bytes) -> tuple[float, float] | None:
    """(width, height) in px by the file's head; None where it names none."""
    from PIL import Image

    if b"<svg" in (head := data[:4000]):
        tag = head[head.index(b"<svg") :].split(b">")[0].decode("utf-8", "replace")
        sides = [re.search(rf"""\s{side}\s*=\s*["']\s*([\d.]+)(?:px)?\s*["']""", tag) for side in ("width", "height")]
        try:
            return (float(sides[0][1]), float(sides[1][1])) if all(sides) else None
        except ValueError:
            return None
    try:
        with Image.open(io.BytesIO(data)) as picture:
            # As Chromium 156 shows it, which turns no WebP.
            turn = upright(picture) if picture.format in ("JPEG", "PNG") else None
            return turned_size(picture.size, turn)
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError):
        return None
