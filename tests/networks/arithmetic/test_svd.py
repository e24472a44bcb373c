"""networks/arithmetic/svd.py against torch.linalg.svd in float64."""

from __future__ import annotations

import pytest
import torch

from networks.arithmetic.svd import decompose, decompose_product, leading, quantile
from tests.networks.random_loras import KERNEL, LINEAR, layer, relative


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24), (100, 20), (20, 100)])
def test_the_best_approximation_is_that_of_linalg(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, values, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    up, down = decompose(matrix).factors(5)
    assert relative(up @ down, u[:, :5] @ values[:5].diag() @ vh[:5]) < 1e-5
    assert up.shape == (shape[0], 5) and down.shape == (5, shape[1])


@pytest.mark.parametrize("shape", [LINEAR, KERNEL])
@pytest.mark.parametrize("rank", [3, 30])  # 30: more ranks than the layer has rows
def test_a_product_is_decomposed_as_the_whole_matrix(shape: tuple[int, ...], rank: int) -> None:
    up, down = layer(shape, rank, 1.0).matrices()
    found = decompose_product(up, down)
    expected = torch.linalg.svdvals(up.double() @ down.double())
    count = min(rank, *expected.shape)
    assert torch.allclose(found.values[:count].double(), expected[:count], rtol=1e-5)
    left, right = found.factors(rank)
    assert relative(left @ right, up.double() @ down.double()) < 1e-5


def test_kept_is_the_share_of_the_norm() -> None:
    matrix = torch.diag(torch.tensor([4.0, 3.0]))
    assert decompose(matrix).kept(1) == pytest.approx(4 / 5)  # norm of (4, 3) is 5
    assert decompose(matrix).kept(2) == 1.0
    assert decompose(torch.zeros(3, 3)).kept(1) == 1.0


def test_both_factors_share_the_values() -> None:
    up, down = decompose(1e-4 * torch.randn(64, 64, generator=torch.Generator().manual_seed(2))).factors(8)
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-4)


def test_outliers_are_cut_as_sd_scripts_cuts_them() -> None:
    found = decompose(torch.randn(20, 20, generator=torch.Generator().manual_seed(3)))
    up, down = found.u[:, :4] @ found.values[:4].diag(), found.vh[:4]
    limit = torch.quantile(torch.cat([up.flatten(), down.flatten()]), 0.9)  # of signed numbers
    cut = found.factors(4, clamp_quantile=0.9)
    assert torch.allclose(cut[0], up.clamp(-limit, limit), atol=1e-6)
    assert torch.allclose(cut[1], down.clamp(-limit, limit), atol=1e-6)
    assert float(cut[0].max()) == pytest.approx(float(limit), rel=1e-4)


def test_quantiles_are_torch_s() -> None:
    numbers = torch.randn(1001, generator=torch.Generator().manual_seed(4))
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        assert quantile(numbers, share) == pytest.approx(float(torch.quantile(numbers, share)))


@pytest.mark.parametrize("shape", [(150, 90), (90, 150), (20, 30)])
def test_leading_is_the_beginning_of_the_decomposition(shape: tuple[int, int]) -> None:
    """Of a matrix with singular values that fall by a tenth: as many as an average of slow changes has, and noise."""
    draw = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, generator=draw) * 1e-3
    for power in range(12):
        left, right = (torch.randn(size, generator=draw) for size in shape)
        matrix += 0.9**power * torch.outer(left, right)
    found = leading(matrix, 4)
    expected = torch.linalg.svd(matrix.double())
    assert found.values.shape == (4,) and relative(found.values, expected.S[:4]) < 1e-5
    up, down = found.factors(4)
    nearest = (expected.U[:, :4] * expected.S[:4]) @ expected.Vh[:4]
    assert relative(up @ down, nearest) < 1e-4
    assert torch.equal(leading(matrix, 4).u, found.u)
