"""Plan the sample images of a run: which prompts, when, and under which file names. No torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from library.options.mistakes import Mistake, Mistakes, UserError
from library.sampling.lora_tags import TAG
from library.sampling.prompts import DEFAULTS, ImageRequest, parse_line, read_prompts
from library.sampling.samplers import check_sampler
from library.training.plan.writable_paths import write_problem

if TYPE_CHECKING:
    from library.data.buckets import Placement
    from library.options.train_options import TrainOptions
    from library.training.preview.refiner_plan import RefinerPlan
    from library.training.preview.so_far_plan import SoFarPlan

FOLDER = "sample"
ENDINGS = (".txt", ".toml", ".json")
BEFORE_TRAINING = "e000000"
_LONGEST_NAME = "_e000000_00_20000101000000_100000000000000000_ema_refined.png"


@dataclass(frozen=True)
class PreviewPlan:
    """When to draw which prompts. `prompts` is a file, or the prompts themselves (see read_requests); `defaults` hold
    for options that a prompt leaves out; at most `batch_size` images are drawn together.

    `refined`: the placements of the run's images, which the prompts refine in turn, each in its size; empty: images
    are drawn from noise. `refiner`: finishes each image too, to a file of its own. `so_far`: pictures while
    they are drawn.
    """

    prompts: Path
    folder: Path
    name: str | None
    every_steps: int | None
    every_epochs: int | None
    before_training: bool
    batch_size: int
    defaults: ImageRequest
    refined: Sequence[Placement] = ()
    refiner: RefinerPlan | None = None
    so_far: SoFarPlan | None = None

    def refined_image(self, place: int) -> int:
        """The number of the image that the prompt at `place` refines."""
        return place % len(self.refined)

    def is_due_after_step(self, step: int) -> bool:
        """By --sample_every_n_steps; --sample_every_n_epochs overrides it."""
        return bool(self.every_steps) and not self.every_epochs and step % (self.every_steps or 1) == 0

    def is_due_after_epoch(self, epoch: int) -> bool:
        """By --sample_every_n_epochs; epochs count from 1."""
        return bool(self.every_epochs) and epoch % (self.every_epochs or 1) == 0

    def __str__(self) -> str:
        """A line of the plan: source of the prompts, when they are drawn, and the folder."""
        moments = ["before the first step"] if self.before_training else []
        if self.every_epochs:
            moments.append("at the end of every " + _ordinal(self.every_epochs, "epoch"))
        elif self.every_steps:
            moments.append("after every " + _ordinal(self.every_steps, "step"))
        source = "the prompts of --sample_prompts" if _is_prompt(self.prompts) else f"the prompts of {self.prompts}"
        how = "refining images of the dataset" if self.refined else "drawn"
        return f"{source}, {how} {' and '.join(moments)}, in {self.folder}"

    def path(self, mark: str, index: int, time: datetime, seed: int | None, version: str = "") -> Path:
        """The image file, `[NAME_]MARK_00_20260131235959[_SEED][VERSION].png`. `mark`: e000012 after an epoch, 000012
        after a step; `index`: place of the prompt in its file; `seed`: that of the prompt, if it sets one; `version`:
        suffix of the weights that it is drawn with; `time`: when the run began."""
        name = f"{self.name}_" if self.name else ""
        suffix = "" if seed is None else f"_{seed}"
        return self.folder / f"{name}{mark}_{index:02d}_{time:%Y%m%d%H%M%S}{suffix}{version}.png"


def _ordinal(count: int, thing: str) -> str:
    """`epoch` for 1, `2nd epoch`, `11th epoch`."""
    ending = "th" if count % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th")
    return thing if count == 1 else f"{count}{ending} {thing}"


def plan_preview(
    options: TrainOptions, size: tuple[int, int] | None = None, refined: Sequence[Placement] = ()
) -> PreviewPlan | None:
    """The plan, or None if no images are drawn (front-ends set a prompt file even then).

    `size`: default (width, height); without it 512 x 512. `refined`: see PreviewPlan.
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
        before_training=chosen.sample_at_first,
        batch_size=chosen.sample_batch_size or 1,
        defaults=replace(DEFAULTS, width=width, height=height, sampler=chosen.sample_sampler),
        refined=refined,
    )


