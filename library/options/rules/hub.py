"""Rules between flags of the Hugging Face Hub."""

from __future__ import annotations

from library.options.rules.rule_kinds import NoEffect, Requires, both, off, on

REQUIRES = (
    Requires(
        ("save_state_to_huggingface", "huggingface_repo_id"),
        on("save_state_to_huggingface"),
        on("huggingface_repo_id"),
        "there is no repository to upload to",
        "add --huggingface_repo_id owner/name",
    ),
)

_NOT_UPLOADED = "nothing is uploaded (huggingface_repo_id is not set)"

NO_EFFECT = (
    *(
        NoEffect(name, off("huggingface_repo_id"), _NOT_UPLOADED)
        for name in ("huggingface_path_in_repo", "huggingface_repo_visibility", "async_upload")
    ),
    *(
        NoEffect(name, off("huggingface_repo_id", "resume_from_huggingface"), _NOT_UPLOADED)
        for name in ("huggingface_repo_type", "huggingface_token")
    ),
    NoEffect(
        "save_state_to_huggingface",
        off("save_state", "save_state_on_train_end"),
        "no training states are saved (save_state is not set)",
    ),
    NoEffect("resume_from_huggingface", off("resume"), "resume is not set"),
    NoEffect(
        "huggingface_repo_type",
        both(off("huggingface_repo_id"), on("resume_from_huggingface")),
        "the type of the state's repository stands in --resume owner/name/folder:revision:type",
    ),
)
