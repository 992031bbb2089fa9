"""Turns any HTML into a dataset of (screenshot, HTML) pairs that the training script takes as it is.

    python make_pages.py site/ --out pages                                  # every .html and .htm under a folder
    python make_pages.py list.txt --out pages --scripts run                 # files that a text file names, one a line
    python make_pages.py site/ --out pages --widths 1280,390 --tokenizer holo1_dom_finetune_final --max_html_tokens 8192
    python make_pages.py SALT-NLP/Design2Code-hf --out pages --num_samples 50           # a dataset, rendered again
    python make_pages.py site/ --out pages --push_to_hub USER/NAME --private_repo       # as parquet, to the Hub, too
    python holo1_dom_finetune.py --dataset pages                                        # or --dataset USER/NAME

A target holds what its screenshot shows: local style sheets inlined, no scripts, pictures and icon fonts as grey boxes,
what is invisible or unused dropped where the new render is the same to the pixel. Chromium renders through
scoring/renders.py, without a network. A folder that is begun is carried on; dropped.jsonl names each dropped page and
why.

The rooms of making/ do the work; this is the command line.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import signal
import sqlite3
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

from making.folder import Folder, write_pages
from making.page_settings import Settings, check_settings
from making.sources import count_pages, find_pages
from making.workers import PageMaker, Workers
from scoring.machine import most_at_once
from scoring.renders import BrowserMissing, facts_of_browser, find_chromium
from training.dataset import known_dataset
from training.errors import SettingsError, UploadError, is_disk_full, refuse_other_systems

SECONDS_PER_RENDER = 30.0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", metavar="SOURCE", help="folder of HTML files, list of them (.txt), or dataset")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the dataset goes")
    parser.add_argument(
        "--scripts", choices=("drop", "run"), default=defaults.scripts, help="run: once, without a network"
    )
    parser.add_argument(
        "--widths", default=",".join(map(str, defaults.widths)), help="viewports, px; dealt out by name"
    )
    parser.add_argument("--height", type=int, default=defaults.height, help="px of the viewport, of every width")
    parser.add_argument("--max_height", type=int, default=defaults.max_height, help="px; longer pages are cut")
    parser.add_argument("--max_html_tokens", type=int, help="longer pages are cut; needs --tokenizer")
    parser.add_argument("--max_html_characters", type=int, help="longer pages are cut")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="with tokenizer.json; lengths are then told in tokens")
    parser.add_argument("--num_samples", type=int, help="pages to take from SOURCE at most; default: all")
    parser.add_argument("--html_column", help="of a dataset; default: known sets by name, else text")
    parser.add_argument("--dataset_config", help="of a dataset on the Hub; default: known sets by name")
    parser.add_argument("--dataset_split", help="of a dataset; default: known sets by name, else train")
    parser.add_argument("--pages_at_once", type=int, help="worker processes, each with a browser; default: one a core")
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="then upload them as a dataset, in parquet files")
    parser.add_argument("--private_repo", action="store_true", help="with --push_to_hub: only you see it")
    return parser.parse_args(argv)


def settings_from(args: argparse.Namespace) -> Settings:
    """SettingsError where the arguments cannot work."""
    try:
        widths = tuple(int(width) for width in args.widths.split(","))
    except ValueError:
        raise SettingsError(f"--widths {args.widths}: whole numbers with commas between, such as 1280,390") from None
    for name in ("pages_at_once", "num_samples"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise SettingsError(f"--{name} {value}: at least 1")
    limits = {name: getattr(args, name) for name in ("height", "max_height", "max_html_tokens", "max_html_characters")}
    if args.private_repo and not args.push_to_hub:
        raise SettingsError("--private_repo needs --push_to_hub USER/NAME")
    settings = Settings(args.scripts, widths, tokenizer=args.tokenizer, **limits)
    check_settings(settings)
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    refuse_other_systems()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        settings = settings_from(args)
        typed = {"config": args.dataset_config, "split": args.dataset_split, "html_column": args.html_column}
        known = known_dataset(args.source, **typed)
        if note := known.refused or known.note:
            print(f"{args.source}: {note}", file=sys.stderr)
        pages = itertools.islice(find_pages(args.source, known), args.num_samples)
        first = list(itertools.islice(pages, 1))  # before anything is written: there may be no such source
        find_chromium()
        repo = args.push_to_hub and pushing().check_access(args.push_to_hub, args.private_repo)
        at_once = args.pages_at_once or most_at_once()
        maker = PageMaker(settings, SECONDS_PER_RENDER)
        total = min(filter(None, (count_pages(args.source), args.num_samples)), default=None)
        with Folder(args.out, settings.digest()) as folder, Workers(at_once, maker) as workers:
            report = write_pages(itertools.chain(first, pages), folder, workers, total)
            on_hub = not Path(args.source).expanduser().exists()
            facts = {"settings": asdict(settings), "source": args.source, "source_is_on_hub": on_hub}
            facts |= {"browser": facts_of_browser(report.browser)}
            summary = report.summary() | facts
            folder.write_summary(summary)
    except (SettingsError, BrowserMissing) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, sqlite3.OperationalError) as error:
        if not is_disk_full(error) and "disk is full" not in str(error):  # the latter is SQLite's
            raise
        print(f"error: {error}. Free some space; the same command goes on", file=sys.stderr)
        return 81
    for note, number in summary["could not be had"].items():
        print(f"{number:,} {note}", file=sys.stderr)
    print(report)
    if report.interrupted:
        return 85
    if not report.written:
        print(f"error: no page left: {args.out / 'dropped.jsonl'} says why", file=sys.stderr)
        return 80
    if repo:
        command = shlex.join(["python", "make_pages.py", *(sys.argv[1:] if argv is None else argv)])
        try:
            print(pushing().push_pages(args.out, repo, args.private_repo, summary, known, command))
        except UploadError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.code
        except KeyboardInterrupt:
            print(f"interrupted; the pages are whole in {args.out}. To upload them: {command}", file=sys.stderr)
            return 85
    return 0


def pushing() -> ModuleType:
    """The room that talks to the Hub: loaded when that is asked."""
    from making import pushing as room

    return room


if __name__ == "__main__":
    sys.exit(main())
