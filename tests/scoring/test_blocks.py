"""Blocks by rendering: where each text stands and in which colour."""

import pytest

from scoring import renders
from scoring.blocks import job_for, page_of
from scoring.metrics import compare

WHITE = "<!DOCTYPE html>\n<html><head><title>t</title></head><body>{}</body></html>\n"


def test_a_block_is_where_its_text_is_and_has_its_colour(renderer):
    body = (
        '<p style="position:absolute;left:100px;top:200px;margin:0;color:#f00">Hello</p>'
        '<div style="position:absolute;left:0;top:400px;background:#000;color:#0f0">Second <b>text</b></div>'
    )
    page = page_of(renderer.render(job_for(WHITE.format(body), 1000, 500)), WHITE.format(body))
    assert [block.text for block in page.blocks] == ["hello", "second", "text"]
    first = page.blocks[0]
    assert first.x == pytest.approx(0.1, abs=0.003) and first.y == pytest.approx(0.405, abs=0.02)
    assert first.color[0] > 200 and max(first.color[1:]) < 120
    assert page.blocks[1].color[1] > 100 > page.blocks[1].color[0]
    assert {"html(head, body)", "div(b)"} <= page.subtrees


def test_texts_of_one_element_are_one_block_and_unseen_text_is_none(renderer):
    body = "<p>one <br> two</p><script>three</script><style>p{}</style><p style='display:none'>four</p>five"
    page = page_of(renderer.render(job_for(WHITE.format(body))), WHITE.format(body))
    assert [block.text for block in page.blocks] == ["one two"], "text directly in the body is not seen, by definition"


def test_a_forms_field_cannot_stand_in_for_the_document(renderer):
    fields = "".join(f"<input name={name}>" for name in ("style", "parentNode", "children", "body", "querySelectorAll"))
    body = f"<form name=body><p>inside</p>{fields}</form><img name=querySelectorAll><form name=createTreeWalker></form>"
    page = page_of(renderer.render(job_for(WHITE.format(body))), WHITE.format(body))
    assert page.failure is None and [block.text for block in page.blocks] == ["inside"]


def test_more_texts_than_colours_are_told_apart(renderer):
    body = "<div style='font:bold 14px sans-serif'>" + "".join(f"<span>{n}</span> " for n in range(4200)) + "</div>"
    job = job_for(WHITE.format(body))
    assert sum(step == renders.SHOT for step in job.steps) == 6, "one as it is, one without texts, two passes"
    page = page_of(renderer.render(job), WHITE.format(body))
    assert len(page.blocks) > 4100


def test_texts_that_cannot_be_told_apart_are_a_failure_and_not_forgotten(renderer):
    """Browsers repeat formatting that is left open in each paragraph: 1,504 tags become 6,004 elements."""
    html = WHITE.format("<p><b class=a><b class=b><b class=c>0" + "".join(f"<p>{n}" for n in range(1, 1501)))
    page = page_of(renderer.render(job_for(html)), html)
    assert "text elements, more than colours" in page.failure
    assert compare(page, page)["overall"] == 0
