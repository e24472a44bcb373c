"""fp8 with scales is read as ComfyUI reads it: weight times scale. Other quantised files are named, by every reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.files import open_tensors, read_header
from library.checkpoints.header import CheckpointError, Header, TensorInfo
from library.checkpoints.quantized import kind_of
from library.families.registry import detect, load_model
from tests import tiny
from tools import convert_checkpoint, merge_models

UNET = "model.diffusion_model."
ENDINGS = {"old": ".scale_weight", "new": ".weight_scale"}  # ComfyUI before and after November 2025


def write_scaled(path: Path, form: str, *, by_row: bool = False) -> dict[str, torch.Tensor]:
    """Write SD1 with the U-Net's matrices in fp8, as ComfyUI's scripts do; returns the weights that the file means."""
    tensors, meant = tiny.original_state_dict("sd1"), {}
    markers: dict[str, torch.Tensor] = {}
    for name, weight in list(tensors.items()):
        if not name.startswith(UNET) or weight.dim() != 2:
            continue
        layer = name.removesuffix(".weight")
        largest = weight.abs().amax(1, keepdim=True) if by_row else weight.abs().max()
        scale = largest.clamp(min=1e-12) / 448  # the largest number of e4m3
        tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
        meant[name] = tensors[name].float() * scale
        markers[layer + ENDINGS[form]] = scale.reshape(-1) if by_row else scale
        if form == "new":
            config = json.dumps({"format": "float8_e4m3fn"}).encode()
            markers |= {f"{layer}.comfy_quant": torch.tensor(list(config), dtype=torch.uint8)}
            markers |= {f"{layer}.input_scale": torch.tensor(1.0)}
        else:
            markers |= {f"{layer}.scale_input": torch.tensor(1.0)}
    if form == "old":
        markers[f"{UNET}scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    save_file(tensors | markers, path, {"_quantization_metadata": "{}", "modelspec.title": "x"})
    return meant


@pytest.mark.parametrize(("form", "by_row"), [("old", False), ("new", False), ("new", True)])
def test_fp8_with_scales_is_read_by_comfyuis_rule(tmp_path: Path, form: str, by_row: bool) -> None:
    path = tmp_path / "scaled.safetensors"
    meant = write_scaled(path, form, by_row=by_row)
    assert len(meant) > 100
    reader = open_tensors(path)
    assert set(reader.names()) == tiny.original_state_dict("sd1").keys()
    for name, weight in meant.items():
        assert torch.equal(reader.get(name), weight) and torch.equal(reader.lazy(name).load(), weight)
        assert reader.header.tensors[name] == TensorInfo("F32", tuple(weight.shape))
    original = tiny.original_state_dict("sd1")
    loaded = load_model(read_header(path)).backbone.state_dict()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    expected = original[f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"]
    assert (loaded[name] - expected).abs().max() <= expected.abs().max() / 16  # three bits of mantissa


def test_a_converted_file_holds_plain_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meant = write_scaled(tmp_path / "scaled.safetensors", "new")
    words = [str(tmp_path / "scaled.safetensors"), str(tmp_path / "plain.safetensors"), "--save_precision", "fp16"]
    assert convert_checkpoint.main(words) == 0
    assert "written as float32" not in capsys.readouterr().out
    assert convert_checkpoint.main([words[0], str(tmp_path / "large.safetensors")]) == 0
    assert f"{len(meant)} weights in fp8 with scales are written as float32" in capsys.readouterr().out
    assert convert_checkpoint.main([words[0], "--dry_run"]) == 0
    assert f"fp8 with scales: {len(meant)} weights" in capsys.readouterr().out
    plain = load_file(tmp_path / "plain.safetensors")
    assert plain.keys() == tiny.original_state_dict("sd1").keys()
    assert all(torch.equal(plain[name], weight.half()) for name, weight in meant.items())
    assert "_quantization_metadata" not in read_header(tmp_path / "plain.safetensors").metadata


def test_a_ckpt_with_scales_is_read_too(tmp_path: Path) -> None:
    meant = write_scaled(tmp_path / "scaled.safetensors", "old")
    torch.save({"state_dict": load_file(tmp_path / "scaled.safetensors")}, tmp_path / "scaled.ckpt")
    reader = open_tensors(tmp_path / "scaled.ckpt")
    assert all(torch.equal(reader.get(name), weight) for name, weight in meant.items())


LAYER = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q"
WEIGHT = f"{LAYER}.weight"


def nf4(tensors: dict[str, torch.Tensor]) -> None:
    """bitsandbytes' Params4bit, as its state dict is written."""
    tensors[WEIGHT] = torch.zeros(tensors[WEIGHT].numel() // 2, 1, dtype=torch.uint8)
    tensors |= {f"{WEIGHT}.absmax": torch.ones(16), f"{WEIGHT}.quant_map": torch.ones(16)}
    tensors[f"{WEIGHT}.quant_state.bitsandbytes__nf4"] = torch.zeros(80, dtype=torch.uint8)


def comfy_int8(tensors: dict[str, torch.Tensor]) -> None:
    tensors[WEIGHT] = torch.zeros_like(tensors[WEIGHT], dtype=torch.int8)
    tensors |= {f"{LAYER}.weight_scale": torch.ones(()), f"{LAYER}.comfy_quant": torch.zeros(30, dtype=torch.uint8)}


def nvfp4(tensors: dict[str, torch.Tensor]) -> None:
    out, width = tensors[WEIGHT].shape
    tensors[WEIGHT] = torch.zeros(out, width // 2, dtype=torch.uint8)
    tensors |= {f"{LAYER}.weight_scale": torch.zeros(out, width // 16).to(torch.float8_e4m3fn)}
    tensors |= {f"{LAYER}.weight_scale_2": torch.ones(()), f"{LAYER}.comfy_quant": torch.zeros(9, dtype=torch.uint8)}


def int8_bnb(tensors: dict[str, torch.Tensor]) -> None:
    tensors[WEIGHT] = torch.zeros_like(tensors[WEIGHT], dtype=torch.int8)
    tensors[f"{LAYER}.SCB"] = torch.ones(len(tensors[WEIGHT]))


def integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[WEIGHT] = torch.zeros_like(tensors[WEIGHT], dtype=torch.int8)


@pytest.mark.parametrize(
    ("quantise", "words"),
    [
        (nf4, "4-bit nf4 of bitsandbytes"),
        (comfy_int8, "a format of ComfyUI"),
        (nvfp4, "nvfp4"),
        (int8_bnb, "int8 of bitsandbytes"),
        (integers, "no floating-point numbers: .* is I8"),
    ],
)
def test_what_is_quantised_otherwise_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quantise: Callable[[dict[str, torch.Tensor]], None], words: str
) -> None:
    tensors = tiny.original_state_dict("sd1")
    quantise(tensors)
    path = tmp_path / "quantised.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"its weights are quantised .{words}.*fp16"):
        detect(read_header(path))
    whole = tiny.write_single_file(tmp_path / "whole.safetensors", "sd1")
    assert convert_checkpoint.main([str(path), str(tmp_path / "x.ckpt")]) == 2
    assert merge_models.main(["--models", str(whole), str(path), "--output", str(tmp_path / "y.safetensors")]) == 2
    said = capsys.readouterr().err
    assert said.count("its weights are quantised") == 2 and "Traceback" not in said


@pytest.mark.parametrize("family", tiny.ALL)
def test_no_usual_file_is_taken_for_a_quantised_one(tmp_path: Path, family: str) -> None:
    one = tiny.write_single_file(tmp_path / "one.safetensors", family, position_ids=True, ema=True)
    assert kind_of(read_header(one).tensors) is None
    assert kind_of(read_header(tiny.write_diffusers(tmp_path / "folder", family)).tensors) is None


def test_the_copies_of_a_u_net_without_the_model_are_named() -> None:
    names = ("model_ema.diffusion_modelinput_blocks00weight", "model_ema.decay", "model_ema.num_updates")
    header = Header(Path("ema.ckpt"), "ckpt", {name: TensorInfo("F32", (4, 4)) for name in names})
    with pytest.raises(CheckpointError, match=r"ema\.ckpt: this looks like the EMA copies of a U-Net.*give the whole"):
        detect(header)
