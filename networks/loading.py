"""Build adapters on a model's layers from a file's tensors, and report every tensor that does not fit."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from library.checkpoints.adapter_key_names import AdapterPart
from library.messages import listed
from networks import dora
from networks.adapted_layer import AdaptedLayer
from networks.adapter import AdapterError, Kind
from networks.readers import LYCORIS
from networks.registry import KINDS, detect_kind, find_kind, load_kind
from networks.settings import NetworkSettings
from networks.targets import Target, all_targets, names_in_files

_MOST_LISTED = 12


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A file's tensors by layer: name -> {"lora_up.weight": …}."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, role = key.partition(".")
        layers.setdefault(name, {})[role] = tensor
    return layers


def is_read_here(module: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether this project's kinds read a file of this network module: of its own modules, and of LyCORIS where every
    layer is of a known kind. LyCORIS 4.1.3 merges a LoHa with alpha / dim squared, unlike it was trained."""
    if find_kind(module) is not None:
        return True
    try:
        return module == LYCORIS and all(
            detect_kind([f"layer.{role}" for role in roles]) for roles in by_layer(tensors).values()
        )
    except AdapterError:
        return False


def load_layers(
    model: Mapping[str, nn.Module],
    parts: Sequence[AdapterPart],
    tensors: Mapping[str, Tensor],
    settings: NetworkSettings | None = None,
) -> tuple[list[AdaptedLayer], list[str]]:
    """(adapted layers in the model's order, problems). `settings`: for training; a LoRA file is then loaded as the
    settings' kind if that shares its format (LoRA-FA, DyLoRA)."""
    remaining = by_layer(tensors)
    layers: list[AdaptedLayer] = []
    problems: list[str] = []
    for target in all_targets(model, parts):
        names = sorted(names_in_files(target, KINDS) & remaining.keys())
        found = [remaining.pop(name) for name in names]
        if len(names) > 1:
            problems.append(f"{' and '.join(names)} are the same layer")
        elif names:
            try:
                layers.append(_load_layer(target, names[0], found[0], settings))
            except AdapterError as error:
                problems.append(str(error))
                continue
            problems += [f"{names[0]}.{role} is not a tensor of {layers[-1].kind.name}" for role in found[0]]
    problems += [f"{name} is not a layer of this model" for name in sorted(remaining)]
    return layers, problems


def _load_layer(
    target: Target, name: str, tensors: dict[str, Tensor], settings: NetworkSettings | None
) -> AdaptedLayer:
    try:
        kind = detect_kind([f"{name}.{role}" for role in tensors])
    except AdapterError as error:
        raise AdapterError(f"{name}: {error}", error.remedy) from error
    if len(target.layer.shape) == 1 and kind.name != "norm":
        raise AdapterError(f"{name} is a normalisation, which {kind.title} does not support")
    if settings is not None and settings.kind.file_kind == kind.name:
        kind = settings.kind
    scale = tensors.pop(dora.KEY, None)
    load = load_kind(kind).load
    # what loading needs of the settings (DyLoRA's unit, OFT's constraint)
    known = {} if settings is None else {**settings.own, "constraint": settings.alpha or float(settings.dim)}
    wanted = inspect.signature(load).parameters
    adapter: Any = load(target.layer, tensors, **{key: value for key, value in known.items() if key in wanted})
    if scale is not None:
        adapter.register_parameter(dora.KEY, nn.Parameter(dora.reshape_scale(target.layer, scale)))
    if settings is not None:
        for drop in ("dropout", "rank_dropout"):
            if hasattr(adapter, drop):
                setattr(adapter, drop, getattr(settings, drop))
    return AdaptedLayer(target, adapter, kind, settings.module_dropout if settings else 0.0)


def raise_problems(problems: Sequence[str], what: str) -> None:
    """Raise AdapterError with the list of problems, if there are any."""
    if problems:
        raise AdapterError(
            f"{what}: {listed(problems, _MOST_LISTED, separator='; ')}",
            "use a file that was trained on this kind of model; nothing was loaded",
        )


def main_kind(layers: Iterable[AdaptedLayer]) -> Kind:
    """The most common kind of the layers."""
    kinds = [layer.kind for layer in layers]
    return max(kinds, key=kinds.count)


def copy_weights(layers: Sequence[AdaptedLayer], loaded: Sequence[AdaptedLayer]) -> list[str]:
    """Copy the weights of loaded adapters into `layers`. Returns the problems; if there are any, nothing is copied."""
    by_name = {layer.name: layer for layer in loaded}
    problems = [f"{layer.name} is not in the file" for layer in layers if layer.name not in by_name]
    names = {layer.name for layer in layers}
    problems += [f"{name} has no adapter in this network" for name in by_name if name not in names]
    for layer in layers:
        if layer.name in by_name:
            problems += _compare_shapes(layer, by_name[layer.name])
    if problems:
        return problems
    for layer in layers:
        layer.adapter.load_state_dict(by_name[layer.name].adapter.state_dict())
    return []


def _compare_shapes(layer: AdaptedLayer, loaded: AdaptedLayer) -> list[str]:
    ours = {key: tuple(value.shape) for key, value in layer.adapter.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in loaded.adapter.state_dict().items()}
    if ours.keys() != theirs.keys():
        return [f"{layer.name} has {', '.join(sorted(theirs))} in the file, {', '.join(sorted(ours))} in the network"]
    wrong = [key for key in ours if ours[key] != theirs[key]]
    return [f"{layer.name}.{key} is {theirs[key]} in the file, {ours[key]} in the network" for key in wrong]
