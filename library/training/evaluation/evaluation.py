"""Evaluate the model while it trains: draw the prompts with each version of the weights, measure, log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.evaluation.bootstrap import interval
from library.evaluation.encoders import load_clip, load_dino
from library.evaluation.scores import MEASURES, Judge, Scores, prepare_judge
from library.evaluation.subject_images import open_image
from library.messages import counted, listed
from library.options.mistakes import Mistake, UserError
from library.runtime.processes import ALONE, Processes
from library.sampling.prompts import ImageRequest, group_requests
from library.training.evaluation.plan import EvaluationPlan
from library.training.isolated_eval import isolated_eval
from library.training.plan.duration import Duration, ends_epoch

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

    from library.training.averaging.weights import Versions, Weights
    from library.training.preview.preview import Draw
    from library.training.run import Run
    from library.training.saving.state import Progress
    from library.training.trainable import Trainable

BASE = "_base"
"""The suffix of the base model's values in logs."""

Holding = Callable[[], AbstractContextManager[None]]


@dataclass
class Evaluation:
    """The evaluations of a run. `plan` None: it never evaluates.

    `judge` measures images against the real ones. `open_drawer()` is open while images are drawn; `modules` are all
    modules of the forward pass. `versions` of the weights are evaluated one after the other, with the same seeds, and
    logged with their suffix. `base`: while it is open, the model is the base model; None: it is that only before the
    first step. An error is said, and training goes on. Several processes share the images that are drawn; the writer,
    which alone has a judge, measures them.
    """

    plan: EvaluationPlan | None
    judge: Judge | None
    open_drawer: Callable[[], AbstractContextManager[Draw]]
    modules: Sequence[nn.Module]
    log: Callable[[dict[str, float], int], None]
    say: Callable[[str], None]
    warn: Callable[[str], None]
    base: Holding | None = None
    versions: Versions = field(default_factory=lambda: {"": nullcontext})
    steps: int = 0
    steps_per_epoch: int = 0
    processes: Processes = ALONE
    _base_means: Mapping[str, float] = field(default_factory=dict, init=False)
    _last: int | None = field(default=None, init=False)

    def begin(self, progress: Progress) -> None:
        """Evaluate the base model, once."""
        if self.plan is None:
            return
        if self.judge is not None and (real := self.judge.baseline()):
            self.say(f"evaluation: the real images among themselves: {_values(real)}")
        base = self.base or (nullcontext if progress.step == 0 else None)
        if base is None:
            self.say("evaluation: no values of the base model, as the run goes on from a training state")
            return
        with self._errors_are_said(progress.step):
            scores = self.measure(self.plan, base)
            if scores is not None:
                self._report("base model", scores, {})
                self.log(logged(self.plan, scores, BASE), progress.step)
                self._base_means = scores.means

    def is_due(self, step: int) -> bool:
        """Whether it is due after this step by the number of steps."""
        every = self.plan.every_n_steps if self.plan is not None else None
        return every is not None and every > 0 and step % every == 0

    def due(self, progress: Progress, *, epoch_ended: bool) -> None:
        """Evaluate if due: see loop.DueCall. An incomplete last epoch counts as an epoch; once per step."""
        plan, step = self.plan, progress.step
        if plan is None or self._last == step:
            return
        ends = ends_epoch(step, progress.window, self.steps, self.steps_per_epoch, epoch_ended=epoch_ended)
        by_steps = not epoch_ended and self.is_due(step)
        if by_steps or (ends and plan.every_n_epochs and progress.epoch % plan.every_n_epochs == 0):
            self._last = step
            for suffix, held in self.versions.items():
                with self._errors_are_said(step):
                    scores = self.measure(plan, held)
                    if scores is not None:
                        self._report(f"step {step}{' with the EMA' if suffix else ''}", scores, self._base_means)
                        self.log(logged(plan, scores, suffix), step)

    def measure(self, plan: EvaluationPlan, held: Holding) -> Scores | None:
        """Draw and measure with the weights that the model holds within `held()`, without any effect on the training.
        None on processes without a judge; raises on all of them if one cannot draw."""
        with isolated_eval(self.modules):
            own, error = dict[int, "Image"](), None
            try:
                with held(), self.open_drawer() as draw:
                    own = _draw_share(plan.requests, plan.batch_size, draw, self.processes)
            except Exception as raised:  # noqa: BLE001 - the others wait for the images
                error = raised
            of_ranks = self.processes.gather((own, None if error is None else _told(error)))
            if error is not None:
                raise error
            for _, mistake in of_ranks:
                if mistake is not None:
                    raise UserError((mistake,))
            if self.judge is None:
                return None
            images = {place: image for drawn, _ in of_ranks for place, image in drawn.items()}
            drawn = iter(images[place] for place in range(len(plan.requests)))
            by_prompt, of_class = (
                [[next(drawn) for _ in own] for own in part] for part in (plan.images, plan.of_class)
            )
            return self.judge.measure(plan.prompts, by_prompt, of_class)

    def _report(self, what: str, scores: Scores, base: Mapping[str, float]) -> None:
        means = {name: value for name, value in scores.means.items() if name != "clip_score"}
        self.say(f"{what}: {_values(means, scores.by_prompt, base)}")
        if scores.copies:
            nearest = {row["nearest_image"]: row["nearest"] for row in sorted(scores.copies, key=_by_nearest)}
            images = (f"{name} ({value:.3f})" for name, value in reversed(nearest.items()))
            count = f"{len(scores.copies)} of {counted(len(scores.by_image), 'image')}"
            self.warn(f"{what}: {count} may copy a training image: {listed(images)}")

    @contextmanager
    def _errors_are_said(self, step: int) -> Iterator[None]:
        """An evaluation is not worth a run."""
        try:
            yield
        except UserError as error:
            self.warn("\n".join([f"step {step}: no evaluation:", str(error)]))
        except Exception as error:  # noqa: BLE001 - out of memory, sampler settings that fail
            self.warn(f"step {step}: no evaluation: {type(error).__name__}: {error}")


