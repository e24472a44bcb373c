"""What a step costs beside the model: random draws on the CPU, and the loop itself.

    python -m benchmarks.overhead [--seconds 3]

Draws: the keyed timesteps and noise of a batch (library/objective), and its dropout key, as a share of a step of 30 ms.
Loop: steps on many small weights, where the arithmetic is next to nothing, through `library/training/steps.py` and
through a bare loop of the same arithmetic, alternating. The difference is what the loop adds to a step of any model.
Medians; on the CPU, one thread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.machine import describe  # noqa: E402
from library.data.order import BatchRequest  # noqa: E402
from library.objective.loss import Term  # noqa: E402
from library.objective.objective import Objective  # noqa: E402
from library.objective.process import VariancePreserving  # noqa: E402
from library.runtime.processes import ALONE  # noqa: E402
from library.runtime.seeds import keyed_draws, torch_generator  # noqa: E402
from library.training.averaging.weights import Weights  # noqa: E402
from library.training.backward import WholeBackward  # noqa: E402
from library.training.late import Late  # noqa: E402
from library.training.left_out import LeftOut  # noqa: E402
from library.training.nonfinite import NonFinite  # noqa: E402
from library.training.optim.clipping import clip_gradients  # noqa: E402
from library.training.saving.rescue import Rescue  # noqa: E402
from library.training.saving.state import Progress, RandomStates  # noqa: E402
from library.training.steps import Steps  # noqa: E402
from library.training.trainable import Part, Trainable  # noqa: E402

STEP = 0.030  # seconds
BATCHES = {"SD1.5, 512 px, batch 1": (1, 4, 64, 64), "SDXL, 1024 px, batch 4": (4, 4, 128, 128)}
WEIGHTS = {"LoRA of SD1.5 (384 tensors)": 384, "U-Net of SDXL (1680 tensors)": 1680}


def median(call: Callable[[], object], seconds: float) -> float:
    """Seconds of this thread in a call: what other programs take meanwhile does not count."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return statistics.median(times)


def draws(objective: Objective[Any], shape: tuple[int, ...]) -> None:
    """All that is drawn for a batch."""
    with keyed_draws(1, "dropout", 5, 5):
        objective.draw(shape, [torch_generator(1, "noise", place) for place in range(shape[0])])


class Weighty(nn.Module):
    """Many small weights, and a loss that every one of them is part of."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(8)) for _ in range(number))

    def forward(self) -> torch.Tensor:
        """() float32."""
        return torch.stack([*self.weights]).square().mean()


def trained_by_loop(number: int, interval: int) -> Callable[[], None]:
    """A step through the trainer's own code, which reads the losses of `interval` steps together."""
    module = Weighty(number)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    accelerator: Any = SimpleNamespace(
        autocast=nullcontext, backward=torch.Tensor.backward, optimizer_step_was_skipped=False, scaler=None,
        unscale_gradients=lambda: None,
    )  # fmt: skip
    run: Any = SimpleNamespace(
        accelerator=accelerator, processes=ALONE, stop=False, log=lambda values, step: None, say=lambda text: None,
        console=SimpleNamespace(count_step=lambda loss: None),
    )  # fmt: skip
    parts = (Part("part", module, 1e-4),)
    steps = Steps(
        run=run,
        trainable=Trainable(parts, frozenset()),
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        weights=Weights(optimizer),
        left_out=LeftOut(1, ALONE, print),
        rescue=Rescue(ALONE, lambda progress: Path(), RandomStates(), print, 0),
        nonfinite=NonFinite(0, ALONE, print, parts),
        losses=lambda batch, step: (Term("denoising", module()[None]),),
        backward=WholeBackward(accelerator, optimizer, 1.0),
        late=Late(interval),
    )
    progress, batch = Progress(), SimpleNamespace(weights=torch.ones(1), paths=("",), unread=())
    request = BatchRequest(1, 0, (64, 64), ((0, 0),), 0, 1, last_of_window=True)

    def step() -> None:
        window = steps.begin_window(progress)
        steps.add(request, batch, window, progress.step)  # type: ignore[arg-type]
        steps.take(window, progress)
        if len(steps.late.pending) == interval:
            steps.read(progress)

    return step


def trained_barely(number: int) -> Callable[[], None]:
    """The same arithmetic."""
    module = Weighty(number)
    parameters = [*module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        module().backward()
        clip_gradients(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    print(describe())
    print("| Draws of a batch | ms | Share of a step of 30 ms |\n|---|---|---|")
    objective: Objective[Any] = Objective(VariancePreserving.scaled_linear(), "epsilon", 0, 1000)
    for name, shape in BATCHES.items():
        took = median(partial(draws, objective, shape), seconds)
        print(f"| {name} | {took * 1e3:.3f} | {took / STEP:.2%} |", flush=True)
    print("\n| Step on small weights | bare, ms | loop adds, ms | reading every 10th, ms |\n|---|---|---|---|")
    for name, number in WEIGHTS.items():
        sides = trained_barely(number), trained_by_loop(number, 1), trained_by_loop(number, 10)
        rounds = [[median(side, seconds / 9) for side in sides] for _ in range(3)]
        bare = statistics.median(times[0] for times in rounds)
        at_once, late = (statistics.median(times[side] - times[0] for times in rounds) for side in (1, 2))
        print(f"| {name} | {bare * 1e3:.2f} | {at_once * 1e3:.2f} | {late * 1e3:.2f} |", flush=True)


if __name__ == "__main__":
    main()
