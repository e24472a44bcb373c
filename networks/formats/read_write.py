"""Read and write LoRA files and folders in the formats of kohya, diffusers and PEFT (see convert_keys.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints.adapter_key_names import AdapterPart
from library.checkpoints.folders import read_json
from library.checkpoints.writer import replacing_folder, write_json, write_safetensors
from library.messages import counted, listed
from library.whole_files import remove_leftovers
from networks import adapter_files
from networks.adapter import AdapterError
from networks.adapter_files import AdapterFile
from networks.formats import peft_config
from networks.formats.convert_keys import (
    BASE,
    Format,
    Found,
    Lora,
    from_kohya,
    from_peft,
    is_diffusers,
    split,
    to_kohya,
    to_peft,
)
from networks.formats.layer_names import LayerTable, best_table, in_kohyas_names, layers_in, table_of
from networks.formats.peft_config import from_diffusers_metadata
from networks.loading import by_layer
from networks.oft import without_constraint
from networks.registry import detect_kind

if TYPE_CHECKING:
    from torch import Tensor

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # as diffusers' save_lora_weights names it
CONFIG = "adapter_config.json"  # as PEFT's save_pretrained names them
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
KOHYA_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth")


def read_adapter(path: Path, parts: Iterable[AdapterPart]) -> AdapterFile:
    """Read an adapter file of any program for a family with these parts, under kohya's names. AdapterError,
    CheckpointError."""
    return in_kohyas_names(adapter_files.read(path), table_of(parts), peft_config_beside(path))


def peft_config_beside(path: Path) -> Mapping[str, Any] | None:
    """PEFT's configuration beside its file of weights."""
    config = path.parent / CONFIG
    return read_json(config) if path.name in WEIGHTS and config.is_file() else None


def read_lora(source: Path, *families: Iterable[AdapterPart]) -> tuple[Lora, Found]:
    """Read a LoRA of any program; returns it with its format.

    `families`: the parts of each candidate family; the one that knows most of the layers is used, the first of equals.
    AdapterError or CheckpointError names everything that does not fit.
    """
    known = [table_of(parts) for parts in families]
    if (source / DIFFUSERS_FILE).is_file():
        source = source / DIFFUSERS_FILE
    if source.is_dir() or (source.name in WEIGHTS and (source.parent / CONFIG).is_file()):
        tensors, configs, metadata = _read_folders(_folders(source, known), known)
        return from_peft(tensors, configs, metadata, best_table(known, _layers(tensors))), "peft"
    file = adapter_files.read(source)
    table = best_table(known, layers_in(file.tensors))
    if not any(table.find(layer) for layer in layers_in(file.tensors)):
        keys = ", ".join(list(file.tensors)[:3]) or "none"
        raise AdapterError(
            f"{source} has no layers of a supported model (its keys: {keys})",
            "use a LoRA of Stable Diffusion: a file of any program, or a folder of diffusers or PEFT",
        )
    if is_diffusers(file.tensors):
        by_module: dict[str, dict[str, Tensor]] = {}
        for key, tensor in file.tensors.items():
            module, _, name = key.partition(".")
            by_module.setdefault(module, {})[name] = tensor
        return from_peft(by_module, from_diffusers_metadata(file.metadata), file.metadata, table), "diffusers"
    named = in_kohyas_names(file, table)
    found: Found = "kohya" if named.tensors.keys() == file.tensors.keys() else "other"
    return replace(from_kohya(named.tensors, named.metadata, table), notes=named.notes), found


def read_other_kind(source: Path, *families: Iterable[AdapterPart]) -> AdapterFile | None:
    """Read a file of another kind than LoRA under kohya's names, and an OFT with its constraint applied; None for a
    LoRA, unknown tensors or a folder of several modules. AdapterError: there is nothing to convert; CheckpointError."""
    if source.is_dir():
        source = next((source / name for name in WEIGHTS if (source / name).is_file()), source)
    if source.is_dir():
        return None
    file = adapter_files.read(source)
    table = best_table([table_of(parts) for parts in families], layers_in(file.tensors))
    named = in_kohyas_names(file, table, peft_config_beside(source))
    try:
        kinds = {detect_kind([f"layer.{role}" for role in roles]) for roles in by_layer(named.tensors).values()}
    except AdapterError:
        return None
    if not kinds or any(kind.name == "lora" for kind in kinds):
        return None
    tensors = _without_constraints(named.tensors)
    if tensors.keys() == file.tensors.keys() and all(tensors[key] is file.tensors[key] for key in tensors):
        title = ", ".join(sorted(kind.title for kind in kinds))
        raise AdapterError(
            f"it has kohya's names already ({title})", "diffusers' and PEFT's formats hold only LoRA and DoRA"
        )
    metadata = {key: value for key, value in named.metadata.items() if not key.startswith("sshs_")}
    return replace(named, tensors=tensors, metadata=metadata)


def _without_constraints(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OFT's tensors with an alpha of 0, and blocks that rotate as before."""
    found = dict(tensors)
    for key, blocks in tensors.items():
        alpha = tensors.get(key.replace(".oft_blocks", ".alpha"))
        if key.endswith(".oft_blocks") and blocks.ndim == 3 and alpha is not None and float(alpha):
            found[key] = without_constraint(blocks, float(alpha))
            found[key.replace(".oft_blocks", ".alpha")] = alpha * 0
    return found


def write_other_kind(target: Path, file: AdapterFile) -> None:
    """Write an adapter of any kind under kohya's names, completely or not at all. AdapterError or CheckpointError."""
    check_target(target, "kohya")
    adapter_files.write(target, file.tensors, file.metadata)


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
    remove_leftovers(target.parent, only=target.name)
    if to == "kohya":
        adapter_files.write(target, *to_kohya(lora))
        return target
    tensors, configs, metadata = to_peft(lora, text_level=to == "diffusers")
    if to == "diffusers":
        whole = {f"{module}.{key}": tensor for module, own in tensors.items() for key, tensor in own.items()}
        write_safetensors(target, whole, metadata | peft_config.to_diffusers_metadata(configs))
        return target
    with replacing_folder(target) as building:
        for module, own in tensors.items():
            named = {BASE + key: tensor for key, tensor in own.items()}
            write_safetensors(building / module / WEIGHTS[0], named, {"format": "pt"} | metadata)
            write_json(building / module / CONFIG, configs[module])
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


def _folders(source: Path, known: Sequence[LayerTable]) -> list[Path]:
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


def _modules(known: Sequence[LayerTable]) -> list[str]:
    """The modules of all families."""
    return list(dict.fromkeys(place.part.module for table in known for place in table.places))


def _read_folders(
    folders: Iterable[Path], known: Sequence[LayerTable]
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


def _module_of(folder: Path, tensors: Mapping[str, Tensor], known: Sequence[LayerTable]) -> str:
    """The module of the model that a PEFT folder belongs to, by its name or else by its first layer."""
    if folder.name in _modules(known):
        return folder.name
    first = next(iter(tensors), "")
    for place in (place for table in known for place in table.places):
        if first.startswith((f"{place.path}.lora_", f"{place.bare}.lora_")):
            return place.part.module
    raise AdapterError(
        f"{folder}: {first} is not a layer of a supported model" if first else f"{folder} has no tensors",
        "use a LoRA of Stable Diffusion's U-Net or text encoders",
    )
