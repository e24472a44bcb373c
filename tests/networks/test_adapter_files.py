"""Adapter files: what others read in them, hashes as formats.md 8.2 has them, whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from library.checkpoints.files import CheckpointError
from networks import adapter_files
from tests.networks import models

METADATA = {"ss_network_dim": "4", "modelspec.title": "Häuser, 家", "ss_network_module": "networks.lora"}


def content(size: int = 4) -> dict[str, torch.Tensor]:
    return models.trained(models.create(models.toy(), "conv_dim=2", dim=size)).tensors()


@pytest.mark.parametrize("ending", ["safetensors", "pt", "ckpt"])
def test_there_and_back(tmp_path: Path, ending: str) -> None:
    tensors = content()
    path = tmp_path / "größe" / f"a.{ending}"
    adapter_files.write(path, tensors, METADATA)
    read = adapter_files.read(path)
    assert read.tensors.keys() == tensors.keys()
    assert all(
        torch.equal(value, tensors[key]) and value.dtype is tensors[key].dtype for key, value in read.tensors.items()
    )
    if ending == "safetensors":
        assert METADATA.items() <= read.metadata.items()
        assert all(torch.equal(value, tensors[key]) for key, value in load_file(path).items())
    else:  # what kohya's loaders expect: the tensors at the top
        assert torch.load(path, weights_only=True).keys() == tensors.keys()


@pytest.mark.parametrize("rows", [4, 400_000])
def test_hashes_as_others_compute_them(tmp_path: Path, rows: int) -> None:
    """sshs_model_hash: SHA-256 of all behind the header. sshs_legacy_hash: of 64 KiB at 1 MiB of the file that
    safetensors makes of the tensors with the ss_ keys alone, 8 digits."""
    tensors = content() | {"lora_unet_long.lora_down.weight": torch.arange(rows).float()}
    path = tmp_path / "a.safetensors"
    adapter_files.write(path, tensors, METADATA)
    whole = path.read_bytes()
    payload = whole[8 + int.from_bytes(whole[:8], "little") :]
    alone = save(tensors, {key: value for key, value in METADATA.items() if key.startswith("ss_")})
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["sshs_model_hash"] == hashlib.sha256(payload).hexdigest()
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(alone[0x100000:0x110000]).hexdigest()[:8]
    if rows == 4:
        assert metadata["sshs_legacy_hash"] == "e3b0c442"


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_values_that_are_not_finite_are_not_written(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    adapter_files.write(path, content(), {})
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="lora_unet_x"):
        adapter_files.write(path, {"lora_unet_x.alpha": torch.tensor(float("nan"))}, {})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_reading_does_not_keep_the_file_open(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    adapter_files.write(path, content(), {})
    read = adapter_files.read(path)
    before = {key: value.clone() for key, value in read.tensors.items()}
    path.write_bytes(b"\0" * path.stat().st_size)  # under a mapping this would change the tensors
    assert all(torch.equal(value, before[key]) for key, value in read.tensors.items())


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        adapter_files.read(tmp_path / "none.safetensors")
