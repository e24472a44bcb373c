"""What a recipe trains: parts with learning rates of their own, and how what was trained is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from torch import nn
    from torch.optim import Optimizer

    from library.options.groups.saving import SaveModelAs


@dataclass(frozen=True)
class Group:
    """Parameters with one learning rate: their names in the module of their part (those of `named_parameters`), and
    the name that logs have for the rate (lr/unet).

    Names, since wrapping a module (DDP, fully_shard) may put other parameters in the place of its own.
    """

    name: str
    parameters: tuple[str, ...]
    learning_rate: float


@dataclass(frozen=True)
class Part:
    """One module that is trained: its name (`unet`, `text_encoder1`), learning rate, and the optimizer step after
    which it stays as it is (None: trained to the end). `groups`: where its parameters have several learning rates;
    without any, all its parameters have the one of the part."""

    name: str
    module: nn.Module
    learning_rate: float
    stop_after: int | None = None
    groups: tuple[Group, ...] = ()

    def trains_at(self, finished_steps: int) -> bool:
        """Whether the optimiser step that follows `finished_steps` finished ones still trains this part."""
        return self.stop_after is None or finished_steps < self.stop_after

    def learning_groups(self) -> tuple[Group, ...]:
        """Its groups, or the one of all its parameters."""
        return self.groups or (Group(self.name, tuple(named_parameters(self.module)), self.learning_rate),)

    def parameters(self, group: Group) -> list[nn.Parameter]:
        """The parameters of one of its groups, as the module holds them now. Raises KeyError for a name it lacks."""
        named = named_parameters(self.module)
        return [named[name] for name in group.parameters]


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module by the names that they have while nothing wraps it: without what torch.compile and
    checkpoint_wrapper add at any module, and DistributedDataParallel around the whole."""
    found = dict(module.named_parameters())
    for wrapper in ("_orig_mod.", "_checkpoint_wrapped_module."):
        found = {name.replace(wrapper, ""): parameter for name, parameter in found.items()}
    if all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): parameter for name, parameter in found.items()}
    return found


def block_groups(module: nn.Module, rates: Sequence[float], block_of: Callable[[str], int] | None) -> tuple[Group, ...]:
    """The parameters of a module by blocks, each at its learning rate; those with a rate of 0 are in no group.
    `block_of` gives the block of a parameter's name. Without rates there are no groups."""
    if not rates or block_of is None:
        return ()
    blocks: list[list[str]] = [[] for _ in rates]
    for name in named_parameters(module):
        blocks[block_of(name)].append(name)
    return tuple(
        Group(f"block{number}", tuple(names), rate)
        for number, (names, rate) in enumerate(zip(blocks, rates, strict=True))
        if names and rate
    )


@dataclass(frozen=True)
class LossTags:
    """Names of losses in logs, as users of each script know them; "" is not logged."""

    step: str = "loss"
    average: str = ""
    epoch: str = "loss/epoch"


def _nothing() -> None:
    """There is nothing to do."""


def _no_writer(path: Path, save_as: SaveModelAs, step: int, epoch: int) -> None:
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
    write: Callable[[Path, SaveModelAs, int, int], None] = _no_writer
    whole_model: bool = True
    tags: LossTags = field(default_factory=LossTags)
    step_begins: Callable[[], None] = _nothing
    epoch_begins: Callable[[], None] = _nothing
    step_ended: Callable[[], dict[str, float]] = _no_values

    def with_wrapped(self, wrapped: Mapping[nn.Module, nn.Module]) -> Trainable:
        """The same, with the module of each part replaced by what wraps it. `write` still writes the bare modules."""
        return replace(self, parts=tuple(replace(part, module=wrapped[part.module]) for part in self.parts))


def all_groups(parts: Iterable[Part]) -> list[Group]:
    """All groups, in the order of the parts."""
    return [group for part in parts for group in part.learning_groups()]


def parameter_groups(parts: Iterable[Part]) -> list[dict[str, object]]:
    """The optimizer's groups, in the order of the parts, with the parameters that the modules hold now."""
    return [
        {"params": part.parameters(group), "lr": group.learning_rate}
        for part in parts
        for group in part.learning_groups()
    ]


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


def wrap(
    accelerator: Accelerator, trainable: Trainable, optimizer: Optimizer
) -> tuple[dict[nn.Module, nn.Module], AcceleratedOptimizer]:
    """What accelerate makes of each trained module, by the module, and of the optimizer: for one process the modules
    themselves. Files and states are written from the bare ones.

    One call for all, since sharding puts new parameters into module and optimizer together.
    """
    bare = [part.module for part in trainable.parts]
    *modules, stepping = accelerator.prepare(*bare, optimizer)
    return dict(zip(bare, modules, strict=True)), stepping
