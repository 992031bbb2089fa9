"""Model and saving: what training leaves behind loads anywhere, with the base's own keys, shapes and dtypes."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import (
    PROGRAMS,
    ROOT,
    make_base,
    make_transformers_4_base,
    output,
    run_script,
    small_run,
    start_deepspeed,
    start_plain,
    start_torchrun,
    start_zero_3,
    weights,
)

import holo1_dom_finetune as pipeline
from training import errors
from training.base_model import INDEX, BaseTensor, base_tensors, read_safetensors
from training.final_folder import BASE_FILES, compare_tensors, save_final, write_limits
from training.model_card import LOADED_IN
from training.publishing import PUBLISHED
from training.settings import PageSettings


def layout(folder) -> dict:
    return {key: (tuple(value.shape), value.dtype) for key, value in weights(folder).items()}


def assert_final_is_like(base, cwd):
    final = cwd / "holo1_dom_finetune_final"
    assert layout(final) == layout(base)
    assert any(not torch.equal(weights(final)[key], value) for key, value in weights(base).items()), "nothing changed"
    copied = {path.name for path in base.iterdir() if path.suffix in (".json", ".jinja")} - {INDEX}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= copied
    others = {path.name for path in final.iterdir() if path.suffix != ".safetensors"}
    beside = {"dom_recipe.json", "README.md", "evaluation", "use_model_from_hub.py", "example.png"}
    assert others - {INDEX} == copied | beside
    assert all((final / name).read_bytes() == (base / name).read_bytes() for name in copied), "but the pixel limits"
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
    "Qwen3-VL, ZeRO-3, 2 ranks, LoRA": (start_zero_3, {"lora": True}, {"processes": 2}),
    "Qwen3-VL, plain, 4-bit": (start_plain, {"quantize": "4bit"}, {}),
    "Qwen3.5, ZeRO-3, 2 ranks, vision frozen": (start_zero_3, {"freeze_vision": True}, {"processes": 2}),
    "Qwen3.5, plain, 4-bit": (start_plain, {"quantize": "4bit"}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_train_leaves_a_folder_that_loads_anywhere(way, base_of, pages_folder, tmp_path):
    start, settings, options = WAYS[way]
    base = base_of(way)
    done = start(small_run(base, pages_folder, **TRAIN, **settings), tmp_path, **options)
    assert done.returncode == 0, output(done)
    assert_final_is_like(base, tmp_path)
    changed = {
        key
        for key, value in weights(base).items()
        if not torch.equal(weights(tmp_path / "holo1_dom_finetune_final")[key], value)
    }
    vision = {key for key in changed if "visual." in key}
    assert bool(vision) == (not settings), "the vision tower changes in full fine-tuning and only there"
    if "lora" in settings or "quantize" in settings:
        assert all(re.search(r"_proj(_qkv|_z)?\.weight", key) for key in changed), changed
    assert not any(key.startswith("mtp.") for key in changed), "what transformers does not load is the base's own"


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


# -----------------------------------------------------------------------------
# All that is not weights


def saved(base, folder, trust=False, **settings):
    """A model as it was loaded, saved through the real function."""
    from transformers import AutoModelForImageTextToText

    settings = PageSettings(base_model=str(base), **settings)
    model, processor = AutoModelForImageTextToText.from_pretrained(base), pipeline.load_processor(base, settings)
    save_final(model, base_tensors(base, settings), base, processor, {"trust_remote_code": trust}, folder)
    return folder


LEFT_BEHIND = (
    "pytorch_model.bin README.md trainer_state.json optimizer.pt training_args.bin notes.txt modeling_own.py "
    "manifest.json .git/config global_step1/model.pt onnx/config.json"
).split()
TAKEN_ALONG = (
    "vocab.json merges.txt added_tokens.json special_tokens_map.json video_preprocessor_config.json NOTICE.txt "
    "additional_chat_templates/tools.jinja"
).split()


def test_the_bases_own_files_come_along_byte_for_byte_and_nothing_else(tmp_path):
    base = make_transformers_4_base(tmp_path / "base")
    (base / "chat_template.json").rename(base / "chat_template.jinja")  # it forbids others beside it
    for name in [*LEFT_BEHIND, *TAKEN_ALONG]:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b" {\t}\r\n")
    final = saved(base, tmp_path / "final")
    own = "config generation_config preprocessor_config tokenizer tokenizer_config".split()
    copied = [*TAKEN_ALONG, "chat_template.jinja", *(f"{name}.json" for name in own)]
    found = {path.relative_to(final).as_posix() for path in final.rglob("*") if path.is_file()}
    assert found == {*copied, "dom_recipe.json", "model.safetensors"}
    changed = [name for name in copied if (final / name).read_bytes() != (base / name).read_bytes()]
    assert changed == ["preprocessor_config.json"]
    before, after = ((folder / changed[0]).read_text() for folder in (base, final))
    assert after == before.replace("12845056", str(PageSettings.max_pixels)), "the limit that was trained with, no more"
    assert "modeling_own.py" in {path.name for path in saved(base, tmp_path / "trusted", trust=True).iterdir()}


def test_what_is_copied_may_be_published():
    assert {name for name in BASE_FILES if not name.startswith("tokenizer")} <= set(PUBLISHED)
    assert {"tokenizer*.json", "tokenizer.model"} <= set(PUBLISHED)


OWN = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, "merge_size": 2}
TRAINED = {"size": {"shortest_edge": 3136, "longest_edge": 50176}, "merge_size": 2}
LAYOUTS = [  # of an image processor's options, before and after
    ({"min_pixels": 3136, "max_pixels": 12845056}, {"min_pixels": 3136, "max_pixels": 50176}),
    ({"max_pixels": 12845056}, {"max_pixels": 50176}),
    ({}, {"max_pixels": 50176}),
    ({"size": {"longest_edge": 12845056}, "max_pixels": None}, {"size": {"longest_edge": 50176}, "max_pixels": None}),
    ({"size": {"min_pixels": 3136, "max_pixels": 12845056}}, {"size": {"min_pixels": 3136, "max_pixels": 50176}}),
    (
        {"max_pixels": 12845056, "size": {"shortest_edge": 3136, "longest_edge": 12845056}},
        {"max_pixels": 50176, "size": {"shortest_edge": 3136, "longest_edge": 50176}},
    ),
]


@pytest.mark.parametrize(("before", "after"), LAYOUTS, ids=lambda options: json.dumps(options)[:40])
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_limits_are_written_by_the_names_that_are_there(name, before, after, tmp_path):
    def laid_out(options):
        own = {"patch_size": 14, "odd": "é", **options}
        return own if name.startswith("pre") else {"image_processor": own, "video_processor": {"max_pixels": 12845056}}

    for indent in (None, 2, 4, "\t"):
        (tmp_path / name).write_text(json.dumps(laid_out(before), indent=indent, ensure_ascii=False), encoding="utf-8")
        write_limits(tmp_path / name, OWN, TRAINED)
        wanted = json.dumps(laid_out(after), indent=indent, ensure_ascii=False)
        assert (tmp_path / name).read_text(encoding="utf-8") == wanted


def test_limits_of_another_kind_are_written_as_they_are(tmp_path):
    """A processor that means edges by `size`, and one whose file has nothing for pictures."""
    path = tmp_path / "preprocessor_config.json"
    path.write_text('{"size": {"longest_edge": 1536}, "do_pad": true}')
    write_limits(path, {"size": {"longest_edge": 1536}}, {"size": {"longest_edge": 512}})
    assert json.loads(path.read_text()) == {"size": {"longest_edge": 512}, "do_pad": True}
    path = tmp_path / "processor_config.json"
    path.write_text('{"processor_class" : "Qwen2_5_VLProcessor"}\n\n')
    write_limits(path, OWN, TRAINED)
    assert path.read_text() == '{"processor_class" : "Qwen2_5_VLProcessor"}\n\n'


def test_large_weights_become_shards_with_the_index_that_others_read(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr("training.final_folder.SHARD_SIZE", "40KB")
    final = saved(tiny_base, tmp_path / "final")
    index = json.loads((final / INDEX).read_text())
    files = sorted(path.name for path in final.glob("*.safetensors"))
    count = len(files)
    assert count > 1 and files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert index["weight_map"].keys() == weights(tiny_base).keys() and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights(tiny_base).values())
    assert layout(final) == layout(tiny_base) and len(read_safetensors(final)) == 56


# -----------------------------------------------------------------------------
# The oldest transformers that a base itself works in

# What that needs in other versions than this project, or not at all any more; all else, torch first, is what runs here.
OLDER = (
    "transformers==4.57.* huggingface_hub<1 tokenizers<0.23 requests urllib3 idna certifi charset_normalizer".split()
)


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory) -> str:
    """A folder for PYTHONPATH, before which the running environment's own versions are hidden."""
    folder = str(tmp_path_factory.mktemp("transformers_4"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *OLDER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"pip cannot install transformers 4.57: {done.stderr.strip()[-300:]}")
    return folder


def told(folders, picture, cwd, python_path="") -> list[dict]:
    """What tests/programs/writes_tokens.py says of each folder."""
    program = str(PROGRAMS / "writes_tokens.py")
    done = run_script(program, str(picture), *map(str, folders), cwd=cwd, env={"PYTHONPATH": python_path})
    assert done.returncode == 0, output(done)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_what_training_leaves_writes_the_same_in_transformers_4(transformers_4, pages_folder, tmp_path):
    """Final folder and checkpoint of the demo's base and of one that transformers 4 has laid out."""
    folders = []
    for base in (ROOT / "demo" / "tiny_holo1", make_transformers_4_base(tmp_path / "base")):
        (cwd := tmp_path / f"of {base.name}").mkdir()
        flags = {"max_steps": 2, "learning_rate": 1e-4, "gradient_accumulation_steps": 4, "max_pixels": 28 * 28 * 20}
        flags |= {"save_strategy": "steps", "save_steps": 2}
        done = start_plain(small_run(base, pages_folder, **flags), cwd)
        assert done.returncode == 0, output(done)
        folders += [cwd / "holo1_dom_finetune_final", cwd / "holo1_dom_finetune_output" / "checkpoint-2"]
        shutil.copy(folders[0] / "dom_recipe.json", folders[-1])
    picture = max(pages_folder.glob("*.png"), key=lambda path: path.stat().st_size)
    now, before = told(folders, picture, tmp_path), told(folders, picture, tmp_path, transformers_4)
    assert [run.pop("version").rpartition(".")[0] for run in (now[0], before[0])] == [*reversed(LOADED_IN)]
    assert len(now) == 4 and len(set(now[0]["answer"])) > 5
    for new, old in zip(now, before):
        assert new.pop("logits") == pytest.approx(old.pop("logits"), abs=1e-4)
        assert new["wrong"] == old["wrong"] == {}
        rows, columns = new["patches"][1:]
        assert rows * columns <= 4 * 20, "the limit of the training, also where nobody reads the recipe"
        assert {**new, "version": 0} == {**old, "version": 0}
