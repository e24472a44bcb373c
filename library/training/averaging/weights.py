"""The versions of the trained weights, and how the model holds one of them while it is saved, drawn with or validated.

A version is named by the suffix of its files: "" is the one that every run has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from library.messages import readable_bytes
from library.options.mistakes import Mistake, UserError
from library.training.averaging.delta_average import DeltaAverage, Product
from library.training.averaging.ema import Ema
from library.training.averaging.plan import SUFFIX, AveragesPlan
from library.training.averaging.posthoc import PosthocEma
from library.training.averaging.power_profiles import WIDTHS
from library.training.averaging.weight_average import WeightAverage, restored

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

Versions = Mapping[str, Callable[[], AbstractContextManager[None]]]
"""By suffix: while the context is open, the model holds that version."""


@dataclass(frozen=True)
class Weights:
    """The weights in training, and what is saved, drawn with and validated beside or in place of them.

    The version "" is the average of a schedule-free optimizer (arXiv 2405.15682), for others the weights in training;
    "_ema" is their moving average. `posthoc` is only saved, as snapshots. `together(suffix)`: lets all processes of a
    sharded run hold the same version. `optimizer` is the unwrapped one, not accelerate's; it exchanges the weights for
    their average while `exchanging()` is open.
    """

    optimizer: Optimizer
    ema: Ema | None = None
    posthoc: PosthocEma | None = None
    together: Callable[[str], AbstractContextManager[None]] = lambda suffix: nullcontext()
    exchanging: Callable[[], AbstractContextManager[None]] = nullcontext

    def update(self, held: Tensor | None = None) -> None:
        """Called after each optimizer step. A schedule-free optimizer averages in its step. `held`: () on the device, 1
        if the step was left out there, which then leaves the averages as they are."""
        for average in (self.ema, self.posthoc):
            if average is not None:
                average.update(held)

    def putting_back(self) -> Callable[[], None]:
        """What puts back the numbers of steps that the averages have counted now."""
        counted = [(average, average.steps) for average in (self.ema, self.posthoc) if average is not None]

        def put_back() -> None:
            for average, steps in counted:
                average.steps = steps

        return put_back

    def shown(self) -> Versions:
        """The versions that images are drawn with and that are validated."""
        suffixes = ("",) if self.ema is None else self.ema.plan.shown
        return {suffix: partial(self.holding, suffix) for suffix in suffixes}

    def metadata(self, suffix: str) -> dict[str, str]:
        """What a file of this version says of it."""
        return self.ema.metadata() if suffix == SUFFIX and self.ema is not None else {}

    @contextmanager
    def holding(self, suffix: str) -> Iterator[None]:
        """While this is open, the model holds the version whose files end in `suffix`.

        Afterwards the weights in training are put back bit for bit. So saving does not affect the run.
        """
        with self.together(suffix), self._holding(suffix):
            yield

    @contextmanager
    def _holding(self, suffix: str) -> Iterator[None]:
        averaging: Any = self.optimizer
        if suffix == SUFFIX and self.ema is not None:
            with self.ema.holding():
                yield
        elif averages_itself(averaging):
            # the optimizer's own formula for the way back rounds: a copy does not
            with restored(trained_parameters(self.optimizer)):
                with self.exchanging():
                    averaging.eval()
                try:
                    yield
                finally:
                    with self.exchanging():
                        averaging.train()
        else:
            yield


def averages_itself(optimizer: Any) -> bool:
    """Whether this is a schedule-free optimizer: its `eval` and `train` exchange the weights."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


def trained_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters of an optimizer, in its order. Those whose training has stopped are among them."""
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def build_weights(
    optimizer: Optimizer,
    plan: AveragesPlan,
    device: torch.device,
    say: Callable[[str], None],
    products: Sequence[Product] = (),
    exchanging: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Weights:
    """The versions of a run, before its first step; `products`: see Trainable, `exchanging`: see Weights. Raises
    UserError for an optimizer that averages by itself, which the plan cannot know of one given by its class."""
    ema = posthoc = None
    if plan.ema is not None:
        _refuse_second_average(optimizer, "use_ema")
        place = torch.device("cpu") if plan.ema.on_cpu else device
        ema = Ema(
            _delta_average(optimizer, products, place, say) if plan.of_delta else _average(optimizer, place), plan.ema
        )
        say(f"EMA of {plan.ema.title}: {readable_bytes(ema.average.size)} {plan.ema.place}")
    if plan.posthoc is not None:
        _refuse_second_average(optimizer, "posthoc_ema_snapshots")
        place = torch.device("cpu") if plan.posthoc.on_cpu else device
        averages = {width: _average(optimizer, place) for width in WIDTHS}
        posthoc = PosthocEma(averages, plan.posthoc)
        say(f"post-hoc EMA: {readable_bytes(posthoc.size)} {plan.posthoc.place}")
    return Weights(optimizer, ema, posthoc, exchanging=exchanging)


def _average(optimizer: Optimizer, place: torch.device) -> WeightAverage:
    return WeightAverage(trained_parameters(optimizer), place)


def _delta_average(
    optimizer: Optimizer, products: Sequence[Product], place: torch.device, say: Callable[[str], None]
) -> DeltaAverage:
    """The average of the products that are trained, and of the other trained parameters by themselves."""
    trained = {id(parameter): parameter for parameter in trained_parameters(optimizer)}
    chosen = [product for product in products if all(id(factor) in trained for factor in product)]
    for product in chosen:
        for factor in product:
            del trained[id(factor)]
    return DeltaAverage(chosen, list(trained.values()), place, say)


def _refuse_second_average(optimizer: Optimizer, flag: str) -> None:
    if averages_itself(optimizer):
        what = f"--{flag}: the optimizer {type(optimizer).__name__} averages the weights itself"
        raise UserError((Mistake(what, f"remove --{flag}, or use another optimizer such as AdamW"),))
