"""networks/arithmetic/combining.py: the sum of several LoRAs, exactly and at a rank."""

from __future__ import annotations

import pytest
import torch

from networks.adapter import AdapterError
from networks.arithmetic.combining import WeightedFactors, combine, largest_rank, shuffle_ranks, stack
from networks.arithmetic.factors import Factors
from tests.networks.random_loras import KERNEL, LINEAR, POINT, layer, relative


def source(name: str, ratio: float, **layers: Factors) -> WeightedFactors:
    return WeightedFactors(name, layers, lambda _: ratio)


@pytest.mark.parametrize("shape", [LINEAR, POINT, KERNEL])
def test_stacked_factors_are_the_sum(shape: tuple[int, ...]) -> None:
    one, two, three = layer(shape, 4, 4.0, 1), layer(shape, 6, 1.5, 2), layer(shape, 1, 7.0, 3)
    found = stack([(one, 0.5), (two, -1.25), (three, 2.0)])
    expected = 0.5 * one.delta().double() - 1.25 * two.delta().double() + 2.0 * three.delta().double()
    assert relative(found.delta(), expected) < 1e-6
    assert found.rank == 11 and found.scale == pytest.approx(one.scale) and found.delta().shape == shape


def test_at_a_rank_it_is_the_best_approximation_of_the_sum() -> None:
    one, two = layer(LINEAR, 4, 4.0, 1), layer(LINEAR, 6, 3.0, 2)
    found = combine([source("a", 0.7, x=one), source("b", 0.4, x=two)], largest_rank)
    whole = 0.7 * one.delta().double() + 0.4 * two.delta().double()
    u, values, vh = torch.linalg.svd(whole, full_matrices=False)
    assert relative(found.layers["x"].delta(), u[:, :6] @ values[:6].diag() @ vh[:6]) < 1e-5
    assert found.layers["x"].rank == 6
    assert found.kept == pytest.approx(float((values[:6].square().sum() / values.square().sum()).sqrt()), rel=1e-5)


def test_the_product_of_summed_factors_is_something_else() -> None:
    """What merging by averaging factors gives: cross terms, and the ratio squared."""
    one = layer(LINEAR, 4, 4.0)
    found = combine([source("a", 0.5, x=one)], largest_rank)
    assert relative(found.layers["x"].delta(), 0.5 * one.delta()) < 1e-6
    assert found.layers["x"].rank == 4


def test_a_ratio_of_0_changes_nothing() -> None:
    one, two = layer(LINEAR, 4, 2.0, 1), layer(LINEAR, 4, 2.0, 2)
    for rank in (None, largest_rank):
        found = combine([source("a", 1.0, x=one), source("b", 0.0, x=two, y=two)], rank)
        assert list(found.layers) == ["x"] and found.layers["x"] is one
    with pytest.raises(AdapterError, match="all ratios are 0"):
        combine([source("a", 0.0, x=one)])


def test_layers_that_one_has_alone_are_kept() -> None:
    one, two = layer(LINEAR, 4, 2.0, 1), layer(KERNEL, 2, 2.0, 2)
    found = combine([source("a", 1.0, x=one), source("b", 0.5, y=two)], largest_rank)
    assert found.layers["x"] is one
    assert relative(found.layers["y"].delta(), 0.5 * two.delta()) < 1e-6 and found.kept == pytest.approx(1.0)


def test_linear_layers_and_1x1_convolutions_are_the_same_layer() -> None:
    """SD2's projections are the ones in some files and the others in others; the first file decides."""
    one, two = layer(LINEAR, 4, 4.0, 1), layer(POINT, 4, 4.0, 2)
    found = stack([(one, 1.0), (two, 1.0)])
    assert relative(found.delta(), one.delta() + two.delta().flatten(1)) < 1e-6


def test_layers_of_different_models_are_refused() -> None:
    small, large = layer((8, 8), 2, 2.0), layer((8, 16), 2, 2.0)
    with pytest.raises(AdapterError, match="x is 8 x 8 in a and 8 x 16 in b"):
        combine([source("a", 1.0, x=small), source("b", 1.0, x=large)])


def test_ranks_in_another_order_are_the_same_change() -> None:
    made = layer(KERNEL, 6, 3.0)
    assert relative(shuffle_ranks(made).delta(), made.delta()) < 1e-6


def test_fp16_files_are_added_up_in_float() -> None:
    one, two = (layer(LINEAR, 4, 4.0, seed, torch.float16) for seed in (1, 2))
    found = stack([(one, 1.0), (two, 1e-3)])
    assert found.up.dtype == torch.float32
    assert relative(found.delta(), one.delta().double() + 1e-3 * two.delta().double()) < 1e-6
