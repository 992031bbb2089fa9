"""A whole file of tests that is skipped, for tests/test_skips.py."""

import pytest

pytest.importorskip("no_package_of_this_name", reason="this package is not installed")


def test_nothing():
    pass
