"""What a run needs of memory and disk, counted from the checkpoint's header."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.families.family import PartSizes


@dataclass(frozen=True)
class Costs:
    """Bytes. `training` is weights + gradients + optimiser state; what the batch itself needs (activations) comes on
    top."""

    weights: int
    gradients: int
    optimizer: int
    model_file: int
    state_folder: int
    disk: int
    free: int | None

    @property
    def training(self) -> int:
        """Memory that does not depend on the batch."""
        return self.weights + self.gradients + self.optimizer


def count_costs(  # noqa: PLR0913 - being redrawn
    sizes: PartSizes,
    trained: Collection[str],
    weight_bytes: int,
    copy_bytes: int,
    save_bytes: int | None,
    state_bytes_per_parameter: float,
    models_on_disk: int,
    states_on_disk: int,
    folder: Path,
) -> Costs:
    """Memory of a run and the most that its outputs take on the disk of `folder`, which need not exist yet.

    `trained`: names of the modules. What is not trained is kept in 4 bytes, for the saved file, and in a copy of
    `copy_bytes` to compute with (0: none).
    `save_bytes` None: a file holds the weights as they are kept.
    """
    learning = sizes.total(trained)
    frozen = sizes.total() - learning
    kept = learning * weight_bytes + frozen * 4
    weights = kept + frozen * copy_bytes
    optimizer = round(learning * state_bytes_per_parameter)
    model_file = (kept if save_bytes is None else sizes.total() * save_bytes) + sizes.kept_bytes
    state_folder = learning * weight_bytes + optimizer
    return Costs(
        weights=weights,
        gradients=learning * weight_bytes,
        optimizer=optimizer,
        model_file=model_file,
        state_folder=state_folder,
        disk=models_on_disk * model_file + states_on_disk * state_folder,
        free=free_bytes(folder),
    )


def frozen_costs(sizes: PartSizes, base_bytes: int, folder: Path) -> Costs:
    """What a run needs that trains an adapter: the frozen model. The adapter is small beside it, and what it takes is
    told when it is made."""
    vae = sizes.total(("vae",))
    weights = (sizes.total() - vae) * base_bytes + vae * 4
    return Costs(weights, 0, 0, 0, 0, 0, free_bytes(folder))


def free_bytes(folder: Path) -> int | None:
    """Free bytes of the disk that `folder` is or will be on; None where the system does not say."""
    existing = nearest_existing(folder)
    try:
        return shutil.disk_usage(existing).free
    except OSError:
        return None


def nearest_existing(folder: Path) -> Path:
    """The folder itself or the nearest parent that exists."""
    folder = folder.absolute()
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def readable_bytes(count: float) -> str:
    """`2.1 GB`, `34 MB`, `0.5 kB`: decimal units, as file managers show them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
