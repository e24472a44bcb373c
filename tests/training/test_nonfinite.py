"""Which samples are named, how many steps are skipped, and what is overflow of fp16 and what is not."""

from __future__ import annotations

import pytest
import torch

from library.options.mistakes import UserError
from library.runtime.processes import Processes
from library.training.nonfinite import OVERFLOWS_TOLD, NonFinite, Samples
from library.training.saving.state import Progress
from library.training.trainable import Part

GOOD = Samples(("good.png",), torch.tensor([0.5]), torch.tensor([3]))
BAD = Samples(("fine.png", "bad.png"), torch.tensor([0.1, torch.inf]), torch.tensor([10, 999]))


class Other(Processes):
    """Two processes, of which the other one says the same as this one would with `theirs`."""

    theirs: tuple[list[str], bool]

    def gather(self, value: object) -> list[object]:  # type: ignore[override]
        return [value, self.theirs]


def test_the_samples_at_fault_are_named_whichever_process_has_them() -> None:
    said: list[str] = []
    NonFinite(1, Processes(), said.append).skip("loss", [GOOD, BAD], Progress(step=4, epoch=2))
    assert said == [
        "the loss is not finite at step 5 (epoch 2): bad.png (loss inf, timestep 999); the step is skipped, 1 in a row "
        "of at most 1"
    ]
    processes = Other(0, 2)
    object.__setattr__(processes, "theirs", (["theirs.png (loss nan)"], True))
    NonFinite(1, processes, said.append).skip("loss", [GOOD], Progress())
    assert "theirs.png" in said[1] and "good.png" not in said[1]
    NonFinite(1, Processes(), said.append).skip("gradient", [GOOD], Progress())
    assert "the gradient is not finite at step 1 (epoch 1): good.png (loss 0.5, timestep 3)" in said[2]


def test_weights_that_are_not_finite_are_named() -> None:
    layer = torch.nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="an earlier step: unet.weight$"):
        nonfinite = NonFinite(0, Processes(), pytest.fail, (Part("unet", layer, 1.0),))
        try:
            nonfinite.skip("loss", [BAD], Progress())
        except UserError as error:
            raise UserError([type(error.mistakes[0])(error.mistakes[0].what)]) from None


def test_overflow_of_fp16_is_normal_until_the_scale_is_one() -> None:
    """With torch's own scaler: gradients that no scale makes finite bring it down from 65536."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    said: list[str] = []
    nonfinite, progress = NonFinite(0, Processes(), said.append), Progress()
    with pytest.raises(UserError, match=r"the gradient \(with loss scale 1\) is not finite at step 17 .*good.png"):
        for _ in range(30):
            scaler.scale(torch.ones(()))
            weight.grad = torch.tensor([torch.inf])
            scaler.step(optimizer)
            scaler.update()
            nonfinite.overflowed(scaler, [GOOD], progress)
            progress.step += 1
    assert weight.item() == 1
    assert nonfinite.overflows == 16 and len(said) == 16 // OVERFLOWS_TOLD
    assert list(nonfinite.report()) == ["skipped by the loss scale of fp16, which is normal at the beginning: 16 steps"]
