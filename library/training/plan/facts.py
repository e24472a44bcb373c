"""The decisions that training and precaching share, made before any weights are loaded."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from library.data.order import EpochOrder
from library.families.family import LatentSpace
from library.options.mistakes import Mistake, Mistakes
from library.options.parse import Parsed
from library.options.train_options import TrainOptions
from library.runtime.abilities import computes_bf16
from library.runtime.allocator import share_one_arena
from library.runtime.device import Machine, describe_machine
from library.runtime.launch import ALONE, Launch
from library.runtime.precision import FloatName, Precision, resolve
from library.training.plan.base_model import BaseModel, decide_base_model
from library.training.plan.duration import Duration, decide_duration
from library.training.plan.images import Images, decide_images
from library.training.preservation.plan import PreservationPlan, decide_preservation
from library.training.quantised.plan import Quantisation, decide_quantisation
from library.training.saving.state import SavedState
from library.training.sharding.plan import Sharding, read_sharding
from library.training.sharding.zero_plan import Zero, read_zero
from library.training.validation.plan import ValidationPlan, decide_validation


@dataclass(frozen=True)
class RunFacts:
    """The options of the user, and what follows from them with this machine, base model and data. `given`: names of the
    options that differ from the program's defaults."""

    options: TrainOptions
    given: frozenset[str]
    machine: Machine
    precision: Precision
    base_model: BaseModel
    quantisation: Quantisation | None
    images: Images
    order: EpochOrder
    duration: Duration
    validation: ValidationPlan | None
    preservation: PreservationPlan
    seed: int
    launch: Launch = ALONE
    sharding: Sharding | None = None
    zero: Zero | None = None

    @property
    def window(self) -> int:
        """Batches of an optimizer step, over all processes."""
        return self.options.memory.gradient_accumulation_steps * self.launch.world


def decide_facts(
    parsed: Parsed,
    seed: int,
    mistakes: Mistakes,
    notes: list[str],
    launch: Launch = ALONE,
    machine: Machine | None = None,
) -> RunFacts | None:
    """Inspect the machine, unless a run on another `machine` is planned, the checkpoint and the images.

    None, with mistakes added, if there is no usable checkpoint or no usable image.
    """
    options = parsed.options
    machine = machine or describe_machine()
    if machine.is_cpu:
        share_one_arena()  # images are read in threads
    sharding = read_sharding(os.environ, launch, mistakes, notes)
    zero = read_zero(options.deepspeed, os.environ, launch, mistakes, notes)
    precision = resolve(options.memory, machine, strict=options.run.strict)
    collect(precision, mistakes, notes)
    base_model = decide_base_model(options, mistakes, notes)
    images = decide_images(options, base_model.tokenizer if base_model else None, mistakes, seed)
    quantisation = None
    if base_model is not None:
        quantisation = decide_quantisation(options.quantisation, base_model.family, base_model.sizes, machine, mistakes)
    preservation = decide_preservation(options, parsed.origins["preservation"], images, mistakes, notes)
    if base_model is None or images is None:
        return None
    # each process takes gradient_accumulation_steps batches of a step
    batches = options.memory.gradient_accumulation_steps * launch.world
    order = images.order(batches, seed, options.dataset.shard_buffer)
    return RunFacts(
        options=options,
        given=parsed.given,
        machine=machine,
        precision=avoid_fp16_vae(precision, base_model.family.latent, machine, notes),
        base_model=base_model,
        quantisation=quantisation,
        images=images,
        order=order,
        duration=decide_duration(options.run, parsed.set_by_user, order.steps_per_epoch, order.batches_per_epoch),
        validation=decide_validation(options.validation, images),
        preservation=preservation,
        seed=seed,
        launch=launch,
        sharding=sharding,
        zero=zero,
    )


class Decision(Protocol):
    """A decision with its mistakes and notes."""

    @property
    def mistakes(self) -> Sequence[Mistake]: ...

    @property
    def notes(self) -> Sequence[str]: ...


def collect(decision: Decision, mistakes: Mistakes, notes: list[str]) -> None:
    """Add the mistakes and notes of a decision to those of the plan."""
    mistakes.extend(decision.mistakes)
    notes.extend(decision.notes)


def avoid_fp16_vae(precision: Precision, latent: LatentSpace, machine: Machine, notes: list[str]) -> Precision:
    """The precision with bf16 or fp32 for a VAE whose activations overflow in fp16 (LatentSpace.fp16)."""
    if latent.fp16 or precision.vae != "fp16":
        return precision
    chosen: FloatName = "bf16" if computes_bf16(machine) else "fp32"
    notes.append(f"the VAE runs in {chosen}: the VAE of this model gives NaN in fp16")
    return replace(precision, vae=chosen)


def decide_seed(options: TrainOptions, resume: SavedState | None, launch: Launch = ALONE) -> int:
    """--seed, else the seed of the resumed state, else a random one, which the plan shows."""
    if options.run.seed is not None:
        return options.run.seed
    if resume is not None and resume.identity.get("seed", "").isdigit():
        return int(resume.identity["seed"])
    return draw_seed() if launch.seed is None else launch.seed


def draw_seed() -> int:
    """A random seed for a run."""
    return secrets.randbelow(2**31)
