"""The supported model families; find a model, detect its family, load and save it. No torch at module level.

To add a family, write a file of its own (see family.py for what it consists of) and add it to FAMILIES.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.files import read_header
from library.checkpoints.header import CheckpointError, Header
from library.checkpoints.prediction_marks import DeclaredPrediction, declared_prediction
from library.checkpoints.quantized import refuse as refuse_quantized
from library.families import unsupported
from library.families.family import Family, Model, SaveAs
from library.families.sd.inference_yaml import write_inference_yaml
from library.families.sd.refiner import REFINER
from library.families.sd.sd import SD1, SD2
from library.families.sd.sdxl import SDXL

if TYPE_CHECKING:
    import torch

    from library.objective.process import Prediction

__all__ = [
    "FAMILIES", "CheckpointError", "DeclaredPrediction", "Header", "NotDownloaded", "declared_prediction", "detect",
    "find_model", "load_model", "open_model", "save_model", "whole_model", "write_inference_yaml",
]  # fmt: skip

FAMILIES: tuple[Family, ...] = (SD1, SD2, SDXL, REFINER)


class NotDownloaded(CheckpointError):
    """A name like that of a model on the hub, which is not on this machine."""


def detect(header: Header) -> Family:
    """Detect the family of a checkpoint from tensor names and shapes. Raises CheckpointError that says what it is."""
    refuse_quantized(header)
    for family in FAMILIES:
        if family.recognise(header):
            return family
    raise CheckpointError(f"{header.path}: {unsupported.explain(header, [family.title for family in FAMILIES])}")


def whole_model(header: Header) -> Family | None:
    """The family of a whole model; None if the file is something else, such as an adapter."""
    try:
        return detect(header)
    except CheckpointError:
        return None


def open_model(name: str) -> tuple[Header, Family]:
    """Find a model by name (see find_model) and return its header and family. Raises CheckpointError."""
    header = read_header(find_model(name))
    return header, detect(header)


def load_model(
    source: Header,
    *,
    vae: Path | str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    prediction: Prediction | None = None,
    tokenizer_cache_dir: Path | None = None,
) -> Model:
    """Load a checkpoint of any family; see families.family.Load. Raises CheckpointError."""
    return detect(source).load(
        source, vae=vae, dtype=dtype, device=device, prediction=prediction, tokenizer_cache_dir=tokenizer_cache_dir
    )


def save_model(
    model: Model,
    path: Path,
    *,
    save_as: SaveAs,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    steps: int = 0,
    epoch: int = 0,
) -> tuple[str, ...]:
    """Save a model of any family; see families.family.Save. Returns messages for the user."""
    return model.family.save(model, path, save_as=save_as, dtype=dtype, metadata=metadata, steps=steps, epoch=epoch)


def find_model(name: str) -> Path:
    """Return the local path of a model: a file, a folder, or a hub id that is in Hugging Face's cache already.

    Nothing is downloaded. Raises CheckpointError for anything else, NotDownloaded if it may be another hub id.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(f"{name}: no such file or folder. Check the path.")
    snapshot = _cached_snapshot(name)
    if snapshot is None:
        raise NotDownloaded(
            f"{name}: no such file or folder, and no model of this name in the local Hugging Face cache (nothing is "
            f"downloaded here). Download it once, for example: hf download {name} --local-dir {name.split('/')[1]} . "
            "Then give that folder, or the path of a .safetensors or .ckpt file."
        )
    return snapshot


def hub_caches() -> tuple[Path, ...]:
    """Return the cache folders of huggingface_hub, from its environment variables."""
    for variable, below in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if value := os.environ.get(variable):
            return (Path(value).expanduser() / below,)
    root = os.environ.get("XDG_CACHE_HOME")
    return ((Path(root) if root else Path.home() / ".cache") / "huggingface" / "hub",)


def _cached_snapshot(name: str) -> Path | None:
    """Return a hub model's snapshot folder: the one of `main`, otherwise the newest."""
    for cache in hub_caches():
        model = cache / f"models--{name.replace('/', '--')}"
        main = model / "refs" / "main"
        if main.is_file():
            snapshot = model / "snapshots" / Path(main.read_text(encoding="utf-8").strip()).name
            if snapshot.is_dir():
                return snapshot
        if (model / "snapshots").is_dir():
            found = sorted((model / "snapshots").iterdir(), key=lambda folder: folder.stat().st_mtime)
            if found:
                return found[-1]
    return None
