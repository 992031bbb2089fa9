"""Asks a server for four pages and gets a Ctrl-C half a second later."""

import os
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from PIL import Image

import use_model_from_hub as use
from writing.server import Server

requests = [use.Request(place, lambda: Image.new("RGB", (56, 56))) for place in range(4)]
answers = Server(sys.argv[1], use.Recipe()).write(requests)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    print(list(answers))
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
