"""When a run evaluates and what it logs, with encoders that are looked up in a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from library.evaluation.prompts import SubjectWords, fill_in, requests_of
from library.evaluation.scores import prepare_judge
from library.options.mistakes import Mistake, UserError
from library.sampling.prompts import ImageRequest
from library.training.evaluation.evaluation import Evaluation
from library.training.evaluation.plan import EvaluationPlan
from library.training.saving.state import Progress

DIRECTIONS = {"base": (1.0, 0.0), "trained": (0.0, 1.0), "_ema": (1.0, 1.0), "real": (1.0, 0.0)}


class Table:
    """ "Images" are the names of the weights that drew them."""

    def images(self, names: Sequence[str]) -> torch.Tensor:
        return torch.tensor([DIRECTIONS[name] for name in names])

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([(1.0, 0.0)] * len(texts))


class World:
    """An evaluation of two prompts of one text and two sizes, and what it did."""

    def __init__(self, **intervals: int | None) -> None:
        self.holding, self.fails = "trained", False
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.said: list[str] = []
        self.warned: list[str] = []
        prompts = [
            fill_in(ImageRequest("a {subject}", width=side, height=64), SubjectWords("sks dog", "dog"))
            for side in (64, 128)
        ]
        plan = EvaluationPlan(
            prompts=tuple(prompts),
            images=requests_of(prompts, 2, 0),
            of_class=requests_of(prompts, 1, 0, of_class=True),
            dino=None,
            clip=None,
            real=(),
            batch_size=3,
            size=(64, 64),
            **{"every_n_steps": None, "every_n_epochs": None, **intervals},  # type: ignore[arg-type]
        )
        table: Any = Table()
        self.evaluation = Evaluation(
            plan=plan,
            judge=prepare_judge(table, table, ["real"], ["dog.png"]),  # type: ignore[list-item]
            open_drawer=lambda: nullcontext(self.draw),  # type: ignore[arg-type]
            modules=[],
            log=lambda values, step: self.logged.append((step, dict(values))),
            say=self.said.append,
            warn=self.warned.append,
            base=lambda: self.held("base"),
            versions={"": nullcontext, "_ema": lambda: self.held("_ema")},
            steps=10,
            steps_per_epoch=4,
        )

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        before, self.holding = self.holding, name
        try:
            yield
        finally:
            self.holding = before

    def draw(self, requests: Sequence[ImageRequest], seeds: Sequence[int], places: Sequence[int]) -> list[str]:
        assert len({request.width for request in requests}) == 1 and len(requests) <= 3
        if self.fails:
            raise UserError([Mistake("the image contains NaN")])
        return [self.holding] * len(requests)


def test_each_version_and_the_base_model_are_logged_once_per_name_and_step() -> None:
    world = World(every_n_steps=2, every_n_epochs=1)
    torch.manual_seed(1)
    world.evaluation.begin(Progress(epoch=1, step=0))
    for step, ended in ((1, False), (2, False), (4, False), (4, True)):
        world.evaluation.due(Progress(epoch=1, step=step, window=step), epoch_ended=ended)
    assert [step for step, _ in world.logged] == [0, 2, 2, 4, 4]
    names = [(step, name) for step, values in world.logged for name in values]
    assert len(set(names)) == len(names)
    values = {step: {} for step, _ in world.logged}  # type: dict[int, dict[str, float]]
    for step, own in world.logged:
        values[step] |= own
    assert values[0]["evaluation/dino_base"] == pytest.approx(1) and values[2]["evaluation/dino"] == pytest.approx(0)
    assert values[2]["evaluation/dino_ema"] == pytest.approx(0.5**0.5)
    # one value per prompt and size, though their text is the same
    assert {"evaluation/clip_score/00_64x64", "evaluation/clip_score/01_128x64"} <= values[4].keys()
    assert values[0]["evaluation/clip_score/01_128x64_base"] == pytest.approx(100)
    assert "base model: DINO 1.000" in world.said[0] and "4 of 4 images may copy" in world.warned[0]
    assert "step 2: DINO 0.000 [0.000, 0.000] (base model 1.000)" in world.said[1]
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))


def test_an_incomplete_last_epoch_counts() -> None:
    world = World(every_n_epochs=3)
    for step, epoch, ended in ((4, 1, True), (8, 2, True), (9, 3, False), (10, 3, False)):
        world.evaluation.due(Progress(epoch=epoch, step=step, window=step % 4), epoch_ended=ended)
    assert [step for step, _ in world.logged] == [10, 10]


def test_an_error_is_said_and_the_next_evaluation_is_tried() -> None:
    world = World(every_n_steps=1)
    world.fails = True
    world.evaluation.begin(Progress(epoch=1, step=0))
    world.evaluation.due(Progress(epoch=1, step=1), epoch_ended=False)
    assert not world.logged and not world.said
    assert world.warned and all("no evaluation" in text and "NaN" in text for text in world.warned)
    world.fails = False
    world.evaluation.due(Progress(epoch=1, step=2), epoch_ended=False)
    assert [step for step, _ in world.logged] == [2, 2]


def test_a_run_without_a_plan_never_evaluates() -> None:
    world = World()
    world.evaluation.plan = None
    world.evaluation.begin(Progress(epoch=1, step=0))
    world.evaluation.due(Progress(epoch=1, step=4), epoch_ended=True)
    assert not world.logged and not world.said
