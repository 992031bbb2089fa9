"""Load the Hub's user/tiny and the folder argv[1] with nothing but transformers: the same keys and weights."""

import sys

from transformers import AutoModelForImageTextToText, AutoProcessor

folder, name = (AutoModelForImageTextToText.from_pretrained(place) for place in (sys.argv[1], "user/tiny"))
there = name.state_dict()
assert there.keys() == folder.state_dict().keys()
assert all(there[key].equal(value) for key, value in folder.state_dict().items())
assert AutoProcessor.from_pretrained("user/tiny").chat_template
