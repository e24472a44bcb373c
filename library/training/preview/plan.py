"""Which images a run draws while it trains, when, and under which names: decided without a weight. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from library.options.mistakes import Mistake, Mistakes, UserError
from library.sampling.prompts import DEFAULTS, ImageRequest, parse_line, read_prompts
from library.sampling.samplers import check_sampler
from library.training.plan.writable_paths import refusal_to_write

if TYPE_CHECKING:
    from library.data.buckets import Placement
    from library.options.train_options import TrainOptions

FOLDER = "sample"
ENDINGS = (".txt", ".toml", ".json")
BEFORE_TRAINING = "e000000"
_LONGEST_NAME = "_e000000_00_20000101000000_100000000000000000.png"


@dataclass(frozen=True)
class PreviewPlan:
    """Prompts, moments and names. `prompts` is a file, or a prompt itself (see read_requests); `defaults` hold for
    prompts that do not say otherwise; at most `at_once` images are drawn together.

    `refined`: the placements of the run's images, which the prompts refine in turn, each in its size; empty: images
    are drawn from noise.
    """

    prompts: Path
    folder: Path
    name: str | None
    every_steps: int | None
    every_epochs: int | None
    at_first: bool
    at_once: int
    defaults: ImageRequest
    refined: Sequence[Placement] = ()

    def refined_image(self, place: int) -> int:
        """The number of the image that the prompt at `place` refines."""
        return place % len(self.refined)

    def is_due_after_step(self, step: int) -> bool:
        """--sample_every_n_steps, unless images are drawn at ends of epochs."""
        return bool(self.every_steps) and not self.every_epochs and step % (self.every_steps or 1) == 0

    def is_due_after_epoch(self, epoch: int) -> bool:
        """--sample_every_n_epochs; epochs count from 1."""
        return bool(self.every_epochs) and epoch % (self.every_epochs or 1) == 0

    def __str__(self) -> str:
        """For the plan: where the prompts come from, when they are drawn, where to."""
        moments = ["before the first step"] if self.at_first else []
        if self.every_epochs:
            moments.append("at the end of every " + _ordinal(self.every_epochs, "epoch"))
        elif self.every_steps:
            moments.append("after every " + _ordinal(self.every_steps, "step"))
        source = "a prompt of the options" if _is_prompt(self.prompts) else f"the prompts of {self.prompts}"
        done = "on images of the dataset, refined" if self.refined else "drawn"
        return f"{source}, {done} {' and '.join(moments)}, in {self.folder}"

    def path(self, mark: str, index: int, time: datetime, seed: int | None) -> Path:
        """`[NAME_]MARK_00_20260131235959[_SEED].png` in the folder: the mark is e000012 after an epoch and 000012 after
        a step, `index` the place of the prompt in its file, and only a seed that the prompt gives stands there."""
        name = f"{self.name}_" if self.name else ""
        given = "" if seed is None else f"_{seed}"
        return self.folder / f"{name}{mark}_{index:02d}_{time:%Y%m%d%H%M%S}{given}.png"


def _ordinal(count: int, thing: str) -> str:
    """`epoch` for 1, `2nd epoch`, `11th epoch`."""
    ending = "th" if count % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th")
    return thing if count == 1 else f"{count}{ending} {thing}"


def plan_preview(
    options: TrainOptions, size: tuple[int, int] | None = None, refined: Sequence[Placement] = ()
) -> PreviewPlan | None:
    """The images of a run, or None where none are drawn: front-ends name a prompt file even then.

    `size`: (width, height) of images whose prompts do not say; not given: 512 x 512. `refined`: see PreviewPlan.
    """
    chosen = options.preview
    if chosen.sample_prompts is None or not _is_on(options):
        return None
    width, height = size or (DEFAULTS.width, DEFAULTS.height)
    return PreviewPlan(
        prompts=chosen.sample_prompts,
        folder=(options.saving.output_dir or Path()) / FOLDER,
        name=options.saving.output_name,
        every_steps=None if chosen.sample_every_n_epochs else chosen.sample_every_n_steps,
        every_epochs=chosen.sample_every_n_epochs,
        at_first=chosen.sample_at_first,
        at_once=chosen.sample_batch_size or 1,
        defaults=replace(DEFAULTS, width=width, height=height, sampler=chosen.sample_sampler),
        refined=refined,
    )


def _is_on(options: TrainOptions) -> bool:
    chosen = options.preview
    return bool(chosen.sample_every_n_steps or chosen.sample_every_n_epochs or chosen.sample_at_first)


def check_prompts(options: TrainOptions, mistakes: Mistakes, refines: bool = False) -> tuple[str, ...]:
    """Add what is wrong with the prompts of a run that draws them, and return what the user should know about them.

    `refines`: the model of the run refines images (Family.refines). The file is read again at every drawing, and what
    is wrong with it then is only told.
    """
    plan = plan_preview(options)
    if plan is None:
        return ()
    notes: list[str] = []
    try:
        requests = read_requests(plan)
    except UserError as error:
        mistakes.extend(Mistake(f"--sample_prompts: {each.what}", each.remedy) for each in error.mistakes)
        return ()
    if not requests:
        notes.append(f"--sample_prompts: {plan.prompts} is empty; images are drawn when there is a prompt in it")
    if _is_prompt(plan.prompts):
        notes.append(f"--sample_prompts: there is no file of this name, so it is drawn as a prompt: {plan.prompts}")
    if refines and any((one.width, one.height) != (plan.defaults.width, plan.defaults.height) for one in requests):
        notes.append("--sample_prompts: --w and --h are ignored, as this model refines images of the dataset")
    wrong = (check_sampler(request.sampler) for request in requests)
    mistakes.extend(Mistake(f"--sample_prompts: {each.what}", each.remedy) for each in wrong if each is not None)
    if options.saving.output_dir is not None:
        longest = (plan.name or "") + _LONGEST_NAME
        refusal = refusal_to_write((plan.folder / longest).parent, Path(longest).name)
        if refusal is not None:
            mistakes.add(f"images cannot be written to {plan.folder}: {refusal}", "repair it, or draw none")
    return (*notes, *dict.fromkeys(note for request in requests for note in request.notes))


def read_requests(plan: PreviewPlan) -> Sequence[ImageRequest]:
    """The images to draw, as the prompt file says now: none if it is empty. Raises UserError.

    What has none of the known endings and is no file is taken as the prompts themselves, a line each: some front-ends
    send them so.
    """
    if _is_prompt(plan.prompts):
        requests = [parse_line(line, plan.defaults) for line in str(plan.prompts).splitlines() if line.strip()]
    else:
        requests = read_prompts(plan.prompts, plan.defaults, may_be_empty=True)
    if not plan.refined:
        return requests
    sizes = (plan.refined[plan.refined_image(place)].bucket for place in range(len(requests)))
    return [replace(one, width=width, height=height) for one, (width, height) in zip(requests, sizes, strict=True)]


def _is_prompt(prompts: Path) -> bool:
    # as methods of Path they raise for a long name
    return prompts.suffix.lower() not in ENDINGS and not os.path.exists(prompts)
