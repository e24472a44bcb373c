"""Tensors in nested dicts, lists and tuples, as state dicts hold them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any


def copied_tensors(value: Any) -> Any:
    """A copy of nested dicts, lists and tuples with their tensors, in main memory."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        return kind((key, copied_tensors(inner)) for key, inner in value.items())
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(copied_tensors(inner) for inner in value)
    return deepcopy(value)


def tensors_of(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """All tensors in nested dicts, lists and tuples, each with a name that leads to it."""
    import torch

    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from tensors_of(inner, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for place, inner in enumerate(value):
            yield from tensors_of(inner, f"{name}.{place}")
