"""Call one function of the Hub rooms as a user's process would: argv[1] is JSON, [name, arguments].

Waiting is recorded instead of done; what the function returns or raises becomes the last line of stdout.
"""

import importlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

waits = []
time.sleep = waits.append

from training import errors, publishing  # noqa: E402 (time.sleep is replaced first)

name, arguments = json.loads(sys.argv[1])
arguments = [Path(word[5:]) if str(word).startswith("path:") else word for word in arguments]
answer = {"error": None, "value": None}
try:
    # The card's room loads all that scores, which would be more than half of this process's time.
    room = publishing if hasattr(publishing, name) else importlib.import_module("training.model_card")
    answer["value"] = getattr(room, name)(*arguments)
except (errors.SettingsError, errors.UploadError) as error:
    answer |= {"error": type(error).__name__, "message": str(error)}
print(json.dumps(answer | {"waits": waits}))
