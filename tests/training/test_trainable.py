"""Groups hold parameter names, which are resolved in the module as it is then, wrapped or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from library.training.trainable import (
    Group,
    Part,
    Trainable,
    block_groups,
    freeze_finished,
    parameter_groups,
    trainable_parameters,
)


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def blocks_of(module: nn.Module) -> Part:
    """Each layer with a learning rate of its own."""
    return Part("unet", module, 1.0, groups=block_groups(module, [0.5, 0.25], lambda name: int(name[0])))


def resolved(part: Part) -> list[nn.Parameter]:
    return [parameter for group in part.learning_groups() for parameter in part.parameters(group)]


class Wrapped(nn.Module):
    """As DistributedDataParallel holds a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def inner_compiled(module: nn.Module) -> nn.Module:
    module[1] = torch.compile(module[1])  # type: ignore[operator]
    return module


def test_groups_by_block() -> None:
    module = two_layers()
    assert blocks_of(module).groups == (
        Group("block0", ("0.weight", "0.bias"), 0.5),
        Group("block1", ("1.weight", "1.bias"), 0.25),
    )
    assert parameter_groups([blocks_of(module)]) == [
        {"params": [module[0].weight, module[0].bias], "lr": 0.5},
        {"params": [module[1].weight, module[1].bias], "lr": 0.25},
    ]
    (without_first,) = block_groups(module, [0.0, 0.25], lambda name: int(name[0]))
    assert without_first.name == "block1"


def test_without_groups_all_parameters_have_the_rate_of_the_part() -> None:
    module = two_layers()
    (group,) = parameter_groups([Part("unet", module, 0.5)])
    assert group == {"params": list(module.parameters()), "lr": 0.5}


@pytest.mark.parametrize(
    "wrap", [Wrapped, torch.compile, lambda module: torch.compile(Wrapped(module)), inner_compiled]
)
@pytest.mark.parametrize("make", [blocks_of, lambda module: Part("unet", module, 1.0)])
def test_a_wrapper_does_not_hide_parameters(
    wrap: Callable[[nn.Module], nn.Module], make: Callable[[nn.Module], Part]
) -> None:
    module = two_layers()
    own = list(module.parameters())
    trained = Trainable((make(module),), frozenset({"unet"}), write=lambda path, step, epoch: None)
    (part,) = trained.with_wrapped({module: wrap(module)}).parts
    assert list(map(id, resolved(part))) == list(map(id, own))
    assert make(part.module).learning_groups() == part.learning_groups()


def test_a_module_of_that_name_is_no_wrapper() -> None:
    module = nn.ModuleDict({"module": nn.Linear(1, 1), "other": nn.Linear(1, 1)})
    (group,) = Part("unet", module, 1.0).learning_groups()
    assert group.parameters == ("module.weight", "module.bias", "other.weight", "other.bias")


def test_groups_hold_the_parameters_of_fully_shard(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = two_layers()
    before = list(module.parameters())
    part = blocks_of(module)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        own = list(module.parameters())
        assert not {id(parameter) for parameter in before} & {id(parameter) for parameter in own}
        assert list(map(id, resolved(part))) == list(map(id, own))
        module(torch.ones(1, 2)).sum().backward()
        assert all(parameter.grad is not None for parameter in resolved(part))
    finally:
        dist.destroy_process_group()


def test_finished_parts_are_frozen_once() -> None:
    staying, ending = Part("unet", two_layers(), 1.0), Part("text_encoder1", two_layers(), 1.0, stop_after=2)
    assert freeze_finished([staying, ending], 1) == []
    assert freeze_finished([staying, ending], 2) == [ending]
    assert freeze_finished([staying, ending], 3) == []
    assert trainable_parameters([staying, ending]) == list(staying.module.parameters())
