"""LoRA files in kohya's, diffusers' and PEFT's format, each into each other, by networks/formats/read_write.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.checkpoints.header import CheckpointError
from library.families.sd.sd_adapters import SD_ADAPTERS
from networks import adapter_files
from networks.adapter import AdapterError
from networks.formats.convert_keys import Format
from networks.formats.layer_names import known_places
from networks.formats.read_write import read_lora, write_lora
from tests import tiny

TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
FF = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj"
OUT = "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_out_0"
CONV = "lora_unet_down_blocks_1_resnets_0_conv_shortcut"
FC1 = "lora_te_text_model_encoder_layers_11_mlp_fc1"
# Names of kohya's files -> dotted paths with the module before them, written out by hand.
PATHS = {
    TO_Q: "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    FF: "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    OUT: "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0",
    CONV: "unet.down_blocks.1.resnets.0.conv_shortcut",
    FC1: "text_encoder.text_model.encoder.layers.11.mlp.fc1",
}
FORMATS: tuple[Format, ...] = ("diffusers", "peft")


def lora(
    names: tuple[str, ...] = tuple(PATHS), dtype: torch.dtype = torch.float32, *, dora: bool = False
) -> dict[str, Tensor]:
    """A kohya file with a rank and an alpha of its own for each layer."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for index, name in enumerate(names):
        rank, kernel = 2 + index, (3, 3) if name == CONV else ()
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, 6, *kernel, generator=draw)
        tensors[f"{name}.lora_up.weight"] = torch.randn(5, rank, *(1 for _ in kernel), generator=draw)
        tensors[f"{name}.alpha"] = torch.tensor(1.5 + index)
        if dora:
            tensors[f"{name}.dora_scale"] = torch.rand(5, 1, *(1 for _ in kernel), generator=draw)
    return {key: value.to(dtype) for key, value in tensors.items()}


