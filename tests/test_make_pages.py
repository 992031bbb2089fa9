"""make_pages.py: local files, style sheets, reductions and the folder without a browser; then pages in a real one."""

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, SHARED
from PIL import Image

import make_pages as mp
from making import folder as folder_room
from making.drops import PageDropped
from making.folder import Folder, Report, picture_name, write_pages
from making.local_files import LocalFiles, inline_files, picture_size
from making.one_page import MAX_RENDERS, Trials, make_page, shortest
from making.page_settings import Settings, SettingsError
from making.reductions import Draft, compose, draft_of, reductions, style_sheets, without_attributes
from making.sources import Source, decode, find_pages, read_html
from making.style_sheets import parse_css, reduced_body, short_declarations, squeeze, without_unused_names, write_css
from scoring import renders
from training import dataset as page_data

COUNT = len
PAGE = "<!DOCTYPE html>\n<html><head><title>t</title></head><body><p>words</p></body></html>"


def browser_missing() -> str:
    try:
        renders.find_chromium()
    except renders.BrowserMissing as error:
        return str(error)
    return ""


MISSING = browser_missing()
in_browser = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def inlined(folder, html: str, scripts: bool = False) -> tuple[str, dict]:
    files = LocalFiles(folder.resolve())
    return inline_files(html, folder.resolve(), files, scripts), dict(files.notes)


class Canvas:
    """A renderer without a browser: every job is answered by `answer(job)`."""

    def __init__(self, answer) -> None:
        self.answer, self.jobs, self.facts = answer, [], {}

    def render(self, job):
        self.jobs.append(job)
        return renders.Render(self.answer(job), None, False, 0.0)


# -----------------------------------------------------------------------------
# Local files


def test_style_sheets_are_inlined_in_their_order_with_media_and_imports(tmp_path):
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


def test_nothing_outside_the_source_is_read(tmp_path):
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
        "style sheets outside the source": 5,
        "style sheets remote": 3,
        "style sheets missing": 1,
        "pictures outside the source": 1,
    }


def test_tags_in_comments_scripts_and_texts_are_none(tmp_path):
    (tmp_path / "a.css").write_text("a{color:red}")
    link = '<link rel="stylesheet" href="a.css">'
    html, _ = inlined(tmp_path, f"<!--[if IE]>{link}<![endif]--><script>'{link}'</script><textarea>{link}</textarea>")
    assert html == f"<script>'{link}'</script><textarea>{link}</textarea>"


def test_broken_markup_takes_no_time(tmp_path):
    for broken in ("<a " + '="x" ' * 5000, "<a " + "='" * 5000, "<!--" * 5000, "<style>" * 2000, "<a b='" * 2000):
        started = time.monotonic()
        inlined(tmp_path, "<p>x</p>" + broken)
        assert time.monotonic() - started < 3, broken[:20]


def test_noscript_is_unwrapped_unless_scripts_run(tmp_path):
    page = "<noscript><p>without</p></noscript>"
    assert inlined(tmp_path, page)[0] == "<p>without</p>"
    assert inlined(tmp_path, page, scripts=True)[0] == page


def test_local_scripts_come_along_only_where_they_run(tmp_path):
    (tmp_path / "a.js").write_text("write('</script>')")
    page = '<script src="a.js" defer></script><script src="https://cdn.example/b.js"></script><p>x'
    assert inlined(tmp_path, page, scripts=True)[0] == "<p>x<script>write('\\x3c/script>')\n</script>"
    assert inlined(tmp_path, page)[0] == page  # they are removed in the browser


