"""A model as foreign network modules expect to find it, over the tensors of the real one.

Such modules were written against kohya's U-Net and older releases of transformers: they look for classes by name
(`CrossAttention`), name layers after the path they find them under (`text_model.encoder.layers…`), patch the `forward`
of layers, and some (LyCORIS's `full`) take the weight away from a layer. So they get stand-ins: copies of the modules
that share every parameter and buffer, in a tree of the shape they know (of SDXL that of the original U-Net,
`input_blocks.4.1…`, as its files have those names). The real modules are never touched by them;
`Model.attach` puts the patched `forward`s into the real layers, `Model.detach` takes them out again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from library.checkpoints.adapter_names import AdapterPart

# Classes of diffusers' modules, and what they are called in the U-Net that kohya's protocol hands over.
KOHYA_CLASSES: Mapping[str, str] = {"Attention": "CrossAttention"}
_OWN = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ABSENT = object()


class Level(nn.Module):
    """One more level of names around a module; everything but the name is the module's own."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)

    def __getattr__(self, name: str) -> Any:
        """An attribute of its own, else of the module inside (config, dtype, …)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = next(iter(self._modules.values()), None)
            if inner is None:  # not built yet
                raise
            return getattr(inner, name)

    def forward(self, *values: Any, **named: Any) -> Any:
        """What the module inside gives."""
        return next(self.children())(*values, **named)


@dataclass(frozen=True)
class Home:
    """Where the stand-in of a module was put: under `key` in `holder`."""

    real: nn.Module
    stand_in: nn.Module
    holder: nn.Module
    key: str


@dataclass
class Model:
    """Stand-ins for the modules of a model, by the modules' names (`unet`, `text_encoder`)."""

    parts: tuple[AdapterPart, ...]
    seen: dict[str, nn.Module]
    pairs: list[tuple[nn.Module, nn.Module]]  # (real, stand-in), each real module once
    homes: list[Home]
    _before: list[tuple[nn.Module, Any]] = field(default_factory=list)

    @property
    def text_encoder(self) -> Any:
        """As the protocol has it: one text encoder as itself, several as a list."""
        found = [self.seen[part.module] for part in self.parts if is_text(part)]
        return found[0] if len(found) == 1 else found

    @property
    def unet(self) -> Any:
        """The module that is no text encoder."""
        return next((self.seen[part.module] for part in self.parts if not is_text(part)), None)

    def attach(self) -> int:
        """Give the real layers the `forward`s that their stand-ins have got since; returns how many are patched."""
        self.detach()
        for real, forward in self._patches():
            self._before.append((real, real.__dict__.get("forward", _ABSENT)))
            real.forward = forward
        return len(self._before)

    def detach(self) -> None:
        """Give the real layers back the `forward`s they had."""
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
        for home in self.homes:  # a layer that was replaced rather than patched
            placed = home.holder._modules.get(home.key)
            if placed is not None and placed is not home.stand_in:
                yield home.real, placed.__call__  # a module itself would become a child of the real layer


def is_text(part: AdapterPart) -> bool:
    """Whether a part is a text encoder, by the name of its learning rate."""
    return part.group.startswith("text_encoder")


def stand_ins(model: Mapping[str, nn.Module], parts: Sequence[AdapterPart], hidden: Collection[str] = ()) -> Model:
    """Stand-ins for the modules of `parts`, with the levels of names that files have.

    Modules of the classes `hidden` come under a class name that nothing looks for: their layers are reached all the
    same, one by one.
    """
    pairs: list[tuple[nn.Module, nn.Module]] = []
    homes: list[Home] = []
    seen = {}
    for part in parts:
        made = {id(real): _copy(real, frozenset(hidden)) for real in model[part.module].modules()}
        pairs += [(real, made[id(real)]) for real in model[part.module].modules()]
        homes += _arrange(model[part.module], made, part.rename)
        inner = made[id(model[part.module])]
        for level in reversed([level for level in part.level.split(".") if level]):
            inner = Level(level, inner)
        seen[part.module] = inner
    return Model(tuple(parts), seen, pairs, homes)


def _copy(real: nn.Module, hidden: frozenset[str]) -> nn.Module:
    """A module of the same class, or of one with another name, with the same tensors and without children."""
    kind = type(real)
    name = f"_{kind.__name__}" if kind.__name__ in hidden else KOHYA_CLASSES.get(kind.__name__, kind.__name__)
    if name != kind.__name__:
        kind = type(name, (kind,), {"__module__": kind.__module__})
    stand_in = kind.__new__(kind)
    # Not by copy.copy, which would share the dictionaries that hold parameters, children and hooks.
    own = {key: value.copy() for key, value in real.__dict__.items() if key in (*_OWN, *_HOOKS)}
    stand_in.__dict__.update(real.__dict__ | own)
    stand_in._modules.clear()
    return stand_in


def _arrange(root: nn.Module, made: Mapping[int, nn.Module], rename: Callable[[str], str]) -> list[Home]:
    """Put the copies under that of `root` by the names that files have.

    What has no name goes with the module around it; where there is none either (a list of a tree of another shape), it
    is left out.
    """
    homes: list[Home] = []
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
        holder = made[id(root)]
        for level in levels:
            inner = holder._modules.get(level)
            holder = _put(holder, level, nn.Module()) if inner is None else inner
        homes.append(Home(real, _put(holder, key, made[id(real)]), holder, key))
    return homes


def _put(holder: nn.Module, key: str, module: nn.Module) -> nn.Module:
    holder._modules[key] = module
    return module
