"""The model card, computed from facts, and the push: one commit, from a list of what may leave the machine.

    full_name = check_hub_access("holo1_ui2dom", private=True)      # before training
    write_model_card(final_folder, facts)
    push_final_folder(final_folder, full_name, private=True)

Nothing of ours is imported but the errors.
"""

from __future__ import annotations

import html
import re
import shlex
import time
from pathlib import Path

from training.errors import SettingsError, UploadError

# -----------------------------------------------------------------------------
# Publishing

PUBLISHED = (  # all that may leave the machine; arguments, optimizer states, logs and pickles stay
    "*.safetensors *.safetensors.index.json config.json generation_config.json *processor_config.json tokenizer*.json "
    "special_tokens_map.json added_tokens.json vocab.json merges.txt chat_template.json chat_template.jinja "
    "dom_recipe.json evaluation/results.json README.md LICENSE* NOTICE*"
).split()
# Ids that the Hub knows. Any other licence becomes `other` with a name, or the Hub would refuse the card.
HUB_LICENCES = "apache-2.0 mit bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 gemma".split()
QWEN_RESEARCH = ("other", "qwen-research", "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE")
BASE_LICENCES = dict.fromkeys(("Hcompany/Holo1-3B", "Qwen/Qwen2.5-VL-3B-Instruct"), QWEN_RESEARCH)
BASE_LICENCES |= dict.fromkeys(("Hcompany/Holo1-7B", "Qwen/Qwen2.5-VL-7B-Instruct"), ("apache-2.0", None, None))


def is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not Path(name).exists()


def shown(value: object) -> str:
    """For cards and messages: one line that holds no token, opens no HTML or table cell, and names no folder."""
    from huggingface_hub import get_token

    text = "unknown" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    text = re.sub(r"\bhf_[A-Za-z0-9]{16,}", "(token)", text.replace(get_token() or "\0", "(token)"))
    text = re.sub(r"(?<![\w.:/<-])~?/(?:[^\s/'\"]+/)*(?=[^\s/])", "", text)
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;").replace("`", "'")


def check_hub_access(repo_id: str, private: bool) -> str:
    """(main process only) Proves before training that the model can be pushed; returns the full `owner/name`."""
    import huggingface_hub as hub

    try:
        me = (api := hub.HfApi()).whoami()
        if (me.get("auth") or {}).get("accessToken", {}).get("role") == "read":
            raise PermissionError(f"The token of {me['name']!r} may only read.")
        full_id = repo_id if "/" in repo_id else f"{me['name']}/{repo_id}"
        # What a fine-grained token or an organisation allows only the server knows, and it says so only when the
        # repository is created. An empty one costs less than a trained model that cannot be pushed.
        api.create_repo(full_id, private=private, exist_ok=True)
        api.auth_check(full_id, write=True)  # create_repo is content with a repository that can merely be read
        if private and not api.model_info(full_id).private:
            raise PermissionError(f"It exists and is public. To hide it: hf repos settings {full_id} --private.")
        return full_id
    except (hub.errors.HTTPError, OSError, ValueError) as error:  # httpx's in huggingface_hub 1, httpx2's in 2
        needs = "the network, a NAME or OWNER/NAME of yours, and a token that may write (`hf auth login` or HF_TOKEN)"
        raise SettingsError(f"--hub_repo {repo_id!r}: {shown(error)} Pushing needs {needs}.") from None


def derived_licence(base_model: str, base_licence: str | None = None) -> tuple[str, str | None, str | None]:
    """license, license_name and license_link for a fine-tune of this base: the base's own, never a looser one."""
    import huggingface_hub as hub
    import yaml

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


def write_model_card(final_folder: Path, facts: dict) -> str:
    """(main process only) Writes README.md from the facts alone and returns it; what is missing is called unknown."""
    import huggingface_hub as hub

    def table(*rows: tuple) -> str:
        lines = [f"| {' | '.join(map(shown, row))} |" for row in rows]
        return "\n".join([lines[0], "| --- " * len(rows[0]) + "|", *lines[1:]])

    base, data, where = (shown(facts.get(key)) for key in ("base_model", "dataset", "repo_id"))
    where = where if is_hub_id(where) else f"./{final_folder.name}"
    known = facts.get("licence")  # looked up before the base's folder lost its path
    licence, name, link = known or derived_licence(str(facts.get("base_model")), facts.get("base_licence"))
    head = {"license": licence, "license_name": name, "license_link": link}
    head |= {"datasets": [data]} if is_hub_id(data) else {}
    # `finetune` for adapters too: they are merged into whole weights.
    head |= {"base_model": base, "base_model_relation": "finetune"} if is_hub_id(base) else {}
    head |= {"pipeline_tag": "image-text-to-text", "library_name": "transformers", "tags": ["screenshot-to-html"]}
    measures = "n valid exact shuffled_exact truncated looping mean_tokens tokens_per_second".split()
    measures += "failures likeness overall block text position color tree_bleu ssim".split()  # of rendered pages
    runs = [facts.get("results_before") or {}, facts.get("results") or {}]
    measured = [[measure, *(run.get(measure, "not measured") for run in runs)] for measure in measures]
    apart = {"results", "results_before", "base_licence", "licence", "settings", "recipe", "versions"}
    trained = [(key, value) for key, value in facts.items() if key not in apart]
    for group in ("settings", "recipe", "versions"):
        trained += [(f"{group}: {key}", value) for key, value in (facts.get(group) or {}).items() if key not in facts]
    asks = {"by": "asks for credit", "sa": "asks for the same licence", "nc": "forbids commercial use"}
    terms = [shown(facts.get("dataset_licence"))]
    terms += [text for part, text in asks.items() if part in terms[0].lower().split("-")]
    load = f'from_pretrained("{where}")'
    sections = {
        "Use": f"```bash\npython use_model_from_hub.py --model {shlex.quote(where)} --image page.png\n```\n\n"
        "```python\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        f"model = AutoModelForImageTextToText.{load}\nprocessor = AutoProcessor.{load}\n```\n\n"
        "Ask with the screenshot first, then the prompt of `dom_recipe.json`, in the model's own chat template.",
        "Results on held-out pages": table(("measure", "before", "after"), *measured) + difference(facts),
        "Training": table(("fact", "value"), *trained),
        "Licence": f"{'For research only, not for commerce. Improved using Qwen. ' * (name == 'qwen-research')}The "
        f"terms of {base} hold for it: {name or licence} ({link or 'see there'}). The data: {', '.join(terms)}.",
        "Limitations": "Judged by the table above. What it writes can be wrong or unsafe: open it without scripts.",
        "Citation": f"```bibtex\n@misc{{{where},\n  title = {{{where}: {base} fine-tuned on {data}}}\n}}\n```",
    }
    text = f"---\n{hub.ModelCardData(**head).to_yaml()}\n---\n\n# {where}\n\nScreenshot of a web page in, HTML out.\n"
    text += "".join(f"\n## {heading}\n\n{body}\n" for heading, body in sections.items())
    (final_folder / "README.md").write_text(text, encoding="utf-8")
    return text


