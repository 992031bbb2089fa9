"""Broken, too long and repeated pages are found, and no others."""

import io
import os
import random

import pytest
from small_pages import dropped, good_pages, header_bomb, load, page_html, picture, write_folder

from training.dataset import (
    BadPage,
)
from training.page_checks import screenshot_size


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
        "the dataset ended after 71 pages"
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
