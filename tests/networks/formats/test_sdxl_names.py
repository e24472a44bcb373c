"""LoRAs of SDXL and its refiner in kohya's, diffusers' and PEFT's format; which family a file is of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from networks import adapter_files
from networks.formats.convert_keys import Format
from networks.formats.layer_names import known_places
from networks.formats.read_write import read_lora, write_lora
from tests.networks import models

# Names of kohya's files -> dotted paths with the module before them, written out by hand.
PATHS = {
    "sd1": {
        "lora_unet_down_blocks_0_attentions_0_proj_in": "unet.down_blocks.0.attentions.0.proj_in",
        "lora_te_text_model_encoder_layers_11_mlp_fc1": "text_encoder.text_model.encoder.layers.11.mlp.fc1",
    },
    "sdxl": {
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q": (
            "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
        ),
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj": (
            "unet.mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj"
        ),
        "lora_unet_output_blocks_2_2_conv": "unet.up_blocks.0.upsamplers.0.conv",
        "lora_unet_input_blocks_4_0_skip_connection": "unet.down_blocks.1.resnets.0.conv_shortcut",
        "lora_te1_text_model_encoder_layers_11_mlp_fc1": "text_encoder.text_model.encoder.layers.11.mlp.fc1",
        "lora_te2_text_model_encoder_layers_31_self_attn_q_proj": (
            "text_encoder_2.text_model.encoder.layers.31.self_attn.q_proj"
        ),
    },
    "refiner": {
        "lora_unet_output_blocks_2_1_conv": "unet.up_blocks.0.upsamplers.0.conv",
        "lora_unet_input_blocks_10_0_in_layers_2": "unet.down_blocks.3.resnets.0.conv1",
        "lora_te_text_model_encoder_layers_31_mlp_fc2": "text_encoder_2.text_model.encoder.layers.31.mlp.fc2",
    },
}
FAMILIES = [models.PARTS[family] for family in ("sd1", "sdxl", "refiner")]


def lora(names: Mapping[str, str], *, dora: bool = False) -> dict[str, Tensor]:
    """A kohya file with a rank and an alpha of its own for each layer."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for index, name in enumerate(names):
        rank, kernel = 2 + index, (3, 3) if name.endswith(("_conv", "_in_layers_2")) else ()
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, 6, *kernel, generator=draw)
        tensors[f"{name}.lora_up.weight"] = torch.randn(5, rank, *(1 for _ in kernel), generator=draw)
        tensors[f"{name}.alpha"] = torch.tensor(1.5 + index)
        if dora:
            tensors[f"{name}.dora_scale"] = torch.rand(5, 1, *(1 for _ in kernel), generator=draw)
    return tensors


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("to", ["diffusers", "peft"])
@pytest.mark.parametrize("family", PATHS)
def test_there_and_back_is_the_same_file(family: str, to: Format, dora: bool, tmp_path: Path) -> None:
    """The family is told by names alone, in every format."""
    first = tmp_path / "a.safetensors"
    adapter_files.write(first, lora(PATHS[family], dora=dora), {"ss_training_comment": "собака"})
    there = write_lora(tmp_path / "there", read_lora(first, *FAMILIES)[0], to)
    again, found = read_lora(there, *FAMILIES)
    assert found == to and {layer.place.part for layer in again.layers} <= set(models.PARTS[family])
    assert write_lora(tmp_path / "b.safetensors", again, "kohya").read_bytes() == first.read_bytes()


@pytest.mark.parametrize("family", PATHS)
def test_a_diffusers_file_has_diffusers_paths(family: str, tmp_path: Path) -> None:
    tensors = lora(PATHS[family])
    adapter_files.write(tmp_path / "a.safetensors", tensors, {})
    there = write_lora(tmp_path / "there", read_lora(tmp_path / "a.safetensors", *FAMILIES)[0], "diffusers")
    assert load_file(there).keys() == {f"{path}.lora_{x}.weight" for path in PATHS[family].values() for x in "AB"}
    for name, path in PATHS[family].items():
        assert torch.equal(load_file(there)[f"{path}.lora_A.weight"], tensors[f"{name}.lora_down.weight"])


@pytest.mark.parametrize("family", ["sdxl", "refiner"])
def test_every_layer_of_the_models_has_a_place(family: str) -> None:
    places = {f"{place.part.module}.{place.bare}": place for place in known_places(models.PARTS[family])}
    assert len({place.name for place in places.values()}) == len(places)  # no name for two layers
    for module, root in models.full_size(family).items():
        for path, layer in root.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and path != "text_projection":
                assert f"{module}.{path}" in places


def test_kohyas_files_with_diffusers_names_are_sdxls_too(tmp_path: Path) -> None:
    """They come back under the names that sd-scripts gives."""
    odd = {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q": "",
        "lora_unet_up_blocks_0_attentions_2_proj_in": "",
        "lora_te2_text_model_encoder_layers_31_self_attn_q_proj": "",
    }
    adapter_files.write(tmp_path / "a.safetensors", lora(odd), {})
    made, _ = read_lora(tmp_path / "a.safetensors", *FAMILIES)
    assert [layer.place.name for layer in made.layers] == [
        "lora_te2_text_model_encoder_layers_31_self_attn_q_proj",
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q",
        "lora_unet_output_blocks_2_1_proj_in",
    ]


def test_where_names_do_not_tell_the_first_family_wins(tmp_path: Path) -> None:
    """Of SD2's and the refiner's text encoders alone the first layers have one name: those of SD are more usual."""
    names = {"lora_te_text_model_encoder_layers_3_mlp_fc1": ""}
    adapter_files.write(tmp_path / "a.safetensors", lora(names), {})
    assert read_lora(tmp_path / "a.safetensors", *FAMILIES)[0].layers[0].place.part.module == "text_encoder"
    assert read_lora(tmp_path / "a.safetensors", *FAMILIES[::-1])[0].layers[0].place.part.module == "text_encoder_2"
