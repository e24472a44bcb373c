"""Repeats of each regularisation image, so that there are as many samples as of training images.

The rule of kohya's sd-scripts, except that folders are interleaved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.messages import counted

if TYPE_CHECKING:
    from library.data.scan.image_record import ImageRecord


def balance(repeats: Sequence[int], folders: Sequence[int], target: int) -> dict[int, int]:
    """Index -> repeats of the images to use, so that images x repeats reaches `target`.

    Takes images with their own repeats until the sum reaches the target and drops the rest; if the images run out
    first, adds 1 repeat to each in turn. `folders` has the folder of each image: folders are interleaved in proportion
    to their sizes, so that none is dropped as a whole.
    """
    order = _interleave(folders)
    result: dict[int, int] = {}
    total = 0
    for place in order:
        if total >= target:
            break
        result[place] = repeats[place]
        total += repeats[place]
    missing = max(0, target - total)
    if order and missing:
        rounds, rest = divmod(missing, len(order))
        for count, place in enumerate(order):
            result[place] += rounds + (count < rest)
    return result


def _interleave(folders: Sequence[int]) -> list[int]:
    sizes: dict[int, int] = {}
    places = []
    for folder in folders:
        places.append(sizes.get(folder, 0))
        sizes[folder] = places[-1] + 1
    share = [(2 * place + 1) / sizes[folder] for place, folder in zip(places, folders, strict=True)]
    return sorted(range(len(folders)), key=lambda index: (share[index], folders[index]))


def balance_note(name: str, reg: list[ImageRecord], kept: list[ImageRecord], target: int) -> str:
    """What became of the regularisation images of a dataset. `name`: of the dataset, after a space, or ""."""
    before, after = sum(record.repeats for record in reg), sum(record.repeats for record in kept)
    text = f"regularisation{name}: {counted(before, 'sample')} for {counted(target, 'training sample')}"
    if len(kept) < len(reg):
        text += f"; {len(reg) - len(kept)} of {counted(len(reg), 'image')} left out"
    elif after > before:
        text += f"; repeated to {after}"
    return f"{text}; ratio {after / target:.2f} : 1"
