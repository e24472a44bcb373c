"""The plan of a run: every decision that needs no weight, made once and frozen.

`decide` is the only way to a Plan. It looks at the options, the machine, the header of the checkpoint and the
images, and collects the mistakes of all of them, so that a user sees every one at once.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from library.data.order import EpochOrder
from library.families.family import Family, LatentSpace
from library.objective import check_options
from library.objective.process import Prediction
from library.options.groups.objective import ObjectiveOptions
from library.options.mistakes import Mistake, Mistakes
from library.options.parse import Parsed
from library.options.train_options import TrainOptions
from library.runtime.device import Machine, describe_machine
from library.runtime.precision import BYTES, FloatName, Precision, resolve
from library.training.adapter.plan import AdapterPlan, decide_adapter
from library.training.optim.optimizers import OptimizerChoice, choose_optimizer
from library.training.optim.schedules import ScheduleChoice, choose_schedule
from library.training.plan.base_model import BaseModel, decide_base_model
from library.training.plan.costs import Costs, count_costs, frozen_costs, readable_bytes
from library.training.plan.duration import Duration, decide_duration
from library.training.plan.identity import dataset_file, identity_of
from library.training.plan.images import Images, decide_images
from library.training.plan.learning_rates import LearningRates, decide_learning_rates
from library.training.plan.resume import check_continuation, decide_resume
from library.training.plan.start import decide_start
from library.training.plan.writable_paths import check_final_model, check_places
from library.training.preview.plan import PreviewPlan, check_prompts, plan_preview
from library.training.saving.model_file import check_metadata
from library.training.saving.outputs import Outputs, decide_outputs, most_on_disk
from library.training.saving.state import Identity, Progress, SavedState
from library.training.trackers import Trackers, decide_trackers
from library.training.validation.plan import ValidationPlan, decide_validation


@dataclass(frozen=True)
class Plan:
    """Everything that was decided. The session reads it; nothing writes to it."""

    options: TrainOptions
    machine: Machine
    precision: Precision
    base_model: BaseModel
    images: Images
    order: EpochOrder
    duration: Duration
    learning_rates: LearningRates
    adapter: AdapterPlan | None
    optimizer: OptimizerChoice
    schedule: ScheduleChoice
    outputs: Outputs
    preview: PreviewPlan | None
    validation: ValidationPlan | None
    trackers: Trackers
    costs: Costs
    seed: int
    workers: int
    identity: Identity
    resume: SavedState | None
    start: Progress
    notes: tuple[str, ...]
    origins: Mapping[str, str]


@dataclass(frozen=True)
class Grounds:
    """What each part of the options comes to by itself; the fields are those of Plan."""

    machine: Machine
    precision: Precision
    optimizer: OptimizerChoice
    base_model: BaseModel
    resume: SavedState | None
    seed: int
    images: Images
    adapter: AdapterPlan | None
    preview: PreviewPlan | None
    validation: ValidationPlan | None
    trackers: Trackers


def decide(parsed: Parsed) -> Plan:
    """Make the plan of a run from its parsed options. Raises UserError with all mistakes of the run."""
    options, mistakes, notes = parsed.options, Mistakes(), list(parsed.notes)
    mistakes.extend(parsed.mistakes)
    refuse_several_processes(mistakes)
    found = find_grounds(options, mistakes, notes)

    # what follows from several of them
    base_model, adapter, images = found.base_model, found.adapter, found.images
    notes.extend(check_objective(base_model.objective, base_model.prediction, mistakes, base_model.family))
    order = images.order(options.memory.gradient_accumulation_steps, found.seed)
    duration = decide_duration(options.run, parsed.given, order.steps_per_epoch, order.batches_per_epoch)
    schedule = choose_schedule(options.optimizer, duration.steps, found.optimizer)
    collect(schedule, mistakes, notes)
    rates = decide_learning_rates(options, base_model.family, adapter, found.optimizer, mistakes, notes)
    outputs = decide_outputs(
        options.saving, "adapter" if adapter else base_model.header.kind, duration.epochs, mistakes
    )
    costs = decide_costs(options, base_model, rates, adapter, found.precision, found.optimizer, outputs, duration)
    check_outputs(options, base_model, outputs, costs, mistakes)
    identity = identity_of(options, base_model, images, found.precision, found.seed)
    check_continuation(found.resume, identity, duration.steps, mistakes, dataset_file(options.dataset))
    start = decide_start(options.adapter, found.resume, duration, mistakes, notes)
    mistakes.raise_if_any()
    return Plan(
        **vars(found),
        options=options,
        order=order,
        duration=duration,
        learning_rates=rates,
        schedule=schedule,
        outputs=outputs,
        costs=costs,
        workers=decide_workers(options, found.machine, order, notes),
        identity=identity,
        start=start,
        notes=tuple(notes),
        origins=parsed.origins,
    )


def find_grounds(options: TrainOptions, mistakes: Mistakes, notes: list[str]) -> Grounds:
    """Look at machine, checkpoint, images and what else the options name. Raises UserError, with all mistakes so far,
    where there is no model or no image to go on with."""
    machine = describe_machine()
    precision = resolve(options.memory, machine, strict=options.run.strict)
    optimizer = choose_optimizer(options.optimizer, precision.trained == "fp16")
    for decision in (precision, optimizer):
        collect(decision, mistakes, notes)
    base_model = decide_base_model(options, mistakes, notes)
    resume = decide_resume(options.saving.resume, mistakes)
    seed = decide_seed(options, resume)
    images = decide_images(options, base_model.tokenizer if base_model else None, mistakes, seed)
    adapter = decide_adapter(options.adapter, base_model.family if base_model else None, mistakes)
    check_places(options, mistakes)
    notes.extend(check_prompts(options, mistakes, refines=base_model is not None and base_model.family.refines))
    trackers = decide_trackers(options.run, mistakes)
    if base_model is None or images is None:
        mistakes.raise_if_any()
        raise AssertionError("a source or images are missing and no mistake says why")
    precision = with_sound_vae(precision, base_model.family.latent, machine, notes)
    refined = images.table.placements if base_model.family.refines else ()
    preview = plan_preview(options, base_model.family.preview[base_model.prediction], refined)
    validation = decide_validation(options.validation, images)
    return Grounds(
        machine, precision, optimizer, base_model, resume, seed, images, adapter, preview, validation, trackers
    )


def with_sound_vae(precision: Precision, latent: LatentSpace, machine: Machine, notes: list[str]) -> Precision:
    """The precision with a VAE that computes in numbers which its own fit in (LatentSpace.fp16)."""
    if latent.fp16 or precision.vae != "fp16":
        return precision
    chosen: FloatName = "bf16" if (machine.compute_capability or (0, 0)) >= (8, 0) else "fp32"
    notes.append(f"the VAE computes in {chosen}: in fp16 the one of this kind of model gives NaN")
    return replace(precision, vae=chosen)


class Judged(Protocol):
    """A decision that comes with mistakes and notes."""

    @property
    def mistakes(self) -> Sequence[Mistake]: ...

    @property
    def notes(self) -> Sequence[str]: ...


def collect(decision: Judged, mistakes: Mistakes, notes: list[str]) -> None:
    """Take over what a decision says."""
    mistakes.extend(decision.mistakes)
    notes.extend(decision.notes)


def check_objective(
    options: ObjectiveOptions, prediction: Prediction, mistakes: Mistakes, family: Family
) -> tuple[str, ...]:
    """Collect what is wrong with the loss that is asked for, and return what to tell of it."""
    has_snr = "snr" in family.capabilities
    wrong, notes = check_options.check(options, prediction, family.process.timesteps, has_snr=has_snr)
    mistakes.extend(wrong)
    return notes


def decide_seed(options: TrainOptions, resume: SavedState | None) -> int:
    """--seed; without it a resumed run keeps its own, and a new run draws one, which the plan tells."""
    if options.run.seed is not None:
        return options.run.seed
    if resume is not None and resume.identity.get("seed", "").isdigit():
        return int(resume.identity["seed"])
    return secrets.randbelow(2**31)


def decide_workers(options: TrainOptions, machine: Machine, order: EpochOrder, notes: list[str]) -> int:
    """Data workers: none for cached latents, as starting a process takes longer than reading thousands of them; never
    more than batches or processors."""
    asked = options.dataset.max_data_loader_n_workers
    if options.cache.cache_latents:
        return 0
    useful = min(asked, machine.cpu_count, order.batches_per_epoch)
    if useful < asked and asked != 8:
        notes.append(f"--max_data_loader_n_workers {asked}: {useful} are of use here")
    return useful


def decide_costs(  # noqa: PLR0913 - being redrawn
    options: TrainOptions,
    base_model: BaseModel,
    rates: LearningRates,
    adapter: AdapterPlan | None,
    precision: Precision,
    optimizer: OptimizerChoice,
    outputs: Outputs,
    duration: Duration,
) -> Costs:
    """Memory and disk of the run."""
    if adapter is not None:
        return frozen_costs(base_model.sizes, BYTES[precision.base], outputs.directory)
    models, states = most_on_disk(outputs, duration.steps, duration.epochs, duration.steps_per_epoch)
    return count_costs(
        base_model.sizes,
        trained=rates.modules,
        weight_bytes=BYTES[precision.trained],
        copy_bytes=0 if precision.frozen == "fp32" else BYTES[precision.frozen],
        save_bytes=None if options.saving.save_precision is None else BYTES[options.saving.save_precision],
        state_bytes_per_parameter=optimizer.state_bytes_per_parameter(BYTES[precision.trained]),
        models_on_disk=models,
        states_on_disk=states,
        folder=outputs.directory,
    )


def check_outputs(
    options: TrainOptions, base_model: BaseModel, outputs: Outputs, costs: Costs, mistakes: Mistakes
) -> None:
    """The files to come have a place, room, and what they are to say about themselves."""
    check_final_model(outputs, mistakes)
    check_metadata(options, base_model, mistakes)
    check_disk(costs, mistakes)


def check_disk(costs: Costs, mistakes: Mistakes) -> None:
    """The disk must hold all files that lie there at once."""
    if costs.free is not None and costs.free < costs.disk:
        mistakes.add(
            f"the files to come need {readable_bytes(costs.disk)}, --output_dir has {readable_bytes(costs.free)} free",
            "save less often, keep fewer (--save_last_n_epochs), use --save_precision fp16, or give another folder",
        )


def refuse_several_processes(mistakes: Mistakes) -> None:
    """One plain process for now: several would each train on everything, which is not what their user means."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count.isdigit() and int(count) > 1:
        mistakes.add(
            f"started as {count} processes: this version trains with one",
            "start it with accelerate launch --num_processes 1",
        )
    for variable, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")):
        if os.environ.get(variable, "").lower() == "true":
            mistakes.add(
                f"accelerate is set to {name}: not in this version", "run accelerate config, and answer no there"
            )