def kohya_file(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    adapter_files.write(path, tensors, metadata or {"ss_network_dim": "4", "ss_training_comment": "собака"})
    return path


def converted(source: Path, target: Path, to: Format) -> Path:
    return write_lora(target, read_lora(source, SD_ADAPTERS)[0], to)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_layer_of_the_models_has_a_place(family: str) -> None:
    made = tiny.diffusers_modules(family)
    expected = {}
    for module, prefix, level in ((made.unet, "lora_unet_", "unet."), (made.text_encoder, "lora_te_text_model_", "")):
        for path, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                expected[prefix + path.replace(".", "_")] = (level or "text_encoder.text_model.") + path
    places = {place.name: f"{place.part.module}.{place.path}" for place in known_places(SD_ADAPTERS)}
    assert expected.items() <= places.items()
    assert len(places) == len(known_places(SD_ADAPTERS))  # no name for two layers


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_there_and_back_is_the_same_file(to: Format, dora: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    first = kohya_file(tmp_path / "a.safetensors", lora(dtype=dtype, dora=dora))
    there = converted(first, tmp_path / "there", to)
    back = converted(there, tmp_path / "b.safetensors", "kohya")
    assert read_lora(there, SD_ADAPTERS)[1] == to
    assert back.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("to", FORMATS)
def test_alphas_come_back_as_they_were(to: Format, tmp_path: Path) -> None:
    tensors = lora()
    tensors[f"{TO_Q}.alpha"] = torch.tensor(3)  # as sd-scripts writes an alpha from a TOML file
    tensors[f"{FF}.alpha"] = torch.tensor(0.0)  # means the rank
    tensors[f"{OUT}.alpha"] = torch.tensor(0.3, dtype=torch.bfloat16)
    del tensors[f"{FC1}.alpha"]
    first = kohya_file(tmp_path / "a.safetensors", tensors)
    back = converted(converted(first, tmp_path / "there", to), tmp_path / "b.safetensors", "kohya")
    assert back.read_bytes() == first.read_bytes()


def test_a_diffusers_file_is_as_diffusers_writes_it(tmp_path: Path) -> None:
    tensors = lora(dora=True)
    first = kohya_file(tmp_path / "a.safetensors", tensors)
    there = converted(first, tmp_path / "there", "diffusers")
    assert there == tmp_path / "there" / "pytorch_lora_weights.safetensors"
    expected = {}
    for name, path in PATHS.items():
        expected[f"{path}.lora_A.weight"] = tensors[f"{name}.lora_down.weight"]
        expected[f"{path}.lora_B.weight"] = tensors[f"{name}.lora_up.weight"]
        shape = (1, 5, 1, 1) if name == CONV else (5,)  # PEFT, tuners/lora/dora.py
        leaf = ".weight" if name == FC1 else ""
        expected[f"{path}.lora_magnitude_vector{leaf}"] = tensors[f"{name}.dora_scale"].reshape(shape)
    found = load_file(there)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    with safe_open(there, "pt") as file:
        metadata = file.metadata()
    noted = json.loads(metadata["lora_adapter_metadata"])
    assert metadata["format"] == "pt" and metadata["ss_training_comment"] == "собака"
    assert noted["unet.use_dora"] is True and noted["text_encoder.r"] == 6 and noted["text_encoder.lora_alpha"] == 5.5
    ranks = {**dict.fromkeys(noted["unet.target_modules"], noted["unet.r"]), **noted["unet.rank_pattern"]}
    alphas = {**dict.fromkeys(noted["unet.target_modules"], noted["unet.lora_alpha"]), **noted["unet.alpha_pattern"]}
    names = [name for name in PATHS if name != FC1]
    assert ranks == {PATHS[name].removeprefix("unet."): 2 + index for index, name in enumerate(names)}
    assert alphas == {PATHS[name].removeprefix("unet."): 1.5 + index for index, name in enumerate(names)}


def test_peft_folders_are_as_peft_writes_them(tmp_path: Path) -> None:
    there = converted(kohya_file(tmp_path / "a.safetensors", lora()), tmp_path / "there", "peft")
    assert {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()} == {
        f"{module}/{name}"
        for module in ("unet", "text_encoder")
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    keys = set(load_file(there / "unet" / "adapter_model.safetensors"))
    assert f"base_model.model.{PATHS[OUT].removeprefix('unet.')}.lora_B.weight" in keys and len(keys) == 8
    assert set(load_file(there / "text_encoder" / "adapter_model.safetensors")) == {
        f"base_model.model.encoder.layers.11.mlp.fc1.lora_{letter}.weight" for letter in "AB"
    }
    config = json.loads((there / "text_encoder" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 6, 5.5)


def test_a_single_peft_folder_is_known_by_its_layers(tmp_path: Path) -> None:
    first = kohya_file(tmp_path / "a.safetensors", lora((TO_Q, FF)))
    there = converted(first, tmp_path / "there", "peft")
    (there / "unet").rename(tmp_path / "dog")
    for source in (tmp_path / "dog", tmp_path / "dog" / "adapter_model.safetensors"):
        back = converted(source, tmp_path / f"{source.name}_back.safetensors", "kohya")
        assert back.read_bytes() == first.read_bytes()


def test_names_of_the_text_encoder_without_its_level(tmp_path: Path) -> None:
    """Programs that name layers after the modules of transformers 5 leave it out, in any of the formats."""
    tensors = {key.replace("_text_model", ""): value for key, value in lora((FC1,)).items()}
    first = kohya_file(tmp_path / "a.safetensors", tensors)
    there = converted(first, tmp_path / "there", "diffusers")
    assert all(key.startswith("text_encoder.text_model.encoder.layers.11.") for key in load_file(there))
    save_file(
        {key.replace("text_model.", ""): value for key, value in load_file(there).items()},
        tmp_path / "flat.safetensors",
    )
    back = converted(tmp_path / "flat.safetensors", tmp_path / "b.safetensors", "kohya")
    assert set(load_file(back)) == {f"{FC1}.{leaf}" for leaf in ("lora_down.weight", "lora_up.weight", "alpha")}


@pytest.mark.parametrize("spelling", ["lora.{}.weight", "lora_linear_layer.{}.weight"])
def test_what_older_training_scripts_of_diffusers_wrote(spelling: str, tmp_path: Path) -> None:
    """Without alphas, which means that nothing is scaled."""
    down, up = torch.randn(3, 6), torch.randn(5, 3)
    path = PATHS[FC1 if "linear" in spelling else TO_Q]
    save_file({f"{path}.{spelling.format('down')}": down, f"{path}.{spelling.format('up')}": up},
              tmp_path / "a.safetensors")  # fmt: skip
    back = load_file(converted(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya"))
    (alpha,) = (value for key, value in back.items() if key.endswith(".alpha"))
    assert float(alpha) == 3.0 and alpha.dtype == torch.float32
    assert any(torch.equal(value, down) for value in back.values())


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        ({"lora_alpha": 6}, 6.0),
        ({"lora_alpha": 6, "use_rslora": True}, 12.0),  # alpha / sqrt(4) = 12 / 4
        ({"lora_alpha": 6, "alpha_pattern": {"attn1.to_q": 3}}, 3.0),
        ({"lora_alpha": 6, "alpha_pattern": {"to_k": 3, ".*to_[qv]": 2}}, 2.0),
        ({"lora_alpha": 6, "alpha_pattern": {"^down_blocks.0.attentions.0.*attn1.to_q": 5}}, 5.0),
        ({"lora_alpha": 6, "alpha_pattern": {"to_": 3}}, 6.0),  # the end of the path, whole
    ],
)
def test_alphas_as_peft_understands_them(config: dict[str, Any], alpha: float, tmp_path: Path) -> None:
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    (tmp_path / "unet").mkdir()
    save_file({f"base_model.model.{path}.lora_A.weight": torch.ones(4, 6),
               f"base_model.model.{path}.lora_B.weight": torch.ones(5, 4)},
              tmp_path / "unet" / "adapter_model.safetensors")  # fmt: skip
    (tmp_path / "unet" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4} | config), encoding="utf-8"
    )
    assert [layer.alpha for layer in read_lora(tmp_path, SD_ADAPTERS)[0].layers] == [alpha]


# --- refused, whole and with every name ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"lora_unet_nowhere.alpha": 1, "lora_te1_x.alpha": 1}, r"2 keys .* lora_te1_x.alpha, lora_unet_nowhere.alpha"),
        ({f"{TO_Q}.hada_w1_a": 1}, "hada_w1_a"),
        ({f"{TO_Q}.lora_mid.weight": 1}, "lora_mid"),
        ({f"{CONV}.lora_down.weight": 1}, r"1 factor missing: unet.down_blocks.1.resnets.0.conv_shortcut: up"),
        ({f"{FC1.replace('_text_model', '')}.alpha": 1, f"{FC1}.alpha": 1}, "under another name too"),
    ],
)
def test_keys_that_cannot_be_converted_are_listed(more: dict[str, int], said: str, tmp_path: Path) -> None:
    tensors = lora((TO_Q,)) | {key: torch.ones(() if key.endswith("alpha") else (2, 2)) for key in more}
    with pytest.raises(AdapterError, match=said):
        read_lora(kohya_file(tmp_path / "a.safetensors", tensors), SD_ADAPTERS)