def test_pictures_of_css_become_grey_boxes_of_their_size(tmp_path):
    from PIL import Image

    Image.new("RGB", (20, 10)).save(tmp_path / "i.png")
    html, _ = inlined(
        tmp_path,
        "<style>a{background:#fff url(i.png) no-repeat}b{background:url('https://x/y.png')}c{cursor:url(i.png)}"
        'd:before{content:"\\f101"}@font-face{font-family:f;src:url(f.woff)}e{fill:url(#g)}</style>'
        '<p style="background-image:url(&quot;i.png&quot;)"><img src="i.png">',
    )
    grey = "linear-gradient(#ccc,#ccc)"
    assert html == (
        f"<style>a{{background:#fff {grey} no-repeat;background-size:20px 10px}}\nb{{background:{grey}}}\nc{{}}\n"
        'd:before{content:"■"}\ne{fill:url(#g)}</style>'
        f'<p style="background-image:{grey};background-size:20px 10px">'
        "<img src=\"data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' width='20' height='10'/>\">"
    )


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbf<p>\xc3\xa9", "<p>é"),
        (b"<meta charset=iso-8859-1><p>\x80", "<meta charset=iso-8859-1><p>€"),
        ("<p>é".encode("cp1252"), "<p>é"),
        ("<meta charset='gb2312'><p>中".encode("gb2312"), "<meta charset='gb2312'><p>中"),
        ("<meta charset=utf-16><p>é".encode(), "<meta charset=utf-16><p>é"),
    ],
)
def test_pages_are_decoded_as_browsers_do(data, text):
    assert decode(data) == text


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"no markup", "empty"),
        (b"<p>\0", "unreadable"),
        (b"<meta charset=x>", "unreadable"),
        (b"<meta charset=undefined><p>x", "unreadable"),
    ],
)
def test_what_is_no_page_is_dropped_with_its_reason(tmp_path, data, reason):
    (tmp_path / "a.html").write_bytes(data)
    with pytest.raises(PageDropped) as dropped:
        read_html(Source("a.html", tmp_path / "a.html", tmp_path))
    assert dropped.value.reason == reason


def test_references_that_no_file_can_have_are_missing_and_stop_nobody(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "odd.svg").write_text("<svg width='1.2.3' height='4'></svg>")
    files = LocalFiles(tmp_path)
    for reference in ("x" * 300 + ".css", "circle", "circle/a.css"):
        assert files.find(reference, tmp_path, "style sheets") is None
    assert files.notes == {"style sheets missing": 3}
    assert picture_size((tmp_path / "odd.svg").read_bytes()) is None


# -----------------------------------------------------------------------------
# Style sheets and reductions


def draft(css: str, html: str = "<html><body></body></html>", **answers) -> Draft:
    made = draft_of({"doctype": "<!DOCTYPE html>", "quirks": False, "html": html, "sheets": [[css, ""]]})
    made.spaced = made.plain
    for name, value in answers.items():
        setattr(made, name, value)
    return made


def reduced(css: str, **answers) -> str:
    made = draft(css, **answers)
    return style_sheets(made, set(mp.itertools.chain(*reductions(made))))[0]


def test_css_survives_parsing_and_writing():
    css = 'a:not([href="}{;"]){b:url(x;y{)}\n@media (a){p{c:"\\"}"}}\n@layer one;\n@font-face{d:e}'
    assert write_css(parse_css("/* } */" + css)) == css
    assert write_css(parse_css("a{b:c")) == "a{b:c}"  # what a browser closes


def test_rules_that_match_nothing_and_conditions_that_fail_go():
    css = "a, b:hover{color:red}c{d:e}f,g:no(){h:i}@media print{a{j:k}}@media all{a{l:m}}@supports (x){a{n:o}}"
    kept = reduced(
        css,
        matched={"a": 1, "b:hover": 0, "c": 0, "f": 1, "g:no()": -1},
        media={"print": False, "all": True},
        supports={"(x)": False},
        declared={},
    )
    assert kept == "a{color:red;l:m}"


def test_declarations_that_show_nothing_go():
    body = "display:-ms-flexbox;display:flex;-webkit-mask:x;mask:x;cursor:pointer;color:red!important;color:blue"
    assert reduced_body(body, {("display", "-ms-flexbox"): False}) == "display:flex;mask:x;color:red!important"
    assert reduced_body("color:red;color:var(--x)", {}) == "color:red;color:var(--x)"


def test_squeezing_leaves_strings_and_calculations_alone():
    assert squeeze("a  >  b , c", ",>") == "a>b,c"
    body = 'width: calc(1px  +  2px) ; content : "a  ,  b"'
    assert short_declarations(body) == 'width:calc(1px + 2px);content:"a  ,  b"'


