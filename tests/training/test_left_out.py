"""How many samples may be left out, and what is saved when there are too many."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.data.batch import Unread
from library.data.retries import Unreadable
from library.options.mistakes import Mistake, UserError
from library.runtime.processes import Processes
from library.training.left_out import LeftOut
from library.training.saving.state import Progress, RandomStates


class Counting(LeftOut):
    """Records what is said and saved."""

    def __init__(self, images: int, processes: Processes | None = None) -> None:
        self.said: list[str] = []
        self.saved: list[Progress] = []
        super().__init__(images, processes or Processes(), self.said.append, self._record, RandomStates())

    def _record(self, progress: Progress) -> Path:
        self.saved.append(progress)
        return Path("out/dog-state")


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


def test_the_last_finished_step_is_saved_with_its_random_generators() -> None:
    """Windows in which nothing was read come again when the run is resumed."""
    left_out = Counting(images=1000)
    left_out.window_begins(Progress(step=6, window=6, epoch_losses=[1.0] * 6))
    left_out.count(unread(48), 8, 7)
    progress = Progress(step=7, window=7, epoch_losses=[1.0] * 7)
    torch.manual_seed(3)
    random.seed(3)
    expected = replace(progress, epoch_losses=[1.0] * 7), torch.rand(3).tolist(), random.random()
    torch.manual_seed(3)
    random.seed(3)
    for _ in range(2):
        left_out.window_begins(progress)
        torch.rand(5), random.random()  # dropout of the forward passes
        left_out.count(unread(progress.step * 8, progress.step * 8 + 1), 2, progress.step + 1)
        progress.step += 1
        progress.window += 1
    with pytest.raises(UserError) as raised, left_out.saving():
        raise Unreadable([Mistake("10 samples in a row could not be read", "make the files readable again")])
    assert (left_out.saved[0], torch.rand(3).tolist(), random.random()) == expected
    assert not isinstance(raised.value, Unreadable)
    (mistake,) = raised.value.mistakes
    assert mistake.what == "10 samples in a row could not be read"
    assert mistake.remedy == (
        "make the files readable again; model and state are saved as of step 7: continue with --resume "
        f"{Path('out/dog-state')}"
    )


def test_if_saving_fails_too_both_are_told() -> None:
    left_out = Counting(images=10)

    def full(progress: Progress) -> Path:
        raise UserError([Mistake("the disk is full")])

    left_out.save = full
    left_out.window_begins(Progress())
    with pytest.raises(UserError) as raised, left_out.saving():
        raise Unreadable([Mistake("nothing can be read")])
    assert [mistake.what for mistake in raised.value.mistakes] == ["nothing can be read", "the disk is full"]


def test_only_the_first_process_saves() -> None:
    left_out = Counting(10, Processes(1, 2))
    left_out.window_begins(Progress())
    with pytest.raises(UserError, match="nothing can be read"), left_out.saving():
        raise Unreadable([Mistake("nothing can be read")])
    assert not left_out.saved


def test_other_mistakes_save_nothing() -> None:
    left_out = Counting(images=10)
    left_out.window_begins(Progress())
    with pytest.raises(UserError, match="not finite"), left_out.saving():
        raise UserError([Mistake("the loss is not finite")])
    assert not left_out.saved
