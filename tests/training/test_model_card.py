"""The model card: what the facts say and no more, safely, under the base's own licence."""

import json
from pathlib import Path
from typing import Any

import pytest
from fake_hub import WRITER
from huggingface_hub import ModelCard

from scoring import metrics
from training.model_card import QWEN_RESEARCH, derived_licence, write_model_card

FACTS: dict[str, Any] = {
    "base_model": "Hcompany/Holo1-3B",
    "base_revision": "abc123",
    "base_licence": None,
    "dataset": "HuggingFaceM4/WebSight",
    "dataset_config": "v0.1",
    "dataset_revision": None,
    "dataset_licence": "cc-by-4.0",
    "pages_trained": 961,
    "pages_held_out": 20,
    "drops": "1,000 asked, 37 too long, 2 unreadable, 961 kept",
    "settings": {"learning_rate": 1e-5, "num_train_epochs": 1},
    "recipe": {"prompt": "Write the HTML.", "max_pixels": 1003520},
    "versions": {"torch": "2.11", "transformers": "5.23"},
    "hardware": "1 x H200",
    "results": {"n": 20, "valid": 0.95, "exact": 0.6, "truncated": 0.05, "looping": 0.0, "tokens_per_second": 41.5},
    "results_before": None,
    "train_loss": 0.25,
    "steps": 120,
    "seconds": 900.0,
    "commit": None,
    "repo_id": "user/holo1_ui2dom",
    "lora": False,
    "quantization": "none",
}


