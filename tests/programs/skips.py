"""Tests that skip or run, for tests/test_skips.py: it starts pytest on this file, with CI set and without."""

from importlib.util import find_spec

import pytest
from conftest import SHARED, need_shared


def test_that_runs():
    assert SHARED.name == "shared"


def test_of_what_may_be_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("conftest.SHARED", tmp_path)
    need_shared("pages")


def test_of_what_should_be_installed():
    pytest.importorskip("no_package_of_this_name")


@pytest.mark.skipif(find_spec("no_package_of_this_name") is None, reason="marked")
def test_that_is_marked():
    pass


@pytest.fixture
def missing():
    pytest.skip("no browser")


def test_whose_fixture_skips(missing):
    pass
