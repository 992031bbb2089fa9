"""Decoding: what is declared is read as browsers read it; what is not is read rightly, or dropped by name."""

import pytest

from making.decoding import decode_page, decode_sheet
from making.drops import PageDropped

TEXTS = {  # of everyday words, in the encodings that their readers' pages are in, as Python calls them
    "Погода в Москве сегодня хорошая, и мы пошли гулять в парк вместе с друзьями.": "koi8-r cp1251 iso8859-5 cp866",
    "Pogoda w Warszawie jest dziś ładna, więc poszliśmy na spacer. Zażółć gęślą jaźń.": "iso8859-2 cp1250",
    "Počasí v Praze je dnes pěkné, šli jsme na procházku. Příliš žluťoučký kůň úpěl.": "iso8859-2 cp1250",
    "Le temps à Paris est très agréable, où êtes-vous, garçon ? La forêt était brûlée.": "cp1252 mac-roman",
    "Das Wetter in München ist schön, über die Brücke führt eine große Straße.": "cp1252",
    "Bugün hava çok güzel, şemsiyenizi alın. İstanbul'da yağmur yağacağı söyleniyor.": "cp1254",
    "Ο καιρός στην Αθήνα είναι σήμερα καλός, γι' αυτό πήγαμε βόλτα στο πάρκο.": "cp1253 iso8859-7",
    "מזג האוויר בתל אביב היום נעים, ולכן הלכנו לטייל בפארק עם חברים.": "cp1255",
    "الطقس في القاهرة اليوم جميل، لذلك ذهبنا للتنزه في الحديقة مع الأصدقاء.": "cp1256",
    "วันนี้อากาศที่กรุงเทพดีมาก เราจึงไปเดินเล่นในสวนสาธารณะกับเพื่อน": "cp874",
    "今天北京天气很好，我们和朋友一起去公园散步。明天可能会下雨，请带上雨伞。": "gb18030",
    "今天台北天氣很好，我們和朋友一起去公園散步。明天可能會下雨，請帶上雨傘。": "big5",
    "今日の東京は天気がとても良いので、公園を散歩しました。傘を持って行ってください。": "cp932 euc_jp iso2022_jp",
    "오늘 서울의 날씨가 매우 좋아서 친구들과 함께 공원에서 산책을 했습니다.": "cp949",
}
CASES = [(text, codec) for text, codecs in TEXTS.items() for codec in codecs.split()]
PAGE = "<!DOCTYPE html><html><head>{}<title>t</title></head><body><p>{}</p></body></html>"


def test_undeclared_encodings_are_read_rightly_or_dropped_by_name(renderer):
    read = 0
    for text, codec in CASES:
        page = PAGE.format("", text)
        try:
            assert decode_page(page.encode(codec), renderer)[0] == page, codec
            read += 1
        except PageDropped as dropped:
            assert dropped.reason == "encoding"
    assert read > 0.7 * len(CASES)
    with pytest.raises(PageDropped) as dropped:
        decode_page(b"<p>\xe9", renderer)  # one character says nothing
    assert dropped.value.reason == "encoding"
    assert decode_page("<p>é".encode(), None) == ("<p>é", "utf-8")
    unknown = "<meta charset=utf-32><p>é"
    assert decode_page(unknown.encode(), None) == (unknown, "utf-8")