@pytest.mark.parametrize(
    ("base", "given", "expected"),
    [
        ("Hcompany/Holo1-3B", None, ("other", "qwen-research")),
        ("Hcompany/Holo1-3B", "apache-2.0", ("other", "qwen-research")),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "mit", ("other", "qwen-research")),
        ("Hcompany/Holo1-7B", None, ("apache-2.0", None)),
        ("Qwen/Qwen2.5-VL-7B-Instruct", None, ("apache-2.0", None)),
        ("someone/model", "MIT", ("mit", None)),
        ("someone/model", "My Own Terms\n---\nlicense: mit", ("other", "my-own-terms-license-mit")),
    ],
)
def test_the_licence_is_the_bases_own(base: str, given: str | None, expected: tuple[str, str | None]) -> None:
    assert derived_licence(base, given)[:2] == expected


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: cc-by-nc-4.0", ("cc-by-nc-4.0", None, None)),
        (
            "license: other\nlicense_name: my-terms\nlicense_link: https://x.test",
            ("other", "my-terms", "https://x.test"),
        ),
        ("license: mit\nbase_model: Hcompany/Holo1-3B", QWEN_RESEARCH),
        ("tags: [a]", ("other", "unknown-see-the-base-model", None)),
        ("license: [unclosed", ("other", "unknown-see-the-base-model", None)),
        (None, ("other", "unknown-see-the-base-model", None)),
    ],
)
def test_a_local_bases_licence_is_read_from_its_card(
    tmp_path: Path, front: str | None, expected: tuple[str | None, ...]
) -> None:
    if front is not None:
        (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# Base\n")
    assert derived_licence(str(tmp_path)) == expected


def front_matter(text: str) -> dict[str, Any]:
    """As the Hub's own client reads it."""
    return ModelCard(text).data.to_dict()


def test_the_card_says_what_the_facts_say(tmp_path: Path) -> None:
    text = write_model_card(tmp_path, FACTS)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text
    assert front_matter(text) == {
        "base_model": "Hcompany/Holo1-3B",
        "base_model_relation": "finetune",
        "datasets": ["HuggingFaceM4/WebSight"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "qwen-research",
        "license_link": QWEN_RESEARCH[2],
        "pipeline_tag": "image-text-to-text",
        "tags": ["screenshot-to-html"],
    }
    for row in ("| valid | not measured | 0.95 |", "| train_loss | 0.25 |", "| commit | unknown |", "| steps | 120 |"):
        assert row in text
    for fact in ("961 kept", "learning_rate | 1e-05", "1003520", "1 x H200", "cc-by-4.0, asks for credit"):
        assert fact in text
    assert "Improved using Qwen" in text  # section 4.b of the Qwen research licence
    assert "--model user/holo1_ui2dom --image" in text and 'from_pretrained("user/holo1_ui2dom")' in text


def test_the_cards_python_compiles_and_nothing_is_invented(tmp_path: Path) -> None:
    facts = {"base_model": str(tmp_path), "dataset": str(tmp_path), "drops": f"2 of {tmp_path}/a.png unreadable"}
    text = write_model_card(tmp_path, facts)
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")
    assert set(front_matter(text)) == {"library_name", "license", "license_name", "pipeline_tag", "tags"}
    assert "| valid | not measured | not measured |" in text
    assert str(tmp_path.parent) not in text  # a folder's name is enough


def test_hostile_facts_stay_inside_their_cells(tmp_path: Path) -> None:
    evil = "x'\"\n---\nlicense: mit\n```\n| a | <script>alert(1)</script> \\ `code`"
    facts = {k: {evil: evil} if isinstance(v, dict) else evil for k, v in FACTS.items()}
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(f"---\n{json.dumps({'license_name': evil, 'license_link': evil})}\n---\n")
    facts |= {"base_model": str(base), "results_before": {"valid": evil}}
    text = write_model_card(tmp_path, facts)
    assert sorted(front_matter(text)) == sorted(
        ["library_name", "license", "license_link", "license_name", "pipeline_tag", "tags"]
    )
    assert front_matter(text)["license"] == "other" and "<script" not in text
    body = text.split("\n---\n", 1)[1]
    assert body.count("\n```") == 6 and "\n---" not in body
    cells = [line for line in body.splitlines() if line.startswith("|")]
    assert all(line.count("|") in (3, 4) and line.endswith("|") for line in cells)


def test_no_token_reaches_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "an-odd-token-of-a-mirror")
    leaks = {"settings": {"hub_token": WRITER, "note": "an-odd-token-of-a-mirror", "max_html_tokens": 4096}}
    text = write_model_card(tmp_path, FACTS | leaks | {"hardware": f"box {WRITER}", "commit": WRITER})
    assert WRITER not in text and "an-odd-token" not in text and "4096" in text


def test_a_parent_in_a_list_binds_as_one_alone_does(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nbase_model:\n- Qwen/Qwen2.5-VL-3B-Instruct\n---\n")
    assert derived_licence(str(tmp_path))[1] == "qwen-research"


def test_the_card_tells_the_difference_and_whether_other_pages_chose(tmp_path: Path) -> None:
    found = {"difference": 0.25, "low": 0.125, "high": 0.5, "p": 0.0125}
    comparison = {"metrics": {metrics.CHOOSING: found}, "apart": True}
    text = write_model_card(tmp_path, FACTS | {"results": FACTS["results"] | {"comparison": comparison}})
    assert "Difference in likeness: +0.250 (95 % bootstrap interval +0.125 to +0.500, p = 0.0125" in text
    assert "The same pages chose the weights" not in text
    comparison["apart"] = False
    text = write_model_card(tmp_path, FACTS | {"results": FACTS["results"] | {"comparison": comparison}})
    assert "The same pages chose the weights" in text


def test_a_metric_added_to_the_table_is_on_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = metrics.Metric("excess_text", "excess text", lambda pair: 0.0, better="lower")
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, more))
    text = write_model_card(tmp_path, FACTS | {"results": FACTS["results"] | {"excess_text": 0.125}})
    assert "| excess text | not measured | 0.125 |" in text
    monkeypatch.setattr(metrics, "CHOOSING", "excess_text")
    text = write_model_card(tmp_path, FACTS)
    assert text.index("| excess text |") < text.index("| likeness |"), "the one that chooses comes first"


def test_of_several_datasets_each_is_named_and_the_terms_of_all_hold(tmp_path):
    each = [
        {"dataset": "HuggingFaceM4/WebSight", "share": 0.7, "dataset_licence": "cc-by-4.0"},
        {"dataset": "my_pages", "share": 0.2, "dataset_licence": None},
        {"dataset": "user/more", "share": 0.1, "dataset_licence": "cc-by-nc-4.0"},
    ]
    licences = "cc-by-4.0, unknown for my_pages, cc-by-nc-4.0"
    named = "HuggingFaceM4/WebSight and my_pages and user/more"
    text = write_model_card(tmp_path, FACTS | {"dataset": named, "datasets": each, "dataset_licence": licences})
    card = ModelCard(text)
    assert card.data.datasets == ["HuggingFaceM4/WebSight", "user/more"]
    assert f"The data: {licences}, asks for credit, forbids commercial use." in text
    assert "| dataset 1: share | 0.7 |" in text and "| dataset 3: licence | cc-by-nc-4.0 |" in text
