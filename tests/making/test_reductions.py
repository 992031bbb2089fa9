"""Reductions: what goes when the browser has said what matches."""

import itertools

from making.reductions import Draft, compose, draft_of, reducible_items, sheet_texts, without_attributes


def draft(css: str, html: str = "<html><body></body></html>", **answers) -> Draft:
    made = draft_of({"doctype": "<!DOCTYPE html>", "quirks": False, "html": html, "sheets": [[css, ""]]})
    made.spaced = made.plain
    for name, value in answers.items():
        setattr(made, name, value)
    return made


def reduced(css: str, **answers) -> str:
    made = draft(css, **answers)
    return sheet_texts(made, set(itertools.chain(*reducible_items(made))))[0]


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


def test_attributes_that_no_rule_names_go():
    html = '<a href="https://x/y" class="k u" id="i" data-x="1" aria-label="l" title="">t</a><use href="#i"></use>'
    names = {"class", "id", "href", "data-x", "aria-label", "title"}
    assert without_attributes(html, ".k{}[aria-label]{}", names) == (
        '<a href="#" class="k" id="i" aria-label="l">t</a><use href="#i"></use>'
    )


def test_dropped_elements_leave_their_replacement_and_kept_ones_lose_their_marks():
    html = "<html><body><!--drop 0--><i></i><!--/drop 0--><p></p><!--drop 1--><b>unseen</b><!--/drop 1--></body></html>"
    made = draft("", html, replacements=["", "<b></b>"])
    assert compose(made, {("element", 1)}) == "<!DOCTYPE html>\n<html><body><i></i><p></p><b></b></body></html>\n"
    assert compose(made, {("element", 0)}) == "<!DOCTYPE html>\n<html><body><p></p><b>unseen</b></body></html>\n"
