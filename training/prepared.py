"""Pages that an earlier run has prepared: found again by everything that decides what they are.

    wanted = describe(settings, datasets, seed, counting, apart=[output_dir])
    with claimed(pages_dir, wanted) as prepared:        # (one process of each disk) waits while another run is at it
        load_pages(settings, output_dir, count_tokens, seed, pool, place=prepared.folder)
        prepared.note(fingerprint)

A folder here is named by the SHA-256 of that description, which lies in it. What was prepared by half is gone on with.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import use_model_from_hub as use
from training.folder_lock import alone_in
from training.mixture import AskedDataset

DONE, DESCRIPTION = "prepared.json", "description.json"
# Whoever changes one of these has other pages; packages that decode, count and shuffle, too.
ROOMS = "cleaning collecting containers dataset duplicates mixture page_checks page_store page_workers reading".split()
ROOMS += ["tables"]
COUNTING = ["training/prompt_and_mask.py", "families/*.py"]  # how tokens are counted, which pages hold, too
PACKAGES = ("datasets", "pillow", "tokenizers", "transformers")
PICTURES = {".png", ".jpg", ".jpeg", ".webp"}


def describe(
    settings: Any, datasets: Sequence[AskedDataset], seed: int, counting: str, apart: Sequence[str | Path]
) -> dict[str, Any]:
    """All that decides which pages come out, as JSON: `counting` stands for tokenizer and image sizes. The revision of
    a Hub dataset must be a commit; of local files names, sizes and times stand for their content, without the folders
    `apart`, in which runs write."""
    code = hashlib.sha256()
    for room in ROOMS:
        code.update(Path(__file__).with_name(f"{room}.py").read_bytes())
    for pattern in COUNTING:
        for file in sorted(Path(__file__).parents[1].glob(pattern)):
            code.update(file.read_bytes())
    code.update(Path(use.__file__).read_bytes())  # what a picture is
    asked = []
    for each in datasets:
        source = {name: value for name, value in asdict(each.source).items() if name not in ("note", "licence")}
        state = each.revision
        if (path := Path(each.name).expanduser()).exists():
            state = state_of_files(path, apart)
        asked.append({"label": each.label, "share": each.share, "state": state, "source": source})
        if not path.exists():
            asked[-1]["name"] = each.name.lower()
    limits = {name: getattr(settings, name) for name in ("clean", "num_samples", "eval_pages", "max_html_tokens")}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    described = {"datasets": asked, **limits, "seed": seed, "counting": counting, "code": code.hexdigest()}
    return json.loads(json.dumps(described | {"versions": versions}, default=lambda value: value.__qualname__))


def state_of_files(path: Path, apart: Sequence[str | Path] = ()) -> str:
    """SHA-256 of the name, size and time of every file in a folder; of a file, and of the pictures beside it that it
    may name. Takes 10 s for a million files."""
    digest, left_out = hashlib.sha256(), {str(Path(folder).expanduser().resolve()) for folder in apart}
    alone = path.is_file()
    for folder, names, files in os.walk(path.parent if alone else path, followlinks=not alone):
        places = {name: str(Path(folder, name).resolve()) for name in names}
        names[:] = sorted(name for name in names if places[name] not in left_out)
        # Links to folders are followed, as `datasets` follows them, each once: one may lead back.
        left_out.update(places[name] for name in names if Path(folder, name).is_symlink())
        for name in sorted(files):
            file = Path(folder, name)
            if alone and file != path and file.suffix.lower() not in PICTURES:
                continue
            with contextlib.suppress(OSError):  # a link to nothing
                found = file.stat()
                shown = os.fsencode(os.path.relpath(file, path.parent if alone else path))
                digest.update(b"%s\0%d\0%d\n" % (shown, found.st_size, found.st_mtime_ns))
    return digest.hexdigest()


@dataclass
class Prepared:
    """A folder of prepared pages: those of `folder`, for whoever holds its lock. `done`: all of them, unchanged."""

    folder: Path
    done: dict[str, Any] | None

    def note(self, fingerprint: str) -> None:
        """The pages are all there, and these are they."""
        partial = self.folder / f"{DONE}.partial"
        partial.write_text(json.dumps({"fingerprint": fingerprint, "files": self.files()}))
        partial.replace(self.folder / DONE)

    def files(self) -> dict[str, list[int]]:
        """Size and time of each file of pages: other runs have the same ones under other names, and might change
        them."""
        found = {str(file.relative_to(self.folder)): file.stat() for file in sorted(self.folder.glob("*/*.arrow"))}
        return {name: [each.st_size, each.st_mtime_ns] for name, each in found.items()}

    def begun(self) -> bool:
        """Whether an earlier run has prepared some of them."""
        return any(self.folder.glob("*/sealed.json"))


@contextlib.contextmanager
def claimed(pages_dir: Path, wanted: dict[str, Any]) -> Iterator[Prepared]:
    """(one process of each disk) The folder in which these pages are, or are to be, while no other process works there.

    Where a Hub dataset's commit is not known, what lies there may be of another one, and goes.
    """
    text = json.dumps(wanted, indent=1, sort_keys=True)
    folder = pages_dir / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder, "preparing the same pages"):
        prepared = Prepared(folder, None)
        with contextlib.suppress(OSError, ValueError):
            prepared.done = json.loads((folder / DONE).read_bytes())
        changed = prepared.done is not None and prepared.done.get("files") != prepared.files()
        if changed or any(each["state"] is None for each in wanted["datasets"]):
            for inner in folder.iterdir():
                if inner.is_dir():
                    shutil.rmtree(inner)
            (folder / DONE).unlink(missing_ok=True)
            prepared.done = None
        (folder / DESCRIPTION).write_text(text, encoding="utf-8")
        yield prepared


def age(prepared: Prepared) -> str:
    """When the pages were prepared, for a message."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime((prepared.folder / DONE).stat().st_mtime))
