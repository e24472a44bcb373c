"""Measures of the model in training that a checkpoint can be the best by, and the names that they are logged under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from library.training.averaging.plan import SUFFIX


@dataclass(frozen=True)
class Metric:
    """`tags`: the names that it is logged under. `larger`: whether larger is better. `remedy`: how a run measures
    it."""

    name: str
    tags: tuple[str, ...]
    larger: bool
    remedy: str

    @property
    def direction(self) -> str:
        """Which values are better, for the plan."""
        return "larger is better" if self.larger else "smaller is better"

    def is_better(self, value: float, than: float) -> bool:
        """Whether `value` is better than another one; never NaN."""
        return value > than if self.larger else value < than


_HELD_OUT = "hold out images, for example with --validation_split 0.1"
_MEASURES_OF_VALIDATION = (
    # name, part of the log name, remedy
    ("validation_loss", "average", _HELD_OUT),
    ("validation_divergence", "divergence", _HELD_OUT),
    ("training_loss", "training", "set --validate_every_n_steps or --validate_every_n_epochs"),
    ("class_loss", "class", "add regularisation images, and set --validate_every_n_steps or --validate_every_n_epochs"),
)
_MEASURES_OF_IMAGES = (
    # name, whether larger is better: arXiv 2208.12242, section 4
    ("dino", True),
    ("clip_i", True),
    ("clip_t", True),
    ("clip_score", True),
    ("div_dino", True),
    ("pres", False),
)
_EVALUATE = "evaluate images during the training (--evaluation_prompts, with --evaluation_dino or --evaluation_clip)"


def _rows() -> dict[str, Metric]:
    rows: dict[str, Metric] = {}
    for suffix in ("", SUFFIX):
        for name, part, remedy in _MEASURES_OF_VALIDATION:
            tags = tuple(f"loss/validation/{kind}_{part}{suffix}" for kind in ("step", "epoch"))
            rows[name + suffix] = Metric(name + suffix, tags, larger=False, remedy=remedy)
        for name, larger in _MEASURES_OF_IMAGES:
            rows[name + suffix] = Metric(name + suffix, (f"evaluation/{name}{suffix}",), larger, _EVALUATE)
    return rows


METRICS: Mapping[str, Metric] = MappingProxyType(_rows())
