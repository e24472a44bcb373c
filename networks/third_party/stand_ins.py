"""Stand-ins: the model in the shape that third-party network modules expect, sharing the real model's tensors.

Such modules were written for kohya's U-Net and older releases of transformers: they look for classes by name
(`CrossAttention`), name layers after their path (`text_model.encoder.layers…`), patch the `forward` of layers, and some
(LyCORIS's `full`) remove the weight of a layer. So they receive stand-ins: copies of the modules that share every
parameter and buffer, in the module tree they expect (for SDXL the original U-Net's, `input_blocks.4.1…`, as its files
have those names). They never touch the real modules; `Model.attach` copies the patched `forward`s to the real layers,
`Model.detach` restores the originals.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from library.checkpoints.adapter_key_names import AdapterPart

# Class in diffusers -> class in kohya's U-Net.
KOHYA_CLASSES: Mapping[str, str] = {"Attention": "CrossAttention"}
_OWN = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ABSENT = object()


class Level(nn.Module):
    """One more level of names around a module; everything else comes from the module inside."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)

    def __getattr__(self, name: str) -> Any:
        """Its own attribute, else the inner module's (config, dtype, …)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = next(iter(self._modules.values()), None)
            if inner is None:  # not built yet
                raise
            return getattr(inner, name)

    def forward(self, *values: Any, **named: Any) -> Any:
        """The inner module's output."""
        return next(self.children())(*values, **named)


@dataclass(frozen=True)
class Placement:
    """Where the stand-in of a module is in the tree: child `key` of `holder`."""

    real: nn.Module
    stand_in: nn.Module
    holder: nn.Module
    key: str


@dataclass
class Model:
    """Stand-ins for the modules of a model, by the modules' names (`unet`, `text_encoder`)."""

    parts: tuple[AdapterPart, ...]
    modules: dict[str, nn.Module]
    pairs: list[tuple[nn.Module, nn.Module]]  # (real, stand-in), each real module once
    placements: list[Placement]
    _before: list[tuple[nn.Module, Any]] = field(default_factory=list)

    @property
    def text_encoder(self) -> Any:
        """As in kohya's protocol: a single text encoder, or a list of several."""
        encoders = [self.modules[part.module] for part in self.parts if is_text(part)]
        return encoders[0] if len(encoders) == 1 else encoders

    @property
    def unet(self) -> Any:
        """The module that is not a text encoder."""
        return next((self.modules[part.module] for part in self.parts if not is_text(part)), None)

    def attach(self) -> int:
        """Copy the patched `forward`s of the stand-ins to the real layers; returns the number of patched layers."""
        self.detach()
        for real, forward in self._patches():
            self._before.append((real, real.__dict__.get("forward", _ABSENT)))
            real.forward = forward
        return len(self._before)

    def detach(self) -> None:
        """Restore the original `forward`s of the real layers."""
        while self._before:
            real, forward = self._before.pop()
            if forward is _ABSENT:
                real.__dict__.pop("forward", None)
            else:
                real.forward = forward

    def _patches(self) -> Iterator[tuple[nn.Module, Any]]:
        for real, stand_in in self.pairs:
            patched = stand_in.__dict__.get("forward", _ABSENT)
            if patched is not _ABSENT and patched is not real.__dict__.get("forward", _ABSENT):
                yield real, patched
        for placement in self.placements:  # layers that were replaced rather than patched
            module = placement.holder._modules.get(placement.key)
            if module is not None and module is not placement.stand_in:
                yield placement.real, module.__call__  # the module itself would become a child of the real layer


def is_text(part: AdapterPart) -> bool:
    """Whether a part is a text encoder, by the name of its learning rate group."""
    return part.group.startswith("text_encoder")


def stand_ins(model: Mapping[str, nn.Module], parts: Sequence[AdapterPart], hidden: Collection[str] = ()) -> Model:
    """Stand-ins for the modules of `parts`, with the levels of names that files have.

    Modules of the classes `hidden` get another class name, so that only their layers are matched, by name.
    """
    pairs: list[tuple[nn.Module, nn.Module]] = []
    placements: list[Placement] = []
    modules = {}
    for part in parts:
        copies = {id(real): _copy(real, frozenset(hidden)) for real in model[part.module].modules()}
        pairs += [(real, copies[id(real)]) for real in model[part.module].modules()]
        placements += _build_tree(model[part.module], copies, part.rename)
        inner = copies[id(model[part.module])]
        for level in reversed([level for level in part.level.split(".") if level]):
            inner = Level(level, inner)
        modules[part.module] = inner
    return Model(tuple(parts), modules, pairs, placements)


def _copy(real: nn.Module, hidden: frozenset[str]) -> nn.Module:
    """A module with the same tensors and without children, of the same class (which may be renamed)."""
    kind = type(real)
    name = f"_{kind.__name__}" if kind.__name__ in hidden else KOHYA_CLASSES.get(kind.__name__, kind.__name__)
    if name != kind.__name__:
        kind = type(name, (kind,), {"__module__": kind.__module__})
    stand_in = kind.__new__(kind)
    # copy.copy would share the dictionaries of parameters, children and hooks.
    own = {key: value.copy() for key, value in real.__dict__.items() if key in (*_OWN, *_HOOKS)}
    stand_in.__dict__.update(real.__dict__ | own)
    stand_in._modules.clear()
    return stand_in


def _build_tree(root: nn.Module, copies: Mapping[int, nn.Module], rename: Callable[[str], str]) -> list[Placement]:
    """Arrange the copies under that of `root` by their names in files.

    A module without a name stays in the module around it; if that has no name either (a list that the other tree does
    not have), it is omitted.
    """
    placements: list[Placement] = []
    names: dict[str, str] = {}
    for path, real in root.named_modules(remove_duplicate=False):
        outer, _, last = path.rpartition(".")
        try:
            name = rename(path) if path else None
        except ValueError:
            name = f"{names[outer]}.{last}" if outer in names else None
        if name is None:
            continue
        names[path] = name
        *levels, key = name.split(".")
        holder = copies[id(root)]
        for level in levels:
            inner = holder._modules.get(level)
            holder = _put(holder, level, nn.Module()) if inner is None else inner
        placements.append(Placement(real, _put(holder, key, copies[id(real)]), holder, key))
    return placements


def _put(holder: nn.Module, key: str, module: nn.Module) -> nn.Module:
    holder._modules[key] = module
    return module
