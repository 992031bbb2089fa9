"""The training script as a user starts it: what is answered before anything heavy loads."""

import subprocess
import sys

from conftest import MAIN


def test_help_answers_without_torch(tmp_path):
    command = [sys.executable, "-X", "importtime", MAIN, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 0 and "--base_model" in done.stdout
    assert "training.settings" in loaded and not {"torch", "datasets", "deepspeed"} & loaded
