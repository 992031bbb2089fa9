"""Every answer that has to end is a whole document within its limit, and what needs no help is not touched."""

import json
import random
from itertools import islice

import pytest
from conftest import ROOT, make_tokenizer, need_shared

import use_model_from_hub as use
from scoring.validity import looping, validity
from writing.endings import END, LIMIT, LOOP, Ending, Endings, Watch
from writing.token_bytes import token_bytes

BODY = "<!DOCTYPE html>\n<html><head><title>a</title></head><body>"
# What is begun here goes on with the second text until the limit comes.
ADVERSARIAL = {
    "nothing but a doctype": ("<!DOCTYPE html>", "\n"),
    "a doctype cut off": ("<!DOCT", ""),
    "an old doctype cut off": ('<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 ', "x "),
    "a comment before all": ("<!-- made by ", "hand > <html> "),
    "html alone": ("<html", ""),
    "html with attributes": ('<html lang="en" class="', "a b>"),
    "a head that goes on": ("<html><head>", '<meta name="a" content="b">\n'),
    "a title": ("<html><head><title>", "a <b> & "),
    "runaway CSS": ("<html><head><style>", ".a{color:red}\n.b>p{x:y}"),
    "CSS with a comment": ("<html><head><style>/* </styl ", "</ style> "),
    "CSS with growing numbers": ("<html><head><style>", "".join(f".a{n}{{top:{n}px}}" for n in range(300))),
    "an end tag of a style cut off": ("<html><head><style>a{}</sty", ""),
    "style in the body": (BODY + "<p>a</p><style media='x>y'>", "b{c:d}"),
    "a script": (BODY + "x<script>", "if (a < b && c > d) {}"),
    "a script in a script": (BODY + "x<script><!-- <script>", " a "),
    "a script's comment": (BODY + "x<script><!-- ", "</scrip "),
    "a script that writes tags": (BODY + "x<script>", 'document.write("<div></body></html>");'),
    "a script's tag cut off": (BODY + 'x<script src="', "a/"),
    "a comment": (BODY + "x<!-- ", "</body> -- > "),
    "a comment's end cut off": (BODY + "x<!-- a -", ""),
    "a comment's other end": (BODY + "x<!-- a --!", ""),
    "a comment barely begun": (BODY + "x<!-", ""),
    "a comment that is none": (BODY + "x<? a ", "b "),
    "CDATA in HTML": (BODY + "x<![CDATA[ ", "a ]] "),
    "CDATA in SVG": (BODY + "<svg><![CDATA[ ", "a > ]] "),
    "deep nesting": (BODY, "".join(f"<div class=c{n % 7}><span>" for n in range(300))),
    "deep nesting in words": (BODY, "<section>a<article>b "),
    "formatting that crosses": (BODY, "<p><b>a<i>b</p>c</b>"),
    "formatting that opens again": (BODY + "<p><b><i><u><s>a</p>", "x<p>"),
    "links in links": (BODY, "<a href='b'><div>c"),
    "a list without ends": (BODY + "<ul>", "<li>a<ul><li>b"),
    "terms without ends": (BODY + "<dl>", "<dt>a<dd>b<p>c"),
    "a table without tbody": (BODY + "<table>", "<tr><td>a<td>b"),
    "a table with text outside": (BODY + "<table><tr>", "a<b>c<td>"),
    "tables in tables": (BODY, "<table><caption>a<tbody><tr><th>"),
    "columns": (BODY + "<table><colgroup>", "<col span=2>"),
    "a select": (BODY + "<select><optgroup label=x>", "<option>a<div>"),
    "a select in a table": (BODY + "<table><tr><td><select>", "<option>b"),
    "a textarea": (BODY + "<form><textarea name=a>", "</div> </texta "),
    "a template": (BODY + "<template><div>", "<p>a"),
    "pre": (BODY + "<pre>", "    \n\n  a"),
    "attributes with a >": (BODY + "<p title='", 'a > b < c "'),
    "a quote without end": (BODY + '<p class="', "a></p></body></html> "),
    "an attribute without value": (BODY + "<input value=", ""),
    "an attribute without quotes": (BODY + "<a href=", "/a/b"),
    "many attributes": (BODY + "<div ", "".join(f"a{n}=b " for n in range(900))),
    "SVG": (BODY + "<svg viewBox='0 0 1 1'>", "<g><path d='M0 0'/><linearGradient>"),
    "HTML in SVG": (BODY + "<svg><foreignObject>", "<div><p>a"),
    "SVG that HTML breaks out of": (BODY, "<svg><g><p>a"),
    "MathML": (BODY + "<math>", "<mrow><mi>x<annotation-xml encoding='text/html'><b>"),
    "a character reference cut off": (BODY + "<p>a &am", ""),
    "a character cut off": (BODY + "<p>", "日本語"),
    "a body that ends too early": (BODY + "<div><p>a", "</body></html>"),
    "a form that ends too early": (BODY + "<form><object>a</form>", "b"),
    "html that ends too early": (BODY + "<section>a", "</html> "),
    "a document after its end": (BODY + "a</body></html>", "b <p>c"),
    "documents": ("", BODY + "<p>a</p></body></html>\n"),
    "plaintext": (BODY + "a<plaintext>", "b"),
    "frames": ("<html><frameset>", "<frame>"),
    "a button and objects": (BODY, "<button><object><marquee>a"),
    "noscript": ("<html><head><noscript>", "<link><style>a{}</style>"),
    "ruby": (BODY + "<ruby>", "a<rp>(<rt>b"),
    "names of one's own": (BODY, "<my-card-of-cards><li>a"),
    "tags in an angry mood": (BODY, "<P><DIV><<//></ ><B/>"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def qwen():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(need_shared("qwen_tokenizer"))


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def ending_of(tokenizer, ids: list[int], limit: int, block: int = 16) -> Ending | None:
    """What an answer that would be `ids` comes to."""
    watch, ids = Watch(tokenizer, limit), ids[:limit]
    blocks = (ids[start : start + block] for start in range(0, len(ids), block))
    return next((ending for ending in map(watch.feed, blocks) if ending), None)


def answer_of(tokenizer, ids: list[int], ending: Ending | None) -> str:
    return tokenizer.decode(ids if ending is None else ids[: ending.keep] + ending.tokens, skip_special_tokens=True)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_what_is_begun_ends_as_a_whole_document_within_its_limit(tokenizer, name):
    begin, more = ADVERSARIAL[name]
    written = ids_of(tokenizer, (begin + (more or "a ") * 400)[:3_000])[:400]
    for limit in (90, 131, 200, 333):
        ending = ending_of(tokenizer, written, limit)
        assert ending is not None and ending == ending_of(tokenizer, written, limit, block=1)
        assert ending.keep + len(ending.tokens) <= limit
        html = answer_of(tokenizer, written, ending)
        assert validity(html).valid and html.endswith("</html>"), (limit, html, validity(html).reason)
    assert ending.keep + len(ending.tokens) > 333 - 24 or ending.reason != LIMIT  # and not long before it


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_a_document_that_the_model_left_open_is_closed(tokenizer, name):
    watch = Watch(tokenizer, 2_000)
    written = ids_of(tokenizer, ADVERSARIAL[name][0] or BODY)
    ending = watch.feed(written) or watch.ended()
    if "<html" not in answer_of(tokenizer, written, None):
        assert ending is None  # as the model wanted it
    elif not validity(answer_of(tokenizer, written, None)).valid:
        html = answer_of(tokenizer, written, ending)
        assert ending.reason == END and validity(html).valid, html


def demo_pages(count: int) -> list[str]:
    with (ROOT / "demo" / "pages" / "metadata.jsonl").open() as lines:
        return [json.loads(line)["text"].strip() for line in islice(lines, count)]


def test_a_whole_page_is_not_touched_at_any_limit_that_holds_it(tokenizer):
    pages = [*demo_pages(8), BODY + "<ul><li>a<li>b</ul><table><tr><td>c</table><p>d</body></html>"]
    pages += [BODY + "<div><!-- > --><p>a</p></div><svg><path/></svg></body></html>\n"]
    for ids in (ids_of(tokenizer, page) for page in pages):
        for limit in (len(ids), len(ids) + 1, len(ids) + 7, len(ids) + 40, 4_096):
            for block in (1, 16):
                watch = Watch(tokenizer, limit)
                assert not any(watch.feed(ids[start : start + block]) for start in range(0, len(ids), block))
                assert watch.ended() is None
        # Nor longer than it has to: with one token less it goes on as far as it can.
        assert ending_of(tokenizer, ids, len(ids) - 1).reason == LIMIT


def test_real_pages_are_never_cut_as_loops_and_end_well_wherever_the_limit_is(qwen):
    pages = [path.read_text(encoding="utf-8").strip() for path in sorted(need_shared("pages").glob("*/clean.html"))]
    assert len(pages) == 74
    for number, page in enumerate(pages):
        ids = ids_of(qwen, page)
        assert ending_of(qwen, ids, 32_768) is None  # patience is the same at every prefix: it looks as it goes
        if len(ids) < 4_000:
            assert ending_of(qwen, ids, len(ids)) is None
            limit = 100 + (len(ids) - 100) * (number % 7) // 8
            html = answer_of(qwen, ids, ending_of(qwen, ids, limit))
            assert validity(html).valid, html[-200:]


REPEATED = {  # what comes over and over, and what is left of it
    "nested": (BODY + "<p>a</p>", "<div>", 300),
    "nested over lines": (BODY, '<div class="a">\n', 300),
    "nested and numbered": (BODY + "a", "<div id=n{}>", 300),
    "a rule": ("<html><head><style>b{c:d}", ".a{color:red;margin:0}\n", 400),
    "numbered rules": ("<html><head><style>", ".a{}{{color:red}}\n", 600),
    "a paragraph": (BODY, "<p>river stone amber cloud maple ember lake north</p>\n", 200),
    "a word": (BODY + "<p>", "river, stone, ", 800),
    "in an attribute": (BODY + "a<p class='", "a-b c ", 800),
    "a document": ("", BODY + "river</body></html>\n", 200),
}


@pytest.mark.parametrize("name", REPEATED)
def test_a_loop_is_cut_where_it_began(qwen, name):
    begin, piece, copies = REPEATED[name]
    pieces = [piece.format(number) if "numbered" in name else piece for number in range(copies)]
    ids = ids_of(qwen, begin + "".join(pieces))
    ending = ending_of(qwen, ids, 16_384)
    assert ending.reason == LOOP and ending == ending_of(qwen, ids, 16_384, block=1)
    html = answer_of(qwen, ids, ending)
    assert validity(html).valid and not looping(html), html
    kept = answer_of(qwen, ids[: ending.keep], None)
    assert len(begin) < len(kept) <= len(begin) + 1.5 * len(pieces[0]) + 1, kept[-60:]


SPARED = {
    "rows": BODY + "<table>" + "<tr><td>1</td><td>2</td></tr>" * 100 + "</table></body></html>",
    "items": BODY + "<ul>" + "<li>river</li>" * 250 + "</ul></body></html>",
    "options": BODY + "<select>" + "".join(f"<option>{year}</option>" for year in range(1900, 2027)) + "</select>",
    "cards": BODY + "<div class='card'><h3>river</h3><p>stone amber cloud</p><a href='#'>more</a></div>" * 28,
    "declarations": "<html><style>a{" + "color:red;" * 200,
    "base64": BODY + "<img src='data:image/png;base64," + "A" * 6_000 + "'>",
    "white space": BODY + "<pre>" + " \n" * 1_000 + "</pre>",
    "numbers": BODY + "<svg><path d='" + "".join(f"M{n * n % 97} {n * 31 % 89} " for n in range(400)) + "'/></svg>",
}


@pytest.mark.parametrize("name", SPARED)
def test_what_pages_repeat_is_spared(qwen, name):
    assert ending_of(qwen, ids_of(qwen, SPARED[name]), 32_768) is None


def test_how_many_tokens_come_at_once_does_not_matter(tokenizer):
    """Of any string of tags and of where it is cut."""
    rng, pieces = random.Random(0), [piece for pair in ADVERSARIAL.values() for piece in pair]
    pieces = [piece[:40] for piece in pieces if piece] + ["<frameset>", "</div>", "</p>", "</b></table>", "a ", "-->"]
    for number in range(60):
        begin = rng.choice(["", "<", "Here: ", BODY, BODY, "<html><head>"])
        ids = ids_of(tokenizer, begin + "".join(rng.choices(pieces, k=30)))
        limit = rng.choice([30, 60, 150, 400])
        one, *others = (ending_of(tokenizer, ids, limit, block) for block in (1, 3, 16, 64))
        assert others == [one] * 3, (number, tokenizer.decode(ids))
        if one is not None and one.tokens:
            html = use.extract_html(answer_of(tokenizer, ids, one))
            assert one.keep + len(one.tokens) <= limit and validity(html).valid, html


def test_words_without_a_document_are_left_alone(tokenizer):
    for text in ("I am sorry, I see no page here. ", "Use <b> and <i> for that: "):
        ids = ids_of(tokenizer, text * 3)
        assert ending_of(tokenizer, ids, len(ids) - 20) is None
    ids = ids_of(tokenizer, BODY + "<p>river</p></body></html>")
    assert ending_of(tokenizer, ids, 12) is None  # no document has room there


def test_a_document_among_words_and_in_a_fence_is_closed_where_it_is_taken_out(tokenizer):
    page = "<html><body><p>river</p><div>stone"
    for before in ("Here it is:\n```html\n", "Here it is: "):
        ids = ids_of(tokenizer, before + page + " amber" * 200)
        html = use.extract_html(answer_of(tokenizer, ids, ending_of(tokenizer, ids, 100)))
        assert validity(html).valid and html.startswith(page)
    said = before + page + "</div></body></html>\n\nThis page shows a river. " * 2
    assert ending_of(tokenizer, ids_of(tokenizer, said), len(ids_of(tokenizer, said))) is None


def test_the_fewest_tokens_spell_a_text(tokenizer):
    words = token_bytes(tokenizer)
    for text in ("</p></body></html>", "</my-card></div>\u2026", ""):
        ids = list(words.spell(text))
        assert tokenizer.decode(ids) == text and len(ids) <= len(ids_of(tokenizer, text))
    assert words.join([tokenizer.eos_token_id, 10**6, *words.spell("a")]) == b"a"


class Dictated:
    """A logits processor that has the rows written which it was given, and then the end token."""

    def __init__(self, rows: list[list[int]], end: int):
        self.rows, self.end, self.start = rows, end, None

    def __call__(self, input_ids, scores):
        self.start = input_ids.shape[1] if self.start is None else self.start
        place = input_ids.shape[1] - self.start
        scores = scores.new_full(scores.shape, -1.0)
        for row, ids in enumerate(self.rows):
            scores[row, ids[place] if place < len(ids) else self.end] = 1.0
        return scores


def test_generate_writes_what_is_made_of_an_answer_afterwards(tiny_base, monkeypatch):
    from PIL import Image

    recipe = use.Recipe(max_pixels=56 * 56, max_html_tokens=500)
    model, processor = use.load_model(str(tiny_base), recipe)
    tokenizer = processor.tokenizer
    texts = [
        BODY + "<p>river</p></body></html>",
        BODY + "<div><p>river",
        BODY + "<div>" * 200,
        BODY + "<ul>" + "".join(f"<li>river <b>{number * number}" for number in range(90)),
        BODY + "<div><p>river</p></body></html>",
        "I am sorry.",
    ]
    rows = [ids_of(tokenizer, text) for text in texts]
    monkeypatch.setattr(use, "logits_processors", lambda recipe: [Dictated(rows, tokenizer.eos_token_id)])
    pictures = [Image.new("RGB", (56, 56), "white")] * len(rows)
    pages = use.write_pages(model, processor, pictures, recipe, endings=Endings)
    reasons = []
    for page, ids in zip(pages, rows):
        watch = Watch(tokenizer, recipe.max_html_tokens)
        ending = watch.feed(ids[: recipe.max_html_tokens]) or watch.ended()
        reasons.append(ending and ending.reason)
        assert page.raw == answer_of(tokenizer, ids, ending) and page.tokens <= recipe.max_html_tokens
        assert (page.cut_off, page.looped) == (reasons[-1] == LIMIT, reasons[-1] == LOOP)
        assert page.closing_tokens == (len(ending.tokens) if ending else 0)
        assert validity(page.html).valid or page is pages[-1]
    assert reasons == [None, END, LOOP, LIMIT, END, None]
    plain = use.write_pages(model, processor, pictures, recipe)
    assert [plain[place] == pages[place] for place in (0, 5)] == [True, True]
