"""Notes on what the options ask for at a step or epoch that the run never reaches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from library.messages import counted
from library.options.train_options import TrainOptions
from library.training.evaluation.plan import EvaluationPlan
from library.training.optim.learning_rates import Optimization
from library.training.optim.schedules import rule_steps
from library.training.plan.facts import RunFacts
from library.training.preview.plan import PreviewPlan
from library.training.saving.state import Progress


@dataclass(frozen=True)
class Moment:
    """Something due at step or epoch `at` of a run, or with `repeats` at each multiple of it. `asked`: the option and
    its value; `otherwise`: what a run does that never reaches it."""

    asked: str
    at: float | None
    unit: Literal["step", "epoch"]
    otherwise: str
    repeats: bool = True

    def is_reached(self, before: int, last: int) -> bool:
        """Whether a run does this that begins after step (or epoch) `before` and ends with `last`."""
        if not self.at:
            return True  # not asked for
        return self.at <= last and (not self.repeats or last // self.at > before // self.at)


def notes_on_never_reached(
    facts: RunFacts,
    optimization: Optimization,
    preview: PreviewPlan | None,
    evaluation: EvaluationPlan | None,
    start: Progress,
) -> Iterator[str]:
    """A note on each option whose step or epoch the run never reaches."""
    spans = {"step": (start.step, facts.duration.steps), "epoch": (start.epoch - 1, facts.duration.epochs)}
    moments = [
        *_saves(facts.options),
        *_previews(preview),
        *_validations(facts),
        *_evaluations(evaluation),
        *_captions(facts),
        *_rollout(facts.options),
        *_anchors(facts),
        *_optimization(optimization),
    ]
    for moment in moments:
        before, last = spans[moment.unit]
        if not moment.is_reached(before, last):
            begun = f" and begins after {moment.unit} {before}" if before else ""
            run = f"the run has {counted(last, moment.unit)}{begun}"
            yield f"{moment.asked} {moment.at:.10g} is never reached: {run}, so {moment.otherwise}"
    if preview is not None and preview.before_training and start.step:
        yield f"--sample_at_first has no effect: the run begins after step {start.step}"
    if facts.validation is None:
        if facts.options.validation.max_validation_steps:
            yield "--max_validation_steps has no effect: no images are held out, and no --validate_every_n_steps is set"


def _saves(options: TrainOptions) -> Iterator[Moment]:
    kept = "only the final model is saved"
    yield Moment("--save_every_n_epochs", options.saving.save_every_n_epochs, "epoch", kept)
    yield Moment("--save_every_n_steps", options.saving.save_every_n_steps, "step", kept)


def _previews(preview: PreviewPlan | None) -> Iterator[Moment]:
    if preview is not None:
        first = "after the first step" if preview.before_training else "during the run"
        yield Moment("--sample_every_n_epochs", preview.every_epochs, "epoch", f"no images are drawn {first}")
        yield Moment("--sample_every_n_steps", preview.every_steps, "step", f"no images are drawn {first}")


def _validations(facts: RunFacts) -> Iterator[Moment]:
    if facts.validation is not None:
        never = "it never validates"
        yield Moment("--validate_every_n_epochs", facts.validation.every_n_epochs, "epoch", never)
        yield Moment("--validate_every_n_steps", facts.validation.every_n_steps, "step", never)


def _evaluations(evaluation: EvaluationPlan | None) -> Iterator[Moment]:
    if evaluation is not None:
        never = "only the base model is evaluated"
        yield Moment("--evaluate_every_n_epochs", evaluation.every_n_epochs, "epoch", never)
        yield Moment("--evaluate_every_n_steps", evaluation.every_n_steps, "step", never)


def _captions(facts: RunFacts) -> Iterator[Moment]:
    for settings in dict.fromkeys(count.subset.captions for count in facts.images.subsets if count.samples):
        every, warm_up = settings.dropout_every_n_epochs, settings.warmup_step
        yield Moment("caption_dropout_every_n_epochs", every, "epoch", "no captions are dropped by it")
        complete = warm_up if warm_up > 1 else None
        yield Moment("token_warmup_step", complete, "step", "captions never have all their tags", repeats=False)


def _rollout(options: TrainOptions) -> Iterator[Moment]:
    if options.rollout.scheduled_sampling_max_step_offset:
        start = options.rollout.scheduled_sampling_start_step
        asked, first = f"--scheduled_sampling_start_step {start}: step", start + 1 if start else None
        yield Moment(asked, first, "step", "no sample is rolled", repeats=False)


def _anchors(facts: RunFacts) -> Iterator[Moment]:
    for anchor in facts.preservation.anchors:
        first = anchor.first if anchor.first > 1 else None
        asked = f"the first step of --preservation {anchor.name}"
        yield Moment(asked, first, "step", "this anchor never acts", repeats=False)


def _optimization(optimization: Optimization) -> Iterator[Moment]:
    stop = optimization.learning_rates.text_encoder_stop
    trained = "the text encoder is trained to the end"
    yield Moment("--stop_text_encoder_training", stop, "step", trained, repeats=False)
    rules = optimization.schedule.arguments.get("step_rules")
    for step in rule_steps(str(rules)) if rules is not None else ():
        unchanged = "the learning rate does not change there"
        yield Moment("the step of --lr_scheduler_args step_rules", step, "step", unchanged, repeats=False)
