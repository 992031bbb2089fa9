"""The model card: what a stranger on the Hub needs to know of a final folder, from looked-up facts alone.

    describe(final_folder, settings, training, facts, recipe, results.by_label)     # README.md of a training
    write_model_card(final_folder, facts)           # the same, from model_card.md beside this room and facts alone

Sections: Words, Licence, Card.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub as hub
import jinja2
import yaml

from scoring import metrics
from training.publishing import shown
from training.settings import TRAINING_DEFAULTS, PageSettings

TEMPLATE = Path(__file__).with_name("model_card.md")

# -----------------------------------------------------------------------------
# Words


def is_hub_id(name: str) -> bool:
    """Whether it reads USER/NAME and is no file or folder here; the Hub is not asked."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not Path(name).exists()


# -----------------------------------------------------------------------------
# Licence

# Ids that the Hub knows. Any other licence becomes `other` with a name, or the Hub would refuse the card.
HUB_LICENCES = "apache-2.0 mit bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 gemma".split()
QWEN_RESEARCH = ("other", "qwen-research", "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE")
BASE_LICENCES = dict.fromkeys(("Hcompany/Holo1-3B", "Qwen/Qwen2.5-VL-3B-Instruct"), QWEN_RESEARCH)
BASE_LICENCES |= dict.fromkeys(("Hcompany/Holo1-7B", "Qwen/Qwen2.5-VL-7B-Instruct"), ("apache-2.0", None, None))


def derived_licence(base_model: str, base_licence: str | None = None) -> tuple[str, str | None, str | None]:
    """license, license_name and license_link for a fine-tune of this base: the base's own, never a looser one."""
    card = {}
    try:
        if (readme := Path(base_model, "README.md")).is_file():
            card = hub.metadata_load(readme) or {}
        elif base_model not in BASE_LICENCES and base_licence in (None, "other") and is_hub_id(base_model):
            card = hub.model_info(base_model, timeout=10).card_data or {}
    except (hub.errors.HTTPError, OSError, ValueError, yaml.YAMLError):
        pass  # no network, no such model, a card that does not parse: the licence is not known
    parents = card.get("base_model") or []
    parents = [parents] if isinstance(parents, str) else parents
    if base_model in BASE_LICENCES or any(BASE_LICENCES.get(parent) == QWEN_RESEARCH for parent in parents):
        return BASE_LICENCES.get(base_model, QWEN_RESEARCH)
    licence = str(card.get("license") or base_licence or "other").lower()
    if licence in HUB_LICENCES:
        return licence, None, None
    name = card.get("license_name") or (licence if licence != "other" else "unknown, see the base model")
    page = f"https://huggingface.co/{base_model}" if is_hub_id(base_model) else card.get("license_link", "")
    return "other", re.sub(r"[^a-z0-9.]+", "-", str(name).lower()).strip("-"), shown(page) if page else None


# -----------------------------------------------------------------------------
# Card

LOADED_IN = (
    "4.57",
    "5.23",
)  # versions of transformers: tests/training/test_final_folder.py loads final folders in both
MEASURES = "n valid exact shuffled_exact truncated looping mean_tokens tokens_per_second failures".split()  # of a run
APART = {"results", "results_before", "base_licence", "licence", "settings", "recipe", "versions"}  # not plain facts
APART |= {"datasets"}
ASKS = {"by": "asks for credit", "sa": "asks for the same licence", "nc": "forbids commercial use"}  # of cc-by-...


def describe(
    final_folder: Path,
    settings: PageSettings,
    training: Mapping[str, Any],
    facts: Mapping[str, Any],
    recipe: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
) -> None:
    """(main process only) The card of what a training has saved; `results` by their label, "after" only once it is
    judged. `training` are TrainingArguments by name."""
    told = {name: training[name] for name in sorted(TRAINING_DEFAULTS) if name not in ("report_to", "disable_tqdm")}
    card = dict(facts) | {
        "licence": derived_licence(settings.base_model),
        "settings": told | {"seed": training["seed"], "prompt": settings.prompt, "clean": settings.clean},
        "recipe": recipe,
        "results": results.get("after"),
        "results_before": results.get("before"),
        "lora": settings.lora or settings.quantize == "4bit",
        "quantization": settings.quantize,
        "repo_id": settings.hub_repo if settings.push_to_hub else None,
    }
    write_model_card(final_folder, card)


def write_model_card(final_folder: Path, facts: Mapping[str, Any]) -> str:
    """(main process only) Writes README.md from the facts alone and returns it; what is missing is called unknown."""
    base, data, where = (shown(facts.get(key)) for key in ("base_model", "dataset", "repo_id"))
    where = where if is_hub_id(where) else f"./{final_folder.name}"
    known = facts.get("licence")  # looked up before the base's folder lost its path
    licence, name, link = known or derived_licence(str(facts.get("base_model")), facts.get("base_licence"))
    head = {"license": licence, "license_name": name, "license_link": link}
    # Of several datasets, those on the Hub.
    names = [shown(each["dataset"]) for each in facts.get("datasets") or [facts]] if facts.get("dataset") else []
    head |= {"datasets": found} if (found := [name for name in names if is_hub_id(name)]) else {}
    # `finetune` for adapters too: they are merged into whole weights.
    head |= {"base_model": base, "base_model_relation": "finetune"} if is_hub_id(base) else {}
    head |= {"pipeline_tag": "image-text-to-text", "library_name": "transformers", "tags": ["screenshot-to-html"]}
    terms = [shown(facts.get("dataset_licence"))]
    asked = {part for licence_of_one in terms[0].lower().split(", ") for part in licence_of_one.split("-")}
    terms += [text for part, text in ASKS.items() if part in asked]
    results = facts.get("results") or {}
    comparison = results.get("comparison") or {}
    # No autoescape: this is Markdown, and every value goes through `shown`, which opens no HTML.
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
    environment.filters |= {"shown": shown, "signed": "{:+.3f}".format, "p": "{:.4f}".format}
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        head=hub.ModelCardData(**head).to_yaml(),
        where=where,
        loaded_in=" and ".join(LOADED_IN),
        quoted=shlex.quote(where),
        base=base,
        data=data,
        measures=measured(facts.get("results_before") or {}, results),
        chooses=metrics.entry(metrics.CHOOSING).label,
        difference=comparison.get("metrics", {}).get(metrics.CHOOSING),
        apart=comparison.get("apart", True),
        judged="results" not in facts or bool(results),
        facts=told(facts),
        research=name == "qwen-research",
        licence=name or licence,
        link=link or "see there",
        terms=", ".join(terms),
    )
    (final_folder / "README.md").write_text(text, encoding="utf-8")
    return text


def measured(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(label, before, after) of every share of a run and of every metric in the table, the one that chooses first."""
    table = [metric for metric in metrics.choosing_first() if metric.name in after or not metric.needs_clip]
    named = [*((name, name) for name in MEASURES), *((metric.name, metric.label) for metric in table)]
    return [(label, *(run.get(name, "not measured") for run in (before, after))) for name, label in named]


def told(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Each fact of the training with its name, the grouped ones behind the others."""
    found = [(key, value) for key, value in facts.items() if key not in APART]
    for number, each in enumerate(facts.get("datasets") or (), start=1):
        found += [(f"dataset {number}: {key.removeprefix('dataset_')}", value) for key, value in each.items()]
    for group in ("settings", "recipe", "versions"):
        found += [(f"{group}: {key}", value) for key, value in (facts.get(group) or {}).items() if key not in facts]
    return found
