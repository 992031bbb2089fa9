"""Steps in the browser: a function of a file, asked with JSON."""

import json

from making.browser_steps import source, step


def test_options_arrive_whatever_they_hold():
    options = {"grey": "</script> ' \" ` ${x} \\ \u2028 %s", "limit": 3, "gone": None, "pairs": [["a", "b"]]}
    text = step("cut", **options)
    assert text.startswith("() => (") and text.endswith(")")
    assert json.loads(text.removeprefix(f"() => ({source('cut')})(")[:-1]) == options
