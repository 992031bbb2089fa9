"""Logs two steps of a training and waits for good, as does a child in a session of its own."""

import subprocess
import time

subprocess.Popen(["sleep", "600"], start_new_session=True)
print('STEP {"step": 1, "loss": 2.5}\nSTEP {"step": 2, "loss": 2.25}', flush=True)
time.sleep(600)
