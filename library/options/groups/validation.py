"""Images that are not trained on, and the loss on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from library.options.flag import flag


@dataclass(frozen=True)
class ValidationOptions:
    """How many images are set aside, and when the loss on them is taken."""

    may_change_on_resume: ClassVar[bool] = True  # images set aside are missing from the data

    validation_split: float = flag(
        0.0,
        "Share of the images that is set aside and not trained on, 0 to 1: the loss on them tells whether a run "
        "learns or memorises.",
        at_least=0,
        at_most=1,
        metadata="ss_validation_split",
    )
    validation_seed: int | None = flag(
        None, "Seed of the choice of these images; not set = seed.", at_least=0, metadata="ss_validation_seed"
    )
    validate_every_n_steps: int | None = flag(
        None,
        "Take the loss on them after every n-th step; 0 = off.",
        at_least=1,
        zero_is_off=True,
        metadata="ss_validate_every_n_steps",
    )
    validate_every_n_epochs: int | None = flag(
        None,
        "Take the loss on them after every n-th epoch; not set = 1, unless validate_every_n_steps is set.",
        at_least=1,
        zero_is_off=True,
        metadata="ss_validate_every_n_epochs",
    )
    max_validation_steps: int | None = flag(
        None,
        "Take at most this many batches of them each time; 0 = all.",
        at_least=1,
        zero_is_off=True,
        metadata="ss_max_validation_steps",
    )
