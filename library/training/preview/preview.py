"""Draw sample images during training: when they are due, with which weights, and to which files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Protocol

from library.messages import counted
from library.options.mistakes import UserError
from library.runtime.processes import ALONE, Processes
from library.sampling.generate import random_seed
from library.sampling.prompts import ImageRequest, group_requests
from library.sampling.samplers import check_sampler
from library.sampling.write_image import write_image
from library.training.isolated_eval import isolated_eval
from library.training.plan.duration import Duration, ends_epoch
from library.training.preview.plan import BEFORE_TRAINING, PreviewPlan, read_requests
from library.training.preview.refiner_plan import SUFFIX as REFINED
from library.training.run import DrawnImage

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

    from library.sampling.sampling_path import HandOver, Unfinished
    from library.training.averaging.weights import Versions, Weights
    from library.training.preview.refiner import Refiner
    from library.training.preview.so_far import GroupSoFar, SoFar
    from library.training.run import Run
    from library.training.saving.state import Progress


class Draw(Protocol):
    """(requests, seeds, places among the prompts) to images; the requests agree in size, sampler, steps and scale.
    `hand_over` keeps them on their way, for a refiner to finish; `so_far` makes pictures meanwhile."""

    def __call__(
        self,
        requests: Sequence[ImageRequest],
        seeds: Sequence[int],
        places: Sequence[int],
        hand_over: HandOver | None = None,
        so_far: GroupSoFar | None = None,
    ) -> list[Image]: ...


@dataclass(frozen=True)
class Group:
    """Prompts that are drawn together: their places among all, what they ask for, and their seeds."""

    places: Sequence[int]
    requests: Sequence[ImageRequest]
    seeds: Sequence[int]


@dataclass(frozen=True)
class Waiting:
    """A group that is drawn, and that the refiner has yet to finish."""

    group: Group
    suffix: str
    unfinished: Sequence[Unfinished]


@dataclass
class Shared:
    """What one of several processes has drawn: (suffix, group, images), and what went wrong."""

    images: list[tuple[str, Group, Sequence[Image]]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@dataclass
class Preview:
    """Draws the sample images of a run. `plan` None: never draws.

    `open_drawer()` is open while images are drawn; `versions` of the weights are drawn with one after the other, with
    the same seeds, to files with their suffix; `modules` are all modules of the forward pass, adapters included;
    `log_images(images by name, step)` sends images to the trackers. `steps` of the run and `steps_per_epoch` tell `due`
    whether the last epoch is incomplete. `refiner`: finishes each image too, once all are drawn; `so_far`: makes
    pictures while they are drawn. `began`: when the run began, also of one that was resumed: it is in the names of the
    files, so that an image that is drawn again replaces the one before. Errors are logged, and training continues.
    Several processes share the groups of prompts; the writer reads the prompts, and writes all images.
    """

    plan: PreviewPlan | None
    open_drawer: Callable[[], AbstractContextManager[Draw]]
    modules: Iterable[nn.Module]
    say: Callable[[str], None]
    warn: Callable[[str], None]
    log_images: Callable[[Mapping[str, DrawnImage], int], None]
    versions: Versions = field(default_factory=lambda: {"": nullcontext})
    steps: int | None = None
    steps_per_epoch: int = 0
    refiner: Refiner | None = None
    so_far: SoFar | None = None
    began: datetime = field(default_factory=datetime.now)
    processes: Processes = ALONE
    _shared: Shared = field(default_factory=Shared, init=False)

    def before_training(self, progress: Progress) -> None:
        """Draw before the first step with --sample_at_first; a resumed run has done so."""
        if self.plan is not None and self.plan.before_training and progress.step == 0:
            self._sample(self.plan, BEFORE_TRAINING, 0)

    def due(self, progress: Progress, *, epoch_ended: bool) -> None:
        """Draw if due: see loop.DueCall. An incomplete last epoch counts as an epoch."""
        if not epoch_ended:
            self.after_step(progress.step)
        if ends_epoch(progress.step, progress.window, self.steps, self.steps_per_epoch, epoch_ended=epoch_ended):
            self.after_epoch(progress.epoch, progress.step)

    def after_step(self, step: int) -> None:
        """Draw if due after `step` optimizer steps."""
        if self.plan is not None and self.is_due(step):
            self._sample(self.plan, f"{step:06d}", step)

    def is_due(self, step: int) -> bool:
        """Whether images are to be drawn after this step by the number of steps."""
        return self.plan is not None and self.plan.is_due_after_step(step)

    def after_epoch(self, epoch: int, step: int) -> None:
        """Draw if due at the end of `epoch` (from 1), after `step` optimizer steps."""
        if self.plan is not None and self.plan.is_due_after_epoch(epoch):
            self._sample(self.plan, f"e{epoch:06d}", step)

    def _sample(self, plan: PreviewPlan, mark: str, step: int) -> None:
        """Draw all prompts that the file contains now."""
        requests, seeds = self.processes.agree(self._read(plan) if self.processes.is_writer else ([], []))
        if not requests:
            return
        self.say(f"step {step}: drawing {counted(len(requests), 'image')} to {plan.folder}")
        drawn: dict[str, DrawnImage] = {}
        waiting: list[Waiting] = []
        with self._log_errors("no sample images"):
            for suffix, held in self.versions.items():
                with isolated_eval(self.modules), held(), self.open_drawer() as draw:
                    for places in self.processes.own([*group_requests(requests, plan.batch_size)]):
                        with self._log_errors(f"prompt {', '.join(map(str, places))} was not drawn"):
                            group = Group(places, [requests[place] for place in places], [seeds[p] for p in places])
                            so_far = self._pictures(plan, mark, suffix, group, step)
                            drawn |= self._draw_group(plan, mark, suffix, group, partial(draw, so_far=so_far), waiting)
            if self.refiner is not None and waiting:
                with self._log_errors("images were not refined"):
                    drawn |= self._refine(plan, mark, waiting, self.refiner)
        if self.processes.world > 1:
            drawn |= self._collect(plan, mark)
        with self._log_errors("no sample images in the logs"):
            self.log_images(dict(sorted(drawn.items())), step)

    def _read(self, plan: PreviewPlan) -> tuple[list[ImageRequest], list[int]]:
        """What is drawn now, and with which seeds; nothing if the prompts cannot be read."""
        requests: list[ImageRequest] = []
        with self._log_errors("no sample images"):
            requests = list(map(self._with_known_sampler, read_requests(plan)))
            if not requests:
                self.warn(f"no sample images: {plan.prompts} is empty")
        return requests, [random_seed() if request.seed is None else request.seed for request in requests]

    def _collect(self, plan: PreviewPlan, mark: str) -> dict[str, DrawnImage]:
        """Write the images of all processes, on the writer; returns them by their names for trackers."""
        own, self._shared = self._shared, Shared()
        drawn: dict[str, DrawnImage] = {}
        for shared in self.processes.gather(own):
            for text in shared.errors if self.processes.is_writer else ():
                self.warn(text)
            for suffix, group, images in shared.images if self.processes.is_writer else ():
                with self._log_errors(f"prompt {', '.join(map(str, group.places))} was not written"):
                    drawn |= self._write(plan, mark, suffix, group, images)
        return drawn

    def _draw_group(
        self, plan: PreviewPlan, mark: str, suffix: str, group: Group, draw: Draw, waiting: list[Waiting]
    ) -> dict[str, DrawnImage]:
        """Draw and save a group of prompts; returns the images by their names for trackers."""
        hand_over = None if self.refiner is None else self.refiner.hand_over()
        images = draw(group.requests, group.seeds, group.places, hand_over)
        if hand_over is not None:
            if hand_over.kept:
                waiting.append(Waiting(group, suffix, [hand_over.kept[row] for row in range(len(images))]))
            else:
                request = group.requests[0]
                few = f"none of the {counted(request.steps, 'step')} of {request.sampler} is below {hand_over.below}"
                self.warn(f"prompt {', '.join(map(str, group.places))} was not refined: {few}; use more steps")
        return self._keep(plan, mark, suffix, group, images)

    def _pictures(self, plan: PreviewPlan, mark: str, suffix: str, group: Group, step: int) -> GroupSoFar | None:
        """What makes the pictures of a group while it is drawn."""
        if self.so_far is None:
            return None
        seeded = [replace(request, seed=seed) for request, seed in zip(group.requests, group.seeds, strict=True)]
        seeded_by_place = dict(zip(group.places, seeded, strict=True))
        return self.so_far.of(plan, mark, suffix, seeded_by_place, step, self.began)

    def _refine(
        self, plan: PreviewPlan, mark: str, waiting: Sequence[Waiting], refiner: Refiner
    ) -> dict[str, DrawnImage]:
        """Finish and save the images that wait; returns them by their names for trackers."""
        drawn: dict[str, DrawnImage] = {}
        with isolated_eval(()), refiner.loaded() as finish:
            for each in waiting:
                with self._log_errors(f"prompt {', '.join(map(str, each.group.places))} was not refined"):
                    images = finish(each.group.requests, each.unfinished)
                    drawn |= self._keep(plan, mark, each.suffix + REFINED, each.group, images)
        return drawn

    def _keep(
        self, plan: PreviewPlan, mark: str, suffix: str, group: Group, images: Sequence[Image]
    ) -> dict[str, DrawnImage]:
        """Save the images of a group now, or with those of other processes."""
        if self.processes.world > 1:
            self._shared.images.append((suffix, group, images))
            return {}
        return self._write(plan, mark, suffix, group, images)

    def _write(
        self, plan: PreviewPlan, mark: str, suffix: str, group: Group, images: Sequence[Image]
    ) -> dict[str, DrawnImage]:
        """Save the images of a group; returns them by their names for trackers."""
        drawn: dict[str, DrawnImage] = {}
        for place, request, seed, image in zip(group.places, group.requests, group.seeds, images, strict=True):
            path = plan.path(mark, place, self.began, request.seed, suffix)
            seeded = replace(request, seed=seed)
            write_image(path, seeded, image)
            self.say(f"{path}" + (f" (seed {seed})" if request.seed is None else ""))
            drawn[f"sample/{place:02d}{suffix}"] = DrawnImage(image, seeded, path)
        return drawn

    def _with_known_sampler(self, request: ImageRequest) -> ImageRequest:
        """Replace an unknown sampler by DDIM, as kohya's scripts do."""
        mistake = check_sampler(request.sampler)
        if mistake is None:
            return request
        self.warn(f"{mistake.what}: using ddim instead")
        return replace(request, sampler="ddim")

    @contextmanager
    def _log_errors(self, consequence: str) -> Iterator[None]:
        """Log any error and continue: a sample image is not worth a run."""
        try:
            yield
        except UserError as error:
            self._tell("\n".join([f"{consequence}:", str(error)]))
        except Exception as error:  # noqa: BLE001 - full disk, out of memory, sampler settings that fail
            self._tell(f"{consequence}: {type(error).__name__}: {error}")

    def _tell(self, text: str) -> None:
        self.warn(text)
        if not self.processes.is_writer:
            self._shared.errors.append(text)


def build_preview(  # noqa: PLR0913 - what a preview is made of, each from another room
    plan: PreviewPlan | None,
    open_drawer: Callable[[], AbstractContextManager[Draw]],
    modules: Sequence[nn.Module],
    duration: Duration,
    run: Run,
    weights: Weights,
    refiner: Refiner | None,
    so_far: SoFar | None,
    began: datetime,
) -> Preview:
    """The sample images of a run that began then, drawn with the versions of the weights that are shown."""
    return Preview(
        plan=plan,
        open_drawer=open_drawer,
        modules=modules,
        say=run.say,
        warn=run.warn,
        log_images=run.log_images,
        versions=weights.shown(),
        steps=duration.steps,
        steps_per_epoch=duration.steps_per_epoch,
        refiner=refiner,
        so_far=so_far if run.processes.is_writer else None,
        began=began,
        processes=run.processes,
    )
