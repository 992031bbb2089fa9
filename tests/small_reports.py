"""Small reports of small pages, for the tests of what shows them."""

from pathlib import Path

import numpy as np

from scoring.report import write_report
from scoring.report_values import Box, PageResult

COMPARISON = {
    "metrics": {
        "overall": {"before": 0.31, "after": 0.82, "difference": 0.51, "low": 0.44, "high": 0.58, "p": 0.0004},
        "tree_bleu": {"before": 0.3, "after": 0.27, "difference": -0.03, "low": -0.09, "high": 0.03, "p": 0.31},
        "ssim": {"before": None, "after": 0.5},
    },
    "decoding": [
        {"repetition_penalty": 1.0, "before": 0.2, "after": 0.79},
        {"repetition_penalty": 1.05, "after": 0.82},
    ],
    "n": 40,
}


def picture(height: int = 90, width: int = 120, shade: int = 255) -> np.ndarray:
    image = np.full((height, width, 3), shade, np.uint8)
    image[10:20, 12:60] = 40
    return image


def result(name: str, likeness: float | None = 0.5, **changes) -> PageResult:
    """A small page with two matched blocks, one missing, one invented."""
    first, second = Box(0.1, 0.1, 0.4, 0.12, "Hello"), Box(0.1, 0.5, 0.3, 0.1, "World")
    scores = {"likeness": likeness, "block": 0.25, "valid": True, "truncated": False, "looping": False, "exact": False}
    values = {
        "scores": scores,
        "reference": picture(),
        "written": picture(shade=250),
        "html": f"<p>{name}</p>",
        "reference_html": "<p>Hello</p>",
        "matched": [(first, Box(0.12, 0.1, 0.4, 0.12, "Hello!")), (second, second)],
        "missing": [Box(0.6, 0.1, 0.3, 0.1, "Menu")],
        "invented": [Box(0.6, 0.7, 0.3, 0.1, "Lorem")],
    }
    return PageResult(name, **(values | changes))


def failed(name: str, **changes) -> PageResult:
    values = {
        "written": None,
        "failure": "out of time after 15 s",
        "matched": [],
        "invented": [],
        "causes": ("looping",),
    }
    return result(name, 0.9, **(values | changes))


def sample() -> list[PageResult]:
    pages = [result(f"page {place}", likeness) for place, likeness in enumerate([0.81, 0.34, 1.0, 0.05, 0.37])]
    return [*pages, failed("broken"), result("unmeasured", None, causes=("misplaced",), html="")]


def written(tmp_path: Path, pages, **more) -> str:
    write_report(tmp_path / "report.html", "Title", pages, more.pop("facts", {"model": "tiny"}), **more)
    return (tmp_path / "report.html").read_bytes().decode("utf-8")
