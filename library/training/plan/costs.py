"""Memory and disk space that a run needs, from the sizes in the checkpoint's header."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.families.family import PartSizes


@dataclass(frozen=True)
class BytesPerParameter:
    """How weights are kept. `trained`: trained weights. `frozen_copy`: the copy of frozen weights that computes (0:
    none); the exact weights take 4 more. `saved`: weights in a saved model (None: as they are kept).
    `optimizer_state` and `average`: state of the optimizer, and averages, for each trained parameter."""

    trained: int
    frozen_copy: int
    saved: int | None
    optimizer_state: float
    average: int = 0


@dataclass(frozen=True)
class PeakFiles:
    """The most models, training states, and snapshots of averages that are on the disk at once."""

    models: int
    states: int
    snapshots: int


@dataclass(frozen=True)
class Costs:
    """Bytes. `training` is weights + gradients + optimizer state + averages + `base`, the second set of weights that
    preservation compares with; activations, which depend on the batch, come on top. A snapshot is as large as a
    model. In a sharded run memory is that of one process, of which `shards` are its part of what is trained."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    model_file: int
    state_folder: int
    files: PeakFiles
    free: int | None
    base: int = 0
    shards: int = 0

    @property
    def training(self) -> int:
        """Memory that does not depend on the batch."""
        return self.weights + self.gradients + self.optimizer + self.average + self.base

    @property
    def disk(self) -> int:
        """Disk space when most files are there at once."""
        models = self.files.models + self.files.snapshots
        return models * self.model_file + self.files.states * self.state_folder

    def with_average(self, size: int) -> Costs:
        """With an average of so many bytes more, which is in training states too."""
        return replace(self, average=self.average + size, state_folder=self.state_folder + size)

    def sharded(self, processes: int) -> Costs:
        """With what is trained shared out over so many processes."""
        trained = self.gradients  # bytes of the trained weights: gradients have their format

        def part(size: int) -> int:
            return -(-size // processes)

        return replace(
            self,
            weights=self.weights - trained + part(trained),
            gradients=part(self.gradients),
            optimizer=part(self.optimizer),
            average=part(self.average),
            shards=part(2 * trained + self.optimizer + self.average),
        )


def count_costs(
    sizes: PartSizes,
    modules: Collection[str],
    trained: int,
    per_parameter: BytesPerParameter,
    peak_files: PeakFiles,
    folder: Path,
) -> Costs:
    """Memory of a run, and the peak disk space of its outputs in `folder`, which need not exist yet.

    `modules`: names of the trained modules, of which `trained` parameters are trained, and stored in states.
    `peak_files`: those on the disk at once.
    """
    frozen_parameters = sizes.total() - sizes.total(modules)
    exact = sizes.total(modules) * per_parameter.trained + frozen_parameters * 4
    saved = exact if per_parameter.saved is None else sizes.total() * per_parameter.saved
    return _costs(
        trained,
        per_parameter,
        weights=exact + frozen_parameters * per_parameter.frozen_copy,
        kept=trained * per_parameter.trained,
        model_file=saved + sizes.kept_bytes,
        peak_files=peak_files,
        folder=folder,
    )


def count_adapter_costs(
    sizes: PartSizes,
    trained: int,
    saved: int,
    per_parameter: BytesPerParameter,
    peak_files: PeakFiles,
    folder: Path,
) -> Costs:
    """Memory of the frozen base model, `per_parameter.frozen_copy` bytes per parameter, and of its adapter, and the
    peak disk space of its files. `trained`: the adapter's trained parameters; `saved`: values in its file; both 0 where
    they are not known yet."""
    vae = sizes.total(("vae",))
    kept = saved * per_parameter.trained
    return _costs(
        trained,
        per_parameter,
        weights=(sizes.total() - vae) * per_parameter.frozen_copy + vae * 4 + kept,
        kept=kept,
        model_file=saved * (per_parameter.saved or per_parameter.trained),
        peak_files=peak_files,
        folder=folder,
    )


def _costs(
    trained: int,
    per_parameter: BytesPerParameter,
    *,
    weights: int,
    kept: int,
    model_file: int,
    peak_files: PeakFiles,
    folder: Path,
) -> Costs:
    """What `trained` parameters cost, whatever they are part of. `kept`: bytes of weights in a training state."""
    optimizer = round(trained * per_parameter.optimizer_state)
    average = trained * per_parameter.average
    return Costs(
        weights=weights,
        gradients=trained * per_parameter.trained,
        optimizer=optimizer,
        average=average,
        model_file=model_file,
        state_folder=kept + optimizer + average,
        files=peak_files,
        free=free_bytes(folder),
    )


def free_bytes(folder: Path) -> int | None:
    """Free bytes on the disk of `folder`, which need not exist yet; None if the system does not tell."""
    existing = nearest_existing(folder)
    try:
        return shutil.disk_usage(existing).free
    except OSError:
        return None


def nearest_existing(folder: Path) -> Path:
    """The folder itself, or its nearest parent that exists."""
    folder = folder.absolute()
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder
