"""Read and write LoRA files and folders in the formats of kohya, diffusers and PEFT (see convert_keys.py)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.adapter_key_names import AdapterPart
from library.checkpoints.folders import read_json
from library.checkpoints.header import CheckpointError
from library.checkpoints.writer import write_json, write_safetensors
from library.messages import counted, listed
from networks import adapter_files
from networks.adapter import AdapterError
from networks.formats import peft_config
from networks.formats.convert_keys import (
    BASE,
    Format,
    Lora,
    Place,
    best_match,
    format_of,
    from_kohya,
    from_peft,
    known_places,
    split,
    to_kohya,
    to_peft,
)

if TYPE_CHECKING:
    from torch import Tensor

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # as diffusers' save_lora_weights names it
CONFIG = "adapter_config.json"  # as PEFT's save_pretrained names them
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
KOHYA_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth")


def read_lora(source: Path, *families: Iterable[AdapterPart]) -> tuple[Lora, Format]:
    """Read a LoRA in any of the formats; returns it with its format.

    `families`: the parts of each candidate family; the one that knows most of the layers is used, the first of equals.
    AdapterError or CheckpointError names everything that does not fit.
    """
    known = [known_places(parts) for parts in families]
    if (source / DIFFUSERS_FILE).is_file():
        source = source / DIFFUSERS_FILE
    if source.is_dir() or (source.name in WEIGHTS and (source.parent / CONFIG).is_file()):
        tensors, configs, metadata = _read_folders(_folders(source, known), known)
        return from_peft(tensors, configs, metadata, best_match(known, _layers(tensors))), "peft"
    file = adapter_files.read(source)
    detected = format_of(file.tensors)
    if detected == "kohya":
        places = best_match(known, {key.partition(".")[0] for key in file.tensors})
        return from_kohya(file.tensors, file.metadata, places), detected
    if detected == "diffusers":
        by_module: dict[str, dict[str, Tensor]] = {}
        for key, tensor in file.tensors.items():
            module, _, name = key.partition(".")
            by_module.setdefault(module, {})[name] = tensor
        saved_configs = peft_config.from_diffusers_metadata(file.metadata)
        return from_peft(by_module, saved_configs, file.metadata, best_match(known, _layers(by_module))), detected
    if detected == "peft":
        raise AdapterError(f"{source} has no {CONFIG} beside it", "use PEFT's whole folder")
    keys = ", ".join(list(file.tensors)[:3]) or "none"
    raise AdapterError(
        f"{source} is not a LoRA in the format of kohya, diffusers or PEFT (its keys: {keys})",
        "use a LoRA file, or a folder of diffusers or PEFT",
    )


def _layers(tensors: Mapping[str, Mapping[str, Tensor]]) -> set[str]:
    """The layers of tensors by module, as "module.path"."""
    return {f"{module}.{split(key)[0]}" for module, of_module in tensors.items() for key in of_module}


def write_lora(target: Path, lora: Lora, to: Format) -> Path:
    """Write a LoRA, completely or not at all; returns the file or folder. AdapterError or CheckpointError.

    For diffusers, `target` is a folder that gets a file with diffusers' name, or a .safetensors file.
    """
    if to == "diffusers" and target.suffix != ".safetensors":
        target = target / DIFFUSERS_FILE
    check_target(target, to)
    if to == "kohya":
        adapter_files.write(target, *to_kohya(lora))
        return target
    tensors, configs, metadata = to_peft(lora, text_level=to == "diffusers")
    if to == "diffusers":
        whole = {f"{module}.{key}": tensor for module, own in tensors.items() for key, tensor in own.items()}
        write_safetensors(target, whole, metadata | peft_config.to_diffusers_metadata(configs))
        return target
    building = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        for module, own in tensors.items():
            named = {BASE + key: tensor for key, tensor in own.items()}
            write_safetensors(building / module / WEIGHTS[0], named, {"format": "pt"} | metadata)
            write_json(building / module / CONFIG, configs[module])
        os.replace(building, target)
    except OSError as error:
        what = f"{target}: could not be written ({error.strerror or error}). Nothing was changed."
        raise CheckpointError(f"{what} Check the path and its permissions.") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def check_target(target: Path, to: Format) -> None:
    """AdapterError if the target exists, or if its name does not fit the format."""
    if target.exists():
        raise AdapterError(f"{target} exists already", "choose another name, or move it away")
    if to == "kohya" and target.suffix not in KOHYA_ENDINGS:
        raise AdapterError(
            f"{target} has none of the extensions {', '.join(KOHYA_ENDINGS)}", f"use {target.name}.safetensors"
        )
    if to == "peft" and target.suffix in KOHYA_ENDINGS:
        raise AdapterError(f"{target}: a PEFT LoRA is a folder", f"use {target.with_suffix('')}")


def _folders(source: Path, known: Sequence[Sequence[Place]]) -> list[Path]:
    """The folders that PEFT saves, one per module."""
    folder = source if source.is_dir() else source.parent
    inner = [folder / module for module in _modules(known) if (folder / module / CONFIG).is_file()]
    found = [folder] if (folder / CONFIG).is_file() else inner
    if not found:
        raise AdapterError(
            f"{folder} has neither {DIFFUSERS_FILE} nor {CONFIG}, nor a folder with {CONFIG} for a module of the model",
            "use a LoRA file, or a folder of diffusers or PEFT",
        )
    return found


def _modules(known: Sequence[Sequence[Place]]) -> list[str]:
    """The modules of all families."""
    return list(dict.fromkeys(place.part.module for places in known for place in places))


def _read_folders(
    folders: Iterable[Path], known: Sequence[Sequence[Place]]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Mapping[str, Any]], dict[str, str]]:
    tensors: dict[str, dict[str, Tensor]] = {}
    configs: dict[str, Mapping[str, Any]] = {}
    metadata: dict[str, str] = {}
    for folder in folders:
        weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder / WEIGHTS[0])
        file = adapter_files.read(weights)
        if wrong := [key for key in file.tensors if not key.startswith(BASE)]:
            what = f"{weights}: {counted(len(wrong), 'key')} in another format than PEFT's: {listed(wrong, 8)}"
            raise AdapterError(what, "get the file again")
        named = {key.removeprefix(BASE): tensor for key, tensor in file.tensors.items()}
        module = _module_of(folder, named, known)
        tensors[module], configs[module] = named, read_json(folder / CONFIG)
        metadata |= file.metadata
    return tensors, configs, metadata


def _module_of(folder: Path, tensors: Mapping[str, Tensor], known: Sequence[Sequence[Place]]) -> str:
    """The module of the model that a PEFT folder belongs to, by its name or else by its first layer."""
    if folder.name in _modules(known):
        return folder.name
    first = next(iter(tensors), "")
    for place in (place for places in known for place in places):
        if first.startswith((f"{place.path}.lora_", f"{place.bare}.lora_")):
            return place.part.module
    raise AdapterError(
        f"{folder}: {first} is not a layer of a supported model" if first else f"{folder} has no tensors",
        "use a LoRA of Stable Diffusion's U-Net or text encoders",
    )
