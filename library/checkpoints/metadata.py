"""Build and read the modelspec.* metadata of a file.

Source: Stability-AI/ModelSpec 1.0.1, with the values that other tools expect for Stable Diffusion.
"""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from library.checkpoints.header import CheckpointError

_PREFIX = "modelspec."
_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"

# modelspec.implementation by the naming scheme of the U-Net's layers
IMPLEMENTATIONS = {"diffusers": "diffusers", "original": _IMPLEMENTATION}

# the ss_* keys that other programs need to load an adapter; all that --no_metadata keeps
ADAPTER_MINIMUM = (
    "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
)  # fmt: skip


def build_modelspec(  # noqa: PLR0913 - one argument per key of the standard
    *,
    architecture: str,
    title: str | None,
    made_at: datetime,
    resolution: tuple[int, int],
    prediction: str,
    implementation: str = _IMPLEMENTATION,
    implementation_version: str | None = None,
    timestep_range: tuple[int, int] | None = None,
    encoder_layer: int | None = None,
    user_fields: Mapping[str, str | None] | None = None,
    untitled: str = "Checkpoint",
) -> dict[str, str]:
    """Build the modelspec.* strings of a model file.

    architecture  such as "stable-diffusion-v1"; prediction "epsilon" or "v"; resolution (width, height)
    title         None or "" becomes `untitled`@<time>; made_at is local time
    user_fields   set by the user with metadata_*: author, description, license, tags, usage_hint, thumbnail or any
                  other name. A thumbnail path becomes a data URL. Raises CheckpointError if that file cannot be read
    """
    stamp = made_at.replace(microsecond=0)
    spec = {
        "sai_model_spec": "1.0.1",
        "architecture": architecture,
        "implementation": implementation,
        "title": title or f"{untitled}@{stamp.isoformat()}",
        "date": stamp.isoformat(),
        "resolution": f"{resolution[0]}x{resolution[1]}",
        "prediction_type": prediction,
    }
    if implementation_version is not None:
        spec["implementation_version"] = implementation_version
    if timestep_range is not None:
        spec["timestep_range"] = f"{timestep_range[0]},{timestep_range[1]}"
    if encoder_layer is not None:
        spec["encoder_layer"] = str(encoder_layer)
    for name, value in (user_fields or {}).items():
        if value and name != "title":
            spec[name] = thumbnail_url(value) if name == "thumbnail" else value
    return {_PREFIX + name: value for name, value in spec.items()}


def read_modelspec(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the modelspec values of a header's metadata, without the prefix in their names."""
    return {name.removeprefix(_PREFIX): value for name, value in metadata.items() if name.startswith(_PREFIX)}


def thumbnail_url(value: str) -> str:
    """Return an image file as a data URL; a data URL is returned unchanged. Raises CheckpointError."""
    if value.startswith("data:"):
        return value
    kind = mimetypes.guess_type(value)[0] or ""
    if not kind.startswith("image/"):
        raise CheckpointError(f"metadata_thumbnail {value}: not an image file. Use a .png, .jpg or .webp file.")
    try:
        content = Path(value).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"metadata_thumbnail {value}: cannot be read ({error.strerror}). Check the path."
        ) from error
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
