"""Ordinary HTML that once came out otherwise than a browser shows it. The right values were read off plain Chromium."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import make_pages
from scoring import renders
from scoring.renders import Job

pytestmark = pytest.mark.slow
CASES = Path(__file__).parent / "cases"  # each with its own files; the others are below

RED, BLUE, BLACK = "rgb(204, 0, 0)", "rgb(0, 0, 204)", "rgb(0, 0, 0)"
LARGE = {"looks": f"{RED} 40px"}
LOGO = {"boxes": "120x40"}
FOUND = {
    "01_layer_import/page.html": LARGE,
    "02_base/page.html": LARGE,
    "03_svg_viewbox/page.html": {"boxes": "200x50"},
    "04_exif/page.html": {"boxes": "100x200"},
    "05_alt_is_src/page.html": LOGO,
    "06_unquoted_src/page.html": {**LOGO, "text": "Above Below: the logo is 120 by 40"},
    "07_single_quoted_src/page.html": LOGO,
    "08_root_relative/page.html": LARGE,
    "10_srcset_only/page.html": LOGO,
    "11_gbk_as_gb2312/page.html": {"text": "港口时刻表 镕基先生的商店，李熙乾 喃喃自语 丟掉 國際標準"},
    "13_sjis_cp932/page.html": {"text": "①港の時刻表Ⅱ 髙橋さん～"},
    "15_xml_encoding/page.xhtml": {"text": "Zażółć gęślą"},
    "18_short_comment/page.html": {"text": "First of three Second of three Third of three Last"},
    "19_xhtml_selfclosing/page.xhtml": {"text": "Harbour Ferries"},
    "20_shadow/only.html": "shadow",
    "20_shadow/page.html": "shadow",
    "20_shadow/script.html": {"text": "Outside"},
    "23_titled_sheets/page.html": {"looks": f"{RED} 16px"},
    "26_modern/page.html": {"text": "Nested red Container green teal one two three", "looks": "rgb(0, 136, 0) 30px"},
    "28_gradient_text/page.html": {"text": "A heading in a gradient"},
    "encodings/xsjis.html": {"text": "お知らせ 日本語のページ"},
}


def page(head: str, body: str, doctype: str = "<!DOCTYPE html>") -> str:
    return f'{doctype}<html><head><meta charset="utf-8"><title>t</title>{head}</head><body>{body}</body></html>'


SHEETS = {
    "s.css": "p{color:#c00;font-size:40px}",
    "blue.css": "p{color:#00c}",
    "gbk.css": '@charset "gbk";\n.中{color:#c00}'.encode("gbk"),
    "utf16.css": "\ufeffp{color:#c00}".encode("utf-16-le"),
    "conditions.css": '@import "s.css" screen;@import "blue.css" print;@import url(blue.css) supports(display:nope);',
    "late.css": 'h1{color:#0a0}@import "s.css";',
    "layers.css": '@layer a,b;@import "blue.css" layer(b);@import "s.css" layer(a);',
    "unnamed.css": '@import "s.css" layer;p{color:#00c}',
    "gbk_parent.css": '@charset "gbk";@import "gbk_child.css";',
    "gbk_child.css": ".中{color:#c00}".encode("gbk"),
    "escaped.css": '@\\69mport "s.css";',
    "left_open.css": "@media all{p{color:#c00",
    "open.css": '@import "left_open.css" screen;p{font-size:40px}',
}
LINK = '<link rel="stylesheet" href="{}">'
SVG = '<svg xmlns="http://www.w3.org/2000/svg" {}><rect width="400" height="100"/></svg>'
VECTORS = {"ratio": 'viewBox="0 0 400 100"', "wide": 'viewBox="0 0 400 100" width="200"', "bare": ""}
VECTORS |= {"cm": 'width="2cm" height="1cm"', "high": 'viewBox="0 0 400 100" height="50"'}
BESIDE = {  # name: (head, body, what is seen)
    "srcset_w": ("", '<img srcset="small.png 100w, wide.png 600w" sizes="300px">', {"boxes": "300x50"}),
    "srcset_and_src": ("", '<img src=logo.png srcset="small.png 2x,wide.png 3x">', LOGO),
    "picture": (
        "",
        '<picture><source media="(max-width:600px)" srcset=small.png>'
        '<source srcset="wide.png" media="(min-width:601px)"><img src=logo.png></picture>',
        {"boxes": "600x100"},
    ),
    "picture_type": ("", '<picture><source type="image/x-unknown" srcset=small.png><img src=logo.png></picture>', LOGO),
    "source_size": (
        "",
        "<picture><source srcset=wide.png width=60 height=10><img src=logo.png></picture>",
        {"boxes": "60x10"},
    ),
    "no_src": ("", "<img width=60 height=50>B<img data-src=wide.png>", {"boxes": "60x50"}),
    "image_set": (
        '<style>h1{width:90px;height:60px;background:image-set("logo.png" 1x,"wide.png" 2x) no-repeat}</style>',
        "<h1></h1>",
        {"background": "120px 40px"},
    ),
    "image_button": ("", "<INPUT TYPE=IMAGE SRC=logo.png>", LOGO),
    "poster": ("", "<video poster=logo.png></video>", LOGO),
    "object": ("", "<object data=logo.png></object><embed src=logo.png>", {"boxes": "120x40 120x40"}),
    "vectors": (
        "",
        "<img src=ratio.svg height=25><img src=wide.svg><img src=bare.svg width=80>",
        {"boxes": "100x25 200x50 80x150"},
    ),
    "turned": ("", "<img src=o.png><img src=o.webp>", {"boxes": "30x60 60x30"}),
    "spaces": ("", '<img src=" my%20pic.png "><img src="my pic.png">', {"boxes": "70x50 70x50"}),
    "query": (LINK.format("s.css?v=1#x"), '<img src="logo.png?x=1">', {**LOGO, **LARGE}),
    "backslash": (LINK.format("sub\\..\\s.css"), '<img src=".\\logo.png">', {**LOGO, **LARGE}),
    "conditions": (LINK.format("conditions.css"), "", LARGE),
    "late": (LINK.format("late.css"), "", {"looks": f"{BLACK} 16px"}),
    "layers": (LINK.format("layers.css"), "", {"looks": f"{BLUE} 40px"}),
    "unnamed": (LINK.format("unnamed.css"), "", {"looks": f"{BLUE} 40px"}),
    "open": (LINK.format("open.css"), "", LARGE),
    "gbk_sheet": (
        LINK.format("gbk.css"),
        '<p class="x 中">B<p>',
        {"looks": f"{RED} 16px"},
    ),
    "utf16_sheet": (LINK.format("utf16.css"), "", {"looks": f"{RED} 16px"}),
    "titled": (
        LINK.format("s.css") + "<link rel=stylesheet href=blue.css title=X><style title=Y>p{color:#0f0}</style>",
        "",
        {"looks": f"{BLUE} 40px"},
    ),
    "alternate": (
        '<link rel="ALTERNATE StyleSheet" href=blue.css title=X><link rel=stylesheet href=s.css title=Y>',
        "",
        LARGE,
    ),
    "default_style": (
        "<meta http-equiv=default-style content=Y><link rel=stylesheet href=blue.css title=X>"
        "<link rel=stylesheet href=s.css title=Y>",
        "",
        LARGE,
    ),
    "disabled": (
        "<link rel=stylesheet href=blue.css disabled><style type=text/less>p{color:red}</style>",
        "",
        {"looks": f"{BLACK} 16px"},
    ),
    "twice": ("<link rel=stylesheet href=s.css href=blue.css>", "<img src=logo.png src=wide.png>", {**LOGO, **LARGE}),
    "entities": (LINK.format("s&#46;css"), '<img src="&#108;ogo.png">', {**LOGO, **LARGE}),
    "capitals": ("<LINK REL=STYLESHEET HREF=s.css>", "<IMG SRC=logo.png>", {**LOGO, **LARGE}),
    "slash": ("<link rel=stylesheet href=s.css/>", "A<br/>B", {"looks": f"{BLACK} 16px", "text": "A B P"}),
    "crowded": ("", '<img alt="x>y"src="logo.png"class="y">B', {**LOGO, "text": "B P"}),
    "comments": ("", "<!- bogus -->A<?php x ?>B<!-- x -- > y -->C</!>D<!>E", {"text": "ABCDE P"}),
    "late_base": (LINK.format("s.css") + '<base href="sub/">', "<img src=../logo.png>", LARGE | LOGO),
    "no_bases": (
        '<base href="data:text/plain,x"><base href="javascript:x">' + LINK.format("s.css"),
        "<svg width=9 height=9><base href='sub/' /></svg><img src=logo.png>",
        LARGE | {"boxes": "9x9 120x40"},
    ),
    "whole_base": ('<base href="{site}/sub/x">' + LINK.format("../s.css"), "<img src=../logo.png>", LARGE | LOGO),
    "whole_paths": (LINK.format("{site}/s.css"), '<img src="{site}/logo.png">', LARGE | LOGO),
    "gbk_import": (LINK.format("gbk_parent.css"), '<p class="x 中">B<p>', {"looks": f"{RED} 16px"}),
    "escaped_import": (LINK.format("escaped.css"), "", LARGE),
    "late_default_style": (
        "<style title=X>p{color:#c00}</style><style title=Y>p{font-size:40px}</style>"
        "<meta http-equiv=default-style content=Y>",
        "",
        {"looks": f"{RED} 16px"},
    ),
    "disabled_title": (
        "<link rel=stylesheet href=blue.css title=X disabled><style title=Y>p{color:#c00}</style>",
        "",
        {"looks": f"{RED} 16px"},
    ),
    "types": (
        "<link rel=stylesheet type='text/css; charset=utf-8' href=s.css>"
        "<style type='text/css; charset=utf-8'>p{color:red}</style><style type=' text/css'>p{color:red}</style>",
        "",
        LARGE,
    ),
    "vector_print": (
        "",
        "<svg width=9 height=9><style media=print>p{color:red}</style></svg>",
        {"looks": f"{BLACK} 16px"},
    ),
    "dense": ("", "<img src=dense.jpg>", {"boxes": "30x15"}),
    "far_vector": ("", "<img src=far.svg><img src=utf16.svg>", {"boxes": "60x20 60x20"}),
    "vector_object": ("", "<object data=cm.svg></object><object data=high.svg></object>", {"boxes": "76x38 200x50"}),
    "fallbacks": (
        "",
        "<object data=none.swf type=application/x-shockwave-flash>A</object><object>B</object>"
        "<object classid=x>C</object><object data=none.png>D</object><object data=logo.png>E</object>",
        {"text": "ABCD P", **LOGO},
    ),
    "frame_border": ("", "<iframe width=60 height=50></iframe>", {"boxes": "64x54"}),
    "two_bases": (
        '<base href="sub/"><base href="x/">' + LINK.format("../s.css"),
        "<img src=../logo.png>",
        LARGE | LOGO,
    ),
    "vector_style": (
        "",
        "<svg width=50 height=20><style>a > b{x:y}rect{fill:red}</style><rect/></svg>",
        {"boxes": "50x20"},
    ),
    "line_break": ("", "<pre>\n\nA</pre>", {"pre": "\nA"}),
    "plaintext": ("", "<xmp><b>A</b></xmp><p>P<plaintext><i>", {"text": "<b>A</b> P <i></body></html>"}),
}
WHOLE = {
    "frames.html": (
        '<html><head><title>t</title></head><frameset cols="*"><frame src=a.html></frameset></html>',
        "frames",
    ),
    "not_xml.xhtml": ('<html xmlns="http://www.w3.org/1999/xhtml"><body><p>A</body></html>', "unreadable"),
    "no_namespace.xhtml": ("<html><body><p>A</p></body></html>", "unreadable"),
    "order.xhtml": (
        '<?xml-stylesheet href="s.css"?><?xml-stylesheet href="blue.css"?><html xmlns="http://www.w3.org/1999/xhtml">'
        "<head><style>p:lang(de){font-size:20px}</style></head><body>"
        '<p xml:lang="de" lang="en">A</p><div><template shadowrootmode="open">x</template>B</div></body></html>',
        {"looks": f"{BLUE} 20px", "text": "A B"},
    ),
    "prefixes.xhtml": (
        '<?xml version="1.0"?><?xml-stylesheet href="s.css" type="text/css"?><!DOCTYPE h:html PUBLIC '
        '"-//W3C//DTD XHTML 1.0 Strict//EN" "http://www.w3.org/TR/xhtml1/DTD/xhtml1-strict.dtd">'
        '<h:html xmlns:h="http://www.w3.org/1999/xhtml" xmlns:s="http://www.w3.org/2000/svg"><h:head><h:title/></h:head>'
        '<h:body><h:p>A&#160;&eacute;</h:p><s:svg width="30" height="30"><s:rect width="30" height="30"/></s:svg>'
        "</h:body></h:html>",
        {**LARGE, "text": "A é", "boxes": "30x30"},
    ),
}


def write_beside(folder: Path) -> None:
    """BESIDE's pages and WHOLE's, and what they ask for."""
    (folder / "sub").mkdir(parents=True)
    pictures = {"logo": (120, 40), "small": (100, 300), "wide": (600, 100), "my pic": (70, 50)}
    for name, size in pictures.items():
        Image.new("RGB", size, "navy").save(folder / f"{name}.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    for suffix in ("png", "webp"):
        Image.new("RGB", (60, 30), "navy").save(folder / f"o.{suffix}", exif=turned)
    dense = Image.Exif()
    dense.update({0x011A: 144.0, 0x011B: 144.0, 0x0128: 2})
    dense.get_ifd(0x8769).update({0xA002: 30, 0xA003: 15})
    Image.new("RGB", (60, 30), "navy").save(folder / "dense.jpg", exif=dense)
    (folder / "far.svg").write_text(
        f"<?xml version='1.0'?><!--{'x' * 30_000}-->" + SVG.format('width="60" height="20"')
    )
    (folder / "utf16.svg").write_bytes(("\ufeff" + SVG.format('width="60" height="20"')).encode("utf-16-le"))
    for name, attributes in VECTORS.items():
        (folder / f"{name}.svg").write_text(SVG.format(attributes))
    for name, css in SHEETS.items():
        (folder / name).write_bytes(css if isinstance(css, bytes) else css.encode())
    for name, (html, _) in WHOLE.items():
        (folder / name).write_text(html)
    for name, (head, body, _) in BESIDE.items():
        html = page(head, body if "<p>" in body or "<p " in body else f"{body}<p>P</p>")
        (folder / f"{name}.html").write_text(html.replace("{site}", folder.resolve().as_uri()))


WANTED = FOUND | {f"beside/{name}.html": seen for name, (_, _, seen) in BESIDE.items()}
WANTED |= {f"beside/{name}": seen for name, (_, seen) in WHOLE.items()}


@pytest.fixture(scope="module")
def seen(tmp_path_factory, renderer) -> dict[str, dict | str]:
    """What became of each page: what its target shows, or the reason for which it was dropped."""
    site, out = tmp_path_factory.mktemp("cases") / "site", tmp_path_factory.mktemp("out")
    shutil.copytree(CASES, site)
    write_beside(site / "beside")
    for number, file in enumerate(sorted(site.rglob("*.*html"))):  # no two alike, or one would count as the other
        file.write_bytes(file.read_bytes().replace(b"<title>t<", b"<title>%d<" % number))
    assert make_pages.main([str(site), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    looks = renderer.map(Job(row["text"], steps=(renders.step("look", Path(__file__).parent),)) for row in rows)
    found = {row["page"]: look.values[0] for row, look in zip(rows, looks)}
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]
    return found | {row["page"]: row["reason"] for row in dropped}


@pytest.mark.parametrize("name", WANTED)
def test_a_page_comes_out_as_a_browser_shows_it(seen, name):
    wanted, found = WANTED[name], seen[name]
    assert (found if isinstance(wanted, str) else {key: found[key] for key in wanted}) == wanted
