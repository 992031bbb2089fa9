"""Load the dataset argv[1] by its name alone, with `datasets` and as the training reads it, and print what is in it."""

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import datasets

from training.dataset import known_dataset
from training.reading import read_pages

name = sys.argv[1]
loaded = datasets.load_dataset(name, split="train")
rows = [{"size": row["image"].size, **{key: row[key] for key in row.keys() - {"image"}}} for row in loaded]
trained = {html: hashlib.sha256(picture).hexdigest() for _, picture, html in read_pages(name, known_dataset(name), 0)}
print(json.dumps({"rows": rows, "trained": trained}))
