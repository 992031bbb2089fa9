"""The model card: what a stranger on the Hub needs to know of a final folder, from looked-up facts alone.

    told = describe(final_folder, settings, training, facts, recipe, results.by_label)  # README.md of a training
    write_model_card(final_folder, facts)           # the same, from model_card.md beside this room and facts alone

Every number on the card is one of results.json, which has what `describe` returns as its "run". What was not measured,
or is not known, is left out.

Sections: Words, Licence, Card, Results.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub as hub
import jinja2
import yaml

import use_model_from_hub as use
from scoring import metrics
from scoring.statistics import FEW
from training.origins import reads_as_hub_id, strings
from training.publishing import shown
from training.settings import PROJECT, TRAINING_DEFAULTS, PageSettings

TEMPLATE = Path(__file__).with_name("model_card.md")
EXAMPLE = Path(__file__).with_name("example.png")  # a screenshot of example.html beside it
DEMO_EXAMPLE = PROJECT / "demo" / "pages" / "000000.html.webp"  # the demo's model knows its own kind of page alone

# -----------------------------------------------------------------------------
# Words


def is_hub_id(name: str) -> bool:
    """Whether it reads USER/NAME and is no file or folder here; the Hub is not asked."""
    return reads_as_hub_id(name) and not Path(name).exists()


def plain_name(name: str) -> str:
    """The last part of a name; "" of one that every training gives its folders, which names nothing."""
    last = name.rstrip("/").rpartition("/")[2]
    return "" if re.fullmatch(r"holo1_dom_finetune_.*|checkpoint-\d+|[0-9a-f]{40}|unknown|", last) else last


def linked(name: str) -> str:
    """A name on the Hub as a link to it, in Markdown; any other as it is. `name` has been `shown`."""
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else name


def names_of_data(facts: Mapping[str, Any]) -> list[str]:
    """Of each dataset, shown."""
    return [shown(each["dataset"]) for each in facts.get("datasets") or [facts]] if facts.get("dataset") else []


def base_of(facts: Mapping[str, Any]) -> str:
    """Of the base, shown: its own name, or where that names nothing the one that it came from; else ""."""
    names = [shown(facts["base_model"])] if facts.get("base_model") else []
    names += [shown(name) for name in strings(facts.get("base_model_from"))]
    return next((name for name in names if plain_name(name) or reads_as_hub_id(name)), "")


def subject(base: str, data: Iterable[str], scratch: bool) -> str:
    """What was done to what, on which pages: "Holo1-3B fine-tuned on WebSight"."""
    base = base or "A screenshot-to-HTML model"
    done = f"{base}, trained from random weights," if scratch else f"{base} fine-tuned"
    *others, last = [*data] or [""]
    where = f"{', '.join(others)} and {last}" if others else last
    return f"{done} on {where}" if where else done.rstrip(",")


def citation(title: str, about: str, repo_id: str | None, date: object) -> str:
    """A BibTeX entry. Its key is a name, and nothing in it needs an escape but underscores."""

    def field(text: str) -> str:
        return re.sub(r"[^\w .,:/()+-]", "", text).replace("_", r"\_")

    key = re.sub(r"[^A-Za-z0-9]+", "_", title).strip("_").lower() or "screenshot_to_html"
    key = f"m_{key}" if key[0].isdigit() else key
    text = title if about == title else f"{title}: {about}"
    fields = {"title": "{" + field(text) + "}"}
    if repo_id:
        fields |= {"author": field(repo_id.partition("/")[0]), "url": f"https://huggingface.co/{repo_id}"}
    if year := re.match(r"(\d{4})-", str(date)):
        fields["year"] = year[1]
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@misc{{{key},\n{lines}\n}}"


# -----------------------------------------------------------------------------
# Licence

# Ids that the Hub knows. Any other licence becomes `other` with a name, or the Hub would refuse the card.
HUB_LICENCES = "apache-2.0 mit bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 gemma".split()
QWEN_RESEARCH = ("other", "qwen-research", "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE")
BASE_LICENCES = dict.fromkeys(("Hcompany/Holo1-3B", "Qwen/Qwen2.5-VL-3B-Instruct"), QWEN_RESEARCH)
APACHE = "Hcompany/Holo1-7B Hcompany/Holo1.5-7B Hcompany/Holo2-4B Qwen/Qwen2.5-VL-7B-Instruct".split()
APACHE += [f"Hcompany/Holo-3.1-{size}" for size in ("0.8B", "4B", "9B")]
BASE_LICENCES |= dict.fromkeys(APACHE, ("apache-2.0", None, None))


def derived_licence(
    base_model: str, base_licence: str | None = None, came_from: Iterable[str] = ()
) -> tuple[str, str | None, str | None]:
    """license, license_name and license_link for a fine-tune of this base: the base's own, never a looser one, and
    where a local one has none that of what it `came_from`."""
    card = {}
    try:
        if (readme := Path(base_model, "README.md")).is_file():
            card = hub.metadata_load(readme) or {}
        elif base_model not in BASE_LICENCES and base_licence in (None, "other") and is_hub_id(base_model):
            card = hub.model_info(base_model, timeout=10).card_data or {}
    except (hub.errors.HTTPError, OSError, ValueError, yaml.YAMLError):
        pass  # no network, no such model, a card that does not parse: the licence is not known
    parents = card.get("base_model") or []
    came_from = [name for name in came_from if name != base_model and is_hub_id(name)]
    parents = [*strings(parents), *came_from]
    if base_model in BASE_LICENCES or any(BASE_LICENCES.get(parent) == QWEN_RESEARCH for parent in parents):
        return BASE_LICENCES.get(base_model, QWEN_RESEARCH)
    if came_from and not card.get("license") and not base_licence:
        return derived_licence(came_from[0])
    licence = str(card.get("license") or base_licence or "other").lower()
    if licence in HUB_LICENCES:
        return licence, None, None
    name = card.get("license_name") or (licence if licence != "other" else "unknown, see the base model")
    page = f"https://huggingface.co/{base_model}" if is_hub_id(base_model) else card.get("license_link", "")
    page = (
        shown(page) if re.fullmatch(r"https?://[^\s|<>]+|LICENSE(\.md)?", str(page)) else None
    )  # or the Hub refuses it
    name = re.sub(r"[^a-z0-9.]+", "-", str(name).lower()).strip("-")  # of another script nothing is left
    return "other", name or "unknown-see-the-base-model", page


# -----------------------------------------------------------------------------
# Card

LOADED_IN = (
    "4.57",
    "5.23",
)  # versions of transformers: tests/training/test_final_folder.py loads final folders in both
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
) -> dict[str, Any]:
    """(main process only) Writes the card of what a training has saved, with the script and the screenshot of its
    commands, and returns what it tells of the training, by name, for results.json.

    `results` by their label, "after" only once it is judged. `training` are TrainingArguments by name.
    """
    chosen = {name: training[name] for name in sorted(TRAINING_DEFAULTS) if name not in ("report_to", "disable_tqdm")}
    typed = ("freeze_vision", "micro_batch", "checkpoint_share", "offload_share")
    chosen |= {name: getattr(settings, name) for name in typed}
    card = dict(facts) | {
        "licence": derived_licence(settings.base_model, came_from=strings(facts.get("base_model_from"))),
        "settings": chosen | {"seed": training["seed"], "prompt": settings.prompt, "clean": settings.clean},
        "recipe": recipe,
        "results": results.get("after"),
        "results_before": results.get("before"),
        "lora": settings.lora or settings.quantize == "4bit",
        "quantization": settings.quantize,
        "repo_id": settings.hub_repo if settings.push_to_hub else None,
    }
    write_model_card(final_folder, card)
    shutil.copyfile(use.__file__, final_folder / Path(use.__file__).name)  # whoever has this folder alone can use it
    picture = DEMO_EXAMPLE if settings.demo else EXAMPLE
    use.open_screenshot(picture.read_bytes()).save(final_folder / "example.png", optimize=True)
    rows = [*told(card), *details(card), ("licence", ", ".join(filter(None, card["licence"])))]
    rows += [("loads in transformers", " and ".join(LOADED_IN))]
    return {name: value if isinstance(value, int | float) else shown(value) for name, value in rows}


def write_model_card(final_folder: Path, facts: Mapping[str, Any]) -> str:
    """(main process only) Writes README.md from the facts alone and returns it."""
    repo = shown(facts.get("repo_id"))
    on_hub, base, data = is_hub_id(repo), base_of(facts), names_of_data(facts)
    scratch = bool(facts.get("random_weights"))
    about = subject(plain_name(base), filter(None, map(plain_name, data)), scratch)
    title, where = (plain_name(repo), repo) if on_hub else (about, final_folder.name)
    known = facts.get("licence")  # looked up before the base's folder lost its path
    licence, name, link = known or derived_licence(str(facts.get("base_model")), facts.get("base_licence"))
    own = [file for file in ("LICENSE", "LICENSE.md") if (final_folder / file).is_file()]  # came with the base
    link = link or next(iter(own), None) if licence == "other" else link
    head = {"license": licence, "license_name": name, "license_link": link, **front_of(facts)}
    research = name == "qwen-research"
    # No autoescape: this is Markdown, and every value goes through `shown`, which opens no HTML.
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = shown
    recipe = facts.get("recipe") or {}
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        head=hub.ModelCardData(**head).to_yaml(),
        title=title,
        lead="" if (lead := subject(linked(base), map(linked, data), scratch)) == title else f"{lead}. ",
        on_hub=on_hub,
        where=shown(where),
        quoted=shlex.quote(where),
        spelt=json.dumps(where),
        trusted=" --trust_remote_code" if recipe.get("trust_remote_code") is True else "",
        loaded_in=" and ".join(LOADED_IN),
        off=thinking_words(final_folder),
        base=base,
        **results_of(facts.get("results_before") or {}, facts.get("results") or {}),
        facts=told(facts),
        details=details(facts),
        research=research,
        licence=name or licence,
        link=link or "see there",
        terms=", ".join(terms_of(facts.get("dataset_licence"))),
        citation=citation(title, about, repo if on_hub else None, facts.get("date")),
    )
    (final_folder / "README.md").write_text(text, encoding="utf-8")
    return text


def thinking_words(final_folder: Path) -> str:
    """What the model's chat template has to be told so that it answers at once; "" where it never thinks first."""
    template = final_folder / "chat_template.jinja"
    found = re.findall(use.THOUGHTS, template.read_text(encoding="utf-8")) if template.is_file() else []
    return ", ".join(f"`{name}=False`" for name in dict.fromkeys(found))


