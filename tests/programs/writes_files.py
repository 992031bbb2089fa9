"""Write files of 4 MB by each library that training saves with, in the folder argv[1], where a file may hold 1 MB.

What is raised on the way is printed, one line of JSON a library: its name, the error's class, the exit code.
"""

import json
import resource
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save_file

from training.errors import exit_code

folder = Path(sys.argv[1])
weights, rows = torch.randn(1_000_000), pyarrow.table({"x": torch.randn(1_000_000).numpy()})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as a full disk does, the write itself fails then
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
for name, write in {
    "torch": lambda: torch.save({"weights": weights}, folder / "weights.pt"),
    "safetensors": lambda: save_file({"weights": weights}, folder / "weights.safetensors"),
    "pyarrow": lambda: pyarrow.parquet.write_table(rows, folder / "rows.parquet", compression="none"),
    "python": lambda: (folder / "rows.json").write_text("x" * 4_000_000),
}.items():
    try:
        write()
    except Exception as error:
        print(json.dumps([name, type(error).__name__, exit_code(error)]), flush=True)
