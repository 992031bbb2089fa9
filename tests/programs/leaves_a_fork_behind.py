"""Fork a process that waits, say its id, and die as nobody can prepare for."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import warm

null = os.open(os.devnull, os.O_WRONLY)
script = str(Path(__file__).with_name("tells_how_it_was_started.py"))
process = warm.neutral().ask(
    [null, null], script=script, arguments=["waits"], folder="/", environment=warm.usual_environment()
)
print(process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
