"""Model and saving: what training leaves behind loads anywhere, with the base's own keys, shapes and dtypes."""

import json
import shutil

import pytest
import torch
from conftest import (
    PROGRAMS,
    ROOT,
    make_base,
    output,
    small_run,
    start_deepspeed,
    start_plain,
    start_torchrun,
    start_zero_3,
    weights,
)

import holo1_dom_finetune as pipeline
from training import errors
from training.base_model import BaseTensor, base_tensors, read_safetensors
from training.final_folder import compare_tensors, save_final
from training.settings import PageSettings


def layout(folder) -> dict:
    return {key: (tuple(value.shape), value.dtype) for key, value in weights(folder).items()}


def assert_final_is_like(base, cwd):
    final = cwd / "holo1_dom_finetune_final"
    assert layout(final) == layout(base)
    assert any(not torch.equal(weights(final)[key], value) for key, value in weights(base).items()), "nothing changed"
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "dom_recipe.json"}
    assert wanted <= {path.name for path in final.iterdir()}
    recipe = json.loads((final / "dom_recipe.json").read_text())
    assert recipe["max_html_tokens"] == 120 and recipe["prompt"] and recipe["versions"]["transformers"]
    done = start_plain([], cwd, script=str(PROGRAMS / "loads_anywhere.py"), ours=False)
    assert done.returncode == 0, done.stderr


def with_old_names(folder, base):
    """The same checkpoint under the names that the Hub's Qwen2.5-VL repositories use."""
    from safetensors.torch import save_file

    shutil.copytree(base, folder)
    renamed = {}
    for key, value in weights(base).items():
        key = key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        renamed[key] = value
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_new_names(folder, base):
    """The same checkpoint under the names of the modules, as transformers 4.52 and later may have written it."""
    from safetensors.torch import save_file

    shutil.copytree(base, folder)
    renamed = {}
    for key, value in weights(base).items():
        if not key.startswith(("model.language_model.", "model.visual.", "lm_head.")):
            key = "model.visual." + key.removeprefix("visual.") if key.startswith("visual.") else key
            key = key.replace("model.", "model.language_model.", 1) if not key.startswith("model.visual.") else key
        renamed[key] = value
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


