"""LoRA files and folders on disk in kohya's, diffusers' and PEFT's format (networks/formats/key_names.py)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.adapter_names import AdapterPart
from library.checkpoints.folders import read_json
from library.checkpoints.header import CheckpointError
from library.checkpoints.writer import write_json, write_safetensors
from networks import adapter_files
from networks.adapter import AdapterError
from networks.formats import peft_config
from networks.formats.key_names import (
    BASE,
    Format,
    Lora,
    Place,
    best,
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
    """A LoRA in any of the formats, and which it is. `families`: the parts of each that it may be of; the names of its
    layers tell, the first wins where they do not. AdapterError or CheckpointError names all that does not fit."""
    known = [known_places(parts) for parts in families]
    if (source / DIFFUSERS_FILE).is_file():
        source = source / DIFFUSERS_FILE
    if source.is_dir() or (source.name in WEIGHTS and (source.parent / CONFIG).is_file()):
        tensors, configs, metadata = _read_folders(_folders(source, known), known)
        return from_peft(tensors, configs, metadata, best(known, _layers(tensors))), "peft"
    file = adapter_files.read(source)
    found = format_of(file.tensors)
    if found == "kohya":
        places = best(known, {key.partition(".")[0] for key in file.tensors})
        return from_kohya(file.tensors, file.metadata, places), found
    if found == "diffusers":
        by_module: dict[str, dict[str, Tensor]] = {}
        for key, tensor in file.tensors.items():
            module, _, name = key.partition(".")
            by_module.setdefault(module, {})[name] = tensor
        noted = peft_config.from_diffusers_metadata(file.metadata)
        return from_peft(by_module, noted, file.metadata, best(known, _layers(by_module))), found
    if found == "peft":
        raise AdapterError(f"{source} has no {CONFIG} beside it", "Give PEFT's whole folder.")
    shown = ", ".join(list(file.tensors)[:3])
    raise AdapterError(
        f"{source} is no LoRA in kohya's, diffusers' or PEFT's format (it holds {shown or 'nothing'})",
        "Give a LoRA file, or a folder of diffusers or PEFT.",
    )


def _layers(tensors: Mapping[str, Mapping[str, Tensor]]) -> set[str]:
    """The layers that tensors by module are of, each behind its module's name."""
    return {f"{module}.{split(key)[0]}" for module, of_module in tensors.items() for key in of_module}


def write_lora(target: Path, lora: Lora, to: Format) -> Path:
    """Write a LoRA, whole or not at all; returns the file or folder. AdapterError or CheckpointError.

    A diffusers file lies in `target`, under diffusers' name, unless that is a name for a .safetensors file itself.
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
    """AdapterError if something is there already, or if the name is not one for this format."""
    if target.exists():
        raise AdapterError(f"{target} is there already", "Name another, or move it away.")
    if to == "kohya" and target.suffix not in KOHYA_ENDINGS:
        raise AdapterError(
            f"{target} has none of the endings {', '.join(KOHYA_ENDINGS)}", f"Write {target.name}.safetensors."
        )
    if to == "peft" and target.suffix in KOHYA_ENDINGS:
        raise AdapterError(f"{target}: a PEFT LoRA is a folder", f"Write {target.with_suffix('')}.")


def _folders(source: Path, known: Sequence[Sequence[Place]]) -> list[Path]:
    """The folders of one module each, as PEFT saves them."""
    folder = source if source.is_dir() else source.parent
    inner = [folder / module for module in _modules(known) if (folder / module / CONFIG).is_file()]
    found = [folder] if (folder / CONFIG).is_file() else inner
    if not found:
        raise AdapterError(
            f"{folder} holds neither {DIFFUSERS_FILE} nor {CONFIG}, nor a folder with that for a module of the model",
            "Give a LoRA file, or a folder of diffusers or PEFT.",
        )
    return found


def _modules(known: Sequence[Sequence[Place]]) -> list[str]:
    """The modules of the families, each once."""
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
            raise AdapterError(f"{weights}: {len(wrong)} keys are not PEFT's: {', '.join(wrong[:8])}", "Get it again.")
        named = {key.removeprefix(BASE): tensor for key, tensor in file.tensors.items()}
        module = _module_of(folder, named, known)
        tensors[module], configs[module] = named, read_json(folder / CONFIG)
        metadata |= file.metadata
    return tensors, configs, metadata


def _module_of(folder: Path, tensors: Mapping[str, Tensor], known: Sequence[Sequence[Place]]) -> str:
    """The module of the model that a PEFT folder is for: its name, else the one that knows its first layer."""
    if folder.name in _modules(known):
        return folder.name
    first = next(iter(tensors), "")
    for place in (place for places in known for place in places):
        if first.startswith((f"{place.path}.lora_", f"{place.bare}.lora_")):
            return place.part.module
    raise AdapterError(
        f"{folder}: {first or 'nothing in it'} is no layer of a model that is known here",
        "Only LoRAs of Stable Diffusion's U-Net and text encoders can be converted.",
    )
