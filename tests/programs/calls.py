"""Call a function of a test file in a process of its own: argv is the file, the function, its arguments as JSON."""

import importlib.util
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

file, name, arguments = sys.argv[1:]
spec = importlib.util.spec_from_file_location(Path(file).stem, file)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
getattr(module, name)(*json.loads(arguments))
