"""The base model: what its checkpoint holds, and bases that cannot be trained."""

import shutil

import pytest
import torch
from conftest import make_base, weights

from training import errors
from training.base_model import base_tensors
from training.settings import PageSettings


def test_a_tensor_that_the_architecture_does_not_have_is_refused(tiny_base, tmp_path):
    from safetensors.torch import save_file

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    save_file({**weights(base), "model.stray.weight": torch.zeros(1)}, base / "model.safetensors")
    with pytest.raises(errors.SettingsError, match=r"model\.stray\.weight is no weight of Qwen2_5_VL"):
        base_tensors(base, PageSettings())


def test_a_damaged_shard_and_another_architecture_are_refused(tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(errors.SettingsError, match=r"model\.safetensors is damaged"):
        base_tensors(base, PageSettings())
    (base / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(errors.SettingsError, match=r"is a llama; .*\(qwen2_5_vl\) or .*\(qwen3_vl\) can be"):
        base_tensors(base, PageSettings())


def test_a_base_without_weights_is_refused(tmp_path):
    base = make_base(tmp_path / "base", weights=False)
    with pytest.raises(errors.SettingsError, match=r"no \.safetensors there"):
        base_tensors(base, PageSettings(base_model=str(base)))
