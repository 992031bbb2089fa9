"""The training script, imported as it is run, which says what torch found in the environment when it was loaded."""

import importlib.abc
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
found = []


class Watcher(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            found.append(os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))


os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)
sys.meta_path.insert(0, Watcher())
import holo1_dom_finetune  # noqa: E402, F401

print(found)
