"""The real main, whose files may not grow beyond 4 KB from the checkpoint of step FULL_AT on: torch.save and
safetensors then raise what they raise on a full disk, but for the number of the error (EFBIG)."""

import os
import resource
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import holo1_dom_finetune as pipeline

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = pipeline.PageTrainer._save_checkpoint


def save_with_little_space(self, *arguments):
    if self.state.global_step >= int(os.environ["FULL_AT"]):
        self.checkpoints.join()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    save(self, *arguments)


pipeline.PageTrainer._save_checkpoint = save_with_little_space
pipeline.leave(pipeline.main(sys.argv[1:]))
