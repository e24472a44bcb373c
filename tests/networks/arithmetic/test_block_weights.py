"""networks/arithmetic/block_weights.py: where layers stand in the lists of WebUIs' block weights."""

from __future__ import annotations

import pytest

from networks.arithmetic.block_weights import INDICES, block_index, block_weight, read_block_weights

LABELS = ["BASE", *(f"IN{n:02d}" for n in range(12)), "MID", *(f"OUT{n:02d}" for n in range(12))]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("lora_te_text_model_encoder_layers_3_mlp_fc1", "BASE"),
        ("lora_te2_text_model_encoder_layers_3_mlp_fc1", "BASE"),
        # input_blocks.1.1, .2.1, .4.1, .5.1, .7.1, .8.1 of the original SD1 U-Net have attention
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "IN01"),
        ("lora_unet_down_blocks_0_attentions_1_proj_in", "IN02"),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", "IN03"),
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "IN04"),
        ("lora_unet_down_blocks_2_attentions_1_proj_out", "IN08"),
        ("lora_unet_down_blocks_3_resnets_1_conv2", "IN11"),
        ("lora_unet_mid_block_attentions_0_proj_in", "MID"),
        ("lora_unet_up_blocks_0_resnets_0_conv1", "OUT00"),
        ("lora_unet_up_blocks_0_upsamplers_0_conv", "OUT02"),
        ("lora_unet_up_blocks_1_attentions_0_proj_in", "OUT03"),
        ("lora_unet_up_blocks_3_attentions_2_proj_in", "OUT11"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "IN04"),
        ("lora_unet_middle_block_1_proj_in", "MID"),
        ("lora_unet_output_blocks_5_1_proj_in", "OUT05"),
    ],
)
def test_places(name: str, label: str) -> None:
    found = block_index(name)
    assert found is not None and LABELS[found] == label


def test_lists_of_each_length() -> None:
    attention = "BASE IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"
    assert [LABELS[each] for each in INDICES[17]] == attention.split()
    sdxl = "BASE IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"
    assert [LABELS[each] for each in INDICES[12]] == sdxl.split()
    assert {length: len(places) for length, places in INDICES.items()} == {12: 12, 17: 17, 20: 20, 26: 26}


def test_ratios() -> None:
    weights = read_block_weights(str([0.5, *([1] * 6), 0.25, *([1] * 9)]))
    assert block_weight(weights, "lora_te_text_model_encoder_layers_0_mlp_fc1") == 0.5
    assert block_weight(weights, "lora_unet_mid_block_attentions_0_proj_in") == 0.25
    assert block_weight(weights, "lora_unet_down_blocks_3_resnets_1_conv2") == 1.0  # in no list of 17
    assert block_weight(weights, "lora_unet_conv_in") == 1.0


@pytest.mark.parametrize(
    ("text", "said"),
    [("[1,2", "not a JSON"), ("3", "not a list"), ("[1,2]", "2 numbers"), ('["a"]', "not a list of numbers")],
)
def test_invalid_lists_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_block_weights(text)
