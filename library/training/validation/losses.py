"""What a validation measures: the losses of sets of images by timestep, and their means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from library.messages import counted
from library.training.validation.plan import TIMESTEPS, SetName

MASK = "_mask"
"""What the name of a set ends with where its loss is that within the masks of those images that have one."""

_PARTS: Mapping[SetName, str] = {"held_out": "average", "training": "training", "class": "class"}
TAGS: Mapping[str, str] = {name + end: part + end for end in ("", MASK) for name, part in _PARTS.items()}
"""The part of a log name that stands for a set; the first is sd-scripts'."""


@dataclass(frozen=True)
class Mean:
    """The mean loss of some images, and its standard error over them; None for one loss."""

    value: float
    error: float | None
    images: int


Means = Mapping[str, Sequence[Mean]]
"""Of each set, and of each set within its masks: the mean over all timesteps, then that of each part of their range."""


@dataclass(frozen=True)
class SetLosses:
    """The losses of a set, (rows, K) float64 on the CPU. `images`: how many different images the rows are of."""

    losses: Tensor
    images: int


@dataclass(frozen=True)
class Losses:
    """The losses of sets of images by timestep, (images, K) float64 on the CPU: held-out images, training images (if
    there are held-out images, their partners in the same order), and images of the class."""

    held_out: Tensor
    trained: Tensor
    of_class: Tensor = torch.zeros(0, TIMESTEPS, dtype=torch.float64)
    different: int | None = None  # training images; fewer than rows if one is the partner of several; None: as many
    within_masks: Mapping[SetName, SetLosses] = field(default_factory=dict)  # of the sets with masks

    @property
    def means(self) -> dict[str, list[Mean]]:
        """The means of the sets that have images."""
        sets: dict[SetName, Tensor] = {"held_out": self.held_out, "training": self.trained, "class": self.of_class}
        found: dict[str, list[Mean]] = {name: means_of(losses) for name, losses in sets.items() if len(losses)}
        if self.different is not None and "training" in found:
            found["training"] = [replace(mean, images=self.different) for mean in found["training"]]
        for name, within in self.within_masks.items():
            found[name + MASK] = [replace(mean, images=within.images) for mean in means_of(within.losses)]
        return found

    @property
    def divergence(self) -> float:
        """The mean loss of the held-out images minus that of their partners."""
        return float(self.held_out.mean()) - float(self.trained.mean())

    @property
    def error(self) -> float | None:
        """Standard error of the divergence over pairs; None for one pair."""
        return _mean((self.held_out - self.trained).mean(1)).error


def means_of(losses: Tensor) -> list[Mean]:
    """The mean of (images, K) losses, then that of each column."""
    return [_mean(losses.mean(1)), *(_mean(column) for column in losses.unbind(1))]


def _mean(by_image: Tensor) -> Mean:
    count = len(by_image)
    return Mean(float(by_image.mean()), float(by_image.std()) / math.sqrt(count) if count > 1 else None, count)


def divergence_of(means: Means) -> float | None:
    """The mean loss of the held-out images minus that of the training images; None without held-out images."""
    return means["held_out"][0].value - means["training"][0].value if "held_out" in means else None


def describe(losses: Losses, base: Means) -> str:
    """One line for the log. `base`: the base model's values, if they are known."""
    means = losses.means
    parts: list[str] = []
    if "held_out" in means:
        spread = "" if losses.error is None else f" ± {losses.error:.2g}"
        is_paired = means["training"][0].images == means["held_out"][0].images
        trained = "as many training images" if is_paired else _images("training", means["training"])
        parts.append(
            f"validation {_loss('held_out', means, base)} on {_images('held-out', means['held_out'])}, "
            f"{_value('training', means, base)} on {trained}: divergence {losses.divergence:+.4f}{spread}"
        )
    elif "training" in means:
        parts.append(f"{_loss('training', means, base)} on {_images('training', means['training'])}")
    if "class" in means:
        parts.append(f"{_loss('class', means, base)} on {_images('class', means['class'])}")
    kinds = {"held_out": "held-out", "training": "training", "class": "class"}
    within = [
        f"{_value(name + MASK, means, base)} on {_images(kind, means[name + MASK])}"
        for name, kind in kinds.items()
        if name + MASK in means
    ]
    return "; ".join([*parts, *([f"within masks {', '.join(within)}"] if within else [])])


def _images(kind: str, means: Sequence[Mean]) -> str:
    return counted(means[0].images, f"{kind} image")


def _loss(name: str, means: Means, base: Means) -> str:
    return f"loss {_value(name, means, base)}"


def _value(name: str, means: Means, base: Means) -> str:
    before = f" (base {base[name][0].value:.4f})" if name in base else ""
    return f"{means[name][0].value:.4f}{before}"


def as_lists(means: Sequence[Mean]) -> list[list[Any]]:
    """Means as a training state holds them."""
    return [[mean.value, mean.error, mean.images] for mean in means]


def from_lists(lists: Sequence[Sequence[Any]]) -> list[Mean]:
    """The reverse of `as_lists`. Raises TypeError or ValueError for anything else."""
    return [Mean(*values) for values in lists]
