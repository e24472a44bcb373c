"""networks/arithmetic/resizing.py: ranks by sd-scripts' rules, and the best approximation at them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from networks.arithmetic.resizing import RankRule, choose_rank, resize
from tests.networks.random_loras import KERNEL, LINEAR, POINT, layer, relative

VALUES = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25])


@pytest.mark.parametrize("target", [1.0, 2.0, 3.0, 5.0, 9.0, 100.0])
def test_sv_ratio_keeps_what_is_above_the_largest_over_the_target(target: float) -> None:
    expected = max(1, sum(value > 8.0 / target for value in VALUES.tolist()))
    assert choose_rank(VALUES, 6, "sv_ratio", target) == expected


@pytest.mark.parametrize("target", [0.1, 0.5, 0.75, 0.9, 0.97, 0.99, 1.0])
def test_shares_are_reached_with_as_few_as_possible(target: float) -> None:
    values = VALUES.double().numpy()
    for method, parts, share in (("sv_cumulative", values, target), ("sv_fro", values**2, target**2)):
        reached = np.cumsum(parts) / parts.sum() >= share - 1e-12
        assert choose_rank(VALUES, 6, method, target) == int(np.argmax(reached)) + 1, method


def test_the_new_rank_is_the_highest_one_and_one_the_least() -> None:
    assert choose_rank(VALUES, 2, "sv_fro", 1.0) == 2
    assert choose_rank(torch.zeros(4), 4, "sv_cumulative", 0.9) == 1
    assert choose_rank(VALUES, 3) == 3


@pytest.mark.parametrize("shape", [LINEAR, POINT, KERNEL])
def test_a_lower_rank_is_the_best_approximation(shape: tuple[int, ...]) -> None:
    made = layer(shape, 8, alpha=4.0)
    found = resize(made, RankRule(3, 3))
    whole = made.delta().double().flatten(1)
    u, values, vh = torch.linalg.svd(whole, full_matrices=False)
    assert relative(found.layer.delta().flatten(1), u[:, :3] @ values[:3].diag() @ vh[:3]) < 1e-5
    assert found.layer.rank == 3 and found.layer.delta().shape == shape
    assert found.layer.alpha == pytest.approx(4.0 * 3 / 8)  # alpha / rank stays
    assert found.kept == pytest.approx(float((values[:3].square().sum() / values.square().sum()).sqrt()), rel=1e-5)


@pytest.mark.parametrize("rank", [8, 16])
def test_the_same_rank_or_a_higher_one_changes_nothing(rank: int) -> None:
    made = layer(LINEAR, 8, alpha=4.0, dtype=torch.float16)
    found = resize(made, RankRule(rank, rank))
    assert found.layer is made and found.kept == 1.0


def test_kernels_have_a_rank_of_their_own_and_points_have_not() -> None:
    rule = RankRule(6, 2)
    ranks = {shape: resize(layer(shape, 8, 8.0), rule).layer.rank for shape in (LINEAR, POINT, KERNEL)}
    assert ranks == {LINEAR: 6, POINT: 6, KERNEL: 2}


def test_a_layer_of_zeros_keeps_one_rank_of_zeros() -> None:
    made = layer(LINEAR, 4, 4.0)
    made.up.zero_()
    found = resize(made, RankRule(4, 4, "sv_fro", 0.9))
    assert found.layer.rank == 1 and found.kept == 1.0 and not found.layer.delta().any()
