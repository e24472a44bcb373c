"""A network before it is made: its layers and their tensors, from the shapes of the base model's weights, and what a
file of an adapter holds, from its header. No torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from library.checkpoints.adapter_key_names import AdapterPart
from library.messages import counted, listed
from networks import shapes
from networks.adapter import AdapterError, Kind, Layer, LayerSettings
from networks.formats.layer_names import Place, is_bundled, split, table_of
from networks.registry import detect_kind
from networks.settings import NetworkSettings
from networks.shapes import Shapes

ModuleShapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Module of the model -> name of a tensor in it -> shape."""
InFile = Mapping[str, tuple[Place, Shapes]]
"""Name of a layer -> its place in the model, and the shapes of its tensors by name."""
_NOT_TRAINED = frozenset({"alpha", "on_input"})


@dataclass(frozen=True)
class PlannedLayer:
    """A layer of the network. `tensors`: the shapes in a file, by name."""

    part: AdapterPart
    layer: Layer
    tensors: Shapes

    def trained(self, settings: NetworkSettings) -> int:
        """Number of trained parameters."""
        fixed = _NOT_TRAINED | settings.kind.frozen
        return sum(math.prod(shape) for name, shape in self.tensors.items() if name not in fixed)

    @property
    def saved(self) -> int:
        """Number of values in a file."""
        return sum(math.prod(shape) for shape in self.tensors.values())


def plan_layers(
    parts: Sequence[AdapterPart], model: ModuleShapes, settings: NetworkSettings, train: Collection[str]
) -> tuple[PlannedLayer, ...]:
    """The layers that network.create makes of a model with these shapes; `train`: the modules to adapt. AdapterError
    for settings that do not fit a layer."""
    found = []
    for part in parts:
        if part.module not in train or (settings.kind.parts is not None and part.module not in settings.kind.parts):
            continue
        for path, shape in _targets(part, model[part.module], convolutions=settings.convolutions):
            layer = Layer(part.name(path), shape)
            dim, alpha = settings.rank(conv=layer.kernel != (1, 1), block=_block(part, path))
            made = settings.kind.shapes
            tensors = made(layer, LayerSettings(dim, alpha, own=settings.own)) if dim and made is not None else None
            if tensors is not None:
                if settings.use_dora:
                    tensors["dora_scale"] = shapes.dora_scale(layer, by_output=settings.wd_on_output)
                found.append(PlannedLayer(part, layer, tensors))
    return tuple(found)


def _targets(
    part: AdapterPart, tensors: Mapping[str, tuple[int, ...]], *, convolutions: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(path, shape) of the layers to adapt, as targets.find_targets finds them by class."""
    for name, shape in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(shape) not in (2, 4):
            continue
        path = path.removeprefix(part.level)
        around = set(path.split("."))
        in_conv_container = bool(around & part.conv_segments)
        is_point = len(shape) == 2 or shape[2:] == (1, 1)
        if (around & part.segments and is_point) or (convolutions and in_conv_container):
            yield path, shape


def _block(part: AdapterPart, path: str) -> int | None:
    try:
        return None if part.block is None else part.block(part.to_file(path))
    except ValueError:
        return None


def layers_of_file(tensors: Shapes, parts: Sequence[AdapterPart]) -> tuple[InFile, list[str]]:
    """What a file of any program holds, from the shapes in its header, and the layers that are not in a model with
    these parts."""
    table = table_of(parts)
    found: dict[str, tuple[Place, Shapes]] = {}
    unknown: dict[str, None] = {}
    for key, shape in tensors.items():
        if is_bundled(key):
            continue
        name, role = split(key)
        place = table.find(name)
        if place is None:
            unknown[name] = None
        else:
            found.setdefault(place.name, (place, {}))[1][role] = shape
    return found, list(unknown)


def weight_shape(place: Place, model: ModuleShapes) -> tuple[int, ...] | None:
    """The shape of a layer's weight in a model."""
    tensors = model.get(place.part.module, {})
    return tensors.get(f"{place.bare}.weight") or tensors.get(f"{place.path}.weight")


def why_not_for(tensors: Shapes, parts: Sequence[AdapterPart], model: ModuleShapes, title: str) -> str | None:
    """What shows that a file is no adapter for a model with these parts and shapes, to be written after its name; None:
    nothing does. `title`: the kind of model."""
    found, unknown = layers_of_file(tensors, parts)
    if not any(kind_of(of_layer) for _, of_layer in found.values()):
        return f"has no adapters for {title} (its keys: {listed(tensors)})"
    if unknown:
        return f"has {counted(len(unknown), 'layer')} that {title} does not have: {listed(unknown)}"
    wrong = []
    for place, of_layer in found.values():
        shape, size = weight_shape(place, model), shapes.weight_size(of_layer)
        here = None if not shape else (shape[0], math.prod(shape[1:]))
        if here is not None and any(each not in (None, own) for each, own in zip(size, here, strict=True)):
            sizes = " x ".join("?" if each is None else str(each) for each in size)
            wrong.append(f"{place.name} is for a weight of {sizes}, here it is {here[0]} x {here[1]}")
    return f"is for a model of other sizes, in {counted(len(wrong), 'layer')}: {wrong[0]}" if wrong else None


def kind_of(tensors: Collection[str]) -> Kind | None:
    """The kind of a layer's tensors; None: not known, or of several."""
    try:
        return detect_kind([f"layer.{role}" for role in tensors])
    except AdapterError:
        return None


def with_rank(planned: PlannedLayer, settings: NetworkSettings, rank: int) -> Shapes:
    """The shapes of a planned layer with another rank; none if it cannot have that rank."""
    made = settings.kind.shapes
    try:
        tensors = None if made is None else made(planned.layer, LayerSettings(rank, 1.0, own=settings.own))
    except AdapterError:
        return {}
    return tensors or {}


def rank_in_file(tensors: Shapes) -> int | None:
    """The rank of a layer's tensors, for OFT the number of its blocks; None: they have none."""
    for name in ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b", "oft_blocks"):
        if tensors.get(name):
            return tensors[name][0]
    return None