def front_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The card's head but for the licence: bases and datasets that are on the Hub, or came from there."""
    base = shown(facts.get("base_model"))
    bases = [base] if is_hub_id(base) else [shown(name) for name in strings(facts.get("base_model_from"))]
    bases = [name for name in bases if is_hub_id(name)] if not facts.get("random_weights") else []
    found = []
    for each in facts.get("datasets") or [facts]:
        name = shown(each.get("dataset"))
        found += [name] if is_hub_id(name) else filter(is_hub_id, map(shown, strings(each.get("dataset_from"))))
    head: dict[str, Any] = {"datasets": [*dict.fromkeys(found)]} if found else {}
    # `finetune` for adapters too: they are merged into whole weights.
    if bases:
        head |= {"base_model": bases[0] if len(bases) == 1 else bases, "base_model_relation": "finetune"}
    return head | {
        "pipeline_tag": "image-text-to-text",
        "library_name": "transformers",
        "tags": ["screenshot-to-html"],
    }


def terms_of(licences: object) -> list[str]:
    """The terms of the data, in words."""
    terms = [shown(licences)]
    asked = {part for licence_of_one in terms[0].lower().split(", ") for part in licence_of_one.split("-")}
    return terms + [text for part, text in ASKS.items() if part in asked]


def listed(value: object) -> object:
    """A list as words; anything else as it is."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


def told(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Each fact of the training with its name, those that are known."""
    found = [(key, value) for key, value in facts.items() if key not in APART]
    for number, each in enumerate(facts.get("datasets") or (), start=1):
        found += [(f"dataset {number}: {key.removeprefix('dataset_')}", value) for key, value in each.items()]
    return [(key, listed(value)) for key, value in found if value is not None]


