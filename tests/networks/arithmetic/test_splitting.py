"""networks/arithmetic/splitting.py: the ranks of a DyLoRA."""

from __future__ import annotations

import math

import pytest
import torch

from networks.arithmetic.splitting import split
from tests.networks.random_loras import KERNEL, LINEAR, layer, relative


def test_each_multiple_of_the_unit_below_the_rank() -> None:
    layers = {"x": layer(LINEAR, 10, 4.0), "y": layer(KERNEL, 10, 4.0)}
    assert [rank for rank, _ in split(layers, 4)] == [4, 8]
    assert [rank for rank, _ in split(layers, 5)] == [5]


@pytest.mark.parametrize("shape", [LINEAR, KERNEL])
def test_a_split_rank_has_the_delta_of_training_at_this_rank(shape: tuple[int, ...]) -> None:
    """sd-scripts' factor in training: alpha / dim * sqrt(dim / rank)."""
    whole = layer(shape, 8, 4.0)
    up, down = (matrix.double() for matrix in whole.matrices())
    for rank, part in split({"x": whole}, 2):
        expected = 4.0 / 8 * math.sqrt(8 / rank) * (up[:, :rank] @ down[:rank])
        assert relative(part["x"].delta().flatten(1), expected) < 1e-6
        assert part["x"].rank == rank


def test_alpha_may_be_kept_as_sd_scripts_keeps_it() -> None:
    for _, part in split({"x": layer(LINEAR, 8, 4.0)}, 2, keep_alpha=True):
        assert part["x"].alpha == 4.0
    assert torch.equal(part["x"].down, layer(LINEAR, 8, 4.0).down[:6])
