"""The .yaml beside an SD2 file says what WebUIs ask it: diffusers reads it and builds the same modules."""

from __future__ import annotations

import pytest
import yaml

from library.checkpoints.files import read_header
from library.families.registry import load_model
from library.families.sd.inference_yaml import inference_yaml, write_inference_yaml


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_diffusers_builds_the_same_modules_from_it(files, prediction):
    from diffusers.loaders import single_file_utils as peer

    model = load_model(read_header(files["sd2"]), prediction=prediction)
    config = yaml.safe_load(inference_yaml(model))
    unet = peer.create_unet_diffusers_config_from_ldm(config, {}, image_size=64)
    for key in (
        "block_out_channels",
        "layers_per_block",
        "cross_attention_dim",
        "use_linear_projection",
        "in_channels",
    ):
        value = unet[key]
        assert (list(value) if isinstance(value, tuple) else value) == model.backbone.config[key]
    assert list(unet["down_block_types"]) == list(model.backbone.config.down_block_types)
    assert list(unet["attention_head_dim"]) == list(model.backbone.config.attention_head_dim)
    vae = peer.create_vae_diffusers_config_from_ldm(config, {}, image_size=64)
    for key in ("block_out_channels", "layers_per_block", "latent_channels"):
        value = vae[key]
        assert (list(value) if isinstance(value, tuple) else value) == model.vae.config[key]
    said = config["model"]["params"].get("parameterization")
    assert said == {"epsilon": None, "v": "v"}[prediction]


def test_it_stands_beside_the_model_and_only_for_sd2(files, tmp_path):
    sd2 = load_model(read_header(files["sd2"]))
    assert write_inference_yaml(sd2, tmp_path / "dog-000001.safetensors") == tmp_path / "dog-000001.yaml"
    assert write_inference_yaml(load_model(read_header(files["sd1"])), tmp_path / "x.safetensors") is None
    assert [path.name for path in tmp_path.iterdir()] == ["dog-000001.yaml"]
