"""What is saved when an error ends a run: the last finished step, with its random generators, or nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.data.retries import Unreadable
from library.options.mistakes import Mistake, UserError
from library.runtime.processes import Processes
from library.training.saving.rescue import Rescue
from library.training.saving.state import Progress, RandomStates
from library.training.saving.unsaved import Unsaved

DIVERGED = Mistake("the loss is not finite", "lower the learning rate")
SAVED = f"model and state are saved as of step 7: continue with --resume {Path('out/dog-state')}"


class Recording(Rescue):
    """Records what is said and saved."""

    def __init__(self, processes: Processes | None = None, begin: int = 0) -> None:
        self.said: list[str] = []
        self.saved: list[Progress] = []
        super().__init__(processes or Processes(), self.record, RandomStates(), self.said.append, begin)

    def record(self, progress: Progress) -> Path:
        self.saved.append(progress)
        return Path("out/dog-state")


def test_the_last_finished_step_is_saved_with_its_random_generators() -> None:
    rescue = Recording()
    progress = Progress(step=7, window=7, epoch_losses=[1.0] * 7)
    torch.manual_seed(3)
    random.seed(3)
    expected = replace(progress, epoch_losses=[1.0] * 7), torch.rand(3).tolist(), random.random()
    torch.manual_seed(3)
    random.seed(3)
    rescue.remember(progress)
    progress.epoch_losses.append(2.0)
    torch.rand(5), random.random()  # dropout of a forward pass
    with pytest.raises(UserError) as raised, rescue.saving():
        raise Unreadable([DIVERGED])
    assert (rescue.saved[0], torch.rand(3).tolist(), random.random()) == expected
    assert list(raised.value.mistakes) == [Mistake(DIVERGED.what, f"{DIVERGED.remedy}; {SAVED}")]


def test_any_error_saves_and_goes_on() -> None:
    for error in (KeyError("x"), MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        rescue = Recording()
        rescue.remember(Progress(step=7))
        with pytest.raises(type(error)) as raised, rescue.saving():
            raise error
        assert raised.value is error and [each.step for each in rescue.saved] == [7] and rescue.said == [SAVED]


def test_weights_between_two_steps_are_not_saved() -> None:
    rescue = Recording()
    rescue.remember(Progress(step=7))
    rescue.forget()
    with pytest.raises(UserError, match="cut off in its middle"), rescue.saving():
        raise UserError([DIVERGED])
    assert not rescue.saved


def test_where_no_step_was_finished_nothing_is_saved() -> None:
    rescue = Recording(begin=7)
    rescue.remember(Progress(step=7))
    with pytest.raises(UserError) as raised, rescue.saving():
        raise UserError([DIVERGED])
    assert not rescue.saved and list(raised.value.mistakes) == [DIVERGED]


def test_if_saving_fails_too_both_are_told() -> None:
    rescue = Recording()

    def full(progress: Progress) -> Path:
        raise Unsaved([Mistake("the disk is full")])

    rescue.save = full
    rescue.remember(Progress(step=7))
    with pytest.raises(UserError) as raised, rescue.saving():
        raise UserError([DIVERGED])
    assert [mistake.what for mistake in raised.value.mistakes] == [DIVERGED.what, "the disk is full"]


def test_an_interrupt_saves_nothing() -> None:
    rescue = Recording()
    rescue.remember(Progress(step=7))
    with pytest.raises(KeyboardInterrupt), rescue.saving():
        raise KeyboardInterrupt
    assert not rescue.saved


def test_only_the_first_process_saves() -> None:
    rescue = Recording(Processes(1, 2))
    rescue.remember(Progress(step=7))
    with pytest.raises(UserError, match="not finite"), rescue.saving():
        raise UserError([DIVERGED])
    assert not rescue.saved


def test_shards_are_saved_by_all_processes_if_all_have_the_same_error() -> None:
    asked: list[list[str]] = []
    for rank in (0, 1):
        rescue = Recording(Processes(rank, 2))
        asked.append([])
        rescue.all_alike = lambda text: asked[-1].append(text) or True
        rescue.remember(Progress(step=7))
        with pytest.raises(UserError), rescue.saving():
            raise UserError([DIVERGED])
        assert [each.step for each in rescue.saved] == [7]
    assert asked[0] == asked[1] and len(asked[0]) == 1 and DIVERGED.what in asked[0][0]


def test_shards_are_not_saved_if_a_process_has_an_error_of_its_own() -> None:
    rescue = Recording(Processes(0, 2))
    rescue.all_alike = lambda text: False
    rescue.remember(Progress(step=7))
    with pytest.raises(UserError) as raised, rescue.saving():
        raise UserError([DIVERGED])
    assert not rescue.saved and list(raised.value.mistakes) == [DIVERGED]
