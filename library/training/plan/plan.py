"""The plan of a run: every decision that needs no weight, made once and frozen.

`decide` is the only way to a Plan. It looks at the options, the machine, the header of the checkpoint and the
images, and collects the mistakes of all of them, so that a user sees every one at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from library.objective import check_options
from library.options.mistakes import Mistakes
from library.options.parse import Parsed
from library.options.train_options import TrainOptions
from library.runtime.precision import BYTES
from library.training.adapter.plan import AdapterPlan, decide_adapter
from library.training.optim.learning_rates import Optimization, decide_learning_rates
from library.training.optim.optimizers import choose_optimizer
from library.training.optim.schedules import choose_schedule
from library.training.plan.base_model import BaseModel
from library.training.plan.costs import Costs, count_costs, frozen_costs, readable_bytes
from library.training.plan.facts import RunFacts, collect, decide_facts, decide_seed
from library.training.plan.identity import dataset_file, identity_of
from library.training.plan.resume import check_continuation, decide_resume
from library.training.plan.start import decide_start
from library.training.plan.writable_paths import check_final_model, check_places
from library.training.preview.plan import PreviewPlan, check_prompts, plan_preview
from library.training.saving.model_file import check_metadata
from library.training.saving.outputs import Outputs, decide_outputs, most_on_disk
from library.training.saving.state import Identity, Progress, SavedState
from library.training.trackers import Trackers, decide_trackers


@dataclass(frozen=True)
class Plan:
    """Every decision of a training. session.py hands each room the section that it needs; nothing writes to it."""

    facts: RunFacts
    adapter: AdapterPlan | None
    optimization: Optimization
    outputs: Outputs
    preview: PreviewPlan | None
    trackers: Trackers
    costs: Costs
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

    # Decisions that do not depend on each other: as many mistakes as possible are shown at once.
    resume = decide_resume(options.saving.resume, mistakes)
    facts = decide_facts(parsed, decide_seed(options, resume), mistakes, notes)
    family = None if facts is None else facts.base_model.family
    optimizer = choose_optimizer(options.optimizer, facts is not None and facts.precision.trained == "fp16")
    collect(optimizer, mistakes, notes)
    adapter = decide_adapter(options.adapter, family, mistakes)
    check_places(options, mistakes)
    notes.extend(check_prompts(options, mistakes, refines=family is not None and family.refines))
    trackers = decide_trackers(options.run, mistakes)
    if facts is None:
        mistakes.raise_if_any()
        raise AssertionError("the base model or the images are missing and no mistake says why")

    # Decisions that follow from them.
    base_model, duration = facts.base_model, facts.duration
    notes.extend(check_objective(base_model, mistakes))
    schedule = choose_schedule(options.optimizer, duration.steps, optimizer)
    collect(schedule, mistakes, notes)
    rates = decide_learning_rates(options, base_model.family, adapter, optimizer, mistakes, notes)
    optimization = Optimization(rates, optimizer, schedule)
    outputs = decide_outputs(
        options.saving, "adapter" if adapter else base_model.header.kind, duration.epochs, mistakes
    )
    costs = decide_costs(facts, optimization, adapter, outputs)
    check_outputs(options, base_model, outputs, costs, mistakes)
    identity = identity_of(facts)
    check_continuation(resume, identity, duration.steps, mistakes, dataset_file(options.dataset))
    start = decide_start(options.adapter, resume, duration, mistakes, notes)
    mistakes.raise_if_any()
    return Plan(
        facts=facts,
        adapter=adapter,
        optimization=optimization,
        outputs=outputs,
        preview=decide_preview(facts),
        trackers=trackers,
        costs=costs,
        workers=decide_workers(facts, notes),
        identity=identity,
        resume=resume,
        start=start,
        notes=tuple(notes),
        origins=parsed.origins,
    )


def decide_preview(facts: RunFacts) -> PreviewPlan | None:
    """The images to draw during training, in the base model's own size where prompts give none."""
    base_model = facts.base_model
    refined = facts.images.table.placements if base_model.family.refines else ()
    return plan_preview(facts.options, base_model.family.preview[base_model.prediction], refined)


def check_objective(base_model: BaseModel, mistakes: Mistakes) -> tuple[str, ...]:
    """Collect what is wrong with the loss that is asked for, and return the notes about it."""
    family = base_model.family
    wrong, notes = check_options.check(
        base_model.objective, base_model.prediction, family.process.timesteps, has_snr="snr" in family.capabilities
    )
    mistakes.extend(wrong)
    return notes


def decide_workers(facts: RunFacts, notes: list[str]) -> int:
    """Data workers: none for cached latents, as starting a process takes longer than reading thousands of them; never
    more than batches or processors."""
    asked = facts.options.dataset.max_data_loader_n_workers
    if facts.options.cache.cache_latents:
        return 0
    useful = min(asked, facts.machine.cpu_count, facts.order.batches_per_epoch)
    if useful < asked and asked != 8:
        notes.append(f"--max_data_loader_n_workers {asked}: {useful} are of use here")
    return useful


def decide_costs(facts: RunFacts, optimization: Optimization, adapter: AdapterPlan | None, outputs: Outputs) -> Costs:
    """Memory and disk of the run."""
    precision, sizes, duration = facts.precision, facts.base_model.sizes, facts.duration
    if adapter is not None:
        return frozen_costs(sizes, BYTES[precision.base], outputs.directory)
    models, states = most_on_disk(outputs, duration.steps, duration.epochs, duration.steps_per_epoch)
    save_precision = facts.options.saving.save_precision
    return count_costs(
        sizes,
        trained=optimization.learning_rates.modules,
        weight_bytes=BYTES[precision.trained],
        copy_bytes=0 if precision.frozen == "fp32" else BYTES[precision.frozen],
        save_bytes=None if save_precision is None else BYTES[save_precision],
        state_bytes_per_parameter=optimization.optimizer.state_bytes_per_parameter(BYTES[precision.trained]),
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
