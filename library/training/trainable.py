"""What a recipe trains: parts with learning rates of their own, and how what was trained is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from library.families.family import SaveAs


@dataclass(frozen=True)
class Group:
    """Parameters with one learning rate, and the name that logs have for it (lr/unet)."""

    name: str
    parameters: Sequence[nn.Parameter]
    learning_rate: float


@dataclass(frozen=True)
class Part:
    """One module that is trained: its name (`unet`, `text_encoder1`), learning rate, and the optimiser step after
    which it stays as it is (None: trained to the end). `groups`: where its parameters have several rates."""

    name: str
    module: nn.Module
    learning_rate: float
    stop_after: int | None = None
    groups: tuple[Group, ...] = ()

    def trains_at(self, finished_steps: int) -> bool:
        """Whether the optimiser step that follows `finished_steps` finished ones still trains this part."""
        return self.stop_after is None or finished_steps < self.stop_after

    def rates(self) -> tuple[Group, ...]:
        """Its groups; without any of its own, all its parameters are one."""
        return self.groups or (Group(self.name, list(self.module.parameters()), self.learning_rate),)


def block_groups(module: nn.Module, rates: Sequence[float], block_of: Callable[[str], int] | None) -> tuple[Group, ...]:
    """The parameters of a module by blocks, each block at its rate; those with a rate of 0 are in no group. `block_of`
    tells the block of a parameter's name. Without rates there are no groups."""
    if not rates or block_of is None:
        return ()
    blocks: list[list[nn.Parameter]] = [[] for _ in rates]
    for name, parameter in module.named_parameters():
        blocks[block_of(name)].append(parameter)
    return tuple(
        Group(f"block{number}", parameters, rate)
        for number, (parameters, rate) in enumerate(zip(blocks, rates, strict=True))
        if parameters and rate
    )


@dataclass(frozen=True)
class LossTags:
    """Names of losses in logs, as users of each script know them; "" is not logged."""

    step: str = "loss"
    average: str = ""
    epoch: str = "loss/epoch"


def _nothing() -> None:
    """There is nothing to do."""


def _no_writer(path: Path, save_as: SaveAs, step: int, epoch: int) -> None:
    raise NotImplementedError("the recipe has not said how what was trained is written")


def _no_values() -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Trainable:
    """What a recipe trains of a model.

    `active`: the modules of the model that gradients go through (unet, text_encoder). `write(path, save_as, step,
    epoch)` writes what was trained after so many steps. `whole_model`: frozen parts of the model are written too, so
    they keep their exact weights. `step_begins` and `epoch_begins` are called before each; `step_ended` after each
    step, and gives what is to be logged of it.
    """

    parts: tuple[Part, ...]
    active: frozenset[str]
    write: Callable[[Path, SaveAs, int, int], None] = _no_writer
    whole_model: bool = True
    tags: LossTags = field(default_factory=LossTags)
    step_begins: Callable[[], None] = _nothing
    epoch_begins: Callable[[], None] = _nothing
    step_ended: Callable[[], dict[str, float]] = _no_values


def groups_of(parts: Iterable[Part]) -> list[Group]:
    """All groups, in the order of the parts."""
    return [group for part in parts for group in part.rates()]


def parameter_groups(parts: Iterable[Part]) -> list[dict[str, object]]:
    """The optimiser's groups, in the order of the parts."""
    return [{"params": list(group.parameters), "lr": group.learning_rate} for group in groups_of(parts)]


def trainable_parameters(parts: Sequence[Part]) -> list[nn.Parameter]:
    """All parameters that still receive gradients, in a fixed order: what clipping sees."""
    return [parameter for part in parts for parameter in part.module.parameters() if parameter.requires_grad]


def freeze_finished(parts: Iterable[Part], finished_steps: int) -> list[Part]:
    """Take the parts whose end has come out of training and return those that were still training until now.

    Their gradients become None, so every optimiser leaves them alone from here on, weight decay included.
    """
    stopped = []
    for part in parts:
        parameters = list(part.module.parameters())
        if not part.trains_at(finished_steps) and any(parameter.requires_grad for parameter in parameters):
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
            part.module.eval()
            stopped.append(part)
    return stopped
