"""The model card: what the facts say and no more, safely, under the base's own licence."""

import json
from pathlib import Path
from typing import Any

import pytest
from card_examples import numbers_without_a_source
from fake_hub import WRITER, problems_of_card
from huggingface_hub import ModelCard

from scoring import metrics
from training.evaluation import parts_of, score_held_out
from training.model_card import MEASURES, QWEN_RESEARCH, derived_licence, write_model_card
from training.results import compare_results

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
        ("Hcompany/Holo-3.1-4B", None, ("apache-2.0", None)),
        ("someone/model", "MIT", ("mit", None)),
        ("someone/model", "My Own Terms\n---\nlicense: mit", ("other", "my-own-terms-license-mit")),
    ],
)
def test_the_licence_is_the_bases_own(base: str, given: str | None, expected: tuple[str, str | None]) -> None:
    assert derived_licence(base, given)[:2] == expected


def test_a_licence_in_another_script_still_has_a_name():
    """The Hub refuses `other` without one."""
    assert derived_licence("base", "中文许可")[:2] == ("other", "unknown-see-the-base-model")


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
    for row in ("| valid | 0.950 | the share", "| train_loss | 0.25 |", "| steps | 120 |", "| measure | score | what"):
        assert row in text
    assert "not measured" not in text and "| commit |" not in text and "before" not in text
    for fact in ("961 kept", "learning_rate | 1e-05", "1003520", "1 x H200", "cc-by-4.0, asks for credit"):
        assert fact in text
    assert "Improved using Qwen" in text  # section 4.b of the Qwen research licence
    assert "--model user/holo1_ui2dom --image" in text and 'snapshot_download("user/holo1_ui2dom")' in text


def test_the_cards_python_compiles_and_nothing_is_invented(tmp_path: Path) -> None:
    facts = {"base_model": str(tmp_path), "dataset": str(tmp_path), "drops": f"2 of {tmp_path}/a.png unreadable"}
    text = write_model_card(tmp_path, facts)
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")
    assert set(front_matter(text)) == {"library_name", "license", "license_name", "pipeline_tag", "tags"}
    assert "not judged yet" in text and "| measure |" not in text
    assert str(tmp_path.parent) not in text  # a folder's name is enough


def test_hostile_facts_stay_inside_their_cells(tmp_path: Path) -> None:
    evil = "x'\"\n---\nlicense: mit\n```\n| a | <script>alert(1)</script> \\ `code`"
    facts = {k: {evil: evil} if isinstance(v, dict) else evil for k, v in FACTS.items()}
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(f"---\n{json.dumps({'license_name': evil, 'license_link': evil})}\n---\n")
    facts |= {"base_model": str(base), "results_before": {"valid": evil}}
    text = write_model_card(tmp_path, facts)
    assert sorted(front_matter(text)) == ["library_name", "license", "license_name", "pipeline_tag", "tags"]
    assert not problems_of_card(text, "model")
    assert front_matter(text)["license"] == "other" and "<script" not in text
    body = text.split("\n---\n", 1)[1]
    assert body.count("\n```") == 6 and "\n---" not in body
    cells = [line for line in body.splitlines() if line.startswith("|")]
    assert all(line.count("|") in (3, 5) and line.endswith("|") for line in cells)


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
    assert "| excess text | 0.125 | less is better |" in text
    monkeypatch.setattr(metrics, "CHOOSING", "excess_text")
    both = {"excess_text": 0.125, "likeness": 0.5}
    text = write_model_card(tmp_path, FACTS | {"results": FACTS["results"] | both})
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


@pytest.mark.parametrize(
    ("facts", "title", "key"),
    [
        ({}, "holo1_ui2dom", "holo1_ui2dom"),
        ({"repo_id": None}, "Holo1-3B fine-tuned on WebSight", "holo1_3b_fine_tuned_on_websight"),
        (
            {
                "repo_id": None,
                "base_model": "holo1_dom_finetune_final",
                "base_model_from": ["tiny"],
                "dataset": "pages",
            },
            "tiny fine-tuned on pages",
            "tiny_fine_tuned_on_pages",
        ),
        (
            {"repo_id": None, "base_model": "checkpoint-20", "dataset": None},
            "A screenshot-to-HTML model fine-tuned",
            "a_screenshot_to_html_model_fine_tuned",
        ),
        (
            {"repo_id": None, "random_weights": True},
            "Holo1-3B, trained from random weights, on WebSight",
            "holo1_3b_trained_from_random_weights_on_websight",
        ),
        ({"base_model": "a/holo1_dom_finetune_final"}, "holo1_ui2dom", "holo1_ui2dom"),
        ({"repo_id": "user/2026_q\u00e9"}, "2026_q\u00e9", "m_2026_q"),
    ],
)
def test_title_and_citation_key_are_names(facts: dict, title: str, key: str, tmp_path: Path) -> None:
    (final := tmp_path / "holo1_dom_finetune_final").mkdir()
    text = write_model_card(final, FACTS | facts)
    assert f"\n# {title}\n" in text and f"@misc{{{key},\n" in text
    entry = text.split("```bibtex\n")[1].split("```")[0]
    assert "holo1_dom_finetune" not in text.split("\n# ")[1].split("\n")[0] + entry
    assert ("url = {https://huggingface.co/user/" in entry) == (facts.get("repo_id", "user/") is not None)


