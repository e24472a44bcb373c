"""From a file's tensors to adapters on a model's layers; what does not fit is told, never passed over."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from library.checkpoints.adapter_names import AdapterPart
from networks import dora
from networks.adapted_layer import AdaptedLayer
from networks.adapter import AdapterError, Kind
from networks.registry import KINDS, detect_kind, load_kind
from networks.settings import NetworkSettings
from networks.targets import Target, all_targets, file_name, names_in_files

_SHOWN = 12


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A file's tensors by layer: name -> {"lora_up.weight": …}."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, role = key.partition(".")
        layers.setdefault(name, {})[role] = tensor
    return layers


def load_layers(
    model: Mapping[str, nn.Module],
    parts: Sequence[AdapterPart],
    tensors: Mapping[str, Tensor],
    settings: NetworkSettings | None = None,
) -> tuple[list[AdaptedLayer], list[str]]:
    """(adapted layers in the model's order, what does not fit). `settings`: how they are to be trained; a LoRA then
    becomes what the settings' kind makes of a LoRA's file (LoRA-FA, DyLoRA)."""
    held = by_layer(tensors)
    layers: list[AdaptedLayer] = []
    problems: list[str] = []
    for target in all_targets(model, parts):
        for name in sorted(names_in_files(target, KINDS) & held.keys()):
            mine = held.pop(name)
            try:
                layers.append(_load(target, name, mine, settings))
            except AdapterError as error:
                problems.append(str(error))
                continue
            problems += [f"{name}.{role} has no meaning in a file of {layers[-1].kind.name}" for role in mine]
    problems += [f"{name} is no layer of this model" for name in sorted(held)]
    return layers, problems


def _load(target: Target, name: str, tensors: dict[str, Tensor], settings: NetworkSettings | None) -> AdaptedLayer:
    try:
        kind = detect_kind([f"{name}.{role}" for role in tensors])
    except AdapterError as error:
        raise AdapterError(f"{name}: {error}", error.remedy) from error
    if len(target.layer.shape) == 1 and kind.name != "norm":
        raise AdapterError(f"{name} is a normalisation, which {kind.title} cannot sit on")
    if settings is not None and settings.kind.file_kind == kind.name:
        kind = settings.kind
    scale = tensors.pop(dora.KEY, None)
    load = load_kind(kind).load
    # what of its own arguments a loaded one needs too (DyLoRA's unit)
    own = {} if settings is None else {k: v for k, v in settings.own.items() if k in inspect.signature(load).parameters}
    adapter: Any = load(target.layer, tensors, **own)
    if scale is not None:
        adapter.register_parameter(dora.KEY, nn.Parameter(dora.fitted(target.layer, scale)))
    if settings is not None:
        for drop in ("dropout", "rank_dropout"):
            if hasattr(adapter, drop):
                setattr(adapter, drop, getattr(settings, drop))
    if name not in {file_name(target, other) for other in KINDS}:
        name = file_name(target, kind)
    return AdaptedLayer(target, name, adapter, kind, settings.module_dropout if settings else 0.0)


def refuse(problems: Sequence[str], what: str) -> None:
    """Raise AdapterError that lists what does not fit, if there is anything."""
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise AdapterError(
            f"{what}: " + "; ".join([*problems[:_SHOWN], *more]),
            "Use a file that was trained on this kind of model. Nothing of it was loaded.",
        )


def main_kind(layers: Iterable[AdaptedLayer]) -> Kind:
    """The kind of most of the layers."""
    kinds = [layer.kind for layer in layers]
    return max(kinds, key=kinds.count)


def fill(layers: Sequence[AdaptedLayer], loaded: Sequence[AdaptedLayer]) -> list[str]:
    """Copy loaded adapters' numbers into those at hand, layer by layer; answers what does not fit, and then has changed
    nothing."""
    given = {layer.name: layer for layer in loaded}
    problems = [f"{layer.name} is not in the file" for layer in layers if layer.name not in given]
    names = {layer.name for layer in layers}
    problems += [f"{name} has no adapter in this network" for name in given if name not in names]
    for layer in layers:
        if layer.name in given:
            problems += _misfit(layer, given[layer.name])
    if problems:
        return problems
    for layer in layers:
        layer.adapter.load_state_dict(given[layer.name].adapter.state_dict())
    return []


def _misfit(layer: AdaptedLayer, other: AdaptedLayer) -> list[str]:
    ours = {key: tuple(value.shape) for key, value in layer.adapter.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in other.adapter.state_dict().items()}
    if ours.keys() != theirs.keys():
        return [f"{layer.name} has {', '.join(sorted(theirs))}, the network {', '.join(sorted(ours))}"]
    wrong = [key for key in ours if ours[key] != theirs[key]]
    return [f"{layer.name}.{key} is {theirs[key]}, in the network {ours[key]}" for key in wrong]
