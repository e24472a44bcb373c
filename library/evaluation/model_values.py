"""Values of models as JSON beside their images: computed once for the same images, encoders and real images.

    OUTDIR/base/values.json   {"of": what they were computed from, "by_prompt": {"dino": [0.61, …], …},
                               "images": [{"file": "00_0.png", "dino": 0.63, "nearest": 0.71, …}, …]}

No torch at module level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.bounded import read_json
from library.checkpoints.header import CheckpointError
from library.checkpoints.writer import write_json
from library.options.mistakes import Mistake, UserError

VALUES = "values.json"


@dataclass(frozen=True)
class ModelValues:
    """The values of one model: see library.evaluation.scores.Scores. `images`: the records of its images, with "file";
    those of `copies` are among them. `real`: the real images among themselves."""

    by_prompt: Mapping[str, Sequence[float]]
    means: Mapping[str, float]
    images: Sequence[Mapping[str, Any]]
    copies: Sequence[Mapping[str, Any]]
    real: Mapping[str, float]


def read_values(folder: Path, computed_from: Mapping[str, Any]) -> ModelValues | None:
    """The values of an earlier call; None if there are none, or if they were computed from something else."""
    try:
        stored = read_json(folder / VALUES)
        if stored.pop("of") != computed_from:
            return None
        return ModelValues(**stored)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None


def write_values(folder: Path, computed_from: Mapping[str, Any], values: ModelValues) -> None:
    """Keep the values of a model. Raises UserError."""
    try:
        write_json(folder / VALUES, {"of": dict(computed_from), **vars(values)})
    except CheckpointError as error:
        raise UserError([Mistake(str(error))]) from error
