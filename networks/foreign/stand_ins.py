"""A model as foreign network modules expect to find it, over the tensors of the real one.

Such modules were written against kohya's U-Net and older releases of transformers: they look for classes by name
(`CrossAttention`), name layers after the path they find them under (`text_model.encoder.layers…`), patch the `forward`
of layers, and some (LyCORIS's `full`) take the weight away from a layer. So they get stand-ins: copies of the modules
that share every parameter and buffer, in a tree of the shape they know. The real modules are never touched by them;
`Model.attach` puts the patched `forward`s into the real layers, `Model.detach` takes them out again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
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


@dataclass
class Model:
    """Stand-ins for the modules of a model, by the modules' names (`unet`, `text_encoder`)."""

    parts: tuple[AdapterPart, ...]
    seen: dict[str, nn.Module]
    pairs: list[tuple[nn.Module, nn.Module]]  # (real, stand-in), each real module once
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
        stand_ins = {id(real): stand_in for real, stand_in in self.pairs}
        for real, stand_in in self.pairs:
            patched = stand_in.__dict__.get("forward", _ABSENT)
            if patched is not _ABSENT and patched is not real.__dict__.get("forward", _ABSENT):
                yield real, patched
            for name, child in real._modules.items():  # a layer that was replaced rather than patched
                placed = stand_in._modules.get(name)
                if child is not None and placed is not None and placed is not stand_ins[id(child)]:
                    yield child, placed


def is_text(part: AdapterPart) -> bool:
    """Whether a part is a text encoder, by the name of its learning rate."""
    return part.group.startswith("text_encoder")


def stand_ins(model: Mapping[str, nn.Module], parts: Sequence[AdapterPart], hidden: Collection[str] = ()) -> Model:
    """Stand-ins for the modules of `parts`, with the levels of names that files have.

    Modules of the classes `hidden` come under a class name that nothing looks for: their layers are reached all the
    same, one by one.
    """
    pairs: list[tuple[nn.Module, nn.Module]] = []
    seen = {}
    for part in parts:
        inner = _stand_in(model[part.module], frozenset(hidden), {}, pairs)
        levels = [level for level in part.to_file("").split(".") if level]
        for level in reversed(levels):
            inner = Level(level, inner)
        seen[part.module] = inner
    return Model(tuple(parts), seen, pairs)


def _stand_in(
    real: nn.Module, hidden: frozenset[str], made: dict[int, nn.Module], pairs: list[tuple[nn.Module, nn.Module]]
) -> nn.Module:
    if id(real) in made:  # a module that stands in two places
        return made[id(real)]
    kind = type(real)
    name = f"_{kind.__name__}" if kind.__name__ in hidden else KOHYA_CLASSES.get(kind.__name__, kind.__name__)
    if name != kind.__name__:
        kind = type(name, (kind,), {"__module__": kind.__module__})
    stand_in = made[id(real)] = kind.__new__(kind)
    # Not by copy.copy, which would share the dictionaries that hold parameters, children and hooks.
    own = {key: value.copy() for key, value in real.__dict__.items() if key in (*_OWN, *_HOOKS)}
    stand_in.__dict__.update(real.__dict__ | own)
    pairs.append((real, stand_in))
    for key, child in real._modules.items():
        if child is not None:
            stand_in._modules[key] = _stand_in(child, hidden, made, pairs)
    return stand_in
