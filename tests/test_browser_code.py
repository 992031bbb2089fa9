"""What runs or shows in a browser is files: JavaScript passes its linter, and style sheets parse to their last rule."""

import subprocess
import sys
from pathlib import Path

import pytest
import tinycss2
from conftest import ROOT

FOLDERS = ("scoring", "making", "benchmarks", "tests")
SCRIPTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.js"))
SHEETS = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.css"))


def faults_of(css: str) -> list[str]:
    """What a browser would skip silently: rules and declarations that do not parse, at any depth."""
    faults, waiting = [], tinycss2.parse_stylesheet(css, skip_comments=True, skip_whitespace=True)
    while waiting:
        node = waiting.pop()
        if node.type == "error":
            faults.append(f"line {node.source_line}: {node.message}")
        elif node.type in ("qualified-rule", "at-rule") and node.content is not None:
            waiting += tinycss2.parse_blocks_contents(node.content, skip_comments=True, skip_whitespace=True)
    return faults


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda path: path.name)
def test_a_style_sheet_has_nothing_that_a_browser_skips(sheet):
    assert faults_of(sheet.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "css",
    ["p { color red; }", "p { color: red; } }", "@media print { p { color: red; .x { : blue; } }", "p { 3px: blue; }"],
)
def test_a_planted_fault_is_found(css):
    assert faults_of("a { color: blue; }") == []
    assert len(faults_of(css)) > 0


def lint(*paths: Path) -> subprocess.CompletedProcess:
    """As .ci/run and the hook do, with the repository's own settings."""
    program = Path(sys.executable).with_name("oxlint")
    settings = f"--config={ROOT / '.oxlintrc.json'}"
    command = [str(program), settings, "--deny-warnings", *map(str, paths)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_linter_passes_every_script_and_finds_planted_errors(tmp_path):
    assert SCRIPTS and (done := lint(*SCRIPTS)).returncode == 0, done.stdout
    for name, body, says in (
        ("syntax", "const x = ;", "Unexpected token"),
        ("undefined", "return noSuchThing;", "no-undef"),
        ("unused", "const left = 1;", "no-unused-vars"),
        ("assigned", "let x = 1; if (x = 2) return x;", "no-cond-assign"),
    ):
        (tmp_path / f"{name}.js").write_text(f"(options) => {{\n  {body}\n}}\n")
        done = lint(tmp_path / f"{name}.js")
        assert done.returncode == 1 and says in done.stdout, done.stdout
