"""Cleaning, growing, feathering and inverting masks, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from library.mask_making.shaping import feathered, padded, shape, without_small_parts


def square(side: int = 41, half: int = 5) -> np.ndarray:
    mask = np.zeros((side, side), np.uint8)
    middle = side // 2
    mask[middle - half : middle + half + 1, middle - half : middle + half + 1] = 255
    return mask


def test_small_parts_go_and_large_ones_stay_as_they_are() -> None:
    mask = np.zeros((10, 10), np.uint8)
    mask[0, 0] = mask[1, 1] = 200  # connected across a corner: 2 pixels, 2 % of the image
    mask[5, 5] = 255
    assert np.argwhere(without_small_parts(mask, 0.02)).tolist() == [[0, 0], [1, 1]]
    assert without_small_parts(mask, 0.02)[0, 0] == 200
    assert np.array_equal(without_small_parts(mask, 0.01), mask)
    assert not without_small_parts(mask, 0.021).any()
    assert np.array_equal(without_small_parts(mask, 0.0), mask)
    assert np.array_equal(without_small_parts(np.full((3, 3), 255, np.uint8), 1.0), np.full((3, 3), 255, np.uint8))


def dilated_once(mask: np.ndarray) -> np.ndarray:
    """The highest of each pixel and its eight neighbours."""
    wide = np.pad(mask, 1)
    height, width = mask.shape
    return np.max([wide[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)


@pytest.mark.parametrize("pixels", [0, 1, 3, 7])
def test_padding_is_that_many_dilations_as_in_simpletuner(pixels: int) -> None:
    mask = np.where(np.random.default_rng(0).random((20, 30)) > 0.97, 255, 0).astype(np.uint8)
    mask[4, 4] = 90
    expected = mask
    for _ in range(pixels):
        expected = dilated_once(expected)
    assert np.array_equal(padded(mask, pixels), expected)


def test_padding_beyond_the_image_fills_it() -> None:
    assert (padded(square(), 4096) == 255).all()
    assert not padded(np.zeros((3, 9), np.uint8), 5).any()


@pytest.mark.parametrize("pixels", [1, 2, 5])
def test_feathering_reaches_just_that_far_on_both_sides_of_the_edge(pixels: int) -> None:
    """Along a line through an edge: unchanged beyond, falling between, half at the edge itself."""
    mask = np.zeros((31, 60), np.uint8)
    mask[:, :30] = 255
    line = feathered(mask, pixels)[15].astype(int)
    assert (line[: 30 - pixels] == 255).all() and (line[30 + pixels :] == 0).all()
    between = line[30 - pixels - 1 : 30 + pixels + 1]
    assert (np.diff(between) < 0).all(), "it falls with every pixel"
    assert abs(line[29] + line[30] - 255) <= 1
    assert np.array_equal(feathered(mask, 0), mask)


def test_the_edge_of_the_image_is_no_edge_of_the_mask() -> None:
    assert (feathered(np.full((4, 4), 255, np.uint8), 50) == 255).all()
    assert (feathered(np.full((1, 1), 255, np.uint8), 128) == 255).all()


def test_growing_comes_before_feathering_and_inverting_last() -> None:
    mask = square()
    shaped = shape(mask, padding=3, blur=3, invert=False)
    assert (shaped[mask > 0] == 255).all(), "padding as wide as the feathering keeps the subject white"
    assert np.array_equal(shaped, feathered(padded(mask, 3), 3))
    assert np.array_equal(shape(mask, padding=3, blur=3, invert=True), 255 - shaped)
