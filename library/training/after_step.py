"""What happens around the steps of a run: saves, measurements, previews, and the report at its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.training.best.best import Best
from library.training.ending import describe_end, next_step
from library.training.evaluation.evaluation import build_evaluation
from library.training.memory_watch import watch_memory
from library.training.plan.start import began as time_of_beginning
from library.training.preview.drawing import build_drawer
from library.training.preview.preview import build_preview
from library.training.preview.refiner import build_refiner
from library.training.preview.so_far import build_so_far
from library.training.saving.saver import Saver
from library.training.saving.snapshots import Snapshots
from library.training.validation.table import begin_table, table_path
from library.training.validation.validation import build_validation

if TYPE_CHECKING:
    from library.data.dataset import TrainingDataset
    from library.families.family import Model
    from library.training.averaging.weights import Weights
    from library.training.evaluation.evaluation import Evaluation
    from library.training.inputs import LatentEncoder
    from library.training.loop import DueCall
    from library.training.memory_watch import MemoryWatch
    from library.training.plan.plan import Plan
    from library.training.preview.drawing import PromptEncoder
    from library.training.preview.preview import Preview
    from library.training.run import Run
    from library.training.saving.loss_curve import LossCurve
    from library.training.saving.state import Progress
    from library.training.saving.state_writer import StateWriter
    from library.training.trainable import Trainable
    from library.training.training_loss import TrainingLoss
    from library.training.validation.validation import Validation


@dataclass(frozen=True)
class InTraining:
    """A model in training: what of it is trained, its averages, and its loss."""

    model: Model
    trainable: Trainable
    weights: Weights
    loss: TrainingLoss


@dataclass(frozen=True)
class Inputs:
    """The images of a run, and what encodes images and prompts."""

    dataset: TrainingDataset
    encoder: LatentEncoder
    prompts: PromptEncoder


@dataclass(frozen=True)
class AfterStep:
    """What may be due after a step."""

    snapshots: Snapshots
    validation: Validation
    evaluation: Evaluation
    best: Best
    saver: Saver
    preview: Preview
    memory: MemoryWatch

    def begin(self, progress: Progress) -> None:
        """What happens before the first step."""
        self.validation.begin(progress)
        self.evaluation.begin(progress)
        self.best.begin(progress)
        self.preview.before_training(progress)

    def is_due(self, progress: Progress) -> bool:
        """Whether anything is due by the number of steps that are finished. All processes get the same answer."""
        step = progress.step
        return (
            self.snapshots.is_due(step)
            or self.validation.is_due(step)
            or self.evaluation.is_due(step)
            or self.saver.is_due(step)
            or self.preview.is_due(step)
        )

    def due(self, on_writer: Callable[[DueCall], DueCall]) -> tuple[DueCall, ...]:
        """The calls after each step, in order: a state that is saved knows what was measured before. All processes
        measure and draw; files are written `on_writer`."""
        return (
            on_writer(self.memory.due),
            on_writer(self.snapshots.due), self.validation.due, self.evaluation.due, on_writer(self.best.due),
            on_writer(self.saver.save_due), self.preview.due,
        )  # fmt: skip


def build_saver(
    plan: Plan,
    run: Run,
    trained: InTraining,
    states: StateWriter,
    curve: LossCurve,
    release: Callable[[Path, Callable[[], None]], None],
) -> Saver:
    """What saves models and, by `states`, training states. `release` removes expired files."""
    return Saver(
        plan.outputs, plan.facts.duration.epochs, trained.trainable.write, states, run.say, trained.weights, curve.draw,
        run.saved, release, run.warn, (plan.costs.model_file, plan.costs.state_folder),
    )  # fmt: skip


def build_after_step(
    plan: Plan, run: Run, trained: InTraining, inputs: Inputs, saver: Saver, progress: Progress
) -> AfterStep:
    """What is due after the steps of a run that begins at `progress`."""
    outputs, weights = plan.outputs, trained.weights
    best = Best(plan.best, saver.save_best, outputs.models(outputs.best_stem())[0], run.say)
    run.listeners.append(best.hear)
    modules = trained.loss.modules(trained.trainable)
    drawer = build_drawer(
        plan.facts.options, plan.preview, trained.model, inputs.prompts, inputs.dataset, inputs.encoder, run
    )
    snapshots = Snapshots(
        weights.posthoc, outputs.snapshot_folder, trained.trainable.write, run.say, progress.step, run.warn
    )
    evaluation = build_evaluation(
        plan.evaluation, drawer, modules, plan.facts.duration, run, weights, trained.trainable
    )
    preview = build_preview(
        plan.preview, drawer, modules, plan.facts.duration, run, weights,
        build_refiner(plan.facts.options, plan.preview, trained.model, inputs.encoder, run),
        build_so_far(plan.preview, trained.model.family, inputs.dataset, inputs.encoder, run),
        time_of_beginning(progress),
    )  # fmt: skip
    return AfterStep(
        snapshots, _build_validation(plan, run, trained, inputs, progress), evaluation, best, saver, preview,
        watch_memory(plan.memory, plan.facts.machine, run),
    )  # fmt: skip


def _build_validation(plan: Plan, run: Run, trained: InTraining, inputs: Inputs, progress: Progress) -> Validation:
    table_file = table_path(plan.outputs) if run.processes.is_writer else None
    table = begin_table(table_file, plan.identity, progress.step, run.warn, plan.saved_identity)
    return build_validation(
        plan.facts.validation, plan.facts.duration, trained.loss, inputs.dataset, inputs.encoder,
        trained.loss.modules(trained.trainable), run, trained.weights, trained.trainable, table,
        resumed=plan.resume is not None,
    )  # fmt: skip


def report(plan: Plan, run: Run, saver: Saver, best: Best, progress: Progress, before: int, began: float) -> None:
    """Say what was best, how long the steps after `before` took since `began`, what was written, and what to do with
    that."""
    for line in best.report(progress, plan.facts.duration.steps):
        run.say(line)
    facts, outputs = plan.facts, plan.outputs
    table = None if facts.validation is None else table_path(outputs)
    preview = None if plan.preview is None else plan.preview.folder
    files = (*saver.written, outputs.snapshot_folder, plan.curve, table, outputs.record, preview)
    for line in describe_end(progress.step - before, time.monotonic() - began, run.device, files):
        run.say(line)
    run.say(next_step(facts, plan.adapter, outputs.models(outputs.final_stem())[0]))
