"""Read headers of diffusers folders: configs and weight files, single or sharded. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from library import bounded
from library.checkpoints.header import CheckpointError, Header, Place, TensorInfo

_ALWAYS = ("unet", "vae")
_TEXT = ("text_encoder", "text_encoder_2")  # if listed in model_index.json
# Names used by diffusers and transformers, best first. fp16 variants are used if there is nothing else.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDINGS = (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin")

ReadFile = Callable[[Path], Header]


def read_json(path: Path) -> Mapping[str, Any]:
    """Read a JSON object from a file. Raises CheckpointError if it is not one."""
    try:
        value = bounded.read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}). Get the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must contain a JSON object. Get the file again.")
    return value


def weight_files(folder: Path, variant: str = "") -> list[Path]:
    """Return the weight files of one part: one file, or the shards listed in its index; empty if there are none.

    `variant`: files of this variant ("fp16") are preferred, as in diffusers.
    """
    preferred = (f".{variant}.safetensors", f".{variant}.bin") if variant else ()
    for ending in (*preferred, *_ENDINGS):
        for stem in _STEMS:
            whole = folder / (stem + ending)
            if whole.is_file():
                return [whole]
            index = _index(folder, stem, ending)
            if index.is_file():
                return _shards(index)
    return []


def _index(folder: Path, stem: str, ending: str) -> Path:
    *variant, kind = ending.lstrip(".").split(".")
    return folder / ".".join([stem, kind, "index", *variant, "json"])


def _shards(index: Path) -> list[Path]:
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise CheckpointError(f"{index}: has no weight_map. Get the file again.")
    shards = [index.parent / Path(name).name for name in sorted(set(named.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(f"{index}: lists missing files: {', '.join(missing)}. Get the folder again.")
    return shards


def read_part(folder: Path, read_file: ReadFile, variant: str = "") -> Header:
    """Merge the headers of one part's weight files; its config.json, if any, becomes configs["config"]."""
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, Place] = {}
    for file in weight_files(folder, variant):
        header = read_file(file)
        tensors.update(header.tensors)
        places.update(header.places)
    config = folder / "config.json"
    return Header(folder, "diffusers", tensors, {}, {"config": read_json(config)} if config.is_file() else {}, places)


def _parts(model_index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the folders that must contain weights. Missing optional parts are [null, null] in model_index.json."""

    def has(part: str) -> bool:
        entry = model_index.get(part)
        return isinstance(entry, list) and any(entry)

    return (*_ALWAYS, *(part for part in _TEXT if has(part)))


def read_folder(folder: Path, read_file: ReadFile, variant: str = "") -> Header:
    """Read the header of a diffusers folder; names are prefixed by their part. Raises CheckpointError."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise CheckpointError(
            f"{folder}: not a diffusers model (no model_index.json). "
            "Give a .safetensors or .ckpt file, or the folder that contains model_index.json."
        )
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, Place] = {}
    configs: dict[str, Mapping[str, Any]] = {"model_index": read_json(index)}
    for part in _parts(configs["model_index"]):
        header = read_part(folder / part, read_file, variant)
        tensors.update({f"{part}/{name}": info for name, info in header.tensors.items()})
        places.update({f"{part}/{name}": place for name, place in header.places.items()})
        if header.configs:
            configs[part] = header.configs["config"]
        if not header.tensors:
            kind = configs["model_index"].get("_class_name", "no pipeline")
            raise CheckpointError(
                f"{folder}: no weights in {part}/ (model_index.json: {kind}). Give a folder of Stable Diffusion 1.x, "
                "2.x, XL or XL's refiner; if it is one, it is incomplete: get it again."
            )
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        configs["scheduler"] = read_json(scheduler)
    return Header(folder, "diffusers", tensors, {}, configs, places)
