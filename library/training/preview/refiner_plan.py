"""Plan the refiner that finishes preview images while a base model is trained: --preview_refiner. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.checkpoints.header import Header
from library.families.family import Family
from library.families.registry import open_model
from library.messages import readable_bytes
from library.runtime.precision import BYTES, FloatName
from library.training.plan.base_model import collect_errors

if TYPE_CHECKING:
    from library.options.mistakes import Mistakes
    from library.options.train_options import TrainOptions
    from library.training.plan.base_model import BaseModel

SUFFIX = "_refined"
"""Of the images' names."""


@dataclass(frozen=True)
class RefinerPlan:
    """A refiner, to take over at the first step below the timestep `below` (`share` of them all).

    `modules` are loaded in `dtype` while images are drawn, which takes `size` bytes; the base model's VAE decodes.
    """

    header: Header
    family: Family
    share: float
    below: int
    modules: tuple[str, ...]
    dtype: FloatName
    size: int

    def __str__(self) -> str:
        """A line of the plan: what is drawn, and what it costs."""
        return (
            f"each also finished by the refiner {self.header.path} for the last {self.share:.0%} of the timesteps, to "
            f"a second file ({SUFFIX}.png): about {self.share:.0%} more steps and a second decoding per image; "
            f"{readable_bytes(self.size)} ({self.dtype}) are read each time, and freed when the images are drawn"
        )


def decide_refiner(
    options: TrainOptions, base_model: BaseModel, dtype: FloatName, mistakes: Mistakes
) -> RefinerPlan | None:
    """The refiner of --preview_refiner, known by its header. Adds mistakes."""
    name, base = options.preview.preview_refiner, base_model.family
    if name is None or "hand_over" not in base.capabilities:  # which is a mistake already
        return None
    if base.refines:
        what = f"--preview_refiner, but {base.title} itself is trained: its previews are images of the dataset, refined"
        mistakes.add(what, "remove --preview_refiner, or train a base model")
        return None
    plan = None
    with collect_errors("preview_refiner", mistakes):
        header, family = open_model(name)
        modules, share = (family.backbone, *family.text_encoders), options.objective.refiner_training_strength
        plan = RefinerPlan(
            header=header,
            family=family,
            share=share,
            below=round(share * base.process.timesteps),
            modules=modules,
            dtype=dtype,
            size=family.sizes(header).total(modules) * BYTES[dtype],
        )
    if plan is not None and not plan.family.refines:
        what = f"--preview_refiner {name} is {plan.family.title}, not a refiner"
        mistakes.add(what, "give the refiner of Stable Diffusion XL, or remove --preview_refiner")
    return plan
