"""Whether a written page is whole, repeats itself, equals another."""

import random
import time

import pytest
from conftest import need_shared

from scoring.validity import looping, same_html, validity

PAGE = "<!DOCTYPE html>\n<html><head><title>t</title></head><body>{}</body></html>\n"


def shared_pages(name: str) -> list[str]:
    files = sorted(need_shared("pages").glob(f"*/{name}"))
    assert files
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def outcome(html: str) -> tuple[bool, bool, bool, bool, str | None]:
    found = validity(html)
    return found.valid, found.complete, found.closed, found.body_not_empty, found.reason


def test_a_whole_page_is_valid_with_and_without_a_doctype():
    assert outcome(PAGE.format("<p>Hello")) == (True, True, True, True, None)
    assert outcome("<html>\n<style>p{}</style>\n<body><p>Hello</p></body>\n</html>") == (True, True, True, True, None)
    assert [validity(PAGE.format("x")).doctype, validity("<html><body>x</body></html>").doctype] == [True, False]


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("", (False, False, False, False, "no <html> and no <body>")),
        ("Here is the page", (False, False, False, True, "no <html> and no <body>")),
        ("<p>Hello</p></body></html>", (False, False, True, True, "no <html> and no <body>")),
        ("<!-- <html><body> --><p>Hello</p></html>", (False, False, True, True, "no <html> and no <body>")),
        ("<html><p>Hello</p></html>", (False, False, True, True, "no <body>")),
        ("<html><body><p>Hello</p>", (False, True, False, True, "no </html> at the end")),
        ("<html><body><p>Hello</p></body></html> Done!", (False, True, False, True, "no </html> at the end")),
        ("<html><body><div><p>Hello</p></body></html>", (False, True, False, True, "<div> is left open")),
        ("<html><body><p>Hello</p><style>a{}</body></html>", (False, True, False, True, "no </html> at the end")),
        ("<html><body><p>Hello</p><!-- </body></html>", (False, True, False, True, "no </html> at the end")),
        (PAGE.format(""), (False, True, True, False, "nothing in the body")),
        (PAGE.format(" <script>x</script><div hidden> </div><input type=hidden>"),
         (False, True, True, False, "nothing in the body")),
        ("<html><body>" + "<div>" * 600 + "</body></html>",
         (False, False, False, False, "not parsed: ValueError('nested deeper than 512')")),
        ("<html><body>x</body></html>" + " " * 1_000_000,
         (False, False, False, False, "over 1,000,000 characters")),
    ],
)  # fmt: skip
def test_the_reason_names_what_is_missing(html, expected):
    assert outcome(html) == expected


@pytest.mark.parametrize("body", ["<img src=a>", "<svg></svg>", "<input>", "a", "<p>a<p>b", "<ul><li>a<li>b</ul>"])
def test_a_body_shows_text_or_something_else(body):
    assert outcome(PAGE.format(body)) == (True, True, True, True, None)


@pytest.mark.parametrize("name", ["page.html", "clean.html"])
def test_real_pages_are_valid_and_do_not_loop(name):
    pages = shared_pages(name)
    assert [validity(html).reason for html in pages] == [None] * len(pages)
    assert [looping(html) for html in pages] == [False] * len(pages)


def test_real_pages_cut_anywhere_are_invalid_and_do_not_loop():
    rng = random.Random(0)
    cut = [html[: rng.randrange(len(html) - 10)] for html in shared_pages("clean.html") for _ in range(5)]
    assert {validity(html).valid for html in cut} == {False}
    assert {looping(html) for html in cut} == {False}


def test_validity_never_raises_whatever_it_reads():
    rng = random.Random(1)
    bits = "<html> <body> </body> </html> <p> <b> <table> <tr> </table> <select> <svg> <math> <mi> <desc> <title>"
    bits += " <script> <!-- --> <frameset> <form> <li> </br> <plaintext> & &#x110000; < </ <! ' \" = / > \x00"
    bits = [*bits.split(" "), "\ud800", "<annotation-xml encoding=text/html>", "\n"]
    for _ in range(2000):
        found = validity("".join(rng.choices(bits, k=rng.randrange(40))))
        assert found.valid is (found.reason is None)


@pytest.mark.parametrize("bomb", ["<div>" * 100_000, "<a " * 300_000, "<b>" * 100_000, "<table>" * 10_000])
def test_bombs_are_judged_in_seconds(bomb):
    start = time.monotonic()
    assert validity(bomb).valid is False
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("<ul>" + "<li>again</li>" * 100, True),
        ("<ul>" + "<li>again</li>" * 100 + "<li>ag", True),  # cut within a repetition
        ("<p>" + "very " * 41, True),
        ("x" * 200, True),
        ("<p>" + "".join(f"<b>{n}</b>" for n in range(20)) * 8, True),  # 170 characters, eight times
        ("<p>" + "a segment that is long " * 7, False),  # seven times
        ("<p>" + "very " * 30, False),  # under 200 characters
        ("<table>" + "<tr><td>0</td></tr>" * 100 + "</table></body></html>", False),  # equal rows, but it went on
        ("<ul>" + "".join(f"<li>{n}</li>" for n in range(300)), False),
        ("", False),
    ],
)
def test_looping_is_an_end_that_repeats(html, expected):
    assert looping(html) is expected


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("<p>a  b</p>\n<p>c</p>\n", " <p>a\nb</p><p>c</p>", True),
        ("<p>a</p> \n\t <p>b</p>", "<p>a</p><p>b</p>", True),
        ("<p>a b</p>", "<p>ab</p>", False),
        ("<p> a</p>", "<p>a</p>", False),
        ("<P>a</P>", "<p>a</p>", False),
        ("<p>caf\u00e9", "<p>cafe\u0301", True),  # the tokenizer composes what it reads
        ("", "", True),
    ],
)
def test_same_html_differs_in_whitespace_and_composition_only(a, b, expected):
    assert same_html(a, b) is expected


@pytest.mark.parametrize("between", [" ", "/"])
def test_a_tag_of_endless_attributes_is_given_up_early(between):
    start = time.monotonic()
    names = between.join(f"a{n}" for n in range(100_000))
    assert "a tag of over 500 attributes" in validity(PAGE.format(f"<p {names}>x</p>")).reason
    assert time.monotonic() - start < 5, "it took seconds for 12,000"
