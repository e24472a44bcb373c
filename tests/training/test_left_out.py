"""How many samples may be left out."""

from __future__ import annotations

import pytest

from library.data.batch import Unread
from library.data.retries import Unreadable
from library.runtime.processes import Processes
from library.training.left_out import LeftOut


class Counting(LeftOut):
    """Records what is said."""

    def __init__(self, images: int, processes: Processes | None = None) -> None:
        self.said: list[str] = []
        super().__init__(images, processes or Processes(), self.said.append)


def unread(*positions: int) -> list[Unread]:
    """One image per position."""
    return [Unread(position, f"{position}.png", f"image {position}.png cannot be decoded") for position in positions]


def test_each_sample_is_named_and_all_are_counted() -> None:
    left_out = Counting(images=100)
    assert left_out.count([], 4, 1) == 4 and not left_out.said
    assert left_out.count(unread(8, 5), 4, 2) == 2
    assert left_out.count([replace_path(unread(11)[0], "8.png")], 4, 3) == 3
    assert left_out.said == [
        "step 2: sample left out: image 5.png cannot be decoded",
        "step 2: sample left out: image 8.png cannot be decoded",
        "step 3: sample left out: image 11.png cannot be decoded",
    ]
    left_out.report()
    assert left_out.said[-1] == "left out, as they could not be read: 3 samples of 2 images (5.png, 8.png)"


def replace_path(sample: Unread, path: str) -> Unread:
    return sample._replace(path=path)


def test_a_window_of_which_nothing_was_read_is_told_apart() -> None:
    left_out = Counting(images=100)
    for positions, nothing in (((), False), ((8, 9), True), ((10,), False)):
        left_out.count(unread(*positions), 2, 1)
        assert left_out.nothing_read is nothing


def test_a_run_that_left_nothing_out_says_nothing() -> None:
    left_out = Counting(images=3)
    left_out.count([], 4, 1)
    left_out.report()
    assert not left_out.said


@pytest.mark.parametrize(("images", "allowed"), [(1, 1), (5, 1), (19, 1), (20, 2), (29, 2), (30, 3), (100, 10)])
def test_a_tenth_of_the_images_and_always_one_may_be_left_out(images: int, allowed: int) -> None:
    left_out = Counting(images)
    positions = range(0, 2 * allowed, 2)  # never two in a row
    for step, position in enumerate(positions, 1):
        left_out.count(unread(position), 8, step)
        left_out.count(unread(position), 8, step)  # the same image again is still one image
    with pytest.raises(Unreadable, match=rf"{allowed + 1} of {images} image.* more than 10%: 0.png, "):
        left_out.count(unread(2 * allowed), 8, allowed + 1)


def test_ten_samples_in_a_row_end_the_run() -> None:
    """Over windows; one sample that is read in between begins the count again."""
    left_out = Counting(images=1000)
    left_out.count(unread(*range(5)), 5, 1)
    left_out.count(unread(*range(5, 9)), 5, 2)  # nine, then one that is read
    left_out.count(unread(*range(10, 19)), 10, 3)
    with pytest.raises(Unreadable, match="10 samples in a row"):
        left_out.count(unread(19), 5, 4)
