"""Images that the model in training draws: when they are due, with what weights, where they go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.writer import replacing
from library.options.mistakes import UserError
from library.sampling.generate import random_seed
from library.sampling.prompts import ImageRequest, group_requests
from library.sampling.samplers import check_sampler
from library.training.isolated_eval import isolated_eval
from library.training.preview.plan import BEFORE_TRAINING, PreviewPlan, read_requests

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

    from library.training.plan.duration import Duration
    from library.training.run import Run
    from library.training.saving.state import Progress
    from library.training.weight_averaging import Weights

Draw = Callable[[Sequence[ImageRequest], Sequence[int], Sequence[int]], list["Image"]]
"""Requests of one size, sampler, steps and scale, a seed for each and their places among the prompts, to images."""


@dataclass
class Preview:
    """What the loop calls. `plan` None: nothing is ever drawn.

    `drawing` makes ready what draws, and puts it away again; `weights` shows the weights that a saved file would hold;
    `modules` are all that take part, with the adapters that a run trains; `log_images(images by name, step)` hands
    images to the trackers. `steps` of the run and `steps_per_epoch` of a whole epoch tell `due` that the last epoch
    was cut short. Images are an aside: whatever goes wrong is told and the run goes on.
    """

    plan: PreviewPlan | None
    drawing: Callable[[], AbstractContextManager[Draw]]
    modules: Iterable[nn.Module]
    say: Callable[[str], None]
    log_images: Callable[[Mapping[str, Image], int], None]
    weights: Callable[[], AbstractContextManager[None]] = nullcontext
    steps: int | None = None
    steps_per_epoch: int = 0
    now: Callable[[], datetime] = datetime.now

    def before_training(self, progress: Progress) -> None:
        """Draw before the first step, if asked for; a run that goes on from a state has done so."""
        if self.plan is not None and self.plan.at_first and progress.step == 0:
            self._sample(self.plan, BEFORE_TRAINING, 0)

    def due(self, progress: Progress, epoch_ended: bool) -> None:
        """Draw if it is due: called after every optimiser step and after every whole epoch. An epoch that the end of
        the run cuts short counts too."""
        if not epoch_ended:
            self.after_step(progress.step)
        if epoch_ended or (progress.step == self.steps and progress.window < self.steps_per_epoch):
            self.after_epoch(progress.epoch, progress.step)

    def after_step(self, step: int) -> None:
        """Draw if it is due after `step` optimiser steps."""
        if self.plan is not None and self.plan.is_due_after_step(step):
            self._sample(self.plan, f"{step:06d}", step)

    def after_epoch(self, epoch: int, step: int) -> None:
        """Draw if it is due at the end of `epoch`, counted from 1, which came with `step`."""
        if self.plan is not None and self.plan.is_due_after_epoch(epoch):
            self._sample(self.plan, f"e{epoch:06d}", step)

    def _sample(self, plan: PreviewPlan, mark: str, step: int) -> None:
        """Draw all prompts as their file has them now."""
        with self._told("no images are drawn"):
            requests = list(map(self._with_known_sampler, read_requests(plan)))
            if not requests:
                self.say(f"no images are drawn: {plan.prompts} is empty")
                return
            self.say(f"step {step}: drawing {len(requests)} image{'s' if len(requests) > 1 else ''} to {plan.folder}")
            shown: dict[str, Image] = {}
            with isolated_eval(self.modules), self.weights(), self.drawing() as draw:
                for places in group_requests(requests, plan.at_once):
                    with self._told(f"prompt {', '.join(map(str, places))} is not drawn"):
                        shown |= self._draw_group(plan, mark, requests, places, draw)
            self.log_images(dict(sorted(shown.items())), step)

    def _draw_group(
        self, plan: PreviewPlan, mark: str, requests: Sequence[ImageRequest], places: Sequence[int], draw: Draw
    ) -> dict[str, Image]:
        """Draw and write the images at some places of the prompt file; returns them under the trackers' names."""
        asked = [requests[place] for place in places]
        seeds = [random_seed() if one.seed is None else one.seed for one in asked]
        images = draw(asked, seeds, places)
        for place, one, seed, image in zip(places, asked, seeds, images, strict=True):
            path = self._free_path(plan, mark, place, one.seed)
            with replacing(path) as stream:
                image.save(stream, "png")
            self.say(f"{path}" + (f" (seed {seed})" if one.seed is None else ""))
        return {f"sample/{place:02d}": image for place, image in zip(places, images, strict=True)}

    def _free_path(self, plan: PreviewPlan, mark: str, place: int, seed: int | None) -> Path:
        """A name that no image has yet: two runs of one name may come to the same step in the same second."""
        time = self.now()
        while (path := plan.path(mark, place, time, seed)).exists():
            time += timedelta(seconds=1)
        return path

    def _with_known_sampler(self, request: ImageRequest) -> ImageRequest:
        """kohya's trainer takes DDIM for a sampler that it does not know."""
        wrong = check_sampler(request.sampler)
        if wrong is None:
            return request
        self.say(f"{wrong.what}: ddim is used instead")
        return replace(request, sampler="ddim")

    @contextmanager
    def _told(self, consequence: str) -> Iterator[None]:
        """Say what went wrong, of whatever kind: hours of training are worth more than an image."""
        try:
            yield
        except UserError as error:
            self.say("\n".join([f"{consequence}:", str(error)]))
        except Exception as error:  # noqa: BLE001 - a full disk, exhausted memory, settings that a sampler cannot do
            self.say(f"{consequence}: {type(error).__name__}: {error}")


def preview_of(
    plan: PreviewPlan | None,
    draw: Callable[[], AbstractContextManager[Draw]],
    modules: Sequence[nn.Module],
    duration: Duration,
    run: Run,
    weights: Weights,
) -> Preview:
    """The sample images of a run, drawn by `draw` with the weights that a saved file would hold."""
    return Preview(
        plan=plan,
        drawing=draw,
        modules=modules,
        say=run.say,
        log_images=run.log_images,
        weights=weights.shown,
        steps=duration.steps,
        steps_per_epoch=duration.steps_per_epoch,
    )
