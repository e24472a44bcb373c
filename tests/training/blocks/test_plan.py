"""Which blocks are swapped, what that saves, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from library.families.family import Family
from library.families.registry import FAMILIES
from library.training.blocks.plan import block_sizes, bytes_off_device, choose_swapped
from tests import tiny


def test_the_largest_are_swapped_and_equal_ones_spread_evenly() -> None:
    sizes = {"a": 4, "b": 9, "c": 4, "d": 4, "e": 4, "f": 1}
    assert choose_swapped(sizes, 1) == ("b",)
    assert choose_swapped(sizes, 3) == ("b", "c", "e")
    assert choose_swapped(sizes, 6) == tuple(sizes)
    assert choose_swapped(sizes, 0) == ()


def test_two_blocks_are_always_on_the_device() -> None:
    assert bytes_off_device({"a": 4, "b": 9, "c": 5}) == 4
    assert bytes_off_device({"a": 4}) == 0


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_has_blocks_that_hold_most_of_its_backbone(family: Family) -> None:
    with torch.device("meta"):
        backbone: Any = UNet2DConditionModel(**tiny.unet_config(family.name))
    shapes = {key: tuple(tensor.shape) for key, tensor in backbone.named_parameters()}
    sizes = block_sizes(shapes, family.shard_units[family.backbone])
    for block, size in sizes.items():
        assert size == sum(parameter.numel() for parameter in backbone.get_submodule(block).parameters())
    assert sum(sizes.values()) > 0.5 * sum(math.prod(shape) for shape in shapes.values())
