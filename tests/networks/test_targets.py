"""Which layers are adapted and what they are called: counts per model (formats.md 7.1) and a frozen list of names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.families.sd.sd_adapters import SD_ADAPTERS
from networks import network
from networks.adapter import AdapterError
from networks.settings import read_settings
from tests.networks import models

NAMES = Path(__file__).parent / "names"
COUNTS = {  # text encoders, U-Net, tensors; of the refiner, which sd-scripts has not, by the layers of its modules
    ("sd1", False): ([72], 192, 792),
    ("sd1", True): ([72], 278, 1050),
    ("sd2", False): ([138], 192, 990),
    ("sd2", True): ([138], 278, 1248),
    ("sdxl", False): ([72, 192], 722, 2958),
    ("sdxl", True): ([72, 192], 788, 3156),
    ("refiner", False): ([192], 462, 1962),
    ("refiner", True): ([192], 548, 2220),
}


@pytest.mark.parametrize(("family", "convolutions"), COUNTS)
def test_counts_of_full_size_models(family: str, convolutions: bool) -> None:
    arguments = ["conv_dim=1"] if convolutions else []
    net = models.create(models.full_size(family), *arguments, dim=1, family=family)
    texts, unet, tensors = COUNTS[family, convolutions]
    assert net.counts == {f"text_encoder{n}": count for n, count in enumerate(texts, 1)} | {"unet": unet}
    assert len(net.state_dict()) == len(net.tensors()) == tensors


def test_kinds_of_layers_of_sd1() -> None:
    net = models.create(models.full_size("sd1"), "conv_dim=2", dim=1, train={"unet"})
    shapes = [tuple(tensor.shape) for key, tensor in net.tensors().items() if key.endswith("lora_down.weight")]
    assert len([shape for shape in shapes if shape[2:] == (3, 3) and shape[0] == 2]) == 50
    assert len([shape for shape in shapes if shape[2:] == (1, 1) and shape[0] == 1]) == 32 + 14
    assert len([shape for shape in shapes if len(shape) == 2 and shape[0] == 1]) == 160 + 22


def test_projections_of_sd2_are_matrices_in_files() -> None:
    tensors = models.create(models.full_size("sd2"), dim=1).tensors()
    assert all(tensor.ndim == 2 for key, tensor in tensors.items() if "proj_in.lora" in key or "proj_out.lora" in key)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_names_are_frozen(family: str) -> None:
    names = sorted(
        {key.partition(".")[0] for key in models.create(models.full_size(family), "conv_dim=1", dim=1).tensors()}
    )
    assert names == (NAMES / f"{family}.txt").read_text(encoding="utf-8").split()


def test_the_frozen_names_are_kohyas() -> None:
    """Each by the rules of formats.md 7.1, written out here."""
    attention = [f"attn{n}_to_{x}" for n in (1, 2) for x in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]
    expected = {
        f"lora_te_text_model_encoder_layers_{i}_{layer}"
        for i in range(12)
        for layer in [f"self_attn_{x}_proj" for x in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]
    }
    transformers = [f"down_blocks_{i}_attentions_{j}" for i in range(3) for j in range(2)] + ["mid_block_attentions_0"]
    transformers += [f"up_blocks_{i}_attentions_{j}" for i in range(1, 4) for j in range(3)]
    for place in transformers:
        expected |= {f"lora_unet_{place}_{proj}" for proj in ("proj_in", "proj_out")}
        expected |= {f"lora_unet_{place}_transformer_blocks_0_{layer}" for layer in attention}
    resnets = [f"down_blocks_{i}_resnets_{j}" for i in range(4) for j in range(2)]
    resnets += [f"up_blocks_{i}_resnets_{j}" for i in range(4) for j in range(3)]
    resnets += [f"mid_block_resnets_{j}" for j in range(2)]
    expected |= {f"lora_unet_{place}_{layer}" for place in resnets for layer in ("conv1", "conv2", "time_emb_proj")}
    narrow = ["down_blocks_1_resnets_0", "down_blocks_2_resnets_0"] + [place for place in resnets if place[:2] == "up"]
    expected |= {f"lora_unet_{place}_conv_shortcut" for place in narrow}
    expected |= {f"lora_unet_down_blocks_{i}_downsamplers_0_conv" for i in range(3)}
    expected |= {f"lora_unet_up_blocks_{i}_upsamplers_0_conv" for i in range(3)}
    assert set((NAMES / "sd1.txt").read_text(encoding="utf-8").split()) == expected


def test_building_one_network_does_not_change_the_next() -> None:
    model = models.full_size("sd1")
    before = set(models.create(model, dim=1).state_dict())
    models.create(model, "conv_dim=1", dim=1)
    assert set(models.create(model, dim=1).state_dict()) == before


def test_parts_that_are_not_trained_have_none() -> None:
    net = models.create(models.full_size("sd1"), dim=1, train={"text_encoder"})
    assert net.counts == {"text_encoder1": 72}


def ranks(*arguments: str, **more: int) -> dict[str, tuple[int, float]]:
    """name -> (rank, alpha) of SD1.5's U-Net."""
    tensors = models.create(models.full_size("sd1"), *arguments, train={"unet"}, **more).tensors()
    return {
        key.partition(".")[0]: (tensor.shape[0], float(tensors[key.replace("lora_down.weight", "alpha")]))
        for key, tensor in tensors.items()
        if key.endswith("lora_down.weight")
    }