def test_unused_custom_properties_and_keyframes_go():
    css = ":root{--a:1px;--b:var(--a);--c:2px;color:red}\np{margin:var(--c);animation:on 1s}\n@keyframes on{to{x:y}}"
    kept = without_unused_names(css + "\n@keyframes off{to{x:y}}", "")
    assert kept == ":root{--c:2px;color:red}\np{margin:var(--c);animation:on 1s}\n@keyframes on{to{x:y}}"
    assert "--a:1px" in without_unused_names(css, "width:var(--a)")


def test_attributes_that_no_rule_names_go():
    html = '<a href="https://x/y" class="k u" id="i" data-x="1" aria-label="l" title="">t</a><use href="#i"></use>'
    names = {"class", "id", "href", "data-x", "aria-label", "title"}
    assert without_attributes(html, ".k{}[aria-label]{}", names) == (
        '<a href="#" class="k" id="i" aria-label="l">t</a><use href="#i"></use>'
    )


def test_dropped_elements_leave_and_kept_ones_lose_their_marks():
    html = "<html><body><!--drop 0--><i></i><!--/drop 0--><p></p><!--drop 1--><b></b><!--/drop 1--></body></html>"
    made = draft("", html, elements=2)
    assert compose(made, {("element", 1)}) == "<!DOCTYPE html>\n<html><body><i></i><p></p></body></html>\n"


def white(height: int = 10):
    return np.full((height, 10, 3), 255, np.uint8)


def test_a_reduction_that_shows_is_kept_back_and_the_others_are_not():
    made = draft("a{b:c}\nd{e:f}\ng{h:i}", "<html><head><style>/*sheet 0*/</style></head></html>")
    made.matched = {"a": 0, "d": 0, "g": 0}

    def answer(job):
        image = white()
        image[0, 0] = 0 if "e:f" in job.html else 255  # rule d shows, though it seemed to match nothing
        image[5:, :] = image[0, 0]
        return (image,)

    trials = Trials(Canvas(answer), (1280, 720), answer(renders.Job("e:f"))[0])
    html, kept_back = shortest(made, trials, lambda gone: [0, 0, 0])
    assert "d{e:f}" in html and "a{" not in html and "g{" not in html
    assert kept_back == 1 and trials.made <= MAX_RENDERS


def test_a_render_that_differs_by_chance_is_made_once_more():
    images = [white(100), white(100)]
    images[0][0, 0] = 0  # one pixel of a thousand
    trials = Trials(Canvas(lambda job: (images.pop(0),)), (1280, 720), white(100))
    assert trials.same(PAGE) and trials.made == 2


# -----------------------------------------------------------------------------
# The folder


def settings_of(*flags: str, out="out") -> Settings:
    return mp.settings_from(mp.parse_arguments(["site", "--out", str(out), *flags]))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--widths", "wide"), "--widths wide: whole numbers"),
        (("--widths", "1280,5"), "--widths 1280,5: from 100"),
        (("--max_height", "0"), "--max_height 0"),
        (("--height", "3000"), "--height 3000: from 1 px to --max_height 2000"),
        (("--max_html_tokens", "100"), "needs --tokenizer"),
        (("--tokenizer", "nowhere"), "--tokenizer nowhere: no tokenizer.json"),
        (("--max_html_characters", "-1"), "--max_html_characters -1"),
        (("--pages_at_once", "0"), "--pages_at_once 0: at least 1"),
    ],
)
def test_arguments_that_cannot_work_are_named(flags, words):
    with pytest.raises(SettingsError, match=words.replace("(", r"\(")):
        settings_of(*flags)


