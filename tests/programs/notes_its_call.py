"""Stands for what tries kernels: adds a word to the file that it is told, or fails where its name is in FAILS."""

import os
import sys
import time

assert os.environ["TRITON_CACHE_AUTOTUNING"] == "1" and "RANK" not in os.environ
if "FAILS" in os.environ:
    raise SystemExit("no such shape")
time.sleep(0.3)
with open(sys.argv[1], "a") as file:
    file.write("tried ")
