"""Options of preservation: what keeps the model from forgetting while it learns a subject."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from library.options.flag import flag

PreservationBase = Literal["auto", "accelerator", "half", "int8", "int4", "nf4", "fp8", "cpu", "cached"]


@dataclass(frozen=True)
class PreservationOptions:
    """The anchors of a run, each with its weight and steps, and what they need to know of captions."""

    preservation: tuple[str, ...] = flag(
        (),
        "What keeps the model from forgetting, as NAME[=WEIGHT][@FIRST-LAST]: reg_images, base_prediction, "
        "class_prompt, blank_prompt, outside_mask, for example reg_images=0.5 class_prompt=1@100-800. Not set = "
        "reg_images, or base_prediction for the regularisation data of a data_backend_config.",
    )
    preservation_identifier: str | None = flag(
        None,
        "For class_prompt: the words of captions that name the subject. Not set = the first word of folder name or "
        "class_tokens, sks in 10_sks dog.",
    )
    preservation_class: str | None = flag(
        None,
        "For class_prompt: what the subject is, in place of the identifier. Not set = the other words of folder name "
        "or class_tokens, dog in 10_sks dog.",
    )
    preservation_base: PreservationBase = flag(
        "auto",
        "Where the base model is kept that anchors compare with: accelerator = beside the model in fp32, half = there "
        "in half precision, int8 to fp8 = there quantised, cpu = in main memory, copied by layers, auto = what has "
        "room; cached = predictions of base_prediction made before the first step.",
        choices=get_args(PreservationBase),
        script="train_db.py",
    )
    preservation_draws: int = flag(
        8,
        "For preservation_base cached: draws (timestep, noise, crop) of each regularisation image, used in turn.",
        at_least=1,
        script="train_db.py",
    )
