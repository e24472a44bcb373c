"""The plan of a run: every decision that needs no weights, made once and frozen.

Only `decide` makes a Plan. It inspects the options, the machine, the header of the checkpoint and the images, and
collects all mistakes, so that the user sees them at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from library.messages import readable_bytes
from library.objective import check_options
from library.objective.rollout import RolloutSettings
from library.options.mistakes import Mistakes
from library.options.parse import Parsed
from library.options.train_options import TrainOptions
from library.runtime.device import Machine, describe_machine
from library.runtime.launch import ALONE, Launch
from library.runtime.precision import BYTES
from library.training.adapter.plan import AdapterPlan, decide_adapter
from library.training.averaging.plan import AveragesPlan, decide_averages
from library.training.best.plan import BestPlan, check_best, count_measurements, read_best
from library.training.blocks.plan import BlocksPlan, decide_blocks
from library.training.evaluation.plan import EvaluationPlan, decide_encoders, decide_evaluation
from library.training.hub.plan import UploadPlan, decide_uploads
from library.training.hub.resume import local_state
from library.training.optim.learning_rates import Optimization, decide_learning_rates
from library.training.optim.optimizer_device import check_device
from library.training.optim.optimizers import OptimizerChoice, choose_optimizer
from library.training.optim.schedules import choose_schedule
from library.training.plan.base_model import BaseModel
from library.training.plan.costs import BytesPerParameter, Costs, PeakFiles, count_adapter_costs, count_costs
from library.training.plan.duration import Duration
from library.training.plan.facts import RunFacts, collect, decide_facts, decide_seed
from library.training.plan.identity import dataset_file, description_of, identity_of
from library.training.plan.memory.fit import choose_for_card
from library.training.plan.memory.predict import RunShape, predict_memory
from library.training.plan.memory.prediction import Prediction
from library.training.plan.memory.weights import WeightsOnDevice
from library.training.plan.never_reached import notes_on_never_reached
from library.training.plan.processes import check_static_graph
from library.training.plan.reading import decide_read_interval
from library.training.plan.resume import AUTO, check_continuation, decide_resume
from library.training.plan.start import decide_start
from library.training.plan.writable_paths import check_final_model, check_writable_paths, write_problem
from library.training.preservation.base_plan import BasePlan, decide_base
from library.training.preview.plan import PreviewPlan, check_prompts, drawn_size, plan_preview
from library.training.preview.refiner_plan import decide_refiner
from library.training.preview.so_far_plan import decide_so_far
from library.training.saving.loss_curve import decide_curve
from library.training.saving.model_file import check_metadata
from library.training.saving.outputs import Outputs, count_peak_files, decide_outputs
from library.training.saving.state import Description, Identity, Progress, SavedState
from library.training.sharding.plan import check_sharded
from library.training.sharding.zero_plan import check_zero
from library.training.trackers import Trackers, decide_trackers
from library.training.update.plan import decide_update


@dataclass(frozen=True)
class Plan:
    """Every decision of a training run. session.py passes each section to the code that needs it."""

    facts: RunFacts
    adapter: AdapterPlan | None
    rollout: RolloutSettings | None
    optimization: Optimization
    averages: AveragesPlan
    best: BestPlan
    outputs: Outputs
    curve: Path | None
    preview: PreviewPlan | None
    evaluation: EvaluationPlan | None
    trackers: Trackers
    uploads: UploadPlan | None
    base: BasePlan | None
    blocks: BlocksPlan
    costs: Costs
    workers: int
    description: Description
    resume: SavedState | None
    start: Progress
    notes: tuple[str, ...]
    origins: Mapping[str, str]

    @property
    def identity(self) -> Identity:
        """What the result depends on."""
        return self.description.identity

    @property
    def saved_identity(self) -> Identity | None:
        """That in the state that is resumed; None: none is."""
        return None if self.resume is None else self.resume.identity

    @cached_property
    def memory(self) -> Prediction | None:
        """The predicted memory of the run; None if it cannot be told."""
        drawn = drawn_size(self.preview)
        return predict_memory(
            RunShape(
                self.facts, self.optimization, self.adapter, self.averages, self.base, self.blocks, self.costs, drawn
            )
        )

    @property
    def draws(self) -> bool:
        """Whether images are drawn while it trains."""
        return self.preview is not None or self.evaluation is not None


def decide(parsed: Parsed, launch: Launch = ALONE, machine: Machine | None = None) -> Plan:
    """Make the plan of a run from its parsed options, with those that --vram chooses. `machine`: plan for it instead of
    this one. Raises UserError with all mistakes of the run."""

    def plan_of(options: Parsed) -> Plan:
        return _decide(options, launch, machine)

    chosen = choose_for_card(parsed, machine or describe_machine(), lambda options: plan_of(options).memory)
    return plan_of(chosen)


def _decide(parsed: Parsed, launch: Launch, machine: Machine | None) -> Plan:
    parsed.check_complete()
    options, mistakes, notes = parsed.options, Mistakes(parsed.mistakes), list(parsed.notes)

    # Independent decisions first, so that one run reports as many mistakes as possible.
    resume = decide_state(options, mistakes, notes)
    facts = decide_facts(parsed, decide_seed(options, resume, launch), mistakes, notes, launch, machine)
    base = None if facts is None else facts.base_model
    optimizer = decide_optimizer(options, facts, mistakes, notes)
    adapter = decide_adapter(options.adapter, base, resume, mistakes, notes)
    check_writable_paths(options, mistakes)
    notes.extend(check_prompts(options, mistakes, refines=base is not None and base.family.refines))
    encoders = decide_encoders(options.evaluation, mistakes)
    best = read_best(options.validation, parsed.origins, mistakes)
    trackers = decide_trackers(options.run, parsed.origins["log_with"], mistakes, notes)
    uploads = decide_uploads(options.hub, mistakes)
    facts, duration = _complete(facts, mistakes)

    # Decisions that follow from them.
    rollout = decide_loss(options, facts.base_model, mistakes, notes)
    evaluation = decide_evaluation(options, encoders, facts, mistakes)
    optimization = decide_optimization(facts, optimizer, adapter, mistakes, notes)
    averages = decide_averages(options.averaging, duration.steps, optimizer, adapter, mistakes)
    measurements = count_measurements(facts.validation, evaluation, duration, averages.shown)
    check_best(best, parsed.origins, measurements, resume, mistakes, notes)
    outputs = decide_files(facts, adapter, averages, mistakes, keeps_best=best.keep is not None)
    costs, base_copy = decide_costs(facts, optimization, adapter, outputs, averages, mistakes)
    check_outputs(options, facts.base_model, outputs, costs, mistakes)
    description = decide_description(facts, base_copy, adapter, resume, outputs.name, mistakes, notes)
    start = decide_start(options.adapter, resume, duration, mistakes, notes)
    preview = decide_preview(facts, mistakes)
    blocks = decide_blocks(facts, adapter, mistakes, notes)
    check_shared_out(facts, optimization, adapter, averages, resume, (preview, evaluation, rollout), mistakes)
    mistakes.raise_if_any()
    notes.extend(notes_on_never_reached(facts, optimization, preview, evaluation, start))
    return Plan(
        facts=facts,
        adapter=adapter,
        rollout=rollout,
        optimization=optimization,
        averages=averages,
        best=best,
        outputs=outputs,
        curve=decide_curve(outputs, facts.images.scan.subsets),
        preview=preview,
        evaluation=evaluation,
        trackers=trackers,
        uploads=uploads,
        base=base_copy,
        blocks=blocks,
        costs=costs,
        workers=decide_workers(facts, notes),
        description=description,
        resume=resume,
        start=start,
        notes=tuple(notes),
        origins=parsed.origins,
    )


def _complete(facts: RunFacts | None, mistakes: Mistakes) -> tuple[RunFacts, Duration]:
    """The facts and their duration. Raises UserError where the base model or the images are missing."""
    if facts is None:
        mistakes.raise_if_any()
        raise AssertionError("the base model or the images are missing and no mistake says why")
    return facts, facts.duration


def decide_description(
    facts: RunFacts,
    base: BasePlan | None,
    adapter: AdapterPlan | None,
    resume: SavedState | None,
    output_name: str | None,
    mistakes: Mistakes,
    notes: list[str],
) -> Description:
    """What the states of the run say of it, compared with the state that it resumes from."""
    description = description_of(facts, identity_of(facts, base), output_name)
    file, steps = dataset_file(facts.options.dataset), facts.duration.steps
    is_adapter, world = adapter is not None, facts.launch.world
    is_auto = facts.options.saving.resume == AUTO
    check_continuation(
        resume, description, steps, mistakes, notes, file, is_adapter=is_adapter, is_auto=is_auto, world=world
    )
    return description


def decide_state(options: TrainOptions, mistakes: Mistakes, notes: list[str]) -> SavedState | None:
    """The training state that is resumed, brought from the hub if it is there."""
    is_adapter = options.adapter.network_module is not None
    return decide_resume(local_state(options, mistakes), options.saving, mistakes, notes, is_adapter=is_adapter)


def decide_optimizer(
    options: TrainOptions, facts: RunFacts | None, mistakes: Mistakes, notes: list[str]
) -> OptimizerChoice:
    """The optimizer, if the machine and the package have it."""
    optimizer = choose_optimizer(options.optimizer, full_fp16=facts is not None and facts.precision.trained == "fp16")
    collect(optimizer, mistakes, notes)
    return optimizer


def decide_optimization(
    facts: RunFacts, optimizer: OptimizerChoice, adapter: AdapterPlan | None, mistakes: Mistakes, notes: list[str]
) -> Optimization:
    """The optimizer with its schedule and learning rates, when losses are read, and whether processes can share its
    gradients as chosen."""
    options = facts.options
    check_static_graph(facts, adapter, mistakes)
    check_device(optimizer, facts.machine, mistakes, notes)
    schedule = choose_schedule(options.optimizer, facts.duration.steps, optimizer)
    collect(schedule, mistakes, notes)
    rates = decide_learning_rates(options, facts.base_model.family, adapter, optimizer, mistakes, notes)
    update = decide_update(facts, optimizer, mistakes, notes)
    read_interval = decide_read_interval(facts, optimizer, update, adapter, notes)
    return Optimization(rates, optimizer, schedule, update, read_interval)


def check_shared_out(
    facts: RunFacts,
    optimization: Optimization,
    adapter: AdapterPlan | None,
    averages: AveragesPlan,
    resume: SavedState | None,
    aside: Sequence[object],
    mistakes: Mistakes,
) -> None:
    """Refuse what has no meaning where processes share out what is trained. `aside`: previews, evaluation, rollouts."""
    alone = (*aside, averages.posthoc)
    check_sharded(facts, optimization.optimizer, adapter, resume, alone, mistakes)
    check_zero(facts, optimization, adapter, averages.ema, alone, mistakes)


def decide_files(
    facts: RunFacts, adapter: AdapterPlan | None, averages: AveragesPlan, mistakes: Mistakes, *, keeps_best: bool
) -> Outputs:
    """All files of the run."""
    source = "adapter" if adapter else facts.base_model.header.kind
    return decide_outputs(
        facts.options.saving, source, facts.duration.epochs, mistakes, averages, keeps_best=keeps_best
    )


def decide_preview(facts: RunFacts, mistakes: Mistakes) -> PreviewPlan | None:
    """The images to draw during training, in the base model's native size unless a prompt sets another, the refiner
    that finishes them, and the pictures meanwhile."""
    base_model = facts.base_model
    refined = facts.images.table.placements if base_model.family.refines else ()
    preview = plan_preview(facts.options, base_model.family.preview[base_model.prediction], refined)
    if preview is None:
        return None
    refiner = decide_refiner(facts.options, base_model, facts.precision.frozen, mistakes)
    return replace(preview, refiner=refiner, so_far=decide_so_far(facts.options, base_model.family, mistakes))


def decide_loss(
    options: TrainOptions, base_model: BaseModel, mistakes: Mistakes, notes: list[str]
) -> RolloutSettings | None:
    """Check the options of the loss, and decide how samples are rolled: None if none is."""
    family, objective = base_model.family, base_model.objective
    timesteps = family.process.timesteps
    rollout = RolloutSettings.from_options(options.rollout, timesteps)
    for wrong, remarks in (
        check_options.check(objective, base_model.prediction, timesteps, has_snr="snr" in family.capabilities),
        check_options.check_rollout(rollout, objective, timesteps),
    ):
        mistakes.extend(wrong)
        notes.extend(remarks)
    return rollout


def decide_workers(facts: RunFacts, notes: list[str]) -> int:
    """The number of data workers, at most one per batch and per CPU core; 0 for cached latents, as starting a process
    takes longer than reading thousands of them."""
    requested = facts.options.dataset.max_data_loader_n_workers
    if facts.options.cache.cache_latents:
        return 0
    cores, batches = facts.machine.cpu_count // facts.launch.local_world, facts.order.batches_per_epoch
    useful = min(requested, max(1, cores), -(-batches // facts.launch.world))
    if useful < requested and requested != 8:
        notes.append(f"--max_data_loader_n_workers {requested}: {useful} used, at most one per CPU core and per batch")
    return useful


def decide_costs(
    facts: RunFacts,
    optimization: Optimization,
    adapter: AdapterPlan | None,
    outputs: Outputs,
    averages: AveragesPlan,
    mistakes: Mistakes,
) -> tuple[Costs, BasePlan | None]:
    """Memory and disk of the run, and where the frozen base model of a training of all weights is kept."""
    costs = _own_costs(facts, optimization, adapter, outputs, averages)
    base = None if adapter else decide_base(facts, frozenset(optimization.learning_rates.modules), costs, mistakes)
    return costs if base is None else replace(costs, base=base.on_accelerator), base


def _own_costs(
    facts: RunFacts, optimization: Optimization, adapter: AdapterPlan | None, outputs: Outputs, averages: AveragesPlan
) -> Costs:
    """Memory and disk without a copy of the base model."""
    precision, sizes, duration = facts.precision, facts.base_model.sizes, facts.duration
    update = optimization.update
    models, states = count_peak_files(outputs, duration.steps, duration.epochs, duration.steps_per_epoch)
    peak_files = PeakFiles(models, states, 0 if averages.posthoc is None else averages.posthoc.files)
    trained = BYTES[precision.trained]
    save_precision = facts.options.saving.save_precision
    shapes = WeightsOnDevice(facts, optimization, adapter).trained_shapes
    per_parameter = BytesPerParameter(
        trained=trained,
        frozen_copy=0 if precision.frozen == "fp32" else BYTES[precision.frozen],
        saved=None if save_precision is None else BYTES[save_precision],
        optimizer_state=optimization.optimizer.state_bytes_per_parameter(update.state_format(trained), shapes)
        + update.extra_state,
        average=averages.of_weights * BYTES["fp32"],
    )
    if adapter is not None:
        per_parameter = replace(per_parameter, frozen_copy=BYTES[precision.base])
        values = adapter.trained_parameters or 0, adapter.saved_values or 0
        saved = 0 if facts.quantisation is None else facts.quantisation.bytes_saved(per_parameter.frozen_copy)
        costs = count_adapter_costs(sizes, *values, per_parameter, peak_files, outputs.directory)
        costs = replace(costs, weights=costs.weights - saved)
        costs = costs.with_average(adapter.delta_values * BYTES["fp32"] if averages.of_delta else 0)
        return update.costs(costs, 0 if adapter.trained_parameters is None else adapter.trained_parameters, trained)
    modules = optimization.learning_rates.modules
    count = optimization.learning_rates.trained_values(sizes, facts.base_model.family)
    costs = count_costs(sizes, modules, count, per_parameter, peak_files, outputs.directory)
    costs = update.costs(costs, sizes.largest(modules), trained)
    if facts.zero is not None:
        return facts.zero.costs(costs)
    if facts.sharding is None:
        return costs
    frozen = (sizes.total(modules) - count) * trained  # in its states too
    return replace(costs, state_folder=costs.state_folder + frozen).sharded(facts.sharding.world)


def check_outputs(
    options: TrainOptions, base_model: BaseModel, outputs: Outputs, costs: Costs, mistakes: Mistakes
) -> None:
    """Check that the files of the run can be written, fit on the disk and can carry their metadata."""
    check_final_model(outputs, mistakes)
    check_metadata(options, base_model, mistakes)
    if write_problem(outputs.directory) is None:  # else the mistake has been added
        check_disk(costs, mistakes)


def check_disk(costs: Costs, mistakes: Mistakes) -> None:
    """Check that there is room for all files that are on the disk at once."""
    if costs.free is not None and costs.free < costs.disk:
        mistakes.add(
            f"the output files need {readable_bytes(costs.disk)}, --output_dir has {readable_bytes(costs.free)} free",
            "save less often, keep fewer files (--save_last_n_epochs), use --save_precision fp16 or another folder",
        )
