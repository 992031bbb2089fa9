"""Broken, too long and repeated pages are found, and no others."""

import io
import os
import random
from types import SimpleNamespace

import pytest
from conftest import ROOT, need_shared
from small_pages import count_tokens, dropped, good_pages, header_bomb, load, page_html, picture, write_folder

import use_model_from_hub as use
from scoring.validity import same_html
from training.dataset import BadPage
from training.duplicates import KnownPages
from training.page_checks import check_page, marks_of, screenshot_size


def test_every_broken_page_is_found_and_no_other(tmp_path):
    from PIL import Image

    gif = io.BytesIO()
    Image.new("RGB", (40, 30)).save(gif, "GIF")
    (tmp_path / "secret.png").write_bytes(picture(999))
    folder = tmp_path / "in"
    bad = [
        ("truncated.png", picture(100)[:-900], page_html(100), "unreadable"),
        ("truncated.jpg", picture(101, "JPEG")[:-300], page_html(101), "unreadable"),
        ("truncated.webp", picture(102, "WEBP")[:-300], page_html(102), "unreadable"),
        ("text.png", b"<html>no picture</html>", page_html(103), "unreadable"),
        ("gif.png", gif.getvalue(), page_html(104), "unreadable"),
        ("nothing.png", b"", page_html(105), "unreadable"),
        ("missing.png", None, page_html(106), "unreadable"),
        ("strip.png", picture(107, size=(1000, 2)), page_html(107), "unreadable"),
        ("bomb.png", header_bomb(), page_html(108), "too large"),
        ("small_bomb.png", header_bomb(5_000, 4_001), page_html(109), "too large"),
        ("empty.png", picture(110), "", "empty"),
        ("blank.png", picture(111), " \n\t", "empty"),
        ("none.png", picture(112), None, "empty"),
        ("only_comment.png", picture(113), "<!-- nothing -->", "empty"),
        ("prose.png", picture(114), "I cannot see a page", "empty"),
        ("number.png", picture(115), 7, "unreadable"),
        ("surrogate.png", picture(116), page_html(116) + "\ud800", "unreadable"),
        ("../secret.png", None, page_html(117), "outside the folder"),
        (str(tmp_path / "secret.png"), None, page_html(118), "outside the folder"),
        (str(folder / "p000.png"), None, page_html(119), "outside the folder"),
        ("file:///etc/passwd", None, page_html(120), "outside the folder"),
        ("http://127.0.0.1:9/x.png", None, page_html(121), "outside the folder"),
        ("link.png", None, page_html(122), "outside the folder"),
        ("linked/secret.png", None, page_html(123), "outside the folder"),
        ("nul\0.png", None, page_html(124), "unreadable"),
        ("pipe.png", None, page_html(125), "unreadable"),
        (".", None, page_html(126), "unreadable"),
    ]
    write_folder(folder, [row[:3] for row in bad] + good_pages(40))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "inside.png").symlink_to(folder / "p001.jpg")
    os.mkfifo(folder / "pipe.png")
    with open(folder / "metadata.jsonl", "a") as lines:
        lines.write('{"file_name": "p000.png"\n\n[1]\n' + "[" * 100_000 + "\n" + '{"other": 1}\n')
    training, held_out, report = load(folder, tmp_path / "out", max_bad_share=0.5)
    found = dropped(tmp_path / "out")
    lines = [name for name in found if name.startswith("metadata.jsonl, byte ")]
    assert [found.pop(name) for name in lines] == ["unreadable"] * 4
    assert found == {name: reason for name, _, _, reason in bad}
    assert sorted(page["name"] for page in [*training, *held_out]) == [name for name, _, _ in good_pages(40)]
    assert str(report) == (
        "104 asked, 17 unreadable, 2 too large, 7 outside the folder, 5 empty, 40 kept; "
        "the dataset ended after 71 pages: 36 to train on and 4 held out, of 100 and 4 that were asked for"
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_cut_or_spoilt_anywhere_is_told_as_unreadable_or_read(kind):
    whole = picture(1, kind)
    assert screenshot_size(whole) == (40, 30)
    rng = random.Random(0)
    for _ in range(150):
        with pytest.raises(BadPage):
            screenshot_size(whole[: rng.randrange(len(whole) * 9 // 10)])
        spoilt = bytearray(whole)
        for _ in range(3):
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
        try:
            screenshot_size(bytes(spoilt))
        except BadPage as bad:
            assert bad.reason in ("unreadable", "too large")


def test_held_out_pages_have_no_twin_in_training_and_siblings_stay(tmp_path):
    originals = [(f"a{n:02d}.png", picture(n), page_html(n, 80)) for n in range(20)]
    # One word of eighty is another one: alike in 76 of 82 shingles.
    twins = [(f"b{n:02d}.png", picture(100 + n), html.replace("</p>", " changed</p>").replace("Page", "<b>Page</b>"))
             for n, (_, _, html) in enumerate(originals)]  # fmt: skip
    # The same template and style with other words, and pages with hardly a word.
    siblings = [(f"c{n:02d}.png", picture(200 + n), page_html(500 + n, 80)) for n in range(20)]
    short = [(f"d{n:02d}.png", picture(300 + n), f"<html><body><b style='top:{n}px'>Sign in</b></body></html>")
             for n in range(10)]  # fmt: skip
    folder = write_folder(tmp_path / "in", originals + twins + siblings + short)
    training, held_out, _ = load(folder, tmp_path / "out", eval_pages=10)
    held, kept = set(held_out["name"][:]), set(training["name"][:])
    other = str.maketrans("ab", "ba")
    expected = {name.translate(other) for name in held if name[0] in "ab"} - held
    assert dropped(tmp_path / "out") == dict.fromkeys(expected, "like a held-out page")
    assert not held & kept and len(held) == 10 and len(kept) == 70 - 10 - len(expected)
    assert len(expected) >= 2
    assert {name for name in held | kept if name[0] in "cd"} == {name for name, _, _ in siblings + short}


def stored(html: str, clean: str = "comments,scripts,tracking,base64") -> str:
    settings = SimpleNamespace(clean=clean, max_html_tokens=100_000)
    return check_page("p", picture(1), html, settings, count_tokens)["html"]


DOCUMENT = "<!DOCTYPE html>\n<html><head><title>t</title></head><body><p>cafe</p></body></html>"
PAGES = {
    "plain": DOCUMENT,
    "byte order mark": f"\ufeff{DOCUMENT}",
    "byte order mark and blanks": f"\ufeff \n{DOCUMENT}\u3000\n",
    "apart": DOCUMENT.replace("cafe", "cafe\u0301 \u1112\u1161\u11ab \u212b \u2126 \u037e \u0958 \U0001d15e"),
    "stroke": DOCUMENT.replace("cafe", "\u0338cafe=\u0338<\u0338"),
    "after the end": f"{DOCUMENT}\n<div>footer</div>\n<!-- x --><script>s()</script>bye",
    "before the start": "<style>p{color:red}</style>" + DOCUMENT[16:],
    "comment before": f"<!-- saved from -->{DOCUMENT}",
    "words before": f"Warning: no such file in <b>x.php</b>\n{DOCUMENT}",
    "words and nothing else": f"Warning: no such file {DOCUMENT}",
    "fragment with a fence": "<div><h1>How to</h1><pre>```js\nlet a = 1\n```</pre><p>The rest</p></div>",
    "fence on lines of its own": "<p>a<pre>\n```\nlet a = 1\n```\n</pre><p>The rest",
    "words, then a fence": "How to\n\n<pre>```js\nlet a = 1\n```</pre><p>The rest</p>",
    "words, then a snippet": "How to\n```js\nlet a = 1\n```\n<p>The rest</p>",
    "words, then a snippet and a document": f"How to\n```js\nlet a = 1\n```\n{DOCUMENT}",
    "in a fence": f"```html\n{DOCUMENT}\n```",
    "chat": f"Here is the page:\n```html\n{DOCUMENT}\n```\nIt is short.",
    "fragment with words before": "Hello <b>you</b>",
    "two documents": f"{DOCUMENT}\n{DOCUMENT}",
    "line ends": DOCUMENT.replace("\n", "\r\n").replace("cafe", "a\rb\r\nc \t d"),
    "special tokens": DOCUMENT.replace("cafe", "<|im_end|> <|endoftext|><|image_pad|><tool_call></think>"),
    "odd characters": DOCUMENT.replace(
        "cafe", "\ufffd \u200d\U0001f468\u200d\U0001f469 \xa0\u2028 \x01 \u0e17\u0e35\u0e48"
    ),
}


@pytest.mark.parametrize("clean", ["none", "comments,scripts,tracking,base64"])
@pytest.mark.parametrize("tokenizer", ["demo", "real"])
def test_the_tokens_of_any_stored_page_count_as_exact(tokenizer, clean):
    """A perfect model's answer, through what use and evaluation make of it."""
    from transformers import AutoTokenizer

    place = ROOT / "demo" / "tiny_holo1" if tokenizer == "demo" else need_shared("qwen_tokenizer")
    known = AutoTokenizer.from_pretrained(place)
    wrong = {}
    for name, html in PAGES.items():
        reference = stored(html, clean)
        ids = known(reference, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        raw = known.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if not (raw == reference == use.extract_html(raw) and same_html(use.extract_html(raw), reference)):
            wrong[name] = (reference, use.extract_html(raw))
    assert not wrong


def test_a_stored_page_is_the_same_document_as_before():
    """Nothing of a page is cut away to make it an answer; html5lib reads both alike."""
    import html5lib

    for name, html in PAGES.items():
        if name in ("in a fence", "chat"):
            assert stored(html, "none") == DOCUMENT
            continue
        as_it_was = html.removeprefix("\ufeff").strip()
        trees = [html5lib.serialize(html5lib.parse(text)) for text in (stored(html, "none"), as_it_was)]
        assert same_html(*trees), name


LETTERS = {  # a range of the script, and how long its words are
    "Chinese": (0x4E00, 0x4F80, 2),
    "Japanese": (0x3041, 0x30F6, 3),
    "Thai": (0x0E01, 0x0E4E, 5),
    "Lao": (0x0EB0, 0x0EBD, 5),
    "Burmese": (0x1000, 0x103F, 6),
    "Khmer": (0x1780, 0x17D3, 6),
}


def prose(language: str, seed: int, sentences: int) -> list[str]:
    """Sentences of words that stand without spaces, out of 200 words, each ended by a full stop of its own."""
    start, end, length = LETTERS[language]
    words = ["".join(map(chr, random.Random(n).choices(range(start, end), k=length))) for n in range(200)]
    rng = random.Random(seed)
    return ["".join(rng.choices(words, k=9)) + "\u3002" for _ in range(sentences)]


def alike(one: str, other: str) -> bool:
    """Whether `other` is dropped where `one` is held out."""
    known = KnownPages()
    known.add(marks_of({"screenshot": b"1", "html": one}), is_held_out=True)
    try:
        known.check(marks_of({"screenshot": b"2", "html": other}), is_held_out=False)
    except BadPage as bad:
        return bad.reason == "like a held-out page"
    return False


@pytest.mark.parametrize("language", LETTERS)
@pytest.mark.parametrize("sentences", [10, 100])
def test_near_duplicates_are_found_in_scripts_without_spaces_and_no_others(language, sentences):
    page = "<html><body><h1>{}</h1><p>{}</p></body></html>"
    for seed in range(3):
        text, others = prose(language, seed, sentences), prose(language, 100 + seed, sentences)
        one = page.format(text[0], "".join(text))
        end = sentences - sentences // 10
        assert alike(one, page.format(text[0], "".join([*text[:end], *others[end:]])))  # 90 % are the same
        assert alike(one, page.format(text[0], "</p><p>".join([*text[:3], others[3], *text[4:]])))
        half = sentences // 2
        assert not alike(one, page.format(text[0], "".join([*text[:half], *others[half:]])))
        assert not alike(one, page.format(others[0], "".join(others)))
    assert not alike("<p>\u767b\u5f55</p>", "<p>\u767b\u5f55<b></b></p>")  # too little to tell pages apart


def test_chinese_pages_of_the_same_few_words_in_another_order_are_others():
    words = "企业 技术 发展 新闻 中心 联系 我们 产品 服务 客户".split()
    rng = random.Random(0)
    one, other = ("".join(rng.choices(words, k=150)) for _ in range(2))
    assert not alike(f"<p>{one}</p>", f"<p>{other}</p>")
    assert alike(f"<p>{one}</p>", f"<p>{one[:90]}{other[:15]}{one[105:]}</p>")
    assert alike(f"<p>AI {one} 2026</p>", f"<p>{one} and 3 words</p>")


def test_scripts_with_spaces_are_compared_by_words_as_before():
    """Korean as English: one word of eighty differs, or all of them stand in another order."""
    korean = "\ud68c\uc0ac \uae30\uc220 \ub274\uc2a4 \uace0\uac1d \uc81c\ud488 \uc9c0\uc6d0 \uc2dc\uc7a5".split()
    for words in (korean, "river stone amber cloud maple ember lake north".split()):
        rng = random.Random(0)
        text = rng.choices(words, k=80)
        other = [*text[:40], "\uc0c8\ub85c\uc6b4", *text[41:]]
        assert alike(f"<p>{' '.join(text)}</p>", f"<p>{' '.join(other)}</p>")
        assert not alike(f"<p>{' '.join(text)}</p>", f"<p>{' '.join(rng.choices(words, k=80))}</p>")
