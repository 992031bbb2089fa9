"""The house: commands at the top, trades in folders, imports that only point down, nothing too long to read.

The order of the rooms is the file tree of CONTRIBUTING.md: a file may import what stands below it there.
"""

import ast
import itertools
import re
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, tracked_files

MOST_LINES, MOST_FUNCTION_LINES = 900, 60
PLAIN_FOLDERS = ("making", "training", "writing", "scoring", "kernels")  # whose __init__.py holds a docstring alone
FOLDERS = (*PLAIN_FOLDERS, "families")
# JavaScript or CSS, by what no sentence of ours holds: an arrow function, a declaration, a rule.
BROWSER_CODE = re.compile(
    r"=>\s*[{(]|\b(?:const|let|var)\s+\w+\s*=|\bfunction\s*\w*\(|[\w.#\])]\s*\{\s*[\w-]+\s*:[^{}]*;"
)


# Python or shell, by how a line of it begins and goes on; one import may stand alone, as a command of the README.
PROGRAM = re.compile(r"^#!/|^(?:import|from) [\w., ]+(?: import [\w., ]+)?[;\n]|^ *(?:def|class) \w+[(:]", re.MULTILINE)


@cache
def parsed(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def ours() -> list[str]:
    """Our code without its tests."""
    return [name for name in tracked_files("*.py") if not name.startswith("tests/")]


@pytest.mark.parametrize("pattern", ["*.py", "*.js", "*.css"])
def test_no_file_is_too_long_to_read(pattern):
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in tracked_files(pattern)}
    assert lines and not {name: count for name, count in lines.items() if count > MOST_LINES}


def test_no_function_is_too_long_to_read():
    long = {
        f"{name}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for name in tracked_files("*.py")
        for node in functions(parsed(name))
        if node.end_lineno - node.lineno >= MOST_FUNCTION_LINES
    }
    assert not long


