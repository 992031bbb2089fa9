"""Whether base and datasets are there: looked at in seconds, before anything is loaded.

    found = look(settings)                  # problems, what was looked at, and what could not be
    print(words(found))                     # "checked: ...; not checked: ...", in one sentence

A folder is looked into. A name on the Hub is looked up, but for a base that lies in the cache; a Hub that does not
answer is no problem of the settings, and is said. Without torch, since --check_settings tells it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scoring.report_values import plural
from training.containers import find_container
from training.errors import DataError
from training.mixture import AskedDataset, asked_datasets
from training.processes import in_columns

HUB_S = 5  # for an answer of the Hub: a check takes seconds


@dataclass
class Found:
    """`problems` each with its remedy, what is `well`, and what nobody could look at (`unseen`), with the reason."""

    problems: list[str] = field(default_factory=list)
    well: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)

    @property
    def base_is_there(self) -> bool:
        """Whether its configuration can be read without waiting for a Hub that does not answer."""
        return not any(text.startswith("--base_model ") for text in self.problems + self.unseen)


def look(settings: Any) -> Found:
    """At the base and at every dataset of settings that have no problem of their own."""
    found = Found()
    look_at_base(settings.base_model, settings.base_revision, found)
    for asked in asked_datasets(settings):
        path = Path(asked.name).expanduser()
        if path.exists():
            look_into(asked, path, found)
        else:
            ask_hub(f"--dataset {asked.name}", asked.name, asked.revision, "dataset", found)
    return found


def look_at_base(name: str, revision: str | None, found: Found) -> None:
    """A folder has been looked at with the settings; of the cache only a configuration is asked for."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    flag = f"--base_model {name}"
    if Path(name).is_dir():
        found.well.append(f"{flag} (a folder)")
        return
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as error:
        found.problems.append(f"{flag}: no such folder, and no name on the Hub: {error}")
        return
    if isinstance(cached, str):
        found.well.append(f"{flag} (in the cache)")
    else:
        ask_hub(flag, name, revision, "model", found)


def ask_hub(flag: str, name: str, revision: str | None, kind: str, found: Found) -> None:
    """Whether the Hub has it, and gives it to us."""
    import huggingface_hub as hub

    api = hub.HfApi()
    ask: Callable[..., Any] = {"model": api.model_info, "dataset": api.dataset_info}[kind]
    try:
        if getattr(ask(name, revision=revision, timeout=HUB_S), "gated", False):
            api.auth_check(name, repo_type=kind)
    except hub.errors.GatedRepoError:
        found.problems.append(f"{flag} is gated: ask for access on its page, and log in (`hf auth login`)")
    except hub.errors.RevisionNotFoundError:
        found.problems.append(f"{flag}: the Hub has no revision {revision} of it; correct it")
    except (hub.errors.RepositoryNotFoundError, hub.errors.HFValidationError):
        found.problems.append(
            f"{flag}: neither a folder here nor on the Hub; correct the name, or log in (`hf auth login`) for what is "
            "private"
        )
    except (hub.errors.HTTPError, OSError, ValueError) as error:
        why = "HF_HUB_OFFLINE is set" if hub.is_offline_mode() else type(error).__name__
        found.unseen.append(f"{flag} (the Hub does not answer: {why})")
    else:
        found.well.append(f"{flag} (on the Hub)")


def look_into(asked: AskedDataset, path: Path, found: Found) -> None:
    """What lies there as pages, not yet whether each can be read."""
    try:
        container = find_container(path, asked.source.split)
    except DataError as error:
        told = str(error)
        found.problems.append("--dataset " + (told if told.startswith(str(path)) else f"{path}: {told}"))
        return
    what = container.kind if container else "files of `datasets`"
    if container and container.kind == "pairs":
        what = plural(sum(bool(picture) for picture, _ in container.files), "page") + " with pictures"
    elif container and container.files:
        what = ", ".join(container.files[:3])
    found.well.append(f"--dataset {asked.name} ({what})")


def words(found: Found) -> str:
    """Of what has no problem."""
    unseen = [*found.unseen, "each page", "GPU memory (--plan)"]
    verdict = "checked, all of it is well" if not found.unseen else "checked, and well as far as it could be seen"
    return in_columns(f"{verdict}: {', '.join(['settings', 'folders', *found.well])}; not checked: {', '.join(unseen)}")