def difference(facts: dict) -> str:
    """Base against tuned by how alike the rendered pages look, where both were rendered."""
    comparison = (facts.get("results") or {}).get("comparison") or {}
    if not (found := comparison.get("metrics", {}).get("likeness")):
        return ""
    interval = f"95 % bootstrap interval {found['low']:+.3f} to {found['high']:+.3f}, p = {found['p']:.4f}"
    return f"\n\nDifference in likeness: {found['difference']:+.3f} ({interval}, paired permutation test)."


def push_final_folder(final_folder: Path, repo_id: str, private: bool) -> str:
    """(main process only) Uploads weights and card in one commit and returns their address."""
    import huggingface_hub as hub

    found = [p for pattern in PUBLISHED for p in final_folder.glob(pattern) if p.is_file() and not p.is_symlink()]
    names = sorted(path.relative_to(final_folder).as_posix() for path in found)
    if not any(name.endswith(".safetensors") for name in names):  # or the Hub's own weights would only be deleted
        raise UploadError(f"Not uploaded: {final_folder} holds no model.safetensors. Train and save first.")
    again = ["hf", "upload", repo_id, str(final_folder), ".", *["--private"] * private, "--delete=*.safetensors*"]
    command, waits_s = shlex.join([*again, *(f"--include={name}" for name in names)]), [1, 4, 15, 60]
    while True:
        try:
            (api := hub.HfApi()).create_repo(repo_id, private=private, exist_ok=True)
            there = api.model_info(repo_id)
            if private and not there.private:
                command = f"hf repos settings {repo_id} --private && {command}"
                raise ValueError(f"--private_repo was asked, but {repo_id} is public.")
            # New operations each time: they ask what the Hub has by now, so a commit whose answer was lost is not
            # repeated. Not upload_folder: it commits every 5 minutes (huggingface_hub 1.33, 2.4), so in several parts.
            old = [s.rfilename for s in there.siblings or [] if ".safetensors" in s.rfilename]  # would load instead
            changes = [hub.CommitOperationDelete(name) for name in old if name not in names]
            changes += [hub.CommitOperationAdd(name, final_folder / name) for name in names]
            api.create_commit(repo_id, changes, commit_message="Upload the fine-tuned model and its card")
            return f"{api.endpoint}/{repo_id}"
        except (hub.errors.HTTPError, OSError, RuntimeError, ValueError) as error:
            answer = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
            refused = 400 <= getattr(answer, "status_code", 0) < 500 and answer.status_code not in (408, 409, 429)
            why = shown(f"{error} {error.__cause__ or ''}")
            if refused or not waits_s or isinstance(error, (ValueError, PermissionError)):  # waiting cannot help
                raise UploadError(f"{why} The model is whole in {final_folder}. To upload it: {command}") from None
            print(f"Upload: {why} Again in {waits_s[0]} s.", flush=True)
            time.sleep(waits_s.pop(0))
