"""Balancing regularisation images, against the rule of sd-scripts."""

from __future__ import annotations

import pytest

from library.data.scan.balance import balance


def walk(repeats: list[int], target: int) -> list[int]:
    """The rule of sd-scripts to the letter: repeats of each image, 0 = left out."""
    given = [0] * len(repeats)
    total = 0
    first = True
    while total < target:
        for index, own in enumerate(repeats):
            given[index] += own if first else 1
            total += own if first else 1
            if total >= target:
                break
        first = False
    return given


@pytest.mark.parametrize("images", [1, 2, 7])
@pytest.mark.parametrize("repeats", [1, 3])
def test_balancing_is_the_walk_of_the_format(images: int, repeats: int) -> None:
    for target in range(40):
        given = walk([repeats] * images, target)
        expected = {place: count for place, count in enumerate(given) if count}
        assert balance([repeats] * images, [0] * images, target) == expected


def test_trimming_leaves_no_folder_out() -> None:
    folders = [0] * 100 + [1] * 100 + [2] * 50
    kept = balance([1] * 250, folders, 50)
    assert [sum(folders[place] == folder for place in kept) for folder in range(3)] == [20, 20, 10]


def test_without_images_there_is_nothing_to_balance() -> None:
    assert balance([], [], 10) == {}
