"""LoHa: ΔW from its factors (arXiv 2108.06098), its gradients, and its rank dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from networks import loha
from networks.adapter import AdapterError, LayerSettings
from tests.networks import layers


def made(shape: str, dim: int = 3, rank_dropout: float = 0.0, **own: Any) -> tuple[Any, Any]:
    module = layers.base(shape)
    torch.manual_seed(1)
    settings = LayerSettings(dim=dim, alpha=6.0, rank_dropout=rank_dropout, own=own)
    return module, layers.nudge(loha.create(layers.layer(module), settings, module.weight).double())


@pytest.mark.parametrize("shape", layers.SHAPES)
def test_it_is_the_papers_product(shape: str) -> None:
    module, adapter = made(shape)
    held = layers.file_of(adapter)
    first, second = held["hada_w1_a"] @ held["hada_w1_b"], held["hada_w2_a"] @ held["hada_w2_b"]
    expected = 6 / 3 * (first * second).reshape(module.weight.shape)
    assert torch.allclose(adapter.delta(module.weight), expected, rtol=1e-12, atol=1e-12)
    assert torch.linalg.matrix_rank(expected.flatten(1)) == 9, "dim², more than a LoRA of its size can have"


def test_the_gradients_of_the_product() -> None:
    torch.manual_seed(1)
    factors = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((5, 2), (2, 4), (5, 2), (2, 4))]
    assert torch.autograd.gradcheck(loha._Product.apply, factors)


@pytest.mark.parametrize("shape", ["linear", "strided"])
@pytest.mark.parametrize("dim", [2, 4])
def test_rank_dropout_drops_outputs(shape: str, dim: int) -> None:
    module, adapter = made(shape, dim, rank_dropout=0.5)
    assert adapter.train().fused_forward(layers.example(module), module.weight, module.bias, 1.0) is None
    x = layers.example(module)
    whole = layers.changed(module, x, adapter.delta(module.weight)) - module(x)
    assert torch.allclose(adapter.eval().bypass(x), whole, rtol=1e-10, atol=1e-10)
    torch.manual_seed(2)
    found = adapter.train().bypass(x)
    axis = 1 if found.ndim == 4 else -1
    kept = found.movedim(axis, 0).flatten(1).any(1)
    assert 0 < kept.sum() < len(kept)
    expected = whole.movedim(axis, 0) * 2
    expected[~kept] = 0
    assert torch.allclose(found.movedim(axis, 0), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", layers.SHAPES)
def test_of_a_small_dim_it_is_computed_as_a_lora_of_rank_dim_squared(shape: str) -> None:
    module, adapter = made(shape, dim=2)
    x = layers.example(module).requires_grad_()
    expected = layers.changed(module, x, adapter.delta(module.weight))
    found = module(x) + adapter.bypass(x)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)
    torch.manual_seed(1)
    toward = torch.randn_like(expected)
    wanted = [x, *adapter.parameters()]
    for ours, plain in zip(
        torch.autograd.grad(found, wanted, toward), torch.autograd.grad(expected, wanted, toward), strict=True
    ):
        assert torch.allclose(ours, plain, rtol=1e-9, atol=1e-9)
    if shape == "linear":
        fused = adapter.fused_forward(x, module.weight, module.bias, 0.5)
        half = layers.changed(module, x, adapter.delta(module.weight) * 0.5)
        assert torch.allclose(fused, half, rtol=1e-10, atol=1e-10)


def test_of_a_large_dim_there_is_no_second_way() -> None:
    """W + ΔW is cheaper then."""
    module, adapter = made("linear", dim=4)
    assert not hasattr(adapter, "bypass")
    assert adapter.fused_forward(layers.example(module), module.weight, module.bias, 1.0) is None


def test_a_core_alone_is_refused() -> None:
    module, adapter = made("conv3", use_tucker=True)
    held = layers.file_of(adapter)
    del held["hada_t2"]
    with pytest.raises(AdapterError, match="has no hada_t2"):
        loha.load(layers.layer(module), held)
