"""A packed weight acts as the dense weight that it stands for, and nothing keeps the dense one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from library.runtime.packed_weight import PackedWeight
from library.runtime.stored_weights import compute_in_fp32, compute_in_stored_dtype
from tests.packing import pack, packed


def test_copies_stay_packed_and_all_else_is_as_dense() -> None:
    dense = torch.arange(-12.0, 12).view(4, 6) / 8
    weight = packed(dense)
    for copy in (weight.detach(), weight.clone(), weight.to(torch.bfloat16), weight.to("cpu"), nn.Parameter(weight)):
        assert isinstance(copy, PackedWeight) and copy.shape == (4, 6)
        assert torch.equal(copy.unpacked(torch.float32), dense)
    assert weight.bfloat16().unpacked().dtype is torch.bfloat16
    assert torch.equal(weight + 1, dense + 1) and torch.equal(weight @ dense.T, dense @ dense.T)
    assert torch.equal(weight.flatten(), dense.flatten()) and torch.equal(weight.norm(), dense.norm())
    with pytest.raises(RuntimeError, match="cannot be changed"):
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="cannot be changed"):
        weight.copy_(dense)


def test_a_module_that_is_moved_has_the_numbers_of_its_new_place() -> None:
    """nn.Module.to from a CPU to a GPU sets the data of the parameter; `_apply` is what calls it."""
    layer = pack(nn.Linear(6, 5))
    moved = packed(torch.full((5, 6), 0.5))
    layer._apply(lambda tensor: moved if tensor is layer.weight else tensor)
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.packed is moved.packed
    assert torch.equal(layer.weight.data.unpacked(), torch.full((5, 6), 0.5))
    with pytest.raises(RuntimeError, match="cannot be changed"):
        layer.weight.data = torch.zeros(5, 6)


LAYERS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Linear(6, 5), (2, 3, 6)),
    (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 9)),
]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_a_layer_computes_as_with_the_dense_weight_and_keeps_it_packed(
    make: Callable[[], nn.Module], shape: tuple[int, ...], autocast: bool
) -> None:
    layer = pack(make())
    twin = make().requires_grad_(False)
    twin.load_state_dict(
        {name: tensor.unpacked() if name == "weight" else tensor for name, tensor in layer.state_dict().items()}
    )
    compute_in_fp32(layer)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    results = []
    for each in (layer, twin):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_(True)
        kept.clear()
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            output = each(x)
        if each is layer:
            weights = [tensor for tensor in kept if tensor.shape == layer.weight.shape]
            assert weights and all(isinstance(weight, PackedWeight) for weight in weights)
        output.float().square().sum().backward()
        assert x.grad is not None
        results.append((output.detach(), x.grad))
    assert results[0][0].dtype is results[1][0].dtype
    close = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-5}
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **close)


def test_all_layers_unpack_into_the_same_memory() -> None:
    """So that there is never more than one dense weight, and none is allocated in a step."""
    layers = nn.Sequential(pack(nn.Linear(6, 5)), pack(nn.Linear(5, 3)))
    compute_in_fp32(layers)
    casts = [layer.forward.cast for layer in layers]  # type: ignore[attr-defined]
    memory = {cast(layer.weight, torch.float32).data_ptr() for cast, layer in zip(casts, layers, strict=True)}
    assert len(memory) == 1


def test_in_half_precision_it_computes_in_the_dtype_of_its_input() -> None:
    layer = pack(nn.Linear(6, 5))
    compute_in_fp32(layer)
    compute_in_stored_dtype(layer)
    x = torch.randn(3, 6).bfloat16()
    layer.to(torch.bfloat16)
    assert isinstance(layer.weight, PackedWeight)
    assert torch.equal(layer(x), functional.linear(x, layer.weight.unpacked(torch.bfloat16), layer.bias))
