"""The plan of a run: every decision that needs no weight, made once and frozen.

`decide` is the only way to a Plan. It looks at the options, the machine, the header of the checkpoint and the
pictures, and collects the mistakes of all of them, so that a user sees every one at once.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from library.data.order import EpochOrder
from library.options.mistakes import Mistakes
from library.options.parse import Parsed
from library.options.recipes import TrainOptions
from library.runtime.device import Machine, describe_machine
from library.runtime.precision import BYTES, Precision, resolve
from library.training.model_file import check_metadata
from library.training.optimizers import OptimizerChoice, choose_optimizer
from library.training.outputs import Outputs, decide_outputs, most_on_disk
from library.training.plan.adapter import AdapterPlan, decide_adapter
from library.training.plan.costs import Costs, count_costs, frozen_costs, readable_bytes
from library.training.plan.duration import Duration, decide_duration
from library.training.plan.identity import dataset_file, identity_of
from library.training.plan.pictures import Pictures, TokenCount, decide_pictures
from library.training.plan.places import check_final_model, check_places
from library.training.plan.resume import check_continuation, decide_resume
from library.training.plan.source import Source, decide_source
from library.training.plan.start import decide_start
from library.training.preview_plan import PreviewPlan, check_prompts, plan_preview
from library.training.schedules import ScheduleChoice, choose_schedule
from library.training.state import Identity, Progress, SavedState
from library.training.trackers import Trackers, decide_trackers


@dataclass(frozen=True)
class Rates:
    """Learning rates; None: not trained. `text_encoder_stop`: the text encoder's last optimiser step (None: the
    end)."""

    unet: float | None
    text_encoder: float | None
    text_encoder_stop: int | None


@dataclass(frozen=True)
class Plan:
    """Everything that was decided. The session reads it; nothing writes to it."""

    options: TrainOptions
    machine: Machine
    precision: Precision
    source: Source
    pictures: Pictures
    order: EpochOrder
    duration: Duration
    rates: Rates
    adapter: AdapterPlan | None
    optimizer: OptimizerChoice
    schedule: ScheduleChoice
    outputs: Outputs
    preview: PreviewPlan | None
    trackers: Trackers
    costs: Costs
    seed: int
    workers: int
    identity: Identity
    resume: SavedState | None
    start: Progress
    notes: tuple[str, ...]
    origins: Mapping[str, str]


def decide(parsed: Parsed) -> Plan:
    """Make the plan of a run from its parsed options. Raises UserError with all mistakes of the run."""
    options, mistakes, notes = parsed.options, Mistakes(), list(parsed.notes)
    mistakes.extend(parsed.mistakes)
    refuse_several_processes(mistakes)

    # what each part of the options comes to by itself
    machine = describe_machine()
    precision = resolve(options.memory, machine, options.run.strict)
    optimizer = choose_optimizer(options.optimizer, precision.trained == "fp16")
    for decision in (precision, optimizer):
        mistakes.extend(decision.mistakes)
        notes.extend(decision.notes)
    source = decide_source(options, mistakes, notes)
    resume = decide_resume(options.saving.resume, mistakes)
    seed = decide_seed(options, resume)
    pictures = decide_pictures(options, token_count(options, source), mistakes, seed)
    adapter = decide_adapter(options.adapter, source.family if source else None, mistakes)
    check_places(options, mistakes)
    notes.extend(check_prompts(options, mistakes))
    trackers = decide_trackers(options.run, mistakes)
    if source is None or pictures is None:
        mistakes.raise_if_any()
        raise AssertionError("a source or pictures are missing and no mistake says why")

    # what follows from several of them
    order = pictures.order(options.memory.gradient_accumulation_steps, seed)
    duration = decide_duration(options.run, parsed.given, order.steps_per_epoch, order.batches_per_epoch)
    schedule = choose_schedule(options.optimizer, duration.steps, optimizer)
    mistakes.extend(schedule.mistakes)
    notes.extend(schedule.notes)
    rates = decide_rates(options) if adapter is None else adapter_rates(options, adapter)
    refuse_no_training(rates, optimizer, mistakes)
    source_kind = source.header.kind if adapter is None else "adapter"
    outputs = decide_outputs(options.saving, source_kind, duration.epochs, mistakes)
    costs = decide_costs(options, source, rates, adapter, precision, optimizer, outputs, duration)
    check_outputs(options, source, outputs, costs, mistakes)
    identity = identity_of(options, pictures, precision, seed)
    if resume is not None:
        check_continuation(resume, identity, duration.steps, mistakes, dataset_file(options.dataset))
    start = decide_start(options.adapter, resume, duration, mistakes, notes)
    mistakes.raise_if_any()
    return Plan(
        options=options,
        machine=machine,
        precision=precision,
        source=source,
        pictures=pictures,
        order=order,
        duration=duration,
        rates=rates,
        adapter=adapter,
        optimizer=optimizer,
        schedule=schedule,
        outputs=outputs,
        preview=plan_preview(options, source.family.preview[source.prediction]),
        trackers=trackers,
        costs=costs,
        seed=seed,
        workers=decide_workers(options, machine, order, notes),
        identity=identity,
        resume=resume,
        start=start,
        notes=tuple(notes),
        origins=parsed.origins,
    )


def token_count(options: TrainOptions, source: Source | None) -> TokenCount | None:
    """Tokens of a caption, without the marks of weights where these are read."""
    if source is None:
        return None
    weighted = options.caption.weighted_captions
    tokenizer = source.tokenizer
    return TokenCount(
        partial(tokenizer.count, weighted=weighted),
        partial(tokenizer.counts, weighted=weighted),
        f"{tokenizer.name} {weighted}",
    )


def decide_rates(all_options: TrainOptions) -> Rates:
    """The text encoder learns at --learning_rate_te, else --learning_rate; a rate or a stop of 0, or -1, means
    never."""
    options = all_options.optimizer
    stop = options.stop_text_encoder_training
    rate = options.learning_rate if options.learning_rate_te is None else options.learning_rate_te
    if (stop is not None and stop <= 0) or rate == 0:
        return Rates(options.learning_rate, None, None)
    return Rates(options.learning_rate, rate, stop)


def adapter_rates(options: TrainOptions, adapter: AdapterPlan) -> Rates:
    """An adapter's parts learn at --unet_lr and --text_encoder_lr, else at --learning_rate."""
    usual, chosen = options.optimizer.learning_rate, options.adapter
    unet = usual if chosen.unet_lr is None else chosen.unet_lr
    text = chosen.text_encoder_lr[0] if chosen.text_encoder_lr else usual
    return Rates(unet if "unet" in adapter.reaches else None, text if "text_encoder" in adapter.reaches else None, None)


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


