"""What a run is made of: with its recipe, training and use ask the same question, and no folder's place is told."""

from types import SimpleNamespace

import use_model_from_hub as use
from training.mixture import asked_datasets
from training.recipe import facts_of_several, make_recipe, optimizer_of, public_name
from training.settings import resolve


def test_of_a_local_folder_only_its_name_is_told(tmp_path, monkeypatch):
    (tmp_path / "my_pages").mkdir()
    monkeypatch.chdir(tmp_path)
    assert public_name(str(tmp_path / "my_pages")) == public_name("./my_pages") == "my_pages"
    assert public_name("HuggingFaceM4/WebSight") == "HuggingFaceM4/WebSight"


def test_a_recipe_asks_what_training_asked(tmp_path):
    settings = resolve(["--prompt", "Write it.", "--max_pixels", "123456", "--max_html_tokens", "77"]).settings
    recipe = make_recipe(settings, {"commit": "abc"})
    assert (recipe["prompt"], recipe["max_pixels"], recipe["max_html_tokens"]) == ("Write it.", 123456, 77)
    assert recipe["repetition_penalty"] == 1.0 and recipe["trust_remote_code"] is False and recipe["commit"] == "abc"
    assert use.Recipe.__dataclass_fields__.keys() <= recipe.keys()


def test_the_optimizer_is_the_one_that_trains():
    assert optimizer_of(SimpleNamespace(deepspeed=None, optim="adamw_8bit")) == "adamw_8bit"
    config = SimpleNamespace(config={"optimizer": {"type": "Adam"}})
    args = SimpleNamespace(deepspeed="ds.json", hf_deepspeed_config=config, optim="adamw_torch_fused")
    assert optimizer_of(args) == "Adam (DeepSpeed's)"


def test_of_several_datasets_every_licence_is_told_once(tmp_path):
    (tmp_path / "mine").mkdir()
    flags = ["--dataset", "xcodemind/webcode2m:0.5", "--dataset", "xcodemind/webcode2m_purified", "--dataset"]
    facts = facts_of_several(asked_datasets(resolve([*flags, str(tmp_path / "mine")]).settings))
    assert facts["dataset_licence"] == "cc-by-4.0, unknown for mine"
    assert [(each["dataset"], each["share"], each["dataset_licence"]) for each in facts["datasets"]] == [
        ("xcodemind/webcode2m", 0.5, "cc-by-4.0"),
        ("xcodemind/webcode2m_purified", 0.25, "cc-by-4.0"),
        ("mine", 0.25, None),
    ]