def drawn_size(plan: PreviewPlan | None) -> tuple[int, int] | None:
    """The size of the largest image that is drawn, (width, height); None if none is."""
    if plan is None:
        return None
    try:
        requests = read_requests(plan)
    except UserError:
        requests = ()  # the file is gone since it was checked, and is read again when images are due
    sizes = [(one.width, one.height) for one in requests] or [(plan.defaults.width, plan.defaults.height)]
    return max(sizes, key=math.prod)


def _is_on(options: TrainOptions) -> bool:
    chosen = options.preview
    return bool(chosen.sample_every_n_steps or chosen.sample_every_n_epochs or chosen.sample_at_first)


def check_prompts(options: TrainOptions, mistakes: Mistakes, *, refines: bool = False) -> tuple[str, ...]:
    """Check the prompts of a run that draws them. Adds mistakes and returns notes.

    `refines`: the model refines images (Family.refines). The file is read again whenever images are drawn; mistakes
    in it are then only logged.
    """
    plan = plan_preview(options)
    if plan is None:
        return tuple(_undrawn(options.preview.sample_prompts))
    notes: list[str] = []
    try:
        requests = read_requests(plan)
    except UserError as error:
        mistakes.extend(Mistake(f"--sample_prompts: {mistake.what}", mistake.remedy) for mistake in error.mistakes)
        return ()
    if not requests:
        notes.append(f"--sample_prompts: {plan.prompts} is empty: no images are drawn until it contains a prompt")
    if _is_prompt(plan.prompts):
        notes.append(f"--sample_prompts: there is no such file, so the value is used as a prompt: {plan.prompts}")
    if refines and any(
        (request.width, request.height) != (plan.defaults.width, plan.defaults.height) for request in requests
    ):
        notes.append("--sample_prompts: --w and --h have no effect: this model refines images of the dataset")
    if tags := [found for request in requests for found in TAG.findall(request.prompt)]:
        notes.append(f"--sample_prompts: <lora:{tags[0]}> stays in the text: previews draw the model in training alone")
    unknown = filter(None, (check_sampler(request.sampler) for request in requests))
    mistakes.extend(Mistake(f"--sample_prompts: {mistake.what}", mistake.remedy) for mistake in unknown)
    if options.saving.output_dir is not None:
        longest = (plan.name or "") + _LONGEST_NAME
        refusal = write_problem((plan.folder / longest).parent, Path(longest).name)
        if refusal is not None:
            mistakes.add(
                f"sample images cannot be written to {plan.folder}: {refusal}",
                "fix the folder, or remove --sample_prompts",
            )
    return (*notes, *dict.fromkeys(note for request in requests for note in request.notes))


def _undrawn(prompts: Path | None) -> Iterator[str]:
    """A note on prompts of a run that draws none; a front-end's file that is empty or missing asks for nothing."""
    if prompts is not None and (_is_prompt(prompts) or (prompts.is_file() and prompts.stat().st_size)):
        remedy = "add --sample_every_n_epochs, --sample_every_n_steps or --sample_at_first"
        yield f"--sample_prompts {prompts} has no effect, as nothing says when to draw images: {remedy}"


def read_requests(plan: PreviewPlan) -> Sequence[ImageRequest]:
    """Read the prompt file; an empty one gives no requests. Raises UserError.

    A value without a known extension that is no file holds the prompts themselves, one per line: some front-ends pass
    them like this.
    """
    if _is_prompt(plan.prompts):
        requests = [parse_line(line, plan.defaults) for line in str(plan.prompts).splitlines() if line.strip()]
    else:
        requests = read_prompts(plan.prompts, plan.defaults, may_be_empty=True)
    if not plan.refined:
        return requests
    sizes = (plan.refined[plan.refined_image(place)].bucket for place in range(len(requests)))
    return [replace(request, width=w, height=h) for request, (w, h) in zip(requests, sizes, strict=True)]


def _is_prompt(prompts: Path) -> bool:
    # Path.exists raises OSError for a name that is too long
    return prompts.suffix.lower() not in ENDINGS and not os.path.exists(prompts)