TRAIN = {"max_steps": 2, "learning_rate": 1e-2, "gradient_accumulation_steps": 4}
WAYS = {
    "plain": (start_plain, {}, {}),
    "plain, 4-bit": (start_plain, {"quantize": "4bit"}, {}),
    "plain, LoRA": (start_plain, {"lora": True}, {}),
    "plain, vision frozen": (start_plain, {"freeze_vision": True}, {}),
    "torchrun, 2 ranks": (start_torchrun, {}, {"processes": 2}),
    "ZeRO-3": (start_deepspeed, {}, {}),  # the launcher once; for the rest torchrun, which is much cheaper
    "ZeRO-3, 2 ranks, LoRA": (start_zero_3, {"lora": True}, {"processes": 2}),
    "ZeRO-3, 2 ranks, vision frozen": (start_zero_3, {"freeze_vision": True}, {"processes": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_train_leaves_a_folder_that_loads_anywhere(way, tiny_base, pages_folder, tmp_path):
    start, settings, options = WAYS[way]
    done = start(small_run(tiny_base, pages_folder, **TRAIN, **settings), tmp_path, **options)
    assert done.returncode == 0, output(done)
    assert_final_is_like(tiny_base, tmp_path)
    changed = {
        key
        for key, value in weights(tiny_base).items()
        if not torch.equal(weights(tmp_path / "holo1_dom_finetune_final")[key], value)
    }
    vision = {key for key in changed if "visual." in key}
    assert bool(vision) == (not settings), "the vision tower changes in full fine-tuning and only there"
    if "lora" in settings or "quantize" in settings:
        assert all("_proj.weight" in key for key in changed), changed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rename", "tie"), [(with_old_names, True), (with_new_names, False)], ids=["old names, tied", "new names, untied"]
)
def test_the_bases_own_key_names_come_back(rename, tie, pages_folder, tmp_path):
    base = rename(tmp_path / "named", make_base(tmp_path / "base", tie=tie))
    assert ("lm_head.weight" in layout(base)) == (not tie)
    for start in (start_plain, start_zero_3):
        done = start(small_run(base, pages_folder, **TRAIN), tmp_path)
        assert done.returncode == 0, output(done)
        assert_final_is_like(base, tmp_path)


@pytest.mark.slow
def test_random_weights_start_from_configuration_and_processor_alone(pages_folder, tmp_path):
    base, like = make_base(tmp_path / "base", weights=False), make_base(tmp_path / "like")
    assert not list(base.glob("*.safetensors"))
    finals = []
    for start, options in ((start_plain, {}), (start_zero_3, {"processes": 2})):
        done = start(small_run(base, pages_folder, random_weights=True, **TRAIN), tmp_path, **options)
        assert done.returncode == 0, output(done)
        final = tmp_path / "holo1_dom_finetune_final"
        assert layout(final) == layout(like)
        finals.append(weights(final))
    embedding = next(value for key, value in finals[1].items() if "embed_tokens" in key).float()
    assert 0.01 < embedding.std() < 0.1, "initialised as the architecture says, also when every rank holds a part"


@pytest.mark.slow
def test_offloaded_training_leaves_the_same_folder(tiny_base, pages_folder, tmp_path):
    config = json.loads((ROOT / "ds_z3_offload.json").read_text())
    done = start_zero_3(small_run(tiny_base, pages_folder, **TRAIN), tmp_path, config=config)
    assert done.returncode == 0, output(done)
    assert_final_is_like(tiny_base, tmp_path)


def tensors_of(folder):
    return {key: BaseTensor(key, shape, dtype, file) for key, (shape, dtype, file) in read_safetensors(folder).items()}


def test_a_difference_to_the_base_is_an_error_that_names_it(tiny_base):
    tensors, written = tensors_of(tiny_base), read_safetensors(tiny_base)
    compare_tensors(written, tensors)
    first, second, *_ = written
    damaged = {**written, "stray.weight": written[first]}
    del damaged[first]
    damaged[second] = ((1, 2), "F32", None)
    with pytest.raises(errors.PipelineError) as error:
        compare_tensors(damaged, tensors)
    message = str(error.value)
    assert f"missing {first}" in message and "unexpected stray.weight" in message and f"{second} is ((1, 2)" in message


def test_poisoned_weights_are_never_saved_and_terms_travel_along(tiny_base, tmp_path):
    from transformers import AutoModelForImageTextToText

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "LICENSE.md").write_text("the base's terms")
    model = AutoModelForImageTextToText.from_pretrained(base)
    tensors = base_tensors(base, PageSettings())
    processor = pipeline.load_processor(base, PageSettings())
    save = (model, tensors, base, processor, {"trust_remote_code": False}, tmp_path / "final")
    save_final(*save)
    assert (tmp_path / "final" / "LICENSE.md").read_text() == "the base's terms"
    with torch.no_grad():
        model.model.language_model.norm.weight[0] = float("nan")
    with pytest.raises(errors.NotFiniteError, match=r"model\.norm\.weight holds NaN"):
        save_final(*save)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "final").values())


def test_an_unwhole_final_folder_is_never_left(tiny_base, tmp_path, monkeypatch):
    """A save that fails half-way leaves the earlier final folder as it was."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(tiny_base)
    tensors = base_tensors(tiny_base, PageSettings())
    processor = pipeline.load_processor(tiny_base, PageSettings())
    folder = tmp_path / "final"
    recipe = {"trust_remote_code": False}
    save_final(model, tensors, tiny_base, processor, recipe, folder)
    before = sorted(path.name for path in folder.iterdir())

    def full(*unused, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.final_folder.copy_base_files", full)
    with pytest.raises(errors.DiskError, match="nothing half-written is left"):
        save_final(model, tensors, tiny_base, processor, recipe, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert sorted(path.name for path in folder.iterdir()) == before
    assert layout(folder) == layout(tiny_base)


def test_quantisation_leaves_the_vision_tower_whole(tiny_base):
    from types import SimpleNamespace

    settings = PageSettings(base_model=str(tiny_base), quantize="4bit")
    args = SimpleNamespace(bf16=False, fp16=False, deepspeed=None, device=torch.device("cpu"), seed=0)
    model = pipeline.load_model(tiny_base, settings, args)
    quantised = [name for name, weight in model.named_parameters() if type(weight).__name__ == "Params4bit"]
    assert quantised and not [name for name in quantised if "visual" in name or "lm_head" in name]


def test_a_tied_base_that_stores_its_head_as_well_keeps_both(tiny_base, tmp_path):
    from safetensors.torch import save_file
    from transformers import AutoModelForImageTextToText

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    tensors = weights(base)
    embedding = next(value for key, value in tensors.items() if key.endswith("embed_tokens.weight"))
    save_file({**tensors, "lm_head.weight": embedding.clone()}, base / "model.safetensors", metadata={"format": "pt"})
    tensors = base_tensors(base, PageSettings())
    model = AutoModelForImageTextToText.from_pretrained(base)
    processor = pipeline.load_processor(base, PageSettings())
    save_final(model, tensors, base, processor, {"trust_remote_code": False}, tmp_path / "final")
    assert layout(tmp_path / "final") == layout(base)
