"""How often each regularisation image is shown, so that there are as many samples as of training images.

The rule is that of kohya's sd-scripts, but several folders are walked in step.
"""

from __future__ import annotations

from collections.abc import Sequence


def balance(repeats: Sequence[int], folders: Sequence[int], target: int) -> dict[int, int]:
    """Place -> repeats of the images that are used, until images x repeats reaches `target`.

    Walk over the images taking each with its own repeats until the sum reaches the target, and leave the rest out; if
    the walk ends first, walk again and again adding 1 to each. `folders` says of each image where it lies: several
    are walked in step, each in proportion to its images, so that trimming never leaves a whole folder out.
    """
    walk = _in_step(folders)
    given: dict[int, int] = {}
    total = 0
    for place in walk:
        if total >= target:
            break
        given[place] = repeats[place]
        total += repeats[place]
    missing = max(0, target - total)
    if walk and missing:
        rounds, rest = divmod(missing, len(walk))
        for count, place in enumerate(walk):
            given[place] += rounds + (count < rest)
    return given


def _in_step(folders: Sequence[int]) -> list[int]:
    sizes: dict[int, int] = {}
    places = []
    for folder in folders:
        places.append(sizes.get(folder, 0))
        sizes[folder] = places[-1] + 1
    share = [(2 * place + 1) / sizes[folder] for place, folder in zip(places, folders, strict=True)]
    return sorted(range(len(folders)), key=lambda index: (share[index], folders[index]))
