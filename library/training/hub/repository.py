"""A repository of the Hugging Face Hub: made if there is none, and files committed to it."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.messages import shortened
from library.training.hub.plan import UploadPlan
from library.whole_files import folder_beside

TIMEOUT = 30.0  # seconds without a sign of life, after which a request has failed
LATER = (408, 409, 412, 423, 425, 429)  # answers after which another attempt is worth it, like all from 500 on


class HubError(Exception):
    """What the Hub, or the way to it, refuses. `is_final`: another attempt is of no use. Holds no token."""

    def __init__(self, told: str, *, is_final: bool) -> None:
        super().__init__(told)
        self.is_final = is_final


@dataclass
class Repository:
    """The repository of a plan. Its methods wait for the network, and raise HubError."""

    plan: UploadPlan
    _is_open: bool = field(default=False, init=False)
    _hub: Any = field(default=None, init=False)

    def prepare(self) -> str:
        """Make the repository if there is none. Returns what the user should know of it, or ""."""
        if self._is_open:
            return ""
        with telling_errors(self.plan.token):
            told = self._prepare()
        self._is_open = True
        return told

    def _prepare(self) -> str:
        from huggingface_hub.errors import RepositoryNotFoundError

        self._hub = self._hub or connect(self.plan.token)
        plan, hub = self.plan, self._hub
        try:
            is_private = bool(hub.repo_info(plan.repository, repo_type=plan.type).private)
        except RepositoryNotFoundError:
            space = {"space_sdk": "static"} if plan.type == "space" else {}
            private = plan.visibility != "public"
            hub.create_repo(plan.repository, repo_type=plan.type, private=private, exist_ok=True, **space)
            is_private = bool(hub.repo_info(plan.repository, repo_type=plan.type).private)
        if is_private or plan.visibility == "public":
            return ""
        if plan.visibility == "private":
            raise HubError("it is public, and --huggingface_repo_visibility is private", is_final=True)
        return "it is public: everybody can download what this run uploads"

    def commit(self, path: Path) -> None:
        """Upload a file, or a folder with everything in it, in one commit, under its name."""
        self.prepare()
        plan = self.plan
        with telling_errors(plan.token), held_still(path) as source:
            from huggingface_hub import CommitOperationAdd

            target = f"{plan.folder}/{path.name}" if plan.folder else path.name
            files = {target: source}
            if source.is_dir():
                inside = [file for file in sorted(source.rglob("*")) if file.is_file()]
                files = {f"{target}/{file.relative_to(source).as_posix()}": file for file in inside}
            self._hub.create_commit(
                plan.repository,
                [CommitOperationAdd(name, str(file)) for name, file in files.items()],
                commit_message=f"Upload {path.name}",
                repo_type=plan.type,
            )


def connect(token: str | None) -> Any:
    """huggingface_hub's HfApi. Requests of this process end after TIMEOUT without a sign of life: by default never."""
    import huggingface_hub
    from huggingface_hub.utils import _http
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # the bar of the run stands there
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what fails is told once, not at each attempt
    new_client = getattr(_http, "default_client_factory", None)
    if new_client is not None:  # before 1.0 there is another one, which hub's own limits apply to

        def client() -> Any:
            made = new_client()
            made.timeout = TIMEOUT
            return made

        huggingface_hub.set_client_factory(client)
    return huggingface_hub.HfApi(token=token)


@contextmanager
def telling_errors(token: str | None) -> Iterator[None]:
    """Turn everything that goes wrong into a HubError."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a client, a server or a proxy does: the run goes on
        status = status_of(error)
        is_final = isinstance(error, (FileNotFoundError, ValueError, TypeError)) and not hasattr(error, "response")
        if status is not None:
            is_final = status < 500 and status not in LATER
        raise HubError(without_tokens(_told(error, status), token), is_final=is_final) from None


def status_of(error: BaseException | None) -> int | None:
    """The status of the answer that an error, or one that caused it, is about."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__ or error.__context__
    return None


def _told(error: BaseException, status: int | None) -> str:
    if status in (401, 403):
        return f"the token may not write there (HTTP {status})"
    if status == 404:
        return "there is no such repository, or the token may not see it (HTTP 404)"
    while error.__cause__ is not None and status is None:
        error = error.__cause__
    words = " ".join(str(error).split()) or "no answer"
    return shortened(f"{type(error).__name__}: {words}" if status is None else words, 200)


def without_tokens(text: str, token: str | None) -> str:
    """A text without any token that this process knows."""
    from huggingface_hub import get_token

    for secret in (token, get_token()):
        if secret:
            text = text.replace(secret, "(token)")
    return text


@contextmanager
def held_still(path: Path) -> Iterator[Path]:
    """The file or folder to upload as it is now, whatever the run puts in its place meanwhile: the client opens each
    file twice, for its hash and to send it."""
    with folder_beside(path) as folder:
        held = folder / path.name
        if path.is_dir():
            shutil.copytree(path, held, copy_function=_hold)
        else:
            _hold(path, held)
        yield held


def _hold(source: str | Path, target: str | Path) -> None:
    """Another name of a file: files are replaced as a whole. A copy where a file has only one name, and where one that
    is open cannot be replaced."""
    if can_replace_open_files():
        with suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def can_replace_open_files() -> bool:
    """Whether another file can be renamed to the name of one that is open: not on Windows."""
    return os.name != "nt"
