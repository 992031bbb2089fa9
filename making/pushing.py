"""The push of a dataset to the Hub: sharded parquet, one shard at a time, then one commit.

    full_name = check_access("USER/NAME", private=True)                     # before anything is rendered
    push_pages(folder, full_name, True, summary, known, "python make_pages.py ...")

Memory and disk stay bounded: a shard is written, uploaded and removed before the next one is begun. The same pages make
the same shards, and what the Hub has of them is not sent again: a push that broke off goes on. Until the commit nobody
sees any of it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub as hub

from training.dataset import DatasetSource
from training.errors import UploadError
from training.publishing import check_hub_access, hide_command, patiently, shown

if TYPE_CHECKING:
    from datasets import Features

SHARD_BYTES = 400 * 10**6
GROUP_BYTES, GROUP_PAGES = 32 * 10**6, 100  # of rows that are held at once, and that a reader has to read at once
OURS = re.compile(r"data/train-\d{5}\.parquet")
CARD = Path(__file__).with_name("dataset_card.md")


@dataclass(frozen=True)
class Shard:
    """A parquet file, its pages, and the bytes of their columns."""

    file: Path
    pages: int
    content_bytes: int


def check_access(repo_id: str, private: bool) -> str:
    """The full `owner/name`; SettingsError where a dataset cannot be pushed there."""
    return check_hub_access(repo_id, private, "dataset", "--push_to_hub")


def columns(with_tokens: bool) -> Features:
    """Of a shard; `image` and `text` are what training takes by default."""
    from datasets import Features, Image, Value

    numbers = ["width", "height", "viewport", "characters", *["tokens"] * with_tokens]
    kinds = {"image": Image(), "text": Value("string"), "page": Value("string")}
    return Features(kinds | {name: Value("int32") for name in numbers})


def write_shards(folder: Path, place: Path, shard_bytes: int = SHARD_BYTES) -> Iterator[Shard]:
    """Every page of `folder`, in its order, as parquet files in `place`, which the caller may remove one by one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place.mkdir(parents=True, exist_ok=True)
    groups, number = _groups(folder), 0
    group = next(groups, None)
    schema = columns("tokens" in group[0]).arrow_schema if group else None
    while group:
        file, pages, content = place / f"train-{number:05d}.parquet", 0, 0
        with open(file, "wb") as stream, pq.ParquetWriter(stream, schema) as writer:
            while group and stream.tell() < shard_bytes:
                table = pa.Table.from_pylist(group, schema)
                writer.write_table(table, row_group_size=len(group))
                pages, content = pages + len(group), content + table.nbytes
                group = next(groups, None)
        yield Shard(file, pages, content)
        number += 1


def _groups(folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Rows of shards, as many as are held at once."""
    group, held = [], 0
    with open(folder / "metadata.jsonl", "rb") as lines:
        for row in map(json.loads, lines):
            picture = (folder / row["file_name"]).read_bytes()
            lengths = {unit: row[unit][2] for unit in ("characters", "tokens") if unit in row}
            sizes = {name: row[name] for name in ("width", "height", "viewport")}
            image = {"bytes": picture, "path": row["file_name"]}
            group.append({"image": image, "text": row["text"], "page": row["page"]} | sizes | lengths)
            held += len(picture) + len(row["text"])
            if held >= GROUP_BYTES or len(group) >= GROUP_PAGES:
                yield group
                group, held = [], 0
    if group:
        yield group


def push_pages(
    folder: Path, repo_id: str, private: bool, summary: Mapping[str, Any], known: DatasetSource, command: str
) -> str:
    """Uploads the pages of `folder` and a card, and returns their address.

    `summary` is what summary.json holds, `known` what is known of the pages' source, `command` what goes on with a push
    that failed: UploadError names it.
    """
    api, again, place = hub.HfApi(), f"The pages are whole in {folder}. To upload them: {command}", folder / ".push"
    additions: list[hub.CommitOperationAdd] = []
    shards: list[Shard] = []
    try:
        for shard in write_shards(folder, place):
            addition = hub.CommitOperationAdd(f"data/{shard.file.name}", shard.file)
            patiently(lambda one=addition: api.preupload_lfs_files(repo_id, [one], repo_type="dataset"), again)
            if addition.path_or_fileobj == b"":  # it is there; a small file may travel with the commit
                shard.file.unlink()
            additions.append(addition)
            shards.append(shard)
            print(f"{repo_id}: {sum(one.pages for one in shards):,} pages uploaded", flush=True)
        card = card_of(repo_id, shards, summary, known).encode()

        def attempt() -> str:
            there = api.dataset_info(repo_id)
            if private and not there.private:
                why = f"--private_repo was asked, but {repo_id} is public."
                raise UploadError(f"{why} To hide it: {hide_command(repo_id, 'dataset')}. {again}")
            names = {one.path_in_repo for one in additions}
            old = [one.rfilename for one in there.siblings or [] if OURS.fullmatch(one.rfilename)]
            changes = [hub.CommitOperationDelete(name) for name in old if name not in names]
            changes += [*additions, hub.CommitOperationAdd("README.md", card)]
            api.create_commit(repo_id, changes, commit_message="Upload pages and their card", repo_type="dataset")
            return f"{api.endpoint}/datasets/{repo_id}"

        return patiently(attempt, again)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def card_of(repo_id: str, shards: list[Shard], summary: Mapping[str, Any], known: DatasetSource) -> str:
    """README.md: what the Hub reads at its head, and what people should know of the pages."""
    settings, source = summary["settings"], str(summary["source"])
    on_hub = not Path(source).expanduser().exists()
    front = {
        "license": known.licence,
        "task_categories": ["image-to-text"],
        "tags": ["html", "screenshots", "web-pages"],
        "source_datasets": [source] if on_hub else None,
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
        "dataset_info": {
            "splits": [
                {
                    "name": "train",
                    "num_bytes": sum(shard.content_bytes for shard in shards),
                    "num_examples": (pages := sum(shard.pages for shard in shards)),
                }
            ]
        },
    }
    lines = [f"{name}: {json.dumps(value)}" for name, value in front.items() if value]  # JSON is YAML, too
    licence = (
        f"The pages come under {known.licence}."
        if known.licence
        else "The licence of these pages is that of where they come from: whoever shares them has to know it."
    )
    fields = {
        "front": "\n".join(lines),
        "name": shown(repo_id.split("/")[-1]),
        "pages": f"{pages:,}",
        "source": f"[{source}](https://huggingface.co/datasets/{source})" if on_hub else "HTML files",
        "repo": repo_id,
        "heights": f"{settings['max_height']:,}",
        "tokens_column": ", `tokens`" if settings["tokenizer"] else "",
        "line": shown(summary["line"]) + ".",
        "chromium": shown(summary["browser"]["chromium"]),
        "widths": " or ".join(map(str, settings["widths"])),
        "height": settings["height"],
        "scripts": {"drop": "dropped", "run": "run once"}[settings["scripts"]],
        "note": shown(known.refused or known.note).capitalize() + "." if known.refused or known.note else "",
        "licence": licence,
    }
    return CARD.read_text(encoding="utf-8").format(**fields)
