"""Local files: what a page asks for comes into it, and nothing from outside its folder."""

import html as entities
import io
import re
import time

import pytest
from PIL import Image

from making.local_files import LocalFiles, Page, inline_files, joined_address, picture_sides
from scoring.renders import PLACE


@pytest.fixture
def inlined(renderer):
    """A function: (what comes of the HTML, head and body without their tags, notes) with the files of a folder."""

    def inlined(folder, html: str, scripts: bool = False) -> tuple[str, dict]:
        files = LocalFiles(folder.resolve(), renderer)
        html = inline_files(Page(html), folder.resolve(), files, scripts)
        return re.sub("</?(html|head|body)>", "", html), dict(files.notes)

    return inlined


def test_style_sheets_are_inlined_in_their_order_with_media_and_imports(tmp_path, inlined):
    (tmp_path / "css").mkdir()
    (tmp_path / "css" / "a.css").write_text('@charset "utf-8";\n@import "b.css" (min-width:5px);\na{color:red}')
    (tmp_path / "css" / "b.css").write_text("@import url(../c.css);\nb{color:blue}")
    (tmp_path / "c.css").write_text("@import 'css/a.css';\ni{color:green}")  # a circle
    html, notes = inlined(
        tmp_path,
        '<link rel=stylesheet href="css/a.css?v=1" media=screen><style>p{x:y}</style>'
        '<link rel="stylesheet" href=c.css>',
    )
    assert html == (
        '<style media="screen">@media (min-width:5px){i{color:green}\nb{color:blue}}\na{color:red}</style>'
        "<style>p{x:y}</style>"
        "<style>@media (min-width:5px){b{color:blue}}\na{color:red}\ni{color:green}</style>"
    )
    assert notes == {}


def test_nothing_outside_the_source_is_read(tmp_path, inlined):
    site = tmp_path / "site"
    site.mkdir()
    (tmp_path / "secret.css").write_text("secret{color:red}")
    (site / "link.css").symlink_to(tmp_path / "secret.css")
    references = ["../secret.css", "..%2fsecret.css", str(tmp_path / "secret.css"), "link.css"]
    references += [f"file://{tmp_path}/secret.css", "https://cdn.example/x.css", "//cdn.example/x.css", "none.css"]
    links = "".join(f'<link rel="stylesheet" href="{reference}">' for reference in references)
    html, notes = inlined(site, links + "<style>@import '../secret.css'; p{background:url(../secret.css)}</style>")
    assert "secret" not in html
    assert notes == {
        "style sheets outside the source": 2,
        "style sheets remote": 3,
        "style sheets missing": 4,  # a slash, and every step above the top, leads to the top, as on a server
        "pictures missing": 1,
    }


def test_tags_in_comments_scripts_and_texts_are_none(tmp_path, inlined):
    (tmp_path / "a.css").write_text("a{color:red}")
    link = '<link rel="stylesheet" href="a.css">'
    text = link.replace("<", "&lt;").replace(">", "&gt;")
    html, _ = inlined(tmp_path, f"<!--[if IE]>{link}<![endif]--><script>'{link}'</script><textarea>{link}</textarea>")
    assert html == f"<script>'{link}'</script><textarea>{text}</textarea>"


def test_broken_markup_takes_no_time(tmp_path, inlined):
    for broken in ("<a " + '="x" ' * 5000, "<a " + "='" * 5000, "<!--" * 5000, "<style>" * 2000, "<a b='" * 2000):
        started = time.monotonic()
        inlined(tmp_path, "<p>x</p>" + broken)
        assert time.monotonic() - started < 3, broken[:20]


def test_noscript_is_unwrapped_unless_scripts_run(tmp_path, inlined):
    page = "<noscript><p>without</p></noscript>"
    assert inlined(tmp_path, page)[0] == "<p>without</p>"
    assert "without" not in inlined(tmp_path, page, scripts=True)[0]
    words = "<script>'<noscript></noscript>'</script>"
    assert words in inlined(tmp_path, words, scripts=True)[0]


def test_local_scripts_come_along_only_where_they_run(tmp_path, inlined):
    (tmp_path / "a.js").write_text("write('</script>')")
    page = '<script src="a.js" defer></script><script src="https://cdn.example/b.js"></script><p>x'
    html = inlined(tmp_path, page, scripts=True)[0]
    assert html.endswith("<script></script><p>x</p><script>write('\\x3c/script>')</script>")
    assert 'src="a.js"' in inlined(tmp_path, page)[0]  # they are removed in the browser


def test_pictures_of_css_become_grey_boxes_of_their_size(tmp_path, inlined):

    Image.new("RGB", (20, 10)).save(tmp_path / "i.png")
    html, _ = inlined(
        tmp_path,
        "<style>a{background:#fff url(i.png) no-repeat}b{background:url('https://x/y.png')}c{cursor:url(i.png)}"
        'd:before{content:"\\f101"}@font-face{font-family:f;src:url(f.woff)}e{fill:url(#g)}</style>'
        '<p style="background-image:url(&quot;i.png&quot;)"><img src="i.png">',
    )
    grey, svg = "linear-gradient(#ccc,#ccc)", "<svg%20xmlns='http://www.w3.org/2000/svg'%20width='20'%20height='10'/>"
    assert entities.unescape(html) == (
        f"<style>a{{background:#fff {grey} no-repeat;background-size:20px 10px}}\nb{{background:{grey}}}\nc{{}}\n"
        'd:before{content:"■"}\ne{fill:url(#g)}</style>'
        f'<p style="background-image:{grey};background-size:20px 10px">'
        f'<img src="data:image/svg+xml,{svg}"></p>'
    )


def test_references_that_no_file_can_have_are_missing_and_stop_nobody(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "odd.svg").write_text("<svg width='1.2.3' height='4'></svg>")
    files = LocalFiles(tmp_path)
    for reference in ("x" * 300 + ".css", "circle", "circle/a.css"):
        assert files.find(reference, PLACE, "style sheets") is None
    assert files.notes == {"style sheets missing": 3}
    assert LocalFiles(tmp_path).size_of("odd.svg", PLACE) is None
    for data in (b"", b"<p>", b"<svg", b"\x89PNG", b"<svg xmlns='&x;'/>"):
        assert picture_sides(data) is None


@pytest.mark.parametrize(
    ("reference", "path"),
    [
        (" a.css\n", "sub/a.css"),
        ("a\nb.css", "sub/ab.css"),
        ("..\\a.css?b\\c#d", "a.css?b\\c#d"),
        ("/a/./b/../c", "a/c"),
        ("../../../a", "a"),
        ("?x", "sub/?x"),
    ],
)
def test_addresses_are_joined_as_browsers_do(reference, path):
    assert joined_address(reference, PLACE + "sub/") == PLACE + path


def test_addresses_that_lead_elsewhere_are_remote():
    for reference in (
        "//far.example/a",
        "\\\\far.example\\a",
        "http://far.example/a",
        "file:///a",
        "c:\\a",
        "http://[a",
    ):
        assert not joined_address(reference, PLACE).startswith(PLACE)


@pytest.mark.parametrize(("kind", "size"), [("JPEG", (30, 40)), ("PNG", (30, 40)), ("WEBP", (40, 30))])
def test_a_photo_that_its_exif_turns_has_the_size_that_chromium_shows(kind, size):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(file, kind, exif=exif.tobytes())
    assert picture_sides(file.getvalue()) == {"width": str(size[0]), "height": str(size[1])}
