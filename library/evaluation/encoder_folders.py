"""Local folders of encoders in transformers' format, checked before their weights are read. No torch.

A folder has config.json, whose model_type says what it is, weights (model.safetensors, pytorch_model.bin, or their
pieces), preprocessor_config.json, which says how an image is resized, cropped and normalised, and for CLIP a tokenizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.bounded import read_json
from library.checkpoints.files import read_part_header, sha256
from library.checkpoints.header import CheckpointError
from library.options.mistakes import Mistakes

Kind = Literal["dino", "clip"]
MODEL_TYPES: Mapping[str, Kind] = {"vit": "dino", "dinov2": "dino", "dinov2_with_registers": "dino", "clip": "clip"}
FLAGS: Mapping[Kind, str] = {"dino": "evaluation_dino", "clip": "evaluation_clip"}
_EXAMPLES: Mapping[Kind, str] = {
    "dino": "DINO (facebook/dino-vits16) or DINOv2 (facebook/dinov2-base)",
    "clip": "CLIP (openai/clip-vit-base-patch32)",
}


@dataclass(frozen=True)
class EncoderFolder:
    """A folder that was checked. `model_type`: a key of MODEL_TYPES."""

    path: Path
    model_type: str
    files: tuple[Path, ...]

    def fingerprint(self) -> str:
        """Changes whenever weights or settings do."""
        lines = [f"{file.name} {sha256(file)}" for file in (*self.files, *sorted(self.path.glob("*config.json")))]
        return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()


def check_encoder(kind: Kind, path: Path | None, mistakes: Mistakes) -> EncoderFolder | None:
    """The folder of an encoder; None without one, or with mistakes added."""
    if path is None:
        return None
    flag = f"--{FLAGS[kind]} {path}"
    get = f"download {_EXAMPLES[kind]} once, and give its folder: nothing is downloaded here"
    if not path.is_dir():
        mistakes.add(f"{flag} is {'a file' if path.is_file() else 'not there'}, and must be a folder", get)
        return None
    try:
        config = read_json(path / "config.json")
        model_type = str(config["model_type"])
    except FileNotFoundError:
        mistakes.add(f"{flag} has no config.json", get)
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        mistakes.add(f"{flag}: config.json cannot be read ({error})", get)
        return None
    found = MODEL_TYPES.get(model_type)
    if found != kind:
        other = f"give it to --{FLAGS[found]}" if found else get
        mistakes.add(f"{flag} is a model of the type {model_type}", other)
        return None
    return _with_files(flag, path, model_type, mistakes)


def _with_files(flag: str, path: Path, model_type: str, mistakes: Mistakes) -> EncoderFolder | None:
    """The folder with its weight files, if nothing is missing."""
    if not (path / "preprocessor_config.json").is_file():
        mistakes.add(f"{flag} has no preprocessor_config.json", "get it from where the weights are from")
    vocabularies = ("tokenizer.json", "vocab.json")
    if model_type == "clip" and not any((path / name).is_file() for name in vocabularies):
        mistakes.add(f"{flag} has no tokenizer.json", "get the tokenizer from where the weights are from")
    try:
        header = read_part_header(path)
    except CheckpointError as error:
        mistakes.add(f"{flag}: {error}")
        return None
    files = tuple(sorted({place.file for place in header.places.values()}))
    if not files:
        mistakes.add(f"{flag} has no weights", "get its model.safetensors")
        return None
    return EncoderFolder(path, model_type, files)
