"""What a recipe trains: modules with their learning rates, and how the result is saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
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
    """Parameters with one learning rate: `name` in logs (lr/unet), and their names in the module of the part, as
    `named_parameters` returns them.

    Names instead of parameters, since wrapping a module (DDP, fully_shard) may replace its parameters.
    """

    name: str
    parameters: tuple[str, ...]
    learning_rate: float


@dataclass(frozen=True)
class Part:
    """One trained module: name (`unet`, `text_encoder1`), learning rate, and the optimizer step after which it is
    frozen (None: never). `groups`: its parameters by learning rate; without groups, all have the part's."""

    name: str
    module: nn.Module
    learning_rate: float
    stop_after: int | None = None
    groups: tuple[Group, ...] = ()

    def trains_at(self, finished_steps: int) -> bool:
        """Whether the optimizer step after `finished_steps` finished steps trains this part."""
        return self.stop_after is None or finished_steps < self.stop_after

    def learning_groups(self) -> tuple[Group, ...]:
        """Its groups, or one group of all its parameters."""
        return self.groups or (Group(self.name, tuple(named_parameters(self.module)), self.learning_rate),)

    def parameters(self, group: Group) -> list[nn.Parameter]:
        """The module's current parameters of one of its groups. Raises KeyError for an unknown name."""
        named = named_parameters(self.module)
        return [named[name] for name in group.parameters]


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module by their names in the unwrapped module: without the prefixes of torch.compile and
    checkpoint_wrapper (at any level) and of DistributedDataParallel (around the whole)."""
    parameters = dict(module.named_parameters())
    for prefix in ("_orig_mod.", "_checkpoint_wrapped_module."):
        parameters = {name.replace(prefix, ""): parameter for name, parameter in parameters.items()}
    if all(name.startswith("module.") for name in parameters):
        parameters = {name.removeprefix("module."): parameter for name, parameter in parameters.items()}
    return parameters


def block_groups(module: nn.Module, rates: Sequence[float], block_of: Callable[[str], int] | None) -> tuple[Group, ...]:
    """Groups by block, each with its learning rate from `rates`; blocks with a rate of 0 get no group. `block_of` maps
    a parameter's name to its block. Without rates there are no groups."""
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
    """Do nothing."""


@dataclass(frozen=True)
class SavedAt:
    """When a file is saved: after `step` optimizer steps, in `epoch`. `about`: more metadata, of an average of the
    weights."""

    step: int
    epoch: int
    about: Mapping[str, str] = field(default_factory=dict)


WriteModel = Callable[[Path, "SaveModelAs", SavedAt], None]
"""Saves what is trained, with the weights that the model holds now."""


def _no_writer(path: Path, save_as: SaveModelAs, at: SavedAt) -> None:
    raise NotImplementedError("the recipe sets no `write`")


def _no_values() -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Trainable:
    """What a recipe trains.

    `active`: the modules of the model that gradients pass through (unet, text_encoder). `write` saves the result.
    `whole_model`: frozen modules are saved too, so they keep their exact weights.
    `step_begins` is called before each batch, `epoch_begins` before each epoch, `step_ended` after each optimizer step;
    it returns values to log. `products`: down and up of each layer of a LoRA. `switched_off`: while this context is
    open, the model computes as the base model; None: what is trained is the model itself.
    """

    parts: tuple[Part, ...]
    active: frozenset[str]
    write: WriteModel = _no_writer
    whole_model: bool = True
    tags: LossTags = field(default_factory=LossTags)
    step_begins: Callable[[], None] = _nothing
    epoch_begins: Callable[[], None] = _nothing
    step_ended: Callable[[], dict[str, float]] = _no_values
    products: tuple[tuple[nn.Parameter, nn.Parameter], ...] = ()
    switched_off: Callable[[], AbstractContextManager[None]] | None = None

    def with_wrapped(self, wrapped: Mapping[nn.Module, nn.Module]) -> Trainable:
        """A copy whose parts hold the wrapped modules. `write` still saves the unwrapped ones."""
        return replace(self, parts=tuple(replace(part, module=wrapped[part.module]) for part in self.parts))


def all_groups(parts: Iterable[Part]) -> list[Group]:
    """All groups, in the order of the parts."""
    return [group for part in parts for group in part.learning_groups()]


def parameter_groups(parts: Iterable[Part]) -> list[dict[str, object]]:
    """The optimizer's parameter groups, in the order of the parts, with the modules' current parameters."""
    return [
        {"params": part.parameters(group), "lr": group.learning_rate}
        for part in parts
        for group in part.learning_groups()
    ]


def trainable_parameters(parts: Sequence[Part]) -> list[nn.Parameter]:
    """All parameters that still receive gradients, in a fixed order. Their joint norm is clipped."""
    return [parameter for part in parts for parameter in part.module.parameters() if parameter.requires_grad]


def freeze_finished(parts: Iterable[Part], finished_steps: int) -> list[Part]:
    """Freeze the parts whose training has ended, and return those that were not frozen before.

    Their gradients become None, so no optimizer changes them any more, not even by weight decay.
    """
    stopped = []
    for part in parts:
        if part.trains_at(finished_steps):
            continue
        parameters = list(part.module.parameters())
        if any(parameter.requires_grad for parameter in parameters):
            for parameter in parameters:
                parameter.requires_grad = False
                parameter.grad = None
            part.module.eval()
            stopped.append(part)
    return stopped


def wrap(
    accelerator: Accelerator, trainable: Trainable, optimizer: Optimizer
) -> tuple[dict[nn.Module, nn.Module], AcceleratedOptimizer]:
    """Let accelerate wrap the trained modules and the optimizer: returns the wrapped modules by the unwrapped ones, and
    the wrapped optimizer. Files and training states are written from the unwrapped modules.

    Several processes share their gradients elsewhere (gradients.py), not module by module.
    """
    unwrapped = [part.module for part in trainable.parts]
    if accelerator.num_processes == 1:
        *modules, wrapped_optimizer = accelerator.prepare(*unwrapped, optimizer)
    else:
        modules = [accelerator.prepare_model(module, evaluation_mode=True) for module in unwrapped]
        wrapped_optimizer = accelerator.prepare_optimizer(optimizer)
    return dict(zip(unwrapped, modules, strict=True)), wrapped_optimizer