def _by_nearest(row: Mapping[str, Any]) -> float:
    nearest: float = row["nearest"]
    return nearest


def _draw_share(requests: Sequence[ImageRequest], at_once: int, draw: Draw, processes: Processes) -> dict[int, Image]:
    """The images that this process draws, by the places of their requests."""
    images: dict[int, Image] = {}
    for places in processes.own([*group_requests(requests, at_once)]):
        group = [requests[place] for place in places]
        images.update(zip(places, draw(group, [request.seed or 0 for request in group], places), strict=True))
    return images


def _told(error: Exception) -> Mistake:
    """An error of another process."""
    return error.mistakes[0] if isinstance(error, UserError) else Mistake(f"{type(error).__name__}: {error}")


def logged(plan: EvaluationPlan, scores: Scores, suffix: str) -> dict[str, float]:
    """Log names and values: each measure, and the CLIP score of each prompt and size."""
    values = {f"evaluation/{name}{suffix}": value for name, value in scores.means.items()}
    for place, value in enumerate(scores.by_prompt.get("clip_score", ())):
        request = plan.prompts[place].request
        values[f"evaluation/clip_score/{place:02d}_{request.width}x{request.height}{suffix}"] = value
    return values


def _values(
    means: Mapping[str, float],
    by_prompt: Mapping[str, Sequence[float]] | None = None,
    base: Mapping[str, float] | None = None,
) -> str:
    """`DINO 0.612 [0.570, 0.655] (base model 0.402), CLIP-T …`."""
    texts = []
    for name, mean in means.items():
        bounds = interval((by_prompt or {}).get(name, ())) if name != "nearest" else None
        brackets = "" if bounds is None else f" [{bounds[0]:.3f}, {bounds[1]:.3f}]"
        before = f" (base model {base[name]:.3f})" if base and name in base else ""
        texts.append(f"{MEASURES[name].title} {mean:.3f}{brackets}{before}")
    return ", ".join(texts)


def build_evaluation(
    plan: EvaluationPlan | None,
    open_drawer: Callable[[], AbstractContextManager[Draw]],
    modules: Sequence[nn.Module],
    duration: Duration,
    run: Run,
    weights: Weights,
    trainable: Trainable,
) -> Evaluation:
    """The evaluation of a run: loads the encoders, and embeds the real images. Raises UserError."""
    judge = None
    if plan is not None and run.processes.is_writer:
        with isolated_eval(()):
            dino = None if plan.dino is None else load_dino(plan.dino, run.device)
            clip = None if plan.clip is None else load_clip(plan.clip, run.device)
            cut = 0 if clip is None else sum(clip.is_cut(prompt.request.prompt) for prompt in plan.prompts)
            if clip is not None and cut:
                run.warn(f"CLIP reads {clip.longest} tokens: the end of {counted(cut, 'prompt')} is not compared")
            judge = prepare_judge(dino, clip, [open_image(path) for path in plan.real], plan.real)
    return Evaluation(
        plan=plan,
        judge=judge,
        open_drawer=open_drawer,
        modules=modules,
        log=run.log,
        say=run.say,
        warn=run.warn,
        base=trainable.switched_off,
        versions=weights.shown(),
        steps=duration.steps,
        steps_per_epoch=duration.steps_per_epoch,
        processes=run.processes,
    )
