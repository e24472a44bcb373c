"""The tools for LoRAs on SDXL and its refiner: two text encoders, original names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests import tiny
from tests.networks.random_loras import delta, relative
from tests.tools import loras
from tools import (
    check_lora_weights,
    convert_lora,
    extract_lora_from_models,
    lora_interrogator,
    merge_lora,
    resize_lora,
    svd_merge_lora,
)

# diffusers' and numpy's remarks about their own future
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

# names in kohya's files -> (path in the U-Net, path in a checkpoint), written out by hand
BOTH = {
    "lora_unet_middle_block_0_in_layers_2": ("mid_block.resnets.0.conv1", "middle_block.0.in_layers.2"),
    "lora_unet_input_blocks_3_0_op": ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
}
# the last transformer block of an attention, by which names tell the two families apart
LAST = {"sdxl": "transformer_blocks.1.attn1.to_q", "refiner": "transformer_blocks.3.attn1.to_q"}
UNET = {
    family: BOTH
    | {
        f"lora_unet_input_blocks_4_1_{path.replace('.', '_')}": (
            f"down_blocks.1.attentions.0.{path}",
            f"input_blocks.4.1.{path}",
        )
    }
    for family, path in LAST.items()
}
TEXT = {
    "sdxl": {
        "lora_te1_text_model_encoder_layers_1_mlp_fc2": ("text_encoder", "encoder.layers.1.mlp.fc2"),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1"),
    },
    "refiner": {
        "lora_te_text_model_encoder_layers_0_mlp_fc1": ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1")
    },
}
RANK = 4


def layers(family: str) -> dict[str, tuple[str, str]]:
    """Name in files -> (module, path in it)."""
    return {name: ("unet", path) for name, (path, _) in UNET[family].items()} | TEXT[family]


def content(family: str, modules: Any, seed: int = 1) -> dict[str, Tensor]:
    """A LoRA of these layers with random numbers."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, (module, path) in layers(family).items():
        shape = getattr(modules, module).get_submodule(path).weight.shape
        ones = [1] * (len(shape) - 2)
        found[f"{name}.lora_down.weight"] = torch.randn(RANK, *shape[1:], generator=draw) * 0.05
        found[f"{name}.lora_up.weight"] = torch.randn(shape[0], RANK, *ones, generator=draw)
        found[f"{name}.alpha"] = torch.tensor(2.0)
    return found


