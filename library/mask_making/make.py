"""Make the masks of a folder: those that are missing, and those whose image or settings have changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from PIL import Image

from library.checkpoints.files import sha256
from library.data.decoding import opacity, read, to_rgb
from library.data.image_files import BadImage
from library.mask_making import regions, shaping
from library.mask_making.mask_files import read_record, write_mask
from library.mask_making.options import TOLERANCE, MaskMakingOptions
from library.mask_making.plan import MaskJob, MaskPlan, decide
from library.mask_making.sheet import write_sheet
from library.mask_making.text_models import Finder, Found, load_finder
from library.messages import counted, listed
from library.options.mistakes import Mistake, UserError
from library.runtime.progress import ProgressBar
from library.whole_files import remove_leftovers

if TYPE_CHECKING:
    from numpy.typing import NDArray

State = Literal["missing", "outdated", "current", "by hand"]
Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_LISTED = 10


@dataclass(frozen=True)
class Outcome:
    """The mask of an image after the run.

    `found`: False if the mask is white because nothing was found. `kept`: the share of the image that a new mask keeps.
    `failure`: why there is no new mask.
    """

    job: MaskJob
    state: State
    found: bool = True
    kept: float | None = None
    failure: str = ""


def make_masks(options: MaskMakingOptions) -> None:
    """Make what is missing or outdated, write the contact sheet, and print what was done. Raises UserError."""
    plan = decide(options)
    print(f"{counted(len(plan.jobs), 'image')} in {options.input_dir}", flush=True)
    checked = list(_parallel(partial(_check, plan), plan.jobs, "checking masks", delay=1.0))
    wanted = [outcome for outcome in checked if options.overwrite or outcome.state in ("missing", "outdated")]
    finder = load_finder(plan.model) if plan.model is not None and wanted else None
    for folder in {outcome.job.mask.parent for outcome in wanted}:
        remove_leftovers(folder)
    work = partial(_make, plan, options, finder)
    made = list(_parallel(work, wanted, "masks", workers=None if finder is None else 1))
    new = {outcome.job.name: outcome for outcome in made}
    outcomes = [new.get(outcome.job.name, outcome) for outcome in checked]
    write_sheet(plan.sheet, options.input_dir, [(one.job, _remarks(one), one.failure) for one in outcomes])
    _report(options, plan, outcomes)


def _parallel(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    description: str,
    *,
    workers: int | None = None,
    delay: float = 0.0,
) -> Iterator[Result]:
    """The results in order, with a progress bar. `workers` None: as many as there are processors."""
    pool = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1))  # decoding and OpenCV release the GIL
    try:
        yield from ProgressBar(description, len(items), delay=delay).over(pool.map(work, items))
    finally:
        pool.shutdown(cancel_futures=True)


def _check(plan: MaskPlan, job: MaskJob) -> Outcome:
    """What is there already."""
    if not os.path.lexists(job.mask):
        return Outcome(job, "missing")
    record = read_record(job.mask)
    if record is None:
        return Outcome(job, "by hand")
    try:
        same = record.settings == plan.settings_of(job) and record.image == sha256(job.image)
    except OSError:  # making it says why
        same = False
    return Outcome(job, "current" if same else "outdated", record.found)


def _make(plan: MaskPlan, options: MaskMakingOptions, finder: Finder | None, before: Outcome) -> Outcome:
    """Make one mask, or say why it could not be made. Raises UserError if it cannot be written."""
    job = before.job
    try:
        content = sha256(job.image)
        colours, opaque = read(job.image, lambda image: (to_rgb(image), opacity(image)), options.max_image_memory)
    except (BadImage, OSError) as error:
        return Outcome(job, before.state, failure=(error.strerror if isinstance(error, OSError) else "") or str(error))
    mask = find_subject(np.asarray(colours), np.asarray(opaque), options, job, finder)
    mask = shaping.without_small_parts(mask, options.min_area)
    found = bool(mask.any())
    if found:
        mask = shaping.shape(mask, padding=options.mask_padding, blur=options.mask_blur, invert=options.invert_mask)
    else:
        mask = np.full_like(mask, 255)
    write_mask(job.mask, mask, content, plan.settings_of(job), found=found)
    return Outcome(job, before.state, found, float(mask.mean()) / 255)


def find_subject(
    pixels: NDArray[np.uint8],
    opaque: NDArray[np.uint8],
    options: MaskMakingOptions,
    job: MaskJob,
    finder: Finder | None,
) -> NDArray[np.uint8]:
    """The union of what the sources find in an upright image, uint8 (H, W); black if they find nothing.

    `pixels`: (H, W, 3) RGB; `opaque`: its opacity (H, W). GrabCut takes the place of what boxes and words find; it does
    not guess where there are words and they find nothing.
    """
    shape = opaque.shape
    masks: list[NDArray[np.uint8]] = []
    if options.alpha and (transparency := regions.from_opacity(opaque)) is not None:
        masks.append(transparency)
    if options.colours:
        tolerance = TOLERANCE if options.color_tolerance is None else options.color_tolerance
        masks.append(regions.unlike_colours(pixels, options.colours, tolerance))
    # without its EXIF data, by which transformers would turn it once more
    found = Found() if finder is None else finder(Image.fromarray(pixels))
    named = [] if found.mask is None else [found.mask]
    area = regions.union([*named, regions.filled_boxes(shape, (*job.boxes, *found.boxes))], shape)
    if not options.grabcut:
        masks.append(area)
    elif area.any():
        masks.append(regions.cut_out(pixels, area))
    elif finder is None:
        masks.append(regions.cut_out(pixels))
    return regions.union(masks, shape)


def _remarks(outcome: Outcome) -> tuple[str, ...]:
    """What the contact sheet says of a mask."""
    if outcome.state == "by hand" and outcome.kept is None:
        return ("by hand",)
    return () if outcome.found else ("nothing found",)


def _report(options: MaskMakingOptions, plan: MaskPlan, outcomes: Sequence[Outcome]) -> None:
    """Print what was done. Raises UserError if images could not be read."""
    made = [outcome for outcome in outcomes if outcome.kept is not None]
    current = sum(outcome.kept is None and outcome.state == "current" for outcome in outcomes)
    by_hand = [one.job.mask.name for one in outcomes if one.kept is None and one.state == "by hand"]
    failed = [outcome for outcome in outcomes if outcome.failure]
    share = sum(outcome.kept or 0.0 for outcome in made) / max(1, len(made))
    average = f"; on average they keep {share:.0%} of the image" if made else ""
    print(f"{counted(len(made), 'mask')} made in {options.output_dir}{average}")
    if current:
        print(f"{counted(current, 'mask')} there already, of the same images and settings")
    if by_hand:
        kept = f"made or changed by hand, kept (--overwrite replaces them): {listed(by_hand, _MOST_LISTED)}"
        print(f"{counted(len(by_hand), 'mask')} {kept}")
    white = [one.job.name for one in outcomes if not one.found and not one.failure]
    if white:
        what = f"nothing found in {counted(len(white), 'image')}, whose mask is white, so that all of it counts"
        print(f"{what}: {listed(white, _MOST_LISTED)}")
    print(f"contact sheet: {plan.sheet}")
    if failed:
        lines = "".join(f"\n    {one.job.name}: {one.failure}" for one in failed[:_MOST_LISTED])
        what = f"{counted(len(failed), 'image')} could not be decoded and got no new mask:{lines}"
        raise UserError([Mistake(what, "repair or remove them, and start again: only their masks will be made")])
