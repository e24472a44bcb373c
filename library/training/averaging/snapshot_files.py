"""Snapshots of the averages of post-hoc EMA: their names, and what they say of themselves. No torch.

A snapshot is a model or an adapter like any other that the run saves. Its name has the step and the relative width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from library.checkpoints.files import read_header
from library.checkpoints.header import CheckpointError, Header
from library.training.averaging.power_profiles import Profile

_NAME = re.compile(r"step(\d{8,})-0\.\d+\.safetensors")
_WIDTH, _STEPS, _ERROR = "ss_posthoc_ema_sigma_rel", "ss_posthoc_ema_steps", "ss_posthoc_ema_error"


@dataclass(frozen=True)
class Snapshot:
    """A file, and the average that it holds."""

    header: Header
    profile: Profile


def file_name(step: int, width: float) -> str:
    """The name of a snapshot: `step00000100-0.05.safetensors`."""
    return f"step{step:08d}-{width:.2f}.safetensors"


def step_of(path: Path) -> int | None:
    """The step in the name of a snapshot, or None for another file."""
    found = _NAME.fullmatch(path.name)
    return None if found is None else int(found[1])


def snapshot_metadata(profile: Profile, error: float | None = None) -> dict[str, str]:
    """What a file says of its average. `error`: of the profile, if it was made of other averages."""
    about = {_WIDTH: f"{profile.width:g}", _STEPS: str(profile.step)}
    return about if error is None else about | {_ERROR: f"{error:.3g}"}


def read_snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots of a folder, by step and width. Raises CheckpointError: no folder, no snapshots, a damaged one,
    snapshots that differ in their tensors."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder. --posthoc_ema_snapshots makes one beside the model.")
    paths = sorted(path for path in folder.iterdir() if step_of(path) is not None)
    if not paths:
        raise CheckpointError(f"{folder}: no snapshots (step00000100-0.05.safetensors). Use NAME-posthoc_ema of a run.")
    snapshots = [_read(path) for path in paths]
    first = snapshots[0].header
    for snapshot in snapshots[1:]:
        if snapshot.header.tensors != first.tensors:
            raise CheckpointError(
                f"{snapshot.header.path} and {first.path} have different tensors: they are of two runs. Move those of "
                "one of them to another folder."
            )
    return snapshots


def _read(path: Path) -> Snapshot:
    header = read_header(path)
    try:
        return Snapshot(header, Profile(float(header.metadata[_WIDTH]), int(header.metadata[_STEPS])))
    except (KeyError, ValueError):
        raise CheckpointError(f"{path}: its metadata do not say which average it holds. Remove it.") from None