def test_magnitudes_of_inputs_are_refused(tmp_path: Path) -> None:
    tensors = lora((TO_Q,)) | {f"{TO_Q}.dora_scale": torch.ones(1, 6)}
    with pytest.raises(AdapterError, match="magnitudes of inputs"):
        read_lora(kohya_file(tmp_path / "a.safetensors", tensors), SD_ADAPTERS)


@pytest.mark.parametrize("to", FORMATS)
def test_dora_in_some_layers_only_is_refused(to: Format, tmp_path: Path) -> None:
    tensors = lora((TO_Q, FF), dora=True)
    del tensors[f"{FF}.dora_scale"]
    source = kohya_file(tmp_path / "a.safetensors", tensors)
    with pytest.raises(AdapterError, match=f"no dora_scale in 1 of 2 layers of unet: {FF}"):
        converted(source, tmp_path / "there", to)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("unet.conv_in.lora_A.bias", {}, "unet.conv_in.lora_A.bias"),
        ("something.else", {}, "has no layers of a supported model"),
        ("base_model.model.conv_in.lora_A.weight", {}, "incomplete, 1 factor missing: unet.conv_in: up"),
        ("unet.conv_in.lora_A.weight", {"lora_adapter_metadata": "{"}, "not a JSON object"),
    ],
)
def test_other_files_are_refused(name: str, content: dict[str, str], said: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(2, 2)}, tmp_path / "a.safetensors", metadata=content)
    with pytest.raises(AdapterError, match=said):
        read_lora(tmp_path / "a.safetensors", SD_ADAPTERS)


def test_other_adapters_of_peft_are_refused(tmp_path: Path) -> None:
    there = converted(kohya_file(tmp_path / "a.safetensors", lora((TO_Q,))), tmp_path / "there", "peft")
    (there / "unet" / "adapter_config.json").write_text('{"peft_type": "LOHA"}', encoding="utf-8")
    with pytest.raises(AdapterError, match="LOHA"):
        read_lora(there, SD_ADAPTERS)
    with pytest.raises(AdapterError, match="has neither"):
        read_lora(there.parent, SD_ADAPTERS)


@pytest.mark.parametrize("to", ["kohya", *FORMATS])
def test_nothing_is_overwritten_and_nothing_is_left_of_a_failure(to: Format, tmp_path: Path) -> None:
    source = kohya_file(tmp_path / "a.safetensors", lora())
    made, _ = read_lora(source, SD_ADAPTERS)
    target = tmp_path / ("b.safetensors" if to == "kohya" else "there")
    made.layers[-1].up[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="NaN"):
        write_lora(target, made, to)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path != source]
    made.layers[-1].up[0, 0] = 0.0
    write_lora(target, made, to)
    with pytest.raises(AdapterError, match="exists already"):
        write_lora(target, made, to)


def test_names_that_do_not_fit_the_format(tmp_path: Path) -> None:
    made, _ = read_lora(kohya_file(tmp_path / "a.safetensors", lora((TO_Q,))), SD_ADAPTERS)
    with pytest.raises(AdapterError, match="none of the extensions"):
        write_lora(tmp_path / "folder", made, "kohya")
    with pytest.raises(AdapterError, match="is a folder"):
        write_lora(tmp_path / "b.safetensors", made, "peft")