def docstrings(tree: ast.AST) -> set[int]:
    """The docstring nodes, by id."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, kinds) and node.body]
    return {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr)}


def code_in_strings(tree: ast.AST) -> list[int]:
    """Lines on which a string of more than one line holds JavaScript or CSS."""
    apart, found = docstrings(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in apart:
            text = node.value.strip()
            if "\n" in text and BROWSER_CODE.search(text):
                found.append(node.lineno)
    return found


def test_browser_code_and_looks_are_files():
    found = {name: lines for name in ours() if (lines := code_in_strings(parsed(name)))}
    assert not found


@pytest.mark.parametrize(
    "planted", ["() => {\n  return 1;\n}", "p { color: red;\n}", "const a = 1;\nb()", "function f() {\n}"]
)
def test_planted_browser_code_is_found(planted):
    assert code_in_strings(ast.parse(f"CODE = {planted!r}")) == [1]


def programs_in_strings(tree: ast.AST) -> list[int]:
    """Lines on which a string holds Python or shell, which belongs into a file of its own (tests/programs)."""
    apart = docstrings(tree)
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [node.lineno for node in strings if id(node) not in apart and PROGRAM.search(node.value)]


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_no_test_and_no_benchmark_carries_a_program_in_a_string(folder):
    names = [name for name in tracked_files(f"{folder}/*.py") if name != "tests/test_house.py"]
    assert names and not {name: lines for name in names if (lines := programs_in_strings(parsed(name)))}


@pytest.mark.parametrize(
    "planted", ["import os\nos._exit(3)", "x = 1\ndef f():\n    pass", "from a import b; b()", "#!/bin/sh\nexit 1"]
)
def test_a_planted_program_is_found(planted):
    assert programs_in_strings(ast.parse(f"def test():\n    run({planted!r})")) == [2]


# -----------------------------------------------------------------------------
# Imports


def order() -> list[str]:
    """Our files from top to bottom, as the tree of CONTRIBUTING.md lists them."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## What stands where")[1]
    files, folders = [], [""]
    for line in re.search(r"```text\n(.*?)```", text, re.S)[1].splitlines():
        indent, name = re.match(r"(\s*)(\S+)", line).groups()
        folders = [*folders[: len(indent) // 2 + 1]]
        if name.endswith("/"):
            folders.append(folders[-1] + name)
        files.append(folders[-1] if name.endswith("/") else folders[-1] + name)
    benchmarks = [name for name in files if name.startswith(("benchmarks/", "demo/"))]  # which stand on all the rest
    return benchmarks + [name for name in files if name not in benchmarks]


def imports(name: str) -> set[str]:
    """The files of ours that a file imports, anywhere in it."""
    known = set(ours())
    found = set()
    for node in ast.walk(parsed(name)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for module in modules:
            path = module.replace(".", "/")
            found |= {f"{path}.py", f"{path}/__init__.py"} & known
    return found - {f"{folder}/__init__.py" for folder in PLAIN_FOLDERS}


def test_no_import_is_relative():
    """`imports` reads absolute ones alone."""
    names = tracked_files("*.py")
    assert names and not {
        f"{name}:{node.lineno}"
        for name in names
        for node in ast.walk(parsed(name))
        if isinstance(node, ast.ImportFrom) and node.level
    }


def test_every_room_is_in_the_tree():
    rooms = {name for name in ours() if name.split("/")[0] in FOLDERS and not name.endswith("__init__.py")}
    told = order()
    assert not rooms - set(told), "not in the file tree of CONTRIBUTING.md"
    assert not {name for name in told if name.startswith(FOLDERS) and not (ROOT / name).exists()}


def test_imports_only_point_down_the_tree():
    places = {name: place for place, name in enumerate(order())}
    places |= {f"{folder}__init__.py": place for folder, place in places.items() if folder.endswith("/")}
    upward = [
        f"{name} imports {other}"
        for name in ours()
        for other in imports(name)
        if name in places and other in places and places[other] <= places[name]
    ]
    assert not upward


def test_nothing_is_imported_in_a_circle():
    needed = {name: imports(name) for name in ours()}
    for start in needed:
        seen, waiting = set(), [*needed[start]]
        while waiting:
            name = waiting.pop()
            assert name != start, f"{start} imports itself in the end"
            if name not in seen:
                seen.add(name)
                waiting += needed[name]


def test_the_wrapper_needs_the_standard_library_alone_and_using_a_model_nothing_of_ours():
    assert imports("run_deepspeed_training.py") == {"training/errors.py"}
    assert imports("training/errors.py") == set()
    assert imports("use_model_from_hub.py") == set()


# -----------------------------------------------------------------------------
# How the code reads


def test_classes_stand_at_module_level():
    inner = [
        f"{name}:{node.lineno} {node.name}"
        for name in ours()
        for function in functions(parsed(name))
        for node in ast.walk(function)
        if isinstance(node, ast.ClassDef)
    ]
    assert not inner


def test_no_room_is_called_utils():
    assert not [
        name for name in tracked_files("*.py") if Path(name).stem in ("utils", "util", "helpers", "common", "misc")
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folders_first_room_says_what_lives_there(folder):
    tree = parsed(f"{folder}/__init__.py")
    assert (len(tree.body) == 1) == (folder in PLAIN_FOLDERS) and len(ast.get_docstring(tree)) > 80
    rooms = {Path(name).stem for name in tracked_files(f":(glob){folder}/*.py")} - {"__init__"}
    assert not {room for room in rooms if room not in ast.get_docstring(tree)}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folders_first_room_lists_the_rooms_in_the_order_of_their_imports(folder):
    """As the tree of CONTRIBUTING.md does. A folder inside is one entry, its rooms together."""
    inside = [name.removeprefix(f"{folder}/") for name in order() if name.startswith(f"{folder}/") and name[-1] != "/"]
    wanted = [f"{name.split('/')[0]}/" if "/" in name else Path(name).stem for name in inside]
    wanted = [name for name, _ in itertools.groupby(wanted)]
    lines = ast.get_docstring(parsed(f"{folder}/__init__.py")).splitlines()
    words = [line.split()[0] for line in lines if line.strip()]
    assert [word for word in words if word in wanted] == wanted
