"""How alike two pages look and are built, and how good a written page is: matched text blocks, structure, validity.

    python page_scores.py reference.html prediction.html --json -
    python page_scores.py references/ predictions/ --report report.html --json scores.json
    python page_scores.py holo1_dom_finetune_output/evaluation --report report.html      # what a training has written

The command line of scoring/. Chromium renders both pages, safely (scoring/renders.py). Before every run the scorer
proves itself (scoring/proof.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scoring.clip import CLIP_MODEL, Clip, ClipMissing, find_clip
from scoring.many_pages import Pair, Progress, browser_facts, pairs_of, read, run_pairs, write_pages_report
from scoring.metrics import names, worst_words
from scoring.proof import ScorerError, prove
from scoring.renders import BrowserMissing, Renderer
from scoring.report_values import plural
from scoring.statistics import left_out_words, means, scores_line, shares
from training.errors import SettingsError, refuse_other_systems
from training.processes import in_columns

NAMED = 10  # failed pages, in the last line; the report and the JSON have them all
INTERRUPTED = 130  # the shell's own code for what Ctrl-C has ended


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Exits with code 2 for flags that do not exist."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "references", type=Path, help="a page, a folder of pages, or the evaluation folder of a training"
    )
    parser.add_argument("predictions", type=Path, nargs="?", help="a page, or a folder with files of the same names")
    parser.add_argument("--json", help="file for the scores; - for stdout")
    parser.add_argument("--report", type=Path, help="file for a report that shows every page")
    parser.add_argument("--width", type=int, default=1280, help="of the browser's window, in pixels")
    parser.add_argument("--clip", help=f"folder or cached repository of CLIP's weights (default: {CLIP_MODEL})")
    return parser.parse_args(argv)


def pairs_from(args: argparse.Namespace) -> list[Pair]:
    """The pages to compare. Raises `SettingsError` where the places that were typed have none."""
    references, predictions = args.references, args.predictions
    for place in (references, predictions):
        if place is not None and not place.exists():
            raise SettingsError(f"{place}: no such file or folder")
    if predictions and references.is_dir() != predictions.is_dir():
        raise SettingsError(f"{references} and {predictions}: give two files, or two folders")
    if predictions is None and not references.is_dir():
        raise SettingsError("give a reference and a prediction, or the evaluation folder of a training")
    if references.is_file():
        return [Pair(references.stem, read(references), read(predictions), args.width)]
    pairs = pairs_of(references, predictions, args.width)
    if not pairs:
        raise SettingsError(f"{references}: no pages there (*.html, or page-*/reference.html)")
    if all(pair.prediction is None for pair in pairs):  # some that are missing are a model's failures, all a slip
        if predictions is None:
            raise SettingsError(f"{references}: none of its {plural(len(pairs), 'page')} has a written.html")
        looked = f"{len(pairs):,} looked for, e.g. {pairs[0].name}.html"
        raise SettingsError(f"{predictions}: none of its files has the name of a reference ({looked})")
    return pairs


def written_before(folder: Path, width: int) -> list[Pair]:
    """What the base of a training has written of its held-out pages; [] where it has written none."""
    pairs = pairs_of(folder, None, width, "written_before.html")
    return pairs if any(pair.prediction is not None for pair in pairs) else []


def summary_line(found: Mapping[str, Any]) -> str:
    """Of `means` and `shares`."""
    valid = f"{100 * found['valid']:.1f} % valid"
    failures = f"{plural(found['failures'], 'failure')}, counted as {worst_words(names())}"
    text = f"{plural(found['n'], 'page')}, {valid}, {failures}: {scores_line(found)}"
    if found["failures"]:
        text += f"; without them: {scores_line(found, '_without_failures')}"
        more = f" and {found['failures'] - NAMED:,} more" if found["failures"] > NAMED else ""
        text += f"; failed: {', '.join(map(str, found['failed'][:NAMED]))}{more}"
    return in_columns(text + left_out_words(found))


def stopped_words(pairs: Sequence[Pair], progress: Progress | None) -> str:
    """What Ctrl-C leaves behind."""
    scored = sum(pair.key in progress.rows for pair in pairs) if progress else 0
    text = f"stopped after {scored:,} of {plural(len(pairs), 'page')}"
    if scored and progress.folder is not None:
        text += f"; the same command goes on with them, kept in {progress.folder}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 1 where the scorer is broken, 2 where pages, browser or CLIP's weights are missing, 130 after
    Ctrl-C."""
    args = parse(argv)
    refuse_other_systems()
    target = args.report or (Path(args.json) if args.json not in (None, "-") else None)
    partial = target and target.with_name(f"{target.name}.partial")
    pairs, earlier, progress = [], [], None
    try:
        pairs = pairs_from(args)
        for place in (args.report, Path(args.json) if args.json not in (None, "-") else None):
            if place:  # now, and not after an hour
                place.parent.mkdir(parents=True, exist_ok=True)
        clip, why_not = (Clip(args.clip), "") if args.clip else find_clip()
        progress = Progress(partial, pictures=args.report is not None, clip=clip and clip.name)
        with Renderer() as renderer:
            prove(renderer, clip=clip)
            scores = run_pairs(pairs, renderer, progress, clip)
            earlier = written_before(args.references, args.width) if args.report and not args.predictions else []
            run_pairs(earlier, renderer, progress, clip)
            facts = browser_facts(renderer, clip, why_not)
    except (SettingsError, BrowserMissing, ClipMissing, ScorerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, ScorerError) else 2
    except KeyboardInterrupt:
        print(stopped_words([*pairs, *earlier], progress), file=sys.stderr)
        return INTERRUPTED
    print(f"CLIP: {facts['CLIP']}", file=sys.stderr)
    print(summary_line(means(scores) | shares(scores)), file=sys.stderr)
    if args.report:
        folders = {"references": args.references.name, "predictions": (args.predictions or args.references).name}
        before = (earlier, progress) if earlier else None
        write_pages_report(args.report, "What was written", pairs, progress, folders | facts, before=before)
    whole = {"summary": means(scores) | shares(scores), "facts": facts, "pages": scores}
    text = json.dumps(scores[0] if args.references.is_file() else whole, indent=2)
    if args.json == "-":
        print(text)
    elif args.json:
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    progress.forget()
    return 0


if __name__ == "__main__":
    sys.exit(main())
