"""A green run in CI means that everything ran: a skip fails there, but for what conftest.MAY_BE_MISSING names."""

import re
import subprocess

import pytest
from conftest import MAY_BE_MISSING, PROGRAMS, ROOT, run_script


def outcomes(*files: str, ci: str) -> tuple[subprocess.CompletedProcess, dict[str, str]]:
    """What became of each test of these programs, as pytest's short summary says."""
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-rA", "--continue-on-collection-errors"]
    paths = [str(PROGRAMS / file) for file in files]
    done = run_script("-m", "pytest", *options, *paths, cwd=ROOT, env={"CI": ci, "PYTEST_ADDOPTS": ""})
    found = re.findall(r"^(PASSED|FAILED|ERROR) \S*?(\w+)(?:\.py)?(?= |$)", done.stdout, re.MULTILINE)
    return done, {name: outcome for outcome, name in found}


def test_in_ci_only_what_may_be_missing_is_skipped():
    done, found = outcomes("skips.py", "skips_as_a_whole.py", ci="true")
    assert found == {
        "test_that_runs": "PASSED",
        "test_of_what_should_be_installed": "FAILED",
        "test_that_is_marked": "ERROR",
        "test_whose_fixture_skips": "ERROR",
        "skips_as_a_whole": "ERROR",
    }, done.stdout
    assert done.returncode == 1 and "1 failed, 1 passed, 1 skipped, 3 errors" in done.stdout
    assert "CI skips nothing that it should have installed: this package is not installed" in done.stdout


@pytest.mark.parametrize("files", [["skips.py"], ["skips_as_a_whole.py", "skips.py"]], ids=len)
def test_elsewhere_a_skip_is_a_skip(files):
    done, found = outcomes(*files, ci="")
    assert found == {"test_that_runs": "PASSED"}, done.stdout
    assert done.returncode == 0 and f"1 passed, {3 + len(files)} skipped" in done.stdout


def test_ci_says_that_it_is_ci():
    (line,) = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if '"$place/tests" 2>&1' in line]
    assert re.match(r"HF_HUB_OFFLINE=1 CI=1 bash ", line)
    assert all(name.startswith("shared/") for name in MAY_BE_MISSING), "of what CI could install nothing may be missing"
