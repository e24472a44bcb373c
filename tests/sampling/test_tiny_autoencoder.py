"""Tiny autoencoders: the three forms in which they lie on a disk, and what is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.sampling.tiny_autoencoder import check_tiny, decode_tiny, load_tiny

LATENTS = torch.randn(1, 4, 3, 2, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder, the same weights as a file, and as the original's decoder: its layers count the clamp."""
    from diffusers import AutoencoderTiny

    folder = tmp_path_factory.mktemp("tiny ä")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoencoderTiny().save_pretrained(folder / "folder")
    weights = load_file(folder / "folder" / "diffusion_pytorch_model.safetensors")
    save_file(weights, folder / "weights.safetensors")
    layers = {name.removeprefix("decoder.layers."): weights[name] for name in weights if name.startswith("decoder.")}
    original = {f"{int(name.split('.')[0]) + 1}.{name.split('.', 1)[1]}": layers[name] for name in layers}
    save_file(original, folder / "taesd_decoder.safetensors")
    return folder


@pytest.mark.parametrize("name", ["folder", "weights.safetensors", "taesd_decoder.safetensors"])
def test_every_form_decodes_the_same(name: str, saved: Path) -> None:
    from diffusers import AutoencoderTiny

    assert check_tiny(saved / name, 4) is None
    expected = AutoencoderTiny.from_pretrained(saved / "folder").decode(LATENTS).sample
    with torch.no_grad():
        pixels = decode_tiny(load_tiny(saved / name), LATENTS)
    assert pixels.shape == (1, 3, 24, 16) and torch.equal(pixels, expected)


def test_what_is_none(saved: Path, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}), encoding="utf-8")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{", encoding="utf-8")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    cases: dict[Any, str] = {
        tmp_path / "gone": "cannot be read",
        tmp_path / "other.safetensors": "no tiny autoencoder",
        tmp_path / "vae": "no tiny autoencoder",
        tmp_path / "broken": "cannot be read",
        tmp_path: "cannot be read",
        tmp_path / "empty.safetensors": "cannot be read",
    }
    for path, words in cases.items():
        mistake = check_tiny(path, 4)
        assert mistake is not None and words in mistake.what and "--preview_tae" in mistake.what, path
    for name in ("folder", "weights.safetensors", "taesd_decoder.safetensors"):
        mistake = check_tiny(saved / name, 16)
        assert mistake is not None and "4 channels, the model has 16" in mistake.what
