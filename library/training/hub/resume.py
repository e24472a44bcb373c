"""The training state of --resume_from_huggingface: read from the Hub into the local cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from library.options.groups.hub import RepoType
from library.options.mistakes import Mistakes
from library.training.hub.plan import check_online, is_repository
from library.training.hub.repository import HubError, connect, telling_errors

if TYPE_CHECKING:
    from library.options.train_options import TrainOptions

_REMEDY = "write owner/name/folder, owner/name/folder:revision or owner/name/folder:revision:type"


@dataclass(frozen=True)
class HubState:
    """A folder of a repository at a revision."""

    repository: str
    folder: str
    revision: str = "main"
    type: str = "model"


def local_state(options: TrainOptions, mistakes: Mistakes) -> Path | None:
    """The folder of --resume, from the Hub if that is asked for. None without one or, with a mistake added, if it
    cannot be read."""
    named = options.saving.resume
    if named is None or not options.hub.resume_from_huggingface:
        return named
    state = parse_state(Path(named).as_posix())
    if state is None:
        mistakes.add(f"--resume {named} with --resume_from_huggingface: this names no folder of a repository", _REMEDY)
        return None
    before = len(mistakes)
    check_online("--resume_from_huggingface", mistakes)
    if len(mistakes) > before:
        return None
    try:
        return download(state, options.hub.huggingface_token)
    except HubError as error:
        mistakes.add(f"--resume {named} cannot be read from the Hugging Face Hub: {error}", _REMEDY)
        return None


def parse_state(named: str) -> HubState | None:
    """kohya's owner/name/folder[:revision[:type]]; None for any other text."""
    match = re.fullmatch(r"([^/:]+/[^/:]+)/([^:]+?)/?(?::([^:]+))?(?::([^:]+))?", named)
    if match is None or not is_repository(match[1]) or (match[4] or "model") not in get_args(RepoType):
        return None
    if any(part in ("", ".", "..") for part in match[2].split("/")) or set(match[2]) & set("*?["):
        return None
    return HubState(match[1], match[2], match[3] or "main", match[4] or "model")


def download(state: HubState, token: str | None) -> Path:
    """The folder in the cache of huggingface_hub; files that are there are not fetched again. Raises HubError."""
    with telling_errors(token):
        folder = connect(token).snapshot_download(
            state.repository,
            repo_type=state.type,
            revision=state.revision,
            allow_patterns=[f"{state.folder}/*"],
        )
    found = Path(folder) / state.folder
    if not found.is_dir():
        raise HubError(f"{state.repository} has no folder {state.folder} at {state.revision}", is_final=True)
    return found
