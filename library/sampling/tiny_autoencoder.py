"""Tiny autoencoders (github.com/madebyollin/taesd): small decoders of latents, for pictures on the way.

Read are diffusers folders of AutoencoderTiny, their weights alone, and the original `taesd_decoder.safetensors`, whose
layers are counted with a clamp before the first one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.bounded import read_json
from library.checkpoints.files import read_part_header
from library.checkpoints.header import CheckpointError
from library.options.mistakes import Mistake

if TYPE_CHECKING:
    from torch import Tensor

_DIFFUSERS = "decoder.layers."
_REMEDY = (
    "use one for this family: taesd for Stable Diffusion 1 and 2, taesdxl for XL, as a folder or a .safetensors file"
)


def check_tiny(path: Path, channels: int) -> Mistake | None:
    """Why this cannot be a tiny autoencoder for latents with so many channels, from names and shapes; or None."""
    named = f"--preview_tae {path}"
    try:
        found = _channels_of(path)
    except (OSError, ValueError, CheckpointError) as error:
        reason = getattr(error, "strerror", None) or error
        return Mistake(f"{named} cannot be read: {reason}", _REMEDY)
    if found is None:
        return Mistake(f"{named} is no tiny autoencoder", _REMEDY)
    if found != channels:
        return Mistake(f"{named} decodes latents with {found} channels, the model has {channels}", _REMEDY)
    return None


def _channels_of(path: Path) -> int | None:
    if path.is_dir():
        config = read_json(path / "config.json")
        read_part_header(path)  # whatever diffusers reads later is safe to read
        is_tiny = isinstance(config, dict) and config.get("_class_name") == "AutoencoderTiny"
        return int(config.get("latent_channels", 4)) if is_tiny else None
    tensors = read_part_header(path).tensors
    first = tensors.get(f"{_DIFFUSERS}0.weight") or tensors.get("1.weight")
    return first.shape[1] if first is not None and len(first.shape) == 4 else None


def load_tiny(path: Path) -> Any:
    """The autoencoder in float32 on the CPU. Raises errors of many kinds for what is not whole."""
    import diffusers

    tiny: Any = diffusers.AutoencoderTiny
    if path.is_dir():
        return tiny.from_pretrained(path, local_files_only=True).eval()
    from safetensors.torch import load_file

    weights = decoder_weights(load_file(path))
    model = tiny(latent_channels=weights["layers.0.weight"].shape[1])
    model.decoder.load_state_dict(weights)
    return model.eval()


def decoder_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's tensors under diffusers' names, without `decoder.`, from either kind of file."""
    if f"{_DIFFUSERS}0.weight" in tensors:
        names = {name: name.removeprefix("decoder.") for name in tensors if name.startswith(_DIFFUSERS)}
    else:
        names = {name: re.sub(r"^(\d+)", lambda number: f"layers.{int(number[1]) - 1}", name) for name in tensors}
    return {new: tensors[old] for old, new in names.items()}


def decode_tiny(model: Any, latents: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in about [-1, 1] of latents (B, C, h, w) as the backbone sees them."""
    given = latents / model.config.scaling_factor + model.config.shift_factor
    pixels: Tensor = model.decode(given.to(model.device, model.dtype)).sample
    return pixels
