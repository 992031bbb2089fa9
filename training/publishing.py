"""The push to the Hub: one commit, from a list of what may leave the machine.

    full_name = check_hub_access("holo1_ui2dom", private=True)      # before training
    push_final_folder(final_folder, full_name, private=True)

Arguments, optimizer states, logs and pickles never leave: what is not named in PUBLISHED stays.
"""

from __future__ import annotations

import html
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import huggingface_hub as hub

from training.errors import SettingsError, UploadError
from training.processes import say
from training.settings import PageSettings

Result = TypeVar("Result")
PUBLISHED = (  # all that may leave the machine; arguments, optimizer states, logs and pickles stay
    "*.safetensors *.safetensors.index.json config.json generation_config.json *processor_config.json tokenizer*.json "
    "tokenizer.model special_tokens_map.json added_tokens.json vocab.json merges.txt chat_template.json "
    "chat_template.jinja additional_chat_templates/*.jinja dom_recipe.json evaluation/results.json README.md LICENSE* "
    "NOTICE* use_model_from_hub.py example.png"
).split()


def shown(value: object) -> str:
    """For cards and messages: one line that holds no token, opens no HTML or table cell, and names no folder."""
    text = "unknown" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    text = re.sub(r"\bhf_[A-Za-z0-9]{16,}", "(token)", text.replace(hub.get_token() or "\0", "(token)"))
    text = re.sub(r"(?<![\w.:/<-])~?/(?:[^\s/'\"]+/)*(?=[^\s/])", "", text)
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;").replace("`", "'")


def check_hub_access(repo_id: str, private: bool, kind: str = "model", flag: str = "--hub_repo") -> str:
    """(main process only) Proves before the work that its result can be pushed; returns the full `owner/name`.

    `kind` is the repository's, `flag` what the user has typed it after. SettingsError."""
    try:
        me = (api := hub.HfApi()).whoami()
        if (me.get("auth") or {}).get("accessToken", {}).get("role") == "read":
            raise PermissionError(f"The token of {me['name']!r} may only read.")
        full_id = repo_id if "/" in repo_id else f"{me['name']}/{repo_id}"
        # What a fine-grained token or an organisation allows only the server knows, and it says so only when the
        # repository is created. An empty one costs less than a trained model that cannot be pushed.
        api.create_repo(full_id, repo_type=kind, private=private, exist_ok=True)
        api.auth_check(full_id, repo_type=kind, write=True)  # create_repo is content with what can merely be read
        if private and not api.repo_info(full_id, repo_type=kind).private:
            raise PermissionError(f"It exists and is public. To hide it: {hide_command(full_id, kind)}.")
        return full_id
    except (hub.errors.HTTPError, OSError, ValueError) as error:  # httpx's in huggingface_hub 1, httpx2's in 2
        needs = "the network, a NAME or OWNER/NAME of yours, and a token that may write (`hf auth login` or HF_TOKEN)"
        raise SettingsError(f"{flag} {repo_id!r}: {shown(error)} Pushing needs {needs}.") from None


def hide_command(repo_id: str, kind: str) -> str:
    """What makes a repository private."""
    return shlex.join(["hf", "repos", "settings", repo_id, *["--repo-type", kind] * (kind != "model"), "--private"])


def patiently(attempt: Callable[[], Result], again: str) -> Result:
    """What `attempt` returns. Where waiting can help it is made again, for 80 s in all; at last UploadError, which ends
    in `again`: where the result is, and how to go on."""
    waits_s = [1, 4, 15, 60]
    while True:
        try:
            return attempt()
        except (hub.errors.HTTPError, OSError, RuntimeError, ValueError) as error:
            answer = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
            refused = 400 <= getattr(answer, "status_code", 0) < 500 and answer.status_code not in (408, 409, 429)
            why = shown(f"{error} {error.__cause__ or ''}")
            if refused or not waits_s or isinstance(error, (ValueError, PermissionError)):  # waiting cannot help
                raise UploadError(f"{why} {again}") from None
            say(f"Upload: {why} Again in {waits_s[0]} s.")
            time.sleep(waits_s.pop(0))


def published_files(final_folder: Path) -> list[str]:
    """What of a final folder may leave the machine, by its name in there."""
    found = [p for pattern in PUBLISHED for p in final_folder.glob(pattern) if p.is_file() and not p.is_symlink()]
    return sorted(path.relative_to(final_folder).as_posix() for path in found)


def upload_command(final_folder: Path, repo_id: str, private: bool) -> str:
    """What uploads the same files by hand."""
    again = ["hf", "upload", repo_id, str(final_folder), ".", *["--private"] * private, "--delete=*.safetensors*"]
    return shlex.join([*again, *(f"--include={name}" for name in published_files(final_folder))])


def saved_words(final_folder: Path, checkpoint: Path | None, settings: PageSettings) -> str:
    """The last words of a run that is stopped once the model is saved: what is on disk, and how to go on."""
    words = f"the model is whole in {final_folder}"
    words += f", the state of its training in {checkpoint}" if checkpoint else ""
    words += f". To use it: python use_model_from_hub.py --image PAGE.png --model {final_folder} --output page.html"
    if settings.push_to_hub:
        words += f"\nTo upload it: {upload_command(final_folder, settings.hub_repo, settings.private_repo)}"
    return words


def push_final_folder(final_folder: Path, repo_id: str, private: bool) -> str:
    """(main process only) Uploads weights and card in one commit and returns their address."""
    names = published_files(final_folder)
    if not any(name.endswith(".safetensors") for name in names):  # or the Hub's own weights would only be deleted
        raise UploadError(f"Not uploaded: {final_folder} holds no model.safetensors. Train and save first.")
    command, there_now = upload_command(final_folder, repo_id, private), f"The model is whole in {final_folder}."

    def attempt() -> str:
        (api := hub.HfApi()).create_repo(repo_id, private=private, exist_ok=True)
        there = api.model_info(repo_id)
        if private and not there.private:
            hide = f"{hide_command(repo_id, 'model')} && {command}"
            why = f"--private_repo was asked, but {repo_id} is public."
            raise UploadError(f"{why} {there_now} To upload it: {hide}")
        # New operations each time: they ask what the Hub has by now, so a commit whose answer was lost is not
        # repeated. Not upload_folder: it commits every 5 minutes (huggingface_hub 1.33, 2.4), so in several parts.
        old = [s.rfilename for s in there.siblings or [] if ".safetensors" in s.rfilename]  # would load instead
        changes = [hub.CommitOperationDelete(name) for name in old if name not in names]
        changes += [hub.CommitOperationAdd(name, final_folder / name) for name in names]
        api.create_commit(repo_id, changes, commit_message="Upload the fine-tuned model and its card")
        return f"{api.endpoint}/{repo_id}"

    return patiently(attempt, f"{there_now} To upload it: {command}")
