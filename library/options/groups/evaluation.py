"""Options of evaluation: DreamBooth's measures of images that are drawn during training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.options.flag import flag


@dataclass(frozen=True)
class EvaluationOptions:
    """Encoders, prompts, the words of the subject, and when to evaluate."""

    may_change_on_resume: ClassVar[bool] = True

    evaluation_prompts: Path | None = flag(
        None,
        "Prompts of the evaluation: object or live (the 25 of DreamBooth's paper for objects, or for people and "
        "animals), or a file (.txt, .toml or .json) with {subject} where the words of the subject belong.",
    )
    evaluation_dino: Path | None = flag(
        None, "Folder of a DINO or DINOv2 model in transformers' format: subject fidelity, PRES and diversity."
    )
    evaluation_clip: Path | None = flag(
        None, "Folder of a CLIP model in transformers' format: CLIP-I, CLIP-T and the CLIP score."
    )
    evaluation_subject: str | None = flag(
        None, "Words of the subject in prompts. Not set = folder name or class_tokens, sks dog in 10_sks dog."
    )
    evaluation_class: str | None = flag(
        None,
        "Words of its class. Not set = folder name or class_tokens without the first word, dog in 10_sks dog.",
    )
    evaluation_images_per_prompt: int = flag(
        2, "Images of the subject per prompt; of the class, one is drawn.", at_least=1, at_most=1000
    )
    evaluate_every_n_steps: int | None = flag(None, "Evaluate every n steps; 0 = off.", at_least=1, zero_is_off=True)
    evaluate_every_n_epochs: int | None = flag(
        None,
        "Evaluate every n epochs; not set = 1, unless evaluate_every_n_steps is set.",
        at_least=1,
        zero_is_off=True,
    )
