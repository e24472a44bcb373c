"""The file of --network_weights against the network of the run, by its header: kind, layers, ranks. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from library.checkpoints.adapter_key_names import AdapterPart
from library.checkpoints.files import read_header
from library.checkpoints.header import CheckpointError, Header
from library.families.family import Family
from library.families.registry import whole_model
from library.messages import listed
from library.options.mistakes import Mistakes
from networks.adapter import Layer
from networks.formats.layer_names import Place
from networks.planned import (
    InFile,
    ModuleShapes,
    PlannedLayer,
    kind_of,
    layers_of_file,
    rank_in_file,
    weight_shape,
    why_not_for,
    with_rank,
)
from networks.settings import NetworkSettings
from networks.shapes import Shapes

OR_FROM_FILE = ", or --dim_from_weights"


@dataclass(frozen=True)
class InitialWeights:
    """The file, the family of the base model and the shapes of its weights, and the settings of the network.

    `flag` names the file in messages: read() is for files of --base_weights too.
    """

    path: Path
    family: Family
    model: ModuleShapes
    settings: NetworkSettings
    flag: str = "network_weights"

    @property
    def _named(self) -> str:
        return f"--{self.flag} {self.path}"

    def read(self, mistakes: Mistakes) -> InFile | None:
        """What the file holds; None, with mistakes added, if it holds no adapter for the model."""
        try:
            header = read_header(self.path)
        except CheckpointError as error:
            mistakes.add(f"--{self.flag}: {error}")
            return None
        tensors = {name: info.shape for name, info in header.tensors.items()}
        parts = self.family.adapters
        fault = why_not_for(tensors, parts, self.model, self.family.title)
        if fault is not None:
            self._refuse(header, fault, mistakes)
            return None
        return layers_of_file(tensors, parts)[0]

    def _refuse(self, header: Header, fault: str, mistakes: Mistakes) -> None:
        model = whole_model(header)
        if model is None:
            mistakes.add(f"{self._named} {fault}", "give an adapter that was trained on this kind of model")
        else:
            what = f"{self._named} is a whole model ({model.title}), not an adapter"
            mistakes.add(what, f"to train on it, pass it as --pretrained_model_name_or_path and remove --{self.flag}")

    def planned(self, found: InFile, trained: Iterable[str], mistakes: Mistakes) -> tuple[PlannedLayer, ...]:
        """The layers with --dim_from_weights: those of the file that are in trained modules, as they are in it."""
        modules = set(trained)
        layers = tuple(
            PlannedLayer(place.part, Layer(name, weight_shape(place, self.model) or ()), tensors)
            for name, (place, tensors) in found.items()
            if place.part.module in modules
        )
        if not layers:
            mistakes.add(
                f"{self._named} has no adapters for what is trained ({', '.join(map(self._title, sorted(modules)))})",
                "train the modules that the file is for",
            )
        return layers

    def compare(self, found: InFile, planned: Iterable[PlannedLayer], mistakes: Mistakes) -> None:
        """Add mistakes where the network of the run is not the one in the file."""
        if self._other_kind(found, mistakes):
            return
        layers = {one.layer.name: one for one in planned}
        self._compare_layers(found, layers, mistakes)
        points: set[int] = set()
        kernels: set[int] = set()
        others: list[str] = []
        for name, (_, tensors) in found.items():
            if name not in layers or _same(tensors, layers[name].tensors):
                continue
            one, rank = layers[name], rank_in_file(tensors)
            scale = {role: shape for role, shape in one.tensors.items() if role == "dora_scale"}
            if rank and _same(tensors, with_rank(one, self.settings, rank) | scale):
                (kernels if one.layer.kernel != (1, 1) else points).add(rank)
            else:
                others += _differences(name, tensors, one.tensors)
        self._compare_ranks(points, kernels, mistakes)
        if others:
            mistakes.add(
                f"{self._named} does not fit: {listed(others, 2, separator='; ')}",
                f"give the --network_args that it was trained with{OR_FROM_FILE}",
            )

    def _other_kind(self, found: InFile, mistakes: Mistakes) -> bool:
        """Whether the file is of another kind or form than the network, added as a mistake."""
        kinds = {kind for _, tensors in found.values() if (kind := kind_of(tensors)) is not None}
        own, settings = self.settings.kind, self.settings
        if {kind.name for kind in kinds} != {own.file_kind or own.name}:
            modules = [kind.module for kind in sorted(kinds, key=lambda kind: kind.name) if kind.shapes is not None]
            remedy = f"--network_module {modules[0]}{OR_FROM_FILE}" if modules else "merge it with --base_weights"
            what = f"{self._named} is {', '.join(sorted(kind.title for kind in kinds))}, not {own.title}"
            mistakes.add(what, remedy)
            return True
        decomposed = any("dora_scale" in tensors for _, tensors in found.values())
        if decomposed != settings.use_dora:
            what = f"{self._named} is {'a' if decomposed else 'no'} DoRA"
            mistakes.add(what, f"{'add' if decomposed else 'remove'} use_dora=True in --network_args{OR_FROM_FILE}")
        if settings.own.get("init") == "pissa":
            what = f"--network_args init=pissa starts from the base model, not from {self.path}"
            mistakes.add(what, "remove init=pissa, or --network_weights")
        return decomposed != settings.use_dora

    def _compare_layers(self, found: InFile, layers: Mapping[str, PlannedLayer], mistakes: Mistakes) -> None:
        for part in self.family.adapters:
            in_file = {name: place for name, (place, _) in found.items() if place.part.module == part.module}
            in_run = {name for name, one in layers.items() if one.part.module == part.module}
            missing, extra = in_run - in_file.keys(), in_file.keys() - in_run
            title, is_text = self._title(part.module), part.module != self.family.backbone
            only = "--network_train_unet_only" if is_text else "--network_train_text_encoder_only"
            if missing and not in_file:
                mistakes.add(f"{self._named} has no adapters for the {title}", f"{only}{OR_FROM_FILE}")
            elif extra and not in_run:
                other = "--network_train_text_encoder_only" if not is_text else "--network_train_unet_only"
                what = f"{self._named} has adapters for the {title}, which is not trained"
                mistakes.add(what, f"remove {other} and learning rates of 0{OR_FROM_FILE}")
            elif extra and all(_in_convolutions(in_file[name], part) for name in extra):
                shapes = {name: weight_shape(in_file[name], self.model) or () for name in extra}
                kernels = [name for name, shape in shapes.items() if shape[2:] not in ((), (1, 1))]
                ranks = {rank for name in kernels if (rank := rank_in_file(found[name][1]))}
                what = f"{self._named} has adapters on 3x3 convolutions ({_ranks(ranks)})"
                mistakes.add(what, f"add conv_dim={max(ranks, default=4)} to --network_args{OR_FROM_FILE}")
            elif missing and not any(_in_convolutions(place, part) for place in in_file.values()) and not extra:
                what = f"{self._named} has no adapters on 3x3 convolutions"
                mistakes.add(what, f"remove conv_dim from --network_args{OR_FROM_FILE}")
            elif missing or extra:
                what = f"{self._named} has other layers: {listed(sorted(missing | extra))}"
                mistakes.add(what, f"give the --network_args that it was trained with{OR_FROM_FILE}")

    def _compare_ranks(self, points: set[int], kernels: set[int], mistakes: Mistakes) -> None:
        settings = self.settings
        if points:
            remedy = f"--network_dim {min(points)}{OR_FROM_FILE}" if len(points) == 1 else "--dim_from_weights"
            mistakes.add(f"{self._named}: the file has {_ranks(points)}, this run has {settings.dim}", remedy)
        if kernels:
            remedy = f"conv_dim={min(kernels)} in --network_args{OR_FROM_FILE}"
            mistakes.add(
                f"{self._named}: the file has {_ranks(kernels)} on 3x3 convolutions, this run has {settings.conv_dim}",
                remedy if len(kernels) == 1 else "--dim_from_weights",
            )

    def _title(self, module: str) -> str:
        return self.family.module_titles[module]


def _in_convolutions(place: Place, part: AdapterPart) -> bool:
    return bool(part.conv_segments & set(place.bare.split(".")))


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without axes of length 1: 1x1 kernels may be written as matrices."""
    return tuple(size for size in shape if size > 1)


def _same(one: Shapes, other: Shapes) -> bool:
    return not _differences("", one, other)


def _differences(name: str, in_file: Shapes, in_run: Shapes) -> list[str]:
    """Tensors with other shapes; an alpha may be missing."""
    roles = (in_file.keys() | in_run.keys()) - {"alpha"}
    return [
        f"{name}.{role} is {in_file.get(role, 'missing')} in the file, {in_run.get(role, 'missing')} in this run"
        for role in sorted(roles)
        if role not in in_file or role not in in_run or _flat(in_file[role]) != _flat(in_run[role])
    ]


def _ranks(ranks: set[int]) -> str:
    low, high = min(ranks, default=0), max(ranks, default=0)
    return f"rank {low}" if low == high else f"ranks {low} to {high}"
