"""The real main, which waits before its first step until the file of the first argument is there."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import holo1_dom_finetune as pipeline

go, *flags = sys.argv[1:]
train = pipeline.train


def wait_and_train(*arguments):
    print("waiting", flush=True)
    while not Path(go).exists():
        time.sleep(0.1)
    return train(*arguments)


pipeline.train = wait_and_train
pipeline.leave(pipeline.main(flags))
