"""What front-ends import from sd-scripts stands under the same names, does the same, and costs nothing to import."""

from __future__ import annotations

import ast
import hashlib
import importlib
import logging
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from library import model_util, sdxl_model_util, train_util, utils
from tests import tiny

# What the front-ends' own files import (kohya_ss v26: tools/; LoRA_Easy_Training_Scripts: utils/ of its backend).
IMPORTED = {
    "library.train_util": {"BucketManager", "precalculate_safetensors_hashes"},
    "library.utils": {"setup_logging"},
    "library.model_util": {"is_safetensors", "load_models_from_stable_diffusion_checkpoint"},
    "library.sdxl_model_util": {
        "load_models_from_sdxl_checkpoint", "convert_diffusers_unet_state_dict_to_sdxl", "sdxl_original_unet",
        "save_stable_diffusion_checkpoint", "_load_state_dict_on_device",
    },
}  # fmt: skip
OWN = {"load_with_names_of_files", "SdxlUNet2DConditionModel"}  # what they are made of


@pytest.mark.parametrize("name", IMPORTED)
def test_the_names_are_there_and_no_others(name: str) -> None:
    path = importlib.import_module(name).__file__
    assert path is not None
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    values = {ast.unparse(node.targets[0]) for node in tree.body if isinstance(node, ast.Assign)}
    assert {value for value in functions | values if value != "_UNET"} - OWN == IMPORTED[name]


def test_images_are_counted_by_bucket() -> None:
    """Steps of 64 at 512 x 512. The sizes nearest to 3:2 = 1.5 are 640 x 384 (1.67) and 576 x 448 (1.29)."""
    manager = train_util.BucketManager(False, (512, 512), 256, 1024, 64)
    manager.make_buckets()
    for width, height in ((900, 600), (600, 600), (1500, 1000)):
        reso, resized, error = manager.select_bucket(width, height)
        manager.add_image(reso, (width, height))
        assert error == pytest.approx(reso[0] / reso[1] - width / height)
        assert resized[0] >= reso[0] and resized[1] >= reso[1]
    assert [len(bucket) for bucket in manager.buckets] == [2, 1]
    assert manager.select_bucket(900, 600)[0] == (640, 384) and manager.select_bucket(600, 600)[0] == (512, 512)


def test_without_upscaling_an_image_keeps_its_size() -> None:
    manager = train_util.BucketManager(True, [512, 512], 256, 1024, 64)  # type: ignore[arg-type]  # a list in LETS' JSON
    assert manager.select_bucket(300, 200) == ((256, 192), (300, 200), pytest.approx(256 / 192 - 1.5))


def test_without_buckets_there_is_one_size() -> None:
    manager = train_util.BucketManager(False, (512, 768), None, None, None)
    manager.set_predefined_resos([(512, 768)])
    assert manager.select_bucket(1000, 1000)[:2] == ((512, 768), (768, 768))


def test_hashes_are_those_of_the_file() -> None:
    tensors = {"b": torch.arange(600_000.0), "a": torch.ones(3)}
    metadata = {"ss_network_dim": "4", "modelspec.title": "not hashed"}
    whole, legacy = train_util.precalculate_safetensors_hashes(tensors, metadata)
    content = safetensors.torch.save(tensors, {"ss_network_dim": "4"})
    assert whole == hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert legacy == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]


def test_messages_of_tools_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    utils.setup_logging(reset=True)
    logging.getLogger("tool").info("it works")
    assert "INFO it works" in capsys.readouterr().err
    logging.basicConfig(force=True)


def test_endings() -> None:
    assert model_util.is_safetensors("a/B.SafeTensors") and not model_util.is_safetensors("a.safetensors.ckpt")


def test_sd_has_the_layer_names_of_adapter_files(tmp_path: Path) -> None:
    file = tiny.write_single_file(tmp_path / "sd1.safetensors", "sd1")
    text_encoder, vae, unet = model_util.load_models_from_stable_diffusion_checkpoint(False, str(file))
    made = tiny.diffusers_modules("sd1")
    assert unet.state_dict().keys() == made.unet.state_dict().keys()
    assert vae.state_dict().keys() == made.vae.state_dict().keys()
    assert "text_model.encoder.layers.0.mlp.fc1" in dict(text_encoder.named_modules())
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, module in layers.items():
        assert torch.equal(module.weight, made.unet.get_submodule(name).weight), name


def test_sdxl_has_the_layer_names_of_adapter_files(tmp_path: Path) -> None:
    file = tiny.write_single_file(tmp_path / "sdxl.safetensors", "sdxl")
    first, second, _, unet, scale, _ = sdxl_model_util.load_models_from_sdxl_checkpoint(
        None, str(file), "cpu", torch.float32
    )
    original = tiny.original_state_dict("sdxl")
    layers = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    assert "input_blocks.4.1.transformer_blocks.0.attn1.to_q" in layers
    for name in layers:
        assert torch.equal(unet.get_submodule(name).weight, original[f"model.diffusion_model.{name}.weight"]), name
    for text_encoder in (first, second):
        assert "text_model.encoder.layers.0.self_attn.q_proj" in dict(text_encoder.named_modules())
    assert scale is not None and scale.item() == pytest.approx(4.6052)


def test_a_unet_of_diffusers_is_written_into_one_file(tmp_path: Path) -> None:
    """The calls of kohya_ss's tools/lcm_convert.py."""
    made = tiny.diffusers_modules("sdxl")
    tensors = sdxl_model_util.convert_diffusers_unet_state_dict_to_sdxl(made.unet.state_dict())
    unet = sdxl_model_util.sdxl_original_unet.SdxlUNet2DConditionModel()
    sdxl_model_util._load_state_dict_on_device(unet, tensors, device="cpu", dtype=torch.float16)
    path = tmp_path / "lcm.safetensors"
    sdxl_model_util.save_stable_diffusion_checkpoint(
        str(path), made.text_encoder, made.text_encoder_2, unet, None, None, None, made.vae, None, None, torch.float16
    )
    original = tiny.original_state_dict("sdxl")
    original.pop("conditioner.embedders.1.model.logit_scale")  # not in diffusers
    written = load_file(path)
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], tensor.to(torch.float16)) for name, tensor in original.items())