def test_main_says_what_is_wrong_and_exits_2(tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert mp.main([str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    assert mp.main([str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "<p>"}\n')
    assert mp.main([str(tmp_path / "other"), "--out", str(tmp_path / "other")]) == 2
    errors = capsys.readouterr().err
    assert "no such file or folder" in errors and "no .html or .htm" in errors and "name another folder" in errors

    def missing(*arguments):
        raise renders.BrowserMissing("no Chromium here: install one")

    monkeypatch.setattr(mp, "Renderer", missing)
    (tmp_path / "a.html").write_text(PAGE)
    assert mp.main([str(tmp_path / "a.html"), "--out", str(tmp_path / "out")]) == 2
    assert "error: no Chromium here: install one" in capsys.readouterr().err


def test_sources_are_found_in_folders_lists_and_datasets(tmp_path):
    (tmp_path / "site" / "sub").mkdir(parents=True)
    for name in ("b.html", "sub/a.HTM", "sub/c.txt"):
        (tmp_path / "site" / name).write_text(PAGE)
    (tmp_path / "list.txt").write_text("# two\nsite/b.html\n\nsite/sub/a.HTM\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "metadata.jsonl").write_text(json.dumps({"file_name": "x.png", "page": PAGE}) + "\n")

    def names(source) -> list[str]:
        return [page.name for page in find_pages(str(source), "page", None, "train")]

    assert names(tmp_path / "site") == ["b.html", "sub/a.HTM"]
    assert names(tmp_path / "list.txt") == ["b.html", "sub/a.HTM"]
    assert names(tmp_path / "data") == ["row-0000000"]
    with pytest.raises(SettingsError, match="no column text; there are file_name, page"):
        list(find_pages(str(tmp_path / "data"), "text", None, "train"))


def test_widths_are_dealt_out_by_name_and_stay():
    settings = Settings(widths=(1280, 390))
    widths = [settings.width_of(f"page-{number}") for number in range(200)]
    assert widths == [settings.width_of(f"page-{number}") for number in range(200)]
    assert 60 < widths.count(390) < 140


def test_the_summary_counts_every_reason():
    sizes = {"characters": [1000, 500, 370], "cut": 0, "pictures": 2, "kept_back": 0, "renders": 3}
    drops = [{"reason": "blank"}, {"reason": "blank"}, {"reason": "render", "notes": {"style sheets remote": 2}}]
    report = Report(asked=4, written=[sizes], dropped=drops)
    assert str(report) == "4 asked, 1 did not render, 2 blank, 1 written; 1,000 -> 370 characters (-63 %)"
    assert str(Report(1, written=[{**sizes, "tokens": [200, 50, 40]}])).endswith("200 -> 40 tokens (-80 %)")
    assert report.summary()["dropped"] == {"blank": 2, "render": 1}
    assert report.summary()["could not be had"] == {"style sheets remote": 2}


def test_every_page_has_a_file_of_its_own():
    assert picture_name("a/b.html") == "a/b.html"
    names = [picture_name(name) for name in ("a b.html", "a_b.html", "../a.html", "é", "ü", "a?b.html")]
    assert len(set(names)) == 6 and not any(name.startswith(".") or "/." in name for name in names)


def fake_page(monkeypatch, made: list) -> None:
    """make_page without a browser: the target is the page, its screenshot a picture of the page's length."""

    def make_page(name, html, settings, renderer, count):
        made.append(name)
        if "STOP" in html and len(made) < 4:
            raise KeyboardInterrupt
        if "BLANK" in html:
            raise PageDropped("blank", "every pixel has the same colour")
        sizes = [len(html)] * 3
        record = {"text": html, "width": 10, "height": 10, "cut": 0, "pictures": 0, "kept_back": 0, "renders": 3}
        return {**record, "characters": sizes}, np.full((10, 10, 3), len(html) % 256, np.uint8)

    monkeypatch.setattr(folder_room, "make_page", make_page)


def test_a_folder_is_carried_on_and_only_changed_pages_are_made_again(tmp_path, monkeypatch):
    made: list[str] = []
    fake_page(monkeypatch, made)
    site = tmp_path / "site"
    site.mkdir()
    for number in range(4):
        (site / f"{number}.html").write_text(f"<p>page {number}")
    (site / "4.html").write_text("<p>BLANK")
    (site / "5.html").write_text("<p>page 0")

    def run(**changes) -> tuple[list[str], Report]:
        made.clear()
        settings = Settings(**changes)
        folder = Folder(tmp_path / "out", settings.digest())
        pages = list(find_pages(str(site), "text", None, "train"))
        report = write_pages(pages, settings, folder, SimpleNamespace())
        folder.finish(report, report.summary())
        return sorted(made), report

    everything = [f"{number}.html" for number in range(6)]
    names, report = run()
    assert names == everything
    assert [row["reason"] for row in report.dropped] == ["blank", "duplicate"]
    assert run()[0] == ["5.html"]  # a duplicate may have lost its twin
    with open(tmp_path / "out" / "metadata.jsonl", "a") as file:
        file.write('{"page": "torn')
    (site / "1.html").write_text("<p>page 1, changed")
    names, report = run()
    assert names == ["1.html", "5.html"] and report.reused == 4
    rows = lines(tmp_path / "out" / "metadata.jsonl")
    assert [row["page"] for row in rows] == everything[:4]
    assert run(max_height=1000)[0] == everything
    (site / "0.html").unlink()
    run(max_height=1000)
    assert not list((tmp_path / "out").glob("0.html.*")) and len(list((tmp_path / "out").glob("*.html.*"))) == 4


def test_an_interrupted_run_leaves_a_valid_folder(tmp_path, monkeypatch):
    made: list[str] = []
    fake_page(monkeypatch, made)
    pages = [Source(f"{number}", html=f"<p>{number}{'STOP' * (number == 2)}") for number in range(9)]
    settings = Settings()

    def run() -> Report:
        folder = Folder(tmp_path / "out", settings.digest())
        report = write_pages(pages, settings, folder, SimpleNamespace(), pages_at_once=1)
        folder.finish(report, report.summary())
        return report

    report = run()
    assert report.interrupted and "interrupted" in str(report)
    rows = lines(tmp_path / "out" / "metadata.jsonl")
    assert [row["page"] for row in rows] == ["0", "1"]
    assert all((tmp_path / "out" / row["file_name"]).is_file() for row in rows)
    report = run()
    assert not report.interrupted and len(report.written) == 9 and report.reused == 2


# -----------------------------------------------------------------------------
# In a real browser

SITE_CSS = """
@import url("more.css");
body{margin:0;font:16px/1.5 "DejaVu Sans",sans-serif;--used:#036;--unused:#f00}
h1{color:var(--used)} .nothing{color:red} .card:hover{color:red} .card{padding:8px;background:#eee}
@media print{h1{display:none}} @media (min-width:600px){h1{font-size:40px}} @media (max-width:599px){h1{font-size:20px}}
@font-face{font-family:x;src:url(x.woff)} @keyframes spin{to{opacity:0}}
.icon{display:inline-block;width:24px;height:24px;background:url(dot.png) no-repeat} li + li{color:#800}
"""
SITE_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="description" content="secret words"><title>Site</title>
<link rel="stylesheet" href="css/site.css"><link rel="icon" href="x.ico"><script src="late.js" defer></script></head>
<body onload="go()"><!-- a comment --><h1 data-k="v" aria-label="w">Heading</h1>
<img src="css/dot.png" alt="a dot"><img src="https://far.example/x.jpg" width="90" height="40"><b class="icon"></b>
<div style="display:none">never seen</div><input type="hidden" value="token">
<div class="card unnamed"><a href="https://far.example/long/path">A link</a></div>
<ul><li>one</li><li style="display:none">hidden</li><li>two</li></ul>
<noscript>no scripts here</noscript><script>document.write("<p>written by a script</p>")</script>
</body></html>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("site")
    (folder / "css").mkdir()
    (folder / "css" / "site.css").write_text(SITE_CSS)
    (folder / "css" / "more.css").write_text("h1{letter-spacing:2px}")
    (folder / "late.js").write_text("document.querySelector('h1').textContent += ' and more'")
    Image.new("RGB", (30, 20), "red").save(folder / "css" / "dot.png")
    (folder / "index.html").write_text(SITE_PAGE)
    rows = "".join(f"<p>Paragraph {number} of a long page</p>" for number in range(200))
    (folder / "long.html").write_text(f"<html><body><div>{rows}</div><footer>The end</footer></body></html>")
    (folder / "pre.html").write_text(f"<!DOCTYPE html><pre>{''.join(f'line {n}{chr(10)}' for n in range(400))}</pre>")
    (folder / "blank.html").write_text('<!DOCTYPE html><p style="color:white">white on white</p>')
    (folder / "bare.html").write_text("<!DOCTYPE html><hr><hr>")
    return folder


@pytest.fixture(scope="module")
def renderer():
    if MISSING:
        pytest.skip(MISSING)
    with renders.Renderer(2, 60.0) as renderer:
        yield renderer


def made(site, page: str, renderer, **changes):
    settings = Settings(**changes)
    files = LocalFiles(site.resolve())
    html = read_html(Source(page, site / page, site.resolve()))
    html = inline_files(html, site.resolve(), files, settings.scripts == "run")
    return make_page(page, html, settings, renderer, COUNT)


def rerendered(record, renderer):
    return renderer.render(renders.Job(record["text"], record["viewport"])).image[: record["height"]]


@in_browser
def test_a_target_is_what_its_screenshot_shows_and_nothing_else(site, renderer):
    record, image = made(site, "index.html", renderer)
    html = record["text"]
    assert np.array_equal(rerendered(record, renderer), image)
    gone = ["<script", "noscript>", "onload", "comment", "secret", "never seen", "token", "data-k", "aria-", "unnamed"]
    gone += [".nothing", ":hover", "print", "@font-face", "@keyframes", "--unused", "font-size:20px", "far.example"]
    assert [words for words in gone if words in html] == []
    for kept in ("<!DOCTYPE html>", 'lang="en"', "letter-spacing:2px", "var(--used)", "no scripts here", 'href="#"'):
        assert kept in html, kept
    assert html.rstrip().endswith("</html>") and record["kept_back"] == 0
    assert html.count("<img") == 2 and 'width="90" height="40"' in html and 'width="30" height="20"' in html
    grey = (image == 0xCC).all(axis=-1)
    boxes = 30 * 20 + 90 * 40 + 24 * 20  # the last one is cut by its element
    assert boxes <= grey.sum() < boxes + 20  # the edges of letters may be grey, too


@in_browser
def test_scripts_run_once_and_are_removed(site, renderer):
    record, image = made(site, "index.html", renderer, scripts="run")
    assert "written by a script" in record["text"] and "Heading and more" in record["text"]
    assert "no scripts here" not in record["text"] and "<script" not in record["text"]
    assert np.array_equal(rerendered(record, renderer), image)


@in_browser
def test_a_long_page_is_cut_between_its_elements(site, renderer):
    record, image = made(site, "long.html", renderer, max_height=800)
    assert image.shape[0] <= 800 and record["cut"] > 100
    assert "Paragraph 10 " in record["text"] and "Paragraph 199 " not in record["text"]
    assert "The end" not in record["text"] and not record["text"].startswith("<!DOCTYPE")
    assert np.array_equal(rerendered(record, renderer), image)
    record, image = made(site, "pre.html", renderer, max_height=800)
    assert "line 10\n" in record["text"] and "line 399" not in record["text"]
    assert np.array_equal(rerendered(record, renderer), image)


@in_browser
def test_a_page_over_its_limit_is_cut_until_it_fits(site, renderer):
    record, _ = made(site, "long.html", renderer, max_html_characters=600)
    assert 200 < len(record["text"]) <= 600 and record["text"].rstrip().endswith("</html>")
    with pytest.raises(PageDropped) as dropped:
        made(site, "index.html", renderer, max_html_characters=60)
    assert dropped.value.reason == "too long"


@in_browser
def test_widths_decide_which_rules_stay(site, renderer):
    record, image = made(site, "index.html", renderer, widths=(390,))
    assert image.shape[1] == 390 and "font-size:20px" in record["text"] and "font-size:40px" not in record["text"]


@in_browser
@pytest.mark.parametrize(("page", "reason"), [("blank.html", "blank"), ("bare.html", "without text")])
def test_pages_without_anything_to_see_are_dropped(site, renderer, page, reason):
    with pytest.raises(PageDropped) as dropped:
        made(site, page, renderer)
    assert dropped.value.reason == reason


@in_browser
def test_what_would_change_a_pixel_stays(tmp_path, renderer):
    (tmp_path / "a.html").write_text(
        "<!DOCTYPE html><style>p + p{color:red}i{color:green}</style><body><i data-a=1>x</i>"
        '<div><p style="display:none">hidden</p><p>red for its hidden neighbour</p></div>'
    )
    record, image = made(tmp_path, "a.html", renderer)
    assert "p+p{" in record["text"] or "p + p{" in record["text"]
    assert record["kept_back"] > 0 and "data-a" not in record["text"]
    assert np.array_equal(rerendered(record, renderer), image)


@in_browser
def test_the_renderers_own_grey_is_in_no_target(tmp_path, renderer):
    picture = "<img src=https://example.org/y.png width=90 height=40>"
    (tmp_path / "a.html").write_text(f"<!DOCTYPE html><body><p>Hello</p>{picture}{picture}</body>")
    record, image = made(tmp_path, "a.html", renderer)
    assert record["text"].count('src="data:,"') == 2 and "svg" not in record["text"]
    assert np.array_equal(rerendered(record, renderer), image) and (image == 204).all(axis=2).sum() >= 2 * 90 * 40


@in_browser
@pytest.mark.slow
def test_the_command_line_is_interrupted_carried_on_and_its_folder_loads(site, tmp_path):
    out = tmp_path / "pages"
    command = [sys.executable, str(ROOT / "make_pages.py"), str(site), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metadata.jsonl").is_file() and (out / "metadata.jsonl").stat().st_size:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.05)
    text, errors = process.communicate(timeout=120)
    assert process.returncode in (0, 85), text + errors
    before = {row["page"]: (out / row["file_name"]).stat().st_mtime_ns for row in lines(out / "metadata.jsonl")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("5 asked, 1 without text, 1 blank, 3 written; "), done.stdout
    rows = lines(out / "metadata.jsonl")
    assert [row["page"] for row in rows] == ["index.html", "long.html", "pre.html"]
    after = {row["page"]: (out / row["file_name"]).stat().st_mtime_ns for row in rows}
    assert before.items() <= after.items()
    loaded = {name: html for name, picture, html in page_data.read_rows(str(out), None, "train", "image", "text", 0)}
    assert loaded == {row["file_name"]: row["text"] for row in rows}
    for name, picture, _ in page_data.read_rows(str(out), None, "train", "image", "text", 0):
        width, height = page_data.screenshot_size(picture)
        assert (width, height) == next((row["width"], row["height"]) for row in rows if row["file_name"] == name)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["written"] == 3 and summary["dropped"] == {"blank": 1, "without text": 1}


@in_browser
def test_the_demos_pages_come_from_here(tmp_path):
    """Texts to the letter; pictures where the fonts are those of the bundled ones."""
    maker = [
        sys.executable,
        str(ROOT / "demo" / "make_demo_pages.py"),
        "--family",
        "demo",
        "--pages",
        "6",
        "--seed",
        "7",
    ]
    subprocess.run([*maker, "--html", str(tmp_path / "site")], check=True, timeout=60)
    sizes = ["--widths", "224", "--height", "112"]
    assert mp.main([str(tmp_path / "site"), "--out", str(tmp_path / "out"), *sizes]) == 0
    bundled, made_now = ROOT / "demo" / "pages", tmp_path / "out"
    pairs = list(zip(lines(bundled / "metadata.jsonl"), lines(made_now / "metadata.jsonl")))
    assert [one["text"] for one, _ in pairs] == [two["text"] for _, two in pairs] and len(pairs) == 6
    browsers = [json.loads((folder / "summary.json").read_text())["browser"] for folder in (bundled, made_now)]
    for one, two in pairs:
        pictures = [Image.open(folder / row["file_name"]) for folder, row in ((bundled, one), (made_now, two))]
        assert pictures[0].size == pictures[1].size
        assert browsers[0] != browsers[1] or np.array_equal(*map(np.asarray, pictures))


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@in_browser
@pytest.mark.slow
def test_real_pages_come_out_shorter_and_render_to_the_same_pixels(renderer):
    pages = sorted((SHARED / "pages").glob("*/page.html"))[::9]
    if len(pages) < 8:
        pytest.skip(f"no pages in {SHARED / 'pages'}")
    before = after = 0
    for page in pages:
        record, image = made(page.parent, "page.html", renderer)
        assert any(np.array_equal(rerendered(record, renderer), image) for _ in range(2)), page  # chance, see CHANCE
        before, after = before + record["characters"][1], after + record["characters"][2]
    assert after < 0.8 * before