@pytest.fixture(scope="module", params=["sdxl", "refiner"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family, and a folder with its miniature, a LoRA, and the model that has the LoRA merged into it."""
    family = request.param
    folder = tmp_path_factory.mktemp(f"модели {family}")
    tiny.write_single_file(folder / "base.safetensors", family)
    tensors = content(family, tiny.diffusers_modules(family))
    loras.write(folder / "lora.safetensors", tensors, family)
    given = ("--sd_model", folder / "base.safetensors", "--models", folder / "lora.safetensors", "--ratios", 0.5)
    assert loras.told(merge_lora.main, (*given, "--save_to", folder / "tuned.safetensors")) == 0
    return family, folder


def test_a_lora_is_merged_into_the_model(world: tuple[str, Path]) -> None:
    """The weights that the names mean are those of the original file, and nothing else changes."""
    family, folder = world
    before, _ = loras.read(folder / "base.safetensors")
    after, metadata = loras.read(folder / "tuned.safetensors")
    content, _ = loras.read(folder / "lora.safetensors")
    assert after.keys() == before.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    second = "transformer.resblocks.0.mlp.c_fc.weight"
    texts = {
        "te": f"conditioner.embedders.0.model.{second}",
        "te1": "conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc2.weight",
        "te2": f"conditioner.embedders.1.model.{second}",
    }
    expected = {f"model.diffusion_model.{original}.weight": name for name, (_, original) in UNET[family].items()}
    expected |= {texts[name.split("_")[1]]: name for name in TEXT[family]}
    assert changed == set(expected)
    for key, name in expected.items():
        assert relative(after[key].double() - before[key].double(), 0.5 * delta(content, name)) < 1e-4, key
    assert metadata["modelspec.merged_from"].endswith("lora")


def test_what_was_merged_comes_back(world: tuple[str, Path], tmp_path: Path) -> None:
    family, folder = world
    out = tmp_path / "back.safetensors"
    given = ["--model_org", folder / "base.safetensors", "--model_tuned", folder / "tuned.safetensors"]
    given += ["--save_to", out, "--dim", RANK, "--conv_dim", RANK]
    assert loras.told(extract_lora_from_models.main, [*given, "--sdxl"]) == 0
    found, metadata = loras.read(out)
    expected, _ = loras.read(folder / "lora.safetensors")
    assert loras.names(found) == loras.names(expected)
    for name, change in loras.deltas(expected).items():
        assert relative(loras.deltas(found)[name], 0.5 * change) < 1e-4, name
    assert (metadata["ss_base_model_version"], metadata["ss_v2"]) == (loras.BASE[family], "False")
    assert metadata["modelspec.architecture"].startswith("stable-diffusion-xl-v1-")
    assert metadata["modelspec.resolution"] == "1024x1024"
    # whose names its layers have (formats.md 8.3)
    assert metadata["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"


def test_flags_of_another_kind_are_mistakes(world: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = world
    model = folder / "base.safetensors"
    given = ["--model_org", model, "--model_tuned", model, "--save_to", folder / "x.safetensors"]
    assert loras.told(extract_lora_from_models.main, [*given, "--v2"]) == 2
    assert f"--v2, but {model} is " in capsys.readouterr().err
    assert loras.told(lora_interrogator.main, ["--sd_model", model, "--model", folder / "lora.safetensors",
                                               "--clip_skip", 2]) == 2  # fmt: skip
    assert "--clip_skip 2" in capsys.readouterr().err


def test_loras_are_summed_resized_and_shown(
    world: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, folder = world
    lora, out = folder / "lora.safetensors", tmp_path / "new.safetensors"
    one_of_each = [1.0] * 20  # BASE, IN00 to IN08, MID, OUT00 to OUT08 of SDXL
    one_of_each[1 + 4], one_of_each[10], one_of_each[0] = 0.5, 0.25, 2.0
    given = ("--models", lora, "--ratios", 1, "--lbws", json.dumps(one_of_each), "--new_rank", 8, "--save_to", out)
    assert loras.told(svd_merge_lora.main, given) == 0
    found, metadata = loras.read(out)
    for name, change in loras.deltas(loras.read(lora)[0]).items():
        factor = 2.0 if "_te" in name else 0.5 if "blocks_4" in name else 0.25 if "middle" in name else 1.0
        assert relative(loras.deltas(found)[name], factor * change) < 1e-4, name
    assert metadata["ss_base_model_version"] == loras.BASE[family]
    assert "modelspec.prediction_type" not in metadata  # an SDXL LoRA's version does not tell it
    assert loras.told(resize_lora.main, ["--model", out, "--save_to", tmp_path / "s.pt", "--new_rank", 2]) == 0
    assert loras.told(check_lora_weights.main, [tmp_path / "s.pt"]) == 0
    assert f"number of layers: {len(layers(family))}" in capsys.readouterr().out
    assert loras.told(convert_lora.main, [lora, tmp_path / "there"]) == 0
    with safe_open(tmp_path / "there" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert {key.partition(".")[0] for key in file.keys()} == {"unet", *tiny.text_names(family)}
    assert loras.told(convert_lora.main, [tmp_path / "there", tmp_path / "back.safetensors"]) == 0
    assert loras.read(tmp_path / "back.safetensors")[0].keys() == loras.read(lora)[0].keys()


def test_words_are_read_by_every_text_encoder(world: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' text encoders with ΔW in their weights move the states, side by side, as far."""
    family, folder = world
    few = {token: f"word{token}" for token in (320, 1929, 49407)}
    monkeypatch.setattr(lora_interrogator, "vocabulary", lambda _: few)
    printed: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *words: printed.append(" ".join(map(str, words))))
    given = ["--sd_model", folder / "base.safetensors", "--model", folder / "lora.safetensors"]
    assert loras.told(lora_interrogator.main, given) == 0
    found = {int(m[1]): float(m[2]) for line in printed if (m := re.match(r"\[ *\d+\]: +(\d+) .*: ([\d.]+)$", line))}

    modules = tiny.diffusers_modules(family)
    ids = torch.tensor([[49406, token, 49407] for token in few])

    def states() -> Tensor:
        given = [module(ids, output_hidden_states=True).hidden_states[-2] for module in modules.text_encoders.values()]
        return torch.cat(given, -1)

    with torch.no_grad():
        plain = states()
        for name, (module, path) in TEXT[family].items():
            change = delta(loras.read(folder / "lora.safetensors")[0], name)
            modules.text_encoders[module].get_submodule(path).weight += change.float()
        expected = dict(zip(few, (states() - plain).abs().mean((1, 2)).tolist(), strict=True))
    assert found == pytest.approx(expected, abs=2e-5)


def test_a_layer_is_one_layer_however_it_is_spelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sum of an SDXL LoRA under original names, of one under diffusers' names, and of one of ComfyUI."""
    modules = tiny.diffusers_modules("sdxl")
    first, second, third = (content("sdxl", modules, seed) for seed in (1, 2, 3))
    in_diffusers = {name: f"lora_unet_{path.replace('.', '_')}" for name, (path, _) in UNET["sdxl"].items()}
    native = {name: f"diffusion_model.{path}" for name, (_, path) in UNET["sdxl"].items()}
    files = {"a": first, "b": renamed(second, in_diffusers), "c": renamed(third, native)}
    for name, tensors in files.items():
        loras.write(tmp_path / f"{name}.safetensors", tensors, "sdxl")
    for tool in (merge_lora, svd_merge_lora):
        words = ["--models", *(tmp_path / f"{name}.safetensors" for name in files), "--ratios", "0.5", "1", "2"]
        more = ["--concat"] if tool is merge_lora else ["--new_rank", "12"]
        assert tool.main([str(word) for word in (*words, "--save_to", tmp_path / "sum.safetensors", *more)]) == 0
        merged, _ = loras.read(tmp_path / "sum.safetensors")
        assert {key.partition(".")[0] for key in merged} == layers("sdxl").keys()
        for name in layers("sdxl"):
            expected = 0.5 * delta(first, name) + delta(second, name) + 2 * delta(third, name)
            assert relative(delta(merged, name), expected) < 1e-5
    capsys.readouterr()


def renamed(tensors: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The tensors with other names for some layers."""
    found = {}
    for key, value in tensors.items():
        layer, _, tensor = key.partition(".")
        found[f"{names.get(layer, layer)}.{tensor}"] = value
    return found