def details(facts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Settings, recipe and versions, without what is told before, and what has no value."""
    found, seen = [], {*facts}
    for group in ("recipe", "settings", "versions"):
        found += [(f"{group}: {key}", value) for key, value in (facts.get(group) or {}).items() if key not in seen]
        seen |= {*(facts.get(group) or {})} if group == "recipe" else set()
    return [(key, listed(value)) for key, value in found if value is not None]


# -----------------------------------------------------------------------------
# Results

# Of a run, beside the table of metrics: (name in results.json, label, what it means).
MEASURES = (
    ("exact", "exact", "the share of pages that equal the wanted HTML, white space aside"),
    ("shuffled_exact", "exact, shuffled", "the same against another page's HTML: what is reached without looking"),
    ("valid", "valid", "the share of pages that are whole HTML documents, closed, with something to be seen"),
    ("truncated", "truncated", "the share of pages that were stopped at the limit of tokens"),
    ("looping", "looping", "the share of pages that end in repeating themselves"),
    ("failures", "failures", "pages that could not be rendered; they count as the worst in every score"),
    ("words_in_blocks", "words in blocks", "the share of the words to be seen that Design2Code's measures count"),
    ("mean_tokens", "tokens", "written for a page, on average"),
    ("mean_reference_tokens", "wanted tokens", "of the wanted HTML, on average"),
    (
        "tokens_per_second",
        "tokens per second",
        "several pages at once, as in this evaluation, on the hardware below",
    ),
)


def results_of(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What the template says of results: the table's columns and rows, how many pages, the difference, who chose."""
    runs = {"before": before, "after": after} if before and after else {"score": after or before}
    names = [*((metric.name, metric.label, meaning_of(metric)) for metric in metrics.choosing_first()), *MEASURES]
    rows = []
    for name, label, meaning in names:
        values = [run.get(name) for run in runs.values()]
        if any(value is not None for value in values):
            rows.append((label, [cell(name, value) for value in values], meaning))
    count = (after or before).get("n")
    pages = f"Over {shown(count)} held-out pages" if count is not None and count != 1 else "Over held-out pages"
    pages = "Over 1 held-out page" if count == 1 else pages
    words = f"{pages}, none of which it was trained on. Scores and shares lie between 0 and 1, a copy's score is 1."
    words += " *Before* is the base, asked in the same words; *after* is this model." if len(runs) > 1 else ""
    comparison = after.get("comparison") or {}
    found = (comparison.get("metrics") or {}).get(metrics.CHOOSING)
    return {
        "columns": [*runs],
        "measures": rows,
        "pages_words": words,
        "difference": found and difference_words(found),
        "choice": choice_words(after.get("choosing"), comparison.get("apart", True)),
    }


def cell(name: str, value: Any) -> str:
    """A measure as its column shows it: scores and shares with three digits, however round, so that they align."""
    if value is None or not isinstance(value, float):
        return "-" if value is None else shown(value)
    return f"{value:,.1f}" if "tokens" in name else f"{value:.3f}"


def meaning_of(metric: metrics.Metric) -> str:
    """With the direction, where it is not that of most."""
    return "; ".join(filter(None, (metric.meaning, "" if metric.better == "higher" else "less is better")))


def difference_words(found: Mapping[str, Any]) -> str:
    """After less before, page by page; no interval of a single page."""
    words = f"Difference in {metrics.entry(metrics.CHOOSING).label}: {found['difference']:+.3f}"
    if found.get("n") == 1:
        return f"{words}, on 1 page alone, which gives no interval."
    words += f" (95 % bootstrap interval {found['low']:+.3f} to {found['high']:+.3f}, p = {found['p']:.4f}, "
    words += f"paired permutation test{', n = ' + str(found['n']) if 'n' in found else ''})."
    return words + (" So few pages prove little." if found.get("n", FEW) < FEW else "")


def choice_words(choosing: Mapping[str, Any] | None, apart: bool) -> str:
    """Which pages chose the weights: those of the table must not have, or it promises too much."""
    if not apart or (choosing and not choosing.get("apart", True)):
        return "The same pages chose the weights, so that this promises too much."
    if choosing:
        label = metrics.entry(metrics.CHOOSING).label
        return (
            f"Other held-out pages, n = {choosing['n']}, chose the weights, by {label}; none of them is counted here."
        )
    return "No held-out page chose the weights: they are those of the training's end."
