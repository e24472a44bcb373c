"""The average of ΔW: its recursion, and the best factors of the adapter's rank while it is held."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from library.training.averaging.delta_average import DeltaAverage
from library.training.averaging.plan import AveragesPlan, EmaPlan
from library.training.averaging.weights import build_weights

CPU = torch.device("cpu")
SHARES = (0.5, 0.25, 0.25, 0.1)


def factors(out: int, into: tuple[int, ...], rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ones = [1] * (len(into) - 1)
    return torch.randn(rank, *into, generator=draw), torch.randn(out, rank, *ones, generator=draw)


def best(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """The nearest matrix of a rank, and the sum of squares that it lacks, by NumPy."""
    u, values, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ vh[:rank], float((values[rank:] ** 2).sum())


@pytest.mark.parametrize(
    ("out", "into", "rank"),
    [(12, (9,), 2), (6, (4, 3, 3), 3), (90, (120,), 2), (3, (8,), 4)],
    ids=["linear", "convolution", "by subspaces", "a rank above that of the layer"],
)
def test_the_average_of_the_products_at_the_best_of_their_rank(out: int, into: tuple[int, ...], rank: int) -> None:
    """Drifting factors: the average of four products has a higher rank than each."""
    first = factors(out, into, rank, 0)
    down, up = (nn.Parameter(factor.clone()) for factor in first)
    magnitude = nn.Parameter(torch.zeros(3))
    said: list[str] = []
    average = DeltaAverage([(down, up)], [magnitude], CPU, said.append)
    expected = (first[1].flatten(1) @ first[0].flatten(1)).double().numpy()
    expected_magnitude = 0.0
    for seed, share in enumerate(SHARES, 1):
        drift = factors(out, into, rank, seed)
        down.data.add_(drift[0], alpha=0.3)
        up.data.add_(drift[1], alpha=0.3)
        magnitude.data.fill_(seed)
        average.move(share)
        product = (up.detach().flatten(1).double() @ down.detach().flatten(1).double()).numpy()
        expected = (1 - share) * expected + share * product
        expected_magnitude = (1 - share) * expected_magnitude + share * seed
    np.testing.assert_allclose(average.deltas[0].numpy(), expected, rtol=1e-4, atol=1e-5)
    nearest, lacking = best(expected, rank)
    before = down.detach().clone(), up.detach().clone()
    with average.holding():
        held = (up.detach().flatten(1).double() @ down.detach().flatten(1).double()).numpy()
        assert magnitude.tolist() == pytest.approx([expected_magnitude] * 3)
    assert np.linalg.norm(held - nearest) < 1e-3 * np.linalg.norm(nearest)
    assert torch.equal(down, before[0]) and torch.equal(up, before[1])
    left_out = lacking / float((expected**2).sum())
    assert float(average.metadata()["ss_ema_left_out"]) == pytest.approx(left_out, rel=0.02, abs=1e-6)
    assert said == [f"EMA of ΔW: the rank of the adapter leaves out {left_out:.2%} of its energy"]


def test_an_average_of_nothing_is_nothing() -> None:
    down, up = (nn.Parameter(factor) for factor in factors(12, (9,), 2, 0))
    up.data.zero_()
    average = DeltaAverage([(down, up)], [], CPU, lambda line: None)
    with average.holding():
        assert not (up @ down).any() and bool(down.isfinite().all())
    assert average.metadata() == {"ss_ema_left_out": "0"}


def test_factors_that_are_not_trained_are_no_part_of_it() -> None:
    """Of a block with a learning rate of 0; what is trained besides the factors is averaged by itself."""
    one, frozen = ([nn.Parameter(factor) for factor in factors(4, (5,), 2, seed)] for seed in (0, 1))
    magnitude = nn.Parameter(torch.ones(4))
    plan = EmaPlan("delta", 0.9, 1, 0, on_cpu=True, saved=("_ema",), shown=("_ema",))
    optimizer = torch.optim.SGD([*one, magnitude])
    weights = build_weights(
        optimizer, AveragesPlan(plan), CPU, lambda line: None, [(one[0], one[1]), (frozen[0], frozen[1])]
    )
    assert weights.ema is not None
    assert [tuple(shadow.shape) for shadow in weights.ema.average.shadows] == [(4, 5), (4,)]
    assert weights.ema.average.size == 4 * (20 + 4)


def test_a_restored_average_goes_on_bit_for_bit() -> None:
    pairs = [[nn.Parameter(factor.clone()) for factor in factors(12, (9,), 2, 0)] for _ in range(2)]
    one, other = (DeltaAverage([(down, up)], [], CPU, lambda line: None) for down, up in pairs)
    pairs[0][0].data.add_(1)
    one.move(0.3)
    with other.holding():
        pass
    other.load([shadow.clone() for shadow in one.shadows])
    pairs[1][0].data.copy_(pairs[0][0])
    held = []
    for average, (down, up) in zip((one, other), pairs, strict=True):
        average.move(0.2)
        with average.holding():
            held.append((down.detach().clone(), up.detach().clone()))
    assert torch.equal(held[0][0], held[1][0]) and torch.equal(held[0][1], held[1][1])
    with pytest.raises(ValueError, match="other shapes"):
        one.load([torch.zeros(2, 2)])
