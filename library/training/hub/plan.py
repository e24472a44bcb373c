"""Decide what a run uploads to the Hugging Face Hub, and where to. Uses no network."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Literal

from library.options.groups.hub import HubOptions, RepoType
from library.options.mistakes import Mistakes

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LIMIT = 96  # characters of owner/name, as the Hub allows


@dataclass(frozen=True)
class UploadPlan:
    """What is uploaded: models, with `states` also training states, to `folder` ("" = the root) of a repository.

    `visibility` None: private if the repository is created. `waits`: whether the run waits for each upload. `token`
    None: the one of the machine.
    """

    repository: str
    type: RepoType = "model"
    folder: str = ""
    visibility: Literal["private", "public"] | None = None
    states: bool = False
    waits: bool = True
    token: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        what = "models and training states" if self.states else "models"
        folder = f", folder {self.folder}" if self.folder else ""
        created = f"{self.visibility or 'private'} if it is created"
        how = "the run waits for each upload, up to five minutes" if self.waits else "while the run trains on"
        return (
            f"uploads: {what} to the {self.type} {self.repository} of the Hugging Face Hub ({created}){folder}, {how}"
        )


def decide_uploads(options: HubOptions, mistakes: Mistakes) -> UploadPlan | None:
    """The uploads of a run: None without --huggingface_repo_id or, with mistakes added, for values that cannot be."""
    repository, folder = options.huggingface_repo_id, (options.huggingface_path_in_repo or "").strip("/")
    if repository is None:
        return None
    if not is_repository(repository):
        mistakes.add(
            f'--huggingface_repo_id "{repository}" is not a repository',
            "write owner/name, with letters, digits, - _ and . only, such as me/my-dog",
        )
    if any(part in ("", ".", "..", ".git") for part in folder.split("/")) and folder or "\\" in folder:
        mistakes.add(
            f'--huggingface_path_in_repo "{options.huggingface_path_in_repo}" is not a folder of a repository',
            "write the names of its folders with / between them, such as dogs/rex",
        )
    check_online("--huggingface_repo_id", mistakes)
    if options.huggingface_token is None and not has_token():
        mistakes.add(
            "--huggingface_repo_id: there is no token for the Hugging Face Hub",
            "run `hf auth login`, set HF_TOKEN, or pass --huggingface_token with a token that may write",
        )
    return UploadPlan(
        repository=repository,
        type=options.huggingface_repo_type or "model",
        folder=folder,
        visibility=options.huggingface_repo_visibility,
        states=options.save_state_to_huggingface,
        waits=not options.async_upload,
        token=options.huggingface_token,
    )


def is_repository(name: str) -> bool:
    """Whether a text is owner/name as the Hub allows it."""
    if len(name) > _LIMIT or not _REPOSITORY.fullmatch(name):
        return False
    return not any(part.endswith((".", "-", ".git")) or ".." in part or "--" in part for part in name.split("/"))


def check_online(cause: str, mistakes: Mistakes) -> None:
    """Refuse what needs the Hub where its own switch forbids the network."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        mistakes.add(f"{cause}: HF_HUB_OFFLINE forbids the network", "remove HF_HUB_OFFLINE from the environment")


def has_token() -> bool:
    """Whether huggingface_hub finds a token on this machine."""
    from huggingface_hub import get_token  # imports neither torch nor a model; only for runs that upload

    return get_token() is not None
