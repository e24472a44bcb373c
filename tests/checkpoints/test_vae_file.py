"""Every published form of a VAE file gives the same diffusers state dict."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.files import CheckpointError, read_header
from library.checkpoints.vae_file import read_vae
from library.families.registry import load_model, save_model
from tests import tiny
from tests.checkpoints.test_sd_layout import assert_same, loaded

OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def expected() -> dict[str, torch.Tensor]:
    return dict(tiny.diffusers_modules("sd1").vae.state_dict())


def old(name: str) -> str:
    """The attention's names before diffusers 0.15."""
    for new, former in OLD_NAMES.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
    return name


def half_converted(name: str) -> str:
    """`mid.attn_1.to_q` for `mid.attn_1.q`, as converters write it that do not know diffusers' names since 0.15."""
    for new, former in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        name = name.replace(f"mid.attn_1.{former}.", f"mid.attn_1.{new}.")
    return name


def half_shaped(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The weight of a Linear, as there."""
    return tensor[:, :, 0, 0].contiguous() if ".attn_1." in name and tensor.dim() == 4 else tensor


def write(path: Path, form: str) -> Path:
    original = {
        name.removeprefix("first_stage_model."): tensor
        for name, tensor in tiny.original_state_dict("sd1").items()
        if name.startswith("first_stage_model.")
    }
    training = {
        "loss.logvar": torch.zeros(1),
        "loss.discriminator.main.0.weight": torch.zeros(2),
        "model_ema.decay": torch.ones(1),
    }
    if form == "bare safetensors":
        save_file(original, path)
    elif form == "prefixed safetensors":
        save_file({f"first_stage_model.{name}": tensor for name, tensor in original.items()}, path)
    elif form == "pt of VAE training":
        torch.save({"state_dict": original | training, "epoch": 3, "global_step": 9}, path)
    elif form == "bare pt":
        torch.save(original | training, path)
    elif form == "half converted":  # the attention's names of diffusers in an original file
        save_file({half_converted(name): half_shaped(name, tensor) for name, tensor in original.items()}, path)
    elif form == "whole model":
        tiny.write_single_file(path.with_suffix(".ckpt"), "sd1").replace(path)
    elif form == "diffusers bin":
        torch.save(expected(), path)
    elif form == "old diffusers bin":
        torch.save({old(name): tensor for name, tensor in expected().items()}, path)
    elif form == "diffusers folder":
        tiny.write_diffusers(path, "sd1")
    elif form == "vae folder":
        tiny.write_diffusers(path.with_name("all"), "sd1")
        return path.with_name("all") / "vae"
    return path


FORMS = [
    "bare safetensors", "prefixed safetensors", "pt of VAE training", "bare pt", "whole model", "diffusers bin",
    "old diffusers bin", "diffusers folder", "vae folder", "half converted",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_vae(tmp_path: Path, form: str) -> None:
    vae = read_vae(write(tmp_path / "vae", form))
    assert_same(loaded(vae.tensors), expected())
    assert vae.original == ("diffusers" not in form and form != "vae folder")
    assert len(vae.notes) == (1 if form in ("pt of VAE training", "bare pt") else 0)


def test_no_vae_and_unknown_keys(tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="contains no VAE"):
        read_vae(tmp_path / "a.safetensors")
    save_file(expected() | {"decoder.odd.weight": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"b\.safetensors: 1 unknown tensor: decoder\.odd\.weight"):
        read_vae(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        read_vae(tmp_path / "missing.pt")


def test_a_whole_file_with_a_half_converted_vae_is_the_same_model(tmp_path: Path) -> None:
    """And it is written with the usual names."""
    tensors = tiny.original_state_dict("sd1")
    odd = {half_converted(name): half_shaped(name, tensor) for name, tensor in tensors.items()}
    assert odd.keys() != tensors.keys()
    save_file(odd, tmp_path / "odd.safetensors")
    model = load_model(read_header(tmp_path / "odd.safetensors"))
    assert_same(dict(model.vae.state_dict()), expected())
    save_model(model, tmp_path / "usual.safetensors", save_as="safetensors")
    assert_same(load_file(tmp_path / "usual.safetensors"), tensors)
