"""Block swap: the same gradients bit for bit, with two blocks on the device at most, whatever else a run does."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from library.families.sd.sd import SD1
from library.runtime.stored_weights import compute_in_fp32
from library.training.blocks.checkpoints import Checkpoints, checkpoint_activations, every_second
from library.training.blocks.place import place
from library.training.blocks.plan import BlocksPlan, block_sizes
from library.training.blocks.swap import BlockSwap
from tests import tiny
from tests.packing import pack

CPU = torch.device("cpu")
UNET_BLOCKS = SD1.shard_units["unet"]


def unet() -> Any:
    return tiny.small_unet().requires_grad_(requires_grad=False)


def swapping(names: Sequence[str]) -> BlocksPlan:
    return BlocksPlan("U-Net", swapped=tuple(names))


def blocks_of(model: nn.Module) -> list[str]:
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    return [*block_sizes(shapes, UNET_BLOCKS)]


class Adapted:
    """A linear layer with something that is trained beside it, as adapters have it."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.base = layer, layer.forward
        self.down = nn.Parameter(torch.randn(2, layer.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(layer.out_features, 2) * 0.1)
        layer.forward = self.forward  # type: ignore[method-assign]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def adapted(model: nn.Module) -> list[nn.Parameter]:
    """Freeze a model and train something in each transformer block and in the timestep's layers of each resnet."""
    model.requires_grad_(requires_grad=False)
    torch.manual_seed(1)
    names = ("to_q", "time_emb_proj", "conv_shortcut")
    layers = [Adapted(m) for name, m in model.named_modules() if name.endswith(names) and isinstance(m, nn.Linear)]
    return [parameter for layer in layers for parameter in (layer.down, layer.up)]


def output(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noisy, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 64, generator=generator)
    result: torch.Tensor = model(noisy, torch.tensor([10, 700]), encoder_hidden_states=states, return_dict=False)[0]
    return result


def gradients(model: Any, trained: list[nn.Parameter], passes: int = 2) -> list[torch.Tensor]:
    for _ in range(passes):  # the first shows the order
        for parameter in trained:
            parameter.grad = None
        output(model).square().mean().backward()
    return [parameter.grad for parameter in trained if parameter.grad is not None]


def watch(swap: BlockSwap) -> list[int]:
    """How many blocks are on the device whenever one has been copied there: held by the swap, or by autograd."""
    copies: list[weakref.ReferenceType[Any]] = []
    alive: list[int] = []
    fetch = swap._fetch

    def fetching(block: Any) -> Any:
        copied = fetch(block)
        copies.append(weakref.ref(copied.memory.untyped_storage()))
        alive.append(sum(reference() is not None for reference in copies))
        return copied

    swap._fetch = fetching  # type: ignore[method-assign]
    return alive


CHECKPOINTING = {"none": None, "all": Checkpoints(), "attention": Checkpoints(keeps_attention=True), "half": "half"}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("number", [3, None])
def test_gradients_are_the_same_bit_for_bit(checkpointing: str, number: int | None) -> None:
    plain = unet()
    swapped = copy.deepcopy(plain)
    expected = gradients(plain, adapted(plain))
    trained = adapted(swapped)
    names = blocks_of(swapped)
    if (chosen := CHECKPOINTING[checkpointing]) is not None:
        blocks = [swapped.get_submodule(name) for name in names]
        checkpoint_activations(
            swapped.train(), Checkpoints(every_second(blocks)) if isinstance(chosen, str) else chosen
        )
    before = {name: parameter.clone() for name, parameter in swapped.named_parameters()}
    swap = place(swapped.requires_grad_(requires_grad=False), swapping(names[:number]), CPU, pytest.fail)
    assert swap is not None
    alive = watch(swap)
    found = gradients(swapped, trained)
    assert len(found) == len(expected) > 10
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert max(alive) == 2, "autograd keeps the weights of blocks that have computed"
    for name, parameter in swapped.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_weights_in_half_precision_and_packed_ones_are_swapped_too() -> None:
    plain = unet()
    for module in plain.modules():
        if isinstance(module, nn.Linear):
            pack(module)
        elif isinstance(module, nn.Conv2d):
            module.half()
            module.bias = None if module.bias is None else nn.Parameter(module.bias.float())
    swapped = copy.deepcopy(plain)
    for model in (plain, swapped):
        compute_in_fp32(model)
    expected = gradients(plain, adapted(plain))
    trained = adapted(swapped)
    swap = place(swapped, swapping(blocks_of(swapped)), CPU, pytest.fail)
    assert swap is not None and any(block.packed for block in swap.blocks)
    alive = watch(swap)
    found = gradients(swapped, trained)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert max(alive) == 2


def test_without_gradients_blocks_come_and_go_in_any_order() -> None:
    model = unet()
    with torch.no_grad():
        expected = output(model)
        swap = place(model, swapping(blocks_of(model)), CPU, pytest.fail)
        assert swap is not None
        alive = watch(swap)
        for _ in range(2):
            assert torch.equal(output(model), expected)
        for block in reversed(swap.blocks):
            assert not any(parameter is None for parameter in block.at_home)
            block.compute_with(swap._arrive(block))
            block.go_home()
    assert max(alive) == 2


def test_an_error_in_a_block_brings_its_weights_home() -> None:
    model = unet()
    names = blocks_of(model)
    home = place(model, swapping(names), CPU, pytest.fail)
    assert home is not None
    first = dict(model.named_parameters())
    handle = model.get_submodule(names[0]).norm1.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output(model)
    handle.remove()
    assert all(parameter is first[name] for name, parameter in model.named_parameters())
    output(model)


def test_a_trained_block_is_not_swapped() -> None:
    model = unet()
    names = blocks_of(model)
    model.get_submodule(names[0]).norm1.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="trained"):
        place(model, swapping(names), CPU, pytest.fail)
