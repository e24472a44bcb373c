"""modelspec.* of full checkpoints, by the table of keys that users' tools read."""

from __future__ import annotations

import base64
from datetime import datetime
from pathlib import Path

import pytest
from PIL import Image

from library.checkpoints.header import CheckpointError
from library.checkpoints.metadata import build_modelspec, read_modelspec

NOON = datetime(2026, 7, 1, 12, 30, 15, 999_999)


def test_the_keys_of_a_full_checkpoint() -> None:
    spec = build_modelspec(
        architecture="stable-diffusion-v2-768-v",
        title="cat",
        made_at=NOON,
        resolution=(768, 512),
        prediction="v",
        implementation_version="1.0",
        timestep_range=(0, 1000),
        encoder_layer=2,
        user_fields={"author": "me", "license": "", "tags": None, "title": "not this one", "trigger_phrase": "zwx"},
    )
    assert spec == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v2-768-v",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.implementation_version": "1.0",
        "modelspec.title": "cat",
        "modelspec.date": "2026-07-01T12:30:15",
        "modelspec.resolution": "768x512",
        "modelspec.prediction_type": "v",
        "modelspec.timestep_range": "0,1000",
        "modelspec.encoder_layer": "2",
        "modelspec.author": "me",
        "modelspec.trigger_phrase": "zwx",
    }
    assert read_modelspec(spec | {"ss_seed": "1"})["title"] == "cat"


def minimal(**given: str) -> dict[str, str]:
    return build_modelspec(
        architecture="a", title=None, made_at=NOON, resolution=(512, 512), prediction="epsilon", user_fields=given
    )


def test_what_was_not_given_is_not_written() -> None:
    assert minimal()["modelspec.title"] == "Checkpoint@2026-07-01T12:30:15"
    assert not {"modelspec.timestep_range", "modelspec.encoder_layer", "modelspec.author"} & set(minimal())


def test_a_thumbnail_becomes_a_data_url(tmp_path: Path) -> None:
    image = tmp_path / "thumb.png"
    Image.new("RGB", (4, 4), "red").save(image)
    url = minimal(thumbnail=str(image))["modelspec.thumbnail"]
    head, _, body = url.partition(",")
    assert head == "data:image/png;base64" and base64.b64decode(body) == image.read_bytes()
    assert minimal(thumbnail=url)["modelspec.thumbnail"] == url
    with pytest.raises(CheckpointError, match=r"missing\.png: cannot be read"):
        minimal(thumbnail=str(tmp_path / "missing.png"))
    with pytest.raises(CheckpointError, match="not an image"):
        minimal(thumbnail="notes.txt")