def test_ranks_by_block() -> None:
    dims = ",".join(str(n) for n in [0, 2, 0, *[4] * 9, 5, *[6] * 11, 7])
    alphas = ",".join(str(n) for n in [0, 0.5, 1, *[1] * 9, 2.5, *[3] * 11, 0])
    found = ranks(f"block_dims={dims}", f"block_alphas={alphas}", "conv_dim=3", "conv_alpha=2")
    assert found["lora_unet_down_blocks_0_attentions_0_proj_in"] == (2, 0.5)
    assert "lora_unet_down_blocks_0_attentions_1_proj_in" not in found
    assert found["lora_unet_down_blocks_0_resnets_1_conv1"] == (3, 2)
    assert "lora_unet_down_blocks_0_resnets_1_time_emb_proj" not in found
    assert found["lora_unet_mid_block_attentions_0_proj_in"] == (5, 2.5)
    assert found["lora_unet_up_blocks_3_attentions_2_proj_in"] == (7, 7)  # an alpha of 0 is the rank
    assert found["lora_unet_up_blocks_3_attentions_1_proj_in"] == (6, 3)


def test_ranks_of_kernels_by_block() -> None:
    dims = ",".join(str(n) for n in [0, 2, *[0] * 23])
    found = ranks(f"conv_block_dims={dims}", dim=1)
    assert found["lora_unet_down_blocks_0_resnets_0_conv1"] == (2, 1)
    assert "lora_unet_down_blocks_0_resnets_1_conv1" not in found
    assert found["lora_unet_down_blocks_0_resnets_1_time_emb_proj"] == (1, 3)


def test_blocks_of_weight_0_have_none() -> None:
    found = ranks("down_lr_weight=1,1,1,1,1,1,1,1,1,1,1,1", "mid_lr_weight=0.1", "up_lr_weight=zeros",
                  "block_lr_zero_threshold=0.1", dim=1)  # fmt: skip
    assert found and all(name.startswith("lora_unet_down") for name in found)


def test_a_network_without_layers_is_refused() -> None:
    settings, _ = read_settings("networks.lora", arguments=["block_dims=" + ",".join(["0"] * 25)])
    with pytest.raises(AdapterError, match="no layer"):
        network.create(models.full_size("sd1"), SD_ADAPTERS, settings, train={"unet"})


def test_a_layers_draw_does_not_depend_on_the_others() -> None:
    model = models.full_size("sd1")
    whole = models.create(model, "conv_dim=2").tensors()
    part = models.create(model, train={"unet"}).tensors()
    assert part.keys() < whole.keys()
    assert all(torch.equal(whole[key], part[key]) for key in part)
    downs = [value for key, value in part.items() if key.endswith("attn1_to_q.lora_down.weight")]
    assert not torch.equal(downs[0], downs[1])


def test_drawing_leaves_torchs_numbers_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    models.create(models.full_size("sd1"), dim=1)
    assert torch.equal(torch.get_rng_state(), before)
