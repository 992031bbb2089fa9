"""Download the Hub's argv[1] into the folder argv[2], with nothing but huggingface_hub."""

import sys

from huggingface_hub import snapshot_download

snapshot_download(sys.argv[1], local_dir=sys.argv[2])