@pytest.mark.parametrize(
    ("facts", "bases", "data"),
    [
        ({}, "Hcompany/Holo1-3B", ["HuggingFaceM4/WebSight"]),
        ({"base_model": "mine", "dataset": "my_pages"}, None, None),
        (
            {"base_model": "mine", "base_model_from": ["a/b"], "dataset": "my_pages", "dataset_from": ["c/d", "e/f"]},
            "a/b",
            ["c/d", "e/f"],
        ),
        ({"base_model": "mine", "base_model_from": ["tiny", "a/b", "c/d"]}, ["a/b", "c/d"], ["HuggingFaceM4/WebSight"]),
        ({"random_weights": True}, None, ["HuggingFaceM4/WebSight"]),  # nothing of its base but its shape
    ],
)
def test_the_head_names_what_is_known_and_nothing_else(facts: dict, bases: object, data: object, tmp_path) -> None:
    text = write_model_card(tmp_path, FACTS | facts)
    head = front_matter(text)
    assert (head.get("base_model"), head.get("datasets")) == (bases, data)
    assert ("base_model_relation" in head) == (bases is not None) and not problems_of_card(text, "model")


@pytest.mark.parametrize(("template", "told"), [("{% if enable_thinking %}", True), ("{{ messages }}", False)])
def test_other_programs_are_told_to_turn_thinking_off_where_the_template_can(tmp_path: Path, template, told) -> None:
    (tmp_path / "chat_template.jinja").write_text(template)
    text = write_model_card(tmp_path, FACTS)
    assert ("chat template, with `enable_thinking=False`, or it would think first." in text) == told


def test_a_licence_link_that_the_hub_would_refuse_is_left_out(tmp_path: Path) -> None:
    """And the terms that came with the base are linked where nothing else is."""
    (base := tmp_path / "base").mkdir()
    (base / "README.md").write_text("---\nlicense: other\nlicense_link: terms/all of them.txt\n---\n")
    facts = FACTS | {"base_model": str(base)}
    assert "license_link" not in front_matter(write_model_card(tmp_path, facts))
    (tmp_path / "LICENSE.md").write_text("terms")
    assert front_matter(text := write_model_card(tmp_path, facts))["license_link"] == "LICENSE.md"
    assert not problems_of_card(text, "model")


def test_every_measure_says_what_it_means() -> None:
    assert all(metric.meaning and "\n" not in metric.meaning for metric in metrics.METRICS)
    assert all(meaning for _, _, meaning in MEASURES)


def judged(count: int, chosen: bool, seed: float = 0.0) -> dict[str, Any]:
    """The result of so many held-out pages, the first of which scores `seed`, and each next one 0.05 more."""
    pages = [{"name": f"page {n}", "html": f"<p>{n}</p>", "html_tokens": 9} for n in range(count)]
    rows = [
        {"place": n, "html": f"<p>{n}", "raw": f"<p>{n}", "tokens": 8, "cut_off": False, "seconds": 1.0}
        for n in range(count)
    ]
    scores = [{"page": page["name"], metrics.CHOOSING: seed + 0.05 * n} for n, page in enumerate(pages)]
    return score_held_out(rows, pages, scores, parts_of(count, weights_are_chosen=chosen))


@pytest.mark.parametrize(
    ("count", "chosen", "sentence", "interval"),
    [
        (8, False, "No held-out page chose the weights", "n = 8). So few pages prove little."),
        (24, True, "Other held-out pages, n = 12, chose the weights, by likeness; none of them", "n = 12).\n"),
        (3, True, "Other held-out pages, n = 2, chose the weights", "on 1 page alone, which gives no interval."),
        (1, True, "The same pages chose the weights", "on 1 page alone, which gives no interval."),
    ],
)
def test_the_card_says_which_pages_chose_the_weights(count, chosen, sentence, interval, tmp_path) -> None:
    """And an interval is of the others; also where the base was not judged, and there is no interval."""
    before, after = judged(count, chosen), judged(count, chosen, seed=0.2)
    both = {"results": after | {"comparison": compare_results(before, after)}, "results_before": before}
    text = write_model_card(tmp_path, FACTS | both)
    assert sentence in text and interval in text
    assert f"Over {after['n']} held-out page" in text
    text = write_model_card(tmp_path, FACTS | {"results": after, "results_before": None})
    assert sentence in text and "Difference" not in text


def test_no_comparison_where_no_page_is_left() -> None:
    """The one page that compares has a reference that cannot be rendered: once this ended the run."""
    before, after = judged(2, chosen=True), judged(2, chosen=True)
    after["pages"][1]["reference_failed"] = True
    assert compare_results(before, after)["metrics"] == {}


def test_what_stands_in_for_the_hubs_check_refuses_what_the_hub_refuses() -> None:
    """Or the cards above would pass whatever they said."""
    for head in (
        "license: [mit",
        "license: my-terms",
        "license: other\nlicense_name: My Terms",
        "license_link: terms/all of them.txt",
        "base_model: ./holo1_dom_finetune_final",
        "base_model: a/b/c",
        "datasets: HuggingFaceM4/WebSight",
        "datasets:\n- my pages",
        "base_model_relation: finetune",
        "base_model: a/b\nbase_model_relation: child",
        "model-index:\n- name: x",
    ):
        assert problems_of_card(f"---\n{head}\n---\n# Card\n", "model"), head
    assert not problems_of_card("---\nlicense: mit\nbase_model: a/b\n---\n", "model")


def test_a_number_that_no_run_has_is_found_on_a_card(tmp_path: Path) -> None:
    results = FACTS["results"] | {"n": 20}
    sources = {"run": {name: value for name, value in FACTS.items() if name != "results"}, "after": results}
    text = write_model_card(tmp_path, FACTS)
    assert "4.57" in numbers_without_a_source(text, sources)
    sources["run"]["added by describe"] = ["4.57 and 5.23", *QWEN_RESEARCH]
    assert not numbers_without_a_source(text, sources)
    assert numbers_without_a_source(text.replace("| 0.950 |", "| 0.951 |"), sources) == ["0.951"]
    assert numbers_without_a_source(text, {**sources, "after": results | {"valid": 0.96}}) == ["0.950"]
