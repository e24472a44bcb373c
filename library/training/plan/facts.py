"""What a training and a precaching run decide alike, before a weight is loaded."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from library.data.order import EpochOrder
from library.families.family import LatentSpace
from library.options.mistakes import Mistake, Mistakes
from library.options.parse import Parsed
from library.options.train_options import TrainOptions
from library.runtime.device import Machine, describe_machine
from library.runtime.precision import FloatName, Precision, resolve
from library.training.plan.base_model import BaseModel, decide_base_model
from library.training.plan.duration import Duration, decide_duration
from library.training.plan.images import Images, decide_images
from library.training.saving.state import SavedState
from library.training.validation.plan import ValidationPlan, decide_validation


@dataclass(frozen=True)
class RunFacts:
    """The options as the user gave them, and what they mean with this machine, base model and data."""

    options: TrainOptions
    machine: Machine
    precision: Precision
    base_model: BaseModel
    images: Images
    order: EpochOrder
    duration: Duration
    validation: ValidationPlan | None
    seed: int


def decide_facts(parsed: Parsed, seed: int, mistakes: Mistakes, notes: list[str]) -> RunFacts | None:
    """Look at the machine, the checkpoint and the images. None without a usable checkpoint or image; the mistakes say
    why."""
    options = parsed.options
    machine = describe_machine()
    precision = resolve(options.memory, machine, strict=options.run.strict)
    collect(precision, mistakes, notes)
    base_model = decide_base_model(options, mistakes, notes)
    images = decide_images(options, base_model.tokenizer if base_model else None, mistakes, seed)
    if base_model is None or images is None:
        return None
    order = images.order(options.memory.gradient_accumulation_steps, seed)
    return RunFacts(
        options=options,
        machine=machine,
        precision=with_sound_vae(precision, base_model.family.latent, machine, notes),
        base_model=base_model,
        images=images,
        order=order,
        duration=decide_duration(options.run, parsed.set_by_user, order.steps_per_epoch, order.batches_per_epoch),
        validation=decide_validation(options.validation, images),
        seed=seed,
    )


class Decision(Protocol):
    """A decision that comes with mistakes and notes."""

    @property
    def mistakes(self) -> Sequence[Mistake]: ...

    @property
    def notes(self) -> Sequence[str]: ...


def collect(decision: Decision, mistakes: Mistakes, notes: list[str]) -> None:
    """Add the mistakes and notes of a decision to those of the plan."""
    mistakes.extend(decision.mistakes)
    notes.extend(decision.notes)


def with_sound_vae(precision: Precision, latent: LatentSpace, machine: Machine, notes: list[str]) -> Precision:
    """The precision with a format that the VAE's activations fit in (LatentSpace.fp16)."""
    if latent.fp16 or precision.vae != "fp16":
        return precision
    chosen: FloatName = "bf16" if (machine.compute_capability or (0, 0)) >= (8, 0) else "fp32"
    notes.append(f"the VAE computes in {chosen}: in fp16 the one of this kind of model gives NaN")
    return replace(precision, vae=chosen)


def decide_seed(options: TrainOptions, resume: SavedState | None) -> int:
    """--seed; without it a resumed run keeps the seed of its state, and a new run draws one, which the plan shows."""
    if options.run.seed is not None:
        return options.run.seed
    if resume is not None and resume.identity.get("seed", "").isdigit():
        return int(resume.identity["seed"])
    return secrets.randbelow(2**31)
