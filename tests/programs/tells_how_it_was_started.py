"""Say as JSON what a script sees of its start, a rank into a file `seen-<rank>`; then end as argv[1] says: a code,
`raises`, or `waits`."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy

seen = {"arguments": sys.argv, "name": __name__, "folder": os.getcwd(), "path": sys.path[0], "command": sys.orig_argv}
seen |= {"environment": {**os.environ}, "main": sys.modules["__main__"].__dict__ is globals()}
seen |= {"interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler, "chance": numpy.random.rand()}
seen |= {"open": sorted(int(name) for name in os.listdir("/proc/self/fd"))[:-1]}
told = json.dumps(seen)
if "RANK" in os.environ:  # two ranks may write into one line
    Path(f"seen-{os.environ['RANK']}").write_text(told)
else:
    print(told, flush=True)
if sys.argv[1] == "raises":
    raise ValueError("as asked")
if sys.argv[1] == "waits":
    time.sleep(300)
sys.exit(int(sys.argv[1]))
