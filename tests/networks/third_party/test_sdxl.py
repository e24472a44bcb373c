"""Modules of others on models with two text encoders and with original names: the tree that they see, lycoris.kohya."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks.third_party.create import create_third_party, merge_third_party
from networks.third_party.stand_ins import stand_ins
from tests.networks import models

CLASSES = {  # as sd-scripts' own U-Net for SDXL has them under these names (library/sdxl_original_unet.py)
    "input_blocks.1.0": "ResnetBlock2D",
    "input_blocks.3.0": "Downsample2D",
    "input_blocks.4.1": "Transformer2DModel",
    "input_blocks.4.1.transformer_blocks.0": "BasicTransformerBlock",
    "input_blocks.4.1.transformer_blocks.0.attn1": "CrossAttention",
    "input_blocks.4.1.transformer_blocks.0.ff": "FeedForward",
    "middle_block.1": "Transformer2DModel",
    "output_blocks.2.2": "Upsample2D",
    "output_blocks.2.2.conv": "Conv2d",
    "out.2": "Conv2d",
    "time_embed.0": "Linear",
    "label_emb.0.2": "Linear",
}


@pytest.fixture
def model() -> models.Model:
    return models.small("sdxl")


@pytest.fixture(autouse=True)
def fresh_lycoris(monkeypatch: pytest.MonkeyPatch) -> None:
    """LyCORIS keeps what a preset says in class attributes for the rest of the process."""
    import lycoris.kohya

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    kind = lycoris.kohya.LycorisNetworkKohya
    for name in [name for name in vars(kind) if name.isupper()]:
        monkeypatch.setattr(kind, name, copy.deepcopy(getattr(kind, name)))


def lycoris(model: models.Model, *arguments: str, family: str = "sdxl", **named: Any) -> Any:
    torch.manual_seed(0)
    given = {"dim": 2, "alpha": 1.0} | named
    return create_third_party(
        "lycoris.kohya", model, models.PARTS[family], arguments=["algo=lora", *arguments], **given
    )


def moved(network: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return network


def equal(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_tree_that_is_seen(model: models.Model) -> None:
    seen = stand_ins(model, models.PARTS["sdxl"])
    modules = dict(seen.unet.named_modules())
    assert {path: type(modules[path]).__name__ for path in CLASSES} == CLASSES
    assert {path.partition(".")[0] for path in modules if path} == {
        "time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out",
    }  # fmt: skip
    real: Any = model["unet"]
    assert modules["input_blocks.4.1.proj_in"].weight is real.down_blocks[1].attentions[0].proj_in.weight
    assert modules["input_blocks.3.0.op"].weight is real.down_blocks[0].downsamplers[0].conv.weight
    leaves = [m for m in modules.values() if isinstance(m, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm)]
    assert len(leaves) == len([m for m in real.modules() if type(m) in {type(leaf) for leaf in leaves}])
    first, second = seen.text_encoder  # a list, as there are two
    assert first.text_model.encoder.layers[2].mlp.fc1.weight is model["text_encoder"].encoder.layers[2].mlp.fc1.weight  # type: ignore[union-attr, index]
    assert type(second).__name__ == "CLIPTextModelWithProjection" and second.text_model.encoder.layers[0].mlp.fc1


def test_a_layer_of_the_tree_that_was_replaced_is_put_in(model: models.Model) -> None:
    before = models.outputs(model)
    seen = stand_ins(model, models.PARTS["sdxl"])
    block = seen.unet.get_submodule("input_blocks.4.1")
    block.proj_in = nn.Sequential(block.proj_in, nn.ReLU())
    assert seen.attach() == 1
    assert not equal(models.outputs(model), before)
    seen.detach()
    assert equal(models.outputs(model), before)


def test_lycoris_names_layers_as_ours_are_named(model: models.Model, tmp_path: Path) -> None:
    with torch.no_grad():
        before = models.outputs(model)
        network = lycoris(model)
        ours = models.create(model, "conv_dim=2", dim=2, family="sdxl").tensors()
        network.detach()
        assert network.tensors().keys() == ours.keys()  # the preset "full": all that conv_dim reaches
        network.attach()
        moved(network)
        after = models.outputs(model)
        assert not equal(after, before)
        network.write(tmp_path / "a.safetensors", None, {})
        network.detach()
        assert equal(models.outputs(model), before)
        merge_third_party("lycoris.kohya", tmp_path / "a.safetensors", model, models.PARTS["sdxl"])
        merged = models.outputs(model)
    assert all(float((a - b).norm() / b.norm()) < 1e-5 for a, b in zip(merged, after, strict=True))


def test_each_text_encoder_gets_its_rate(model: models.Model) -> None:
    """LyCORIS has one rate for all; sd-scripts hands it the first one's."""
    network = lycoris(model, "preset=attn-mlp")
    for rates in ((1e-4, 1e-5), (1e-5, 1e-4), (0.0, 1e-4)):
        groups = network.groups({"unet": 1e-3, "text_encoder1": rates[0], "text_encoder2": rates[1]})
        found = {group.name: group.learning_rate for group in groups}
        expected = {"text_encoder1": rates[0], "text_encoder2": rates[1], "unet": 1e-3}
        assert found == pytest.approx({name: rate for name, rate in expected.items() if rate})
        assert len(groups) == len({group.description for group in groups}) == len(found)
        of_second = {id(p) for n, m in network.network.named_children() if n[:8] == "lora_te2" for p in m.parameters()}
        assert {id(p) for group in groups if group.name == "text_encoder2" for p in group.parameters} == of_second
    same = network.groups({"unet": 1e-3, "text_encoder1": 1e-4, "text_encoder2": 1e-4})
    assert [group.description for group in same] == ["textencoder", "unet"]


def test_the_refiners_one_text_encoder_has_no_number() -> None:
    network = lycoris(models.small("refiner"), "preset=attn-mlp", family="refiner")
    names = {key.split("_")[1] for key in network.tensors()}
    assert names == {"te", "unet"}


def test_the_unet_alone(model: models.Model) -> None:
    network = lycoris(model, "preset=attn-mlp", train={"unet"})
    assert {key.split("_")[1] for key in network.tensors()} == {"unet"}
    assert [group.name for group in network.groups({"unet": 1e-3})] == ["unet"]
