"""Weights in half precision under float32 arithmetic: the results and gradients of the rounded weights in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from library.runtime.stored_weights import compute_in_fp32, compute_in_stored_dtype

HALF = (torch.float16, torch.bfloat16)


def layers(dtype: torch.dtype, make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A layer with its weight in half precision, and its twin with the same rounded weight in float32."""
    torch.manual_seed(1)
    plain = make().requires_grad_(False)
    half = make().requires_grad_(False)
    half.load_state_dict(plain.state_dict())
    half.weight.data = half.weight.data.to(dtype)
    plain.weight.data = plain.weight.data.to(dtype).float()
    compute_in_fp32(half)
    return half, plain


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(6, 5), (2, 3, 6)),
        (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
        (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 9)),
        (lambda: nn.Conv2d(4, 6, 1, groups=2, bias=False), (2, 4, 5, 5)),
    ],
)
def test_outputs_and_gradients(dtype: torch.dtype, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    half, plain = layers(dtype, make)
    results: list[tuple[Tensor, Tensor]] = []
    for layer in (half, plain):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_(True)
        output = layer(x)
        output.square().sum().backward()
        assert x.grad is not None and output.dtype == torch.float32
        results.append((output.detach(), x.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_embeddings(dtype: torch.dtype) -> None:
    half, plain = layers(dtype, lambda: nn.Embedding(7, 4))
    ids = torch.tensor([[0, 6, 3]])
    assert half(ids).dtype == torch.float32 and torch.equal(half(ids), plain(ids))


def test_only_the_half_is_kept_for_the_way_back() -> None:
    """A float32 copy per layer would use up the saved memory."""
    half, _ = layers(torch.bfloat16, lambda: nn.Linear(64, 64))
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        half(torch.randn(2, 64, requires_grad=True))
    assert [tensor.dtype for tensor in kept if tensor.shape == (64, 64)] == [torch.bfloat16]


def test_under_autocast_a_layer_computes_as_by_itself() -> None:
    half, plain = layers(torch.bfloat16, lambda: nn.Linear(6, 5))
    x = torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half(x), plain(x)) and half(x).dtype == torch.bfloat16


def test_it_can_be_undone() -> None:
    half, _ = layers(torch.bfloat16, lambda: nn.Linear(6, 5))
    compute_in_stored_dtype(half)
    assert half.to(torch.bfloat16)(torch.randn(3, 6).bfloat16()).dtype == torch.bfloat16
