"""Steps in the browser: a function of a file, asked with JSON."""

import json

from making.browser_steps import FOLDER, step
from scoring.renders import script


def test_options_arrive_whatever_they_hold():
    options = {"grey": "</script> ' \" ` ${x} \\ \u2028 %s", "limit": 3, "gone": None, "pairs": [["a", "b"]]}
    text = step("cut", **options)
    before, after = f"() => (\n{script('cut', FOLDER)})(", f", (\n{script('dom')})())"
    assert text.startswith(before) and text.endswith(after)
    assert json.loads(text.removeprefix(before).removesuffix(after)) == options
