"""The folder has the name of a package on PyPI, which transformers uses where it is installed."""

import importlib.metadata
import sys
from pathlib import Path

import pytest
from conftest import ROOT, call_in_processes
from transformers.utils import import_utils


@pytest.fixture
def theirs(tmp_path) -> Path:
    """A folder of packages in which that one is, as far as anybody sees who does not import it."""
    version = import_utils.KERNELS_MIN_VERSION
    place = tmp_path / "packages" / f"kernels-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    return place.parent


def test_whoever_finds_our_folder_finds_that_it_is_not_theirs(theirs, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), str(theirs), *sys.path])
    assert importlib.metadata.version("kernels") == "0"
    assert not import_utils.is_kernels_available.__wrapped__()
    monkeypatch.setattr(sys, "path", [str(theirs)])
    assert importlib.metadata.version("kernels") == import_utils.KERNELS_MIN_VERSION


def load_a_model() -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration, Trainer

    import kernels
    from kernels import masters

    assert Path(kernels.__file__).parent == ROOT / "kernels" and masters.join
    assert Qwen2_5_VLForConditionalGeneration.from_pretrained and Trainer.train


@pytest.mark.slow
def test_with_theirs_installed_transformers_loads_as_without(theirs, tmp_path):
    """It asked for the version of theirs, and imported its names from ours: no program started."""
    call_in_processes(load_a_model, [[]], tmp_path, env={"PYTHONPATH": f"{ROOT}:{theirs}"})
