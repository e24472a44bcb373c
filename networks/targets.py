"""Find the layers of a model that get adapters, by class names (library.checkpoints.adapter_key_names)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from library.checkpoints.adapter_key_names import AdapterPart
from networks.adapter import Kind, Layer

Base = nn.Linear | nn.Conv2d
Norm = nn.LayerNorm | nn.GroupNorm  # loaded files can change them; training does not adapt them


@dataclass(frozen=True)
class Target:
    """A layer of the base model that can have an adapter."""

    root: nn.Module  # the model's module that contains it
    part: AdapterPart
    path: str  # within `root`, with dots
    module: Base | Norm
    layer: Layer

    @property
    def block(self) -> int | None:
        """The index of its block; None outside the blocks, or if its module is not divided into blocks."""
        try:
            return None if self.part.block is None else self.part.block(self.part.to_file(self.path))
        except ValueError:
            return None

    @property
    def is_kernel(self) -> bool:
        """Whether it is a convolution with a kernel larger than 1x1, whose rank is conv_dim."""
        return self.layer.kernel != (1, 1)


def find_targets(
    model: Mapping[str, nn.Module],
    parts: Sequence[AdapterPart],
    *,
    convolutions: bool,
    only: Collection[str] | None = None,
) -> Iterator[Target]:
    """The layers to adapt, in the order of files: part by part, in the order of the module tree. `convolutions`: also
    those in `conv_containers`. `only`: the modules to search (None: all)."""
    for part in parts:
        if part.module not in model or (only is not None and part.module not in only):
            continue
        containers = part.containers | (part.conv_containers if convolutions else frozenset())
        seen: set[str] = set()
        for outer, container in model[part.module].named_modules():
            if type(container).__name__ not in containers:
                continue
            everything = type(container).__name__ in part.conv_containers
            for inner, module in container.named_modules():
                path = f"{outer}.{inner}".strip(".")
                if path in seen or not isinstance(module, Base):
                    continue
                layer = layer_of(part.name(path), module)
                if layer.kernel == (1, 1) or everything:
                    seen.add(path)
                    yield Target(model[part.module], part, path, module, layer)


def all_targets(model: Mapping[str, nn.Module], parts: Sequence[AdapterPart]) -> Iterator[Target]:
    """Every layer of the parts' modules that a file can change. That is more than training adapts: LyCORIS' preset
    "full" includes the first and last convolution and the timestep's layers, its train_norm the normalisations."""
    for part in parts:
        if part.module not in model:
            continue
        root = model[part.module]
        for path, module in root.named_modules():
            if path and isinstance(module, Base | Norm) and module.weight is not None:
                yield Target(root, part, path, module, layer_of(part.name(path), module))


def layer_of(name: str, module: Base | Norm) -> Layer:
    """The shape and geometry of a module, for its adapter."""
    shape = tuple(module.weight.shape)
    if not isinstance(module, nn.Conv2d):
        return Layer(name, shape)
    padding = module.padding if isinstance(module.padding, str) else (module.padding[0], module.padding[1])
    return Layer(
        name,
        shape,
        stride=(module.stride[0], module.stride[1]),
        padding=padding,
        dilation=(module.dilation[0], module.dilation[1]),
        groups=module.groups,
    )


def names_in_files(target: Target, kinds: Sequence[Kind]) -> set[str]:
    """All names of a layer in files. Files written with the module names of transformers 5 lack a level
    (`lora_te_encoder_…`)."""
    names = {target.layer.name, f"{target.part.prefix}_{target.path.replace('.', '_')}"}
    prefixes = {kind.other_prefix for kind in kinds} - {""}
    return names | {prefix + name.removeprefix("lora") for prefix in prefixes for name in names}
