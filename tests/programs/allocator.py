"""The training script, imported as it is run where NAME=VALUE, its arguments, say something to torch's allocator, or to
NCCL's streams: says what torch found in the environment when it was loaded, and what of that its allocator goes by. It
ends when torch is there, before what else takes seconds to load.
"""

import importlib.abc
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
found, NAMES = [], ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
PRIORITY = "TORCH_NCCL_HIGH_PRIORITY"


class Watcher(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            found.extend([{name: os.environ[name] for name in NAMES if name in os.environ}, os.environ[PRIORITY]])
        if name == "datasets":
            settings = sys.modules["torch"]._C._accelerator_getAllocatorSettings()
            print(found[0], settings, f"{PRIORITY}={found[1]}", sep="; ", flush=True)
            os._exit(0)


for name in (*NAMES, PRIORITY):
    os.environ.pop(name, None)
os.environ |= dict(argument.split("=", 1) for argument in sys.argv[1:])
sys.meta_path.insert(0, Watcher())
import holo1_dom_finetune  # noqa: E402, F401
