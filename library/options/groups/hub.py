"""Options of uploads to the Hugging Face Hub, and of training states that are read from there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from library.options.flag import flag

RepoType = Literal["model", "dataset", "space"]
Visibility = Literal["private", "public"]


@dataclass(frozen=True)
class HubOptions:
    """Repository of the Hugging Face Hub to which a run uploads what it saves."""

    may_change_on_resume: ClassVar[bool] = True

    huggingface_repo_id: str | None = flag(
        None,
        "Repository of the Hugging Face Hub that saved models are uploaded to, as owner/name; it is created if there "
        "is none. An upload that fails never ends the run.",
        private=True,
    )
    huggingface_repo_type: RepoType | None = flag(
        None, "Type of the repository; not set = model.", choices=get_args(RepoType)
    )
    huggingface_path_in_repo: str | None = flag(
        None, "Folder in the repository for the uploaded files; not set = its root.", private=True
    )
    huggingface_token: str | None = flag(
        None,
        "Token of the Hugging Face Hub; never shown, written or logged. Not set = HF_TOKEN, or the token of "
        "`hf auth login`.",
        secret=True,
    )
    huggingface_repo_visibility: Visibility | None = flag(
        None,
        "Who sees a repository that the run creates; not set = private. With private, nothing is uploaded to a public "
        "repository.",
        choices=get_args(Visibility),
    )
    async_upload: bool = flag(
        False,
        "Train on while files are uploaded; without it the run waits for each upload, up to five minutes.",
    )
    save_state_to_huggingface: bool = flag(False, "Upload saved training states too.")
    resume_from_huggingface: bool = flag(
        False, "Read the training state of --resume owner/name/folder[:revision[:type]] from the Hugging Face Hub."
    )
