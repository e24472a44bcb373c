"""What values an argument takes, from its annotation and its default in the source of a signature. Imports no torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_NAMES: dict[str, type] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    **dict.fromkeys(("tuple", "Tuple", "list", "List", "Sequence"), tuple),
}
_NOT_WRITABLE = ("Tensor",)  # in a union with float: nobody can write one as text


@dataclass(frozen=True)
class Accepts:
    """The values that an argument takes. `types`: of Python literals (list counts as tuple, None as NoneType); empty:
    unknown, so anything. `items`: how many numbers a tuple has (None: any). `example`: a value as text. `required`: it
    has no default."""

    types: frozenset[type] = frozenset()
    items: int | None = None
    example: str = ""
    required: bool = False

    def fault(self, value: Any) -> str:
        """What is wrong with a value ("is not a number"), or an empty text."""
        if not self.types or self._takes(value):
            return ""
        if tuple in self.types:
            return "is not a list of numbers" if self.items is None else f"is not a list of {self.items} numbers"
        names = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", type(None): "None"}
        shown = self.types - ({int} if float in self.types else set())
        return "is not " + " or ".join(name for kind, name in names.items() if kind in shown)

    def _takes(self, value: Any) -> bool:
        if isinstance(value, bool):
            return bool in self.types
        if isinstance(value, int):
            return bool(self.types & {int, float}) or (bool in self.types and value in (0, 1))
        if isinstance(value, float):
            return float in self.types or (int in self.types and value.is_integer())
        if isinstance(value, tuple | list):
            return tuple in self.types and self.items in (None, len(value)) and all(map(_is_number, value))
        return type(value) in self.types


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def accepts(annotation: ast.expr | None, default: ast.expr | None) -> Accepts:
    """What an argument takes; an annotation says more than a default."""
    found = Accepts() if annotation is None else _from_annotation(annotation)
    example = ""
    if default is not None:
        by_default = _from_default(default)
        example = by_default.example
        if annotation is None:
            found = Accepts() if by_default.types == {type(None)} else by_default
        elif found.types and by_default.types == {type(None)}:
            found = Accepts(found.types | by_default.types, found.items)
        elif tuple in found.types and found.items is None:
            found = Accepts(found.types, by_default.items)
    return Accepts(found.types, found.items, example, required=default is None)


def _from_default(default: ast.expr) -> Accepts:
    """The types of a default: a number may be written with or without a point; None says nothing about the type."""
    if isinstance(default, ast.Call) and isinstance(default.func, ast.Name) and default.func.id == "float":
        return Accepts(frozenset({int, float}), example="1.02")  # float("inf"), of growth rates
    try:
        value = ast.literal_eval(default)
    except ValueError:
        return Accepts()
    if value is None:
        return Accepts(frozenset({type(None)}))
    if isinstance(value, tuple | list):
        plain = bool(value) and all(map(_is_number, value))
        return Accepts(frozenset({tuple}), len(value), ",".join(map(str, value))) if plain else Accepts()
    if _is_number(value):
        return Accepts(frozenset({int, float}), example=str(value))
    return Accepts(frozenset({type(value)}), example=str(value)) if isinstance(value, bool | str) else Accepts()


def _from_annotation(annotation: ast.expr) -> Accepts:
    """The types of an annotation; unknown if one of its alternatives is."""
    types: set[type] = set()
    items: int | None = None
    for alternative in _alternatives(annotation):
        name = _name(alternative)
        if isinstance(alternative, ast.Constant) and alternative.value is None:
            types.add(type(None))
        elif name in _NAMES:
            types.add(_NAMES[name])
        elif isinstance(alternative, ast.Subscript) and _name(alternative.value) == "Literal":
            types |= {type(value.value) for value in _members(alternative) if isinstance(value, ast.Constant)}
        elif isinstance(alternative, ast.Subscript) and _NAMES.get(_name(alternative.value)) is tuple:
            types.add(tuple)
            items = _tuple_length(alternative)
        elif name not in _NOT_WRITABLE:
            return Accepts()
    return Accepts(frozenset(types), items)


def _tuple_length(annotation: ast.Subscript) -> int | None:
    if _name(annotation.value).lower() != "tuple":
        return None
    members = _members(annotation)
    return None if any(isinstance(m, ast.Constant) and m.value is Ellipsis for m in members) else len(members)


def _alternatives(annotation: ast.expr) -> Iterator[ast.expr]:
    """The members of unions: X | Y, Union[X, Y], Optional[X], also written as a text."""
    if isinstance(annotation, ast.BinOp):
        yield from _alternatives(annotation.left)
        yield from _alternatives(annotation.right)
    elif isinstance(annotation, ast.Subscript) and _name(annotation.value) in ("Union", "Optional"):
        for member in _members(annotation):
            yield from _alternatives(member)
        if _name(annotation.value) == "Optional":
            yield ast.Constant(None)
    elif isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        yield from _alternatives(ast.parse(annotation.value, mode="eval").body)
    else:
        yield annotation


def _members(annotation: ast.Subscript) -> list[ast.expr]:
    return annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]


def _name(node: ast.expr) -> str:
    """`float` of float, `Tensor` of torch.Tensor."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
