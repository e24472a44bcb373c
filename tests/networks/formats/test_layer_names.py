"""Files of other programs: each spelling of a layer is the same layer, and the same tensors come out.

The spellings are written out from what these programs write: ComfyUI's comfy/lora.py (model_lora_keys_unet and _clip),
diffusers' attention processors before 0.21, PEFT's save_pretrained, LyCORIS' wrapper (SimpleTuner), OneTrainer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.families.registry import FAMILIES
from networks.adapter import AdapterError
from networks.adapter_files import AdapterFile
from networks.formats.layer_names import best_table, in_kohyas_names, layers_in, table_of
from networks.formats.read_write import read_adapter, read_lora
from networks.network import from_tensors
from tests import tiny
from tests.networks import models
from tests.tiny_original import unet_name

Spell = Callable[[str, str, str], str | None]
"""(module, path in the module, tensor in kohya's files) -> key; None for what the format does not hold."""

TABLES = [table_of(family.adapters) for family in FAMILIES]
PEFT = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
OLD = {"lora_down.weight": "lora.down.weight", "lora_up.weight": "lora.up.weight"}


def comfyui(module: str, path: str, tensor: str, upsampler: int = 1) -> str:
    if module == "unet":
        return f"diffusion_model.{unet_name(f'{path}.weight', upsampler).removesuffix('.weight')}.{tensor}"
    clip = "clip_g" if module == "text_encoder_2" else "clip_l"
    return f"text_encoders.{clip}.transformer.text_model.{path.removeprefix('text_model.')}.{tensor}"


def kohya_on_original_names(module: str, path: str, tensor: str) -> str | None:
    if module != "unet":
        return f"lora_te_text_model_{path.replace('.', '_')}.{tensor}"
    layer, _, _ = comfyui(module, path, "weight").removeprefix("diffusion_model.").rpartition(".")
    return f"lora_unet_{layer.replace('.', '_')}.{tensor}"


def peft(module: str, path: str, tensor: str) -> str | None:
    return f"base_model.model.{path}.{PEFT[tensor]}" if tensor in PEFT and module == "unet" else None


def peft_by_name(module: str, path: str, tensor: str) -> str | None:
    return (peft(module, path, tensor) or "").replace(".weight", ".default.weight") or None


def comfyui_with_peft(module: str, path: str, tensor: str) -> str | None:
    return comfyui(module, path, PEFT[tensor]) if tensor in PEFT else None


def simpletuner(module: str, path: str, tensor: str) -> str | None:
    return f"lycoris_{path.replace('.', '_')}.{tensor}" if module == "unet" else None


def processors(module: str, path: str, tensor: str) -> str | None:
    attention, _, layer = path.removesuffix(".0").rpartition(".")
    if tensor not in OLD or not layer.startswith("to_"):
        return None
    return f"{attention}.processor.{layer}_{OLD[tensor]}"


def processors_of_both(module: str, path: str, tensor: str) -> str | None:
    attention, _, layer = path.rpartition(".")
    if module == "unet":
        return f"unet.{key}" if (key := processors(module, path, tensor)) else None
    if tensor not in OLD or not attention.endswith("self_attn"):
        return None
    old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}[layer]
    return f"text_encoder.text_model.{attention}.{old}_{OLD[tensor]}"


SPELLINGS: dict[str, Spell] = {
    "ComfyUI": comfyui,
    "ComfyUI, PEFT's tensors": comfyui_with_peft,
    "kohya's on original names": kohya_on_original_names,
    "PEFT": peft,
    "PEFT, with the adapter's name": peft_by_name,
    "SimpleTuner": simpletuner,
    "diffusers' processors": processors,
    "diffusers' processors, both modules": processors_of_both,
}


@cache
def lora(family: str = "sd1", *arguments: str) -> tuple[Any, dict[str, Tensor]]:
    """A network of the miniature, and its file."""
    model = models.tiny(family)
    net = models.trained(models.create(model, *arguments, alpha=4, family=family))
    return net, net.tensors()


