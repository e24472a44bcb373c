"""networks/arithmetic/extraction.py on bare layers: what is a change, and what a LoRA holds of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from networks.arithmetic.extraction import Change, ExtractionSettings, extract
from tests.networks.random_loras import KERNEL, LINEAR, POINT, layer, relative


def change(name: str, shape: tuple[int, ...], difference: Tensor | float, part: str = "unet") -> Change:
    before = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    return Change(name, part, before, before + difference)


@pytest.mark.parametrize("shape", [LINEAR, POINT, KERNEL])
def test_a_change_of_low_rank_comes_back(shape: tuple[int, ...]) -> None:
    made = layer(shape, 3, 3.0)
    found = extract([change("x", shape, made.delta())], ExtractionSettings(3, 3))
    assert relative(found.layers["x"].delta(), made.delta()) < 1e-5
    assert found.layers["x"].delta().shape == shape and found.layers["x"].alpha == found.layers["x"].rank == 3
    assert found.kept == pytest.approx(1.0, abs=1e-5)


def test_a_rank_beyond_the_layer_is_the_layer_s() -> None:
    found = extract([change("x", (6, 4), torch.randn(6, 4))], ExtractionSettings(100))
    assert found.layers["x"].rank == 4


def test_layers_that_differ_only_by_rounding_are_skipped() -> None:
    weight = torch.randn(LINEAR, generator=torch.Generator().manual_seed(1))
    rounded = Change("x", "unet", weight, weight.half().float())
    assert list(extract([rounded], ExtractionSettings(2)).layers) == ["x"]
    found = extract([rounded], ExtractionSettings(2, unchanged_in=torch.float16))
    assert not found.layers and found.same == 1


def test_a_part_below_min_diff_is_skipped() -> None:
    small = change("te", LINEAR, torch.full(LINEAR, 0.004), "text_encoder")
    large = change("unet", LINEAR, torch.full(LINEAR, 0.004), "unet")
    found = extract([small, large], ExtractionSettings(2, min_diff={"text_encoder": 0.01}))
    assert list(found.layers) == ["unet"] and found.skipped == ["text_encoder"]
    found = extract([small, large], ExtractionSettings(2, min_diff={"text_encoder": 0.001}))
    assert list(found.layers) == ["te", "unet"] and not found.skipped
    assert list(extract([small, large], ExtractionSettings(2)).layers) == ["te", "unet"]
