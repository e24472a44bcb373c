"""Losses that are read late (--loss_read_interval) change no result: weights, optimizer, averages, schedule, losses and
what could be saved are those of a run that reads each step at once, bit for bit, whatever happens to its steps."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from library.data.batch import Unread
from library.data.order import EpochOrder
from library.objective.loss import Term
from library.options.mistakes import UserError
from library.runtime.processes import ALONE, Processes
from library.training.averaging.ema import Ema
from library.training.averaging.plan import EmaPlan
from library.training.averaging.weight_average import WeightAverage
from library.training.averaging.weights import Weights
from library.training.backward import WholeBackward
from library.training.late import Late, skips_on_device
from library.training.loop import Loop
from library.training.nonfinite import NonFinite
from library.training.plan.duration import Duration
from library.training.saving.rescue import Rescue
from library.training.saving.state import Progress, RandomStates
from library.training.steps import Steps
from library.training.trainable import Part, Trainable
from tests.training.test_loop import fake_run, left_out_of

STEPS = 18


class Small:
    """Two layers, one of which stops after step 5, and windows of two batches of one sample; `faults` by the number of
    the forward pass, `unread` by record."""

    def __init__(
        self,
        interval: int,
        faults: dict[int, str],
        unread: Sequence[int] = (),
        limit: int = 2,
        due_at: int = 7,
        processes: Processes = ALONE,
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        self.layers = [nn.Linear(3, 3), nn.Linear(3, 1)]
        for parameter in (parameter for layer in self.layers for parameter in layer.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=generator)
        groups = [{"params": [*layer.parameters()], "lr": 0.1} for layer in self.layers]
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        assert skips_on_device(self.optimizer)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        everything = [parameter for layer in self.layers for parameter in layer.parameters()]
        average = WeightAverage(everything, torch.device("cpu"))
        self.ema = Ema(average, EmaPlan("weights", 0.9, 2, 0, on_cpu=True, saved=(), shown=("",)))
        self.faults, self.unread, self.due_at = faults, unread, due_at
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.said: list[str] = []
        self.saved: list[Any] = []
        self.progress = Progress()
        self.error = ""
        self._run(interval, limit, processes)

    def _run(self, interval: int, limit: int, processes: Processes) -> None:
        parts = (Part("one", self.layers[0], 0.1, stop_after=5), Part("two", self.layers[1], 0.1))
        order = EpochOrder([0] * 16, [(64, 64)] * 16, [1] * 16, batch_sizes=[1], accumulation=2, seed=0)
        accelerator = SimpleNamespace(
            autocast=nullcontext, backward=torch.Tensor.backward, optimizer_step_was_skipped=False, scaler=None,
            unscale_gradients=lambda: None,
        )  # fmt: skip
        run = fake_run(accelerator, [], processes)
        run.log = lambda values, step: self.logged.append((step, dict(values)))
        rescue = Rescue(run.processes, self._save, RandomStates(), self.said.append, -1)
        steps = Steps(
            run=run,
            trainable=Trainable(parts, frozenset()),
            optimizer=self.optimizer,
            schedule=self.schedule,
            weights=Weights(self.optimizer, self.ema),
            left_out=left_out_of(run),
            rescue=rescue,
            nonfinite=NonFinite(limit, run.processes, self.said.append, parts),
            losses=self._losses,
            backward=WholeBackward(accelerator, self.optimizer, 0.5),
            late=Late(interval),
        )
        loop = Loop(
            run=run,
            trainable=steps.trainable,
            steps=steps,
            order=order,
            batches=lambda requests: ((request, self._batch(request)) for request in requests),
            due=(lambda progress, epoch_ended: self._keep(progress),),
            duration=Duration(STEPS, 3, order.steps_per_epoch, 0, ""),
            is_due=lambda progress: progress.step == self.due_at,
        )
        try:
            with rescue.saving():
                loop.train(self.progress)
        except (UserError, KeyError) as error:
            self.error = str(error)
        assert not steps.late.pending
        assert self.error or run.console.steps == self.progress.step

    def _batch(self, request: Any) -> Any:
        ((number, _),) = request.samples
        gone, position = number in self.unread, request.first_sample
        return SimpleNamespace(
            position=position,
            weights=torch.tensor([0.0 if gone else 1.0]),
            paths=(f"{number}.png",),
            unread=(Unread(position, f"{number}.png", "it is gone"),) if gone else (),
        )

    def _losses(self, batch: Any, step: int) -> tuple[Term, ...]:
        """A function of the place of the batch alone, as all draws are keyed."""
        fault = self.faults.get(batch.position)
        if fault == "error":
            raise KeyError(fault)
        x = torch.randn(3, generator=torch.Generator().manual_seed(batch.position))
        output = self.layers[1](self.layers[0](x)).square() * {"nan": torch.nan, None: 1.0}.get(fault, 1.0)
        if fault == "gradient":  # the loss stays finite
            output = output + (self.layers[1].bias - self.layers[1].bias.detach()).abs().sqrt()
        return (Term("denoising", output), Term("other", 0.5 * output))

    def _save(self, progress: Progress) -> Any:
        self.saved.append((progress, self.state()))
        return "state"

    def _keep(self, progress: Progress) -> None:
        if progress.step == self.due_at:
            self.saved.append((deepcopy(progress), self.state()))

    def state(self) -> Any:
        """Everything that a training state would hold, as numbers."""
        momenta = [
            [value.tolist() for value in state.values()] for state in self.optimizer.state_dict()["state"].values()
        ]
        weights = [[p.tolist() for p in layer.parameters()] for layer in self.layers]
        shadows = [shadow.tolist() for shadow in self.ema.average.shadows]
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return weights, momenta, shadows, self.ema.steps, rates, self.schedule.state_dict()["last_epoch"]


CASES: dict[str, dict[str, Any]] = {
    "nothing": {"faults": {}},
    "skipped ones, in a row and apart": {"faults": {3: "gradient", 4: "gradient", 9: "nan", 12: "gradient", 33: "nan"}},
    "before a save and the last one": {"faults": {13: "nan", 35: "nan"}},
    "one too many": {"faults": {20: "nan", 22: "gradient", 25: "nan"}},
    "the first one ends it": {"faults": {24: "nan"}, "limit": 0},
    "samples that cannot be read": {"faults": {}, "unread": (2,)},
    "nothing of a window can be read": {"faults": {21: "nan"}, "unread": (1, 2, 5, 6, 7, 8, 9)},
    "another error": {"faults": {20: "error"}},
}


@pytest.mark.parametrize("case", CASES)
def test_reading_late_changes_nothing(case: str) -> None:
    at_once, *late = (Small(interval, **CASES[case]) for interval in (1, 3, 50))
    for small in late:
        assert small.error == at_once.error
        assert small.logged == at_once.logged
        assert small.state() == at_once.state() and small.progress == at_once.progress
        assert small.saved == at_once.saved
        assert small.said == at_once.said
    assert len(at_once.saved) == 1 + bool(at_once.error) and bool(at_once.said or at_once.error) == bool(
        CASES[case]["faults"]
    )


def test_an_error_after_a_step_that_is_not_finite_saves_what_was_before_it() -> None:
    at_once, late = (Small(interval, {20: "nan", 23: "error"}) for interval in (1, 50))
    assert late.saved == at_once.saved and late.saved[-1][0].step == 10 and late.error == at_once.error


def test_the_device_is_read_once_in_so_many_steps_and_where_something_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """18 steps: at 4 and 16, for 7, where something is due, 8, the end of an epoch, and 18, the last one; step 5, after
    which a part stops, is read at once, so all before it too."""
    reads: list[list[int]] = []
    read = Late.read

    def counting(self: Late) -> Any:
        found = read(self)
        reads.extend([[step.step for step, _ in found]] if found else [])
        return found

    monkeypatch.setattr(Late, "read", counting)
    small = Small(4, {})
    assert reads == [[1, 2, 3, 4], [6, 7], [8], [9, 10, 11, 12], [13, 14, 15, 16], [17, 18]]
    assert [step for step, values in small.logged if "loss" in values] == [*range(1, 19)]
