"""Cleaning: each step drops its own and nothing else, in linear time."""

import time

import pytest
from conftest import need_shared

from training.cleaning import clean_html, cleaning_steps
from training.errors import SettingsError

BLOB = "data:image/png;base64," + "A" * 200
ALL = ("comments", "scripts", "tracking", "base64")


@pytest.mark.parametrize(
    ("steps", "html", "expected"),
    [
        ("comments", "<p>a<!-- b -->c</p><!---->", "<p>ac</p>"),
        ("comments", "<!--[if IE]><p>x</p><![endif]--><p>a</p><![endif]>", "<p>a</p>"),
        ("comments", "<div>\n  <!-- a -->\n  <!-- b --> <!-- c -->\n  <p>d</p>\n</div>", "<div>\n  <p>d</p>\n</div>"),
        ("comments", "<!DOCTYPE html><textarea><!-- a --></textarea>", None),
        ("comments", "<title><!-- a --></title><xmp><!-- b --></xmp>", None),
        ("comments", "<pre>a\n<!-- b -->\nc</pre>", "<pre>a\n\nc</pre>"),
        ("comments", "<pre><!-- b -->\nc</pre>", "<pre>\n\nc</pre>"),
        ("comments", '<a title="<!-- a -->">b</a>', '<a title="<!-- a -->">b</a>'),
        ("comments", "<style>\n/* a */\np{color:red/* b */}\n</style>", "<style>\np{color:red}\n</style>"),
        ("comments", "<style>p{margin:1px/**/2px;content:'/* a */'}</style>", None),
        ("comments", "<style>p{background:url(//a/*b*/c)}</style>", None),
        ("comments", "<p>1 < 2 && 3 > 2 <3</p>", None),
        ("comments", "<p>a<!-- never closed", "<p>a"),
        ("scripts", "<p>a</p><script>if (a < b) '</p>'</script><noscript><img></noscript>", "<p>a</p>"),
        ("scripts", '<script type="application/ld+json">{}</script><SCRIPT src=a></SCRIPT >b', "b"),
        ("scripts", '<a onclick="go()" href="/x" ONLOAD=y class=c>d</a>', '<a href="/x" class=c>d</a>'),
        ("scripts", '<a onclick="x"class=c>d</a>', "<a class=c>d</a>"),
        ("scripts", "<a href=' JavaScript:void(0)'>d</a>", "<a href='#'>d</a>"),
        ("scripts", "<a href=javascript:x>e</a>", "<a href=#>e</a>"),
        ("scripts", '<a href="java&#115;cript:x">d</a>', '<a href="#">d</a>'),
        ("scripts", '<p title="javascript: a book" data-on="x" one>d</p>', None),
        ("scripts", "<p>a</p><script>never closed", None),
        ("tracking", '<img src="t.gif" width="1" height="1">a<img style="width:0px;height:0" src=b>', "a"),
        ("tracking", '<img src="//www.facebook.com/tr?id=1">a<img width=1 height=20>', "a<img width=1 height=20>"),
        ("tracking", '<img width=1 height=1 style="width:100%;height:20px">', None),
        ("tracking", '<iframe src="https://www.googletagmanager.com/ns.html">a</iframe>b', "b"),
        ("tracking", '<link rel="dns-prefetch" href="//a"><link rel=icon href="b">', '<link rel=icon href="b">'),
        ("tracking", '<meta name="google-site-verification" content="a"><meta charset=a>', "<meta charset=a>"),
        ("tracking", '<meta name="viewport" content="width=device-width"><a ping="/p" href="b">c</a>',
         '<meta name="viewport" content="width=device-width"><a href="b">c</a>'),
        ("base64", f'<img alt="a" src="{BLOB}">', '<img alt="a" src="data:,">'),
        ("base64", f'<img srcset="{BLOB} 2x, b.png 1x">', '<img srcset="data:, 2x, b.png 1x">'),
        ("base64", f'<p style="background:url({BLOB}) red">', '<p style="background:url(data:,) red">'),
        ("base64", f'<p style="background:url(&quot;data:image/svg+xml,{"%3C" * 50}&quot;)">',
         '<p style="background:url(data:,)">'),
        ("base64", f"<style>a{{src:url('data:font/woff2;base64,{'A' * 200}') format('woff2')}}</style>",
         "<style>a{src:url(data:,) format('woff2')}</style>"),
        ("base64", '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">', None),
        ("base64", f"<p>{BLOB}</p>", None),
        ("base64", f'<link rel=stylesheet href="data:text/css;base64,{"A" * 200}">', None),
    ],
)  # fmt: skip
def test_each_step_drops_its_own_and_nothing_else(steps, html, expected):
    expected = html if expected is None else expected
    assert clean_html(html, (steps,)) == expected
    assert clean_html(expected, (steps,)) == expected
    others = tuple(step for step in ALL if step != steps)
    assert clean_html(html, others) == html or expected == html


def test_cleaning_can_be_chosen_and_switched_off():
    assert cleaning_steps("comments, base64") == ("comments", "base64")
    assert cleaning_steps("none") == ()
    assert clean_html("<!-- a --><script></script>\0", ()) == "<!-- a --><script></script>\0"
    with pytest.raises(SettingsError, match="--clean comment: there are comments, scripts,"):
        cleaning_steps("comment")


def test_real_pages_stay_valid_and_a_second_cleaning_changes_nothing():
    from scoring.validity import validity

    files = sorted(need_shared("pages").glob("*/page.html"))
    assert files
    for file in files:
        cleaned = clean_html(file.read_text(encoding="utf-8", errors="replace"), ALL)
        assert (validity(cleaned).reason, clean_html(cleaned, ALL)) == (None, cleaned)
        clean = (file.parent / "clean.html").read_text(encoding="utf-8")
        assert clean_html(clean, ALL) == clean


@pytest.mark.parametrize(
    "bomb",
    ["<", "<a ", "<!--", '<a b="', "<script>", "<pre>", "<style>url(data:", "<style>/*", '<style>"\\', "\n<!---->"],
)
def test_cleaning_takes_linear_time(bomb):
    start = time.monotonic()
    clean_html((bomb * 1_000_000)[:1_000_000], ALL)
    clean_html(bomb[:7] + bomb[7:] * (1_000_000 // max(1, len(bomb[7:]))), ALL)
    assert time.monotonic() - start < 10  # the square would be hours


@pytest.mark.parametrize("steps", [(), ALL])
@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("\ufeff<p>a", "<p>a"),
        ("<p>\ufeffa", "<p>\ufeffa"),  # no byte order mark but a character
        ("<p>cafe\u0301", "<p>caf\u00e9"),
        ("<p>\u1112\u1161\u11ab \u212b \u2126 \uf900", "<p>\ud55c \u00c5 \u03a9 \u8c48"),
        # Composed, > and the stroke are one character, and no tag any more.
        ("<p>\u0338 a<b title=\u0338>", "<p>&#x338; a<b title=&#x338;>"),
        ("<p>\r\n\r \t\ufffd \u200d \U0001f468 \u3000", "<p>\r\n\r \t\ufffd \u200d \U0001f468 \u3000"),
    ],
)
def test_what_is_stored_is_what_a_tokenizer_gives_back(html, expected, steps):
    assert clean_html(html, steps) == clean_html(expected, steps) == expected


def test_letters_that_meet_where_a_comment_went_are_composed():
    assert clean_html("<p>e<!-- c -->\u0301</p><!-- d -->\u0338", ALL) == "<p>\u00e9</p>&#x338;"