def decide_costs(
    options: TrainOptions,
    source: Source,
    rates: Rates,
    adapter: AdapterPlan | None,
    precision: Precision,
    optimizer: OptimizerChoice,
    outputs: Outputs,
    duration: Duration,
) -> Costs:
    """Memory and disk of the run."""
    if adapter is not None:
        return frozen_costs(source.sizes, BYTES[precision.base], outputs.directory)
    models, states = most_on_disk(outputs, duration.steps, duration.epochs, duration.steps_per_epoch)
    return count_costs(
        source.sizes,
        trains_text_encoder=rates.text_encoder is not None,
        weight_bytes=BYTES[precision.trained],
        copy_bytes=0 if precision.frozen == "fp32" else BYTES[precision.frozen],
        save_bytes=None if options.saving.save_precision is None else BYTES[options.saving.save_precision],
        state_bytes_per_parameter=optimizer.state_bytes_per_parameter(BYTES[precision.trained]),
        models_on_disk=models,
        states_on_disk=states,
        folder=outputs.directory,
    )


def refuse_no_training(rates: Rates, optimizer: OptimizerChoice, mistakes: Mistakes) -> None:
    """Rates of 0 leave every weight as it is, unless the optimiser finds its own."""
    if not rates.unet and rates.text_encoder is None and not optimizer.relative_step:
        mistakes.add("--learning_rate 0: nothing would be trained", "give a learning rate above 0")


def check_outputs(options: TrainOptions, source: Source, outputs: Outputs, costs: Costs, mistakes: Mistakes) -> None:
    """The files to come have a place, room, and what they are to say about themselves."""
    check_final_model(outputs, mistakes)
    check_metadata(options, source, mistakes)
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
