"""Headers of diffusers folders: configs and the parts' weight files, single or sharded. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from library.checkpoints.header import CheckpointError, Header, Place, TensorInfo

_ALWAYS = ("unet", "vae")
_TEXT = ("text_encoder", "text_encoder_2")  # those that model_index.json names
# As diffusers and transformers name them, best first. fp16 variants are taken where there is nothing else.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDINGS = (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin")

ReadFile = Callable[[Path], Header]


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object from a file; CheckpointError if it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}). Get the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object. Get the file again.")
    return value


def weight_files(folder: Path, variant: str = "") -> list[Path]:
    """The weight files of one part: one file, or the shards that its index names. Empty if there are none.

    `variant`: those of this one ("fp16") where there are any, as diffusers' variant takes them.
    """
    wanted = (f".{variant}.safetensors", f".{variant}.bin") if variant else ()
    for ending in (*wanted, *_ENDINGS):
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
        raise CheckpointError(f"{index}: names files that are not there: {', '.join(missing)}. Get the folder again.")
    return shards


def read_part(folder: Path, read_file: ReadFile, variant: str = "") -> Header:
    """Union of the headers of one part's weight files; its config.json, if any, as configs["config"]."""
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, Place] = {}
    for file in weight_files(folder, variant):
        header = read_file(file)
        tensors.update(header.tensors)
        places.update(header.places)
    config = folder / "config.json"
    return Header(folder, "diffusers", tensors, {}, {"config": read_json(config)} if config.is_file() else {}, places)


def _parts(model_index: Mapping[str, Any]) -> tuple[str, ...]:
    """The folders that must hold weights. A part that a pipeline could have and has not is [null, null]."""

    def has(part: str) -> bool:
        entry = model_index.get(part)
        return isinstance(entry, list) and any(entry)

    return (*_ALWAYS, *(part for part in _TEXT if has(part)))


def read_folder(folder: Path, read_file: ReadFile, variant: str = "") -> Header:
    """Header of a diffusers folder; names are prefixed by their part. CheckpointError if it is not such a folder."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise CheckpointError(
            f"{folder}: a folder without model_index.json, so not a diffusers model. "
            "Give a .safetensors or .ckpt file, or the folder that holds model_index.json."
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
                f"{folder}: no weights in {part}/ (its model_index.json says {kind}). Give a folder of Stable "
                "Diffusion 1.x, 2.x, XL or XL's refiner; if it is one, it is not whole: get it again."
            )
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        configs["scheduler"] = read_json(scheduler)
    return Header(folder, "diffusers", tensors, {}, configs, places)
