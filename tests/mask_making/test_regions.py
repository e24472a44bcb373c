"""What each source finds, against areas known by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.mask_making import regions
from library.mask_making.regions import cut_out, filled_boxes, from_opacity, union, unlike_colours
from tests.mask_making.pictures import overlap, photograph, robot

ROBOTS = Path(__file__).resolve().parents[2] / "examples/shapes/train/10_sks robot"


@pytest.mark.parametrize("number", range(1, 7))
def test_grabcut_finds_the_robots_of_the_example(number: int) -> None:
    drawn, truth = robot(number)
    with Image.open(ROBOTS / f"robot_{number}.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert np.array_equal(pixels, drawn), "the truth belongs to another image"
    assert overlap(cut_out(pixels) > 0, truth) > 0.9


@pytest.mark.parametrize("seed", range(6))
def test_grabcut_finds_the_subject_of_a_photograph(seed: int) -> None:
    pixels, truth = photograph(seed)
    found = cut_out(pixels)
    assert set(np.unique(found)) == {0, 255}
    assert overlap(found > 0, truth) > 0.95
    assert np.array_equal(found, cut_out(pixels)), "the same image has the same mask"


def test_grabcut_cuts_the_subject_out_of_a_box_at_the_edge() -> None:
    """It touches the edge of the image, where nothing but a box can say what is background."""
    pixels, truth = photograph(1)
    rows, columns = np.nonzero(truth)
    left = columns.min() + 15
    pixels, truth = pixels[:, left:], truth[:, left:]
    box = (0, int(rows.min()) - 5, int(columns.max()) - left + 6, int(rows.max()) + 6)
    found = cut_out(pixels, filled_boxes(truth.shape, [box])) > 0
    assert overlap(found, truth) > 0.95
    assert not found[~(filled_boxes(truth.shape, [box]) > 0)].any()


def test_a_large_image_is_cut_out_in_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "_LONGEST_SIDE", 80)
    pixels, truth = photograph(2)
    found = cut_out(pixels)
    assert found.shape == (120, 160) and overlap(found > 0, truth) > 0.92


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (1, 300), (40, 40)])
def test_where_nothing_stands_out_grabcut_finds_nothing_and_keeps_boxes(size: tuple[int, int]) -> None:
    pixels = np.full((*size, 3), 90, np.uint8)
    assert not cut_out(pixels).any()
    area = filled_boxes(size, [(0, 0, 1, 1)])
    assert np.array_equal(cut_out(pixels, area), area)
    assert np.array_equal(cut_out(pixels, np.full(size, 255, np.uint8)), np.full(size, 255, np.uint8))


def test_opacity_is_the_mask_unless_there_is_no_transparency() -> None:
    opacity = np.array([[0, 128, 255]], np.uint8)
    assert from_opacity(opacity) is opacity
    assert from_opacity(np.full((2, 2), 255, np.uint8)) is None


def test_a_background_colour_is_left_out_up_to_the_tolerance_in_each_channel() -> None:
    green = [[0, 255, 0], [10, 245, 10], [11, 255, 0], [0, 244, 0], [255, 0, 0], [255, 255, 255]]
    pixels = np.array([green], np.uint8)
    assert unlike_colours(pixels, [(0, 255, 0)], 10).tolist() == [[0, 0, 255, 255, 255, 255]]
    assert unlike_colours(pixels, [(0, 255, 0), (255, 255, 255)], 0).tolist() == [[0, 255, 255, 255, 255, 0]]
    assert unlike_colours(pixels, [(0, 255, 0)], 255).tolist() == [[0] * 6]


def test_boxes_end_before_right_and_bottom_and_at_the_image() -> None:
    mask = filled_boxes((4, 5), [(1, 1, 3, 2), (-3, 3, 1, 9)])
    assert (mask // 255).tolist() == [[0, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert not filled_boxes((4, 5), [(-3, -3, 0, 0), (5, 4, 9, 9)]).any()


def test_the_union_keeps_the_highest_value() -> None:
    one, other = np.array([[0, 100, 255]], np.uint8), np.array([[7, 99, 0]], np.uint8)
    assert union([one, other], (1, 3)).tolist() == [[7, 100, 255]]
    assert union([], (1, 3)).tolist() == [[0, 0, 0]]
