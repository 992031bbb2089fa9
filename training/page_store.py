"""Pages on their way to the disk: appended to two Arrow streams, and sealed, so that a killed reading goes on.

    store = PageStore(folder)                   # goes on from the last seal, if there is one
    store.append("train", page, marks)
    store.drop({"name": ..., "reason": ...})
    store.seal(state)                           # what a process that is killed from here on finds again
    store.finish(state)

A seal is the length of each file and what the caller wants to know again (JSON), written aside and renamed; what stands
behind the sealed lengths is cut off when the reading goes on.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow

from training.page_checks import PAGE_FIELDS, Marks

SPLITS = ("train", "held_out")
DROPPED, DIGESTS, SEAL = "dropped_pages.jsonl", "digests", "sealed.json"
FILES = (*(f"{split}.arrow" for split in SPLITS), DROPPED, DIGESTS)
# Of one record batch: readers hold its place in memory, some kB, and a batch a page would be GBs of a million pages.
BATCH_PAGES, BATCH_BYTES = 64, 16 * 2**20
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
SCHEMA = pyarrow.schema(list(PAGE_FIELDS.items()))


class PageStore:
    """One reading's files in `folder`. `state` is what the last seal knows, None where nothing was sealed."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.waiting: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self.bytes_waiting = dict.fromkeys(SPLITS, 0)
        self.files: dict[str, IO[bytes]] = {}
        self.finished = False
        self.state = self.sealed()
        if self.finished:
            return
        for name in FILES:
            path = folder / name
            if self.state is None:
                path.unlink(missing_ok=True)  # the old file stays whole for whoever has it mapped
            self.files[name] = path.open("ab")
        if self.state is None:
            for split in SPLITS:
                self.files[f"{split}.arrow"].write(SCHEMA.serialize())

    def __enter__(self) -> PageStore:
        return self

    def __exit__(self, *unused: object) -> None:
        for file in self.files.values():
            file.close()

    def sealed(self) -> Any:
        """What the last seal knows, with the files cut to its lengths; None where a file is shorter, or there is no
        seal."""
        try:
            seal = json.loads((self.folder / SEAL).read_bytes())
            lengths = [(self.folder / name, seal["bytes"][name]) for name in FILES]
            if any(path.stat().st_size < length for path, length in lengths):
                return None
            for path, length in lengths:
                if path.stat().st_size > length:
                    os.truncate(path, length)
            self.finished = seal["finished"]
            return seal["state"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def append(self, split: str, page: dict[str, Any], marks: Marks) -> None:
        """One more page of `split`."""
        self.waiting[split].append(page)
        self.bytes_waiting[split] += len(page["screenshot"]) + len(page["html"])
        self.files[DIGESTS].write(array("Q", marks.digests).tobytes())
        if len(self.waiting[split]) >= BATCH_PAGES or self.bytes_waiting[split] >= BATCH_BYTES:
            self.write(split)

    def write(self, split: str) -> None:
        """What waits becomes a record batch."""
        if self.waiting[split]:
            batch = pyarrow.RecordBatch.from_pylist(self.waiting[split], schema=SCHEMA)
            self.files[f"{split}.arrow"].write(batch.serialize())
        self.waiting[split], self.bytes_waiting[split] = [], 0

    def drop(self, row: Mapping[str, str]) -> None:
        """A line of dropped_pages.jsonl."""
        self.files[DROPPED].write((json.dumps(row) + "\n").encode())

    def seal(self, state: Any, finished: bool = False) -> None:
        """Everything so far will be found again, with `state`."""
        for split in SPLITS:
            self.write(split)
            if finished:
                self.files[f"{split}.arrow"].write(END_OF_STREAM)
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())  # or a machine that loses its power might know the lengths and not the bytes
        self.state, self.finished = state, finished
        self.write_seal()

    def write_seal(self) -> None:
        lengths = {name: (self.folder / name).stat().st_size for name in FILES}
        partial = self.folder / f"{SEAL}.partial"
        partial.write_text(json.dumps({"bytes": lengths, "finished": self.finished, "state": self.state}))
        partial.replace(self.folder / SEAL)

    def finish(self, state: Any) -> None:
        """The last seal: nothing comes any more."""
        self.seal(state, finished=True)

    def empty(self) -> None:
        """Of a finished reading whose pages nobody wants, what it knows is kept."""
        for split in SPLITS:
            os.truncate(self.folder / f"{split}.arrow", 0)
        self.write_seal()

    def bytes_written(self) -> int:
        """Of the pages so far, sealed or not."""
        return sum((self.folder / f"{split}.arrow").stat().st_size for split in SPLITS)

    def digests(self) -> Iterator[int]:
        """Of every page so far, as it was appended."""
        with (self.folder / DIGESTS).open("rb") as file:
            while block := file.read(8 * 65_536):
                yield from array("Q", block)

    def held_out(self) -> Iterator[dict[str, Any]]:
        """The sealed held-out pages."""
        with pyarrow.OSFile(str(self.folder / "held_out.arrow"), "rb") as file:
            for batch in pyarrow.ipc.open_stream(file):
                yield from batch.to_pylist()
