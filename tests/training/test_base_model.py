"""The base model: what its checkpoint holds, and bases that cannot be trained."""

import json
import re
import shutil

import pytest
import torch
from conftest import (
    ROOT,
    make_base,
    make_qwen3_vl_base,
    make_transformers_4_base,
    output,
    shard,
    small_run,
    start_plain,
    start_zero_3,
    weights,
)
from safetensors.torch import save_file

from training import errors
from training.base_model import INDEX, base_tensors, check_complete, empty_model
from training.settings import PageSettings

WHOLE = "model.safetensors"


def copy_of(base, folder, change=None):
    """The base in `folder`, its weights in one file and changed by a function of their dictionary, in place."""
    shutil.copytree(base, folder)
    tensors = weights(folder)
    for file in [*folder.glob("*.safetensors"), *folder.glob(INDEX)]:
        file.unlink()
    if change is not None:
        change(tensors)
    save_file(tensors, folder / WHOLE, metadata={"format": "pt"})
    return folder


def configured(folder, **values):
    """Values in its config.json, in the text part, too, as far as that has them."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config", {})):
        part |= {name: value for name, value in values.items() if name in part}
    path.write_text(json.dumps(config))
    return folder


def refused(base, message, **settings):
    with pytest.raises(errors.SettingsError, match=message) as caught:
        base_tensors(base, PageSettings(base_model=str(base), **settings))
    return str(caught.value)


def test_a_tensor_that_the_architecture_does_not_have_is_refused(tiny_base, tmp_path):
    stray = {"model.stray.weight": torch.ones(1)}
    base = copy_of(tiny_base, tmp_path / "base", lambda tensors: tensors.update(stray))
    refused(base, r"model\.stray\.weight is no weight of Qwen2_5_VL")


def test_a_damaged_shard_and_another_architecture_are_refused(tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / WHOLE).write_bytes((base / WHOLE).read_bytes()[:-100])
    refused(base, r"model\.safetensors is damaged")
    (base / "config.json").write_text('{"model_type": "llama"}')
    refused(base, r"is a llama; .*\(qwen2_5_vl\), .*\(qwen3_vl\).* or .* can be")
    (base / "config.json").write_text('{"model_type": "qwen2_5')
    refused(base, "no configuration that loads")


def test_a_base_without_weights_is_refused(tmp_path):
    base = make_base(tmp_path / "base", weights=False)
    refused(base, r"no \.safetensors there")


# -----------------------------------------------------------------------------
# Bases that lack weights

BASES = {
    "the demo's": lambda folder: ROOT / "demo" / "tiny_holo1",
    "untied": lambda folder: make_base(folder, tie=False),
    "Qwen3-VL": make_qwen3_vl_base,
    "transformers 4": make_transformers_4_base,
}


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_every_single_weight_that_a_base_lacks_is_named(make, tmp_path):
    settings = PageSettings(base_model=str(base := make(tmp_path / "base")))
    tensors, model = base_tensors(base, settings), empty_model(base, "meta", torch.bfloat16, False)
    assert len(tensors) >= 50
    for lost in tensors:
        keys = {tensor.name: key for key, tensor in tensors.items() if key != lost}
        with pytest.raises(errors.SettingsError, match=rf"lacks 1 of the {len(tensors)} .*: {re.escape(lost)};"):
            check_complete(model, keys, settings)


KINDS = {  # one of each kind, by the end of its key
    "vision, MLP": "visual.blocks.1.mlp.up_proj.weight",
    "vision, bias": "visual.blocks.0.attn.qkv.bias",
    "vision, norm": "visual.blocks.0.norm1.weight",
    "patch embedding": "visual.patch_embed.proj.weight",
    "merger": "visual.merger.mlp.2.bias",
    "language, MLP": "layers.1.mlp.down_proj.weight",
    "language, bias": "layers.0.self_attn.k_proj.bias",
    "language, norm": "layers.1.post_attention_layernorm.weight",
    "last norm": "model.norm.weight",
    "embedding": "embed_tokens.weight",
    "head": "lm_head.weight",
}


@pytest.mark.parametrize("end", KINDS.values(), ids=KINDS)
def test_each_kind_of_weight_is_looked_for_in_the_files(end, tmp_path):
    base = copy_of(untied := make_base(tmp_path / "untied", tie=False), tmp_path / "base", lambda t: take(t, end))
    lost = (weights(untied).keys() - weights(base).keys()).pop()
    for settings in ({}, {"lora": True}, {"quantize": "4bit"}, {"fast": False}, {"plan": True}):
        assert f": {lost};" in refused(base, "lacks 1 of the ", **settings)
    assert base_tensors(base, PageSettings(base_model=str(base), random_weights=True)), "nothing has to be there"


def take(tensors, end):
    (key,) = [key for key in tensors if key.endswith(end)]
    return tensors.pop(key)


def test_a_tied_head_is_there_where_the_embedding_is(tiny_base, tmp_path):
    assert not any("lm_head" in key for key in weights(tiny_base))
    base_tensors(tiny_base, PageSettings())
    base = configured(copy_of(tiny_base, tmp_path / "untied"), tie_word_embeddings=False)
    refused(base, r"lacks 1 of the \d+ weights .*: lm_head\.weight;")

    def only_the_head(tensors):
        tensors["lm_head.weight"] = take(tensors, "embed_tokens.weight")

    refused(copy_of(tiny_base, tmp_path / "head", only_the_head), r"lacks 1 .*: model\.embed_tokens\.weight;")


def test_a_head_that_differs_from_the_embedding_that_it_is_tied_to_is_refused(tiny_base, tmp_path):
    def with_head(tensors):
        tensors["lm_head.weight"] = next(t for key, t in tensors.items() if key.endswith("embed_tokens.weight")).clone()

    same = copy_of(tiny_base, tmp_path / "same", with_head)
    assert "lm_head.weight" in base_tensors(same, PageSettings())
    base = copy_of(same, tmp_path / "differs", lambda tensors: tensors["lm_head.weight"][-1].add_(1))
    refused(base, r"ties lm_head\.weight to model\.embed_tokens\.weight, and they differ")


def test_ten_of_many_lost_weights_are_named_as_the_base_names_them(tiny_base, tmp_path):
    def blind(tensors):
        for key in [key for key in tensors if key.startswith("visual.")]:
            del tensors[key]

    base = copy_of(tiny_base, tmp_path / "blind", blind)
    said = refused(base, r"lacks 30 of the 56 weights .*: visual\.patch_embed\.proj\.weight, .* and 20 more;")
    assert said.count("visual.") == 10
    new = configured(copy_of(tiny_base, tmp_path / "deeper"), num_hidden_layers=3, layer_types=["full_attention"] * 3)
    refused(new, r": model\.layers\.2\.self_attn\.q_proj\.weight, ")

    def newer(tensors):
        for key in list(tensors):
            inner = "model.language_model." if key.startswith("model.") else "model.visual."
            tensors[inner + key.partition(".")[2]] = tensors.pop(key)
        take(tensors, "visual.merger.ln_q.weight")

    refused(copy_of(tiny_base, tmp_path / "newer", newer), r": model\.visual\.merger\.ln_q\.weight;")


@pytest.mark.parametrize("values", [{"num_hidden_layers": 9}, {"num_hidden_layers": "2"}, {"num_attention_heads": 7}])
def test_a_configuration_that_contradicts_itself_is_refused(tiny_base, tmp_path, values):
    """Of which transformers and huggingface_hub tell by exceptions of their own."""
    refused(
        configured(copy_of(tiny_base, tmp_path / "base"), **values), "has no configuration that loads|no model fits"
    )


def test_a_wrong_shape_and_one_weight_under_two_names_are_refused(tiny_base, tmp_path):
    def short(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:16].clone()

    refused(copy_of(tiny_base, tmp_path / "short", short), r"model\.norm\.weight is \[16\], by config\.json \[32\]")

    def twice(tensors):
        tensors["model.language_model.norm.weight"] = tensors["model.norm.weight"].clone()

    refused(copy_of(tiny_base, tmp_path / "twice", twice), r"norm\.weight and .*norm\.weight are the same weight")


def sharded(base, folder):
    """The base in two files with an index, and the index as a dictionary."""
    copy_of(base, folder)
    (folder / WHOLE).rename(folder.with_suffix(".safetensors"))
    from safetensors.torch import load_file

    shard(load_file(folder.with_suffix(".safetensors")), folder)
    return json.loads((folder / INDEX).read_text())


def test_shards_and_their_index_have_to_agree(tiny_base, tmp_path):
    base = tmp_path / "base"
    index = sharded(tiny_base, base)
    assert len(base_tensors(base, PageSettings())) == len(index["weight_map"]) == 56
    first, second = sorted(set(index["weight_map"].values()))

    def with_index(**weight_map):
        (base / INDEX).write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **weight_map}}))

    with_index(**{"model.norm.weight": "model-00003-of-00003.safetensors"})
    refused(base, r"lacks model-00003-of-00003\.safetensors, which its .*index\.json names")
    with_index(**{"model.lost.weight": first})
    refused(base, rf"lacks model\.lost\.weight \({first}\), which its .*index\.json names")
    with_index(**{key: second for key, name in index["weight_map"].items() if name == first})
    refused(base, rf"has {first} beside what model\.safetensors\.index\.json names: transformers leaves that out")
    there = index["weight_map"].pop("model.norm.weight")
    with_index()
    refused(base, r"index\.json does not say where model\.norm\.weight is")
    with_index(**{"model.norm.weight": second if there == first else first})
    refused(base, r"index\.json does not say where model\.norm\.weight is")
    (base / INDEX).write_text('{"weight_map": [')
    refused(base, r"index\.json is damaged")
    (base / INDEX).unlink()
    refused(base, r"and no model\.safetensors\.index\.json; fetch that, too")


def test_a_weight_in_two_files_is_refused(tiny_base, tmp_path):
    base = tmp_path / "base"
    index = sharded(tiny_base, base)
    name = index["weight_map"]["model.norm.weight"]
    (other,) = set(index["weight_map"].values()) - {name}
    from safetensors.torch import load_file

    tensors = load_file(base / other) | {"model.norm.weight": torch.zeros(32, dtype=torch.bfloat16)}
    save_file(tensors, base / other, metadata={"format": "pt"})
    refused(base, r"model\.norm\.weight is in model-.* and in model-")
    whole = copy_of(tiny_base, tmp_path / "whole")
    shutil.copy(whole / WHOLE, whole / "model.fp16.safetensors")
    refused(whole, r"has model\.fp16\.safetensors beside model\.safetensors")


def test_a_plan_needs_no_weights_and_looks_at_those_of_a_folder(tiny_base, tmp_path):
    settings = PageSettings(base_model="user/name", plan=True)
    base = tmp_path / "base"
    sharded(tiny_base, base)
    next(base.glob("*.safetensors")).unlink()
    assert len(base_tensors(base, settings)) == 56, "what an earlier download has left in the cache does not matter"
    refused(base, "lacks model-0000", plan=True)


WAYS = {
    "plain": (start_plain, {}, {}),
    "LoRA": (start_plain, {"lora": True}, {}),
    "its own forward": (start_plain, {"fast": False}, {}),
    "4-bit": (start_plain, {"quantize": "4bit"}, {}),
    "ZeRO-3, 2 ranks": (start_zero_3, {}, {"processes": 2}),
    "ZeRO-3, LoRA": (start_zero_3, {"lora": True}, {}),
}
LOST = ("visual.blocks.1.mlp.up_proj.weight", "layers.1.mlp.down_proj.weight", "lm_head.weight")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_train_refuses_a_base_that_lacks_a_weight(way, pages_folder, tmp_path):
    """A vision weight, a language weight, the head of an untied model; and nothing is written."""
    start, settings, options = WAYS[way]
    untied, ranks = make_base(tmp_path / "untied", tie=False), options.get("processes", 1)
    for number, end in enumerate(LOST):
        base = copy_of(untied, tmp_path / f"base-{number}", lambda tensors, end=end: take(tensors, end))
        (status := tmp_path / f"status-{number}").mkdir()
        flags = small_run(base, pages_folder, max_steps=1, **settings)
        done = start(flags, tmp_path, env={"HOLO1_STATUS_DIR": str(status)}, **options)
        # What the wrapper makes its own exit code; torchrun's is 1 whatever its ranks end with.
        codes = [(status / f"rank-{rank}").read_text() for rank in range(ranks)]
        # A launcher that sees one rank's refusal first may stop the others before they came to say the same.
        assert done.returncode != 0 and "2" in codes and set(codes) <= {"2", "143"}, output(done)
        assert re.search(rf"lacks 1 of the 57 weights .*{re.escape(end)};", done.stderr), output(done)
        assert "Traceback" not in done.stderr and not list(tmp_path.glob("*final*"))
        assert not list(tmp_path.glob("holo1_dom_finetune_output/page*")), "before pages are read"