@pytest.mark.parametrize(
    ("label", "data", "text"),
    [
        ("iso-8859-1", b"\x80 \x93", "€ “"),  # Windows-1252
        ("ascii", b"\xe9", "é"),
        ("gb2312", b"\xe9F \x80", "镕 €"),  # GBK, and its euro
        ("gbk", b"\x81\x30\x81\x30", "\x80"),  # GB18030
        ("x-gbk", b"\xe9F", "镕"),
        ("shift_jis", b"\x87@ \x81` \xfb\xfc", "① ～ 髙"),  # Windows-31J
        ("x-sjis", b"\xed\x40", "纊"),
        ("euc-jp", b"\xad\xa1 \xa1\xc1", "① ～"),
        ("ks_c_5601-1987", b"\xb0\xa1 \x81\x41", "가 갂"),  # Windows-949
        ("euc-kr", b"\x81\x41", "갂"),
        ("big5", b"\xa1\x45 \xf9\xd6 \x87\x40", "‧ 碁 䏰"),  # with Hong Kong's characters
        ("tis-620", b"\xa1", "ก"),
        ("iso-8859-9", b"\x80\xfd", "€ı"),
        ("x-user-defined", b"\xe9", "é"),
        ("utf-16", "é".encode(), "é"),  # what could be read as far as here is no UTF-16
        ("unicode-1-1-utf-8", "é".encode(), "é"),
        ("utf-8", b"long enough to forgive " * 9 + b"\xff", "long enough to forgive " * 9 + "\ufffd"),
        ("iso-2022-jp", b'\x1b$B$"\x1b(B', "あ"),
    ],
)
def test_declared_encodings_are_read_as_browsers_do(renderer, label, data, text):
    for declared in (
        f"<meta charset={label}>",
        f'<META http-equiv="Content-Type" content="text/html; CHARSET={label}">',
    ):
        head, tail = PAGE.format(declared, "|").split("|")
        assert decode_page(head.encode() + data + tail.encode(), renderer)[0] == head + text + tail


def test_declarations_are_found_where_browsers_find_them(renderer):
    text = "Погода в Москве"
    for head in (
        '<?xml version="1.0" encoding="koi8-r"?><html><p>',
        "<!-- <meta charset=utf-8> --><meta charset=koi8-r><p>",
        "<head><style>" + "a{b:c}" * 400 + "</style><meta charset=koi8-r></head><p>",
        "<meta charset=no-such-name><meta charset='koi8-r'><p>",
    ):
        assert decode_page(head.encode() + text.encode("koi8-r"), renderer)[0] == head + text
    xml = '<?xml version="1.0" encoding="iso-8859-2"?><p>Zażółć</p>'
    assert decode_page(xml.encode("iso8859-2"), renderer, xml=True)[0] == xml
    for mark, codec in ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"), (b"\xef\xbb\xbf", "utf-8")):
        assert decode_page(mark + "<meta charset=koi8-r><p>é".encode(codec), renderer)[0] == "<meta charset=koi8-r><p>é"


@pytest.mark.parametrize(
    "page",
    [
        b"<meta charset=hz-gb-2312><p>x",  # browsers refuse it
        "<meta charset=iso-8859-1><p>Ça va là-bas, où êtes-vous ?".encode(),
        "<meta charset=gb2312><p>Погода в Москве сегодня хорошая".encode(),
        "<meta charset=gbk><p>今天天气很好，我们去公园散步".encode(),
        "<meta charset=utf-8><p>Погода в Москве сегодня хорошая".encode("cp1251"),
        "<!DOCTYPE html><html><head><title>276</title></head><body><p>Dvořák</p></body></html>".encode("iso8859-2"),
        b'<p>\x1b$B$"\x1b(B',  # which a browser would show as it stands
    ],
    ids=[
        "refused",
        "utf-8 as another",
        "utf-8 as gbk",
        "chinese utf-8 as gbk",
        "another as utf-8",
        "two scripts in a word",
        "escapes",
    ],
)
def test_what_declares_a_wrong_encoding_is_dropped_by_name(renderer, page):
    with pytest.raises(PageDropped) as dropped:
        decode_page(page, renderer)
    assert dropped.value.reason == "encoding"


def test_style_sheets_are_read_by_mark_by_charset_and_as_their_page(renderer):
    css = ".中{color:red}"
    assert decode_sheet(css.encode(), "utf-8", None) == (css, "utf-8")
    assert decode_sheet(f'@charset "gb2312";{css}'.encode("gbk"), "utf-8", renderer)[0].endswith(css)
    assert decode_sheet(b"\xff\xfe" + css.encode("utf-16-le"), "gbk", renderer) == (css, "utf-16le")
    assert decode_sheet(css.encode("big5"), "big5", renderer) == (css, "big5")
    assert decode_sheet(b"\xef\xbb\xbf" + css.encode(), "big5", renderer) == (css, "utf-8")
    assert decode_sheet(f'@charset "utf-16";{css}'.encode(), "gbk", renderer)[0].endswith(css)
