"""Rows of text files: each by its number, none of which harms another."""

import csv
import io
import json

import pytest

from training.dataset import BadPage
from training.errors import DataError
from training.tables import open_table


def rows_of(data: bytes, kind: str) -> list[object]:
    """Each row, or the beginning of what is wrong with it, the last one first: rows are found by their numbers."""
    table, found = open_table(io.BytesIO(data), kind), {}
    for number in reversed(range(len(table))):
        try:
            found[number] = table.row(number)
        except BadPage as bad:
            found[number] = str(bad).partition(":")[0]
    return [found[number] for number in sorted(found)]


def test_lines_of_json_and_lists_of_it():
    lines = [b'{"a": 1}', b"", b"[1]", b'{"a": ', b'{"a": "\xff"}', b"[" * 100_000, '{"a": "\u4e2d"}'.encode()]
    expected = [{"a": 1}, None, "no JSON object but list", "no JSON object", "no JSON object", "no JSON object"]
    assert rows_of(b"\xef\xbb\xbf" + b"\r\n".join(lines), "jsonl") == [*expected, {"a": "\u4e2d"}]
    assert rows_of(b"\n".join(lines), "json") == [*expected, {"a": "\u4e2d"}]
    assert rows_of(b' [{"a": 1},\n 7, {"a": ["x"]}]', "json") == [{"a": 1}, "no JSON object but int", {"a": ["x"]}]
    assert rows_of(b'[{"a": 1}, {"a": 2}]', "json") == rows_of(b'{"v": 1, "d": [{"a": 1}, {"a": 2}]}', "json")
    assert (
        rows_of(b'{\n"a": 1,\n"b": ["x"]}', "json")
        == [{"a": 1, "b": ["x"]}]
        == rows_of(b'{"a": 1, "b": ["x"]}', "json")
    )
    assert rows_of(b"", "jsonl") == rows_of(b"", "json") == []
    with pytest.raises(DataError, match="neither a JSON object a line nor a list of them"):
        open_table(io.BytesIO(b'[{"a": 1}, '), "json")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_csv_with_pages_of_many_lines(delimiter, ends):
    pages = ["<p>\n\n</p>", 'a "quoted" \r\n<b>', "", "x" * 200_000, "1", "\u4e2d;,\t"]
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=ends)
    writer.writerows([["file_name", "text"], *([f"{n}.png", page] for n, page in enumerate(pages))])
    data = ("\ufeff" + text.getvalue()).encode()
    assert rows_of(data, "csv") == [{"file_name": f"{n}.png", "text": page} for n, page in enumerate(pages)]


def test_a_bad_line_of_csv_is_told_and_harms_no_other():
    data = b"file_name,text\na.png,b,c\nb.png,\xff\n\nx\ry,z\nc.png,<p>\n"
    bad, latin, blank, return_, good = rows_of(data, "csv")
    assert (bad, blank, return_) == ("3 values for 2 columns", None, "no CSV")
    assert latin == {"file_name": "b.png", "text": "\udcff"} and good == {"file_name": "c.png", "text": "<p>"}
    assert rows_of(b"", "csv") == rows_of(b"a,b\n", "csv") == []


def test_places_are_told_as_an_editor_finds_them():
    data = json.dumps({"a": 1}).encode() + b"\n{}\n"
    assert open_table(io.BytesIO(data), "jsonl").place(1) == "byte 9"
