"""Where adapters sit in SDXL and its refiner, by the rules of formats.md 7.1 and 7.3 written out here."""

from __future__ import annotations

import pytest
import torch

from networks import network
from networks.settings import read_settings
from tests.networks import models

ATTENTION = [f"attn{n}_to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]
TEXT = [f"self_attn_{x}_proj" for x in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]
# transformer blocks in the attention of a block, by original names
DEPTHS = {
    "sdxl": {"input_blocks_4": 2, "input_blocks_5": 2, "input_blocks_7": 10, "input_blocks_8": 10, "middle_block": 10}
    | {f"output_blocks_{n}": 10 if n < 3 else 2 for n in range(6)},
    "refiner": dict.fromkeys([*(f"input_blocks_{n}" for n in (4, 5, 7, 8)), "middle_block"], 4)
    | {f"output_blocks_{n}": 4 for n in range(3, 9)},
}
RESNETS = {
    "sdxl": [f"input_blocks_{n}_0" for n in (1, 2, 4, 5, 7, 8)] + [f"output_blocks_{n}_0" for n in range(9)],
    "refiner": [f"input_blocks_{n}_0" for n in (1, 2, 4, 5, 7, 8, 10, 11)]
    + [f"output_blocks_{n}_0" for n in range(12)],
}
SAMPLERS = {
    "sdxl": ["input_blocks_3_0_op", "input_blocks_6_0_op", "output_blocks_2_2_conv", "output_blocks_5_2_conv"],
    "refiner": [f"input_blocks_{n}_0_op" for n in (3, 6, 9)]
    + ["output_blocks_2_1_conv", "output_blocks_5_2_conv", "output_blocks_8_2_conv"],
}
TEXTS = {"sdxl": {"lora_te1": 12, "lora_te2": 32}, "refiner": {"lora_te": 32}}


def expected(family: str) -> set[str]:
    found = {
        f"{prefix}_text_model_encoder_layers_{n}_{layer}"
        for prefix, layers in TEXTS[family].items()
        for n in range(layers)
        for layer in TEXT
    }
    for block, depth in DEPTHS[family].items():
        found |= {f"lora_unet_{block}_1_{proj}" for proj in ("proj_in", "proj_out")}
        found |= {f"lora_unet_{block}_1_transformer_blocks_{d}_{x}" for d in range(depth) for x in ATTENTION}
    resnets = [*RESNETS[family], "middle_block_0", "middle_block_2"]
    found |= {f"lora_unet_{place}_{x}" for place in resnets for x in ("in_layers_2", "out_layers_3", "emb_layers_1")}
    wider = [place for place in resnets if place.startswith(("input_blocks_4", "input_blocks_7", "output"))]
    found |= {f"lora_unet_{place}_skip_connection" for place in wider}
    return found | {f"lora_unet_{sampler}" for sampler in SAMPLERS[family]}


@pytest.mark.parametrize("family", ["sdxl", "refiner"])
def test_names_are_kohyas(family: str) -> None:
    net = models.create(models.full_size(family), "conv_dim=1", dim=1, family=family)
    assert {layer.name for layer in net.layers} == expected(family)


def test_lists_by_block_have_23_items_and_curves_9_3_9() -> None:
    dims = ["0"] * 23
    dims[5], dims[11], dims[21] = "2", "3", "4"  # input_blocks.4, middle_block.1, output_blocks.8
    model = {"unet": models.full_size("sdxl")["unet"]}
    net = models.create(model, f"block_dims={','.join(dims)}", "conv_dim=1", family="sdxl")
    downs = {key.partition(".")[0]: tensor for key, tensor in net.tensors().items() if ".lora_down." in key}
    ranks = {name: len(tensor) for name, tensor in downs.items() if tensor.ndim == 2}
    assert ranks["lora_unet_input_blocks_4_1_proj_in"] == 2 and ranks["lora_unet_middle_block_1_proj_in"] == 3
    assert ranks["lora_unet_output_blocks_8_0_emb_layers_1"] == 4
    assert {name.split("_")[2] + name.split("_")[4] for name in ranks} == {"input4", "middle1", "output8"}
    weights = ("down_lr_weight=0,0,0,0,0.5,0,0,0,0", "mid_lr_weight=0,2,0", "up_lr_weight=zeros")
    net = models.create(model, *weights, "conv_dim=1", family="sdxl")
    groups = net.groups({"unet": 1e-3})
    assert [(group.description, group.learning_rate) for group in groups] == [
        ("unet_block5", pytest.approx(5e-4)), ("unet_block11", pytest.approx(2e-3)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "blocks", "told"),
    [
        ("block_dims=" + ",".join("1" * 25), 23, "25 items"), ("block_dims=" + ",".join("1" * 29), 23, "29 items"),
        ("mid_lr_weight=0,0,0 up_lr_weight=zeros down_lr_weight=zeros", 23, "every block is 0"),
        ("mid_lr_weight=0,0,0 up_lr_weight=zeros down_lr_weight=zeros", 29, "every block is 0"),
    ],
)  # fmt: skip
def test_lists_of_another_model_are_refused(argument: str, blocks: int, told: str) -> None:
    _, mistakes = read_settings("networks.lora", arguments=argument.split(), blocks=blocks)
    assert any(told in what for what, _ in mistakes), mistakes


def test_factors_by_block_go_between_the_ends() -> None:
    for blocks, sides in ((23, 9), (29, 12)):
        given = [
            "down_lr_weight=" + ",".join("2" * sides),
            "mid_lr_weight=3,4,5",
            "up_lr_weight=" + ",".join("6" * sides),
        ]
        settings, mistakes = read_settings("networks.lora", arguments=given, blocks=blocks)
        assert not mistakes and settings.block_weights == (1, *[2] * sides, 3, 4, 5, *[6] * sides, 1)


def test_each_text_encoder_has_a_group_of_its_own() -> None:
    net = models.create(models.full_size("sdxl"), "loraplus_text_encoder_lr_ratio=4", dim=1, family="sdxl")
    found = net.groups({"unet": 1e-3, "text_encoder1": 1e-4, "text_encoder2": 1e-5})
    assert [(group.name, group.description, group.learning_rate) for group in found] == [
        ("text_encoder1", "textencoder 1", 1e-4), ("text_encoder1", "textencoder 1 plus", pytest.approx(4e-4)),
        ("text_encoder2", "textencoder 2", 1e-5), ("text_encoder2", "textencoder 2 plus", pytest.approx(4e-5)),
        ("unet", "unet", 1e-3),
    ]  # fmt: skip
    assert [len(group.parameters) for group in found] == [72, 72, 192, 192, 1444]
    only = net.groups({"unet": 0, "text_encoder1": 0, "text_encoder2": 1e-5})
    assert {group.name for group in only} == {"text_encoder2"}
    refiner = models.create(models.full_size("refiner"), dim=1, family="refiner", train={"text_encoder_2"})
    assert [group.description for group in refiner.groups({"text_encoder1": 1})] == ["textencoder"]


def test_the_two_text_encoders_never_share_a_name() -> None:
    """sd-scripts' networks.dylora gives both the prefix lora_te (formats.md 7.4)."""
    texts = {name: module for name, module in models.full_size("sdxl").items() if name != "unet"}
    net = models.create(texts, module="networks.dylora", dim=1, family="sdxl")
    names = {layer.name for layer in net.layers}
    assert len(names) == len(net.layers) == 264 and {name.split("_")[1] for name in names} == {"te1", "te2"}


def test_files_with_diffusers_names_are_read() -> None:
    """As other trainers write SDXL's (formats.md 7.1); also text encoders without the level of transformers 4."""
    model = models.full_size("sdxl")
    tensors = models.create(model, "conv_dim=1", dim=1, family="sdxl").tensors()
    renamed = {}
    for path, ours in (
        ("down_blocks_1_attentions_0_", "input_blocks_4_1_"), ("mid_block_attentions_0_", "middle_block_1_"),
        ("up_blocks_0_attentions_2_", "output_blocks_2_1_"),
    ):  # fmt: skip
        prefix = f"lora_unet_{ours}"
        renamed |= {f"lora_unet_{path}{k.removeprefix(prefix)}": v for k, v in tensors.items() if k.startswith(prefix)}
    for key in [key for key in tensors if "input_blocks_3_0_op" in key]:
        renamed[key.replace("input_blocks_3_0_op", "down_blocks_0_downsamplers_0_conv")] = tensors[key]
    for key in [key for key in tensors if key.startswith("lora_te1_text_model_encoder_layers_7")]:
        renamed[key.replace("text_model_", "")] = tensors[key]
    assert len(renamed) == 3 * (22 + 102 + 102 + 1 + 6)
    loaded = network.from_tensors(model, models.PARTS["sdxl"], renamed)
    assert loaded.tensors().keys() <= tensors.keys() and len(loaded.tensors()) == len(renamed)


def test_what_is_not_trained_has_none() -> None:
    for train, prefixes in (({"unet"}, {"unet"}), ({"text_encoder", "text_encoder_2"}, {"te1", "te2"})):
        net = models.create(models.full_size("sdxl"), dim=1, family="sdxl", train=train)
        assert {layer.name.split("_")[1] for layer in net.layers} == prefixes


def test_text_projection_is_never_reached() -> None:
    net = models.create(models.full_size("refiner"), "conv_dim=1", dim=1, family="refiner")
    assert not [layer.name for layer in net.layers if "projection" in layer.name]


@pytest.mark.parametrize("module", ["networks.lora", "networks.lokr", "networks.dylora"])
def test_laws_on_a_model_with_two_text_encoders(module: str) -> None:
    """Attached changes, detached does not; a file holds all of it; merged is as attached."""
    model = models.small("sdxl", torch.float64)
    with torch.no_grad():
        base = models.outputs(model)
        arguments = () if module == "networks.dylora" else ("conv_dim=1",)
        net = models.trained(models.create(model, *arguments, module=module, dim=2, family="sdxl").double().eval(), 0.1)
        net.attach()
        changed = models.outputs(model)
        assert all(float((a - b).norm() / b.norm()) > 1e-4 for a, b in zip(changed, base, strict=True))
        net.detach()
        assert all(torch.equal(a, b) for a, b in zip(models.outputs(model), base, strict=True))
        loaded = network.from_tensors(model, models.PARTS["sdxl"], net.tensors()).eval()
        assert loaded.tensors().keys() == net.tensors().keys()
        loaded.merge()
        for found, wanted in zip(models.outputs(model), changed, strict=True):
            assert float((found - wanted).norm() / wanted.norm()) < 1e-10
