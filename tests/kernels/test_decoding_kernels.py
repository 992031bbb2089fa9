"""Starts tests/kernels/interpreted.py in a process of its own: what Triton brings with it is interpreted only where
that was asked for before Triton was loaded, as it has been here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
def test_the_kernels_of_a_decoding_step():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        Path(__file__).with_name("interpreted.py"),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0 and re.search(r"\b68 passed", done.stdout), done.stdout + done.stderr
