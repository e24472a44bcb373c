"""Hashes of adapters as kohya's tools define them: over what the safetensors library makes of the ss_* metadata."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from library.checkpoints.adapter_hashes import adapter_hashes
from library.checkpoints.files import payload_sha256
from library.checkpoints.writer import write_safetensors

TRAINING = {"ss_network_dim": "4", "ss_training_comment": 'a "dog" 犬\n\x01\x7f 🐕'}
OTHERS = {"modelspec.title": "a title " * 50, "sshs_model_hash": "an old one"}


def tensors(megabytes: float) -> dict[str, torch.Tensor]:
    count = int(megabytes * 2**20 / 4)
    generator = torch.Generator().manual_seed(0)
    return {
        "z.lora_down.weight": torch.randn(count // 4, 2, generator=generator).half(),
        "a.lora_up.weight": torch.randn(count // 2, 1, generator=generator),
        "a.alpha": torch.tensor(1.0),
        "é.lora_down.weight": torch.randn(4, count // 8, generator=generator).t(),
        "b.alpha": torch.tensor(2.0, dtype=torch.bfloat16),
    }


def expected(made: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, str]:
    file = save({name: tensor.contiguous() for name, tensor in made.items()}, metadata)
    payload = file[8 + int.from_bytes(file[:8], "little") :]
    return {
        "sshs_model_hash": hashlib.sha256(payload).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(file[0x100000:0x110000]).hexdigest()[:8],
    }


@pytest.mark.parametrize("megabytes", [0.01, 1.001, 1.03, 3])  # nothing at 1 MiB, its end is near, all 64 KiB are there
@pytest.mark.parametrize("metadata", [TRAINING, {"ss_tag_frequency": "cat, " * 230_000}, {}])
def test_they_are_those_of_the_file_with_training_metadata_alone(megabytes: float, metadata: dict[str, str]) -> None:
    made = tensors(megabytes)
    assert adapter_hashes(made, metadata | OTHERS) == expected(made, metadata)


def test_a_small_file_has_the_legacy_hash_of_nothing() -> None:
    assert adapter_hashes(tensors(0.5), TRAINING)["sshs_legacy_hash"] == "e3b0c442"


@pytest.mark.parametrize("dtype", [None, "F16", "F32"])
def test_they_are_of_the_values_that_are_written(dtype: str | None, tmp_path: Path) -> None:
    made = tensors(2)
    hashes = adapter_hashes(made, TRAINING, dtype)
    write_safetensors(tmp_path / "a.safetensors", made, TRAINING | OTHERS | hashes, dtype)
    assert payload_sha256(tmp_path / "a.safetensors") == hashes["sshs_model_hash"]
    cast = made if dtype is None else {name: t.to(getattr(torch, f"float{dtype[1:]}")) for name, t in made.items()}
    assert hashes == expected(cast, TRAINING)
