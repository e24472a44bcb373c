"""Paths of the U-Nets' layers in diffusers' naming and in the original one, and their blocks as kohya counts them."""

from __future__ import annotations

import re

import pytest
from torch import nn

from library.families.sd import refiner_adapters, sdxl_adapters
from library.families.sd.layer_names import UnetNames, text_layers
from tests.networks import models
from tests.tiny_original import unet_name

FAMILIES = {"sdxl": sdxl_adapters, "refiner": refiner_adapters}
FIRST_UPSAMPLER = {"sdxl": 2, "refiner": 1}


def names(family: str) -> UnetNames:
    found: UnetNames = models.PARTS[family][-1].rename.__self__  # type: ignore[attr-defined]
    return found


def layers(family: str) -> list[str]:
    """The layers of the real U-Net, as diffusers makes it."""
    found = models.full_size(family)["unet"].named_modules()
    return [path for path, module in found if isinstance(getattr(module, "weight", None), nn.Parameter)]


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_the_original_ones_there_and_back(family: str) -> None:
    ours, real = names(family), layers(family)
    more = set(ours.layers()) - set(real)
    assert set(real) <= set(ours.layers()) and all(path.endswith("conv_shortcut") for path in more), more
    for path in real:
        original = unet_name(f"{path}.weight", FIRST_UPSAMPLER[family]).removesuffix(".weight")
        assert ours.to_file(path) == original


def test_names_at_telling_places() -> None:
    to_file = names("sdxl").to_file
    assert to_file("down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0") == (
        "input_blocks.4.1.transformer_blocks.1.attn2.to_out.0"
    )
    assert to_file("down_blocks.0.downsamplers.0.conv") == "input_blocks.3.0.op"
    assert to_file("up_blocks.0.upsamplers.0.conv") == "output_blocks.2.2.conv"
    assert to_file("mid_block.resnets.1.time_emb_proj") == "middle_block.2.emb_layers.1"
    assert to_file("add_embedding.linear_2") == "label_emb.0.2"
    assert names("refiner").to_file("up_blocks.0.upsamplers.0.conv") == "output_blocks.2.1.conv"
    assert to_file("down_blocks.1.attentions.0") == "input_blocks.4.1"  # and of the modules around layers
    assert to_file("up_blocks.0.upsamplers.0") == "output_blocks.2.2"


@pytest.mark.parametrize(
    "path",
    [
        "", "down_blocks.1", "down_blocks.0.attentions.0.proj_in", "down_blocks.3.resnets.0.conv1",
        "down_blocks.1.attentions.0.transformer_blocks.2.attn1.to_q", "mid_block.attentions.0.nothing",
        "down_blocks.2.downsamplers.0.conv",
    ],
)  # fmt: skip
def test_what_sdxl_has_not_is_no_layer(path: str) -> None:
    with pytest.raises(ValueError, match="no layer"):
        names("sdxl").to_file(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_all_parameters(family: str) -> None:
    """0 embeddings, then input, middle and output blocks, then what comes out (formats.md 7.3), by original names."""
    inputs = 9 if family == "sdxl" else 12
    first = {"input_blocks": 1, "middle_block": 1 + inputs, "output_blocks": 4 + inputs}
    found = set()
    for key, _ in models.full_size(family)["unet"].named_parameters():
        original = unet_name(key, FIRST_UPSAMPLER[family])
        place = re.match(r"(\w+_blocks?)\.(\d+)\.", original)
        last = 4 + 2 * inputs
        expected = first[place[1]] + int(place[2]) if place else last if original.startswith("out.") else 0
        assert FAMILIES[family].NAMES.block_of(key) == expected, key
        found.add(expected)
    assert found == set(range(FAMILIES[family].NAMES.blocks)) and FAMILIES["sdxl"].NAMES.blocks == 23
    with pytest.raises(ValueError, match="no layer"):
        FAMILIES[family].NAMES.block_of("down_blocks.9.resnets.0.conv1.weight")


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "refiner"])
def test_every_layer_of_the_text_encoders_is_listed(family: str) -> None:
    for part in models.PARTS[family][:-1]:
        module = models.full_size(family)[part.module]
        real = {path for path, layer in module.named_modules() if isinstance(layer, nn.Linear)}
        assert real - {"text_projection"} <= set(part.layers()), part.module
    assert "encoder.layers.3.mlp.fc1" in text_layers(4, "text_model.")
    assert "text_model.encoder.layers.4.mlp.fc1" not in text_layers(4)
