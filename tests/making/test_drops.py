"""Why a page was left out: a closed list of reasons, each with words for the summary."""

import ast

import pytest
from conftest import ROOT, tracked_files

from making.drops import REASONS, PageDropped


def raised_reasons() -> set[str]:
    """The first argument of every PageDropped that the rooms of making/ raise."""
    calls = [
        node
        for name in tracked_files("making/*.py")
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "PageDropped"
    ]
    return {call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)}


def test_a_dropped_page_carries_its_reason_and_says_more():
    with pytest.raises(PageDropped, match=r"^every pixel has the same colour$") as dropped:
        raise PageDropped("blank", "every pixel has the same colour")
    assert dropped.value.reason == "blank"


def test_every_reason_that_a_room_gives_is_in_the_list():
    assert {"unreadable", "empty"} <= raised_reasons() <= set(REASONS)


def test_the_summarys_words_tell_the_reasons_apart():
    assert len(set(REASONS.values())) == len(REASONS) and all(REASONS.values())