def spelled(family: str, spell: Spell, *arguments: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The file in a spelling, and what of it should come out."""
    net, tensors = lora(family, *arguments)
    theirs, expected = {}, {}
    for layer in net.layers:
        for tensor in ("lora_down.weight", "lora_up.weight", "alpha"):
            name = f"{layer.name}.{tensor}"
            if key := spell(layer.target.part.module, layer.target.path, tensor):
                theirs[key], expected[name] = tensors[name], tensors[name]
    held = {name.partition(".")[0] for name in expected}
    return theirs, {name: value for name, value in tensors.items() if name.partition(".")[0] in held}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read(spelling: str, tmp_path: Path) -> None:
    """With an alpha of 4, the rank: what a file without alphas stands for."""
    net, _ = lora("sd1", "conv_dim=4", "conv_alpha=4")
    theirs, expected = spelled("sd1", SPELLINGS[spelling], "conv_dim=4", "conv_alpha=4")
    assert len(expected) >= 64 * 3 and theirs.keys() != expected.keys()
    save_file({key: value.contiguous() for key, value in theirs.items()}, tmp_path / "a.safetensors")
    file = read_adapter(tmp_path / "a.safetensors", models.PARTS["sd1"])
    assert same(file.tensors, expected)
    assert ("without alpha" in " ".join(file.notes)) == (len(theirs) < len(expected))
    assert len(from_tensors(models.tiny("sd1"), models.PARTS["sd1"], file.tensors).layers) == len(expected) / 3
    converted, found = read_lora(tmp_path / "a.safetensors", *(family.adapters for family in FAMILIES))
    assert found == "other" and {layer.place.name for layer in converted.layers} <= {layer.name for layer in net.layers}


@pytest.mark.parametrize("family", ["sdxl", "refiner"])
def test_layers_of_sdxl_have_one_name(family: str) -> None:
    """diffusers' names, and ComfyUI's: kohya's are those of the original file."""
    net, tensors = lora(family)
    in_diffusers = {
        f"{layer.target.part.prefix}_{layer.target.path.replace('.', '_')}": layer.name for layer in net.layers
    }
    other = {f"{name}.alpha": tensors[f"{layer}.alpha"] for name, layer in in_diffusers.items()}
    native = {
        comfyui(layer.target.part.module, layer.target.path, "alpha", 2 if family == "sdxl" else 1): tensors[
            f"{layer.name}.alpha"
        ]
        for layer in net.layers
    }
    expected = {key: value for key, value in tensors.items() if key.endswith(".alpha")}
    for theirs in (other, native):
        found = in_kohyas_names(AdapterFile(theirs), best_table(TABLES, layers_in(theirs)))
        assert same(found.tensors, expected)


def test_layers_of_several_families_are_those_of_the_other_files() -> None:
    """One block of SD1 and one of SDXL share a name in diffusers; the other file says whose it is."""
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    sdxl = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"
    table = best_table(TABLES, {name}, {name, sdxl})
    place = table.find(name)
    assert place is not None and place.name == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    alone = best_table(TABLES, {name}).find(name)
    assert alone is not None and alone.name == name


def test_original_names_are_those_of_the_refiner_before_sd1s() -> None:
    """Both have these two layers; only the refiner's files in kohya's format name them so."""
    names = {"lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_unet_middle_block_0_in_layers_2"}
    place = best_table(TABLES, names).find("lora_te_text_model_encoder_layers_0_mlp_fc1")
    assert place is not None and place.part.module == "text_encoder_2"


def test_what_is_no_layer_keeps_its_name_and_embeddings_are_left_out() -> None:
    tensors = {
        "lora_unet_nowhere.alpha": torch.ones(()),
        "bundle_emb.dog.string_to_param.*": torch.ones(2, 768),
        "unet.nowhere.lora_A.weight": torch.ones(2, 2),
    }
    found = in_kohyas_names(AdapterFile(tensors), TABLES[0])
    assert found.tensors.keys() == {"lora_unet_nowhere.alpha", "unet.nowhere.lora_A.weight"}
    assert found.notes == ("left out: 1 tensor of bundled embeddings (bundle_emb.dog.string_to_param.*)",)


def test_a_tensor_under_two_names_is_refused() -> None:
    theirs, expected = spelled("sd1", comfyui)
    with pytest.raises(AdapterError, match="another name too"):
        in_kohyas_names(AdapterFile(theirs | expected), TABLES[0])


def test_peft_says_its_alphas_beside_the_file(tmp_path: Path) -> None:
    theirs, expected = spelled("sd1", peft)
    save_file({key: value.contiguous() for key, value in theirs.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 7}), encoding="utf-8")
    file = read_adapter(tmp_path / "adapter_model.safetensors", models.PARTS["sd1"])
    assert file.tensors.keys() == expected.keys() and not file.notes
    assert {float(value) for key, value in file.tensors.items() if key.endswith("alpha")} == {7.0}


@pytest.mark.parametrize("conv", [False, True])
def test_magnitudes_of_peft_are_those_of_outputs(*, conv: bool) -> None:
    """A square convolution's (1, out, 1, 1) would else be taken for magnitudes of inputs."""
    path, ones = ("down_blocks.0.resnets.0.conv1", [1, 1]) if conv else ("mid_block.attentions.0.proj_in", [])
    scale = torch.rand(1, 6, 1, 1) if conv else torch.rand(6)
    theirs = {
        f"unet.{path}.lora_A.weight": torch.ones(2, 6, *([3, 3] if conv else [])),
        f"unet.{path}.lora_B.weight": torch.ones(6, 2, *ones),
        f"unet.{path}.lora_magnitude_vector": scale,
    }
    found = in_kohyas_names(AdapterFile(theirs), TABLES[0]).tensors
    assert torch.equal(found[f"lora_unet_{path.replace('.', '_')}.dora_scale"], scale.reshape(6, 1, *ones))


def test_other_kinds_are_read_too(tmp_path: Path) -> None:
    net = models.trained(models.create(models.tiny("sd1"), "factor=4", module="networks.lokr"))
    tensors = net.tensors()
    theirs = {
        comfyui(layer.target.part.module, layer.target.path, key): value
        for layer in net.layers
        for key, value in layer.adapter.state_dict().items()
    }
    save_file({key: value.detach().clone() for key, value in theirs.items()}, tmp_path / "a.safetensors")
    assert same(read_adapter(tmp_path / "a.safetensors", models.PARTS["sd1"]).tensors, tensors)
    assert same(load_file(tmp_path / "a.safetensors"), theirs)


def test_families_of_the_miniatures_are_told_apart() -> None:
    for number, family in enumerate(tiny.ALL):
        _, tensors = lora(family)
        table = best_table(TABLES, layers_in(tensors))
        # Stable Diffusion 1 and 2 have the same names
        assert TABLES.index(table) == [0, 0, 2, 3][number] or table.places == TABLES[number].places
